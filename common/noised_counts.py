"""What leaves beside the update: one bit for an adaptive clip, and metrics; under the same norm, noise and charge.

Every user's row is one vector of L2 norm at most C, the spec's clip: the update, then one number for each count. Let
there be k counts, each with the share b of C squared:

1. The update is clipped to C (1 - k b)^(1/2), and a count is a number in [-1, 1] times C b^(1/2). So the whole row is
   at most C long, whatever is in it; the gate checks the whole row after rounding, and not a bit more leaves. Test:
   `test_the_update_and_its_counts_together_are_never_longer_than_the_clip`.
2. The noise of the mode, which covers the whole row, is a Gaussian of multiplier z on all of it. That is the update
   under multiplier z (1 - k b)^(-1/2) and each count under z b^(-1/2), composed before the cohort is sampled: one event
   (`common.events.PoissonComposed`) whose multiplier is z again. Source: Andrew et al. (2021), arXiv:1905.03871,
   Theorem 1, where b = (z / (2 sigma_b))^2. Test: `test_the_parts_of_a_round_cost_together_what_its_noise_costs`.
3. The clip norm of the next round is a function of a noised count, so it is as private as what was released. It moves
   by a factor that goes down to the device: the device divides by it before it clips to C, the server multiplies after
   the noise. Multiplier, rate and number of rounds never move, so the schedule is fixed and priced as one; a filter
   is for schedules that are not (`common.budget.Filter`). Test:
   `test_attack_29_the_clip_moves_and_no_price_does`.

A user without records, or without validation records, sends zeros where others send numbers: zero is what zero-out
puts there. A metric is divided by the noised number of those who had one, never by a true number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from common.errors import Refusal
from common.privacy import clip_rows

if TYPE_CHECKING:
    from common.wire import ReleaseSpec

__all__ = ["METRICS", "NoisedCounts"]

METRICS: dict[str, tuple[float, float]] = {"loss": (0.0, 8.0), "gain": (-1.0, 1.0)}
"""What may be measured on a user's validation records, in nats per token, and the public range it is cut to.

`loss` is that of the shared adapter that the round starts from; `gain` the base's less that.
"""

WITHIN, MEASURED = "within", "measured"
LARGEST_STEP = 2.0**20
"""The clip norm stays within this factor of the one it started from."""

LEAST_MEASURED = 4.0
"""Standard deviations of its noise that the number of measured users has to have before anything is divided by it."""


@dataclass(frozen=True)
class NoisedCounts:
    """The counts of one run.

    Attributes:
        metrics: Rows of `METRICS`.
        clip_quantile: Share of updates that the clip norm should not cut; None leaves the clip norm where it is.
        clip_learning_rate: Step of log(clip norm) per unit of the gap between the measured and the wanted share.
        share: Share of the squared norm that each count has.
    """

    metrics: tuple[str, ...] = ()
    clip_quantile: float | None = None
    clip_learning_rate: float = 0.2
    share: float = 0.02

    def __post_init__(self) -> None:
        if not set(self.metrics) <= set(METRICS) or len(set(self.metrics)) != len(self.metrics):
            raise ValueError(f"metrics are of {', '.join(METRICS)}, each once")
        if self.clip_quantile is not None and not 0.0 < self.clip_quantile < 1.0:
            raise ValueError("the quantile is between 0 and 1")
        if not 0.0 < self.clip_learning_rate <= 10.0:
            raise ValueError("the step of the clip norm is above 0 and at most 10")
        if not (self.share > 0.0 and len(self.names) * self.share <= 0.5):
            raise ValueError("the counts take more than 0 and together at most half of the squared norm")

    @property
    def names(self) -> tuple[str, ...]:
        """The counts in their order in a row."""
        within = () if self.clip_quantile is None else (WITHIN,)
        return (*within, *((MEASURED, *self.metrics) if self.metrics else ()))

    @property
    def update_share(self) -> float:
        """The update's clip over the whole row's."""
        return math.sqrt(1.0 - len(self.names) * self.share)

    def multipliers(self, noise_multiplier: float) -> tuple[float, ...]:
        """Noise multipliers of a round's parts, the update's and each count's, where the row has `noise_multiplier`."""
        counts = (noise_multiplier / math.sqrt(self.share),) * len(self.names)
        return (noise_multiplier / self.update_share, *counts)

    def rows(
        self,
        updates: NDArray[Any],
        clip: float,
        clip_scale: float,
        measured: Mapping[str, ArrayLike],
        dtype: DTypeLike = np.float32,
    ) -> NDArray[Any]:
        """Put counts behind updates, shape `(users, dim)`; returns shape `(users, dim + counts)`.

        Args:
            updates: As trained, not clipped.
            clip: The spec's.
            clip_scale: What the clip norm of this round is of the one it started from.
            measured: For each metric a number per user; NaN where there is nothing to measure on.
            dtype: What leaves.

        Guarantee: every row's L2 norm is at most `clip` after rounding.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = np.asarray(updates, np.float64) / clip_scale
            norms = np.sqrt(np.vecdot(scaled, scaled))
        bound = clip * self.update_share
        columns: list[NDArray[np.float64]] = []
        if self.clip_quantile is not None:
            columns.append(np.where(norms <= bound, 1.0, -1.0))
        found = [_centred(measured[name], METRICS[name]) for name in self.metrics]
        if found:
            has = np.all(np.isfinite(found), axis=0)
            columns += [has.astype(np.float64), *(np.where(has, one, 0.0) for one in found)]
        counts = np.stack(columns, axis=1) * (clip * math.sqrt(self.share))
        whole = np.concatenate([clip_rows(scaled, bound), counts.astype(np.float32)], axis=1)
        return clip_rows(whole, clip, dtype)

    def read(
        self, noised: NDArray[np.float64], clip: float, cohort: float, deviation: float
    ) -> dict[str, float | None]:
        """Read the noised sum of the counts, shape `(counts,)`, of an expected cohort.

        Args:
            noised: As released.
            clip: The spec's.
            cohort: Expected users in the round; the share of updates within the clip is of these.
            deviation: Standard deviation of the noise on each number of the sum.

        Returns:
            `within`: share of the cohort whose update the clip norm did not cut. `measured`: how many had a metric.
            Each metric: its mean over those, and `<name>_noise` the standard deviation of the noise on it; None where
            too few were measured to tell.
        """
        unit = clip * math.sqrt(self.share)
        found = dict(zip(self.names, (noised / unit).tolist(), strict=True))
        read: dict[str, float | None] = {}
        if WITHIN in found:
            read[WITHIN] = min(1.0, max(0.0, found[WITHIN] / (2.0 * cohort) + 0.5))
        if not self.metrics:
            return read
        count, noise = found[MEASURED], deviation / unit
        read[MEASURED] = max(0.0, count)
        for name in self.metrics:
            low, high = METRICS[name]
            if count < max(1.0, LEAST_MEASURED * noise):
                read |= {name: None, f"{name}_noise": None}
                continue
            half = (high - low) / 2.0
            mean = min(1.0, max(-1.0, found[name] / count))
            read |= {name: low + half * (1.0 + mean), f"{name}_noise": half * noise / count * math.hypot(1.0, mean)}
        return read

    def next_scale(self, clip_scale: float, within: float | None) -> float:
        """The factor of the next round's clip norm, from the released share of updates within this one.

        Source: Andrew et al. (2021), arXiv:1905.03871, Algorithm 1, geometric update.
        """
        if self.clip_quantile is None or within is None:
            return clip_scale
        # Too many within the clip norm: it is too large and shrinks.
        moved = clip_scale * math.exp(-self.clip_learning_rate * (within - self.clip_quantile))
        return min(LARGEST_STEP, max(1.0 / LARGEST_STEP, moved))

    def to_plain(self) -> dict[str, float | int | str]:
        """What a release spec holds of it."""
        quantile: dict[str, float | int | str] = (
            {}
            if self.clip_quantile is None
            else {"clip_quantile": self.clip_quantile, "clip_learning_rate": self.clip_learning_rate}
        )
        metrics: dict[str, float | int | str] = {"metrics": ",".join(self.metrics)} if self.metrics else {}
        return {"share": self.share, **metrics, **quantile}

    @classmethod
    def of(cls, spec: ReleaseSpec) -> Self | None:
        """Read the counts of a spec; None where nothing leaves beside the update.

        Raises:
            Refusal: They are not counts that are known here, or their unit is not a user.
        """
        return None if spec.counts is None else cls.from_plain(spec.counts, spec.unit)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any], unit: str) -> Self:
        """Read what `to_plain` wrote.

        Raises:
            Refusal: As for `of`.
        """
        try:
            values = dict(plain)
            metrics = str(values.pop("metrics", ""))
            own = cls(tuple(name for name in metrics.split(",") if name), **values)
            sound = unit == "user" and len(own.names) > 0 and all(type(value) is float for value in values.values())
        except (KeyError, TypeError, ValueError):
            sound, own = False, cls()
        if not sound:
            raise Refusal("bad-request", "the spec asks for counts that are not known here")
        return own


def _centred(values: ArrayLike, bounds: tuple[float, float]) -> NDArray[np.float64]:
    """Map a public range to [-1, 1], and cut to it; NaN stays."""
    low, high = bounds
    return (np.clip(np.asarray(values, np.float64), low, high) - low) / (high - low) * 2.0 - 1.0
