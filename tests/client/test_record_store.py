"""Records at rest: each under its own key, in order, whole or not at all."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.device_home import DeviceHome
from client.record_store import RECORDS, NewRecord, RecordStore
from client.user_data import HELD_OUT, Record
from common.errors import DataError, Refusal

SECRET = "the pear tree in the garden"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return DeviceHome.open(tmp_path / "device", create=True)


@pytest.fixture
def store(home):
    return RecordStore(home, clock=lambda: 1000.0)


def new(*texts, source="notes.txt"):
    return [NewRecord(Record("", text), source) for text in texts]


def test_what_was_added_comes_back_in_its_order_with_where_it_came_from(store, home):
    pair = Record("which", "the blue", 7.5, "preference", "the red", None)
    held = Record("q", "a", None, "reply", None, HELD_OUT)
    added = store.add([*new("b", "a"), NewRecord(pair, "feedback"), NewRecord(held, "x")])
    again = RecordStore(DeviceHome.open(home.folder)).records()
    assert [one.id for one in again] == list(added.ids)
    assert [one.record for one in again] == [Record("", "b"), Record("", "a"), pair, held]
    assert [one.source for one in again] == ["notes.txt", "notes.txt", "feedback", "x"]
    assert {one.added for one in again} == {1000.0}
    assert len(store) == 4
    assert store.user().records == tuple(one.record for one in again)


def test_records_that_all_have_a_time_stand_in_its_order_whenever_they_were_added(store):
    for time in (3.0, 1.0, 2.0):
        store.add([NewRecord(Record("", f"at {time}", time), "x")])
    assert [one.record.time for one in store.records()] == [1.0, 2.0, 3.0]
    store.add(new("without a time"))
    assert [one.record.time for one in store.records()] == [3.0, 1.0, 2.0, None]


def test_the_same_record_is_kept_once_and_counted(store):
    first = store.add(new("one", "two", "one", " "))
    assert (len(first.ids), first.duplicates, first.empty) == (2, 1, 1)
    second = store.add(new("two", "three"))
    assert (len(second.ids), second.duplicates) == (1, 1)
    assert [one.record.response for one in store.records()] == ["one", "two", "three"]
    # the same words at another time, or as an answer to something, are another record
    assert store.add([NewRecord(Record("", "one", 5.0), "x"), NewRecord(Record("q", "one"), "x")]).duplicates == 0


def test_comparing_says_what_adding_would_do_and_adds_nothing(store):
    would, counts = store.compared(new("one", "one"))
    assert [one.record.response for one in would.values()] == ["one"]
    assert counts.duplicates == 1
    assert len(store) == 0
    assert store.revision == 0


def test_an_id_stays_and_comes_again_with_the_same_words(store):
    (name,) = store.add(new("one")).ids
    store.remove([name])
    assert store.add(new("zero", "one")).ids[1] == name
    assert store.name_of(Record("", "one")) == name


def test_ids_of_two_devices_cannot_be_compared(store, tmp_path):
    other = RecordStore(DeviceHome.open(tmp_path / "other", create=True))
    assert other.add(new("one")).ids != store.add(new("one")).ids


def test_removing_destroys_what_it_removes_and_counts(store, home):
    keep, go = store.add(new("stays", SECRET)).ids
    assert (store.revision, store.removals) == (1, 0)
    before = (home.folder / RECORDS).read_bytes()
    assert store.remove([go, "0" * 16]) == 1
    assert store.remove([go]) == 0
    assert [one.id for one in store.records()] == [keep]
    assert (store.revision, store.removals) == (2, 1)
    after = (home.folder / RECORDS).read_bytes()
    gone = [before[start : start + 32] for start in range(0, len(before) - 32, 32)]
    stays = sum(piece in after for piece in gone if piece.strip(b"\0"))
    assert stays < len(gone)  # sealed rows went with it
    assert not list(home.folder.glob(f"{RECORDS}-wal")) or (home.folder / f"{RECORDS}-wal").stat().st_size == 0


def test_a_record_is_named_by_a_beginning_that_is_its_own(store):
    first, second = store.add(new("one", "two")).ids
    assert [one.id for one in store.find([first[:6], second, first])] == [first, second]
    for wrong in ("f" * 16, "", first[:2]):
        with pytest.raises(DataError, match="data list"):
            store.find([second, wrong])


def test_nothing_can_be_read_from_the_file(store, home):
    store.add([NewRecord(Record(SECRET, SECRET, 1.0), SECRET)])
    for path in home.folder.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_a_failure_in_the_middle_adds_nothing(store, monkeypatch):
    import client.record_store as module

    store.add(new("one"))
    calls = []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise RuntimeError
        return real(*arguments)

    real = module._payload
    monkeypatch.setattr(module, "_payload", failing)
    with pytest.raises(RuntimeError):
        store.add(new("two", "three", "four"))
    assert [one.record.response for one in store.records()] == ["one"]
    assert store.revision == 1


def test_somebody_who_keeps_the_store_open_is_waited_for_and_then_named(store, home, monkeypatch):
    monkeypatch.setattr("client.device_home.SECONDS_TO_WAIT", 0.1)
    with home.open_store(RECORDS, "records"), pytest.raises(Refusal):
        store.records()
    assert store.records() == ()


texts = st.text(max_size=20)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(texts, texts, st.none() | st.floats(-1e9, 1e12), st.none() | texts), max_size=6))
def test_whatever_is_said_comes_back(store, home, said):
    for one in store.records():
        store.remove([one.id])
    records = [Record(prompt, response, time, "reply", other) for prompt, response, time, other in said]
    added = store.add([NewRecord(record, "x") for record in records])
    kept = store.records()
    assert {one.record for one in kept} == {record for record in records if not record.empty}
    assert len(added.ids) + added.duplicates + added.empty == len(records)
