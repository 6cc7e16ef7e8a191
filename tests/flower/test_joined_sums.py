"""Secure sums over five joined devices, as their owners run them: TLS, invites, a roster that each of them checked.

In every round another SuperNode is killed when the requests of another leg go out, so that between any two legs one is
lost once. Nothing is faked: the kill follows what the door of the coordinator captured.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from common.ledger import verify
from common.secagg_messages import MAGIC, Leg
from common.vouched_roster import VouchedRoster
from server import fleet_runs, run_folder

pytestmark = [pytest.mark.flower, pytest.mark.fleet, pytest.mark.timeout(2400)]

REQUESTS = (Leg.ROSTER, Leg.DELIVERY, Leg.SURVIVORS, Leg.CONSENTS)
POLICY = "smallest_cohort = 3\nepsilon = 1000.0\nclip = 1.0\nmains_power_only = false\nminutes_per_day = 1000\n"
RUN = f"""\
model = "built-in"
method = "dual"
rounds = {len(REQUESTS)}
spare_rounds = 3
cohort = 5
noise = "distributed"
epsilon = 8.0
coordinator_epsilon = 8.0
max_tokens = 32
round_timeout = 900
"""


def fleet_of_five():
    """What tests/flower/test_fleet.py runs; test files are no modules."""
    spec = importlib.util.spec_from_file_location("fleet_of_five", Path(__file__).with_name("test_fleet.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OF_FIVE = fleet_of_five()


class Door:
    """Watches what the coordinator's door lets out."""

    def __init__(self, capture: Path) -> None:
        self.capture, self.place = capture, 0

    def skip(self) -> None:
        """Look no more at what went out so far."""
        self.place = self.capture.stat().st_size

    def wait_for(self, leg: Leg, seconds: float) -> None:
        """Return as soon as a request of `leg` went out, beyond what was seen before."""
        wanted, deadline, kept = MAGIC + bytes([leg]), time.monotonic() + seconds, b""
        while True:
            with self.capture.open("rb") as file:
                file.seek(self.place)
                fresh = file.read()
            self.place += len(fresh)
            kept = kept[-len(wanted) :] + fresh
            if wanted in kept:
                return
            assert time.monotonic() < deadline, f"no request of leg {leg.name} within {seconds} s"
            time.sleep(0.05)


def joins(fleet, number, run):
    return [entry.body["round"] for entry in fleet.ledger(number) if entry.kind == "join" and entry.body["run"] == run]


@pytest.fixture(scope="module")
def fleet():
    root = Path(tempfile.mkdtemp(prefix="hs-"))
    fleet = OF_FIVE.Fleet(root, policy=POLICY, run=RUN)
    try:
        fleet.up()
        words = ("--uses", OF_FIVE.DEVICES, "--config", root / "plan.toml", "--out", root / "invite.json")
        fleet.server("invite", *words, "--enroller", root / "enroller.key")
        for number in range(OF_FIVE.DEVICES):
            fleet.join(number)
        yield fleet
    finally:
        fleet.end()
        if os.environ.get("HOMESPUN_KEEP") != "1":
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(fleet):
    """The whole run, in each round of which a SuperNode is killed at another leg: its folder, and the victims."""
    fleet.server("run", fleet.root / "run.toml")
    run, door, victims = fleet.run_row()["run"], Door(fleet.root / "capture"), {}
    for leg in REQUESTS:
        door.wait_for(leg, 900)
        taking_part = [number for number in range(OF_FIVE.DEVICES) if joins(fleet, number, run)]
        attempt = max(joins(fleet, number, run)[-1] for number in taking_part)
        here = [number for number in taking_part if joins(fleet, number, run)[-1] == attempt and number not in victims]
        assert here
        assert fleet.kill("flower-supernode", f"{fleet.home(here[0])}/") >= 1
        victims[here[0]] = (attempt, leg)
        began = fleet.run_row()["spent"]
        OF_FIVE.wait_for(lambda began=began: fleet.run_row()["spent"] > began or over(fleet), 600, "the next round")
        door.skip()
    OF_FIVE.wait_for(lambda: over(fleet), 1200, "the run's end")
    return fleet.run_folder(), victims


def over(fleet) -> bool:
    return fleet.run_row()["state"] in ("finished", "failed")


def test_rounds_complete_though_a_supernode_is_killed_between_any_two_legs(fleet, finished):
    folder, victims = finished
    row = fleet.run_row()
    assert (row["state"], row["round"]) == ("finished", len(REQUESTS))
    assert row["spent"] <= row["reserved"]
    assert [leg for _, leg in victims.values()] == list(REQUESTS)
    log = [json.loads(line) for line in (folder / fleet_runs.EVENTS).read_text().splitlines()]
    print(json.dumps(log))
    assert [one["round"] for one in log if one["event"] == "round"] == [1, 2, 3, 4]
    assert log[-1]["event"] == "ended"


def test_the_roster_is_in_the_spec_and_every_device_checked_it(fleet, finished):
    folder, _ = finished
    spec = json.loads((folder / run_folder.SPEC).read_text())
    roster = VouchedRoster.from_bytes((folder / fleet_runs.ROSTER).read_bytes())
    assert spec["secure_sum"]["roster"] == roster.digest
    assert len(roster.devices) == OF_FIVE.DEVICES
    # The enroller's key is not with the coordinator, and the invite's token never came to it.
    server = fleet.home("server") / "server"
    assert not list(server.glob("enroller*"))
    token = json.loads((fleet.root / "invite.json").read_text())["token"].encode()
    assert token not in (fleet.root / "capture").read_bytes()
    assert all(token not in path.read_bytes() for path in server.rglob("*") if path.is_file())
    for number in range(OF_FIVE.DEVICES):
        (kept,) = (fleet.home(number) / "device").glob("roster-*.json")
        assert kept.read_bytes() == roster.to_bytes()


def test_the_ledgers_of_both_sides_agree_and_no_device_did_anything_twice(fleet, finished):
    folder, victims = finished
    server = verify((folder / run_folder.LEDGER).read_bytes()).entries
    run = server[0].body["run"] if "run" in server[0].body else fleet.run_row()["run"]
    debited = [entry.body["round"] for entry in server if entry.kind == "debit"]
    assert len(set(debited)) == len(debited)
    counted = {
        receipt
        for line in (folder / "receipts.jsonl").read_text().splitlines()
        for receipt in json.loads(line)["receipts"]
    }
    sent = {}
    for number in range(OF_FIVE.DEVICES):
        own = [entry for entry in fleet.ledger(number) if entry.body.get("run") == run]
        began = [entry.body["round"] for entry in own if entry.kind == "join"]
        charged = [entry.body["round"] for entry in own if entry.kind == "debit"]
        released = [entry.body["round"] for entry in own if entry.kind == "release"]
        for rounds in (began, charged, released):
            assert len(set(rounds)) == len(rounds)
        assert set(released) <= set(charged) <= set(began) <= set(debited)
        sent |= {entry.body["sha256"]: entry.body for entry in own if entry.kind == "release"}
        if number in victims and victims[number][1] is Leg.ROSTER:
            assert victims[number][0] not in charged  # it was killed before its vector was asked for
    assert counted <= sent.keys()
    assert all(one["dtype"] == "uint8" for one in sent.values())  # masked vectors, byte by byte


def test_nothing_private_crossed_the_wire_in_a_secure_sum(fleet, finished):
    everything = (fleet.root / "capture").read_bytes()
    for number in range(OF_FIVE.DEVICES):
        assert all(line.encode() not in everything for line in OF_FIVE.written_by(number))
