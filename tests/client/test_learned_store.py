"""What was learned: whole, of one base, and never older than a removal."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from client.adapter_store import AdapterStore, pack_vectors
from client.device_home import DeviceHome
from client.learned_store import ADAPTERS, Learned, LearnedStore
from client.record_store import NewRecord, RecordStore
from client.user_data import Record
from common.errors import Refusal, StoreError

BASE = "ab" * 32


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return DeviceHome.open(tmp_path / "device", create=True)


def vector(seed):
    return np.random.default_rng(seed).standard_normal(12).astype(np.float32)


def learned(**changes):
    full = Learned(
        BASE,
        ("q_proj", "v_proj"),
        2.0,
        rank=2,
        rank_alone=1,
        rank_over_global=3,
        shared=vector(0),
        alone=vector(1),
        over_global=vector(2),
        in_context=vector(3),
        others={"preference": vector(4)},
        max_tokens=48,
        run="cd" * 16,
        round=7,
        chosen="both",
        losses={"base": 2.0, "both": 1.5},
        test_losses={"both": 1.6},
        report={"records": 3},
    )
    return replace(full, **changes)


def same(one, two):
    vectors = ("shared", "alone", "over_global", "in_context")
    for name in vectors:
        assert np.array_equal(getattr(one, name), getattr(two, name)), name
    assert all(np.array_equal(one.others[name], two.others[name]) for name in two.others)
    nothing = dict.fromkeys(vectors) | {"others": {}}
    assert replace(one, **nothing) == replace(two, **nothing)


def test_what_was_learned_comes_back(home):
    store = LearnedStore(home)
    assert store.load() is None
    store.keep(learned())
    same(LearnedStore(DeviceHome.open(home.folder)).load(BASE), learned())
    same(store.load(), learned())
    assert store.load("cd" * 32) is None
    store.keep(learned(round=8))
    assert store.load().round == 8


def test_a_private_adapter_is_not_used_after_a_removal_and_is_gone_from_the_file(home):
    store, records = LearnedStore(home), RecordStore(home)
    (name,) = records.add([NewRecord(Record("", "one"), "x")]).ids
    store.keep(learned())
    records.remove([name])  # by whatever way: the number tells
    found = store.load(BASE)
    assert (found.alone, found.over_global, found.in_context, found.others) == (None, None, None, {})
    assert (found.chosen, found.losses) == ("", {})
    assert np.array_equal(found.shared, vector(0))
    subject = str(home.read_ledger().header["subject"])
    with AdapterStore(home.folder / ADAPTERS, home.master.subkey("adapters")) as file:
        assert file.names(subject) == ("global",)
    with pytest.raises(Refusal, match="removed while"):
        store.keep(learned())
    store.keep(learned(removals=records.removals))
    assert store.load().alone is not None


def test_adding_records_makes_nothing_stale(home):
    store = LearnedStore(home)
    store.keep(learned())
    RecordStore(home).add([NewRecord(Record("", "one"), "x")])
    same(store.load(), learned())


def test_what_an_earlier_version_kept_is_read(home):
    subject = str(home.read_ledger().header["subject"])
    note = {"run": "cd" * 16, "round": 2, "targets": ["q_proj"], "rank": 2, "rank_alone": 2, "rank_over_global": 2}
    with AdapterStore(home.folder / ADAPTERS, home.master.subkey("adapters")) as file:
        text = json.dumps({**note, "scaling": 2.0})
        file.put(subject, "global", pack_vectors({"vector": vector(0)}), base_digest=BASE, version_note=text)
        file.put(subject, "private", pack_vectors({"alone": vector(1)}), base_digest=BASE, version_note=text)
    found = LearnedStore(home).load()
    assert (found.rank, found.round, found.scaling, found.removals) == (2, 2, 2.0, 0)
    assert np.array_equal(found.alone, vector(1))


def test_erasing_what_is_not_there_says_so(home):
    store = LearnedStore(home)
    assert store.erase_private() is False
    store.keep(learned(alone=None, over_global=None, in_context=None, others={}))
    assert store.erase_private() is False
    assert np.array_equal(store.load().shared, vector(0))


def test_a_note_of_something_else_is_refused(home):
    subject = str(home.read_ledger().header["subject"])
    for note in ("", "{}", "[]", '{"targets": 7, "scaling": "x"}'):
        with AdapterStore(home.folder / ADAPTERS, home.master.subkey("adapters")) as file:
            file.put(subject, "private", pack_vectors({"alone": vector(1)}), base_digest=BASE, version_note=note)
        with pytest.raises(StoreError):
            LearnedStore(home).load()


def test_private_adapters_over_another_global_one_than_is_here_are_not_handed_out(home):
    store = LearnedStore(home)
    store.keep(learned())
    assert store.load(BASE).over_global is not None
    with store._open() as kept:  # the global adapter moves, and nothing is fitted again yet
        note = next(one for one in kept.versions(store._subject, "global") if one.is_current).version_note
        kept.put(store._subject, "global", pack_vectors({"vector": vector(9)}), base_digest=BASE, version_note=note)
    found = store.load(BASE)
    assert np.array_equal(found.shared, vector(9))
    assert (found.alone, found.over_global, found.chosen) == (None, None, "")
    store.keep(learned(shared=vector(9), trained=("aa", "bb")))
    assert store.load(BASE).over_global is not None
    assert store.load(BASE).trained == ("aa", "bb")
