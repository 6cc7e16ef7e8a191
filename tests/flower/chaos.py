"""The whole matrix of what may die: `python tests/flower/chaos.py [TARGET ...]`. An hour; prints one line per case.

For each case a federation of five devices trains three rounds while something is killed with SIGKILL (or cut off, or
stopped for good) at its beginning or in its middle. After each: the run ended, every round was released once, no
device debited a round twice, and no more was spent than was reserved.
"""

from __future__ import annotations

import importlib.util
import os
import signal
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


def network(fleet):
    """Everybody is cut off from the coordinator for half a minute, which stands still meanwhile."""
    running = fleet.processes("homespun.py", "server", "up", str(fleet.metrics))
    for pid in running:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(30.0)
    for pid in running:
        os.kill(pid, signal.SIGCONT)
    return len(running)


def device_for_good(fleet):
    fleet.device(4, "down")
    return 1


TARGETS = (supernode, vault, trainer, shim, coordinator, superlink, superexec, server_app, network, device_for_good)


def check(fleet, before):
    """What must hold after each case, whatever was killed; returns it in words."""
    from common.ledger import verify

    folder = fleet.run_folder()
    entries = verify((folder / "ledger.jsonl").read_bytes()).entries
    released = [entry.body["round"] for entry in entries if entry.kind == "release"]
    assert released == list(range(1, ROUNDS + 1)), released
    row = fleet.run_row()
    assert row["spent"] <= row["reserved"], row
    answers = 0
    for number in range(DEVICES):
        own = [entry for entry in fleet.ledger(number) if entry.body.get("run") == row["run"]]
        rounds = [entry.body["round"] for entry in own if entry.kind == "release"]
        debits = [entry.body["round"] for entry in own if entry.kind == "debit"]
        assert len(set(rounds)) == len(rounds) == len(debits), (number, rounds, debits)
        answers += len(rounds)
    spent = f"{row['spent']} of {row['reserved']} debits"
    return f"{ROUNDS} rounds, {spent}, {answers} device releases, {time.time() - before:.0f} s"


def main(names):
    root = Path(tempfile.mkdtemp(prefix="hs-"))
    fleet, failed = Fleet(root), 0
    try:
        fleet.up()
        invite = ("--uses", DEVICES, "--config", root / "plan.toml", "--out", root / "invite.json")
        fleet.server("invite", *invite)
        policy = (root / "policy.toml").read_text().replace("epsilon = 20.0", "epsilon = 500.0")
        (root / "policy.toml").write_text(policy)
        for number in range(DEVICES):
            fleet.join(number)
        for target in TARGETS:
            if names and target.__name__ not in names:
                continue
            for moment in ("beginning", "middle"):
                before = time.time()
                fleet.server("run", root / "run.toml")
                wait_for(lambda: fleet.run_row()["state"] == "running", 300, "the beginning")
                if moment == "middle":
                    wait_for(lambda: fleet.run_row()["round"] >= 1, 300, "a round")
                    time.sleep(5.0)
                hit = target(fleet)
                try:
                    wait_for(lambda: fleet.run_row()["state"] in ("finished", "failed"), 600, "the end")
                    said = check(fleet, before)
                except AssertionError as error:
                    failed += 1
                    said = f"FAILED: {error}"
                print(f"{target.__name__:<16} {moment:<10} {hit} killed: {said}", flush=True)
                if target is device_for_good:
                    with suppress(AssertionError):
                        fleet.device(4, "up", "--detach")  # and a late one comes
    finally:
        fleet.end()
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
