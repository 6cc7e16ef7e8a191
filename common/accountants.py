"""Accountants: what events cost together, as (epsilon, delta).

Three of them: `pld` (privacy loss distributions of dp-accounting; a fixed schedule is priced with it), `rdp`
(Rényi, of dp-accounting) and `prv` (the independent prv-accountant package) as second opinions. Schedules of nothing
but unsampled Gaussians have a closed form, which `pld` uses: Balle and Wang (2018), arXiv:1805.06530, Theorem 8.

Under `zero-out` and `add-remove` a unit contributes or does not, and the same pair of distributions dominates both.
Under `replace-one` a noise multiplier is already measured against the doubled sensitivity, see `common.events`.
"""

from __future__ import annotations

import importlib.metadata
import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, Self, TypeAlias

import numpy as np

from common.events import Composed, DiscreteGaussian, Event, Gaussian, PoissonComposed, PoissonGaussian, Repeated
from common.privacy import Adjacency

__all__ = [
    "Accountant",
    "Events",
    "accountant_version",
    "attack_rate",
    "bisect",
    "curve",
    "delta_of",
    "epsilon_of",
    "equivalent_mu",
    "group_epsilon",
    "is_unsampled_gaussian",
    "renyi_divergences",
    "renyi_epsilon",
]

Accountant: TypeAlias = Literal["pld", "rdp", "prv"]
Events: TypeAlias = Event | Iterable[Event]

PRV_EPSILON_ERROR = 0.01
FALSE_POSITIVE_RATE = 0.01


@dataclass(frozen=True)
class _Schedule:
    """Events, counted by kind; equal schedules are equal however they were written.

    Attributes:
        precision: Sum of z^-2 over unsampled Gaussian releases; all of them are one of multiplier precision^(-1/2).
        sampled: (rate, multiplier, count), sorted.
        discrete: (scale, sensitivity, count), sorted.
    """

    precision: float
    sampled: tuple[tuple[float, float, int], ...]
    discrete: tuple[tuple[float, int, int], ...]

    @classmethod
    def of(cls, events: Events) -> Self:
        gaussians: Counter[float] = Counter()
        sampled: Counter[tuple[float, float]] = Counter()
        discrete: Counter[tuple[float, int]] = Counter()

        def count(event: Event, times: int) -> None:
            match event:
                case Gaussian():
                    gaussians[float(event.noise_multiplier)] += times
                case PoissonGaussian() | PoissonComposed():
                    if event.sampling_rate == 1.0:
                        gaussians[float(event.noise_multiplier)] += times
                    else:
                        sampled[float(event.sampling_rate), float(event.noise_multiplier)] += times
                case DiscreteGaussian():
                    discrete[float(event.scale), event.sensitivity] += times
                case Repeated():
                    count(event.event, times * event.count)
                case Composed():
                    for part in event.events:
                        count(part, times)

        for event in events if isinstance(events, Iterable) else (events,):
            count(event, 1)
        precision = math.fsum(times / z**2 if z else math.inf for z, times in gaussians.items())
        return cls(
            precision,
            tuple(sorted((rate, z, times) for (rate, z), times in sampled.items())),
            tuple(sorted((scale, moved, times) for (scale, moved), times in discrete.items())),
        )

    @property
    def is_noiseless(self) -> bool:
        return (
            math.isinf(self.precision)
            or any(z == 0 for _, z, _ in self.sampled)
            or any(scale == 0 for scale, _, _ in self.discrete)
        )

    @property
    def is_empty(self) -> bool:
        return self.precision == 0 and not self.sampled and not self.discrete

    @property
    def is_gaussian(self) -> bool:
        return not self.sampled and not self.discrete


def epsilon_of(
    events: Events, delta: float, accountant: Accountant = "pld", adjacency: Adjacency = Adjacency.ZERO_OUT
) -> float:
    """Return epsilon of all `events` together at `delta`; infinite where any of them had no noise.

    Args:
        events: One event or several, on the same data. What came from one cohort is one event.
        delta: Failure probability.
        accountant: `pld` for claims; `rdp` and `prv` are second opinions, upper bounds both.
        adjacency: The one that the events' noise multipliers were measured under.

    Raises:
        ValueError: A delta outside (0, 1), or events that this accountant cannot price under this adjacency.
    """
    _check(delta)
    schedule = _Schedule.of(events)
    adjacency = Adjacency(adjacency)
    if accountant not in ("pld", "rdp", "prv"):
        raise ValueError("an accountant is pld, rdp or prv")
    if schedule.is_empty:
        return 0.0
    if schedule.is_noiseless:
        return math.inf
    priced = {"pld": _pld_epsilon, "rdp": _rdp_epsilon, "prv": _prv_epsilon}[accountant]
    return max(0.0, priced(schedule, delta, adjacency))


def is_unsampled_gaussian(events: Events) -> bool:
    """Return whether `events` are nothing but Gaussian noise on values that every unit may have moved."""
    return _Schedule.of(events).is_gaussian


def delta_of(events: Events, epsilon: float, adjacency: Adjacency = Adjacency.ZERO_OUT) -> float:
    """Return delta of all `events` together at `epsilon`, by privacy loss distributions.

    Raises:
        ValueError: A negative epsilon, or events without a price under this adjacency.
    """
    if math.isnan(epsilon) or epsilon < 0:
        raise ValueError("epsilon is not negative")
    schedule = _Schedule.of(events)
    if schedule.is_empty:
        return 0.0
    if schedule.is_noiseless:
        return 1.0
    return float(_deltas(schedule, Adjacency(adjacency), [epsilon])[0])


def curve(
    events: Events, deltas: Iterable[float], adjacency: Adjacency = Adjacency.ZERO_OUT
) -> tuple[tuple[float, float], ...]:
    """Return (delta, epsilon) for each of `deltas`: the whole guarantee rather than one point of it."""
    listed = (events,) if not isinstance(events, Iterable) else tuple(events)
    return tuple((delta, epsilon_of(listed, delta, "pld", adjacency)) for delta in deltas)


def _check(delta: float) -> None:
    if not 0.0 < delta < 1.0:
        raise ValueError("delta is between 0 and 1")


# Privacy loss distributions


@lru_cache(maxsize=1024)
def _pld_epsilon(schedule: _Schedule, delta: float, adjacency: Adjacency) -> float:
    if schedule.is_gaussian:
        return _gaussian_epsilon(math.sqrt(schedule.precision), delta)
    return float(_loss_distribution(schedule, adjacency).get_epsilon_for_delta(delta))


def _deltas(schedule: _Schedule, adjacency: Adjacency, epsilons: Sequence[float]) -> np.ndarray[Any, Any]:
    if schedule.is_gaussian:
        mu = math.sqrt(schedule.precision)
        return np.array([_gaussian_delta(mu, epsilon) for epsilon in epsilons])
    found = _loss_distribution(schedule, adjacency).get_delta_for_epsilon(list(epsilons))
    return np.clip(np.asarray(found, dtype=np.float64), 0.0, 1.0)


@lru_cache(maxsize=8)
def _loss_distribution(schedule: _Schedule, adjacency: Adjacency) -> Any:
    """Return the privacy loss distribution of a schedule as an object of dp-accounting."""
    from dp_accounting import NeighboringRelation
    from dp_accounting.pld import privacy_loss_distribution as pld

    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    if adjacency is Adjacency.REPLACE_ONE:
        # dp-accounting measures noise against the clip norm and doubles the sensitivity itself.
        relation = NeighboringRelation.REPLACE_ONE
        schedule = replace(schedule, sampled=tuple((rate, 2.0 * z, count) for rate, z, count in schedule.sampled))
    interval = _grid(schedule)
    parts: list[Any] = []
    for rate, multiplier, count in schedule.sampled:
        one = pld.from_gaussian_mechanism(
            multiplier,
            value_discretization_interval=interval,
            sampling_prob=rate,
            neighboring_relation=relation,
        )
        parts.append(one.self_compose(count))
    for scale, sensitivity, count in schedule.discrete:
        one = pld.from_discrete_gaussian_mechanism(
            scale, sensitivity=sensitivity, value_discretization_interval=interval
        )
        parts.append(one.self_compose(count))
    if schedule.precision:
        parts.append(pld.from_gaussian_mechanism(schedule.precision**-0.5, value_discretization_interval=interval))
    whole = parts[0]
    for part in parts[1:]:
        whole = whole.compose(part)
    return whole


def _grid(schedule: _Schedule) -> float:
    """Return the grid of the loss, a fraction of what the smallest step typically loses.

    Rounding is pessimistic at any grid. Spreading a loss over two points of the grid adds at most a quarter of its
    square to the variance: at 0.08 of the standard deviation that is 0.2 % of it, and so less than 0.2 % of epsilon.
    """
    interval = 1e-2
    if schedule.precision:
        interval = min(interval, 0.08 * math.sqrt(schedule.precision))
    for rate, multiplier, _ in schedule.sampled:
        # Standard deviation of one step's loss, to first order in the rate.
        spread = min(rate * math.sqrt(math.expm1(min(multiplier**-2, 50.0))), 1.0 / multiplier)
        interval = min(interval, 0.08 * spread)
    for scale, sensitivity, _ in schedule.discrete:
        # Losses of a discrete release lie on a lattice; each is rounded up to the grid.
        interval = min(interval, 0.02 * sensitivity / scale)
    rough = _renyi_epsilon(schedule, 1e-6)
    return max(interval, 1e-5, rough / 2e4)


# The Gaussian mechanism in closed form


def _gaussian_delta(mu: float, epsilon: float) -> float:
    """Return delta of the Gaussian mechanism with sensitivity over standard deviation `mu`."""
    from scipy.special import log_ndtr

    if math.isinf(epsilon):
        return 0.0
    gained = math.exp(float(log_ndtr(mu / 2.0 - epsilon / mu)))
    return max(0.0, gained - math.exp(epsilon + float(log_ndtr(-mu / 2.0 - epsilon / mu))))


def _gaussian_epsilon(mu: float, delta: float) -> float:
    """Return epsilon of the Gaussian mechanism with sensitivity over standard deviation `mu`, rounded up."""
    if _gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    high = 1.0
    while _gaussian_delta(mu, high) > delta:
        high *= 2.0
    return bisect(lambda epsilon: _gaussian_delta(mu, epsilon) <= delta, 0.0, high)


def equivalent_mu(epsilon: float, delta: float) -> float:
    """Return mu of the Gaussian mechanism that has exactly `epsilon` at `delta`: a reading, not a composition rule.

    Source: Dong, Roth and Su (2022), arXiv:1905.02383, Corollary 1.
    """
    _check(delta)
    if math.isinf(epsilon):
        return math.inf
    high = 1.0
    while _gaussian_delta(high, epsilon) <= delta:
        high *= 2.0
    return bisect(lambda mu: _gaussian_delta(mu, epsilon) > delta, 0.0, high)


def bisect(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return the smallest float above `low` at which `holds`, which fails below it; `high` holds."""
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if holds(middle):
            high = middle
        else:
            low = middle
    return high


# Rényi divergences

RENYI_ORDERS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64, 96, 128, 256, 512)


def renyi_divergences(events: Events, orders: Sequence[int] = RENYI_ORDERS) -> tuple[float, ...]:
    """Return the Rényi divergence of all `events` together at each of `orders`, whole numbers above 1.

    Holds under zero-out and add-remove; unsampled events under replace-one too.

    Source: Mironov, Talwar and Zhang (2019), arXiv:1908.10530, section 3.3; discrete Gaussian by Canonne, Kamath and
    Steinke (2020), arXiv:2004.00010, Theorem 4.
    """
    return _renyi(_Schedule.of(events), tuple(orders))


@lru_cache(maxsize=4096)
def _renyi_step(rate: float, multiplier: float, order: int) -> float:
    terms = [
        math.lgamma(order + 1)
        - math.lgamma(k + 1)
        - math.lgamma(order - k + 1)
        + (order - k) * math.log1p(-rate)
        + k * math.log(rate)
        + k * (k - 1) / (2.0 * multiplier**2)
        for k in range(order + 1)
    ]
    peak = max(terms)
    return max(0.0, peak + math.log(math.fsum(math.exp(term - peak) for term in terms))) / (order - 1)


def _renyi(schedule: _Schedule, orders: tuple[int, ...]) -> tuple[float, ...]:
    if any(type(order) is not int or order < 2 for order in orders):
        raise ValueError("the orders are whole numbers above 1")
    if schedule.is_noiseless:
        return (math.inf,) * len(orders)
    precision = schedule.precision + math.fsum(n * moved**2 / scale**2 for scale, moved, n in schedule.discrete)
    return tuple(
        order * precision / 2.0 + math.fsum(n * _renyi_step(rate, z, order) for rate, z, n in schedule.sampled)
        for order in orders
    )


def renyi_epsilon(events: Events, delta: float) -> float:
    """Return a quick upper bound on epsilon, looser than `epsilon_of`, in a thousandth of its time.

    Source: Mironov (2017), arXiv:1702.07476, Proposition 3.
    """
    return _renyi_epsilon(_Schedule.of(events), delta)


def _renyi_epsilon(schedule: _Schedule, delta: float) -> float:
    by_order = zip(RENYI_ORDERS, _renyi(schedule, RENYI_ORDERS), strict=True)
    return min(divergence + math.log(1.0 / delta) / (order - 1) for order, divergence in by_order)


@lru_cache(maxsize=256)
def _rdp_epsilon(schedule: _Schedule, delta: float, adjacency: Adjacency) -> float:
    """Return epsilon by the accountant of dp-accounting, which shares no code with the above."""
    from dp_accounting.rdp import RdpAccountant

    if adjacency is Adjacency.REPLACE_ONE and schedule.sampled:
        raise ValueError("rdp has no price for Poisson sampling under replace-one; use pld")
    accountant = RdpAccountant()
    with _quiet():
        _compose(accountant, schedule)
    return float(accountant.get_epsilon(delta))


def _compose(accountant: Any, schedule: _Schedule) -> None:
    import dp_accounting

    for rate, multiplier, count in schedule.sampled:
        one = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
        accountant.compose(one, count)
    precision = schedule.precision + math.fsum(n * moved**2 / scale**2 for scale, moved, n in schedule.discrete)
    if precision:
        accountant.compose(dp_accounting.GaussianDpEvent(precision**-0.5))


@contextmanager
def _quiet() -> Generator[None]:
    """Keep dp-accounting from logging each order that it leaves out of its minimum."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=256)
def _prv_epsilon(schedule: _Schedule, delta: float, adjacency: Adjacency) -> float:
    """Return the upper end of prv-accountant's interval: Gopi, Lee and Wutschitz (2021), arXiv:2106.02848."""
    if schedule.discrete:
        raise ValueError("prv has no price for discrete noise; use pld or rdp")
    if adjacency is Adjacency.REPLACE_ONE and schedule.sampled:
        raise ValueError("prv has no price for Poisson sampling under replace-one; use pld")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from prv_accountant import PRVAccountant
            from prv_accountant.privacy_random_variables import GaussianMechanism, PoissonSubsampledGaussianMechanism
    except ImportError:
        raise ValueError("the package prv-accountant is not installed; use pld or rdp") from None
    steps: list[Any] = [PoissonSubsampledGaussianMechanism(rate, z) for rate, z, _ in schedule.sampled]
    counts = [count for _, _, count in schedule.sampled]
    if schedule.precision:
        steps.append(GaussianMechanism(schedule.precision**-0.5))
        counts.append(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            accountant = PRVAccountant(
                prvs=steps, eps_error=PRV_EPSILON_ERROR, delta_error=delta / 1000, max_self_compositions=counts
            )
            _, _, upper = accountant.compute_epsilon(delta, counts)
    except (ArithmeticError, MemoryError, RuntimeError, ValueError) as error:
        raise ValueError(f"prv cannot price this schedule ({type(error).__name__}); use pld or rdp") from None
    if not math.isfinite(upper):
        raise ValueError("prv cannot price this schedule; use pld or rdp")
    return float(upper)


def accountant_version(accountant: Accountant) -> str:
    """Return what stands in a statement, such as `pld (dp-accounting 0.6.0)`."""
    package = "prv-accountant" if accountant == "prv" else "dp-accounting"
    return f"{accountant} ({package} {importlib.metadata.version(package)})"


# Readings of a guarantee


def group_epsilon(events: Events, delta: float, group_size: int) -> float:
    """Return epsilon for a user with `group_size` records, where the events hide one record, under add-remove.

    Each record comes into a batch by its own coin, so the user contributes a binomial number of clipped gradients.

    Source: dp-accounting's mixture of Gaussians; Choquette-Choo et al. (2024), arXiv:2401.10294.

    Raises:
        ValueError: A group that is not a positive whole number, or discrete events.
    """
    _check(delta)
    if type(group_size) is not int or not 1 <= group_size <= 100_000:
        raise ValueError("a group has between 1 and 100,000 records")
    schedule = _Schedule.of(events)
    if schedule.discrete:
        raise ValueError("discrete events have no group reading")
    if schedule.is_empty:
        return 0.0
    if schedule.is_noiseless:
        return math.inf
    if group_size == 1 or schedule.is_gaussian:
        return _pld_epsilon(
            replace(schedule, precision=schedule.precision * group_size**2), delta, Adjacency.ADD_REMOVE
        )
    return _group_epsilon(schedule, delta, group_size)


@lru_cache(maxsize=64)
def _group_epsilon(schedule: _Schedule, delta: float, group_size: int) -> float:
    from dp_accounting.pld import privacy_loss_distribution as pld
    from scipy.stats import binom

    # The losses of a group are about as many times larger as it has members, and so is the grid.
    interval = _grid(schedule) * group_size
    whole: Any = None
    for rate, multiplier, count in schedule.sampled:
        chances = binom.pmf(np.arange(group_size + 1), group_size, rate)
        likely = np.flatnonzero(chances > 1e-40)  # what is left out could not move any delta by 1e-30
        kept = chances[likely]
        one = pld.from_mixture_gaussian_mechanism(
            multiplier,
            sensitivities=[float(index) for index in likely],
            sampling_probs=[float(chance) for chance in kept / kept.sum()],
            value_discretization_interval=interval,
        ).self_compose(count)
        whole = one if whole is None else whole.compose(one)
    if schedule.precision:
        whole = whole.compose(
            pld.from_gaussian_mechanism(schedule.precision**-0.5 / group_size, value_discretization_interval=interval)
        )
    return float(whole.get_epsilon_for_delta(delta))


def attack_rate(
    events: Events, false_positive_rate: float = FALSE_POSITIVE_RATE, adjacency: Adjacency = Adjacency.ZERO_OUT
) -> float:
    """Return the largest true positive rate that any test for one unit's presence can have.

    Source: Kairouz, Oh and Viswanath (2015), arXiv:1311.0776, Theorem 2.1, at every epsilon of the curve.
    """
    alpha = false_positive_rate
    if not 0.0 < alpha < 1.0:
        raise ValueError("a false positive rate is between 0 and 1")
    schedule = _Schedule.of(events)
    if schedule.is_empty:
        return alpha
    if schedule.is_noiseless:
        return 1.0
    # Beyond 700 exp() ends, and a test that finds everybody has long been possible.
    highest = min(_pld_epsilon(schedule, 1e-9, Adjacency(adjacency)), 700.0)
    epsilons = np.concatenate([[0.0], np.geomspace(1e-3, max(highest, 2e-3), 400)])
    deltas = _deltas(schedule, Adjacency(adjacency), [float(epsilon) for epsilon in epsilons])
    with np.errstate(over="ignore"):
        rates = np.minimum(np.exp(epsilons) * alpha + deltas, 1.0 - np.exp(-epsilons) * (1.0 - deltas - alpha))
    return float(np.clip(rates.min(), alpha, 1.0))
