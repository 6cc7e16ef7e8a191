"""Feedback: what comes of thumbs and edits stands among the owner's records, and goes when it is taken back."""

from __future__ import annotations

import pytest

from client.device_home import DeviceHome
from client.feedback_store import FILE, Feedback, FeedbackStore, pairs_of
from client.record_store import RecordStore
from client.user_data import Record
from common.errors import ConfigError, DataError

SECRET = "nobody-may-read-this"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return DeviceHome.open(create=True)


def records(home):
    return [(one.record.prompt, one.record.response, one.record.rejected) for one in RecordStore(home).records()]


def test_feedback_becomes_pairs_where_it_says_what_was_wanted():
    records = pairs_of(
        [
            Feedback("p", "good", "up"),
            Feedback("p", "bad", "down"),
            Feedback("alone", "fine", "up"),
            Feedback("lone", "bad", "down"),
            Feedback("q", "draft", "edit", "final"),
            Feedback("q", "same", "edit", "same"),
        ]
    )
    assert [(one.prompt, one.response, one.rejected) for one in records] == [
        ("q", "final", "draft"),
        ("p", "good", "bad"),
        ("alone", "fine", None),
    ]
    assert isinstance(records[0], Record)
    assert "final" not in repr(records[0])
    assert "draft" not in repr(Feedback("q", "draft", "edit", "final"))


def test_an_edit_is_a_pair_among_the_records_until_it_is_taken_back(home):
    store = FeedbackStore(home)
    name = store.add("q", "draft", "edit", " final ")
    assert records(home) == [("q", "final", "draft")]
    assert [one.source for one in RecordStore(home).records()] == ["feedback"]
    assert store.add("q", "draft", "edit", "final") == name  # said again
    assert len(store.all()) == len(records(home)) == 1
    store.remove(name[:6])
    assert store.all() == {}
    assert records(home) == []


def test_two_thumbs_make_a_pair_and_a_thumb_that_turns_takes_the_other_back(home):
    store = FeedbackStore(home)
    store.add("p", "bad", "down")
    assert records(home) == []
    store.add("p", "good", "up")
    assert ("p", "good", "bad") in records(home)
    store.add("p", "good", "down")
    assert [one.kind for one in store.all().values()] == ["down", "down"]
    assert records(home) == []


def test_what_is_no_feedback_is_refused_without_its_text(home):
    store = FeedbackStore(home)
    for arguments in [("p", SECRET, "sideways"), ("p", SECRET, "edit", SECRET), ("", SECRET, "up"), ("p", " ", "up")]:
        with pytest.raises(ConfigError) as refused:
            store.add(*arguments)
        assert SECRET not in str(refused.value)
    with pytest.raises(DataError):
        store.remove("ffff")
    assert store.all() == {}


def test_it_is_sealed(home):
    FeedbackStore(home).add("question", SECRET, "edit", "better")
    assert SECRET.encode() not in (home.folder / FILE).read_bytes()
