"""Tests of rounds with distributed noise at the server: who may come, what is called off, what is published."""

import json
import math
from collections import Counter

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from client.gate import Gate, Shares
from common.accounting import Gaussian, PoissonGaussian, Repeated, event_from_json
from common.errors import BudgetSpent, DataError
from common.ledger import verify
from common.privacy import Randomness, clip_rows
from common.secure_sum import SecureSum
from server.app import app
from server.secure_sums import CalledOff, Participation, modular_sum, published


class SummingVault:
    """The production seam: encodes and sums as a vault does in a simulation, without a model."""

    residents = ()

    def __init__(self, update_of):
        self.update_of, self.seen = update_of, []

    def subjects(self):
        return []

    def train(self, assignment):
        self.seen.append(assignment)
        spec, sums = assignment.spec, SecureSum.of(assignment.spec)
        rows = np.stack([self.update_of(name, assignment.round, assignment.vector) for name in assignment.users])
        own = [Randomness.rehearsal(0, "sum", assignment.round, name) for name in assignment.users]
        shares = Shares(sums.noise(spec, assignment.devices), sums.terms(spec, assignment.round).digest, own)
        return Gate().release(clip_rows(rows, spec.clip), spec, assignment.round, shares=shares)


@pytest.fixture
def summing(nodes, update_of):
    """A function `(count) -> Nodes` whose vaults encode their users' updates."""
    return lambda count=2: nodes(SummingVault(update_of) for _ in range(count))


@pytest.fixture
def distributed(prepare):
    """A function that prepares a run of twelve users who are all in every round."""

    def distributed(**changes):
        facts = {"noise": "distributed", "users": 12, "cohort": 12, "rounds": 3, "epsilon": 8.0, "rehearsal": True}
        return prepare(**facts | changes)

    return distributed


def users_of(message):
    request = message.content.config_records.get("request")
    return [] if request is None else request["users"]


def entries(run, kind):
    return [entry.body for entry in verify((run.path / "ledger.jsonl").read_bytes()).entries if entry.kind == kind]


def test_the_sum_that_is_published_is_that_of_the_clipped_updates_but_for_noise_and_rounding(
    distributed, summing, update_of
):
    run = distributed(epsilon=math.inf, rounds=1)
    grid = summing()
    state = run.run(grid)
    start = grid.vaults[2].seen[0].vector
    rows = clip_rows(np.stack([update_of(str(name), 1, start) for name in range(12)]), 1.0).astype(np.float64)
    moved = state.vector.astype(np.float64) - start
    spec = run.spec
    noise = SecureSum.of(spec).noise(spec, 12)
    # Rounding alone: 12 devices, each off by at most one step in each padded coordinate.
    assert np.linalg.norm(moved - rows.sum(axis=0) / 12) <= math.sqrt(noise.padded_dim) * noise.step * 1.01


def test_a_run_reserves_against_outsiders_and_states_what_holds_against_the_coordinator(distributed, summing):
    run = distributed()
    run.run(summing())
    assert run.kinds() == ["open", "reserve", "coordinator"] + ["debit", "release"] * 3
    sums, spec = SecureSum.of(run.spec), run.spec
    (reserved,), (known,) = entries(run, "reserve"), entries(run, "coordinator")
    assert event_from_json(reserved["event"]) == Repeated(PoissonGaussian(1.0, spec.noise_multiplier), spec.rounds) or (
        event_from_json(reserved["event"]) == Repeated(Gaussian(spec.noise_multiplier), spec.rounds)
    )
    assert event_from_json(known["event"]) == Repeated(Gaussian(sums.noise_multiplier), sums.participation_cap)
    assert known["epsilon"] == float(sums.epsilon)
    assert known["reservation"] == 1


def test_the_noise_that_is_published_has_the_level_whatever_number_survives(distributed, summing):
    levels = []
    for lost in (0, 4):
        run = distributed(name=f"lost-{lost}", rounds=1, epsilon=2.0, round_timeout=2.0)
        grid = summing()
        if lost:
            grid.drop = lambda message: bool({"0", "2"} & set(users_of(message)))
        assert run.run(grid).round == 1
        lines = [json.loads(line) for line in (run.path / "witnesses.jsonl").read_text().splitlines()]
        levels.append(float(np.mean(np.square([line["values"] for line in lines]))))
    spec = run.spec
    noise = SecureSum.of(spec).noise(spec, 12)
    for level in levels:
        assert abs(level / (noise.level * noise.step) ** 2 - 1) < 6 * math.sqrt(2 / 256) + 0.02


def test_a_round_with_too_few_left_publishes_nothing_and_stays_debited(distributed, summing):
    run = distributed(rounds=2, round_timeout=1.0, spare_rounds=2)
    grid = summing()
    lost = []

    def drop(message):
        # In the first round ten of twelve are lost: five chunks of two.
        users = users_of(message)
        if message.metadata.group_id == "1" and users and users[0] != "0":
            lost.append(users)
            return True
        return False

    grid.drop = drop
    state = run.run(grid)
    assert len(lost) == 5
    assert state.round == 2
    assert run.kinds() == ["open", "reserve", "coordinator", "debit"] + ["debit", "release"] * 2
    assert [body["round"] for body in entries(run, "debit")] == [1, 2, 3]
    assert [body["round"] for body in entries(run, "release")] == [1, 2]
    # The lost round is asked under a number of its own: a device answers no round twice.
    assert {one.round for vault in grid.vaults.values() for one in vault.seen} == {1, 2, 3}


def test_rounds_that_are_called_off_again_and_again_end_with_the_reservation(distributed, summing):
    run = distributed(rounds=2, round_timeout=0.2, spare_rounds=1)
    grid = summing()
    grid.drop = lambda message: message.metadata.message_type == "train"
    with pytest.raises(BudgetSpent):
        run.run(grid)
    assert run.debits() == 3
    assert run.kinds().count("release") == 0


def test_the_runs_log_says_which_rounds_were_called_off_and_why_it_ended(distributed, summing):
    run = distributed(rounds=2, round_timeout=0.2, spare_rounds=1)
    grid = summing()
    grid.drop = lambda message: message.metadata.message_type == "train"
    with pytest.raises(BudgetSpent):
        app(
            grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={"folder": str(run.path)})
        )
    log = [json.loads(line) for line in (run.path / "events.jsonl").read_text().splitlines()]
    assert [one["event"] for one in log] == ["begun", *["called-off"] * 3, "refused"]
    assert [one["spent"] for one in log[1:4]] == [1, 2, 3]
    assert "3" in log[-1]["reason"]


def test_a_crash_between_debit_and_checkpoint_asks_for_another_round_number(distributed, summing, monkeypatch):
    run = distributed(rounds=1)
    grid = summing()
    monkeypatch.setattr("server.rounds.published", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run.run(grid)
    monkeypatch.undo()
    monkeypatch.setenv("HOMESPUN_HOME", str(run.path.parent / "home"))
    again = summing()
    assert run.run(again).round == 1
    assert {one.round for vault in again.vaults.values() for one in vault.seen} == {2}
    assert [body["round"] for body in entries(run, "debit")] == [1, 2]


def test_nobody_takes_part_more_often_than_the_cap_also_over_a_restart(distributed, summing, tmp_path):
    run = distributed(rounds=3, participation_cap=2)
    grid = summing()
    run.run(grid, stop_after=2)
    again = summing()
    with pytest.raises(BudgetSpent):  # nobody is left who may come, and the spare rounds are called off
        run.run(again)
    asked = Counter(name for vault in grid.vaults.values() for one in vault.seen for name in one.users)
    assert set(asked.values()) == {2}
    assert not any(vault.seen for vault in again.vaults.values())
    (run.path / "participation.json").write_text("[1]")
    with pytest.raises(DataError):
        Participation.open(run.path, run.spec)


def test_a_sum_of_another_size_than_the_run_allows_is_called_off(distributed):
    spec = distributed().spec
    for devices in (0, 5, 13):
        with pytest.raises(CalledOff):
            modular_sum(spec, 1, devices)


def test_what_is_not_a_sum_of_this_round_does_not_enter_it(distributed, update_of):
    spec = distributed().spec
    sums = SecureSum.of(spec)

    def release(number, devices=12, users=1):
        rows = np.stack([update_of(str(name), 1, np.zeros(spec.model_dim, np.float32)) for name in range(users)])
        own = [Randomness.system() for _ in range(users)]
        shares = Shares(sums.noise(spec, devices), sums.terms(spec, number).digest, own)
        return Gate().release(clip_rows(rows, spec.clip), spec, number, shares=shares)

    from dataclasses import replace

    total = modular_sum(spec, 1, 12)
    good = release(1)
    assert not total.add(release(2), 1)  # of another round
    assert not total.add(replace(good, total=good.total[:-1]), 1)
    assert not total.add(replace(good, total=good.total.astype(np.float64)), 1)
    assert not total.add(replace(good, users=2), 1)
    assert total.users == 0
    assert not total.words.any()
    assert total.rejected == {"receipt": 1, "misshapen": 2, "miscounted": 1}
    assert total.add(good, 1)
    with pytest.raises(CalledOff):  # one of twelve is not enough to take masks off
        published(total, Randomness.system())
