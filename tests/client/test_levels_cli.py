"""The owner sees, edits and deletes the profile, sees what retrieval uses, and turns any level off."""

from __future__ import annotations

import json

import pytest

import homespun
from client.device_home import DeviceHome
from client.level_store import FILE, LEVELS, LevelStore
from client.personalization.profile import Line, Profile
from client.user_data import Record
from simulations.worlds.built_in import base_folder, built_in_user

DOG = "Note that my dog is called Biscuit."


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return DeviceHome.open(create=True)


@pytest.fixture
def data(tmp_path):
    records = [{"prompt": record.prompt, "response": record.response} for record in built_in_user(0, 3).records]
    path = tmp_path / "me.jsonl"
    mine = {"user": "me", "examples": [{"prompt": DOG, "response": "Noted."}, *records]}
    path.write_text(json.dumps({"user": "other", "texts": ["x"]}) + "\n" + json.dumps(mine) + "\n")
    return path


@pytest.fixture
def run(capsys):
    def call(*words):
        code = homespun.main(["device", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def lines(run, *words):
    code, out, _ = run("profile", *words, "--json")
    assert code == 0
    return [line["text"] for line in json.loads(out)["lines"]]


def test_a_profile_is_made_seen_edited_and_deleted(run, data):
    made = lines(run, "show", "--data", data, "--user", "me")
    assert "My dog is called Biscuit." in made
    assert lines(run, "show") == made
    place = made.index("My dog is called Biscuit.") + 1
    assert "My dog is called Rufus." in lines(run, "edit", place, "My dog is called Rufus.")
    assert "My dog is called Biscuit." not in lines(run, "show", "--data", data, "--user", "me")
    deleted = lines(run, "delete", 2)
    gone = set(lines(run, "show")) ^ set(made)
    again = lines(run, "show", "--data", data, "--user", "me")
    assert "My dog is called Rufus." in again
    assert set(deleted) <= set(again)
    assert not (gone - {"My dog is called Rufus."}) & set(again)
    assert "records)" in run("profile", "show")[1]


def test_a_deleted_profile_is_gone_from_the_file_and_not_made_again(run, data, device):
    run("profile", "show", "--data", data, "--user", "me")
    code, out, _ = run("profile", "delete", "--json")
    assert (code, json.loads(out)) == (0, {"deleted": True, "level": "off"})
    assert lines(run, "show", "--data", data, "--user", "me") == []
    assert LevelStore(device).profile() is None
    assert run("level", "on", "profile")[0] == 0
    assert "My dog is called Biscuit." in lines(run, "show", "--data", data, "--user", "me")


def test_what_is_kept_is_sealed(run, data, device):
    run("profile", "show", "--data", data, "--user", "me")
    for path in device.folder.rglob("*"):
        if path.is_file():
            assert b"Biscuit" not in path.read_bytes(), path.name
    assert (device.folder / FILE).exists()


def test_what_retrieval_uses_is_listed_with_the_reason(run, data):
    words = ("What is my dog called?", "--model", base_folder(), "--data", data, "--user", "me")
    code, out, _ = run("level", "used", *words, "--json")
    shown = json.loads(out)
    assert code == 0
    assert shown["records"][0]["prompt"] == DOG
    assert shown["records"][0]["why"] == "words"
    assert 0 < shown["tokens"] <= 96
    assert "My dog is called Biscuit." in shown["profile"]
    assert DOG in run("level", "used", *words)[1]


@pytest.mark.parametrize("name", sorted(LEVELS))
def test_any_level_can_be_turned_off_and_on(run, name):
    assert run("level", "off", name)[0] == 0
    listed = json.loads(run("level", "list", "--json")[1])
    assert [level for level, on in listed.items() if not on] == [name]
    assert f"{name:<12} off" in run("level", "list")[1]
    assert run("level", "on", name)[0] == 0
    assert all(json.loads(run("level", "list", "--json")[1]).values())


def test_a_level_that_is_off_puts_nothing_into_a_prompt(run, data):
    words = ("What is my dog called?", "--model", base_folder(), "--data", data, "--user", "me", "--json")
    run("level", "off", "retrieval")
    shown = json.loads(run("level", "used", *words)[1])
    assert (shown["records"], shown["tokens"]) == ([], 0)
    assert shown["profile"]
    run("level", "off", "profile")
    assert json.loads(run("level", "used", *words)[1])["profile"] == []


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("level", "off", "telepathy"), 2),
        (("profile", "edit", "5", "too far"), 2),
        (("profile", "edit", "1", ""), 2),
        (("profile", "delete", "1"), 1),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(run, words, code):
    found, _, error = run(*words)
    assert found == code
    assert error.strip().count("\n") == 0


def test_a_profile_survives_the_process_and_one_version_is_kept(device):
    store = LevelStore(device)
    store.keep_profile(Profile((Line("I like tea.", "own words"),)))
    store.keep_profile(Profile((Line("I like maté.", "own words"),)))
    assert LevelStore(DeviceHome.open()).profile().texts == ("I like maté.",)
    assert isinstance(Record("", "x"), Record)
