"""The coordinator's hand on Flower: who may connect, which run goes on, and what is left when none does."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest

from common.config import RunConfig
from common.errors import StoreError
from common.files import take_lock
from common.keys import SigningKey
from common.ledger import Ledger
from server import fleet_runs, run_keeper
from server.checkpoint import Checkpoint
from server.enrolment import Enrolment
from server.run_keeper import FIRST_SECONDS, GONE_SECONDS, RunKeeper
from server.server_home import ServerHome
from server.superlink import Node

NOW = datetime(2026, 11, 22, tzinfo=UTC)


class Flower:
    """The production seam: a SuperLink that remembers what it was told."""

    def __init__(self):
        self.known, self.started, self.stopped, self.away = {}, [], [], False

    def nodes(self):
        if self.away:
            raise StoreError("away")
        return tuple(self.known.values())

    def register(self, public_key):
        self.known[public_key] = Node(100 + len(self.known), public_key, "registered")
        return self.known[public_key].id

    def unregister(self, node):
        for key, one in self.known.items():
            if one.id == node:
                self.known[key] = Node(node, key, "unregistered")

    def start(self, fab, folder):  # noqa: ARG002
        self.started.append(folder.name)
        return len(self.started)

    def stop(self, run):
        self.stopped.append(run)

    def status(self, run):  # noqa: ARG002
        return "finished"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path))
    monkeypatch.setattr(run_keeper, "bundle", lambda **_: b"a bundle")
    home = ServerHome.open(create=True)
    home.flower.mkdir()
    return home


class Kept:
    def __init__(self, home):
        self.home, self.flower, self.now, self.events = home, Flower(), 0.0, []
        self.enrolment = Enrolment(home.devices)
        self.begin()

    def begin(self):
        """As after the coordinator was killed: nothing but files is left."""
        self.keeper = RunKeeper(
            self.home,
            self.flower,
            "0.1.0",
            lambda event, **facts: self.events.append(event),
            clock=lambda: self.now,
        )

    def enrol(self, number):
        token = self.enrolment.invite(uses=1, now=NOW, expires=NOW + timedelta(days=1), approves=True)
        return self.enrolment.enrol(token, b"key %d" % number, "0.1.0", f"{number:032x}", now=NOW)

    def tend(self, seconds=4.0, *, times=1):
        for _ in range(times):
            self.now += seconds
            self.keeper.tend()


@pytest.fixture
def kept(home):
    return Kept(home)


@pytest.fixture
def prepared(home, tiny_base_folder):
    def make(name, subjects):
        config = RunConfig(model=str(tiny_base_folder), cohort=1, rounds=2, max_tokens=16)
        opened = fleet_runs.prepare(home.runs / name, config, subjects)
        opened.ledger.close()
        return opened.path

    return make


def advance(path, number):
    before = Checkpoint.load(path / "checkpoint.safetensors")
    Checkpoint(number, before.vector, np.zeros_like(before.vector), "", before.layout).save(
        path / "checkpoint.safetensors"
    )


def test_who_is_approved_is_let_in_and_who_is_revoked_is_let_go(kept, prepared):
    one, two = kept.enrol(1), kept.enrol(2)
    path = prepared("run", [one.subject, two.subject])
    kept.tend()
    assert set(kept.flower.known) == {one.public_key, two.public_key}
    homes = json.loads((path / "homes.json").read_text())["homes"]
    assert homes == {one.subject: 100, two.subject: 101}
    kept.enrolment.set_state(one.id, "revoked")
    kept.tend()
    assert kept.flower.known[one.public_key].status == "unregistered"
    assert json.loads((path / "homes.json").read_text())["homes"] == {two.subject: 101}


def test_devices_are_let_in_again_when_flower_lost_its_database(kept):
    one = kept.enrol(1)
    kept.tend()
    kept.flower.known.clear()
    kept.tend()
    assert one.public_key in kept.flower.known


def test_a_flower_that_is_away_is_waited_for(kept):
    kept.enrol(1)
    kept.flower.away = True
    kept.tend(times=3)
    assert kept.flower.known == {}
    kept.flower.away = False
    kept.tend()
    assert len(kept.flower.known) == 1


def test_runs_are_worked_on_one_after_the_other(kept, prepared):
    subject = kept.enrol(1).subject
    first, second = prepared("first", [subject]), prepared("second", [subject])
    os.utime(first / "config.toml", (1, 1))
    kept.tend()
    assert kept.flower.started == ["first"]
    lock = take_lock(first / fleet_runs.RUNNING, "run-locked")
    kept.tend(times=30)
    assert kept.flower.started == ["first"]
    advance(first, 2)
    kept.tend()
    assert kept.flower.started == ["first"]  # its app is still there
    os.close(lock)
    kept.tend()
    assert kept.flower.started == ["first", "second"]
    advance(second, 2)
    kept.tend(times=2)
    assert kept.events.count("run-ended") == 2
    log = [json.loads(line) for line in (second / fleet_runs.EVENTS).read_text().splitlines()]
    assert [(one["event"], one.get("state")) for one in log] == [("started", None), ("ended", "finished")]


def test_an_app_that_died_is_started_again_and_one_that_is_slow_is_waited_for(kept, prepared):
    path = prepared("run", [kept.enrol(1).subject])
    kept.tend()
    kept.tend(FIRST_SECONDS - 10)
    assert kept.flower.started == ["run"]
    lock = take_lock(path / fleet_runs.RUNNING, "run-locked")
    kept.tend()
    os.close(lock)  # killed
    kept.tend()
    assert kept.flower.started == ["run"]
    kept.tend(GONE_SECONDS)
    assert kept.flower.started == ["run", "run"]
    assert kept.flower.stopped == [1]


def test_what_does_not_begin_is_tried_more_and_more_rarely_and_goes_on_at_once_when_it_gets_further(kept, prepared):
    path = prepared("run", [kept.enrol(1).subject])
    at = []
    for _ in range(900):
        before = len(kept.flower.started)
        kept.tend()
        if len(kept.flower.started) > before:
            at.append(kept.now)
    gaps = np.diff(at)
    assert gaps[0] <= FIRST_SECONDS + 8
    assert gaps[1] >= 2 * FIRST_SECONDS  # on a machine that is that slow, five that begin at once never would
    assert gaps[-1] >= 256
    assert (np.diff(gaps) >= -8).all()
    assert fleet_runs.Standing.load(path).starts == len(at)


def test_a_coordinator_that_was_killed_goes_on_with_an_app_that_was_not(kept, prepared):
    path = prepared("run", [kept.enrol(1).subject])
    kept.tend()
    lock = take_lock(path / fleet_runs.RUNNING, "run-locked")
    kept.tend()
    kept.begin()
    kept.tend(times=50)
    assert kept.flower.started == ["run"]
    os.close(lock)


def test_a_run_that_is_stopped_is_not_started_and_one_that_is_resumed_is(kept, prepared):
    path = prepared("run", [kept.enrol(1).subject])
    fleet_runs.want(path, "stop")
    kept.tend(times=5)
    assert kept.flower.started == []
    fleet_runs.want(path, "run")
    kept.tend()
    assert kept.flower.started == ["run"]


def test_what_flower_kept_is_wiped_when_nothing_runs_also_after_a_crash(kept, prepared, monkeypatch):
    wiped = []
    monkeypatch.setattr(run_keeper, "wipe_updates", lambda path: wiped.append(path.name) or 0)
    path = prepared("run", [kept.enrol(1).subject])
    kept.tend()
    assert wiped == []
    advance(path, 2)
    kept.begin()  # killed between the end of the run and the wiping
    kept.tend(times=3)
    assert wiped == ["superlink.sqlite"]


def test_a_folder_that_is_damaged_does_not_hold_the_others_up(kept, prepared, home):
    subject = kept.enrol(1).subject
    broken = prepared("broken", [subject])
    os.utime(broken / "config.toml", (1, 1))
    (broken / "ledger.jsonl").write_bytes(b"{}\n")
    prepared("sound", [subject])
    kept.tend()
    assert kept.flower.started == ["sound"]
    assert "unreadable" in kept.events


def test_heads_that_devices_signed_lie_in_the_run_that_they_are_in(kept, prepared, tmp_path):
    one, other = kept.enrol(1), kept.enrol(2)
    path = prepared("run", [one.subject])
    kept.tend()
    assert not (path / "heads.jsonl").exists()
    header = {"role": "device", "subject": one.subject}
    with Ledger.create(tmp_path / "ledger.jsonl", SigningKey.generate(), header) as ledger:
        for number, device in enumerate((one, other)):
            kept.enrolment.note_call(device.id, "0.1.0", "", ledger.head.to_json() | {"index": number}, now=NOW)
        kept.tend()
        (line,) = (path / "heads.jsonl").read_text().splitlines()
        assert json.loads(line) == ledger.head.to_json()
    assert (path / "heads.jsonl").stat().st_mode & 0o077 == 0
