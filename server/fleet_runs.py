"""Runs over devices: prepared from the same configuration as simulated ones, started, watched, and started again.

What stands where in a run's folder, beside what `server.run_folder` makes, and who alone writes it:

===================  ========================================================  =======================================
`enrolled.json`      the subjects that the run was calibrated for               `prepare`
`devices.json`       with distributed noise: their enrolment keys               `prepare`
`roster.json`        the same, as devices check it                              `prepare`
`homes.json`         which of Flower's nodes a subject's device is now          the coordinator, whenever that changes
`wanted.json`        whether the run should go on                               the operator's commands
`standing.json`      Flower's number of the run, and how often it was started   the coordinator
`proofs.json`        what devices hold that this ledger lacks                   the coordinator
`outcome.json`       how the run ended, or why it does not begin                the server's app
`heads.jsonl`        how far the devices' ledgers got, signed by them          the coordinator
`events.jsonl`       what happened: begun, rounds, called off, how it ended      the app, and the coordinator
`restored.json`      how much of the ledger was there when a backup came back   `homespun server restore`
===================  ========================================================  =======================================
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.config import RunConfig, load_config, read_config_file
from common.errors import ConfigError, DataError, Refusal, StoreError, VerificationError
from common.files import take_lock, write_private_file
from common.keys import SigningKey, VerifyKey
from common.ledger import Head, Ledger, verify
from common.model_files import base_folder, model_digest
from common.spent_proof import check_proof, sign_proof
from common.vouched_roster import VouchedRoster
from common.wire import ReleaseSpec
from server import run_folder
from server.checkpoint import Checkpoint

__all__ = ["Overview", "Standing", "for_devices", "heed_proofs", "overview", "prepare", "spent_proof"]

ENROLLED, HOMES, WANTED, STANDING = "enrolled.json", "homes.json", "wanted.json", "standing.json"
PROOFS, OUTCOME, RESTORED, RUNNING = "proofs.json", "outcome.json", "restored.json", "serverapp"
ROSTER, DEVICES, EVENTS = "roster.json", "devices.json", "events.jsonl"
WAITING = "waiting"
"""The event of a round that waits until half of the enrolled devices are connected."""


@dataclass(frozen=True)
class Standing:
    """What the coordinator knows of a run.

    Attributes:
        flower: Flower's number of it; None before it was started.
        starts: How often it was started without getting further.
        round: Rounds that were done when it was started last.
    """

    flower: int | None = None
    starts: int = 0
    round: int = 0

    @classmethod
    def load(cls, path: Path) -> Standing:
        """Read it from a run's folder."""
        return cls(**(_read(path / STANDING) or {}))

    def save(self, path: Path) -> None:
        """Write it into a run's folder."""
        _write(path / STANDING, asdict(self))


@dataclass(frozen=True)
class Overview:
    """What every device and the operator may know of a run.

    Attributes:
        name: Of its folder.
        state: waiting, running, stopped, failed or finished.
        reason: Why it failed or waits, or how many devices a round that runs was waiting for.
        round: Rounds that are done.
        rounds: Rounds that it has.
        spent: Releases that were debited.
    """

    name: str
    run: str
    state: str
    reason: str
    round: int
    rounds: int
    spent: int
    spec: ReleaseSpec


def for_devices(config: RunConfig) -> RunConfig:
    """The configuration as a run over devices takes it: numbers travel in as few bytes as lose nothing.

    Raises:
        ConfigError: It claims nothing, so no device takes part; an invite must not announce it either.
    """
    if config.rehearsal:
        raise ConfigError("rehearsal: a rehearsal claims nothing, so no device takes part in one")
    if config.as_if_population is not None:
        raise ConfigError("as_if_population: noise that is scaled down claims nothing, so no device takes part")
    return config if config.update_dtype is not None else config.model_copy(update={"update_dtype": "auto"})


def prepare(
    path: Path, config: RunConfig, subjects: Sequence[str], roster: VouchedRoster | None = None
) -> run_folder.RunFolder:
    """Make the folder of a run over the devices of `subjects`; with distributed noise, `roster` is theirs.

    Raises:
        ConfigError: Nobody is enrolled, or fewer than the configuration says.
    """
    if not subjects:
        raise ConfigError("no device is approved; `homespun server invite` lets some in")
    if config.users is not None and config.users != len(subjects):
        raise ConfigError(
            f"users: {config.users} in the configuration, {len(subjects)} devices are approved; a run is over all of "
            "them, so leave users out, or revoke those that are not to take part"
        )
    config = for_devices(config)
    if config.noise == "distributed" and (roster is None or len(roster.devices) != len(subjects)):
        raise ConfigError("noise: distributed noise needs every device's enrolment key, vouched for by its invite")
    model = base_folder(config.model)
    opened = run_folder.create(
        path,
        config.model_copy(update={"users": len(subjects)}),
        population=len(subjects),
        model=model,
        digest=model_digest(model),
        data=None,
        roster=roster.digest if roster is not None else "",
    )
    if roster is not None:
        write_private_file(path / ROSTER, roster.to_bytes())
        write_private_file(path / DEVICES, json.dumps(sorted(roster.keys)).encode() + b"\n")
    write_private_file(path / ENROLLED, json.dumps(sorted(subjects)).encode() + b"\n")
    _write(path / WANTED, {"wanted": "run"})
    return opened


def wanted(path: Path, *, unsaid: str = "stop") -> str:
    """Whether a run should go on: run or stop; `unsaid` where no operator has said either."""
    return str((_read(path / WANTED) or {}).get("wanted", unsaid))


def want(path: Path, what: str) -> None:
    """Say that a run should go on, or not."""
    if not (path / run_folder.CONFIG).is_file():
        raise DataError(f"{path}: no run in this folder")
    _write(path / WANTED, {"wanted": what})


def note_restored(path: Path, index: int) -> None:
    """Say that this run came back from a copy whose ledger ended at `index`; it waits for an operator's word."""
    _write(path / RESTORED, {"index": index})
    _write(path / WANTED, {"wanted": "stop"})


def note_outcome(path: Path, outcome: str, reason: str = "") -> None:
    """Say how the work on a run ended."""
    _write(path / OUTCOME, {"outcome": outcome, "reason": reason})


def note_event(path: Path, **facts: object) -> None:
    """Add a line to the run's own log; nothing in it shows who took part in what."""
    if not (path / run_folder.CONFIG).is_file():
        return
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts})
    descriptor = os.open(path / EVENTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def clear_outcome(path: Path) -> None:
    """Forget how the work ended last, so that it is begun again."""
    (path / OUTCOME).unlink(missing_ok=True)
    (path / STANDING).unlink(missing_ok=True)


def is_held(path: Path) -> bool:
    """Whether the server's app works on this run now."""
    try:
        os.close(take_lock(path / RUNNING, "run-locked"))
    except Refusal:
        return True
    return False


def overview(path: Path) -> Overview:
    """Read how a run stands, beside the app that works on it.

    Raises:
        DataError: A part of it is missing or damaged.
    """
    try:
        spec = ReleaseSpec.from_text((path / run_folder.SPEC).read_text(encoding="utf-8").strip())
        entries = read_entries(path)
    except (OSError, Refusal, VerificationError):
        raise DataError(f"{path}: not a whole run") from None
    checkpoint = Checkpoint.load(path / run_folder.CHECKPOINT)
    outcome = _read(path / OUTCOME) or {}
    rounds = load_config(read_config_file(path / run_folder.CONFIG)).rounds
    state, reason = "waiting", str(outcome.get("reason", ""))
    if checkpoint.round >= rounds:
        state, reason = "finished", ""
    elif outcome.get("outcome") == "refused":
        state = "failed"
    elif wanted(path) == "stop":
        state = "stopped"
    elif is_held(path):
        state, reason = "running", _last_wait(path)
    return Overview(
        name=path.name,
        run=spec.run,
        state=state,
        reason=reason,
        round=checkpoint.round,
        rounds=rounds,
        spent=sum(1 for kind in entries if kind == "debit"),
        spec=spec,
    )


def _last_wait(path: Path) -> str:
    """What the newest line of a run's log says of waiting; empty where it says something else."""
    try:
        line = (path / EVENTS).read_bytes().splitlines()[-1]
        said = json.loads(line)
        if said["event"] != WAITING:
            return ""
        here = f"{said['connected']} of {said['enrolled']} devices were connected"
        return f"at {said['time']} {here}; a round waits for half"
    except (OSError, ValueError, KeyError, IndexError):
        return ""


def read_entries(path: Path) -> list[str]:
    """Kinds of the ledger's entries, beside an app that may be writing one."""
    content = (path / run_folder.LEDGER).read_bytes()
    return [entry.kind for entry in verify(content[: content.rfind(b"\n") + 1]).entries]


def spent_proof(path: Path, key: SigningKey) -> dict[str, Any]:
    """A signed statement of how many releases a run's ledger has debited; devices keep it, and hand it back."""
    content = (path / run_folder.LEDGER).read_bytes()
    entries = verify(content[: content.rfind(b"\n") + 1]).entries
    head = entries[-1].head
    count = sum(1 for entry in entries if entry.kind == "debit")
    return sign_proof(head, count, key)


def keep_proof(path: Path, value: Any, writer: VerifyKey) -> bool:
    """Keep a device's statement if the run's ledger does not hold what it shows; return whether it does not."""
    try:
        head, _ = check_proof(value, writer)
        content = (path / run_folder.LEDGER).read_bytes()
        found = verify(content[: content.rfind(b"\n") + 1])
    except (VerificationError, OSError):
        return False
    entries = found.entries
    if head.ledger != entries[0].head.ledger:
        return False
    if head.index < len(entries) and entries[head.index].hash == head.hash:
        return False
    kept = list((_read(path / PROOFS) or {}).get("proofs", ()))
    if value not in kept:
        _write(path / PROOFS, {"proofs": [*kept[-63:], value]})
    return True


def heed_proofs(path: Path, ledger: Ledger) -> int:
    """Take as spent whatever devices can prove, and return how many releases that were.

    A ledger that was restored from an old backup lacks what was debited since. Devices hold signed statements of it.
    What they prove beyond the point that was restored is debited again, by entries without a round, after a receipt
    that names the head.
    """
    entries = ledger.entries()
    restored = _read(path / RESTORED)
    base = sum(
        1 for entry in entries if entry.kind == "debit" and entry.index <= int((restored or {"index": 0})["index"])
    )
    heeded = sum(1 for entry in entries if entry.kind == "debit" and "round" not in entry.body)
    best: tuple[int, Head] | None = None
    for value in (_read(path / PROOFS) or {}).get("proofs", ()):
        with suppress(VerificationError):
            head, count = check_proof(value, VerifyKey.from_hex(ledger.head.writer))
            same = head.index < len(entries) and entries[head.index].hash == head.hash
            if head.ledger == ledger.head.ledger and not same and (best is None or count > best[0]):
                best = count, head
    if best is None or best[0] - base <= heeded:
        return 0
    lost, head = best[0] - base - heeded, best[1]
    reserve = next(entry for entry in entries if entry.kind == "reserve")
    event = next((entry.body["event"] for entry in entries if entry.kind == "debit"), _one_of(reserve.body["event"]))
    bound = {name: reserve.body[name] for name in ("run", "spec")}
    items: list[tuple[str, Mapping[str, Any]]] = [("receipt", {"head": head.to_json(), "run": bound["run"]})]
    items += [("debit", {"event": event, "reservation": reserve.index, **bound})] * lost
    ledger.append_many(items)
    return lost


def _one_of(schedule: dict[str, Any]) -> dict[str, Any]:
    """The event of one round, of a schedule that repeats it."""
    from common.accounting import Repeated, event_from_json

    event = event_from_json(schedule)
    return event.event.to_json() if isinstance(event, Repeated) else schedule


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise StoreError(f"{path}: damaged") from None
    if not isinstance(values, dict) or values.pop("format", 1) != 1:
        raise StoreError(f"{path}: not of a format that this version reads")
    return values


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_private_file(path, json.dumps({"format": 1, **values}, sort_keys=True).encode() + b"\n", replace=True)
