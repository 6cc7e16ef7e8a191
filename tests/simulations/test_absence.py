"""Devices that are away: who is missing is missing from the sum alone, at the rate that was asked for."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from client.gate import Gate
from common.config import RunConfig
from common.errors import ConfigError, Refusal
from common.ledger_format import verify
from common.wire import Assignment
from simulations.absence import PatchyVault, is_patchy
from simulations.run import Progress, start

USERS = tuple(str(number) for number in range(2000))


class Counting:
    def subjects(self):
        return []

    def train(self, assignment):
        rows = np.ones((len(assignment.users), assignment.spec.model_dim), np.float32) * 0.1
        return Gate().release(rows, assignment.spec, assignment.round)


@pytest.fixture
def spec(release_spec):
    return release_spec(clip=1.0)


def share(spec, number=1, **changes):
    vault = PatchyVault(Counting(), RunConfig(**changes))
    return vault.train(Assignment(spec, number, USERS, np.zeros(6, np.float32))).users / len(USERS)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1.0),
        ({"availability": 0.4}, 0.4),
        ({"dropout": 0.3}, 0.7),
        ({"stragglers": 0.2}, 0.8),
        ({"availability": 0.5, "dropout": 0.5, "stragglers": 0.5}, 0.125),
    ],
)
def test_the_share_that_answers_is_the_one_that_was_asked_for(spec, changes, expected):
    # Of 2,000 coins, five standard deviations are 0.056.
    assert share(spec, **changes) == pytest.approx(expected, abs=0.056)
    assert is_patchy(RunConfig(**changes)) == bool(changes)


def test_stragglers_are_always_the_same_and_the_others_are_not():
    slow = PatchyVault(Counting(), RunConfig(stragglers=0.3))
    rounds = [{user for user in USERS if not slow.answers(user, number)} for number in (1, 2)]
    assert rounds[0] == rounds[1]
    patchy = PatchyVault(Counting(), RunConfig(availability=0.7))
    rounds = [{user for user in USERS if not patchy.answers(user, number)} for number in (1, 2)]
    assert rounds[0] != rounds[1]
    again = PatchyVault(Counting(), RunConfig(availability=0.7))
    assert {user for user in USERS if not again.answers(user, 1)} == rounds[0]
    other = PatchyVault(Counting(), RunConfig(availability=0.7, seed=1))
    assert {user for user in USERS if not other.answers(user, 1)} != rounds[0]


def test_where_nobody_is_there_the_answer_is_a_refusal(spec):
    vault = PatchyVault(Counting(), RunConfig(availability=1e-9))
    with pytest.raises(Refusal) as refused:
        vault.train(Assignment(replace(spec), 1, USERS[:5], np.zeros(6, np.float32)))
    assert refused.value.code == "not-now"


@pytest.mark.parametrize("changes", [{"availability": 0}, {"dropout": 1}, {"stragglers": 1.5}])
def test_shares_outside_of_what_can_be_are_refused(changes):
    with pytest.raises((ConfigError, ValueError)):
        RunConfig(**changes)


def test_a_run_with_absent_devices_ends_and_is_charged_like_any_other(tmp_path, monkeypatch, tiny_base_folder):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    texts = [[f"w{3 + user * 7 + word} w{4 + user} w{5 + word}" for word in range(8)] for user in range(12)]
    lines = (json.dumps({"user": f"u{user}", "texts": own}) + "\n" for user, own in enumerate(texts))
    (tmp_path / "notes.jsonl").write_text("".join(lines))
    config = RunConfig(
        model=str(tiny_base_folder),
        data=str(tmp_path / "notes.jsonl"),
        cohort=12,
        rounds=4,
        local_batch=2,
        personal_steps=2,
        personal_batch=2,
        evaluation_users=3,
        workers=0,
        max_tokens=24,
        rehearsal=True,
        chunk=4,
    )
    whole = start(config, tmp_path / "whole", Progress()).path
    patchy = start(
        config.model_copy(update={"availability": 0.5, "dropout": 0.2}), tmp_path / "patchy", Progress()
    ).path
    events, missing = [], []
    for path in (whole, patchy):
        entries = verify((path / "ledger.jsonl").read_bytes()).entries
        events.append([entry.body["event"] for entry in entries if entry.kind == "debit"])
        lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
        missing.append(sum(sum(line["rejected"].values()) for line in lines))
    assert events[0] == events[1]
    assert missing[0] == 0
    assert 15 <= missing[1] <= 42
