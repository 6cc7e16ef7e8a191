"""A grid of runs, methods by epsilons by seeds, that resumes, and one table of what each bought its users.

Every cell is an ordinary run in a folder of its own, so a sweep that was interrupted goes on where it stood: finished
cells are read, unfinished ones resumed, a cell that was refused is asked again. A method that shares nothing is run
once per seed: no budget reaches it.

A gain is paired: a user's own test records under a system against the same records under the base. Where the data
are a file, a user has the same records under every seed, and counts once, with the mean over seeds; people of
the built-in world are others under every seed, and count each.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common import evaluation
from common.config import BUILT_IN, RunConfig, load_config, read_config_file
from common.errors import ConfigError, DataError, Refusal
from common.evaluation import NATS, Interval
from simulations.outside import method_of
from simulations.planning import base_of, count_users
from simulations.worlds.loaders import load_users

__all__ = ["Cell", "Own", "Point", "Sweep", "Turn", "cells_of", "collect", "run_cells"]

Gains = dict[str, NDArray[np.float64]]

POOLED_STEPS = 30
"""Steps of the control that pools the users' records without privacy; the first cell of each seed has it."""


@dataclass(frozen=True)
class Cell:
    """One run of the grid; `epsilon` is None where the method shares nothing."""

    method: str
    epsilon: float | None
    seed: int
    folder: Path
    config: RunConfig


@dataclass(frozen=True)
class Point:
    """One system of one method at one epsilon, over all seeds.

    Attributes:
        method: Row of the method table.
        system: Which of the run's systems.
        epsilon: Asked of every run; inf adds no noise.
        spent: Epsilon that the run's statement gives, calibrated or claimed; inf where none is.
        seeds: Runs behind it.
        users: Users scored, or users and seeds where they are other people under every seed.
        nats: Mean negative log-likelihood per response token.
        gain: Mean gain over the base.
        worst_decile_gain: Mean over the tenth of users with the lowest gain.
        helped: Share of users whose gain is above the tolerance.
        harmed: Share of users whose loss is.
    """

    method: str
    system: str
    epsilon: float
    spent: float
    seeds: int
    users: int
    nats: float
    gain: Interval
    worst_decile_gain: Interval
    helped: float
    harmed: float


@dataclass(frozen=True)
class Turn:
    """Where the shared part of a method stops helping.

    Attributes:
        method: Row of the method table.
        against: What users would have without it: their private adapter alone, or the base.
        gains: (epsilon, mean gain of sharing over that), in increasing epsilon.
        helps_at: Epsilons at which the interval of that gain lies above zero.
        stops_at: Largest epsilon of the grid at which it does not, below all at which it does; None where it always
            helps, inf where it never does.
    """

    method: str
    against: str
    gains: tuple[tuple[float, Interval], ...]
    helps_at: tuple[float, ...]
    stops_at: float | None

    def sentence(self) -> str:
        """Say it in words."""
        if self.stops_at is None:
            return f"{self.method}: sharing helps over {self.against} at every epsilon of the grid"
        if not self.helps_at:
            return f"{self.method}: sharing does not help over {self.against} at any epsilon of the grid"
        if math.isinf(self.stops_at):
            return f"{self.method}: sharing helps over {self.against} at some epsilons, and not without noise"
        return (
            f"{self.method}: sharing helps over {self.against} from epsilon {_shown(min(self.helps_at))} on, and no "
            f"longer at {_shown(self.stops_at)}"
        )


@dataclass(frozen=True)
class Own:
    """The control that tells a user's style from mere adaptation: a user's own adapter against another user's.

    Attributes:
        method: Row of the method table.
        system: The system that was compared with `another`, which has its shared part.
        gains: (epsilon, mean gain of one's own adapter over another's), in increasing epsilon.
    """

    method: str
    system: str
    gains: tuple[tuple[float, Interval], ...]

    def sentence(self) -> str:
        """Say it in words."""
        said = ", ".join(
            f"{gain.estimate:+.3f} [{gain.low:+.3f}, {gain.high:+.3f}] at epsilon {_shown(epsilon)}"
            for epsilon, gain in self.gains
        )
        return f"{self.method}: a user's own adapter over another user's: {said}"


@dataclass(frozen=True)
class Sweep:
    """What a grid found.

    Attributes:
        points: One for each method, system and epsilon.
        turns: One for each method that shares anything.
        own: One for each method that keeps anything.
        refused: Cells whose promise would not be true, and why.
        rehearsal: Whether its epsilons are calibrated, not claimed.
        setting: What all runs have in common, in words.
    """

    points: tuple[Point, ...]
    turns: tuple[Turn, ...]
    own: tuple[Own, ...]
    refused: tuple[tuple[str, str], ...]
    rehearsal: bool
    setting: str

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; an infinite epsilon is the text "inf"."""
        return {
            "version": 1,
            "setting": self.setting,
            "epsilon": "calibrated, not claimed: the runs are rehearsals" if self.rehearsal else "claimed by each run",
            "metric": NATS.unit,
            "confidence": evaluation.CONFIDENCE,
            "points": [_row(point) for point in self.points],
            "sharing": [
                {
                    "method": turn.method,
                    "against": turn.against,
                    "gains": [[_plain(epsilon), *gain.to_json()] for epsilon, gain in turn.gains],
                    "helps_at": [_plain(epsilon) for epsilon in turn.helps_at],
                    "stops_at": None if turn.stops_at is None else _plain(turn.stops_at),
                    "sentence": turn.sentence(),
                }
                for turn in self.turns
            ],
            "own_over_another": [
                {
                    "method": own.method,
                    "system": own.system,
                    "gains": [[_plain(epsilon), *gain.to_json()] for epsilon, gain in own.gains],
                    "sentence": own.sentence(),
                }
                for own in self.own
            ],
            "refused": [{"cell": cell, "reason": reason} for cell, reason in self.refused],
        }

    def to_csv(self) -> str:
        """The points as a table, one line each."""
        rows = [_row(point) for point in self.points]
        file = io.StringIO()
        writer = csv.DictWriter(file, list(rows[0]) if rows else [])
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue()


def cells_of(
    config: RunConfig, methods: Sequence[str], epsilons: Sequence[float], seeds: Sequence[int], folder: Path
) -> list[Cell]:
    """Lay the grid out.

    Raises:
        ConfigError: A list is empty, or names something twice or something unknown.
    """
    problems = [
        f"{name}: name at least one, each once"
        for name, values in (("methods", methods), ("epsilons", epsilons), ("seeds", seeds))
        if not values or len(set(values)) != len(values)
    ]
    if problems:
        raise ConfigError(problems)
    cells: list[Cell] = []
    for seed in seeds:
        pooled = config.pooled_steps
        if pooled is None:
            pooled = POOLED_STEPS
        for name in methods:
            shares = method_of(config.model_copy(update={"method": name})).shared
            asked: Sequence[float | None] = sorted(epsilons) if shares else [None]
            for epsilon in asked:
                changed = {"method": name, "seed": seed, "epsilon": math.inf if epsilon is None else epsilon}
                changed["pooled_steps"], pooled = pooled, 0  # one control for all of a seed's cells
                label = f"{name}-seed{seed}" if epsilon is None else f"{name}-epsilon{_shown(epsilon)}-seed{seed}"
                own = load_config({**config.model_dump(), **changed})
                cells.append(Cell(name, epsilon, seed, folder / label.replace(":", "-"), own))
    return cells


def run_cells(
    cells: Sequence[Cell],
    start: Callable[[RunConfig, Path], bool],
    resume: Callable[[Path], bool],
    say: Callable[[str], None],
) -> dict[str, str] | None:
    """Run what is not finished yet; returns what was refused, by cell, or None where the owner stopped a run.

    Args:
        cells: The grid.
        start: Begins a run in a new folder; False when it was stopped before its end.
        resume: Continues one.
        say: Told one line per cell.

    Raises:
        ConfigError: A folder of the grid holds a run of another configuration, or on other data.
    """
    refused: dict[str, str] = {}
    asked = cells[0].config  # methods, epsilons and seeds share what `_resolved` resolves
    there = any((cell.folder / "config.toml").is_file() for cell in cells)
    resolved = _resolved(asked) if there else {}
    for number, cell in enumerate(cells, start=1):
        here = (cell.folder / "config.toml").is_file()
        if here:
            _check_same(cell, resolved)
        if (cell.folder / "summary.json").is_file():
            say(f"{number}/{len(cells)} {cell.folder.name}: finished before")
            continue
        say(f"{number}/{len(cells)} {cell.folder.name}")
        try:
            if not (resume(cell.folder) if here else start(cell.config, cell.folder)):
                return None
        except Refusal as refusal:
            refused[cell.folder.name] = str(refusal)
            say(f"    refused: {refusal}")
    return refused


def collect(cells: Sequence[Cell], refused: dict[str, str]) -> Sweep:
    """Read the finished runs of a grid and put them side by side; intervals are resampled with a fixed seed."""
    there = [cell for cell in cells if cell.folder.name not in refused]
    read = {cell.folder.name: _read(cell) for cell in there}
    epsilons = sorted({cell.epsilon for cell in cells if cell.epsilon is not None}) or [math.inf]
    points: list[Point] = []
    turns: list[Turn] = []
    owns: list[Own] = []
    for name in dict.fromkeys(cell.method for cell in there):
        method = method_of(next(cell.config for cell in there if cell.method == name))
        against = "private" if method.private else "base"
        gains: list[tuple[float, Interval]] = []
        others: list[tuple[float, Interval]] = []
        last = "both" if method.shared else "private"
        for epsilon in epsilons if method.shared else epsilons[-1:]:
            own = [cell for cell in there if cell.method == name and cell.epsilon in (None, epsilon)]
            if not own:
                continue
            merged = _merged([(cell, read[cell.folder.name][0]) for cell in own])
            spent = max(read[cell.folder.name][1] for cell in own)
            for system in [one for one in evaluation.SYSTEMS if one in merged and one != "base"] + sorted(
                set(merged) - set(evaluation.SYSTEMS)
            ):
                found = evaluation.compare(merged[system], merged["base"], NATS, np.random.default_rng(0))
                points.append(
                    Point(
                        name,
                        system,
                        epsilon,
                        spent,
                        len(own),
                        len(merged["base"]),
                        float(merged[system].mean()),
                        found.gain,
                        found.worst_decile_gain,
                        found.helped.estimate,
                        found.harmed.estimate,
                    )
                )
            if "another" in merged and last in merged:
                found = evaluation.compare(merged[last], merged["another"], NATS, np.random.default_rng(0))
                others.append((epsilon, found.gain))
            if method.shared:
                last = "both" if "both" in merged else "global"
                gains.append(
                    (epsilon, evaluation.compare(merged[last], merged[against], NATS, np.random.default_rng(0)).gain)
                )
        if others:
            owns.append(Own(name, last, tuple(others)))
        if gains:
            turns.append(turn_of(name, {"private": "private alone"}.get(against, against), gains))
    first = there[0].config if there else cells[0].config
    return Sweep(tuple(points), tuple(turns), tuple(owns), tuple(refused.items()), first.rehearsal, _setting(first))


def turn_of(method: str, against: str, gains: Sequence[tuple[float, Interval]]) -> Turn:
    """Find the epsilon at which sharing stops helping, from its gain at every epsilon of the grid."""
    helps = [epsilon for epsilon, gain in gains if gain.low > 0]
    fails = [epsilon for epsilon, gain in gains if not gain.low > 0]
    stops: float | None = None
    if fails and not helps:
        stops = math.inf
    elif fails:
        below = [epsilon for epsilon in fails if epsilon < min(helps)]
        stops = max(below) if below else (math.inf if math.inf in fails else None)
    return Turn(method, against, tuple(gains), tuple(helps), stops)


def default_folder(config: RunConfig, lists: Sequence[Sequence[Any]]) -> str:
    """A name for the sweep that the same command finds again."""
    text = config.to_toml() + json.dumps([list(map(str, values)) for values in lists])
    return f"sweep-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _resolved(config: RunConfig) -> dict[str, Any]:
    """What a run's own configuration will say of its users, its model and its data, and the digest of these data."""
    data, model = config.data, config.model
    found: dict[str, Any] = {
        "users": config.users or count_users(config),
        "model": model if model == BUILT_IN else str(base_of(config).resolve()),
        "data": data if data == BUILT_IN or not Path(data).exists() else str(Path(data).resolve()),
    }
    if data != BUILT_IN:
        found["digest"] = load_users(
            data, user_column=config.user_column, text_column=config.text_column, time_column=config.time_column
        ).source_digest
    return found


def _check_same(cell: Cell, resolved: Mapping[str, Any]) -> None:
    """A run's own configuration says what was resolved and is otherwise as asked; of its data the file says what."""
    stored = load_config(read_config_file(cell.folder / "config.toml"))
    for key in RunConfig.model_fields:
        if getattr(stored, key) != resolved.get(key, getattr(cell.config, key)):
            raise ConfigError(f"{cell.folder}: a run with another {key} is there; --out chooses another folder")
    try:
        digest = json.loads((cell.folder / "data.json").read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError):  # killed before it was written; the run itself checks its data
        return
    if digest != resolved.get("digest", digest):
        raise ConfigError(
            f"{cell.folder}: a run on {cell.config.data} before its content changed is there; "
            "--out chooses another folder"
        )


def _read(cell: Cell) -> tuple[dict[str, dict[str, float]], float]:
    """Scores by system and user of a finished run's test records, and the epsilon of its statement."""
    import pandas as pd

    try:
        frame = pd.read_parquet(cell.folder / "users.parquet")
        spent = json.loads((cell.folder / "statement.json").read_text(encoding="utf-8"))["epsilon"]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{cell.folder}: its results cannot be read ({type(error).__name__})") from None
    frame = frame[(frame["split"] == "test") & (frame["tokens"] > 0)]
    scores = {
        str(system): dict(zip(own["user"].astype(str), own[NATS.name].astype(float), strict=True))
        for system, own in frame.groupby("system")
    }
    finite = isinstance(spent, int | float) and math.isfinite(spent) and cell.epsilon not in (None, math.inf)
    return scores, float(spent) if finite else math.inf


def _merged(runs: Sequence[tuple[Cell, dict[str, dict[str, float]]]]) -> Gains:
    """Line users of several seeds up, shape `(units,)` for each system."""
    systems = set.intersection(*(set(scores) for _, scores in runs))
    by_unit: dict[str, dict[str, list[float]]] = {}
    for cell, scores in runs:
        for user in sorted(scores["base"]):
            unit = f"{cell.seed}/{user}" if cell.config.data == BUILT_IN or cell.config.users is not None else user
            for system in systems:
                by_unit.setdefault(unit, {}).setdefault(system, []).append(scores[system][user])
    return {
        system: np.array([float(np.mean(own[system])) for own in by_unit.values()], dtype=np.float64)
        for system in sorted(systems)
    }


def _setting(config: RunConfig) -> str:
    data = "built-in world" if config.data == BUILT_IN else Path(config.data).name
    model = "built-in base" if config.model == BUILT_IN else Path(config.model).name
    return (
        f"{data}, {model}, unit {config.unit}, noise {config.noise}, {config.rounds} rounds of about {config.cohort} "
        f"users, {config.evaluation_users} scored at most"
    )


def _row(point: Point) -> dict[str, Any]:
    return {
        "method": point.method,
        "system": point.system,
        "epsilon": _plain(point.epsilon),
        "spent": _plain(point.spent),
        "seeds": point.seeds,
        "users": point.users,
        "nats": point.nats,
        **dict(zip(("gain", "gain_low", "gain_high"), point.gain.to_json(), strict=True)),
        **dict(
            zip(
                ("worst_decile_gain", "worst_decile_gain_low", "worst_decile_gain_high"),
                point.worst_decile_gain.to_json(),
                strict=True,
            )
        ),
        "helped": point.helped,
        "harmed": point.harmed,
    }


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def _shown(value: float) -> str:
    return f"{value:g}"
