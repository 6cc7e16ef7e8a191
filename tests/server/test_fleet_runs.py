"""Runs over devices: how each stands, and what was spent before an old copy came back."""

from __future__ import annotations

import json
import os

import pytest
from flwr.app import Context, RecordDict

from common.config import RunConfig
from common.errors import BudgetSpent, ConfigError, DataError
from common.files import take_lock
from common.ledger import verify
from server import fleet_runs, run_folder
from server.fleet_runs import heed_proofs, keep_proof, overview, prepare, spent_proof

SUBJECTS = ["ab" * 16, "cd" * 16, "ef" * 16]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path))


@pytest.fixture
def config(tiny_base_folder):
    return RunConfig(model=str(tiny_base_folder), cohort=2, rounds=3, epsilon=8.0, max_tokens=16)


@pytest.fixture
def path(config, tmp_path):
    opened = prepare(tmp_path / "run", config, SUBJECTS)
    opened.ledger.close()
    return opened.path


def spend(path, *numbers):
    with run_folder.reopen(path).ledger as ledger:
        reserve = next(entry for entry in ledger.entries() if entry.kind == "reserve")
        event = fleet_runs._one_of(reserve.body["event"])
        bound = {name: reserve.body[name] for name in ("run", "spec")}
        for number in numbers:
            ledger.append("debit", {"event": event, "reservation": reserve.index, "round": number, **bound})


def debits(path):
    return [
        entry.body.get("round")
        for entry in verify((path / "ledger.jsonl").read_bytes()).entries
        if entry.kind == "debit"
    ]


def test_a_run_is_calibrated_for_those_who_are_enrolled(path):
    seen = overview(path)
    assert (seen.state, seen.round, seen.rounds, seen.spent) == ("waiting", 0, 3, 0)
    assert (seen.spec.population, seen.spec.sampling_rate) == (3, 2 / 3)
    header = verify((path / "ledger.jsonl").read_bytes()).header
    assert (header["role"], header["run"]) == ("server", seen.run)


@pytest.mark.parametrize(
    ("change", "subjects", "says"),
    [
        ({}, [], "no device"),
        ({"users": 9}, SUBJECTS, "users: 9"),
        ({"cohort": 4}, SUBJECTS, "cohort"),
        ({"rehearsal": True}, SUBJECTS, "rehearsal"),
        ({"as_if_population": 100}, SUBJECTS, "as_if_population"),
    ],
)
def test_what_could_not_be_promised_is_not_prepared(config, tmp_path, change, subjects, says):
    with pytest.raises(ConfigError, match=says):
        prepare(tmp_path / "other", config.model_copy(update=change), subjects)
    assert not (tmp_path / "other").exists()


def test_a_run_is_seen_to_be_worked_on_stopped_and_refused(path):
    lock = take_lock(path / fleet_runs.RUNNING, "run-locked")
    assert overview(path).state == "running"
    os.close(lock)
    fleet_runs.note_outcome(path, "failed", "no enrolled device is connected")
    assert (overview(path).state, overview(path).reason) == ("waiting", "no enrolled device is connected")
    fleet_runs.want(path, "stop")
    assert overview(path).state == "stopped"
    fleet_runs.note_outcome(path, "refused", "the budget is spent")
    assert (overview(path).state, overview(path).reason) == ("failed", "the budget is spent")
    with pytest.raises(DataError):
        fleet_runs.want(path.parent, "run")


def test_a_folder_that_is_no_run_is_said_so(tmp_path):
    with pytest.raises(DataError):
        overview(tmp_path)


def test_what_devices_prove_is_spent_after_an_old_copy_came_back(path):
    key = run_folder.signing_key()
    spend(path, 1)
    old = (path / "ledger.jsonl").read_bytes()
    spend(path, 2, 3)
    proof = spent_proof(path, key)
    assert not keep_proof(path, proof, key.verify_key)

    (path / "ledger.jsonl").write_bytes(old)
    fleet_runs.note_restored(path, verify(old).entries[-1].index)
    assert overview(path).state == "stopped"
    assert keep_proof(path, proof, key.verify_key)
    with run_folder.reopen(path).ledger as ledger:
        assert heed_proofs(path, ledger) == 2
        assert heed_proofs(path, ledger) == 0
    assert debits(path) == [1, None, None]
    receipt = next(entry for entry in verify((path / "ledger.jsonl").read_bytes()).entries if entry.kind == "receipt")
    assert receipt.body["head"] == proof["head"]


def test_what_was_spent_since_the_copy_came_back_counts_beside_it(path):
    key = run_folder.signing_key()
    spend(path, 1)
    old = (path / "ledger.jsonl").read_bytes()
    spend(path, 2)
    early = spent_proof(path, key)
    spend(path, 3)
    late = spent_proof(path, key)
    (path / "ledger.jsonl").write_bytes(old)
    fleet_runs.note_restored(path, verify(old).entries[-1].index)
    spend(path, 7)  # a round ran before any device called
    for proof, lost in ((early, 1), (late, 1), (early, 0)):
        keep_proof(path, proof, key.verify_key)
        with run_folder.reopen(path).ledger as ledger:
            assert heed_proofs(path, ledger) == lost
    assert debits(path) == [1, 7, None, None]


def test_a_copy_that_came_back_without_a_word_counts_everything(path):
    key = run_folder.signing_key()
    spend(path, 1)
    old = (path / "ledger.jsonl").read_bytes()
    spend(path, 2)
    proof = spent_proof(path, key)
    (path / "ledger.jsonl").write_bytes(old)  # not by `server restore`
    keep_proof(path, proof, key.verify_key)
    with run_folder.reopen(path).ledger as ledger:
        assert heed_proofs(path, ledger) == 2  # more than was lost, never less


def test_a_run_whose_budget_devices_show_to_be_spent_ends(path, config):
    from server.rounds import Rounds

    key = run_folder.signing_key()
    old = (path / "ledger.jsonl").read_bytes()
    spend(path, 1, 2, 3, 4, 5)
    proof = spent_proof(path, key)
    (path / "ledger.jsonl").write_bytes(old)
    fleet_runs.note_restored(path, 1)
    keep_proof(path, proof, key.verify_key)
    opened = run_folder.reopen(path)
    with opened.ledger as ledger:
        heed_proofs(path, ledger)
        rounds = Rounds(opened.config, opened.spec, opened.layout, opened.start, path, ledger)
        (path / "homes.json").write_text(json.dumps({"homes": {SUBJECTS[0]: 1, SUBJECTS[1]: 2}}))

        class Grid:
            def get_node_ids(self):
                return [1, 2]

        with pytest.raises(BudgetSpent):
            rounds.run(Grid(), lambda finished: None)


def test_a_strangers_statement_is_not_kept(path, tmp_path):
    from common.keys import SigningKey

    spend(path, 1)
    forged = spent_proof(path, SigningKey.generate())
    assert not keep_proof(path, forged, run_folder.signing_key().verify_key)
    assert not keep_proof(path, {"head": 1}, run_folder.signing_key().verify_key)
    assert not (path / fleet_runs.PROOFS).exists()


class TestWaitingForDevices:
    """A round waits until half of the enrolled are connected: the operator sees for what, and can stop it unspent."""

    @pytest.fixture
    def waiting(self, path, monkeypatch):
        """A run of three whose grid has one of them; a function that works on it as Flower's app does."""
        from server import app, rounds

        monkeypatch.setattr(rounds, "POLL_SECONDS", (0.0, 0.0))
        homes = {subject: number for number, subject in enumerate(SUBJECTS, 1)}
        (path / "homes.json").write_text(json.dumps({"homes": homes}))

        class Grid:
            asked = 0

            def get_node_ids(self):
                self.asked += 1
                if self.asked > 3:
                    fleet_runs.want(path, "stop")
                return [1]

        def work():
            grid = Grid()
            app.app(grid, Context(1, 1, {}, RecordDict(), {"folder": str(path)}))
            return grid.asked

        return work

    def test_it_is_stopped_while_it_waits_and_nothing_is_asked_or_spent(self, path, waiting):
        assert waiting() == 4
        seen = overview(path)
        assert (seen.state, seen.round, seen.spent) == ("stopped", 0, 0)
        said = [json.loads(line) for line in (path / fleet_runs.EVENTS).read_text().splitlines()]
        assert [one["event"] for one in said] == ["begun", "waiting", "stopped"]
        assert (said[1]["connected"], said[1]["enrolled"]) == (1, 3)

    def test_runs_say_what_it_waits_for(self, path):
        fleet_runs.note_event(path, event="waiting", connected=1, enrolled=3)
        held = take_lock(path / fleet_runs.RUNNING, "run-locked")
        try:
            assert "1 of 3 devices were connected" in overview(path).reason
            fleet_runs.note_event(path, event="round", round=1)
            assert overview(path).reason == ""
        finally:
            os.close(held)


@pytest.mark.parametrize("change", [{"rehearsal": True, "seed": 1}, {"as_if_population": 1000}])
def test_what_claims_nothing_is_neither_run_nor_announced(config, tmp_path, change):
    claimless = config.model_copy(update=change)
    with pytest.raises(ConfigError, match="claims nothing"):
        fleet_runs.for_devices(claimless)
    with pytest.raises(ConfigError, match="claims nothing"):
        prepare(tmp_path / "other", claimless, SUBJECTS)
