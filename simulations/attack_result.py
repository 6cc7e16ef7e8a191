"""The form of an attack's result: a number, its interval, what chance gives, and the most that it could have shown."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from simulations.lower_bounds import CONFIDENCE, LowerBound, clopper_pearson, clopper_pearson_bound

__all__ = ["AttackResult", "Outcome", "Ranking", "bound_from_scores", "mean_interval", "ranking"]

FALSE_POSITIVE_RATE = 0.01

Outcome = Literal["holds", "contradicted", "not shown", "leaks, as expected"]


@dataclass(frozen=True)
class AttackResult:
    """What one attack found.

    Attributes:
        name: Which attack.
        target: What was attacked: the mechanism, the shared update, the global adapter, private adapters.
        measure: What the number is.
        value: The number.
        low: Lower end of its 95 % interval.
        high: Upper end.
        chance: What a guess would give.
        saturation: The most that this test could have shown, had there been no protection at all.
        samples: Trials, canaries, users or records.
        verdict: Whether it contradicts what is claimed about the target.
        why: In words.
        bounds: Lower bounds on epsilon, where the attack gives any.
        claimed_epsilon: What was claimed about exactly what was attacked; None where nothing is.
        details: Further numbers by name.
    """

    name: str
    target: str
    measure: str
    value: float
    low: float
    high: float
    chance: float
    saturation: float
    samples: int
    verdict: Outcome
    why: str
    bounds: tuple[LowerBound, ...] = ()
    claimed_epsilon: float | None = None
    details: Mapping[str, float | str] = field(default_factory=dict[str, float | str])

    def to_json(self) -> dict[str, Any]:
        """Return the result as a JSON object; an infinite number is the string `inf`."""
        names = ("name", "target", "measure", "samples", "verdict", "why")
        numbers = ("value", "low", "high", "chance", "saturation", "claimed_epsilon")
        return {
            **{name: getattr(self, name) for name in names},
            **{name: _plain(getattr(self, name)) for name in numbers},
            "confidence": CONFIDENCE,
            "bounds": [bound.to_json() for bound in self.bounds],
            "details": {name: _plain(value) for name, value in self.details.items()},
        }

    def line(self) -> str:
        """Return the result as one line of text."""
        return (
            f"{self.verdict}: {self.name} on {self.target}: {self.measure} {self.value:.3f} "
            f"[{self.low:.3f}, {self.high:.3f}], by chance {self.chance:.3f}, at most {self.saturation:.3f} "
            f"({self.samples} samples). {self.why}"
        )


@dataclass(frozen=True)
class Ranking:
    """How well scores tell members from others.

    Attributes:
        auc: Probability that a member scores above another, with its interval.
        caught: True positive rate at a false positive rate of 1 %, with its interval.
        most_caught: Its lower limit if every member had been caught: all that so few samples could show.
    """

    auc: tuple[float, float, float]
    caught: tuple[float, float, float]
    most_caught: float


def ranking(members: ArrayLike, others: ArrayLike) -> Ranking:
    """Compare scores of members and others, shapes `(members,)` and `(others,)`; higher means member.

    Source: the interval of the AUC is that of Hanley and McNeil (1982), Radiology 143, 29-36.
    """
    one, other = _scores(members), _scores(others)
    order = np.sort(other)
    below, upto = np.searchsorted(order, one, "left"), np.searchsorted(order, one, "right")
    auc = float((below + upto).sum() / (2.0 * one.size * other.size))
    twice, half = auc / (2.0 - auc), 2.0 * auc * auc / (1.0 + auc)
    variance = auc * (1 - auc) + (one.size - 1) * (twice - auc**2) + (other.size - 1) * (half - auc**2)
    reach = 1.96 * math.sqrt(max(variance, 0.0) / (one.size * other.size))
    threshold = float(np.quantile(other, 1.0 - FALSE_POSITIVE_RATE, method="higher"))
    hits = int((one > threshold).sum())
    low, high = clopper_pearson(hits, one.size)
    return Ranking(
        (auc, max(0.0, auc - reach), min(1.0, auc + reach)),
        (hits / one.size, low, high),
        clopper_pearson(one.size, one.size)[0],
    )


def bound_from_scores(members: ArrayLike, others: ArrayLike, delta: float) -> LowerBound:
    """Bound epsilon from scores: the threshold is chosen on every second score and tried on the rest."""
    one, other = _scores(members), _scores(others)
    choose_one, choose_other, one, other = one[::2], other[::2], one[1::2], other[1::2]
    candidates = np.unique(np.quantile(np.concatenate([choose_one, choose_other]), np.linspace(0.04, 0.96, 24)))

    def bound(threshold: float, with_it: NDArray[np.float64], without: NDArray[np.float64]) -> LowerBound:
        hits, alarms = int((with_it > threshold).sum()), int((without > threshold).sum())
        return clopper_pearson_bound(hits, with_it.size, alarms, without.size, delta)

    best = max(candidates, key=lambda threshold: bound(float(threshold), choose_one, choose_other).epsilon)
    return bound(float(best), one, other)


def mean_interval(values: Sequence[float] | NDArray[np.float64]) -> tuple[float, float, float]:
    """Return a mean with Student's 95 % interval."""
    from scipy.stats import t

    sample = _scores(values)
    mean = float(sample.mean())
    reach = float(t.isf((1 - CONFIDENCE) / 2, sample.size - 1)) * float(sample.std(ddof=1)) / math.sqrt(sample.size)
    return mean, mean - reach, mean + reach


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size < 2 or not np.isfinite(scores).all():
        raise ValueError("at least two finite scores on either side")
    return scores


def _plain(value: Any) -> Any:
    return "inf" if isinstance(value, float) and math.isinf(value) else value
