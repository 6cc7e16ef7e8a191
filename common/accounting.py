"""What releases cost and how much noise a budget buys: the part of the accounting that others call.

The pieces are `common.events` (what can be released), `common.accountants` (what that costs), `common.claims` (what
may be said about it) and `common.budget` (what is left). Their names that a caller needs are offered here too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache

from common.accountants import (
    Accountant,
    Events,
    accountant_version,
    attack_rate,
    curve,
    delta_of,
    epsilon_of,
    equivalent_mu,
    group_epsilon,
    renyi_epsilon,
)
from common.budget import Budget, Filter, Reservation
from common.claims import ASSUMPTIONS, NOT_COVERED, Statement, check_claim, default_delta
from common.events import (
    Composed,
    DiscreteGaussian,
    Event,
    Gaussian,
    PoissonComposed,
    PoissonGaussian,
    Repeated,
    event_from_json,
)
from common.privacy import Adjacency, Unit

__all__ = [
    "Accountant",
    "Budget",
    "Composed",
    "DiscreteGaussian",
    "Event",
    "Filter",
    "Gaussian",
    "PoissonComposed",
    "PoissonGaussian",
    "Repeated",
    "Reservation",
    "Statement",
    "attack_rate",
    "calibrate",
    "check_claim",
    "curve",
    "default_delta",
    "delta_of",
    "epsilon_of",
    "equivalent_mu",
    "event_from_json",
    "group_epsilon",
    "make_statement",
]


def calibrate(
    *,
    epsilon: float,
    delta: float,
    rounds: int,
    sampling_rate: float = 1.0,
    unit: Unit = Unit.USER,
    adjacency: Adjacency = Adjacency.ZERO_OUT,
) -> float:
    """Return the least noise multiplier with which `rounds` releases cost at most `epsilon` at `delta`.

    Args:
        epsilon: The budget; infinite asks for no noise.
        delta: Failure probability.
        rounds: Releases, spare ones included; for unit example, all steps of all rounds.
        sampling_rate: Rate of the Poisson cohorts; 1 claims no amplification.
        unit: Whose contribution the sensitivity is about; it does not change the number, only what it means.
        adjacency: What the sensitivity is measured under: the noise is the multiplier times that sensitivity.

    Returns:
        A multiplier within 0.1 % in epsilon of the least one.

    Guarantee: `epsilon_of(Repeated(PoissonGaussian(sampling_rate, multiplier), rounds), delta)` is never above
    `epsilon`.

    Raises:
        ValueError: A budget that is not positive, a rate outside (0, 1], or one that no noise can meet.
    """
    Unit(unit)
    adjacency = Adjacency(adjacency)
    if not 0.0 < delta < 1.0:
        raise ValueError("delta is between 0 and 1")
    if math.isnan(epsilon) or epsilon <= 0:
        raise ValueError("a privacy budget is positive")
    PoissonGaussian(sampling_rate, 1.0)
    if math.isinf(epsilon):
        return 0.0
    return _calibrated(
        float(epsilon), float(delta), int(Repeated(Gaussian(1.0), rounds).count), sampling_rate, adjacency
    )


@lru_cache(maxsize=256)
def _calibrated(epsilon: float, delta: float, rounds: int, rate: float, adjacency: Adjacency) -> float:
    unsampled = math.sqrt(rounds) / equivalent_mu(epsilon, delta)

    def price(multiplier: float) -> float:
        return epsilon_of(Repeated(PoissonGaussian(rate, multiplier), rounds), delta, "pld", adjacency)

    # Without amplification is enough noise: the search starts there and at what the Rényi bound allows.
    high = _at_most_limit(unsampled * (1.0 + 1e-9))
    if rate == 1.0:
        while price(high) > epsilon:
            high = _at_most_limit(high * (1.0 + 1e-12))
        return high
    if adjacency is not Adjacency.REPLACE_ONE:
        high = min(
            high,
            _bisect_loosely(
                lambda z: renyi_epsilon(Repeated(PoissonGaussian(rate, z), rounds), delta) <= epsilon, high
            ),
        )
    cost_high = price(high)
    while cost_high > epsilon:
        high = _at_most_limit(high * 1.05)
        cost_high = price(high)
    low, cost_low = high, cost_high
    while cost_low <= epsilon:
        high, cost_high = low, cost_low
        low = high / (1.15 if cost_low > 0.5 * epsilon else 1.5)
        if low < 2e-4:
            return high
        cost_low = price(low)
    while cost_high < epsilon * (1.0 - 1e-3) and high / low > 1.0 + 1e-6:
        # Log epsilon is close to linear in log multiplier; aim a little to the safe side, inside the bracket.
        slope = math.log(cost_low / max(cost_high, 1e-12)) / math.log(low / high)
        guess = high * math.exp((math.log(epsilon * (1.0 - 3e-4)) - math.log(max(cost_high, 1e-12))) / slope)
        middle = min(max(guess, low + 0.02 * (high - low)), high - 0.02 * (high - low))
        cost = price(middle)
        if cost <= epsilon:
            high, cost_high = middle, cost
        else:
            low, cost_low = middle, cost
    return high


def _at_most_limit(multiplier: float) -> float:
    if multiplier > 1e6:
        raise ValueError("no noise meets this budget; raise epsilon or delta")
    return max(multiplier, 1e-4)


def _bisect_loosely(holds: Callable[[float], bool], high: float) -> float:
    """Return a value within 1 % of the least positive one at which `holds`; `high` is returned if it does not."""
    if not holds(high):
        return high
    low = high
    while holds(low) and low > 1e-3:
        high, low = low, low / 2.0
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def make_statement(
    events: Events,
    *,
    delta: float,
    unit: Unit,
    adjacency: Adjacency,
    mechanism: str,
    sampling: str,
    trust: str,
    population: int,
    covered: tuple[str, ...] = ("the shared updates",),
    not_covered: tuple[str, ...] = NOT_COVERED,
    assumptions: tuple[str, ...] = ASSUMPTIONS,
    second: Accountant | None = "rdp",
    records_per_user: int | None = None,
    rehearsal: bool = False,
    extrapolated_population: int | None = None,
) -> Statement:
    """Price `events` with two accountants and return the statement about them.

    Args:
        events: Everything that was released, or that is reserved.
        delta: Failure probability.
        unit: Whose presence is hidden.
        adjacency: What neighbouring data sets differ in.
        mechanism: What was clipped and noised, in words.
        sampling: What is assumed about who took part, in words.
        trust: Who sees updates without noise, in words.
        population: Units in the data set.
        covered: What the guarantee covers.
        not_covered: What it does not.
        assumptions: What it rests on beyond the mechanism.
        second: Accountant of the second opinion, left out where it has no price for these events.
        records_per_user: For unit example: adds the reading for a user with this many records.
        rehearsal: Whether noise or cohorts came from a seed.
        extrapolated_population: Units that the noise was scaled for, where it was.
    """
    listed = (events,) if not isinstance(events, Iterable) else tuple(events)
    epsilon = epsilon_of(listed, delta, "pld", adjacency)
    opinion: tuple[str, float] | None = None
    if second is not None and math.isfinite(epsilon):
        try:
            opinion = (accountant_version(second), epsilon_of(listed, delta, second, adjacency))
        except ValueError:
            opinion = None
    group: tuple[int, float] | None = None
    if records_per_user is not None and Unit(unit) is Unit.EXAMPLE:
        group = (records_per_user, group_epsilon(listed, delta, records_per_user))
    return Statement(
        epsilon=epsilon,
        delta=delta,
        unit=unit,
        adjacency=adjacency,
        mechanism=mechanism,
        sampling=sampling,
        trust=trust,
        accountant=accountant_version("pld"),
        population=population,
        covered=covered,
        not_covered=not_covered,
        assumptions=assumptions,
        second_opinion=opinion,
        group=group,
        equivalent_mu=equivalent_mu(epsilon, delta),
        attack_rate=attack_rate(listed, adjacency=adjacency),
        rehearsal=rehearsal,
        extrapolated_population=extrapolated_population,
    )
