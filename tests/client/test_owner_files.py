"""What an owner brings is read whole, or not at all with the place of the fault."""

from __future__ import annotations

import json
import os

import pytest

from client.device_home import DeviceHome
from client.membership import Membership
from client.owner_files import LONG, adopted, passages, read_paths
from client.record_store import RecordStore
from client.user_data import Record
from common.errors import ConfigError, DataError
from common.fleet import Invite

SECRET = "the pear tree"


@pytest.fixture
def write(tmp_path):
    def one(name, content):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        os.utime(path, (5000.0, 5000.0))
        return path

    return one


def records(*paths, **options):
    return [one.record for one in read_paths(paths, **options).records]


def test_a_text_becomes_a_record_per_passage_with_the_files_time(write):
    path = write("a.txt", "\ufeffFirst paragraph, which is long enough to stand alone, surely.\r\n\r\nSecond one.\n")
    found = records(path)
    assert [record.response for record in found] == [
        "First paragraph, which is long enough to stand alone, surely.",
        "Second one.",
    ]
    assert {(record.time, record.task, record.prompt) for record in found} == {(5000.0, "text", "")}


def test_front_matter_of_markdown_is_no_text_and_headings_go_with_what_follows(write):
    path = write("a.md", "---\ntitle: x\n---\n# Garden\n\nThe pear tree flowers.\n")
    assert [record.response for record in records(path)] == ["# Garden\n\nThe pear tree flowers."]


def test_passages_lose_no_word_and_are_short_enough():
    text = "\n\n".join(" ".join(f"word{i}." for i in range(count)) for count in (1, 300, 2, 700)) + "x" * 2000
    cut = passages(text)
    assert " ".join(cut).split() == text.split() or "".join("".join(cut).split()) == "".join(text.split())
    assert max(map(len, cut)) <= LONG
    assert passages(" \n\n ") == []


def test_json_lines_are_the_spines_or_a_record_each(write):
    spine = write(
        "spine.jsonl",
        json.dumps({"user": "me", "texts": ["a"], "pairs": [{"prompt": "p", "chosen": "c", "rejected": "r"}]})
        + "\n\n"
        + json.dumps({"user": "me", "examples": [{"prompt": "p", "response": "r", "time": 3}]}),
    )
    assert records(spine) == [
        Record("", "a"),
        Record("p", "c", None, "preference", "r"),
        Record("p", "r", 3.0, "reply"),
    ]
    single = write(
        "single.ndjson",
        "\n".join(
            json.dumps(one)
            for one in (
                {"text": "t", "time": "2026-01-01"},
                {"prompt": "p", "response": "r"},
                {"prompt": "p", "chosen": "c", "rejected": "r"},
                {"user": 7, "text": "u"},
            )
        ),
    )
    found = records(single)
    assert {(one.task, one.response) for one in found} == {
        ("text", "t"),
        ("reply", "r"),
        ("preference", "c"),
        ("text", "u"),
    }
    assert next(one.time for one in found if one.response == "t") == 1767225600.0


def test_of_several_users_one_is_the_owner(write):
    path = write("two.jsonl", "\n".join(json.dumps({"user": name, "texts": [name]}) for name in ("ada", "bela")))
    assert records(path, user="bela") == [Record("", "bela")]
    with pytest.raises(ConfigError, match="2 users; --user") as wrong:
        records(path)
    assert "ada" not in str(wrong.value)
    with pytest.raises(DataError, match="not in the file"):
        records(path, user="carl")


def test_a_folder_is_read_through_without_what_is_hidden_linked_or_unknown(write, tmp_path):
    write("notes/a.txt", "one")
    write("notes/deep/b.md", "two")
    write("notes/.git/c.txt", "hidden")
    write("notes/picture.png", b"\x89PNG")
    (tmp_path / "notes/link.txt").symlink_to(write("outside.txt", "linked"))
    reading = read_paths([tmp_path / "notes"])
    assert [one.record.response for one in reading.records] == ["one", "two"]
    assert reading.files == 2
    assert reading.left_out == {"hidden files and links": 2, "files of other kinds": 1}
    assert reading.records[0].source == str(tmp_path / "notes/a.txt")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", f"{SECRET}\n\n".encode() + b"\xff", "line 3: not UTF-8"),
        ("a.txt", f"{SECRET}\n\0".encode(), "line 2: not text"),
        ("a.jsonl", "{}\n" + SECRET, "line 1"),
        ("a.jsonl", json.dumps({"text": SECRET}) + "\n{", "line 2: not valid JSON"),
        ("a.jsonl", json.dumps({"text": SECRET}) + "\n[1]", "line 2: not a JSON object"),
        ("a.jsonl", json.dumps({"text": [SECRET]}), "line 1: 'text' is not text"),
        ("a.jsonl", json.dumps({"prompt": SECRET}), "line 1: 'response' is not there"),
        ("a.jsonl", json.dumps({"user": "x", "texts": [7, SECRET]}), "line 1: item 1 of 'texts'"),
        ("a.jsonl", json.dumps({"text": SECRET, "task": 7}), "line 1: 'task'"),
        ("a.jsonl", f'"{SECRET}"'.encode() + b"\xff", "line 1: not UTF-8"),
        ("a.mbox", SECRET, "line 1: an mbox"),
        ("a.docx", SECRET, "of no known kind"),
    ],
)
def test_a_fault_is_named_by_file_and_line_and_not_shown(write, name, content, says):
    path = write(name, content)
    good = write("good.txt", "good")
    with pytest.raises(DataError) as wrong:
        read_paths([good, path])
    assert says in str(wrong.value)
    assert str(path) in str(wrong.value)
    assert SECRET not in str(wrong.value)


def test_what_is_not_there_is_said_so(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_paths([tmp_path / "absent.txt"])


def test_the_file_of_an_earlier_version_is_taken_in_once_and_not_read_again(write, tmp_path, quiet_coordinator):
    home = DeviceHome.open(tmp_path / "device", create=True)
    path = write("people.jsonl", "\n".join(json.dumps({"user": name, "texts": [f"of {name}"]}) for name in "ab"))
    invite = Invite.load(quiet_coordinator.invite())
    joined = Membership(home, invite, path, "b", quiet_coordinator.model, "approved").save()
    after = adopted(joined)
    assert (after.data, Membership.load(home).data) == (None, None)
    assert [one.record.response for one in RecordStore(home).records()] == ["of b"]
    RecordStore(home).remove([one.id for one in RecordStore(home).records()])
    assert adopted(Membership.load(home)) == Membership.load(home)
    assert len(RecordStore(home)) == 0  # what was removed does not come back
    gone = Membership(home, invite, tmp_path / "gone.jsonl", "b", quiet_coordinator.model, "approved").save()
    assert adopted(gone).data == gone.data
    assert "gone.jsonl: no such file" in gone.standing()["refit"]


def test_a_folder_without_a_file_to_read_is_a_mistake_and_not_nothing(tmp_path):
    for name in ("photo.png", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=f"{tmp_path}: no file of a known kind"):
        read_paths([tmp_path])
