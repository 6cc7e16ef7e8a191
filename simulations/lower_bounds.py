"""What an attack proves: lower bounds on epsilon, each with its confidence and with the most it could have shown.

An audit runs an attack many times and asks how small epsilon could be and the attack still do so well. The answer is
a lower bound that is wrong with probability at most 1 - confidence. A low bound never shows that something is safe:
`saturation` is the bound that the same test would have given had there been no noise at all.

What each bound takes for granted besides independent trials:

- `clopper_pearson_bound` nothing at all, or, `as_gaussian`, that what protects is Gaussian noise (mu-GDP);
- `gaussian_bound` that the scores themselves are normal with one variance: the white-box test of a Gaussian release;
- `cosine_bound` that canaries are random directions in many dimensions.

Audits in a single run are in `simulations.one_run`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "LowerBound",
    "clopper_pearson",
    "clopper_pearson_bound",
    "cosine_bound",
    "epsilon_of_mu",
    "gaussian_bound",
]

CONFIDENCE = 0.95
LARGEST_MU = 1e4
"""Separations beyond this are no noise for all that matters."""


@dataclass(frozen=True)
class LowerBound:
    """What one test proves.

    Attributes:
        method: Its name, with its source.
        epsilon: Lower bound at `delta`; 0 where nothing is proven, infinite where there is no noise.
        delta: Failure probability that epsilon is stated at.
        confidence: Probability, at least, that a test of a mechanism with a smaller epsilon does not give this bound.
        samples: Trials, or canaries.
        saturation: The bound that this test gives when there is no noise at all.
        mu: Where Gaussian noise was assumed, the lower bound on mu, the separation in standard deviations.
    """

    method: str
    epsilon: float
    delta: float
    confidence: float
    samples: int
    saturation: float
    mu: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the bound as a JSON object; an infinite number is the string `inf`."""
        numbers = {"epsilon": self.epsilon, "saturation": self.saturation, "mu": self.mu}
        plain = {name: "inf" if value is not None and math.isinf(value) else value for name, value in numbers.items()}
        return {
            "method": self.method,
            "delta": self.delta,
            "confidence": self.confidence,
            "samples": self.samples,
            **plain,
        }


def clopper_pearson(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return an exact two-sided interval for a probability; each end fails with half of what is left.

    Source: Clopper and Pearson (1934), Biometrika 26, 404-413.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError("between none and all of at least one trial succeed")
    _check_level(confidence)
    from scipy.stats import beta

    tail = (1.0 - confidence) / 2.0
    low = 0.0 if successes == 0 else float(beta.ppf(tail, successes, trials - successes + 1))
    high = 1.0 if successes == trials else float(beta.isf(tail, successes + 1, trials - successes))
    return low, high


def clopper_pearson_bound(
    true_positives: int,
    positives: int,
    false_positives: int,
    negatives: int,
    delta: float,
    *,
    confidence: float = CONFIDENCE,
    as_gaussian: bool = False,
) -> LowerBound:
    """Bound epsilon from how often a test with a fixed rule said yes, with and without the canary.

    The rule (a threshold) must not have been chosen on these trials.

    Args:
        true_positives: Trials with the canary in which the test said yes, of `positives`.
        positives: Trials with the canary.
        false_positives: Trials without it in which the test said yes, of `negatives`.
        negatives: Trials without it.
        delta: Failure probability that epsilon is stated at.
        confidence: Of the bound.
        as_gaussian: Bound mu of a mechanism that is mu-GDP, which is much tighter, and state it as epsilon.

    Source: Jagielski, Ullman and Oprea (2020), arXiv:2006.07709; as mu: Nasr et al. (2023), arXiv:2302.07956.
    """
    _check_delta(delta)

    def bound(hits: int, alarms: int) -> tuple[float, float | None]:
        # Only two of the four ends are used, so each may fail with half of what is left.
        low_true = clopper_pearson(hits, positives, confidence)[0]
        high_false = clopper_pearson(alarms, negatives, confidence)[1]
        if as_gaussian:
            from scipy.special import ndtri

            mu = max(0.0, float(ndtri(low_true) - ndtri(high_false)))
            return epsilon_of_mu(mu, delta), mu
        return max(
            0.0, _log_ratio(low_true - delta, high_false), _log_ratio(1 - high_false - delta, 1 - low_true)
        ), None

    epsilon, mu = bound(true_positives, false_positives)
    name = "GDP from true and false positives" if as_gaussian else "true and false positives"
    return LowerBound(
        f"{name} (Clopper-Pearson)", epsilon, delta, confidence, positives + negatives, bound(positives, 0)[0], mu
    )


def gaussian_bound(
    scores_with: ArrayLike, scores_without: ArrayLike, delta: float, *, confidence: float = CONFIDENCE
) -> LowerBound:
    """Bound mu, and with it epsilon, of a Gaussian release from the scores of trials with and without the canary.

    Exact for normal scores of one variance: a t interval for the distance of the means and a chi-square interval for
    the variance, each of which fails with half of 1 - `confidence`.

    Args:
        scores_with: Shape (trials,): the release projected on the canary's direction.
        scores_without: Shape (trials,).
        delta: Failure probability that epsilon is stated at.
        confidence: Of the bound.

    Source: Dong, Roth and Su (2022), arXiv:1905.02383, for mu-GDP; Nasr et al. (2023), arXiv:2302.07956, for the audit.
    """
    _check_delta(delta)
    _check_level(confidence)
    one, other = _scores(scores_with), _scores(scores_without)
    from scipy.stats import chi2, t

    tail = (1.0 - confidence) / 2.0
    freedom = one.size + other.size - 2
    squares = float(((one - one.mean()) ** 2).sum() + ((other - other.mean()) ** 2).sum())
    distance = float(one.mean() - other.mean())
    error = math.sqrt(squares / freedom * (1.0 / one.size + 1.0 / other.size))
    nearest = distance - float(t.isf(tail, freedom)) * error
    widest = math.sqrt(squares / float(chi2.ppf(tail, freedom)))
    if nearest >= LARGEST_MU * widest and nearest > 0.0:
        mu = math.inf
    else:
        mu = max(0.0, nearest / widest) if widest > 0.0 else 0.0
    return LowerBound(
        "GDP from two Gaussians", epsilon_of_mu(mu, delta), delta, confidence, one.size + other.size, math.inf, mu
    )


def cosine_bound(cosines: ArrayLike, dim: int, delta: float, *, confidence: float = CONFIDENCE) -> LowerBound:
    """Bound epsilon from the cosines between what was released and the canary users' random updates, in one run.

    A canary that took no part has a cosine of mean 0 and variance 1 / dim, known without any trial. Those of canaries
    that did have a mean above it; sqrt(dim) times its lower confidence limit bounds mu from below. Clipping and the
    canaries' own sum only make it smaller.

    Args:
        cosines: Shape (canaries,): one per canary user that was enrolled.
        dim: Numbers in an update; far more than there are canaries, or the test sees little.
        delta: Failure probability that epsilon is stated at.
        confidence: Of the bound.

    Source: Andrew et al. (2024), arXiv:2302.03098, Algorithm 1, which states the estimate; the interval is Student's.
    """
    _check_delta(delta)
    _check_level(confidence)
    values = _scores(cosines)
    if dim < 2 or (np.abs(values) > 1.0 + 1e-9).any():
        raise ValueError("cosines lie between -1 and 1, in at least two dimensions")
    from scipy.stats import t

    # The spread is known to be at least that of chance: two canaries that agree by luck prove nothing.
    spread = max(float(values.std(ddof=1)), dim**-0.5)
    low = float(values.mean()) - float(t.isf(1.0 - confidence, values.size - 1)) * spread / math.sqrt(values.size)
    mu = max(0.0, low * math.sqrt(dim))
    # Without noise the release is the canaries' sum: orthogonal unit vectors, each with a cosine of canaries^(-1/2).
    saturated = math.sqrt(max(0.0, dim / values.size) if values.size < dim else 1.0)
    return LowerBound(
        "cosines of canary users (Andrew et al. 2024)",
        epsilon_of_mu(mu, delta),
        delta,
        confidence,
        values.size,
        epsilon_of_mu(saturated, delta),
        mu,
    )


def epsilon_of_mu(mu: float, delta: float) -> float:
    """Return epsilon at `delta` of a mechanism that is mu-GDP: Gaussian noise of standard deviation 1 / mu."""
    from common.accountants import epsilon_of
    from common.events import Gaussian

    if mu <= 1e-6:
        return 0.0
    return math.inf if mu > LARGEST_MU else epsilon_of(Gaussian(1.0 / mu), delta)


def _log_ratio(numerator: float, denominator: float) -> float:
    if numerator <= 0.0:
        return -math.inf
    return math.inf if denominator <= 0.0 else math.log(numerator / denominator)


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or scores.size < 2 or not np.isfinite(scores).all():
        raise ValueError("scores are at least two finite numbers, one per trial")
    return scores


def _check_delta(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError("delta is between 0 and 1")


def _check_level(confidence: float) -> None:
    if not 0.5 <= confidence < 1.0:
        raise ValueError("a confidence is at least one half and below 1")
