"""Forgetting erases everything but a closed list, and says what it cannot undo."""

from __future__ import annotations

import numpy as np
import pytest

from client.adapter_store import AdapterStore
from client.budget_keeper import BudgetKeeper, account_of
from client.device_home import DeviceHome
from client.forgetting import KEPT, cannot_be_undone, forget, plan
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.membership import Membership
from client.policy import Policy
from client.record_store import RECORDS, NewRecord, RecordStore
from client.user_data import Record
from common.errors import Refusal
from common.fleet import Invite
from common.wire import receipt_of_bytes

SECRET = "my dog is called Biscuit."


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = DeviceHome.open(tmp_path / "device", create=True)
    made.grant(Policy.model_validate({"smallest_cohort": 2, "epsilon": 50.0, "trust_coordinator": True}))
    return made


@pytest.fixture
def full(home):
    """A device that holds something of every kind, and of a kind that nobody has thought of yet."""
    RecordStore(home).add([NewRecord(Record("", SECRET), "x"), NewRecord(Record(SECRET, "Noted."), "x")])
    levels = LevelStore(home)
    levels.keep_profile(levels.profile_of([one.record for one in RecordStore(home).records()]))
    ones = np.ones(8, np.float32)
    LearnedStore(home).keep(Learned("b" * 64, ("q_proj",), 2.0, rank=1, rank_alone=1, shared=ones, alone=ones))
    subject = str(home.read_ledger().header["subject"])
    for opened in (home.open_kept, home.open_sent):
        with opened() as store:
            store.put(subject, "x", b"payload", base_digest="b" * 64)
    with AdapterStore(home.folder / "feedback.sqlite", home.master.subkey("of tomorrow")) as store:
        store.put("owner", "thumbs", SECRET.encode(), base_digest="none")
    for name in ("outbox/one.sealed", "logs/vault.log", "global-ab.bin", "bases.json", "a/b/c.json"):
        path = home.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"0123456789abcdef" * 8)
    return home


@pytest.fixture
def released(coordinator, full):
    """The same device, which has released twice in a run of a coordinator that adds the noise."""
    run = coordinator.run("garden", [str(full.read_ledger().header["subject"]), "cd" * 16])
    with full.open_ledger() as ledger:
        keeper = BudgetKeeper(full, ledger)
        for number in (1, 2):
            total = np.full(run.spec.model_dim, number, np.float32)
            digest = receipt_of_bytes(total.tobytes(), run.spec.digest, number, 1, "float32")
            receipt = {
                "round": number,
                "run": run.spec.run,
                "spec": run.spec.digest,
                "sha256": digest,
                "bytes": total.nbytes,
                "dtype": "float32",
                "names": list(run.spec.names),
                "shapes": [list(shape) for shape in run.spec.shapes],
            }
            keeper.record(run.spec, receipt)
    invite = Invite.load(coordinator.invite())
    joined = Membership(full, invite, full.folder / "their.jsonl", "me", coordinator.model, "approved").save()
    runs = [{"name": "garden", "run": run.spec.run, "spec": run.spec.to_text(), "open": True}]
    joined.note_standing(
        runs=runs, proofs=[], personal={"losses": {"both": 1.0}}, adapters={run.spec.run: {"round": 2}}
    )
    return full


def names(home):
    return {path.relative_to(home.folder).as_posix() for path in home.folder.rglob("*") if path.is_file()}


def pieces(paths):
    found = set()
    for path in paths:
        content = path.read_bytes()
        found |= {content[start : start + 16] for start in range(0, len(content) - 15, 16)}
    return {piece for piece in found if len(set(piece)) > 4}


def test_a_plan_says_what_would_go_and_changes_nothing(full):
    before = {path: path.read_bytes() for path in full.folder.rglob("*") if path.is_file()}
    planned = plan(full)
    assert (planned.records, planned.profile_lines, planned.adapters) == (2, 1, True)
    assert {RECORDS, "levels.sqlite", "adapters.sqlite", "kept.sqlite", "sent.sqlite", "feedback.sqlite"} <= set(
        planned.files
    )
    assert "outbox/one.sealed" in planned.files
    assert not any(name in planned.files for name in ("device.key", "ledger.jsonl", "policy.toml"))
    assert planned.cannot == ("Nothing ever left this device, so nothing of yours is in anybody else's model.",)
    assert {path for path in before} <= {path for path in full.folder.rglob("*") if path.is_file()}


def test_nothing_of_what_was_erased_is_in_any_file_and_the_rest_stays(full):
    going = [full.folder / name for name in plan(full).files]
    gone = pieces(going)
    assert len(gone) > 100
    subject, key = full.read_ledger().header["subject"], full.key.verify_key
    forget(full)
    assert pieces(path for path in full.folder.rglob("*") if path.is_file()) & gone == set()
    left = {name.removesuffix(".lock") for name in names(full)}
    assert left <= set(KEPT)
    again = DeviceHome.open(full.folder)
    assert (again.read_ledger().header["subject"], again.key.verify_key) == (subject, key)
    assert [entry.kind for entry in again.read_ledger().entries][-2:] == ["forget", "tombstone"]
    assert len(RecordStore(again)) == 0
    assert LearnedStore(again).load() is None
    assert LevelStore(again).profile() is None


def test_what_was_spent_stays_spent_and_what_others_have_is_said(released):
    before = account_of(released.read_ledger().entries, released.policy())
    assert before.reserved > 0
    said = " ".join(cannot_be_undone(released))
    assert "2 update(s) of this device are part of the global models of 1 run(s)" in said
    assert before.sentence() in said  # with unit, adjacency and delta
    assert "Run garden" in said
    assert "no epsilon bounds what it learned" in said
    forget(released)
    after = account_of(released.read_ledger().entries, released.policy())
    assert (after.reserved, after.released, after.limit) == (before.reserved, before.released, before.limit)
    assert "2 update(s)" in " ".join(cannot_be_undone(released))
    joined = Membership.load(released)
    assert joined.data is None  # the owner's own file is not read again
    assert joined.status == "approved"
    assert set(joined.standing()) == {"runs", "proofs"}


def test_a_run_whose_terms_are_gone_is_not_called_harmless(released):
    Membership.load(released).replace_standing({})
    assert "its terms are not kept here any more" in " ".join(cannot_be_undone(released))


@pytest.mark.parametrize("step", ["first file", "ledger"])
def test_it_can_be_done_again_after_a_crash_in_the_middle(full, step, monkeypatch):
    import client.forgetting as module

    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "ledger":
            patch.setattr(BudgetKeeper, "forget", crash)
        else:
            real, calls = module._destroy, []
            patch.setattr(module, "_destroy", lambda path: crash() if calls else (calls.append(path), real(path)))
        with pytest.raises(KeyboardInterrupt):
            forget(full)
    planned = plan(full)
    assert planned.records in (0, 2)
    forget(full)
    assert {name.removesuffix(".lock") for name in names(full)} <= set(KEPT)


def test_a_store_that_somebody_has_open_stops_it_before_anything_goes(full, monkeypatch):
    before = names(full)
    with full.open_store(RECORDS, "records"), pytest.raises(Refusal):
        forget(full)
    assert names(full) >= before - {"records.sqlite-wal", "records.sqlite-shm"}
    assert len(RecordStore(full)) == 2


def test_a_damaged_store_is_erased_as_well(full):
    (full.folder / RECORDS).write_bytes(b"not a store at all, but perhaps what was one: " + SECRET.encode())
    assert plan(full).records == 0
    forget(full)
    assert not (full.folder / RECORDS).exists()


def test_a_link_is_removed_and_what_it_leads_to_is_left(full, tmp_path):
    (tmp_path / "mine.txt").write_text(SECRET)
    (full.folder / "link").symlink_to(tmp_path / "mine.txt")
    forget(full)
    assert (tmp_path / "mine.txt").read_text() == SECRET
    assert not (full.folder / "link").is_symlink()
