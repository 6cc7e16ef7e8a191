"""Rounds: the arithmetic, the order of what is written, crashes, and everything that can be wrong with who answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from common.errors import BudgetSpent, ConfigError, DataError
from common.privacy import Randomness, clip_rows
from common.wire import Release, receipt_digest
from server import rounds as rounds_module
from server import run_folder
from server.checkpoint import Checkpoint
from server.rounds import Rounds, spent_epsilon

PRIVATE = {"epsilon": 8.0, "spare_rounds": 2}


class PowerCut(BaseException):
    """Not an Exception: nothing in between may tidy up after it."""


def oracle(prepared, update_of, rounds, *, population=12, rate=0.5):
    """The same rounds, naively: one user after the other, from the published definition."""
    vector = Checkpoint.load(prepared.path / run_folder.CHECKPOINT).vector
    for number in range(1, rounds + 1):
        randomness = Randomness.rehearsal(4, "round", number)
        chosen = randomness.child("cohort").poisson_sample(population, rate)
        total = np.zeros(vector.size)
        for name in map(str, chosen):
            total += clip_rows(update_of(name, number, vector)[None], 1.0)[0].astype(np.float64)
        spec = prepared.spec
        if spec.noise_multiplier:
            drawn = randomness.child("noise").normal(spec.dim)[: spec.model_dim]
            total += spec.noise_multiplier * spec.clip * drawn
        vector = (vector + (total / (rate * population)).astype(np.float32)).astype(np.float32)
    return vector


def test_rounds_without_noise_are_the_clipped_mean_over_the_expected_cohort(prepare, simulated, update_of):
    run = prepare()
    expected = oracle(run, update_of, 3)
    state = run.run(simulated())
    assert state.round == 3
    np.testing.assert_allclose(state.vector, expected, rtol=0, atol=1e-6)
    assert [finished.rejected for finished in run.finished] == [{}, {}, {}]


def test_central_noise_is_the_specs_multiplier_times_the_clip(prepare, simulated, update_of):
    run = prepare(**PRIVATE)
    assert run.spec.noise_multiplier > 0.5
    expected = oracle(run, update_of, 3)
    np.testing.assert_allclose(run.run(simulated()).vector, expected, rtol=0, atol=1e-6)


def test_outside_a_rehearsal_cohorts_and_noise_are_not_the_seeds(prepare, simulated):
    runs = [prepare(name, rehearsal=False, **PRIVATE) for name in ("a", "b")]
    first, second = (run.run(simulated()).vector for run in runs)
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("nodes", [1, 5])
def test_the_result_does_not_depend_on_how_many_nodes_there_are(prepare, simulated, nodes):
    few, many = prepare("few").run(simulated(2)), prepare("many").run(simulated(nodes))
    assert few.vector.tobytes() == many.vector.tobytes()


def test_the_result_does_not_depend_on_who_answers_first(prepare, simulated):
    vectors = set()
    for seed in range(3):
        grid = simulated(3)
        order = np.random.default_rng(seed)
        grid.shuffle = lambda replies, order=order: [replies[index] for index in order.permutation(len(replies))]
        vectors.add(prepare(f"run-{seed}", chunk=1, cohort=12).run(grid).vector.tobytes())
    assert len(vectors) == 1


# What is written, and when


def test_every_round_debits_before_it_draws_noise_and_is_durable_before_it_is_seen(prepare, simulated, monkeypatch):
    run, seen = prepare(**PRIVATE), []
    ledger = run.path / run_folder.LEDGER
    add_noise = rounds_module.add_central_noise

    def watched(total, spec, randomness):
        seen.append(("noise", ledger.read_text().count('"kind":"debit"')))
        return add_noise(total, spec, randomness)

    monkeypatch.setattr(rounds_module, "add_central_noise", watched)
    save = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", lambda self, path: (seen.append(("save", self.round)), save(self, path))[1])
    run.run(simulated())
    assert seen == [("noise", 1), ("save", 1), ("noise", 2), ("save", 2), ("noise", 3), ("save", 3)]
    assert run.kinds() == ["open", "reserve", *["debit", "release"] * 3]


def test_what_was_debited_is_what_was_reserved_and_run(prepare, simulated):
    run = prepare(**PRIVATE)
    run.run(simulated())
    opened = run_folder.reopen(run.path)
    entries = opened.ledger.entries()
    opened.ledger.close()
    reserve = next(entry for entry in entries if entry.kind == "reserve")
    for number, entry in enumerate((entry for entry in entries if entry.kind == "debit"), start=1):
        assert (entry.body["round"], entry.body["reservation"]) == (number, reserve.index)
        assert entry.body["event"]["noise_multiplier"] == run.spec.noise_multiplier
    assert spent_epsilon(run.spec, 3) < spent_epsilon(run.spec, 5) <= 8.0
    assert spent_epsilon(run.spec, 0) == 0.0


def crash_at(monkeypatch, where: str, number: int) -> None:
    """Cut the power in round `number`: before its checkpoint, or right after it."""
    save = Checkpoint.save

    def interrupted(self, path):
        if self.round == number and where == "before":
            raise PowerCut
        save(self, path)
        if self.round == number and where == "after":
            raise PowerCut

    monkeypatch.setattr(Checkpoint, "save", interrupted)


@pytest.mark.parametrize(("where", "debits"), [("before", 4), ("after", 3)])
@pytest.mark.parametrize(
    "changes", [{}, PRIVATE, {"server_momentum": 0.9}, {"server_optimizer": "adam", "server_learning_rate": 0.01}]
)
def test_a_crash_costs_at_most_a_spare_round_and_changes_nothing_else(
    prepare, simulated, monkeypatch, where, debits, changes
):
    whole = prepare("whole", **changes).run(simulated())
    run = prepare("cut", **changes)
    with monkeypatch.context() as patch:
        crash_at(patch, where, 2)
        with pytest.raises(PowerCut):
            run.run(simulated())
    state = run.run(simulated())
    assert (state.round, run.debits()) == (3, debits)
    assert state.vector.tobytes() == whole.vector.tobytes()
    assert state.velocity.tobytes() == whole.velocity.tobytes()


def test_when_the_spare_rounds_are_used_up_the_run_ends_and_says_so(prepare, simulated, monkeypatch):
    run = prepare(**PRIVATE)
    with monkeypatch.context() as patch:
        crash_at(patch, "before", 2)
        for _ in range(3):
            with pytest.raises(PowerCut):
                run.run(simulated())
    assert run.debits() == 4
    with pytest.raises(BudgetSpent, match="6 of 5"):
        run.run(simulated())
    assert run.debits() == 5
    assert spent_epsilon(run.spec, run.debits()) <= 8.0


def test_a_run_that_was_stopped_goes_on_to_the_very_same_result(prepare, simulated):
    changes = PRIVATE | {"server_momentum": 0.5, "rounds": 5}
    whole = prepare("whole", **changes).run(simulated())
    run = prepare("stopped", **changes)
    for stop_after in (2, 3, None):
        state = run.run(simulated(), stop_after=stop_after)
    assert [finished.number for finished in run.finished] == [1, 2, 3, 4, 5]
    assert state.vector.tobytes() == whole.vector.tobytes()
    assert run.debits() == 5


def test_a_finished_run_runs_nothing_more(prepare, simulated):
    run = prepare()
    first = run.run(simulated())
    again = run.run(simulated())
    assert first.vector.tobytes() == again.vector.tobytes()
    assert run.debits() == 3


def test_a_checkpoint_of_another_ledger_is_not_continued(prepare, simulated):
    ours, theirs = prepare("ours"), prepare("theirs")
    ours.run(simulated(), stop_after=1)
    theirs.run(simulated(), stop_after=1)
    (theirs.path / run_folder.CHECKPOINT).replace(ours.path / run_folder.CHECKPOINT)
    with pytest.raises(ConfigError, match="does not hold the entry"):
        ours.run(simulated())


# Who answers


def test_an_empty_cohort_is_a_round_of_noise_alone(prepare, simulated):
    def cohort(seed):
        return Randomness.rehearsal(seed, "round", 1).child("cohort").poisson_sample(40, 1 / 40)

    seed = next(seed for seed in range(100) if not len(cohort(seed)))
    run = prepare(cohort=1, users=40, rounds=1, seed=seed, **PRIVATE)
    start = Checkpoint.load(run.path / run_folder.CHECKPOINT).vector
    grid = simulated()
    state = run.run(grid)
    assert [len(vault.seen) for vault in grid.vaults.values()] == [0, 0]
    drawn = Randomness.rehearsal(seed, "round", 1).child("noise").normal(run.spec.dim)[: run.spec.model_dim]
    np.testing.assert_allclose(state.vector, start + run.spec.noise_multiplier * drawn, rtol=1e-5, atol=1e-6)
    assert run.debits() == 1


def test_a_device_that_is_away_is_missing_from_the_sum_and_from_nothing_else(prepare, devices, update_of):
    run = prepare(users=12, cohort=12, rounds=1)
    start = Checkpoint.load(run.path / run_folder.CHECKPOINT).vector
    grid = devices(12)
    hello = grid.send_and_receive

    def leaves_after_hello(messages, *, timeout=None):
        replies = hello(messages, timeout=timeout)
        grid.away = {4}
        return replies

    grid.send_and_receive = leaves_after_hello
    state = run.run(grid)
    (finished,) = run.finished
    assert finished.rejected == {"unavailable": 1}
    there = [f"{index:032x}" for index in range(1, 13) if index != 3]  # node 4 hosts the third
    total = sum(clip_rows(update_of(name, 1, start)[None], 1.0)[0].astype(np.float64) for name in there)
    np.testing.assert_allclose(state.vector, start + total / 12, rtol=0, atol=1e-6)


@pytest.mark.parametrize("trouble", ["drop", "refuse"])
def test_messages_that_are_lost_cost_utility_and_never_the_round(prepare, simulated, trouble):
    grid = simulated()
    run = prepare(cohort=12, chunk=3, rounds=2, round_timeout=0.3)
    lost = []

    def first_of_each_round(message):
        is_first = message.metadata.message_type == "train" and message.metadata.group_id not in lost
        if is_first:
            lost.append(message.metadata.group_id)
        return is_first

    setattr(grid, trouble, first_of_each_round)
    assert run.run(grid).round == 2
    reason = {"drop": "silent", "refuse": "unavailable"}[trouble]
    assert [finished.rejected for finished in run.finished] == [{reason: 3}, {reason: 3}]


def test_a_grid_that_takes_nothing_at_all_gives_rounds_of_nothing(prepare, simulated):
    run = prepare(cohort=12, rounds=1)
    start = Checkpoint.load(run.path / run_folder.CHECKPOINT).vector
    grid = simulated()
    push = grid.push_messages
    grid.push_messages = lambda messages: [] if messages[0].metadata.message_type == "train" else push(messages)
    assert run.run(grid).vector.tobytes() == start.tobytes()
    assert run.finished[0].rejected == {"unavailable": 12}


HOSTILE = {
    "not-finite": lambda release: replace(release, total=release.total * np.nan),
    "misshapen": lambda release: replace(release, total=release.total[:-1]),
    "too-long": lambda release: replace(release, total=release.total * 1e30),
    "miscounted": lambda release: replace(release, users=release.users + 1),
    "receipt": lambda release: replace(release, receipt="0" * 64),
    "bad-reply": lambda release: replace(release, receipt="short"),
}


@pytest.mark.parametrize("reason", HOSTILE)
def test_a_hostile_node_neither_poisons_the_sum_nor_ends_the_round(prepare, nodes, plain_vault, update_of, reason):
    class Hostile(plain_vault):
        def train(self, assignment):
            return HOSTILE[reason](super().train(assignment))

    run = prepare(cohort=12, chunk=3, rounds=1)
    start = Checkpoint.load(run.path / run_folder.CHECKPOINT).vector
    state = run.run(nodes([plain_vault(), Hostile()]))
    (finished,) = run.finished
    assert finished.rejected == {reason: 6}
    honest = [str(number) for number in (0, 1, 2, 6, 7, 8)]  # chunks alternate between the two nodes
    total = sum(clip_rows(update_of(name, 1, start)[None], 1.0)[0].astype(np.float64) for name in honest)
    np.testing.assert_allclose(state.vector, start + total / 12, rtol=0, atol=1e-6)


def test_a_release_of_an_earlier_round_does_not_count_again(prepare, nodes, plain_vault):
    class Replaying(plain_vault):
        kept = None

        def train(self, assignment):
            self.kept = self.kept or super().train(assignment)
            return self.kept

    run = prepare(cohort=12, chunk=12, rounds=2)
    run.run(nodes([Replaying()]))
    assert [finished.rejected for finished in run.finished] == [{}, {"receipt": 12}]


def test_a_node_cannot_weigh_more_than_its_users(prepare, nodes, plain_vault):
    class Heavy(plain_vault):
        def train(self, assignment):
            total = np.full(assignment.spec.dim, 10.0)
            users = len(assignment.users)
            return Release(total, users, receipt_digest(total, assignment.spec, assignment.round, users))

    run = prepare(cohort=12, chunk=4, rounds=1)
    start = Checkpoint.load(run.path / run_folder.CHECKPOINT).vector
    assert run.run(nodes([Heavy()])).vector.tobytes() == start.tobytes()
    assert run.finished[0].rejected == {"too-long": 12}


def test_a_device_whose_reply_flower_cannot_read_ends_nobodys_round(prepare, devices):
    grid = devices(3)
    push, pull, unreadable = grid.push_messages, grid.pull_messages, []

    def push_messages(messages):
        unreadable.extend(
            message.metadata.message_id
            for message in messages
            if message.metadata.message_type == "train" and message.metadata.dst_node_id == 3
        )
        return push(messages)

    def pull_messages(identifiers):
        if set(identifiers) & set(unreadable):
            raise ValueError("not an object of this kind")
        return pull(identifiers)

    grid.push_messages, grid.pull_messages = push_messages, pull_messages
    run = prepare(users=3, cohort=3, rounds=1)
    assert run.run(grid).round == 1
    assert run.finished[0].rejected == {"bad-reply": 1}


def test_a_server_that_cannot_be_reached_ends_the_run_before_a_debit(prepare, devices):
    grid = devices(2)
    pull = grid.pull_messages

    def unreachable(identifiers):
        if grid.vaults[2].seen:
            raise ConnectionError("refused")
        return pull(identifiers)

    grid.pull_messages = unreachable
    run = prepare(users=2, cohort=2)
    with pytest.raises(ConnectionError):
        run.run(grid)
    assert run.debits() == 0


# Who is enrolled


def test_devices_are_asked_one_by_one_for_their_own_subject(prepare, devices):
    grid = devices(4)
    prepare(users=4, cohort=4, rounds=2, chunk=3).run(grid)
    for vault in grid.vaults.values():
        assert [assignment.users for assignment in vault.seen] == [vault.residents] * 2


def test_a_device_that_comes_back_under_another_name_is_found_again(prepare, nodes, plain_vault):
    first, second, third = (plain_vault((f"{index:032x}",)) for index in (1, 2, 2))
    grid = nodes([first, second, third])
    grid.away = {4}
    run = prepare(users=2, cohort=2, rounds=1)
    run.run(grid)
    assert (len(first.seen), len(second.seen), len(third.seen)) == (1, 1, 0)
    again = prepare("again", users=2, cohort=2, rounds=3)
    on_round = again.finished.append

    def restarts(finished):
        on_round(finished)
        grid.away = {2: {3, 4}, 3: {3}}.get(finished.number + 1, set())

    opened = run_folder.reopen(again.path)
    Rounds(opened.config, opened.spec, opened.layout, opened.start, opened.path, opened.ledger).run(grid, restarts)
    opened.ledger.close()
    assert [finished.rejected for finished in again.finished] == [{}, {"unavailable": 1}, {}]
    assert (len(second.seen), len(third.seen)) == (2, 1)


def test_a_run_resumes_with_the_devices_that_are_there(prepare, devices):
    run = prepare(users=3, cohort=3, rounds=2)
    grid = devices(3)
    run.run(grid, stop_after=1)
    grid.away = {2}
    assert run.run(grid).round == 2
    assert [finished.rejected for finished in run.finished] == [{}, {"unavailable": 1}]


def test_who_was_not_enrolled_at_first_is_not_in_a_later_round(prepare, devices):
    run = prepare(users=2, cohort=2, rounds=2)
    run.run(devices(2), stop_after=1)
    grid = devices(3)
    run.run(grid)
    assert [len(vault.seen) for vault in grid.vaults.values()] == [1, 1, 0]


@pytest.mark.parametrize("count", [2, 4])
def test_a_run_for_another_number_of_users_does_not_begin(prepare, devices, count, monkeypatch):
    monkeypatch.setattr(rounds_module, "ENROL_SECONDS", 0.05)
    monkeypatch.setattr(rounds_module, "POLL_SECONDS", (0.01, 0.01))
    run = prepare(users=3, cohort=3)
    with pytest.raises(ConfigError, match=f"for 3 enrolled users, {count} are here"):
        run.run(devices(count))
    assert run.debits() == 0


def test_devices_that_are_late_are_waited_for(prepare, devices, monkeypatch):
    monkeypatch.setattr(rounds_module, "POLL_SECONDS", (0.01, 0.01))
    grid = devices(3)
    grid.away = {3, 4}
    asked = []
    list_nodes = grid.get_node_ids

    def arriving():
        asked.append(None)
        grid.away = {3, 4} if len(asked) == 1 else {4} if len(asked) == 2 else set()
        return list_nodes()

    grid.get_node_ids = arriving
    assert prepare(users=3, cohort=3, rounds=1).run(grid).round == 1


def test_nobody_answers_at_all(prepare, devices, monkeypatch):
    monkeypatch.setattr(rounds_module, "ENROL_SECONDS", 0.05)
    monkeypatch.setattr(rounds_module, "POLL_SECONDS", (0.01, 0.01))
    grid = devices(2)
    grid.away = {2, 3}
    with pytest.raises(ConfigError, match="no node answered"):
        prepare(users=2, cohort=2).run(grid)


def test_one_subject_on_two_devices_is_refused(prepare, nodes, plain_vault):
    with pytest.raises(ConfigError, match="two nodes"):
        prepare(users=2, cohort=2).run(nodes([plain_vault(("ab" * 16,)), plain_vault(("ab" * 16,))]))


def test_a_list_of_the_enrolled_that_is_damaged_is_not_guessed_at(prepare, devices):
    run = prepare(users=2, cohort=2)
    run.run(devices(2), stop_after=1)
    (run.path / "enrolled.json").write_text("[")
    with pytest.raises(DataError, match="enrolled"):
        run.run(devices(2))
