"""The planner: before anything is trained or spent, what a budget buys, and what would work instead.

It compares two lengths. The noise on the mean update has a known one. What the users agree on is not known before
training; it is *assumed* to be a stated share of the clip norm (`signal_share`), and the assumption is printed with
the verdict. Signal adds up over rounds, independent noise only by the square root of their number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from common.accounting import PoissonGaussian, Repeated, calibrate, default_delta, epsilon_of
from common.privacy import Adjacency, Unit
from common.rounds_left import rounds_left, weeks_left
from common.sum_cost import SumCost
from common.traffic import Traffic

__all__ = ["Alternative", "Plan", "Shape", "plan"]

LEARNS_AT = 1.0
MAY_LEARN_AT = 0.3
"""Signal-to-noise over all rounds from which a shared adapter is expected to learn, and to learn a little.

At 1 the sum of what users agree on is as long as the sum of the noise. A rule of thumb: `homespun sim run` measures.
"""

MOST_TIMES_MORE = 1000
"""A population this many times larger is no alternative, nor is an adapter below `LEAST_DIM` values."""

LEAST_DIM = 100
MOST_EPSILON = 16.0
MAX_ROUNDS = 10**6


@dataclass(frozen=True)
class Shape:
    """What makes up the size of a shared adapter; the planner tries smaller ones.

    Attributes:
        rank: LoRA rank.
        layers: Transformer layers that carry an adapter.
        targets: Linear modules per layer that carry one.
        values_per_rank: Shared values per rank, layer and target on average; with A frozen only those of B.
    """

    rank: int
    layers: int
    targets: int
    values_per_rank: float

    def __post_init__(self) -> None:
        if min(self.rank, self.layers, self.targets) < 1 or not self.values_per_rank > 0:
            raise ValueError("a shape has at least one rank, layer, target and value")

    @property
    def dim(self) -> int:
        """Values in the shared update."""
        return max(1, round(self.rank * self.layers * self.targets * self.values_per_rank))


@dataclass(frozen=True)
class Alternative:
    """A change after which a shared adapter is expected to learn.

    Attributes:
        change: The change, in words.
        signal_to_noise: Over all rounds, after it.
    """

    change: str
    signal_to_noise: float


@dataclass(frozen=True)
class Plan:
    """What a configuration promises and what it can be expected to learn.

    Attributes:
        epsilon: Budget of the whole run.
        delta: Failure probability.
        unit: Whose presence is hidden.
        population: Users (or, for unit example, records of one party).
        cohort: Expected users per round (or records per step).
        rounds: Rounds the noise is calibrated for, spare ones included.
        dim: Values in the shared update.
        noise_multiplier: Noise standard deviation over sensitivity, sigma in many papers.
        epsilon_per_round: What one round alone would cost.
        noise_to_clip: Length of the noise on the mean update, over the clip norm.
        signal_share: Assumed length of the mean clipped update, over the clip norm.
        signal_to_noise: Per round.
        total_signal_to_noise: Over all rounds.
        verdict: `learns`, `may learn` or `will not learn`.
        alternatives: The nearest changes that would learn; empty where it learns.
        secure_sum: With distributed noise, what the sums cost and what holds against the coordinator.
        traffic: What a device moves per round, where that is known.
        rounds_left: Rounds of this noise that the budget holds, before anything is spent.
        rounds_per_week: The pace that was named.
    """

    epsilon: float
    delta: float
    unit: Unit
    population: int
    cohort: float
    rounds: int
    dim: int
    noise_multiplier: float
    epsilon_per_round: float
    noise_to_clip: float
    signal_share: float
    signal_to_noise: float
    total_signal_to_noise: float
    verdict: Literal["learns", "may learn", "will not learn"]
    alternatives: tuple[Alternative, ...]
    secure_sum: SumCost | None = None
    traffic: Traffic | None = None
    rounds_left: int = 0
    rounds_per_week: float | None = None

    @property
    def weeks_left(self) -> float | None:
        """How long `rounds_left` last at the pace that was named; None without one."""
        return weeks_left(self.rounds_left, self.rounds_per_week)

    def sentence(self) -> str:
        """Return the verdict as one plain sentence with the nearest alternatives."""
        promise = "without noise" if math.isinf(self.epsilon) else f"at epsilon {_short(self.epsilon)}"
        who = f"{self.population:,} {_plural(self.unit) if self.population != 1 else self.unit.value} {promise}"
        what = f"a shared adapter of {self.dim:,} numbers"
        if self.verdict == "learns":
            return f"{who} can be expected to learn {what}."
        verb = "may learn a little of" if self.verdict == "may learn" else "will not learn"
        others = " or ".join(alternative.change for alternative in self.alternatives)
        would = f"{others} would, or stay local" if others else "stay local: train private adapters only"
        return f"{who} {verb} {what}; {would}."

    def lines(self) -> tuple[str, ...]:
        """Return the whole plan as lines of text, the assumption included."""
        moved = () if self.traffic is None else (self.traffic.sentence(),)
        if self.noise_multiplier == 0:
            return ("no noise: no privacy claim", *moved, self.sentence())
        return (
            f"noise multiplier {self.noise_multiplier:.4g} for epsilon {_short(self.epsilon)} at delta "
            f"{self.delta:.3g} over {self.rounds} rounds; one round alone costs epsilon "
            f"{_short(self.epsilon_per_round)}",
            f"noise on the mean update is {self.noise_to_clip:.3g} times the clip norm, for {self.dim:,} values and "
            f"{self.cohort:,.0f} {_plural(self.unit)} per {'round' if self.unit is Unit.USER else 'step'}",
            f"signal-to-noise {self.signal_to_noise:.3g} per round and {self.total_signal_to_noise:.3g} over all "
            f"rounds, assuming that the mean clipped update is {self.signal_share:.0%} of the clip norm",
            *(() if self.secure_sum is None else self.secure_sum.lines()),
            *moved,
            self._left(),
            self.sentence(),
        )

    def _left(self) -> str:
        words = f"left of the budget before the first round: {self.rounds_left:,} rounds of this noise"
        if self.weeks_left is None or self.rounds_per_week is None:
            return words
        return f"{words}, which last {self.weeks_left:.1f} weeks at {self.rounds_per_week:.3g} rounds a week"

    def to_json(self) -> dict[str, Any]:
        """Return the plan as a JSON object; infinite numbers are the string `inf`."""
        apart = ("alternatives", "secure_sum", "traffic")
        named = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in apart}
        values = {
            name: "inf" if isinstance(value, float) and math.isinf(value) else value for name, value in named.items()
        }
        others = [{"change": other.change, "signal_to_noise": other.signal_to_noise} for other in self.alternatives]
        sums = {} if self.secure_sum is None else {"secure_sum": self.secure_sum.to_json()}
        moved = {} if self.traffic is None else {"traffic": asdict(self.traffic)}
        values["weeks_left"] = self.weeks_left
        return {**values, "alternatives": others, "sentence": self.sentence(), **sums, **moved}


@dataclass(frozen=True)
class _Setting:
    """One point of the search; everything that the signal-to-noise depends on."""

    dim: int
    population: int
    rate: float
    rounds: int
    spare_rounds: int
    epsilon: float
    delta: float | None
    unit: Unit
    noise: Literal["central", "local", "distributed"]
    parties: int
    signal_share: float
    excess: float
    floor: float

    @property
    def cohort(self) -> float:
        return self.rate * self.population

    @property
    def adjacency(self) -> Adjacency:
        if self.unit is Unit.EXAMPLE:
            return Adjacency.ADD_REMOVE
        return Adjacency.REPLACE_ONE if self.noise == "local" else Adjacency.ZERO_OUT

    @property
    def claimed_delta(self) -> float:
        return default_delta(self.population) if self.delta is None else self.delta

    @property
    def priced_rate(self) -> float:
        """The rate the accountant is given: noise that each device adds itself is not amplified."""
        return 1.0 if self.unit is Unit.USER and self.noise == "local" else self.rate

    def noise_multiplier(self) -> float:
        return calibrate(
            epsilon=self.epsilon,
            delta=self.claimed_delta,
            rounds=self.rounds + self.spare_rounds,
            sampling_rate=self.priced_rate,
            unit=self.unit,
            adjacency=self.adjacency,
        )

    def noise_to_clip(self, multiplier: float) -> float:
        length = multiplier * math.sqrt(self.dim)
        if self.unit is Unit.EXAMPLE:  # each party noises the sum over its own batch; parties average out
            return length / self.cohort / math.sqrt(self.parties)
        if self.noise == "local":  # sensitivity 2C, and independent noise from each of the cohort
            return 2.0 * self.excess * length / math.sqrt(self.cohort)
        return max(self.excess * length, self.floor * math.sqrt(self.dim)) / self.cohort

    def total(self, multiplier: float) -> float:
        noise = self.noise_to_clip(multiplier)
        return math.inf if noise == 0 else self.signal_share / noise * math.sqrt(self.rounds)

    def epsilon_to_learn(self) -> float:
        """Return what the run would cost with the most noise under which it still learns: one price, no search."""
        most = replace(self, floor=0.0).total(1.0) / LEARNS_AT
        if most < 1e-4 or self.total(1e-4) < LEARNS_AT:  # or with the coordinator's noise alone it does not
            return math.inf
        schedule = Repeated(PoissonGaussian(self.priced_rate, min(most, 1e6)), self.rounds + self.spare_rounds)
        return epsilon_of(schedule, self.claimed_delta, "pld", self.adjacency)

    def learns(self) -> bool:
        return self.epsilon_to_learn() <= self.epsilon


def plan(
    *,
    dim: int,
    population: int,
    cohort: float,
    rounds: int,
    epsilon: float,
    delta: float | None = None,
    unit: Unit = Unit.USER,
    noise: Literal["central", "local", "distributed"] = "central",
    excess: float = 1.0,
    floor: float = 0.0,
    spare_rounds: int = 0,
    signal_share: float = 0.25,
    shape: Shape | None = None,
    parties: int = 1,
    steps_per_round: int = 1,
    rounds_per_week: float | None = None,
) -> Plan:
    """Say what a budget buys and whether the shared adapter can be expected to learn; trains nothing.

    Args:
        dim: Values in the shared update.
        population: Users; for unit example the records of the smallest party.
        cohort: Expected users per round; for unit example expected records per step.
        rounds: Rounds that train; for unit example all steps of all rounds.
        epsilon: Budget of the whole run; infinite asks for no noise.
        delta: Failure probability; `default_delta(population)` when absent.
        unit: Whose presence is hidden.
        noise: Who adds it: the server on the sum, each device on its own update, or each device a share.
        excess: Noise on the update over what the multiplier says: counts beside it take a part of its norm; with
            distributed noise also rounding, and shares that may be left out.
        floor: Distributed noise that the budget against the coordinator asks for, over the clip norm.
        spare_rounds: Rounds the noise is calibrated for beyond `rounds`, for crashes.
        signal_share: Assumed length of the mean clipped update, over the clip norm. A public assumption, not a measure.
        shape: What makes up `dim`; with it, smaller adapters are among the alternatives.
        parties: For unit example: parties whose updates are averaged.
        steps_per_round: For unit example: how many of `rounds` are one round of a run.
        rounds_per_week: How often a round is run, to say how many weeks a budget lasts.

    Raises:
        ValueError: A cohort above the population, or a number out of its range.
    """
    if dim < 1 or population < 1 or rounds < 1 or spare_rounds < 0 or parties < 1:
        raise ValueError("sizes and rounds are positive whole numbers")
    if not 0 < cohort <= population:
        raise ValueError("the expected cohort is above 0 and at most the population")
    if not 0 < signal_share <= 1:
        raise ValueError("the signal's share of the clip norm is above 0 and at most 1")
    setting = _Setting(
        dim,
        population,
        cohort / population,
        rounds,
        spare_rounds,
        epsilon,
        delta,
        Unit(unit),
        noise,
        parties,
        signal_share,
        excess,
        floor,
    )
    multiplier = setting.noise_multiplier()
    total = setting.total(multiplier)
    length = setting.noise_to_clip(multiplier)
    one_round = PoissonGaussian(setting.priced_rate, multiplier)
    learns = total >= LEARNS_AT
    weeks_left(0, rounds_per_week)

    def fits(count: int) -> bool:
        schedule = Repeated(one_round, count * steps_per_round)
        return epsilon_of(schedule, setting.claimed_delta, "pld", setting.adjacency) <= epsilon

    planned = (rounds + spare_rounds) // steps_per_round
    return Plan(
        epsilon=epsilon,
        delta=setting.claimed_delta,
        unit=setting.unit,
        population=population,
        cohort=cohort,
        rounds=rounds + spare_rounds,
        dim=dim,
        noise_multiplier=multiplier,
        epsilon_per_round=epsilon_of(one_round, setting.claimed_delta, "pld", setting.adjacency),
        noise_to_clip=length,
        signal_share=signal_share,
        signal_to_noise=math.inf if length == 0 else signal_share / length,
        total_signal_to_noise=total,
        verdict="learns" if learns else "may learn" if total >= MAY_LEARN_AT else "will not learn",
        alternatives=() if learns else _alternatives(setting, multiplier, shape),
        rounds_left=planned if math.isinf(epsilon) else rounds_left(fits, limit=MAX_ROUNDS, known=planned),
        rounds_per_week=rounds_per_week,
    )


def _alternatives(setting: _Setting, multiplier: float, shape: Shape | None) -> tuple[Alternative, ...]:
    """Return the nearest settings that learn, each found by search."""
    found = [_more_users(setting), *_smaller(setting, multiplier, shape), _more_epsilon(setting)]
    return tuple(alternative for alternative in found if alternative is not None)


def _more_users(setting: _Setting) -> Alternative | None:
    """Return the smallest population, at the same sampling rate, that learns."""
    # More users also ask for a smaller delta, so this is a search and not a division.
    limit = setting.population * MOST_TIMES_MORE
    needed = _least(lambda population: replace(setting, population=population).learns(), setting.population, limit)
    if needed is None:
        return None
    larger = replace(setting, population=_round_up(needed))
    return Alternative(f"{larger.population:,} {_plural(setting.unit)}", larger.total(larger.noise_multiplier()))


def _smaller(setting: _Setting, multiplier: float, shape: Shape | None) -> list[Alternative]:
    """Return the largest smaller adapters that learn: lower rank, fewer layers, one target, then all of these."""
    if shape is None:
        limit = math.floor(setting.dim * setting.total(multiplier) ** 2 / LEARNS_AT**2)
        if limit < LEAST_DIM:
            return []
        return [Alternative(f"an adapter of {limit:,} numbers", replace(setting, dim=limit).total(multiplier))]

    def score(candidate: Shape) -> float:
        return replace(setting, dim=candidate.dim).total(multiplier)

    def first(candidates: list[Shape]) -> Shape | None:
        return next((candidate for candidate in candidates if score(candidate) >= LEARNS_AT), None)

    def of(rank: int, layers: int, targets: int) -> Shape:
        return Shape(rank, layers, targets, shape.values_per_rank)

    single = [
        [of(rank, shape.layers, shape.targets) for rank in range(shape.rank - 1, 0, -1)],
        [of(shape.rank, layers, shape.targets) for layers in range(shape.layers - 1, 0, -1)],
        [of(shape.rank, shape.layers, targets) for targets in range(shape.targets - 1, 0, -1)],
    ]
    chosen = [candidate for candidate in map(first, single) if candidate is not None]
    if not chosen:
        every = [
            of(rank, layers, targets)
            for rank in range(1, shape.rank + 1)
            for layers in range(1, shape.layers + 1)
            for targets in range(1, shape.targets + 1)
        ]
        largest = first(sorted(every, key=lambda candidate: (-candidate.dim, -candidate.layers)))
        chosen = [] if largest is None else [largest]
    return [Alternative(_difference(shape, candidate), score(candidate)) for candidate in chosen]


def _difference(shape: Shape, candidate: Shape) -> str:
    words: list[str] = []
    if candidate.rank != shape.rank:
        words.append(f"rank {candidate.rank}")
    if candidate.layers != shape.layers:
        words.append(f"on {candidate.layers} {'layer' if candidate.layers == 1 else 'layers'}")
    if candidate.targets != shape.targets:
        words.append(f"with {candidate.targets} {'target' if candidate.targets == 1 else 'targets'} per layer")
    return " ".join(words)


def _more_epsilon(setting: _Setting) -> Alternative | None:
    """Return the smallest budget that learns, up to 16; above that it is hardly a promise."""
    needed = setting.epsilon_to_learn()
    if needed > MOST_EPSILON:
        return None
    larger = replace(setting, epsilon=math.ceil(needed * 10.0) / 10.0)
    return Alternative(f"epsilon {_short(larger.epsilon)}", larger.total(larger.noise_multiplier()))


def _least(holds: Callable[[int], bool], low: int, limit: int) -> int | None:
    """Return the least whole number from `low` to `limit` at which `holds`, which stays true above it."""
    if holds(low):
        return low
    high = low
    while not holds(high):
        if high >= limit:
            return None
        low, high = high, min(limit, high * 2)
    # One percent is close enough for large numbers.
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _round_up(value: int) -> int:
    """Return `value` rounded up to two digits: a number that a person can say."""
    unit = 10 ** max(0, len(str(value)) - 2)
    return -(-value // unit) * unit


def _plural(unit: Unit) -> str:
    return "records" if unit is Unit.EXAMPLE else "users"


def _short(epsilon: float) -> str:
    return "infinite" if math.isinf(epsilon) else f"{epsilon:.3g}"
