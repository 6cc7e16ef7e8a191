"""Who masks with whom: in a small cohort everybody with everybody, in a large one whom each device draws for itself.

Every device draws its own *holders*, who get shares of its secrets and mask with it. A coordinator that chose the
graph, or could foresee it, would surround its victim with devices of its own. What the coordinator may still choose,
after it has seen the graph, is who counts as dropped, up to the threshold.

Source: Bell et al. (2020), "Secure single-server aggregation with (poly)logarithmic overhead", section 4: one graph
for masks and for shares. The bounds below are ours, since whom a device draws is its own choice here.

Notation: n devices with keys; c of them collude with the coordinator, a set that was fixed before the draws; T are
needed for anything (`needed`); each of the h = n - c honest ones has k holders beside itself and shares with
threshold t = `needed(k + 1)`.

Proof sketch of `isolation_risk`. Let S be honest survivors whose part of the sum can be told from that of the other
honest survivors R. Then (a) no member of S drew a member of R: it would have masked with a seed that nobody reveals,
and the coordinator cannot make it forget whom it drew; (b) every member of S got its self mask revealed, so at least
t - 1 of its holders are in S or collude. Draws are uniform and independent of each other, so for given S and R the
probability is at most min(p_s, q_r)^s, with p_s = P[Hypergeometric(n - 1, s - 1 + c, k) >= t - 1] and
q_r = (1 - r / (n - 1))^k. The coordinator picks S and R after the draws, so a union bound is taken over all sets of
s honest devices, and over all R that go with each. There are at least T - c honest survivors, so r >= T - c - s.
Test: `test_the_bound_is_above_what_an_attacker_finds_in_small_graphs`.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

__all__ = ["FULL_GRAPH", "MAX_COHORT", "honest_survivors", "isolation_risk", "needed", "neighbours"]

MAX_COHORT = 2000
"""Devices in one round at most; more take several sums."""

FULL_GRAPH = 128
"""Up to this many devices everybody masks with everybody, and nothing is left to chance."""

LARGEST_RISK = 2.0**-40
"""Largest chance per round that some group could be told apart, in a graph that is not full."""

EXPECTED_DROPOUT = 0.15
LARGEST_ABORT = 1e-2
"""With this share of devices dropping out at random, a round fails at most this often for want of shares."""


def needed(devices: int, threshold: Fraction) -> int:
    """Return how many of `devices` are needed: at least the share `threshold`, and always more than half."""
    return max(devices // 2 + 1, math.ceil(threshold * devices))


def honest_survivors(devices: int, threshold: Fraction, corrupt: Fraction) -> int:
    """Return the fewest honest devices in any sum that can be learned from a round of `devices`.

    Args:
        devices: Devices with keys in the round.
        threshold: Share of them that is needed.
        corrupt: Share of them that may collude with the coordinator.

    Guarantee: with at most `corrupt` colluding, every sum the coordinator can compute has at least this many honest
    contributions; always in a full graph, else but for `LARGEST_RISK`.
    """
    fewest = needed(devices, threshold) - math.floor(corrupt * devices)
    return max(0, fewest - _slack(devices))


def _slack(devices: int) -> int:
    # In a graph with gaps a coordinator can cut off a few devices by dropping all their neighbours; the rest of the
    # sum then lacks their noise.
    return 0 if devices <= FULL_GRAPH else math.ceil(devices / 50)


@lru_cache(maxsize=256)
def neighbours(devices: int, threshold: Fraction, corrupt: Fraction) -> int:
    """Return how many holders each device draws beside itself.

    Raises:
        ValueError: More devices than one round takes, or a threshold that this share of colluding devices defeats.
    """
    if not 1 <= devices <= MAX_COHORT:
        raise ValueError(f"a round has between 1 and {MAX_COHORT} devices")
    if not Fraction(1, 2) < threshold <= 1 or not 0 <= corrupt < 2 * threshold - 1:
        raise ValueError("the threshold is above one half, by more than half the share that may collude")
    if devices <= FULL_GRAPH:
        return devices - 1
    low, high = 1, devices - 1
    while low < high:
        middle = (low + high) // 2
        if _suffices(devices, middle, threshold, corrupt):
            high = middle
        else:
            low = middle + 1
    return high


def _suffices(devices: int, degree: int, threshold: Fraction, corrupt: Fraction) -> bool:
    if degree == devices - 1:
        return True
    logs = _log_factorials(devices)
    dropped = math.floor(EXPECTED_DROPOUT * devices)
    spare = degree + 1 - needed(degree + 1, threshold)
    abort = devices * math.exp(float(_log_tail(logs, devices - 1, np.array([dropped]), degree, spare + 1)[0]))
    return abort <= LARGEST_ABORT and isolation_risk(devices, degree, threshold, corrupt) <= LARGEST_RISK


def isolation_risk(devices: int, degree: int, threshold: Fraction, corrupt: Fraction) -> float:
    """Return a bound on the chance that fewer than `honest_survivors` can be told apart in a graph of this degree.

    Covers as well that the colluding holders of one honest device alone could join one of its secrets.
    """
    logs = _log_factorials(devices)
    colluding = math.floor(corrupt * devices)
    honest = devices - colluding
    holders = needed(degree + 1, threshold)
    survivors = needed(devices, threshold) - colluding
    sizes = np.arange(1, max(2, survivors - _slack(devices)))
    members = _log_tail(logs, devices - 1, sizes - 1 + colluding, degree, holders - 1)
    total = float(np.exp(min(0.0, math.log(2 * honest) + float(members[0]))))
    for size, inside in zip(sizes.tolist(), members.tolist(), strict=True):
        if size > honest:
            break
        if inside == -math.inf:
            continue
        alone = _log_choose(logs, honest, size) + size * inside
        others = np.arange(max(1, survivors - size), honest - size + 1)
        split = math.inf
        if others.size:
            cut = degree * np.log1p(-np.minimum(others, devices - 1.5) / (devices - 1))
            terms = logs[honest - size] - logs[others] - logs[honest - size - others]
            terms = terms + _log_choose(logs, honest, size) + size * np.minimum(inside, cut)
            peak = float(terms.max())
            split = peak + math.log(float(np.exp(terms - peak).sum()))
        total += math.exp(min(0.0, alone, split))
    return min(1.0, total)


@lru_cache(maxsize=8)
def _log_factorials(largest: int) -> NDArray[np.float64]:
    """Return log(i!) for i from 0 to `largest`."""
    return np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, largest + 1)))])


def _log_choose(logs: NDArray[np.float64], whole: int, part: int) -> float:
    return float(logs[whole] - logs[part] - logs[whole - part])


def _log_tail(
    logs: NDArray[np.float64], whole: int, marked: NDArray[np.int64], drawn: int, least: int
) -> NDArray[np.float64]:
    """Return log P[Hypergeometric(whole, marked, drawn) >= least] for each of `marked`."""
    if least <= 0:
        return np.zeros(marked.shape)
    counts = np.arange(least, drawn + 1)[np.newaxis, :]
    marks = np.minimum(marked, whole)[:, np.newaxis]
    possible = (counts <= marks) & (drawn - counts <= whole - marks)
    inside = np.where(possible, counts, 0)
    rest = np.where(possible, drawn - counts, 0)
    terms = logs[marks] - logs[inside] - logs[np.maximum(marks - inside, 0)]
    terms = terms + logs[whole - marks] - logs[rest] - logs[np.maximum(whole - marks - rest, 0)]
    terms = np.where(possible, terms - (logs[whole] - logs[drawn] - logs[whole - drawn]), -np.inf)
    peak = terms.max(axis=1, initial=-np.inf, keepdims=True)
    safe = np.where(np.isfinite(peak), peak, 0.0)
    with np.errstate(divide="ignore"):
        return np.minimum(0.0, (safe + np.log(np.exp(terms - safe).sum(axis=1, keepdims=True)))[:, 0])
