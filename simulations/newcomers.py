"""Cold start: what people who just came have with 0, 1, 5 or 20 records, system by system.

A newcomer is somebody who took no part in the run. Of each, the same last records are asked at every point, and the
records just before them are the history; what follows is what a device does with so many records: the shared adapter
at once, profile and retrieval from the first record on, a private adapter trained on what there is, and the choice by
whatever validation records that history leaves. People with few records in all cannot be asked about many, so the
curve is of people who write more than most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from client.user_data import HELD_OUT, Record, Split, User, split
from client.vault import EncodedUser
from common import evaluation
from common.config import load_config, read_config_file
from common.errors import ConfigError, DataError
from common.evaluation import NATS, SYSTEMS, Interval
from server import run_folder
from server.checkpoint import Checkpoint
from simulations import hosts
from simulations.population import Population, outsiders

__all__ = ["FILE", "NewcomerCurve", "Point", "curve_of", "write_curve"]

FILE = "newcomers.json"
ASKED = 8
"""Records of each newcomer that are asked, the last ones."""
CHUNK = 16


@dataclass(frozen=True)
class Point:
    """One system for newcomers with some number of records; gains are over the model that a newcomer gets first.

    Attributes:
        system: Which.
        records: How many records they had.
        nats: Mean nats per response token.
        gain: Mean gain over the shared adapter, or over the base where nothing is shared.
        harmed: Share of newcomers whose loss is above the tolerance.
    """

    system: str
    records: int
    nats: float
    gain: Interval
    harmed: Interval


@dataclass(frozen=True)
class NewcomerCurve:
    """What newcomers have.

    Attributes:
        records: The numbers of records.
        users: Newcomers, the same at every number.
        enrolled: Whether they took part in the run after all, because the data have nobody else.
        reference: What they get before anything of their own.
        points: One for each system and number.
        adapter_from: Smallest number from which on training an adapter surely pays beside what needs no training; None
            where it does not at any of them.
    """

    records: tuple[int, ...]
    users: int
    enrolled: bool
    reference: str
    points: tuple[Point, ...]
    adapter_from: int | None

    @property
    def systems(self) -> list[str]:
        """Systems in the order in which they are told."""
        known = [name for name in SYSTEMS if any(point.system == name for point in self.points)]
        return [name for name in known if name != self.reference]

    def at(self, system: str, records: int) -> Point | None:
        """The point of a system at a number of records."""
        found = (point for point in self.points if (point.system, point.records) == (system, records))
        return next(found, None)

    def sentence(self) -> str:
        """Say who was asked, and from when on an adapter pays."""
        who = f"{self.users} people who took no part"
        if self.enrolled:
            who = f"{self.users} people of the run itself, because the data have nobody else"
        pays = (
            f"training a private adapter surely pays from {self.adapter_from} records on"
            if self.adapter_from is not None
            else f"training a private adapter does not surely pay at up to {max(self.records)} records"
        )
        return f"{who}, with at least {max(self.records) + ASKED} records each; {pays}"

    def table(self) -> Table:
        """Lay the curve out for a terminal."""
        table = Table(title=f"Newcomers: {self.sentence()}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("system", no_wrap=True)
        for count in self.records:
            table.add_column(f"{count} records\ngain (harmed)", justify="right")
        for system in self.systems:
            points = [self.at(system, count) for count in self.records]
            table.add_row(
                system,
                *("" if one is None else f"{one.gain.estimate:+.3f} ({one.harmed.estimate:.0%})" for one in points),
            )
        return table

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` reads them."""
        return {
            "version": 1,
            "records": list(self.records),
            "users": self.users,
            "enrolled": self.enrolled,
            "reference": self.reference,
            "adapter_from": self.adapter_from,
            "sentence": self.sentence(),
            "unit": NATS.unit,
            "points": [
                {
                    "system": point.system,
                    "records": point.records,
                    "nats": point.nats,
                    "gain": point.gain.to_json(),
                    "harmed": point.harmed.to_json(),
                }
                for point in self.points
            ],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> NewcomerCurve:
        """Read what `to_json` wrote."""
        points = tuple(
            Point(
                entry["system"],
                entry["records"],
                entry["nats"],
                Interval.from_json(entry["gain"]),
                Interval.from_json(entry["harmed"]),
            )
            for entry in value["points"]
        )
        return cls(
            tuple(value["records"]),
            value["users"],
            value["enrolled"],
            value["reference"],
            points,
            value["adapter_from"],
        )


def curve_of(
    run: Path,
    records: Sequence[int],
    users: int,
    say: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> NewcomerCurve:
    """Let newcomers with each number of records join a finished run.

    Args:
        run: Its folder.
        records: Numbers of records, from 0 on.
        users: How many newcomers at most.
        say: Told a line per number.

    Raises:
        ConfigError: The numbers are not increasing from at least 0.
        DataError: Nobody has enough records.
    """
    if not records or list(records) != sorted(set(records)) or records[0] < 0:
        raise ConfigError("records: increasing numbers from 0 on are expected")
    config = load_config(read_config_file(run / run_folder.CONFIG)).model_copy(update={"answered": 0})
    host = hosts.host_of(config)
    vector = Checkpoint.load(run / run_folder.CHECKPOINT).vector if host.split.method.shared else None
    people, enrolled = _people(host, records[-1] + ASKED, users)
    scores: dict[int, dict[str, np.ndarray[tuple[int], np.dtype[np.float64]]]] = {}
    for count in records:
        say(f"{len(people)} newcomers with {count} records")
        population = _Newcomers([_with_history(own, count) for own in people], host.population.encoder, count)
        scores[count] = _scores(hosts.host_of(config, population), vector)
    reference = "base" if vector is None else "global"
    points: list[Point] = []
    for count in records:
        for system, nats in scores[count].items():
            found = evaluation.compare(nats, scores[count][reference], NATS, np.random.default_rng(0))
            points.append(Point(system, count, float(nats.mean()), found.gain, found.harmed))
    return NewcomerCurve(
        tuple(records), len(people), enrolled, reference, tuple(points), _adapter_from(records, scores, reference)
    )


class _Newcomers(Population):
    """People with a history of so many records; what is asked is marked as held out."""

    def __init__(self, users: Sequence[User], encoder: Any, count: int) -> None:
        super().__init__(users, encoder, f"newcomers with {count} records")

    def split(self, name: str) -> Split:
        user = self.user(name)
        history = tuple(record for record in user.records if record.kind != HELD_OUT)
        if len(history) >= 2:
            return split(user)
        return Split(train=history, test=tuple(record for record in user.records if record.kind == HELD_OUT))

    def encoded(self, name: str) -> EncodedUser:
        parts = self.split(name)
        encoder = self.encoder
        train, validation, test = (
            [one for one in encoder.encode_batch(part) if one is not None]
            for part in (parts.train, parts.validation, parts.test)
        )
        return EncodedUser(train, validation, test)


def _people(host: hosts.Host, needed: int, users: int) -> tuple[list[list[Record]], bool]:
    """Records of up to `users` newcomers, in the order of time; and whether they were in the run.

    Of people of the run, what is asked comes from the parts that the run did not train on.
    """

    def strangers() -> Iterator[list[Record]]:
        for user in islice(outsiders(host.config), 40 * users):
            own = _usable(host, user.records)
            if len(own) >= needed:
                yield sorted(own, key=lambda record: record.time or 0.0) if _timed(own) else own

    def enrolled() -> Iterator[list[Record]]:
        for number in range(len(host.population)):
            parts = host.population.split(str(number))
            held_out = _usable(host, (*parts.validation, *parts.test))
            own = [*_usable(host, parts.train), *held_out]
            if len(own) >= needed and len(held_out) >= ASKED:
                yield own

    people = list(islice(strangers(), users))
    if people:
        return people, False
    people = list(islice(enrolled(), users))
    if not people:
        raise DataError(
            f"{host.config.data}: nobody has the {needed} records that --records and what is asked need, "
            f"{ASKED} of them outside of what the run trained on"
        )
    return people, True


def _usable(host: hosts.Host, records: Sequence[Record]) -> list[Record]:
    """The records that the model can learn something from."""
    told = [record for record in records if not record.empty]
    examples = host.population.encoder.encode_batch(told)
    return [record for record, example in zip(told, examples, strict=True) if example is not None]


def _timed(records: Sequence[Record]) -> bool:
    return all(record.time is not None for record in records)


def _with_history(records: Sequence[Record], count: int) -> User:
    asked = [replace(record, kind=HELD_OUT) for record in records[len(records) - ASKED :]]
    history = records[len(records) - ASKED - count : len(records) - ASKED]
    # what the data set itself would hold out is history here
    return User("newcomer", (*(replace(one, kind=None) if one.kind == HELD_OUT else one for one in history), *asked))


def _scores(host: hosts.Host, vector: Any) -> dict[str, Any]:
    """Nats per token of each newcomer's asked records under each system."""
    names = [str(number) for number in range(len(host.population))]
    found: dict[str, list[float]] = {}
    for start in range(0, len(names), CHUNK):
        scored, _ = hosts.personalized(host, names[start : start + CHUNK], vector)
        for system, own in scored.rows.items():
            tested = {row["user"]: row["nats_per_token"] for row in own if row["split"] == "test"}
            found.setdefault(system, []).extend(tested[name] for name in names[start : start + CHUNK])
    return {system: np.array(values) for system, values in found.items() if len(values) == len(names)}


def _adapter_from(records: Sequence[int], scores: dict[int, dict[str, Any]], reference: str) -> int | None:
    """The smallest number from which on an adapter beside retrieval surely beats retrieval alone."""
    own = "both" if reference == "global" else "private"
    pays: int | None = None
    for count in reversed(records):
        at = scores[count]
        pairs = [(f"{own}+retrieval", "global+retrieval" if own == "both" else "retrieval"), (own, reference)]
        pair = next(((better, other) for better, other in pairs if better in at and other in at), None)
        if pair is None:
            break
        gain = evaluation.compare(at[pair[0]], at[pair[1]], NATS, np.random.default_rng(0)).gain
        if not (math.isfinite(gain.low) and gain.low > 0):
            break
        pays = count
    return pays


def write_curve(run: Path, curve: NewcomerCurve) -> None:
    """Keep a curve beside its run, whose page shows it."""
    temporary = run / f".{FILE}.writing"
    temporary.write_text(json.dumps(curve.to_json(), indent=1) + "\n", encoding="utf-8")
    temporary.replace(run / FILE)
