"""What a device says to its coordinator, and what it believes of the answer."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

import homespun
from client.budget_keeper import account_of
from client.coordinator_calls import REFUSALS, Calls, kept_proofs, verdict_on
from client.device_home import RESTORED, DeviceHome
from client.membership import Membership
from common.errors import DataError, Refusal
from common.keys import SigningKey
from common.ledger import Head, Ledger
from common.spent_proof import sign_proof
from server import fleet_runs, run_folder
from server.checkpoint import Checkpoint
from server.run_folder import signing_key


class QuietVault:
    """The production seam: a vault that refits when it is told to."""

    def __init__(self, error=None):
        self.asked, self.error = [], error

    def personalize(self, spec, number, vector):
        self.asked.append((spec, number, vector))
        if self.error is not None:
            raise self.error
        return {"run": spec.run, "round": number, "losses": {"base": 3.0, "both": 2.0}}


@pytest.fixture
def joined(coordinator, tmp_path, monkeypatch):
    invite = coordinator.invite()
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    data = ("--data", str(tmp_path / "people.jsonl"), "--user", "ada", "--policy", str(tmp_path / "policy.toml"))
    assert homespun.main(["device", "join", str(invite), *data, "--yes"]) == 0
    membership = Membership.load(DeviceHome.open())
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "operator"))
    return membership


@pytest.fixture
def run(coordinator, joined):
    subject = str(joined.home.read_ledger().header["subject"])
    return coordinator.run("run-1", [subject, "cd" * 16])


def global_round(run, number, value):
    vector = np.full(run.start.size, value, np.float32)
    Checkpoint(number, vector, np.zeros_like(vector), "", run.layout.digest).save(run.path / run_folder.CHECKPOINT)
    return vector


def refusals(membership):
    path = membership.home.folder / REFUSALS
    return [one["code"] for one in json.loads(path.read_text())["refusals"]] if path.exists() else []


def test_the_newest_global_adapter_arrives_and_the_private_one_is_refitted_when_the_run_is_over(
    coordinator, joined, run
):
    calls, vault = Calls(joined), QuietVault()
    calls.keep_up(vault)
    assert joined.standing()["adapters"] == {}
    global_round(run, 1, 0.5)
    calls.keep_up(vault)
    assert joined.standing()["adapters"][run.spec.run]["round"] == 1
    assert vault.asked == []  # the run goes on

    coordinator.calls._runs = (-9.0, [])
    vector = global_round(run, 3, 0.25)
    Calls(joined).keep_up(vault)  # after a week away
    ((spec, number, seen),) = vault.asked
    assert (spec, number) == (run.spec, 3)
    np.testing.assert_array_equal(seen, vector)
    assert joined.standing()["personal"]["losses"]["both"] == 2.0
    calls.keep_up(vault)
    assert len(vault.asked) == 1  # once per adapter


def test_a_refit_that_does_not_work_now_is_tried_again(joined, run):
    global_round(run, 3, 0.25)
    calls, vault = Calls(joined), QuietVault(Refusal("not-now", "on battery"))
    calls.keep_up(vault)
    calls.keep_up(vault)
    assert len(vault.asked) == 2
    assert joined.standing()["refit"] == "on battery"


def test_the_device_says_beforehand_what_it_would_refuse(coordinator, joined, run):
    calls = Calls(joined)
    calls.keep_up(QuietVault())
    calls.keep_up(QuietVault())
    assert coordinator.enrolment.devices()[0].verdict == ""
    joined.home.grant(joined.home.policy().model_copy(update={"trust_coordinator": False}))
    calls.keep_up(QuietVault())
    assert coordinator.enrolment.devices()[0].verdict == "policy-trust"
    assert joined.home.read_ledger().entries[-1].index == 0  # asking wrote nothing


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"noise_multiplier": 0.0}, "policy-noise"),
        ({"clip": 5.0}, "policy-clip"),
        ({"epsilon": "50.0"}, "policy-epsilon"),
        ({"delta": 0.1}, "policy-delta"),
        ({"rounds": 100_000}, "policy-rounds"),
        ({"sampling_rate": 0.1}, "policy-cohort"),
        ({"noise_multiplier": 0.6, "sampling_rate": 1.0, "rounds": 1000}, "budget-spent"),
        ({"extrapolation": 0.5}, "claim-refused"),
    ],
)
def test_a_server_that_asks_for_more_than_the_policy_is_refused_and_the_owner_sees_it(
    joined, run, change, code, capsys, monkeypatch, tmp_path
):
    greedy = replace(run.spec, **change)
    assert verdict_on(joined.home, run.spec) is None
    assert verdict_on(joined.home, greedy).code == code
    joined.note_standing(runs=[{"name": "greedy", "run": greedy.run, "spec": greedy.to_text(), "open": True}])
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    assert homespun.main(["device", "status"]) == 0
    assert f"would refuse, {code}" in capsys.readouterr().out


def test_being_revoked_is_noticed_and_said(coordinator, joined, run, capsys, monkeypatch, tmp_path):
    Calls(joined).keep_up(QuietVault())
    coordinator.enrolment.set_state(joined.device, "revoked")
    coordinator.calls._states = (-9.0, {})
    Calls(joined).keep_up(QuietVault())
    assert Membership.load(joined.home).status == "revoked"
    assert refusals(joined) == ["revoked"]
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    assert homespun.main(["device", "status"]) == 0
    out = capsys.readouterr().out
    assert ": revoked" in out
    assert "refused at" in out


def test_a_coordinator_that_is_away_is_noted_and_nothing_is_lost(quiet_coordinator, tmp_path, monkeypatch):
    with quiet_coordinator.listening():
        invite = quiet_coordinator.invite()
        monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
        assert homespun.main(["device", "join", str(invite), "--yes"]) == 0
    joined = Membership.load(DeviceHome.open())
    Calls(joined).keep_up(QuietVault())
    assert "does not answer" in joined.standing()["away"]
    with quiet_coordinator.listening():
        Calls(joined).keep_up(QuietVault())
    assert joined.standing()["away"] == ""


def test_a_pending_device_is_ready_when_it_was_approved(coordinator, tmp_path, monkeypatch):
    invite = coordinator.invite(approves=False)
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    assert homespun.main(["device", "join", str(invite), "--yes"]) == 0
    joined = Membership.load(DeviceHome.open())
    assert Calls(joined).until_ready(joined).status == "pending"
    assert refusals(joined) == []
    coordinator.enrolment.set_state(joined.device, "approved")
    coordinator.calls._states = (-9.0, {})
    ready = Calls(joined).until_ready(joined)
    assert (ready.status, ready.model.is_dir()) == ("approved", True)


@pytest.mark.parametrize("content", [b"", bytes(8), np.full(1000, np.nan, "<f4").tobytes()])
def test_an_adapter_that_is_none_is_not_kept(joined, run, content):
    with pytest.raises(DataError):
        Calls(joined)._keep_adapter(run.spec, content)
    assert not list(joined.home.folder.glob("global-*"))


def test_statements_are_kept_and_given_back_and_a_ledger_that_went_back_is_noticed(coordinator, joined, run):
    path, calls = run.path / run_folder.LEDGER, Calls(joined)
    old = path.read_bytes()
    with run_folder.reopen(run.path).ledger as ledger:
        reserve = next(entry for entry in ledger.entries() if entry.kind == "reserve")
        event = fleet_runs._one_of(reserve.body["event"])
        for number in (1, 2):
            ledger.append("debit", {"event": event, "reservation": reserve.index, "round": number})
    calls.keep_up(QuietVault())
    assert not joined.standing()["rolled_back"]

    path.write_bytes(old)
    fleet_runs.note_restored(run.path, 1)
    coordinator.calls._runs = (-9.0, [])
    before = datetime.now(UTC).date().isoformat()
    calls.keep_up(QuietVault())
    assert before <= joined.standing()["rolled_back"] <= datetime.now(UTC).date().isoformat()
    coordinator.calls._runs = (-9.0, [])
    calls.keep_up(QuietVault())
    with run_folder.reopen(run.path).ledger as ledger:
        assert fleet_runs.heed_proofs(run.path, ledger) == 2


@pytest.fixture
def statements(tmp_path):
    """Statements of one ledger after each of three entries, and of its other history."""
    key, found = signing_key(), []
    path = tmp_path / "ledger.jsonl"
    with Ledger.create(path, key, {"role": "device", "subject": "ab" * 16}) as ledger:
        found.append(sign_proof(ledger.head, 0, key))
        copy = path.read_bytes()
        for number in (1, 2):
            ledger.append("forget", {"scope": ("records", "adapters")[number - 1]})
            found.append(sign_proof(ledger.head, number, key))
    path.write_bytes(copy)
    with Ledger.open(path, key) as ledger:
        ledger.append("forget", {"scope": "profile"})
        found.append(sign_proof(ledger.head, 1, key))
    return key.verify_key, found


def test_the_furthest_statement_is_kept_and_a_denied_one_for_good(statements):
    writer, (first, second, third, other) = statements
    kept, back = kept_proofs([], first, writer)
    assert (kept, back) == ([first], False)
    assert kept_proofs(kept, first, writer) == ([first], False)
    kept, back = kept_proofs(kept, third, writer)
    assert (kept, back) == ([third], False)
    kept, back = kept_proofs(kept, other, writer)
    assert (kept, back) == ([{**third, "lost": True}, other], True)
    assert kept_proofs(kept, other, writer) == (kept, False)
    assert kept_proofs([second], third, writer) == ([third], False)


def test_a_statement_of_another_writer_is_refused(statements):
    _, (first, *_) = statements
    for wrong in (first, {}, None):
        with pytest.raises(DataError):
            kept_proofs([], wrong, SigningKey.generate().verify_key)


def test_a_device_that_was_put_back_from_a_copy_takes_as_spent_what_the_coordinator_signed(
    coordinator, joined, run, monkeypatch
):
    real = fleet_runs.spent_proof

    def two_rounds(path, key):
        return sign_proof(Head.from_json(real(path, key)["head"]), 2, key)

    monkeypatch.setattr(fleet_runs, "spent_proof", two_rounds)
    (joined.home.folder / RESTORED).write_text("{}")
    calls = Calls(joined)
    with joined.home.open_ledger():
        calls.keep_up(QuietVault())  # the ledger is in use: nothing is taken, and the device goes on waiting
    assert (joined.home.folder / RESTORED).exists()
    calls.keep_up(QuietVault())
    assert not (joined.home.folder / RESTORED).exists()
    account = account_of(joined.home.read_ledger().entries, joined.home.policy())
    assert [(one.run, one.debited) for one in account.runs] == [(run.spec.run, 2)]
    calls.keep_up(QuietVault())
    assert account_of(joined.home.read_ledger().entries, joined.home.policy()) == account


def test_an_answer_that_leaves_a_run_out_ends_no_waiting(coordinator, joined, run):
    (joined.home.folder / RESTORED).write_text("{}")
    checkpoint = run.path / run_folder.CHECKPOINT
    whole = checkpoint.read_bytes()
    checkpoint.write_bytes(b"damaged")
    Calls(joined).keep_up(QuietVault())
    assert (joined.home.folder / RESTORED).exists()
    assert refusals(joined) == ["not-now"]
    checkpoint.write_bytes(whole)
    coordinator.calls._runs = (float("-inf"), [])
    Calls(joined).keep_up(QuietVault())
    assert not (joined.home.folder / RESTORED).exists()


def test_every_run_is_taken_as_spent_however_many_there_are(coordinator, joined, run, monkeypatch):
    monkeypatch.setattr("client.coordinator_calls.MOST_RUNS", 0)
    real = fleet_runs.spent_proof
    monkeypatch.setattr(
        fleet_runs, "spent_proof", lambda path, key: sign_proof(Head.from_json(real(path, key)["head"]), 1, key)
    )
    (joined.home.folder / RESTORED).write_text("{}")
    Calls(joined).keep_up(QuietVault())
    account = account_of(joined.home.read_ledger().entries, joined.home.policy())
    assert [(one.run, one.debited) for one in account.runs] == [(run.spec.run, 1)]


def test_a_copy_of_another_federation_goes_on_waiting_and_the_owner_is_told(joined, run):
    (joined.home.folder / RESTORED).write_text(json.dumps({"writers": ["cd" * 32]}))
    Calls(joined).keep_up(QuietVault())
    assert (joined.home.folder / RESTORED).exists()
    assert refusals(joined) == ["not-now"]
