"""Attacks 12, 13 and 27: a coordinator that asks one user alone, drops the rest, invents users, or weakens the promise.

With central noise a coordinator can do all of it, and the statement says so. Where devices add the noise it cannot.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from common.errors import Refusal, VerificationError
from common.privacy import Randomness, clip_rows
from common.promise import promise_of
from server import run_folder
from server.rounds import add_central_noise


def clipped_update(study, host, spec, user):
    """What a user's update is before there is noise; the coordinator does not have it in local mode."""
    silent = study.spec(host, noise="central")
    release = host.vault.train(study.assignment(silent, users=(user,)))
    return release.total[: spec.model_dim].astype(np.float64)


def test_attack_12_a_device_refuses_a_cohort_below_its_owners_smallest_and_central_noise_unasked(study):
    host = study.host()
    device = study.device(host, smallest_cohort=8, epsilon=50.0)
    device.ask(study.assignment(study.spec(host, noise="local", cohort=8)))
    for cohort in (1, 7):
        with pytest.raises(Refusal) as refused:
            device.ask(study.assignment(study.spec(host, noise="local", cohort=cohort, run="cd" * 16)))
        assert refused.value.code == "policy-cohort"
    with pytest.raises(Refusal) as refused:
        device.ask(study.assignment(study.spec(host, noise="central", cohort=8)))
    assert refused.value.code == "policy-trust"
    assert device.count("debit") == 1
    device.close()


def test_attack_12_and_27_who_is_asked_alone_among_dropped_or_invented_users_is_behind_all_the_noise(study):
    """The coordinator drops everybody else, or knows what its own users sent: one noised update is what is left."""
    host = study.host(rank=16)
    spec = study.spec(host, noise="local")
    scale = 2.0 * spec.noise_multiplier * spec.clip
    alone = host.vault.train(study.assignment(spec, users=("3",))).total.astype(np.float64)
    left = alone[: spec.model_dim] - clipped_update(study, host, spec, "3")
    assert np.std(left) == pytest.approx(scale, rel=0.1)
    assert np.std(alone[spec.model_dim :]) == pytest.approx(scale, rel=0.25)
    # What is left when seven users that the coordinator invented are subtracted from a sum is that one release.
    sybils = sum(clipped_update(study, host, spec, str(user)) for user in range(4, 11))
    victim = (alone[: spec.model_dim] + sybils) - sybils
    assert np.std(victim - clipped_update(study, host, spec, "3")) == pytest.approx(scale, rel=0.1)


def test_attack_12_a_silo_that_is_asked_alone_has_its_noise_in_every_step(study):
    host = study.host(unit="example", rank=16)
    spec = study.spec(host, unit="example", epsilon=1.0)
    recipe = {**spec.recipe, "optimizer": "sgd", "local_steps": 1, "learning_rate": 1e-3}
    spec = study.spec(host, unit="example", epsilon=1.0, recipe=recipe)
    moved = host.vault.train(study.assignment(spec, users=("3",))).total.astype(np.float64)
    promised = spec.noise_multiplier * spec.clip * recipe["learning_rate"] / recipe["local_batch"]
    # One step of plain descent moves by the noised sum: the gradient of a few records is nothing beside the noise.
    assert np.std(moved) == pytest.approx(promised, rel=0.1)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"clip": 1.5}, "policy-clip"),
        ({"noise_multiplier": 0.0}, "policy-noise"),
        ({"noise_multiplier": 1e-3}, "policy-noise"),
        ({"epsilon": math.inf}, "policy-noise"),
        ({"epsilon": 60.0, "noise_multiplier": 5.0}, "policy-epsilon"),
        ({"delta": 0.05}, "policy-delta"),
        ({"rounds": 2000}, "policy-rounds"),
        ({"noise": "central"}, "policy-trust"),
        ({"noise": "none"}, "bad-request"),
        ({"extrapolation": 0.1}, "claim-refused"),
    ],
)
def test_attack_13_a_server_that_weakens_the_promise_is_refused_before_any_work(study, change, code, monkeypatch):
    host = study.host()
    device = study.device(host, epsilon=50.0)
    monkeypatch.setattr(type(host.trainer), "fit", lambda *_, **__: pytest.fail("it trained"))
    if change == {"noise": "none"}:
        spec = replace(study.spec(host, noise="local"), noise="none")
    else:
        spec = study.spec(host, **{"noise": "local", **change})
    with pytest.raises(Refusal) as refused:
        device.ask(study.assignment(spec))
    assert refused.value.code == code
    assert [entry.kind for entry in device.ledger.entries()] == ["open"]
    device.close()


def test_attack_13_a_change_between_two_rounds_is_another_spec_and_another_debit(study):
    host = study.host()
    device = study.device(host, epsilon=8.0)
    spec = study.spec(host, noise="local")
    device.ask(study.assignment(spec))
    weaker = study.spec(host, noise="local", noise_multiplier=0.9 * spec.noise_multiplier)
    with pytest.raises(Refusal) as refused:
        device.ask(study.assignment(weaker, 2))
    assert refused.value.code == "budget-spent"
    device.close()


@pytest.mark.parametrize("file", ["spec.json", "config.toml"])
def test_attack_13_a_run_folder_whose_promise_was_edited_does_not_go_on(study, file):
    path = study.start(rounds=2, rounds_only=True)
    run_folder.reopen(path).ledger.close()
    written = path / file
    text = written.read_text()
    if file == "spec.json":
        spec = json.loads(text)
        changed = json.dumps({**spec, "noise_multiplier": spec["noise_multiplier"] / 10})
    else:
        changed = text.replace("rehearsal = false", "rehearsal = true")
    assert changed != text
    written.write_text(changed)
    with pytest.raises(VerificationError):
        run_folder.reopen(path)
    written.write_text(text)
    run_folder.reopen(path).ledger.close()


def test_attack_13_without_a_budget_it_says_so_and_never_nothing(study):
    path = study.start(rounds=1, epsilon=math.inf)
    statement = json.loads((path / "statement.json").read_text())
    assert statement["epsilon"] == "inf"
    assert "no privacy claim" in statement["sentence"]
    assert "infinite" in (path / "report.html").read_text()


def test_attacks_04_12_13_and_27_central_noise_lists_what_the_coordinator_can_do_as_not_covered(study):
    host = study.host()
    spec = study.spec(host)
    said = promise_of(spec).statement(spec, spec.rounds)
    listed = " ".join(said.not_covered)
    for words in ("without noise", "one user alone", "drop all others", "users of its own", "noise as promised"):
        assert words in listed
    assert "against the coordinator epsilon is infinite" in said.sentence()
    # And it is true: the noise that is added hides one user in the model, and the coordinator has the sum before it.
    rows = clip_rows(np.ones((1, spec.model_dim), np.float32), spec.clip)
    total = np.concatenate([rows[0].astype(np.float64), np.zeros(spec.witnesses)])
    assert np.linalg.norm(add_central_noise(total, spec, Randomness.system()) - total) > spec.clip
    for mode in ({"noise": "local"}, {"unit": "example"}):
        other = study.spec(host, **mode)
        listed = " ".join(promise_of(other).statement(other, other.rounds).not_covered)
        assert "coordinator" not in listed
        assert "which device was asked" in listed
