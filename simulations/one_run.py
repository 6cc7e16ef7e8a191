"""An audit in a single run: canaries that each took part by a coin of its own, and guesses about the coins.

With probability 1/2 each canary is put in. Who sees the result ranks the canaries, guesses "in" for the first and
"out" for the last, and abstains on the rest. How many guesses are right bounds epsilon from below, although all
canaries share one run: Steinke, Nasr and Jagielski (2023), arXiv:2305.08846.

One run cannot show much: with all guesses right, m canaries prove no more than about log(m / 3). Each bound says so
as its saturation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike

from simulations.lower_bounds import CONFIDENCE, LowerBound, epsilon_of_mu

__all__ = ["best_guesses", "count_correct", "one_run_bound", "one_run_gaussian_bound"]

SHARES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
"""Shares of the canaries that may be guessed about; which one is fixed before the scores are seen."""

LARGEST_EPSILON = 60.0


class OneRunBound(Protocol):
    """One of the two bounds below."""

    def __call__(
        self, correct: int, guesses: int, canaries: int, delta: float, *, confidence: float = CONFIDENCE
    ) -> LowerBound:
        """Bound epsilon from how many guesses were right."""
        ...


def one_run_bound(
    correct: int, guesses: int, canaries: int, delta: float, *, confidence: float = CONFIDENCE
) -> LowerBound:
    """Bound epsilon of any (epsilon, delta) mechanism from how many guesses were right.

    Args:
        correct: Guesses that were right.
        guesses: Guesses that were made; a number fixed beforehand.
        canaries: Canaries in all, guessed about or not.
        delta: Failure probability that epsilon is stated at; counts 2 x canaries times.
        confidence: Of the bound.

    Source: Steinke, Nasr and Jagielski (2023), arXiv:2305.08846, Theorem 5.2 and Appendix D.
    """
    _check(correct, guesses, canaries, delta, confidence)
    alpha = 1.0 - confidence

    def bound(right: int) -> float:
        return _largest(lambda epsilon: _chance(right, guesses, canaries, epsilon, delta) <= alpha, LARGEST_EPSILON)

    return LowerBound("one run (Steinke et al. 2023)", bound(correct), delta, confidence, canaries, bound(guesses))


def one_run_gaussian_bound(
    correct: int, guesses: int, canaries: int, delta: float, *, confidence: float = CONFIDENCE
) -> LowerBound:
    """Bound mu of a mechanism that is mu-GDP from how many guesses were right, and state it as epsilon.

    Tighter than `one_run_bound`, since the whole trade-off curve is refuted and not a line below it.

    Args:
        correct: Guesses that were right.
        guesses: Guesses that were made; a number fixed beforehand.
        canaries: Canaries in all, guessed about or not.
        delta: Failure probability that epsilon is stated at; the test itself does not need it.
        confidence: Of the bound.

    Source: Mahloujifar, Melis and Chaudhuri (2025), arXiv:2410.22235, Algorithm 3, for two choices per canary.
    """
    _check(correct, guesses, canaries, delta, confidence)
    alpha = 1.0 - confidence

    def bound(right: int) -> float:
        return _largest(lambda mu: _refutes_gaussian(mu, right, guesses, canaries, alpha), 100.0)

    mu = bound(correct)
    saturation = epsilon_of_mu(bound(guesses), delta)
    return LowerBound(
        "one run, f-DP (Mahloujifar et al. 2025)",
        epsilon_of_mu(mu, delta),
        delta,
        confidence,
        canaries,
        saturation,
        mu,
    )


def count_correct(scores: ArrayLike, included: ArrayLike, guesses: int) -> int:
    """Guess "in" for the upper half of `guesses` scores and "out" for the lower; return how many guesses are right.

    Args:
        scores: Shape (canaries,); higher where a canary seems to have taken part.
        included: Shape (canaries,), bool: the coins.
        guesses: How many guesses to make, at most one per canary.
    """
    values, coins = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    if values.ndim != 1 or values.shape != coins.shape or not 0 < guesses <= values.size:
        raise ValueError("one score and one coin per canary, and no more guesses than canaries")
    order = np.argsort(-values, kind="stable")
    above = (guesses + 1) // 2
    below = guesses - above
    return int(coins[order[:above]].sum() + (~coins[order[values.size - below :]]).sum())


@lru_cache(maxsize=256)
def best_guesses(canaries: int, mu: float, delta: float, bound: OneRunBound, *, confidence: float = CONFIDENCE) -> int:
    """Return how many guesses promise the highest bound where scores are `mu` standard deviations apart.

    It depends on what was claimed, not on the scores, so that the bound needs no correction for a choice.
    """

    def promise(guesses: int) -> tuple[float, int]:
        correct = int(guesses * _expected_accuracy(guesses / canaries, mu))
        # Where none promises anything, guess about all: the most that could be shown is then the largest.
        return bound(correct, guesses, canaries, delta, confidence=confidence).epsilon, guesses

    return max((max(2, round(share * canaries)) for share in SHARES), key=promise)


def _expected_accuracy(share: float, mu: float) -> float:
    """Share of right guesses where scores are N(0, 1) or N(mu, 1) and the outer `share` of them is guessed about."""
    from scipy.special import ndtr

    half = mu / 2.0
    # The scores' own middle is 0: the threshold above which a share of share / 2 lies.
    threshold = _largest(lambda t: 0.5 * (ndtr(half - t) + ndtr(-half - t)) > share / 2.0, half + 10.0)
    inside, outside = float(ndtr(half - threshold)), float(ndtr(-half - threshold))
    return inside / (inside + outside)


def _chance(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """Return the largest probability of that many right guesses under (epsilon, delta)."""
    from scipy.stats import binom

    rate = 1.0 / (1.0 + math.exp(-epsilon))
    reached = float(binom.sf(correct - 1, guesses, rate))
    steps = np.arange(1, correct + 1)
    nearly = binom.sf(correct - steps - 1, guesses, rate) - reached
    return min(1.0, reached + 2.0 * canaries * delta * float(np.max(nearly / steps, initial=0.0)))


def _refutes_gaussian(mu: float, correct: int, guesses: int, canaries: int, alpha: float) -> bool:
    """Whether that many right guesses have a probability below `alpha` under mu-GDP."""
    from scipy.special import ndtr, ndtri

    right = alpha * correct / canaries
    wrong = alpha * (guesses - correct) / canaries
    for index in range(correct - 1, -1, -1):
        least = float(ndtr(ndtri(right) - mu))
        if least <= wrong:
            break  # nothing changes any more
        right = min(1.0, right + index / (guesses - index) * (least - wrong))
        wrong = least
    return right + wrong > guesses / canaries


def _largest(holds: Callable[[float], bool], limit: float) -> float:
    """Return the largest value up to `limit` at which `holds`, from below; 0 where it holds nowhere."""
    if not holds(0.0):
        return 0.0
    low, high = 0.0, min(0.25, limit)
    while holds(high):
        if high >= limit:
            return limit
        low, high = high, min(2.0 * high, limit)
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _check(correct: int, guesses: int, canaries: int, delta: float, confidence: float) -> None:
    if not 0 <= correct <= guesses <= canaries or guesses < 1:
        raise ValueError("no more right guesses than guesses, no more guesses than canaries")
    if not 0.0 < delta < 1.0 or not 0.5 <= confidence < 1.0:
        raise ValueError("delta is between 0 and 1, a confidence at least one half and below 1")
