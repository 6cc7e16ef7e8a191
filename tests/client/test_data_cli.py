"""`homespun device data ...`: a preview and a yes before anything is learned, and nothing half-added."""

from __future__ import annotations

import json

import numpy as np
import pytest

from client.device_home import DeviceHome
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.record_store import RecordStore

SECRET = "my dog is called Biscuit"


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def notes(place):
    folder = place / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text(
        "The pear tree flowers in April, and the bees of the neighbour come to it.\n\nIt is an old tree."
    )
    lines = [{"prompt": f"Remember that {SECRET}.", "response": "Noted."}, {"text": "one more"}, {"text": ""}]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def records():
    return RecordStore(DeviceHome.open()).records()


def test_the_owner_sees_what_would_be_learned_and_is_asked(run, notes):
    refused = run("data", "add", notes, code=3)
    assert "--yes" in refused
    assert len(RecordStore(DeviceHome.open())) == 0
    shown = run("data", "add", notes, "--dry-run")
    assert "read 2 files: 5 records, of which new: 3 texts, 1 answers" in shown
    assert "left out, empty records: 1" in shown
    assert "text: The pear tree flowers" in shown
    assert "nothing was added" in shown
    assert records() == ()
    assert "added 4 records" in run("data", "add", notes, "--yes")
    assert len(records()) == 4
    again = run("data", "add", notes, "--yes")
    assert "records that are here already: 4" in again
    assert len(records()) == 4


def test_a_yes_is_waited_for_at_a_terminal(run, notes, monkeypatch):
    import typer

    asked = []
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr(typer, "confirm", lambda question, abort: asked.append(question))
    monkeypatch.setattr(typer, "prompt", lambda *words, **options: "a passphrase of mine")
    run("data", "add", notes)
    assert asked == ["Add 4 records?"]
    assert len(RecordStore(DeviceHome.open(ask_passphrase=lambda: "a passphrase of mine"))) == 4


def test_everything_is_said_as_json(run, notes):
    said = json.loads(run("data", "add", notes, "--yes", "--json"))
    assert (said["files"], said["new"], said["duplicates"], said["empty"]) == (2, 4, 0, 1)
    listed = json.loads(run("data", "list", "--json"))
    assert [row["id"] for row in listed] == said["added"]
    one = json.loads(run("data", "show", said["added"][2][:8], "--json"))
    assert SECRET in one["prompt"]
    assert one["source"].endswith("b.jsonl")
    gone = json.loads(run("data", "remove", *said["added"][:2], "--json"))
    assert gone == {"removed": 2, "private_adapter_erased": False}
    assert len(json.loads(run("data", "list", "--json"))) == 2


def test_one_bad_file_keeps_all_of_them_out(run, notes):
    (notes / "z.jsonl").write_text(f'{{"text": "{SECRET}"}}\nnonsense')
    wrong = run("data", "add", notes, "--yes", code=1)
    assert "z.jsonl: line 2: not valid JSON" in wrong
    assert SECRET not in wrong
    with pytest.raises(Exception, match="no device here"):
        records()


def test_what_is_shown_cannot_command_the_terminal(run, place):
    (place / "evil.txt").write_text("red \x1b[31m text \x07 here")
    assert "\x1b" not in run("data", "add", place / "evil.txt", "--yes")
    (one,) = records()
    assert "\x1b" not in run("data", "list") + run("data", "show", one.id)


def test_a_removed_record_leaves_profile_and_private_adapter(run, notes):
    run("data", "add", notes, "--yes")
    assert "My dog is called Biscuit." in run("profile", "show")
    run("profile", "edit", "1", "I am called Ada.")
    home = DeviceHome.open()
    learned = LearnedStore(home)
    ones = np.ones(8, np.float32)
    learned.keep(Learned("b" * 64, ("q_proj",), 2.0, rank=1, rank_alone=1, shared=ones, alone=ones))
    (dog,) = [one for one in records() if SECRET in one.record.prompt]
    before = LevelStore(home).profile()
    assert "my dog" in " ".join(before.deleted).lower()  # the line that was put into the owner's words
    said = run("data", "remove", dog.id)
    assert "private adapter had been trained with them and was erased" in said
    profile = LevelStore(home).profile()
    assert profile.texts == ("I am called Ada.",)
    assert profile.deleted == frozenset()  # what only a removed record said is not remembered either
    after = learned.load("b" * 64)
    assert after.alone is None
    assert np.array_equal(after.shared, ones)


def test_records_of_one_file_go_together(run, notes):
    run("data", "add", notes, "--yes")
    assert "removed 2 records" in run("data", "remove", "--source", notes / "a.txt")
    assert {one.source for one in records()} == {str(notes / "b.jsonl")}
    run("data", "remove", "--source", notes / "a.txt", code=1)
    run("data", "remove", code=2)
    run("data", "remove", "0000", code=1)
    assert len(records()) == 2
