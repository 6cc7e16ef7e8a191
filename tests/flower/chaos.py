"""The whole matrix of what may die: `sh tests/offline.sh python tests/flower/chaos.py [TARGET ...]`; half an hour.

One federation of five devices. `chaos.py storm` is one run in which every target is struck, one in each round; a
quarter of an hour. For each target a run of three rounds, in which the target is killed with SIGKILL (cut
off, stopped, started late) twice: as soon as the run works, and in its middle. After each run: it ended and says so in
its log, every round was released once, what the server counted was sent by a device, no device debited a round twice,
and no more was spent than was reserved. One line per target; the exit status is the number that failed.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("HOMESPUN_FLEET_ROUNDS", "3")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
_spec = importlib.util.spec_from_file_location("fleet_under_test", Path(__file__).with_name("test_fleet.py"))
assert _spec is not None
assert _spec.loader is not None
under_test = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(under_test)
Fleet, DEVICES, ROUNDS, wait_for = under_test.Fleet, under_test.DEVICES, under_test.ROUNDS, under_test.wait_for


def supernode(fleet):
    return fleet.kill("flower-supernode", f"{fleet.home(1)}/")


def vault(fleet):
    return fleet.kill("import reside", f"{fleet.home(2)}/")


def trainer(fleet):
    return fleet.kill("vault_child import main")


def shim(fleet):
    return fleet.kill("flwr-clientapp")


def coordinator(fleet):
    running = [pid for pid in fleet.processes("homespun.py", "server", "up", str(fleet.metrics))]
    for pid in running:
        os.kill(pid, signal.SIGKILL)
    time.sleep(3.0)
    fleet.up()
    return len(running)


def superlink(fleet):
    return fleet.kill("flower-superlink", str(fleet.root))


def superexec(fleet):
    return fleet.kill("flower-superexec", str(fleet.root))


def server_app(fleet):
    return fleet.kill("flwr-serverapp")


def standstill(fleet):
    """The coordinator stands still for half a minute: connections hang, nothing is refused."""
    running = fleet.processes("homespun.py", "server", "up", str(fleet.metrics))
    for pid in running:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(30.0)
    for pid in running:
        os.kill(pid, signal.SIGCONT)
    return len(running)


def network(fleet):
    """Loopback itself goes down for half a minute: everybody is cut off from everybody, and every connection dies."""
    if [name for _, name in socket.if_nameindex()] != ["lo"]:
        raise SystemExit("chaos: run it under tests/offline.sh; loopback of the whole machine is not taken down")
    loopback(up=False)
    time.sleep(30.0)
    loopback(up=True)
    return 1


def loopback(*, up):
    with socket.socket() as one:
        flags = 0x41 if up else 0x40  # IFF_RUNNING, IFF_UP
        fcntl.ioctl(one, 0x8914, struct.pack("16sh14x", b"lo", flags))  # SIOCSIFFLAGS


def device_for_good(fleet):
    """At the beginning one device goes away and does not come back; in the middle a second one."""
    gone = 4 if fleet.processes("flower-supernode", f"{fleet.home(4)}/") else 3
    fleet.device(gone, "down")
    return 1


def late_starter(fleet):
    """Nobody of the two that are away comes at the beginning; both come in the middle."""
    if fleet.run_row()["round"] == 0:
        return 0
    for number in (3, 4):
        fleet.device(number, "up", "--detach")
    return 2


TARGETS = (
    supernode,
    vault,
    trainer,
    shim,
    coordinator,
    superlink,
    superexec,
    server_app,
    network,
    standstill,
    device_for_good,
    late_starter,
)


def check(fleet, before, rounds=ROUNDS):
    """What must hold after each run, whatever was killed; returns it in words."""
    from common.ledger import verify

    folder = fleet.run_folder()
    row = fleet.run_row()
    assert row["state"] == "finished", row
    entries = verify((folder / "ledger.jsonl").read_bytes()).entries
    released = [entry.body["round"] for entry in entries if entry.kind == "release"]
    assert released == list(range(1, rounds + 1)), released
    assert row["spent"] <= row["reserved"], row
    log = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    deadline = time.monotonic() + 60.0
    while log[-1]["event"] != "ended" and time.monotonic() < deadline:
        time.sleep(1.0)
        log = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert (log[-1]["event"], log[-1]["state"]) == ("ended", "finished"), log
    counted = [
        receipt
        for line in (folder / "receipts.jsonl").read_text().splitlines()
        for receipt in json.loads(line)["receipts"]
    ]
    sent = set()
    for number in range(DEVICES):
        own = [entry for entry in fleet.ledger(number) if entry.body.get("run") == row["run"]]
        took = [entry.body["round"] for entry in own if entry.kind == "release"]
        debits = [entry.body["round"] for entry in own if entry.kind == "debit"]
        assert len(set(took)) == len(took) == len(debits), (number, took, debits)
        sent |= {entry.body["sha256"] for entry in own if entry.kind == "release"}
    assert len(set(counted)) == len(counted)
    assert set(counted) <= sent
    again = sum(1 for one in log if one["event"] == "started-again")
    return (
        f"{rounds} rounds, {row['spent']} of {row['reserved']} debits, {len(counted)} of {len(sent)} device releases "
        f"counted, app started again {again} x, {time.time() - before:.0f} s"
    )


def case(fleet, target):
    """One run in which the target is struck twice; what held, in words."""
    before = time.time()
    fleet.server("run", fleet.root / "run.toml")
    wait_for(lambda: fleet.run_row()["state"] == "running", 300, "the beginning")
    hit = target(fleet)
    wait_for(lambda: fleet.run_row()["round"] >= 1, 600, "a round")
    time.sleep(5.0)
    hit += target(fleet)
    wait_for(lambda: fleet.run_row()["state"] in ("finished", "failed"), 600, "the end")
    return f"{hit} struck: {check(fleet, before)}"


def storm(fleet):
    """One run in which every target is struck, one in each round, at moments that differ; what held, in words."""
    before = time.time()
    rounds = len(TARGETS) + 1
    text = (fleet.root / "run.toml").read_text().replace(f"rounds = {ROUNDS}", f"rounds = {rounds}\nspare_rounds = 6")
    (fleet.root / "storm.toml").write_text(text)
    fleet.server("run", fleet.root / "storm.toml")
    for number, target in enumerate(TARGETS):
        wait_for(lambda number=number: fleet.run_row()["round"] >= number, 900, f"round {number}")
        wait_for(lambda: fleet.run_row()["state"] == "running", 300, "the work")
        time.sleep(4.0 * (number % 3))
        hit = 0
        if target is late_starter:
            fleet.device(4, "up", "--detach")
            hit = 1
        else:
            hit = target(fleet)
        print(f"  round {number + 1}: {target.__name__}, {hit} struck, {time.time() - before:.0f} s", flush=True)
    wait_for(lambda: fleet.run_row()["state"] in ("finished", "failed"), 900, "the end")
    return check(fleet, before, rounds)


def main(names):
    root = Path(tempfile.mkdtemp(prefix="hs-"))
    # So that a federation of one policy outlives all runs; and so that a run goes on with two of five away.
    policy = under_test.POLICY.replace("epsilon = 20.0", "epsilon = 500.0")
    fleet, failed = (
        Fleet(root, policy=policy, run=under_test.RUN.replace("round_timeout = 900", "round_timeout = 240")),
        0,
    )
    fleet.environment["HOMESPUN_IDLE_SECONDS"] = "100000"  # models stay open from run to run, unless they are struck
    try:
        fleet.up()
        fleet.server("invite", "--uses", DEVICES, "--config", root / "plan.toml", "--out", root / "invite.json")
        for number in range(DEVICES):
            fleet.join(number)
        if names == ["storm"]:
            print(f"storm            {storm(fleet)}", flush=True)
            return 0
        for target in TARGETS:
            if names and target.__name__ not in names:
                continue
            if target is late_starter:
                for number in (3, 4):
                    with suppress(AssertionError):
                        fleet.device(number, "down")
            try:
                said = case(fleet, target)
            except AssertionError as error:
                failed += 1
                said = f"FAILED: {error}"
                with suppress(AssertionError):
                    fleet.server("stop")
            print(f"{target.__name__:<16} {said}", flush=True)
            if target in (device_for_good, late_starter):
                for number in (3, 4):
                    with suppress(AssertionError):
                        fleet.device(number, "up", "--detach")
    finally:
        fleet.end()
        if os.environ.get("HOMESPUN_KEEP") != "1":
            shutil.rmtree(root, ignore_errors=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
