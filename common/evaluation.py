"""What personalization bought each user, and users as a whole, with intervals.

The unit is the user: every user counts once, however much they wrote. Scores come one per user and system
(`base`, `global`, `private`, `both`); systems are compared on the same users, pair by pair. A *gain* is signed
so that positive is better, whichever way the metric points.

Intervals are percentile bootstrap intervals over users (Efron & Tibshirani, 1993, chapter 13). One draw of users
serves every system and every pair, so that paired differences keep their pairing. They say how far the numbers
would move with other users from the same population; they say nothing about other seeds, noise draws or data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, Self, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "ACCURACY",
    "DEGENERATION",
    "EXACT",
    "NATS",
    "PREFERENCE",
    "Comparison",
    "Interval",
    "Metric",
    "MetricSummary",
    "Summary",
    "SystemSummary",
    "UserScores",
    "compare",
    "sign_flip_test",
    "summarize",
    "user_scores",
]

Floats = NDArray[np.float64]
Verdict = Literal["better", "worse", "no clear difference"]

SYSTEMS = (
    *("base", "global", "private", "both", "profile", "soft-prompt", "steering", "retrieval", "global+retrieval"),
    *("private+retrieval", "both+retrieval", "preference", "another", "pooled", "chosen"),
)
"""Order in which systems are told; unknown ones come last."""

REFERENCES = ("base", "global", "private", "both", "retrieval", "global+retrieval")
"""Of the systems above, those that later ones are compared with; what is unknown is compared with all before it."""

QUANTILES = (0.05, 0.10, 0.25, 0.50, 0.75, 0.90, 0.95)
"""Levels at which the distribution of per-user gains is kept."""

RESAMPLES = 2_000
SIGN_FLIPS = 9_999
CONFIDENCE = 0.95
VALUES_AT_ONCE = 2**22
"""Resampled values held at one time: 32 MiB of float64, whatever the population."""


class FrameLike(Protocol):
    """Columns by name: a dict of arrays, a pandas DataFrame or a pyarrow Table."""

    def __getitem__(self, name: str, /) -> Any:
        """Return one column, or raise KeyError."""
        ...


@dataclass(frozen=True)
class Metric:
    """One way to score a user.

    Attributes:
        name: Column of the frame.
        unit: What one unit of it is, in words.
        higher_is_better: Direction.
        tolerance: A user whose gain is within this of zero counts as neither helped nor harmed.
    """

    name: str
    unit: str
    higher_is_better: bool
    tolerance: float

    def goodness(self, scores: Floats) -> Floats:
        """Return `scores` signed so that more is better."""
        return scores if self.higher_is_better else -scores


NATS = Metric("nats_per_token", "nats per response token", higher_is_better=False, tolerance=0.01)
"""Negative log-likelihood. The tolerance is one percent of perplexity."""

ACCURACY = Metric("accuracy", "share of response tokens predicted first", higher_is_better=True, tolerance=0.005)
"""Next-token accuracy, 0 to 1. The tolerance is half a percentage point."""

EXACT = Metric("exact", "share of responses with every token predicted first", higher_is_better=True, tolerance=0.005)
"""Whole responses, 0 to 1: what counts where the response is a tag or a rating."""


PREFERENCE = Metric(
    "preference_accuracy", "share of pairs with the preferred answer likelier", higher_is_better=True, tolerance=0.005
)
"""Pairs, 0 to 1: likelihood per token, so that a longer answer is not worse for its length."""


DEGENERATION = Metric("degeneration", "share of generated answers that loop or are empty", False, tolerance=0.005)
"""Of a few test questions of each user, answered greedily; 0 to 1."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its bootstrap interval; `low` and `high` are nan where one user leaves nothing to resample."""

    estimate: float
    low: float
    high: float

    def to_json(self) -> list[float | None]:
        """Return `[estimate, low, high]`, null for what is not a number."""
        return [value if math.isfinite(value) else None for value in (self.estimate, self.low, self.high)]

    @classmethod
    def from_json(cls, values: Sequence[float | None]) -> Self:
        """Read what `to_json` wrote."""
        return cls(*(math.nan if value is None else float(value) for value in values))


@dataclass(frozen=True)
class SystemSummary:
    """One system over all users, in the metric's own unit.

    The worst decile is the mean over the worst tenth of users *of this system*, ceil(users / 10) of them: who they
    are differs between systems.
    """

    system: str
    mean: Interval
    median: Interval
    worst_decile: Interval

    @property
    def perplexity(self) -> Interval:
        """Perplexity, exp of the mean, for a metric in nats: the geometric mean of the users' perplexities."""
        return Interval(math.exp(self.mean.estimate), math.exp(self.mean.low), math.exp(self.mean.high))


@dataclass(frozen=True)
class Comparison:
    """One system against a reference, paired by user; gains are positive where `system` is better.

    Attributes:
        gain: Mean gain.
        median_gain: Median gain.
        worst_decile_gain: Mean over the tenth of users, ceil(users / 10), with the lowest gain.
        helped: Share of users whose gain is above the metric's tolerance.
        harmed: Share of users whose gain is below minus the tolerance.
        p_value: Two-sided sign-flip test of "gains are symmetric about zero".
        quantiles: The gain at each level of `QUANTILES`.
    """

    system: str
    reference: str
    gain: Interval
    median_gain: Interval
    worst_decile_gain: Interval
    helped: Interval
    harmed: Interval
    p_value: float
    quantiles: tuple[float, ...]

    @property
    def verdict(self) -> Verdict:
        """What the interval of the mean gain allows to say."""
        if self.gain.low > 0:
            return "better"
        return "worse" if self.gain.high < 0 else "no clear difference"


@dataclass(frozen=True)
class MetricSummary:
    """One metric over `users` users who have a finite score for every system; `excluded` users lack one."""

    metric: Metric
    users: int
    excluded: int
    systems: tuple[SystemSummary, ...]
    comparisons: tuple[Comparison, ...]

    def system(self, name: str) -> SystemSummary | None:
        """Return the summary of system `name`, or None where the run did not have it."""
        return next((entry for entry in self.systems if entry.system == name), None)

    def against(self, system: str, reference: str) -> Comparison | None:
        """Return `system` compared with `reference`, or None where the run lacks either."""
        pairs = (entry for entry in self.comparisons if (entry.system, entry.reference) == (system, reference))
        return next(pairs, None)


@dataclass(frozen=True)
class Summary:
    """What a run's per-user scores say, one `MetricSummary` per metric, the leading one first."""

    split: str
    confidence: float
    resamples: int
    metrics: tuple[MetricSummary, ...]

    def metric(self, name: str) -> MetricSummary | None:
        """Return the summary of the metric `name`, or None."""
        return next((entry for entry in self.metrics if entry.metric.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values that `from_json` reads back."""
        return {
            "version": 1,
            "split": self.split,
            "confidence": self.confidence,
            "resamples": self.resamples,
            "metrics": _plain(self.metrics),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read what `to_json` wrote.

        Raises:
            ValueError: It is of another version.
        """
        if value.get("version") != 1:
            raise ValueError("a summary of version 1 is expected")
        metrics = tuple(_metric_from_plain(entry) for entry in value["metrics"])
        return cls(value["split"], value["confidence"], value["resamples"], metrics)


@dataclass(frozen=True)
class UserScores:
    """One metric, one number per system and user: `values` has shape (systems, users), float64.

    Attributes:
        labels: The users, in the order of the last axis of `values`.
        excluded: Users of the frame who lack a finite score for some system, and so are not here.
    """

    metric: Metric
    systems: tuple[str, ...]
    labels: tuple[str, ...]
    values: Floats
    excluded: int

    def gain(self, system: str, reference: str) -> Floats:
        """Return the per-user gain of `system` over `reference`, shape (users,), positive is better."""
        scores = self.values[self.systems.index(system)], self.values[self.systems.index(reference)]
        return self.metric.goodness(scores[0] - scores[1])


def user_scores(frame: FrameLike, metric: Metric = NATS, *, split: str | None = None) -> UserScores:
    """Lay out `metric` as (systems, users) from one row per user and system.

    Args:
        frame: Columns `user`, `system`, the metric's own and, optionally, `split` and `tokens`; a row of 0 tokens was
            not scored, whatever its metric says.
        metric: What to read.
        split: Rows of this split only; every row when None.

    Raises:
        ValueError: A user has two rows for one system.
        KeyError: A column is missing.
    """
    users = np.asarray(frame["user"]).astype(str)
    systems = np.asarray(frame["system"]).astype(str)
    scores = np.asarray(frame[metric.name], dtype=np.float64)
    if _has(frame, "tokens"):
        scores = np.where(np.asarray(frame["tokens"], dtype=np.float64) > 0, scores, np.nan)
    if split is not None:
        chosen = np.asarray(frame["split"]).astype(str) == split
        users, systems, scores = users[chosen], systems[chosen], scores[chosen]
    names = sorted(set(systems.tolist()), key=lambda name: (_rank(name), name))
    labels, user_index = np.unique(users, return_inverse=True)
    system_index = np.array([names.index(name) for name in systems.tolist()], dtype=np.int64)
    cells = system_index * max(len(labels), 1) + user_index
    if len(np.unique(cells)) != len(cells):
        raise ValueError("a user has two rows for one system")
    values = np.full((len(names), len(labels)), np.nan)
    values[system_index, user_index] = scores
    there = np.flatnonzero(np.isfinite(values).any(axis=1))
    if there.size:  # a system that nobody has a score of is left out
        names, values = [names[kept] for kept in there.tolist()], values[there]
    complete = np.isfinite(values).all(axis=0)
    return UserScores(
        metric, tuple(names), tuple(labels[complete].tolist()), values[:, complete], int((~complete).sum())
    )


def summarize(
    frame: FrameLike,
    generator: np.random.Generator,
    *,
    metrics: Sequence[Metric] = (NATS, ACCURACY, EXACT, PREFERENCE),
    split: str = "test",
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Summary:
    """Summarize a frame of one row per user and system.

    A metric whose column is missing, or which no user has for every system, is left out.

    Args:
        frame: As for `user_scores`; without a column `split`, all rows count as `split`.
        generator: Draws the resamples. It guards nothing, so it may be seeded.
        metrics: What to summarize, the leading one first.
        split: Which rows to take.
        confidence: Level of every interval.
        resamples: Bootstrap draws.
    """
    chosen = split if _has(frame, "split") else None
    summaries: list[MetricSummary] = []
    for metric in metrics:
        if not _has(frame, metric.name):
            continue
        scores = user_scores(frame, metric, split=chosen)
        if scores.labels:
            summaries.append(_summarize_metric(scores, generator, confidence, resamples))
    return Summary(split, confidence, resamples, tuple(summaries))


def compare(
    scores: ArrayLike,
    reference_scores: ArrayLike,
    metric: Metric,
    generator: np.random.Generator,
    *,
    system: str = "system",
    reference: str = "reference",
    confidence: float = CONFIDENCE,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Compare two arrays of scores, each of shape (users,), over the same users in the same order.

    Raises:
        ValueError: Shapes differ, there are no users, or a score is not finite.
    """
    ours, theirs = np.asarray(scores, dtype=np.float64), np.asarray(reference_scores, dtype=np.float64)
    if ours.shape != theirs.shape or ours.ndim != 1 or not ours.size:
        raise ValueError("two score arrays of one shape (users,) are expected, users at least 1")
    gains = metric.goodness(ours - theirs)
    if not np.isfinite(gains).all():
        raise ValueError("scores must be finite")
    intervals = _bootstrap(gains[np.newaxis], metric.tolerance, generator, confidence, resamples)
    return _comparison(system, reference, gains, intervals[0], generator)


def sign_flip_test(gains: ArrayLike, generator: np.random.Generator, *, flips: int = SIGN_FLIPS) -> float:
    """Test "gains are symmetric about zero" and return the two-sided p-value.

    Under that hypothesis each user's sign is a fair coin, so the mean gain is compared with the means that coins
    would give (Fisher, 1935). All 2^users sign patterns are tried where there are at most `flips`; otherwise `flips`
    random ones, and the observed one counts as a draw, so that the test stays valid (Phipson & Smyth, 2010).

    Raises:
        ValueError: There are no users, or a gain is not finite.
    """
    values = np.asarray(gains, dtype=np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError("finite gains of shape (users,) are expected, users at least 1")
    # ties with the observed mean must count, whatever order a sum is rounded in
    threshold = abs(values.sum()) - 1e-12 * np.abs(values).sum()
    if 2**values.size <= flips:
        patterns = np.arange(2**values.size)[:, np.newaxis] >> np.arange(values.size) & 1
        return float(np.mean(np.abs((1.0 - 2.0 * patterns) @ values) >= threshold))
    extreme = 0
    for size in _chunks(flips, values.size):
        signs = 1.0 - 2.0 * generator.integers(2, size=(size, values.size), dtype=np.int8)
        extreme += int((np.abs(signs @ values) >= threshold).sum())
    return (1 + extreme) / (1 + flips)


def _rank(system: str) -> int:
    return SYSTEMS.index(system) if system in SYSTEMS else len(SYSTEMS)


def _has(frame: FrameLike, column: str) -> bool:
    try:
        frame[column]
    except KeyError:
        return False
    return True


def _chunks(resamples: int, width: int) -> list[int]:
    """Split `resamples` draws of `width` values into parts of at most `VALUES_AT_ONCE` values."""
    size = max(1, VALUES_AT_ONCE // width)
    return [min(size, resamples - start) for start in range(0, resamples, size)]


def _statistics(goodness: Floats, tolerance: float) -> Floats:
    """Return mean, median, worst decile, helped and harmed over the last axis, stacked in front."""
    users = goodness.shape[-1]
    worst = -(-users // 10)
    middle = [(users - 1) // 2, users // 2]
    # one partial sort serves both: the lowest `worst` values come first, and the middle ones stand in place
    ordered = np.partition(goodness, [worst - 1, *middle], axis=-1)
    return np.stack(
        [
            goodness.mean(axis=-1),
            ordered[..., middle].mean(axis=-1),
            ordered[..., :worst].mean(axis=-1),
            (goodness > tolerance).mean(axis=-1),
            (goodness < -tolerance).mean(axis=-1),
        ]
    )


def _bootstrap(
    goodness: Floats, tolerance: float, generator: np.random.Generator, confidence: float, resamples: int
) -> list[list[Interval]]:
    """Return, per row of `goodness` (rows, users), an interval for each of `_statistics`; rows are drawn together."""
    rows, users = goodness.shape
    estimates = _statistics(goodness, tolerance)
    if users == 1:
        return [[Interval(float(value), math.nan, math.nan) for value in estimates[:, row]] for row in range(rows)]
    drawn = [
        _statistics(goodness[:, generator.integers(users, size=(size, users))], tolerance)
        for size in _chunks(resamples, rows * users)
    ]
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(np.concatenate(drawn, axis=-1), [tail, 1.0 - tail], axis=-1)
    # No resample can show a user that no one of the sample is. Where a share is 0 or 1 its interval would be a
    # point; the exact binomial bound of Clopper & Pearson (1934) stands in, which has a closed form there.
    unseen = tail ** (1.0 / users)
    for share in (3, 4):
        high[share][estimates[share] == 0.0] = 1.0 - unseen
        low[share][estimates[share] == 1.0] = unseen
    return [
        [Interval(*map(float, values)) for values in zip(estimates[:, row], low[:, row], high[:, row], strict=True)]
        for row in range(rows)
    ]


def _summarize_metric(
    scores: UserScores, generator: np.random.Generator, confidence: float, resamples: int
) -> MetricSummary:
    metric = scores.metric
    pairs = [
        (system, reference)
        for index, system in enumerate(scores.systems)
        for reference in scores.systems[:index]
        if reference in REFERENCES or reference not in SYSTEMS
    ]
    gains = [scores.gain(*pair) for pair in pairs]
    rows = np.stack([*metric.goodness(scores.values), *gains])
    intervals = _bootstrap(rows, metric.tolerance, generator, confidence, resamples)
    systems: list[SystemSummary] = []
    for name, (mean, median, worst, *_) in zip(scores.systems, intervals, strict=False):
        systems.append(SystemSummary(name, _in_unit(metric, mean), _in_unit(metric, median), _in_unit(metric, worst)))
    comparisons = [
        _comparison(*pair, gain, interval, generator)
        for pair, gain, interval in zip(pairs, gains, intervals[len(systems) :], strict=True)
    ]
    return MetricSummary(metric, len(scores.labels), scores.excluded, tuple(systems), tuple(comparisons))


def _in_unit(metric: Metric, goodness: Interval) -> Interval:
    """Turn an interval of goodness back into the metric's own unit."""
    if metric.higher_is_better:
        return goodness
    return Interval(-goodness.estimate, -goodness.high, -goodness.low)


def _comparison(
    system: str, reference: str, gains: Floats, intervals: list[Interval], generator: np.random.Generator
) -> Comparison:
    gain, median, worst, helped, harmed = intervals
    p_value = sign_flip_test(gains, generator)
    quantiles = tuple(float(value) for value in np.quantile(gains, QUANTILES))
    return Comparison(system, reference, gain, median, worst, helped, harmed, p_value, quantiles)


def _plain(value: Any) -> Any:
    """Turn a tree of summaries into plain JSON values."""
    if isinstance(value, Interval):
        return value.to_json()
    if isinstance(value, tuple):
        return [_plain(entry) for entry in cast(tuple[Any, ...], value)]
    if isinstance(value, MetricSummary | Metric | SystemSummary | Comparison):
        plain = {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
        return plain | {"verdict": value.verdict} if isinstance(value, Comparison) else plain
    return value


def _metric_from_plain(value: Mapping[str, Any]) -> MetricSummary:
    def read(entry: Mapping[str, Any], *intervals: str) -> dict[str, Any]:
        found = {name: part for name, part in entry.items() if name != "verdict"}
        return found | {name: Interval.from_json(entry[name]) for name in intervals}

    systems = [read(entry, "mean", "median", "worst_decile") for entry in value["systems"]]
    comparisons = [
        read(entry, "gain", "median_gain", "worst_decile_gain", "helped", "harmed") for entry in value["comparisons"]
    ]
    for entry in comparisons:
        entry["quantiles"] = tuple(entry["quantiles"])
    return MetricSummary(
        Metric(**value["metric"]),
        value["users"],
        value["excluded"],
        tuple(SystemSummary(**entry) for entry in systems),
        tuple(Comparison(**entry) for entry in comparisons),
    )
