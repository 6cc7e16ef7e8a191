"""A record that is removed leaves everything that was made from it, and nothing else goes."""

from __future__ import annotations

import numpy as np
import pytest

from client.device_home import DeviceHome
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.record_store import NewRecord, RecordStore
from client.removal import remove_records
from client.user_data import Record


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return DeviceHome.open(tmp_path / "device", create=True)


@pytest.fixture
def ids(home):
    texts = ("my dog is called Biscuit.", "my cat is called Tom.", "my cat is called Tom. Again.")
    return RecordStore(home).add([NewRecord(Record(text, "Noted."), "x") for text in texts]).ids


def keep_adapter(home):
    ones = np.ones(8, np.float32)
    removals = RecordStore(home).removals
    LearnedStore(home).keep(Learned("b" * 64, ("q_proj",), 2.0, rank_alone=1, alone=ones, removals=removals))


def test_profile_adapter_and_what_methods_keep_go_with_it(home, ids):
    levels = LevelStore(home)
    levels.keep_profile(levels.profile_of([one.record for one in RecordStore(home).records()]))
    keep_adapter(home)
    subject = str(home.read_ledger().header["subject"])
    with home.open_kept() as kept:
        kept.put(subject, "state", b"trained", base_digest="b" * 64)
    done = remove_records(home, ids[:1])
    assert (done.records, done.private_adapter) == (1, True)
    assert "Biscuit" not in " ".join(levels.profile().texts)
    assert "My cat is called Tom." in levels.profile().texts
    assert LearnedStore(home).load() is None
    with home.open_kept() as kept:
        assert kept.subjects() == ()


def test_a_deleted_line_that_another_record_says_too_stays_deleted(home, ids):
    levels = LevelStore(home)
    profile = levels.profile_of([one.record for one in RecordStore(home).records()])
    for line in ("My cat is called Tom.", "My dog is called Biscuit."):
        profile = profile.without(profile.texts.index(line) + 1)
    levels.keep_profile(profile)
    remove_records(home, [ids[0], ids[1]])
    assert levels.profile().deleted == {"My cat is called Tom."}
    assert "My cat is called Tom." not in levels.profile().texts


def test_nothing_goes_where_nothing_is_removed(home, ids):
    keep_adapter(home)
    assert remove_records(home, ["0" * 16]).records == 0
    assert LearnedStore(home).load().alone is not None


@pytest.mark.parametrize("step", ["erase_private", "remove"])
def test_after_a_crash_in_the_middle_nothing_stale_is_used_and_the_removal_can_be_done_again(
    home, ids, step, monkeypatch
):
    levels = LevelStore(home)
    levels.keep_profile(levels.profile_of([one.record for one in RecordStore(home).records()]))
    keep_adapter(home)

    def crash(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(LearnedStore if step == "erase_private" else RecordStore, step, crash)
        with pytest.raises(KeyboardInterrupt):
            remove_records(home, ids[:1])
    assert "Biscuit" not in " ".join(levels.profile().texts)
    assert remove_records(home, ids[:1]).records == 1
    assert LearnedStore(home).load() is None
    assert len(RecordStore(home)) == 2


def test_an_adapter_that_was_trained_while_a_record_was_removed_is_not_kept(home, ids, monkeypatch):
    real = RecordStore.remove

    def refit_meanwhile(self, wanted):
        keep_adapter(home)  # a refit that ends just before the record goes
        return real(self, wanted)

    monkeypatch.setattr(RecordStore, "remove", refit_meanwhile)
    assert remove_records(home, ids[:1]).private_adapter is True
    assert LearnedStore(home).load() is None
