"""What all runs on one data set cost together, if every one of them were published.

A simulated run is bounded by its own budget, and so are the next and the one after that: a budget per run is dodged by
a new name. So every run that promises anything is entered in the registry of its data set, a ledger under
`<state>/registry/<digest of the data>.jsonl`, and what is said of one run is said beside what all of them cost.

A run is entered as a reservation of its whole schedule before its first round, and settled when it ends: from then on
only what it debited counts. One that never ended counts whole. Rehearsals, extrapolations and runs without noise
promise nothing and are not entered; what publishing one of those tells is not bounded by anything here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.accounting import Repeated, epsilon_of, event_from_json
from common.claims import ADJACENCY_WORDS, rounded_up
from common.errors import DataError, Refusal, StoreError, VerificationError
from common.ledger import Entry, Ledger, debits, verify
from common.places import state_home
from common.privacy import Adjacency
from common.promise import promise_of
from common.wire import ReleaseSpec
from server.run_folder import LEDGER, SPEC, RunFolder, signing_key

__all__ = ["SpentOnData", "enter", "settle", "spent_on_data"]

SPENT_ON_DATA = "spent_on_data.json"
SECONDS_TO_WAIT = 10.0
"""How long another run may hold the registry, which it does for the time of one entry."""


@dataclass(frozen=True)
class SpentOnData:
    """What one run costs, and what all runs on its data cost.

    Attributes:
        run_epsilon: Of this run, released alone; infinite where it promises nothing.
        epsilon: Of all runs that the registry counts, by privacy loss distributions over their events.
        delta: Failure probability of both.
        unit: Whose presence is hidden; runs that hide another unit are another sum.
        adjacency: What neighbouring data sets differ in.
        runs: How many runs that is.
        is_counted: Whether this run is among them.
        head: Of the registry when it was read, hex.
    """

    run_epsilon: float
    epsilon: float
    delta: float
    unit: str
    adjacency: str
    runs: int
    is_counted: bool
    head: str

    def sentence(self) -> str:
        """Say both numbers, never one without its unit, adjacency and delta."""
        meaning = f"at delta {self.delta:.3g} per {self.unit}, {ADJACENCY_WORDS[Adjacency(self.adjacency)]}"
        runs = "the one run" if self.runs == 1 else f"all {self.runs:,} runs"
        total = f"{runs} on this data, epsilon {rounded_up(self.epsilon)} {meaning}"
        if not self.is_counted:
            return f"This run promises nothing and is not counted; {total}, if released."
        return (
            f"This run, if released alone, epsilon {rounded_up(self.run_epsilon)}; {total}. "
            "Rehearsals and runs without a promise are not counted."
        )

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object with its sentence; an infinite epsilon is the string `inf`."""
        plain = {name: "inf" if value == math.inf else value for name, value in asdict(self).items()}
        return {**plain, "sentence": self.sentence()}


def registry_file(data: str) -> Path:
    """The registry of the data set with the digest `data`."""
    return state_home() / "registry" / f"{data}.jsonl"


def enter(folder: RunFolder) -> bool:
    """Enter a run before its first round; once, however often it is resumed. Return whether it counts.

    Raises:
        VerificationError: The registry does not check out; nothing is run on top of it.
        StoreError: It belongs to another installation's key, or the disk failed.
    """
    if not _is_counted(folder):
        return False
    with _open(_data_of(folder)) as registry:
        if _reservation(registry.entries(), folder.spec.run) is None:
            registry.append("reserve", _reserve_body(folder))
    return True


def settle(folder: RunFolder) -> None:
    """Replace the reservation of a run that has ended by what it debited; once, however often it is finished.

    Guarantee: a run that was entered never counts for less than its own ledger says it debited.
    """
    if not _is_counted(folder):
        return
    released = [event_from_json(entry.body["event"]) for entry in folder.ledger.entries() if entry.kind == "debit"]
    run, spec = folder.spec.run, folder.spec.digest
    with _open(_data_of(folder)) as registry:
        entries = registry.entries()
        reservation = _reservation(entries, run)
        if reservation is None or any(entry.kind == "cancel" and entry.body.get("run") == run for entry in entries):
            return
        bound = {"reservation": reservation, "run": run, "spec": spec}
        items: list[tuple[str, dict[str, Any]]] = [
            ("debit", {"event": Repeated(event, released.count(event)).to_json(), **bound})
            for event in dict.fromkeys(released)
        ]
        registry.append_many([*items, ("cancel", {"reservation": reservation, "run": run, "reason": "finished"})])


def spent_on_data(path: Path) -> dict[str, Any] | None:
    """State what the run in `path` costs beside what all runs on its data cost by now, as `SpentOnData.to_json`.

    What was stated before stands beside the run in `spent_on_data.json`, and is returned where nothing was entered
    since, or where the registry is on another machine. None: no run on these data promised anything.

    Raises:
        VerificationError: The registry or the run's ledger does not check out.
        DataError: The run's statement of before is not one.
    """
    stored = _stored(path / SPENT_ON_DATA)
    data = str(verify((path / LEDGER).read_bytes()).header["data"])
    entries = _read(data)
    if not entries or (stored is not None and stored.get("head") == entries[-1].hash):
        return stored
    found = _sum_up(ReleaseSpec.from_text((path / SPEC).read_text(encoding="utf-8")), entries)
    return None if found is None else found.to_json()


def _sum_up(spec: ReleaseSpec, entries: Sequence[Entry]) -> SpentOnData | None:
    """Price all runs that hide the same unit as `spec`.

    Runs are priced as if they had been planned together; whoever chooses one after having published another rests on
    more than this sum.
    """
    unit = str(promise_of(spec).unit)
    runs = {
        str(entry.body["run"]): Adjacency(entry.body["adjacency"])
        for entry in entries
        if entry.kind == "reserve" and entry.body["unit"] == unit
    }
    if not runs:
        return None
    costs = [(one.run, Repeated(event_from_json(one.event), one.count)) for one in debits(entries) if one.run in runs]
    # A multiplier against replacement, the doubled sensitivity, bounds zeroing out as well: the sum of both kinds of
    # run holds under zero-out, and under replacement where every run was measured against that.
    adjacency = next(iter(runs.values())) if len(set(runs.values())) == 1 else Adjacency.ZERO_OUT
    own = [event for run, event in costs if run == spec.run]
    return SpentOnData(
        run_epsilon=epsilon_of(own, spec.delta, "pld", adjacency) if spec.run in runs else math.inf,
        epsilon=epsilon_of([event for _, event in costs], spec.delta, "pld", adjacency),
        delta=spec.delta,
        unit=unit,
        adjacency=str(adjacency),
        runs=len(runs),
        is_counted=spec.run in runs,
        head=entries[-1].hash,
    )


def _stored(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise DataError(f"{path}: not valid JSON") from None
    return value if isinstance(value, dict) else None


def _is_counted(folder: RunFolder) -> bool:
    config = folder.config
    promises = config.private and not config.rehearsal and config.as_if_population is None
    return promises and folder.spec.noise_multiplier > 0


def _data_of(folder: RunFolder) -> str:
    return str(folder.ledger.header["data"])


def _reserve_body(folder: RunFolder) -> dict[str, Any]:
    """Return what the run's own ledger reserved: the registry adds nothing to it and knows it by its run."""
    own = next(entry.body for entry in folder.ledger.entries() if entry.kind == "reserve")
    return {**own, "config": str(folder.ledger.header["config"])}


def _reservation(entries: Sequence[Entry], run: str) -> int | None:
    return next((entry.index for entry in entries if entry.kind == "reserve" and entry.body["run"] == run), None)


def _open(data: str) -> Ledger:
    """Open the registry for a moment, or begin it; another run may hold it for as long."""
    path = registry_file(data)
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            if not path.exists():
                try:
                    return Ledger.create(path, signing_key(), {"role": "registry", "data": data})
                except StoreError:
                    if not path.exists():
                        raise  # otherwise another run began it in the meantime
            with _named(path):
                return Ledger.open(path, signing_key())
        except Refusal:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _read(data: str) -> tuple[Entry, ...]:
    """Read a registry without its lock; a line that is being written is not there yet."""
    path = registry_file(data)
    if not path.is_file():
        return ()
    content = path.read_bytes()
    with _named(path):
        return verify(content[: content.rfind(b"\n") + 1]).entries


@contextmanager
def _named(path: Path) -> Generator[None]:
    """Name the registry in what its verification has to say."""
    try:
        yield
    except VerificationError as error:
        named = VerificationError(f"the registry {path} does not check out: {error}")
        named.entry = error.entry
        raise named from None
