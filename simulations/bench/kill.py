"""`kill -9` at random instants: of the server's loop in all three columns, and of a device's vault.

One process opens the built-in base once and forks a child for every instant, so that hundreds take minutes. A child
continues a run (or a vault) from its folder; after a delay drawn uniformly between nothing and `HORIZON` times what
an undisturbed child needs to start and finish one round, it is killed. The next child continues what it finds. Every
`PER_RUN` instants the run is let go on to its end, and a new one begins.

Beside the ledger a child keeps a log of every instant at which noise was drawn or bytes were handed over, and of how
many debits were on disk then. After every kill the parent checks:

1. the ledger verifies (a torn last line is what a crash leaves) and continues the entries that were there before, so
   spent budget never goes down;
2. no noise was drawn and nothing was handed over without a debit of its own that was on disk already;
3. no debit has two releases, and no release has two debits;
4. what a restart would broadcast is the payload of a release in the ledger;
5. a vault that is asked again gives the same bytes as before, for as long as it keeps them; what it does not keep any
   more it makes anew, under another debit.

Run `python -m simulations.bench.kill --instants 200`. The same checks over a real SuperLink, with the server's app and
a device's vault killed: `tests/flower/test_superlink.py`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from client.budget_keeper import BudgetKeeper
from client.device_home import DeviceHome
from client.gate import Gate
from client.policy import Policy
from client.vault import Vault
from client.vault_service import MOST_KEPT, FleetService, Outbox
from common.adapters import initial_vector
from common.config import RunConfig
from common.errors import Refusal
from common.ledger import Entry, verify
from common.wire import Assignment, Release, ReleaseSpec
from server import rounds, run_folder
from server.checkpoint import Checkpoint
from simulations import hosts, run
from simulations.planning import base_of

__all__ = ["Found", "check_ledger", "check_server", "main"]

PER_RUN = 20
HORIZON = 4.0
MOST_ROUNDS = 60
SUBJECT = "3"
MODES: dict[str, dict[str, Any]] = {"central": {}, "local": {"noise": "local"}, "silo": {"unit": "example"}}

_fork = multiprocessing.get_context("fork")


@dataclass
class Found:
    """What was counted over all instants.

    Attributes:
        instants: Kills of a child that was still running.
        late: Children that had ended before their instant.
        runs: Runs that were let go on, and ended.
        attempts: Times that noise was drawn or bytes were handed over.
        debits: Entries that charged for them.
        torn: Ledgers whose last line was cut by a kill.
        repeats: Answers of a vault that were asked for again and were the same bytes.
        violations: What did not hold, in words; empty is what is wanted.
    """

    instants: int = 0
    late: int = 0
    runs: int = 0
    attempts: int = 0
    debits: int = 0
    torn: int = 0
    repeats: int = 0
    violations: list[str] = field(default_factory=list[str])

    def expect(self, holds: bool, words: str) -> None:
        """Note `words` where something does not hold."""
        if not holds:
            self.violations.append(words)


def main(arguments: Sequence[str] | None = None) -> int:
    """Kill, restart and check; prints one JSON object and returns 0 when nothing was violated."""
    parser = argparse.ArgumentParser(prog="python -m simulations.bench.kill")
    parser.add_argument("--instants", type=int, default=200, help="kills in all: three in four of the server's loop")
    parser.add_argument("--seed", type=int, default=None, help="of the instants, never of the noise")
    asked = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(1)
    found, generator = Found(), np.random.default_rng(asked.seed)
    with tempfile.TemporaryDirectory() as name:
        os.environ["HOMESPUN_HOME"] = str(Path(name) / "home")
        devices = max(1, asked.instants // 4)
        servers = asked.instants - devices
        number = 0
        while found.instants < servers:
            mode = list(MODES)[number % len(MODES)]
            share = min(PER_RUN, servers - found.instants, -(-servers // len(MODES)))
            _drill_server(Path(name) / f"run-{number}", MODES[mode], share, generator, found)
            number += 1
        _drill_vault(Path(name) / "device", devices, generator, found)
    print(json.dumps(found.__dict__))  # noqa: T201
    return 1 if found.violations else 0


def _config(kills: int, **mode: Any) -> RunConfig:
    return RunConfig(
        users=12,
        cohort=6,
        rounds=min(MOST_ROUNDS, 6 * kills + 4),
        spare_rounds=2 * kills + 4,
        local_steps=1,
        local_batch=2,
        personal_steps=1,
        evaluation_users=2,
        evaluate_every=10**6,
        max_tokens=24,
        rank=1,
        workers=0,
        method="fedavg",
        chunk=3,
        **mode,
    )


def _drill_server(path: Path, mode: dict[str, Any], kills: int, generator: np.random.Generator, found: Found) -> None:
    config = _config(kills, **mode)
    host = hosts.host_of(config)
    opened = run_folder.create(
        path,
        config,
        population=len(host.population),
        model=base_of(config),
        digest=host.base.digest,
        data=host.population.digest,
    )
    opened.ledger.close()
    hosts.open_host(opened.config.to_toml())  # children inherit it
    log = path.with_suffix(".log")
    began = time.monotonic()
    child = _fork.Process(target=_serve, args=(path, log, -1))
    child.start()
    while Checkpoint.load(path / run_folder.CHECKPOINT).round < 1 and child.is_alive():
        time.sleep(0.005)
    usual = time.monotonic() - began
    child.kill()
    child.join()
    before = check_server(path, log, (), found)
    done, serial = 0, 0
    while done < kills and Checkpoint.load(path / run_folder.CHECKPOINT).round < config.rounds:
        child = _fork.Process(target=_serve, args=(path, log, serial))
        child.start()
        child.join(float(generator.uniform(0.0, HORIZON * usual)))
        if child.is_alive():
            done += 1
            found.instants += 1
        else:
            found.late += 1
        child.kill()
        child.join()
        serial += 1
        before = check_server(path, log, before, found)
    child = _fork.Process(target=_serve, args=(path, log, serial))
    child.start()
    child.join()
    entries = check_server(path, log, before, found)
    finished = child.exitcode == 0 and (path / "statement.json").exists()
    found.expect(finished, f"{path.name}: the run did not go on to its end")
    found.runs += finished
    found.debits += sum(entry.kind == "debit" for entry in entries)
    found.attempts += len(_attempts(log))


def _serve(path: Path, log: Path, serial: int) -> None:
    """Continue a run, in a child; every draw of noise is logged with the debits that were on disk."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    real_noise, real_release = rounds.add_central_noise, Gate.release

    def note(number: int) -> None:
        on_disk = (path / run_folder.LEDGER).read_bytes().count(b'"kind":"debit"')
        os.write(descriptor, f"{serial} {number} {on_disk}\n".encode())

    def noised(total: Any, spec: ReleaseSpec, randomness: Any) -> Any:
        if spec.noise == "central" and spec.unit == "user":
            note(Checkpoint.load(path / run_folder.CHECKPOINT).round + 1)
        return real_noise(total, spec, randomness)

    def released(
        self: Gate, updates: Any, spec: ReleaseSpec, number: int, randomness: Any = None, *, shares: Any = None
    ) -> Release:
        if spec.noise == "local" or spec.unit == "example":
            note(number)
        return real_release(self, updates, spec, number, randomness, shares=shares)

    rounds.add_central_noise = noised
    Gate.release = released
    run._try_out = lambda *_: None  # pyright: ignore[reportPrivateUsage] - what it draws is on zeros, and never leaves
    run.resume(path, run.Progress())


def _attempts(log: Path) -> dict[tuple[int, int], int]:
    """What was drawn, by child and round, and the debits that were on disk at the first of it; in order."""
    seen: dict[tuple[int, int], int] = {}
    for line in log.read_text().splitlines() if log.exists() else ():
        serial, number, on_disk = map(int, line.split())
        seen.setdefault((serial, number), on_disk)
    return seen


def check_ledger(path: Path, before: Sequence[Entry], found: Found) -> tuple[Entry, ...]:
    """Check points 1 and 3, and return the entries."""
    data = path.read_bytes()
    sound = data[: data.rfind(b"\n") + 1]
    found.torn += len(sound) != len(data)
    entries = verify(sound).entries
    found.expect(
        [entry.hash for entry in entries[: len(before)]] == [entry.hash for entry in before],
        f"{path.parent.name}: entries that were there are gone, and spent budget with them",
    )
    releases = [entry for entry in entries if entry.kind == "release"]
    charged = {entry.index for entry in entries if entry.kind == "debit"}
    used = [int(entry.body["debit"]) for entry in releases]
    found.expect(len(set(used)) == len(used), f"{path.parent.name}: one debit was used for two releases")
    found.expect(
        all(debit in charged and debit < entry.index for debit, entry in zip(used, releases, strict=True)),
        f"{path.parent.name}: a release without an earlier debit",
    )
    return entries


def check_server(path: Path, log: Path, before: Sequence[Entry], found: Found) -> tuple[Entry, ...]:
    """Check points 1 to 4 of the run in `path`, and return its entries; point 2 as far as `log` has attempts."""
    entries = check_ledger(path / run_folder.LEDGER, before, found)
    for place, (attempt, on_disk) in enumerate(_attempts(log).items(), start=1):
        found.expect(on_disk >= place, f"{path.name}: noise of {attempt} was drawn under {on_disk} debits, not {place}")
    checkpoint = Checkpoint.load(path / run_folder.CHECKPOINT)
    if checkpoint.round:
        under = [entry for entry in entries if entry.hash == checkpoint.head and entry.kind == "release"]
        digest = hashlib.sha256(checkpoint.vector.tobytes()).hexdigest()
        found.expect(
            len(under) == 1 and under[0].body["sha256"] == digest,
            f"{path.name}: the next round would broadcast what is no release in the ledger",
        )
    return entries


# --- the vault of a device ---------------------------------------------------------------------------------------


def _drill_vault(folder: Path, kills: int, generator: np.random.Generator, found: Found) -> None:
    config = _config(1, noise="local")
    host = hosts.open_host(config.to_toml())
    spec, layout = run_folder.prepare_spec(
        config.model_copy(update={"rounds": 6 * kills + 20, "spare_rounds": 2 * kills}),
        population=len(host.population),
        model=base_of(config),
        digest=host.base.digest,
        run="ab" * 16,
    )
    home = DeviceHome.open(folder, create=True)
    home.grant(Policy.model_validate({"smallest_cohort": 2, "smallest_noise_multiplier": 0.1}))
    start = initial_vector(layout, np.random.default_rng(0))
    log, received, before, number, serial, usual = folder / "log", dict[int, Release](), (), 1, 0, 0.0
    answered: Callable[[int], Assignment] = lambda round_: Assignment(spec, round_, (SUBJECT,), start)  # noqa: E731
    done = 0
    while done < kills or number <= 2:
        here, there = _fork.Pipe()
        child = _fork.Process(target=_keep, args=(home, host, there, log))
        child.start()
        there.close()
        serial += 1
        began = time.monotonic()
        deadline = began + (60.0 if usual == 0.0 else float(generator.uniform(0.0, HORIZON * usual)))
        again = int(generator.integers(1, number + 1))
        for asked in (again, *range(number, number + 50)) if again != number else range(number, number + 50):
            release = _ask(here, answered(asked), deadline)
            if release is None:
                break
            _check_answer(folder, asked, release, received, found)
            number = max(number, asked + 1)
            usual = usual or time.monotonic() - began
            if time.monotonic() >= deadline or (done == 0 and asked >= 2 and serial == 1):
                break
        if child.is_alive():
            done += serial > 1
            found.instants += serial > 1
        else:
            found.late += 1
        child.kill()
        child.join()
        here.close()
        before = check_ledger(folder / "ledger.jsonl", before, found)
        _check_handed_over(folder, log, before, found)
    found.debits += sum(entry.kind == "debit" for entry in before)
    found.attempts += len(received)
    found.runs += 1


def _keep(home: DeviceHome, host: hosts.Host, pipe: Connection, log: Path) -> None:
    """Be the vault: open the ledger, answer requests through the fleet's own service until killed."""
    from client import vault_pb2 as messages
    from common.wire import WIRE_FORMAT, raw_bytes

    keeper = BudgetKeeper(home, home.open_ledger())
    vault = Vault(
        host.trainer,
        host.population.encoded,
        seed=0,
        residents=[SUBJECT],
        gate=Gate(keeper.record, keep=keeper.keep),
        grants=keeper.check,
    )
    service = FleetService(vault, Outbox(home.folder / "outbox", bytes(32)), model=host.base.digest)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        asked: Assignment = pipe.recv()
        request = messages.TrainRequest(
            format=WIRE_FORMAT,
            spec=asked.spec.to_text(),
            round=asked.round,
            subjects=asked.users,
            vector=raw_bytes(asked.vector),
        )
        reply = service.Train(request, None)
        answer = service.Collect(messages.CollectRequest(ticket=reply.ticket, wait_seconds=20.0), None)
        refusal = reply.refusal or answer.refusal
        if not refusal:
            os.write(descriptor, f"{answer.release.receipt}\n".encode())
        pipe.send((refusal, answer.release.total, answer.release.dtype, answer.release.users, answer.release.receipt))


def _ask(pipe: Connection, assignment: Assignment, deadline: float) -> Release | None:
    """Ask a vault that may be killed at any instant; None when there is no answer before the deadline."""
    from common.wire import from_raw_bytes

    try:
        pipe.send(assignment)
        if not pipe.poll(max(0.0, deadline - time.monotonic())):
            return None
        refusal, total, dtype, users, receipt = pipe.recv()
    except (EOFError, OSError):
        return None
    if refusal:
        raise Refusal(refusal, "the vault of the drill refused")
    return Release(from_raw_bytes(total, dtype), users, receipt)


def _check_answer(folder: Path, number: int, release: Release, received: dict[int, Release], found: Found) -> None:
    """Point 5: who asks again gets the same bytes, unless so many were released since that these are not kept."""
    known = received.get(number)
    received[number] = release
    if known is None:
        return
    same = known.receipt == release.receipt and bool((known.total == release.total).all())
    found.repeats += same
    data = (folder / "ledger.jsonl").read_bytes()
    receipts = [e.body["sha256"] for e in verify(data[: data.rfind(b"\n") + 1]).entries if e.kind == "release"]
    found.expect(
        same or len(receipts) - receipts.index(known.receipt) > MOST_KEPT,
        f"{folder.name}: round {number} was released twice, with other noise, although the first was kept",
    )


def _check_handed_over(folder: Path, log: Path, entries: Sequence[Entry], found: Found) -> None:
    """Point 2: whatever was handed over is a release in the ledger, which has its debit."""
    recorded = {entry.body["sha256"] for entry in entries if entry.kind == "release"}
    handed = set(log.read_text().split()) if log.exists() else set[str]()
    found.expect(handed <= recorded, f"{folder.name}: bytes were handed over that are not in the ledger")


if __name__ == "__main__":
    raise SystemExit(main())
