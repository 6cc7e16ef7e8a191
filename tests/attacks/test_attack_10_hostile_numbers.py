"""Attacks 10 and 11: NaN, infinity, 1e38, zeros, wrong types, empty updates; and example counts that would weigh."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.trainer import Trainer
from client.vault import Vault
from common.wire import Assignment, Release, receipt_digest
from server.checkpoint import Checkpoint
from simulations.run import Progress

BAD = {
    "nan": (lambda total: np.full_like(total, np.nan), "not-finite"),
    "infinity": (lambda total: np.where(np.arange(total.size) == 0, np.inf, total).astype(total.dtype), "not-finite"),
    "1e38": (lambda total: np.full_like(total, 1e38), "too-long"),
    "twice the clip": (
        lambda total: (2.01 * total / np.linalg.norm(total.astype(float))).astype(total.dtype),
        "too-long",
    ),
    "integers": (lambda total: total.astype(np.int64), "bad-reply"),
    "half precision": (lambda total: total.astype(np.float16), "misshapen"),
    "too short": (lambda total: total[:-1], "misshapen"),
    "empty": (lambda total: total[:0], "misshapen"),
}


@pytest.mark.parametrize("name", BAD)
def test_attack_10_a_hostile_update_is_left_out_the_round_goes_on_and_the_model_stays_finite(study, name):
    damage, reason = BAD[name]

    def forge(reply, question):
        assignment = Assignment.from_records(question.content)
        release = Release.from_records(reply.content)
        if assignment.users != ("3",):
            total = damage(release.total)
            digest = receipt_digest(total, assignment.spec, assignment.round, 1)
            reply.content = replace(release, total=total, receipt=digest).to_records()
        return [reply]

    study.tap.forge = forge
    lines = []
    path = study.start(
        rounds=1, cohort=20, chunk=1, epsilon=float("inf"), rounds_only=True, progress=Progress(round=lines.append)
    )
    assert lines[0]["rejected"] == {reason: 19}
    vector = Checkpoint.load(path / "checkpoint.safetensors").vector
    assignment, _ = next(iter(study.tap.train()))
    (honest,) = (release for asked, release in study.tap.train() if asked.users == ("3",))
    # What is in the model is the one honest update over the expected twenty, and nothing else.
    np.testing.assert_allclose(vector - assignment.vector, honest.total / 20, atol=1e-7)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e38, 0.0])
def test_attack_10_a_device_whose_training_went_wrong_sends_a_bounded_update_and_the_debit_is_the_same(
    study, monkeypatch, value
):
    """What diverged must not show: a refusal instead of an update would tell about the data."""

    def diverge(self, start, examples, *args, **kwargs):
        return np.full((len(examples), self.layout.size), value, np.float32)

    monkeypatch.setattr(Trainer, "fit", diverge)
    host = study.host()
    device = study.device(host, trust_coordinator=True)
    spec = study.spec(host)
    release = device.ask(study.assignment(spec))
    norm = np.linalg.norm(release.total.astype(np.float64))
    assert np.isfinite(release.total).all()
    assert norm <= spec.clip
    assert norm == 0.0 if not np.isfinite(value) else norm > 0.9 or value == 0.0
    assert device.count("debit") == 1
    device.close()


@pytest.mark.parametrize("users", [0, -1, 2, 10**9, float("nan"), "1", True])
def test_attack_11_a_count_that_a_client_states_gives_it_no_weight(study, users):
    def forge(reply, question):
        content = reply.content
        content["receipt"]["users"] = users
        content["receipt"]["num-examples"] = 10**9
        reply.content = content
        return [reply]

    study.tap.forge = forge
    lines = []
    path = study.start(
        rounds=1, cohort=20, chunk=1, epsilon=float("inf"), rounds_only=True, progress=Progress(round=lines.append)
    )
    assert sum(lines[0]["rejected"].values()) == 20
    assignment, _ = next(iter(study.tap.train()))
    assert (Checkpoint.load(path / "checkpoint.safetensors").vector == assignment.vector).all()


def test_attack_11_a_user_with_many_records_weighs_what_a_user_with_few_does(study):
    """The length of an update is bounded by the clip alone; no number of records is on the wire."""
    host = study.host()
    spec = study.spec(host, clip=0.01)
    few, many = host.population.encoded("4"), host.population.encoded("5")
    crowd = replace(many, train=[*many.train] * 200)
    people = {"few": replace(few, train=few.train[:1]), "many": crowd}
    vault = Vault(host.trainer, people.__getitem__, seed=0)
    norms = [np.linalg.norm(vault.train(study.assignment(spec, users=(name,))).total.astype(float)) for name in people]
    assert norms == pytest.approx([spec.clip, spec.clip], rel=1e-6)
