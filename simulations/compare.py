"""Runs that exist, compared user by user: `homespun sim compare`.

Two runs are compared on the test records of the same users, so every difference is one user's own. What would make
a difference mean something else is refused: other data, other users, records that were cut or tokenized otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from common import evaluation
from common.config import RunConfig, load_config, read_config_file
from common.errors import ConfigError, DataError
from common.evaluation import ACCURACY, NATS, SYSTEMS, Interval, Metric

__all__ = ["Comparison", "Difference", "compare"]

METRICS = (NATS, ACCURACY)
SPLIT = "test"
PICKED_BY = ("users", "seed", "user_column", "text_column", "time_column", "unit")
"""Keys that decide, with the data, who user number 7 is, what they wrote, and which of it is tested on."""


@dataclass(frozen=True)
class Difference:
    """One system of a run against one of the reference run, paired by user; gains are positive where the run is better.

    Attributes:
        run: Name of the run.
        system: Its system.
        reference: Name of the reference run.
        reference_system: The system there.
        metric: Column of `users.parquet` that was compared.
        unit: The metric's unit, in words.
        users: Pairs.
        mean: Mean score of the run's users.
        reference_mean: Mean score of the same users in the reference run.
        gain: Mean gain with its bootstrap interval.
        median_gain: Median gain.
        worst_decile_gain: Mean over the tenth of users with the lowest gain.
        helped: Share of users whose gain is above the metric's tolerance.
        harmed: Share of users whose loss is.
        p_value: Two-sided sign-flip test of "gains are symmetric about zero".
        verdict: What the interval of the mean gain allows to say.
    """

    run: str
    system: str
    reference: str
    reference_system: str
    metric: str
    unit: str
    users: int
    mean: float
    reference_mean: float
    gain: Interval
    median_gain: Interval
    worst_decile_gain: Interval
    helped: Interval
    harmed: Interval
    p_value: float
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Runs against the first of them.

    Attributes:
        runs: Names, the reference first.
        users: Users that every run scored.
        settings: Configuration keys in which the runs differ, and the value in each run; the data are the same.
        differences: One for each run, system and metric.
    """

    runs: tuple[str, ...]
    users: int
    settings: Mapping[str, tuple[Any, ...]]
    differences: tuple[Difference, ...]

    def sentence(self) -> str:
        """Say what was compared, and in which settings the runs differ."""
        reference, *others = self.runs
        differ = "; ".join(f"{key} {' and '.join(map(_shown, values))}" for key, values in self.settings.items())
        return (
            f"{' and '.join(others)} against {reference}: {self.users:,} users paired, {self.differences[0].unit}, "
            f"gains are positive where {reference} is worse. "
            f"Settings that differ ({', '.join(self.runs)}): {differ or 'none'}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; the ends of an interval are keys of their own, null where there is none."""
        return {
            "version": 1,
            "sentence": self.sentence(),
            "runs": list(self.runs),
            "users": self.users,
            "confidence": evaluation.CONFIDENCE,
            "settings": {key: [_plain(value) for value in values] for key, values in self.settings.items()},
            "differences": [_flat(entry) for entry in self.differences],
        }

    def table(self) -> Table:
        """Lay the leading metric out for a terminal."""
        leading = [entry for entry in self.differences if entry.metric == self.differences[0].metric]
        table = Table(caption=self.sentence(), caption_justify="left")
        table.add_column("run and system")
        table.add_column("against")
        for heading in ("mean", "its mean", "mean gain", "worst decile", "helped / harmed"):
            table.add_column(heading, justify="right")
        table.add_column("verdict")
        for entry in leading:
            table.add_row(
                f"{entry.run}: {entry.system}",
                entry.reference_system,
                f"{entry.mean:.4f}",
                f"{entry.reference_mean:.4f}",
                _signed(entry.gain),
                _signed(entry.worst_decile_gain),
                f"{entry.helped.estimate:.0%} / {entry.harmed.estimate:.0%}",
                entry.verdict,
            )
        return table


def compare(runs: Sequence[Path]) -> Comparison:
    """Compare finished runs with the first of them: each system with its namesake, and what users end up with.

    Where the last systems of two runs have different names ("both" of one, "private" of the other), they are compared
    too. Intervals are resampled with a fixed seed: the same runs give the same comparison.

    Args:
        runs: Folders, the reference first.

    Raises:
        ConfigError: Fewer than two runs, or runs whose users or records are not the same.
        DataError: A run is not finished, or a file of it cannot be read.
    """
    if len(runs) < 2:
        raise ConfigError("compare: at least two runs are needed")
    opened = [_open(path) for path in runs]
    names = _names(runs)
    for name, run in zip(names[1:], opened[1:], strict=True):
        _check_pairing(opened[0], run, names[0], name)
    differences = [
        difference
        for name, run in zip(names[1:], opened[1:], strict=True)
        for difference in _differences(run, opened[0], name, names[0])
    ]
    return Comparison(names, len(opened[0].users), _settings(opened), tuple(differences))


@dataclass(frozen=True)
class _Run:
    """What a comparison needs of a run; arrays are in the order of `users`.

    Attributes:
        config: Its resolved configuration.
        digest: Digest of its data set.
        users: Users that were scored.
        sizes: Test records and tokens of each user, shape (users, 2).
        scores: Scores of each user by metric and system.
    """

    config: RunConfig
    digest: str
    users: tuple[str, ...]
    sizes: NDArray[np.int64]
    scores: dict[tuple[str, str], NDArray[np.float64]]

    @property
    def systems(self) -> list[str]:
        """Systems in the order in which they are told; the last is what users end up with."""
        present = {system for _, system in self.scores}
        return [name for name in SYSTEMS if name in present] + sorted(present - set(SYSTEMS))


def _open(path: Path) -> _Run:
    import pandas as pd

    config = load_config(read_config_file(path / "config.toml"))
    if not (path / "users.parquet").is_file():
        raise DataError(f"{path}: the run is not finished; `homespun sim resume {path}` goes on")
    try:
        digest = str(json.loads((path / "data.json").read_text(encoding="utf-8"))["digest"])
        frame = pd.read_parquet(path / "users.parquet")
        frame = frame[frame["split"] == SPLIT]
        tables = {str(name): own.set_index("user").sort_index() for name, own in frame.groupby("system")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: its results cannot be read ({type(error).__name__})") from None
    if not tables:
        raise DataError(f"{path}: no user was scored")
    first = next(iter(tables.values()))
    if any(not own.index.is_unique or not own.index.equals(first.index) for own in tables.values()):
        raise DataError(f"{path}: its systems were not scored on the same users")
    return _Run(
        config,
        digest,
        tuple(str(user) for user in first.index),
        first[["records", "tokens"]].to_numpy(np.int64),
        {
            (metric.name, system): own[metric.name].to_numpy(np.float64)
            for system, own in tables.items()
            for metric in METRICS
        },
    )


def _check_pairing(reference: _Run, run: _Run, reference_name: str, name: str) -> None:
    """Refuse a pair of runs in which a user's difference would not be the user's own."""
    pair = f"{name} and {reference_name} cannot be compared user by user"
    if run.digest != reference.digest:
        raise ConfigError(f"{pair}: they were made from different data")
    # Users are numbered within what was picked: the same number may be another person.
    for key in PICKED_BY:
        values = getattr(run.config, key), getattr(reference.config, key)
        if values[0] != values[1]:
            raise ConfigError(f"{pair}: different users or records were picked ({key} {values[0]} and {values[1]})")
    if run.users != reference.users:
        raise ConfigError(
            f"{pair}: different users were scored (evaluation_users {run.config.evaluation_users} "
            f"and {reference.config.evaluation_users})"
        )
    if not np.array_equal(run.sizes, reference.sizes):
        raise ConfigError(f"{pair}: their records were cut or tokenized differently (model or max_tokens)")


def _differences(run: _Run, reference: _Run, name: str, reference_name: str) -> list[Difference]:
    pairs = [(system, system) for system in run.systems if system in reference.systems]
    last = (run.systems[-1], reference.systems[-1])
    if last not in pairs:
        pairs.append(last)
    return [
        difference
        for metric in METRICS
        for system, other in pairs
        if (difference := _difference(run, reference, name, reference_name, metric, system, other)) is not None
    ]


def _difference(
    run: _Run, reference: _Run, name: str, reference_name: str, metric: Metric, system: str, other: str
) -> Difference | None:
    """Compare one pair of systems; None where a metric says nothing about any user."""
    ours, theirs = run.scores[metric.name, system], reference.scores[metric.name, other]
    scored = np.isfinite(ours) & np.isfinite(theirs)
    if not scored.any():
        return None
    ours, theirs = ours[scored], theirs[scored]
    found = evaluation.compare(ours, theirs, metric, np.random.default_rng(0), system=system, reference=other)
    return Difference(
        run=name,
        system=system,
        reference=reference_name,
        reference_system=other,
        metric=metric.name,
        unit=metric.unit,
        users=len(ours),
        mean=float(ours.mean()),
        reference_mean=float(theirs.mean()),
        gain=found.gain,
        median_gain=found.median_gain,
        worst_decile_gain=found.worst_decile_gain,
        helped=found.helped,
        harmed=found.harmed,
        p_value=found.p_value,
        verdict=found.verdict,
    )


def _names(runs: Sequence[Path]) -> tuple[str, ...]:
    """Names of the folders, or whole paths where two folders have one name."""
    names = tuple(path.resolve().name for path in runs)
    return names if len(set(names)) == len(names) else tuple(str(path) for path in runs)


def _settings(runs: Sequence[_Run]) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for key in RunConfig.model_fields:
        values = tuple(getattr(run.config, key) for run in runs)
        if key != "data" and any(value != values[0] for value in values):
            found[key] = values
    return found


def _flat(difference: Difference) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for field in fields(difference):
        value = getattr(difference, field.name)
        if isinstance(value, Interval):
            row |= zip((field.name, f"{field.name}_low", f"{field.name}_high"), value.to_json(), strict=True)
        else:
            row[field.name] = value
    return row


def _plain(value: Any) -> Any:
    return "inf" if isinstance(value, float) and np.isinf(value) else value


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.4f}\n{interval.low:+.4f} to {interval.high:+.4f}"
