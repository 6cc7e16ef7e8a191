"""The owner takes away, brings back and erases: asked first, told what stays, and nothing left behind."""

from __future__ import annotations

import json

import pytest

from client.device_home import DeviceHome
from client.learned_store import LearnedStore
from client.record_store import RecordStore

pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def learned(run, place, tiny_base_folder):
    path = place / "me.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"w{n} w3", "response": f"w{n + 1} w4"}) + "\n" for n in range(10)))
    run("data", "add", path, "--yes")
    run("learn", "--model", tiny_base_folder, "--steps", 2, "--max-tokens", 16)


def test_what_was_learned_goes_out_and_comes_back_after_it_was_forgotten(run, place, learned, tiny_base_folder):
    shown = run("export", "--out", place / "out", "--merged", "--system", "private")
    assert "10 records" in shown
    assert "in the clear" in shown
    assert (place / "out" / "merged" / "model.safetensors").is_file()
    before = LearnedStore(DeviceHome.open()).load()
    assert "erased" in run("forget", "--yes")
    assert LearnedStore(DeviceHome.open()).load() is None
    assert "--yes" in run("import", place / "out", "--model", tiny_base_folder, code=3)
    said = json.loads(run("import", place / "out", "--model", tiny_base_folder, "--yes", "--json"))
    assert (said["records"], said["duplicates"]) == (10, 0)
    after = LearnedStore(DeviceHome.open()).load()
    assert after.alone.tobytes() == before.alone.tobytes()
    assert after.chosen == before.chosen
    assert "10 were here" in run("import", place / "out", "--without-adapters", "--yes")
    run("export", "--out", place / "again")  # the base is known now
    assert json.loads(run("export", "--out", place / "third", "--json"))["records"] == 10


def test_forgetting_asks_says_what_goes_and_erases_nothing_without_a_yes(run, learned):
    assert "--yes" in run("forget", code=3)
    shown = run("forget", "--dry-run")
    for part in (
        "10 records",
        "private adapters",
        "kept:",
        "not reached: your own files",
        "Nothing ever left",
        "--dry-run",
    ):
        assert part in shown
    planned = json.loads(run("forget", "--dry-run", "--json"))
    assert planned["records"] == 10
    assert "records.sqlite" in planned["files"]
    assert len(RecordStore(DeviceHome.open())) == 10
    done = json.loads(run("forget", "--yes", "--json"))
    assert done["erased"] is True
    assert len(RecordStore(DeviceHome.open())) == 0
    assert "0 records" in run("forget", "--yes")  # again is nothing new


def test_a_system_without_an_adapter_cannot_be_merged(run, place, learned):
    assert "puts nothing" in run("export", "--out", place / "x", "--merged", "--system", "retrieval", code=2)
    run("export", "--out", place / "out")
    assert "already holds" in run("export", "--out", place / "out", code=1)
    assert "not an export" in run("import", place / "home", "--yes", code=1)


def test_one_table_says_what_the_four_commands_keep(run):
    shown = run("--help")
    for command in ("pause", "down", "leave", "forget"):
        (line,) = [one for one in shown.splitlines() if one.strip().startswith(command) and "Kept:" in one]
        assert line


def test_a_copy_is_made_and_put_back(run, place, learned):
    words = place / "words.txt"
    words.write_text("correct horse battery\n")
    assert "--passphrase-file" in run("backup", place / "copy", code=2)
    said = json.loads(run("backup", place / "copy", "--passphrase-file", words, "--json"))
    assert said["files"] > 5
    assert "exists" in run("backup", place / "copy", "--passphrase-file", words, code=1)
    run("forget", "--yes")
    assert "--yes" in run("restore", place / "copy", "--passphrase-file", words, code=3)
    shown = run("restore", place / "copy", "--passphrase-file", words, "--yes")
    assert "the ledger that was here stays" in shown
    assert len(RecordStore(DeviceHome.open())) == 10
    kinds = [entry.kind for entry in DeviceHome.open().read_ledger().entries]
    assert kinds[-1] == "tombstone"
    words.write_text("another horse")
    assert "another passphrase" in run("restore", place / "copy", "--passphrase-file", words, "--yes", code=1)
