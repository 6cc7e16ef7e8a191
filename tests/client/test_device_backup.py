"""A device put back from a copy has its records again and its budget not again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from client.budget_keeper import BudgetKeeper, account_of
from client.device_backup import GOES_WITH, read_backup, restore, settle_restored, write_backup
from client.device_home import LEDGER, RESTORED, DeviceHome
from client.membership import FLEET
from client.policy import Policy
from client.record_store import NewRecord, RecordStore
from client.user_data import Record
from common.errors import ConfigError, DataError, Refusal, StoreError
from common.wire import receipt_of_bytes

WORDS = "correct horse battery"
WRITER = "ab" * 32
SECRET = "my dog is called Biscuit"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    made = DeviceHome.open(tmp_path / "device", create=True)
    made.grant(Policy.model_validate({"smallest_cohort": 2, "epsilon": 50.0, "trust_coordinator": True}))
    RecordStore(made).add([NewRecord(Record("", SECRET), "x")])
    return made


@pytest.fixture
def runs(coordinator, home):
    """A function that makes a run which asks this device, of so many rounds."""

    def make(name, **options):
        return coordinator.run(name, [str(home.read_ledger().header["subject"]), "cd" * 16], **options).spec

    return make


def release(home, spec, *rounds):
    with home.open_ledger() as ledger:
        keeper = BudgetKeeper(home, ledger)
        for number in rounds:
            keeper.check(spec, number)
            total = np.full(spec.model_dim, number, np.float32)
            digest = receipt_of_bytes(total.tobytes(), spec.digest, number, 1, "float32")
            body = {"round": number, "run": spec.run, "spec": spec.digest, "sha256": digest, "bytes": total.nbytes}
            shapes = [list(shape) for shape in spec.shapes]
            keeper.record(spec, {**body, "dtype": "float32", "names": list(spec.names), "shapes": shapes})


def account(home):
    return account_of(home.read_ledger().entries, home.policy())


def copy(home, tmp_path, name="copy"):
    write_backup(home, tmp_path / name, WORDS, time="2026-01-01T00:00:00+00:00")
    return read_backup(tmp_path / name, WORDS)


def test_records_come_back_on_another_machine_and_the_file_shows_nothing(home, tmp_path, monkeypatch):
    copied = copy(home, tmp_path)
    content = (tmp_path / "copy").read_bytes()
    assert SECRET.encode() not in content
    assert home.master.secret not in content
    assert home.master.secret.hex().encode() not in content
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "other-machine"))
    said = restore(tmp_path / "other" / "device", copied)
    assert "nothing leaves until the coordinator has said" in said
    there = DeviceHome.open(tmp_path / "other" / "device")
    assert there.key.verify_key == home.key.verify_key
    assert [one.record.response for one in RecordStore(there).records()] == [SECRET]
    assert account(there) == account(home)
    assert all(path.stat().st_mode & 0o077 == 0 for path in there.folder.rglob("*"))


def test_spending_after_the_copy_is_not_undone_where_the_device_is_still_here(home, runs, tmp_path):
    first, second = runs("first"), runs("second")
    release(home, first, 1)
    copied = copy(home, tmp_path)
    release(home, first, 2, 3)
    release(home, second, 1)
    RecordStore(home).add([NewRecord(Record("", "later"), "x")])
    spent = account(home)
    said = restore(home.folder, copied)
    assert said == "the ledger that was here stays, with everything that was spent"
    there = DeviceHome.open(home.folder)
    assert account(there) == spent
    assert [one.record.response for one in RecordStore(there).records()] == [SECRET]
    assert not (home.folder / RESTORED).exists()
    release(there, first, 2)  # the same bytes under the same debit
    assert account(there) == spent


def test_the_attack_copy_spend_wipe_restore_refills_nothing(home, runs, tmp_path):
    """The whole folder is gone, so only the coordinator knows what was released since the copy."""
    first, second = runs("first"), runs("second")
    release(home, first, 1)
    copied = copy(home, tmp_path)
    release(home, first, 2, 3)
    release(home, second, 1, 2)
    spent = account(home)
    shutil.rmtree(home.folder)
    restore(home.folder, copied)
    there = DeviceHome.open(home.folder)
    assert account(there).released < spent.released
    with pytest.raises(Refusal, match="put back from a copy"):
        release(there, first, 2)  # before anybody has said anything
    assert settle_restored(there, [(first, 3), (second, 2)], writer=WRITER) == 4
    assert account(there).reserved == pytest.approx(spent.reserved)
    assert account(there).released == pytest.approx(spent.released)
    assert not (home.folder / RESTORED).exists()
    assert settle_restored(there, [(first, 3)], writer=WRITER) == 0
    for spec, number in ((first, 2), (first, 3), (second, 1)):
        with pytest.raises(Refusal, match="taken as spent"):
            release(there, spec, number)
    release(there, second, 3)  # what is left of it may be used


def test_a_looser_policy_after_the_copy_does_not_hide_what_it_let_out(home, runs, tmp_path):
    spec = runs("first")
    strict = home.policy().model_copy(update={"trust_coordinator": False})
    loose = home.policy()
    home.grant(strict)
    copied = copy(home, tmp_path)
    home.grant(loose)
    release(home, spec, 1)
    spent = account(home)
    shutil.rmtree(home.folder)
    restore(home.folder, copied)
    there = DeviceHome.open(home.folder)
    settle_restored(there, [(spec, 1)], writer=WRITER)
    assert account(there).reserved == pytest.approx(spent.reserved)


def test_restoring_twice_or_over_a_device_that_waits_does_not_end_the_waiting(home, runs, tmp_path):
    spec = runs("first")
    copied = copy(home, tmp_path)
    release(home, spec, 1)
    shutil.rmtree(home.folder)
    restore(home.folder, copied)
    restore(home.folder, copied)
    assert (home.folder / RESTORED).exists()
    again = copy(DeviceHome.open(home.folder), tmp_path, "copy of the copy")
    restore(home.folder, again)
    with pytest.raises(Refusal, match="put back from a copy"):
        release(DeviceHome.open(home.folder), spec, 1)


def test_only_the_coordinator_that_the_copy_knows_ends_the_waiting(home, runs, tmp_path):
    spec = runs("first")
    (home.folder / FLEET).write_text(json.dumps({"invite": {"writer": WRITER}}))
    copied = copy(home, tmp_path)
    release(home, spec, 1)
    spent = account(home)
    shutil.rmtree(home.folder)
    restore(home.folder, copied)
    there = DeviceHome.open(home.folder)
    settle_restored(there, [], writer="cd" * 32)  # of a federation that was joined since
    (home.folder / FLEET).write_text(json.dumps({"invite": {"writer": "cd" * 32}}))
    restore(home.folder, copy(there, tmp_path, "copy of the copy"))
    settle_restored(there, [], writer="cd" * 32)
    with pytest.raises(Refusal, match="put back from a copy"):
        release(there, spec, 1)
    assert settle_restored(there, [(spec, 1)], writer=WRITER) == 1
    assert not (home.folder / RESTORED).exists()
    assert account(there).released == pytest.approx(spent.released)


def test_no_part_of_the_copys_goes_with_what_stays_from_here(home, tmp_path):
    for name in GOES_WITH:
        (home.folder / name).write_bytes(b"of the copy")
    copied = copy(home, tmp_path)
    assert set(GOES_WITH) <= set(copied.files)
    for name in GOES_WITH:
        (home.folder / name).unlink()
    restore(home.folder, copied)
    assert not [name for name in GOES_WITH if (home.folder / name).exists()]


def test_another_device_and_another_history_are_not_replaced(home, runs, tmp_path):
    spec = runs("first")
    copied = copy(home, tmp_path)
    other = DeviceHome.open(tmp_path / "other" / "device", create=True)
    with pytest.raises(Refusal, match="another device"):
        restore(other.folder, copied)
    shutil.copytree(home.folder, tmp_path / "twin" / "device")
    twin = DeviceHome.open(tmp_path / "twin" / "device")
    release(home, spec, 1)
    release(twin, replace(spec, rounds=2), 1)
    with pytest.raises(Refusal, match="contradict"):
        restore(home.folder, copy(twin, tmp_path, "twin copy"))
    assert account(home).released > 0
    (home.folder / LEDGER).write_bytes(b"")
    with pytest.raises(StoreError, match="move the folder away"):
        restore(home.folder, copied)


def test_a_wrong_passphrase_a_changed_file_and_something_else_are_told_apart(home, tmp_path):
    copy(home, tmp_path)
    with pytest.raises(StoreError, match="another passphrase"):
        read_backup(tmp_path / "copy", "wrong horse battery")
    content = bytearray((tmp_path / "copy").read_bytes())
    content[-1] ^= 1
    (tmp_path / "changed").write_bytes(content)
    with pytest.raises(StoreError, match="changed"):
        read_backup(tmp_path / "changed", WORDS)
    (tmp_path / "else").write_bytes(b"PK")
    for name in ("else", "absent"):
        with pytest.raises(DataError):
            read_backup(tmp_path / name, WORDS)
    with pytest.raises(DataError, match="exists"):
        write_backup(home, tmp_path / "copy", WORDS, time="x")
    with pytest.raises(ConfigError, match="at least 8"):
        write_backup(home, tmp_path / "short", "short", time="x")


def test_a_crash_while_putting_back_leaves_the_device_that_was_here(home, tmp_path, monkeypatch):
    import client.device_backup as module

    copied = copy(home, tmp_path)
    before = {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()}

    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "_give_key", crash)
        with pytest.raises(KeyboardInterrupt):
            restore(home.folder, copied)
    assert {path: path.read_bytes() for path in home.folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".device")] == []


def test_what_is_in_use_is_not_copied_in_the_middle(home, tmp_path):
    with home.open_ledger(), pytest.raises(Refusal):
        copy(home, tmp_path)
    assert not (tmp_path / "copy").exists()
