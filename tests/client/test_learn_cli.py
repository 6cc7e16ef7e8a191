"""`homespun device learn` before any federation: what is trained, on which base, and what the owner is told."""

from __future__ import annotations

import json

import pytest

from client.device_home import DeviceHome
from client.learn_cli import BASES, base_of
from client.learned_store import LearnedStore
from client.level_store import LevelStore
from client.membership import Membership
from common.errors import DataError, StoreError
from common.fleet import Invite
from common.model_files import base_folder, model_digest

pytestmark = pytest.mark.usefixtures("place")


def lines(place, count):
    path = place / "me.jsonl"
    path.write_text(
        "".join(json.dumps({"prompt": f"w{n} w3", "response": f"w{n + 1} w4"}) + "\n" for n in range(count))
    )
    return path


def test_a_device_that_joined_nothing_learns_from_its_records(run, place, tiny_base_folder):
    assert "no device here" in run("learn", code=1)
    run("data", "add", lines(place, 10), "--yes")
    shown = run("learn", "--model", tiny_base_folder, "--steps", 2, "--max-tokens", 16)
    assert "trained on 6 records; on 2 newer ones" in shown
    assert "private" in shown
    assert "in use" in shown
    said = json.loads(run("learn", "--model", tiny_base_folder, "--steps", 2, "--max-tokens", 16, "--json"))
    assert said["base"] == model_digest(tiny_base_folder)
    assert said["chosen"] in said["validation_nats_per_token"]
    home = DeviceHome.open()
    assert base_of(home) == tiny_base_folder  # the next time it need not be named
    assert LearnedStore(home).load(said["base"]).alone is not None
    assert f"10 records of yours; in use: {said['chosen']}" in run("status")
    status = json.loads(run("status", "--json"))
    assert (status["joined"], status["records"], status["learned"]["chosen"]) == (None, 10, said["chosen"])


def test_few_records_are_learned_from_and_nothing_is_claimed(run, place, tiny_base_folder):
    run("data", "add", lines(place, 2), "--yes")
    assert "too few records" in run("learn", "--model", tiny_base_folder, "--steps", 1, "--max-tokens", 16)


def test_without_records_or_with_a_model_that_is_not_there_it_says_what_to_do(run, place):
    DeviceHome.open(create=True)
    assert "data add" in run("learn", code=1)
    assert "no model folder here" in run("learn", "--model", place / "absent", code=1)
    run("learn", "--rank", "0", code=2)


def test_the_base_is_the_built_in_one_or_the_federations(quiet_coordinator, tmp_path):
    home = DeviceHome.open(create=True)
    assert base_of(home) == base_folder("built-in")
    assert (base_of(home) / "model.safetensors").is_file()
    invite = Invite.load(quiet_coordinator.invite())
    Membership(home, invite, None, None, quiet_coordinator.model, "approved").save()
    assert base_of(home) == quiet_coordinator.model
    Membership(home, invite, None, None, tmp_path / "absent", "approved").save()
    with pytest.raises(DataError, match="device up"):
        base_of(home)
    (home.folder / BASES).write_text("{")
    Membership(home, invite, None, None, tmp_path / "absent", "left").save()
    assert base_of(home) == base_folder("built-in")  # nothing was learned, so nothing is looked up


def test_a_damaged_note_of_bases_is_named(run, place, tiny_base_folder):
    run("data", "add", lines(place, 4), "--yes")
    run("learn", "--model", tiny_base_folder, "--steps", 1, "--max-tokens", 16)
    home = DeviceHome.open()
    (home.folder / BASES).write_text("{")
    with pytest.raises(StoreError, match="--model"):
        base_of(home)


def test_status_says_which_levels_are_off(run):
    home = DeviceHome.open(create=True)
    LevelStore(home).switch("retrieval", on=False)
    assert "; off: retrieval, and with them what needs them" in run("status")
    LevelStore(home).switch("retrieval", on=True)
    assert "off:" not in run("status")
