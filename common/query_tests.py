"""Systems compared question by question, which sees small effects that means per user hide, and user by user.

A user's questions are alike, so a test that takes them as independent finds too much: its p-value is given because the
field gives it, beside the one that flips whole users. The interval resamples users with all their questions. Several
pairs are tested, so p-values by user are also given after Holm's correction.

Source: Field and Welsh (2007), J. R. Stat. Soc. B 69(3), for the bootstrap of clusters; Holm (1979), Scandinavian
Journal of Statistics 6(2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.evaluation import CONFIDENCE, RESAMPLES, FrameLike, Interval, sign_flip_test

__all__ = ["QueryComparison", "compare_queries", "holm"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class QueryComparison:
    """One system against a reference on the same questions; gains are positive where the system is better.

    Attributes:
        system: Which.
        reference: Against which.
        queries: Questions.
        users: Whose they are.
        gain: Mean gain per question in nats per token; the interval resamples users.
        p_by_query: Sign-flip test with every question for itself.
        p_by_user: Sign-flip test with the questions of a user turned together.
        p_adjusted: The same after Holm's correction for all pairs.
    """

    system: str
    reference: str
    queries: int
    users: int
    gain: Interval
    p_by_query: float
    p_by_user: float
    p_adjusted: float

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {**self.__dict__, "gain": self.gain.to_json()}


def compare_queries(
    frame: FrameLike, pairs: Sequence[tuple[str, str]], generator: np.random.Generator
) -> list[QueryComparison]:
    """Compare pairs of systems on the questions that both answered.

    Args:
        frame: Columns `user`, `system`, `query`, `nats` and `tokens`, one row per system and question.
        pairs: (system, reference); one that is not in the frame is left out.
        generator: Draws resamples and flips. It guards nothing, so it may be seeded.
    """
    users, systems = np.asarray(frame["user"]).astype(str), np.asarray(frame["system"]).astype(str)
    numbers = np.asarray(frame["query"], dtype=np.int64)
    cost = np.asarray(frame["nats"], dtype=np.float64) / np.maximum(np.asarray(frame["tokens"], dtype=np.float64), 1)
    tables = {
        name: {key: value for key, value in zip(zip(users[own], numbers[own], strict=True), cost[own], strict=True)}
        for name in dict.fromkeys(systems.tolist())
        if (own := systems == name).any()
    }
    found: list[tuple[tuple[str, str], Floats, NDArray[np.str_], Interval, float, float]] = []
    for system, reference in pairs:
        if system not in tables or reference not in tables:
            continue
        keys = sorted(tables[system].keys() & tables[reference].keys())
        gains = np.array([tables[reference][key] - tables[system][key] for key in keys])
        if not gains.size or not np.isfinite(gains).all():
            continue
        owner = np.array([key[0] for key in keys])
        _, index = np.unique(owner, return_inverse=True)
        sums, counts = np.bincount(index, gains).astype(np.float64), np.bincount(index)
        by_query, by_user = sign_flip_test(gains, generator), sign_flip_test(sums, generator)
        found.append(((system, reference), gains, owner, _interval(sums, counts, generator), by_query, by_user))
    adjusted = holm([entry[5] for entry in found])
    return [
        QueryComparison(*pair, len(gains), len(np.unique(owner)), interval, by_query, by_user, corrected)
        for (pair, gains, owner, interval, by_query, by_user), corrected in zip(found, adjusted, strict=True)
    ]


def holm(p_values: ArrayLike) -> list[float]:
    """Correct p-values of several tests so that all of them hold at once, whatever depends on what."""
    values = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(values, kind="stable")
    corrected = np.empty(len(values))
    highest = 0.0
    for rank, place in enumerate(order.tolist()):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        corrected[place] = highest
    return corrected.tolist()


def _interval(sums: Floats, counts: NDArray[np.intp], generator: np.random.Generator) -> Interval:
    """Mean gain per question with a percentile interval over resampled users."""
    estimate = float(sums.sum() / counts.sum())
    if len(sums) < 2:
        return Interval(estimate, np.nan, np.nan)
    drawn = generator.integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    tail = (1.0 - CONFIDENCE) / 2.0
    low, high = np.quantile(means, [tail, 1.0 - tail])
    return Interval(estimate, float(low), float(high))
