"""The secure sums of a run, as public numbers that the server, the devices, the planner and the auditor read.

A spec whose noise is `distributed` holds them (`ReleaseSpec.secure_sum`). From these few numbers everybody derives the
same terms, the same shares of noise and the same level of what is published; nothing about a round is taken from a
message.

Two budgets, two multipliers:

- *The coordinator* knows who takes part. Nothing is amplified; a user takes part `participation_cap` times at most, and
  the noise is that of the fewest honest devices which can be left in a sum of as many as are in this round:
  `noise_multiplier` here.
- *Outsiders* see what is published. Poisson sampling amplifies, and the noise is that of one public level, whoever took
  part, less the shares of those that may collude: `ReleaseSpec.noise_multiplier`. The coordinator fills up to that
  level and is trusted with it, as with the noise of central mode.

Shares are sized for the devices of the round, which every device sees before it draws its share, not for the smallest
round that could come about: nothing in the proof of `common.distributed_noise` needs more, and it is the difference
between 1.9 and 1.35 times the noise. The level is the largest that any size of round needs.

A user who was drawn more often than the cap is turned away. That costs outsiders' claim nothing: given what was
published before, the chance that the user is in the next sum is the rate times the chance of being below the cap, so
each round is, given the past, a Gaussian sampled at a rate of at most the one that is priced.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

from common.accounting import Gaussian, Repeated, calibrate, epsilon_of
from common.distributed_noise import LEAST_TOP_UP, SMOOTHING, STEPS_PER_ROOT, DistributedNoise
from common.errors import ClaimRefused, ConfigError, Refusal
from common.mask_graph import MAX_COHORT, honest_survivors
from common.secagg_messages import FEWEST_DEVICES, Terms

if TYPE_CHECKING:
    from common.wire import ReleaseSpec

__all__ = ["SecureSum", "called_off", "default_cap", "size_cohorts", "with_secure_sums"]

THRESHOLD = Fraction(2, 3)
CORRUPT = Fraction(1, 10)
"""Share of a round's devices that may collude with the coordinator, or leave out their noise."""

CALLED_OFF_SHARE = 0.02
"""Of delta, what rounds that are called off for their size may tell."""

TURNED_AWAY = 0.01
"""A user may be turned away from this share of the rounds that they are drawn for."""

LEAST_SHARE = 3.0
"""Steps in a share's scale, at least: finer steps cost bits, and make the sum of shares a Gaussian for all purposes."""


@dataclass(frozen=True, kw_only=True)
class SecureSum:
    """What a run's secure sums are.

    Attributes:
        smallest_cohort: Devices without which a round is called off.
        largest_cohort: Devices with more than which a round is called off.
        participation_cap: Rounds in which one user takes part at most; the device counts them.
        noise_multiplier: Against the coordinator: noise of the fewest honest devices over the sensitivity.
        epsilon: What `participation_cap` rounds of it cost at the spec's delta, as text; "inf" promises nothing.
        roster: Digest of the roster that devices check each other by (`common.vouched_roster`), hex; empty where they
            know each other in another way, as in a simulation.
    """

    smallest_cohort: int
    largest_cohort: int
    participation_cap: int
    noise_multiplier: float
    epsilon: str
    roster: str = ""

    @classmethod
    def of(cls, spec: ReleaseSpec) -> SecureSum:
        """Read the secure sums of a spec.

        Raises:
            Refusal: The spec has none, or not such ones.
        """
        try:
            own = cls(**(spec.secure_sum or {}))  # type: ignore[arg-type]
            counts = (own.smallest_cohort, own.largest_cohort, own.participation_cap)
            sound = (
                all(type(count) is int for count in counts)
                and isinstance(own.noise_multiplier, float)
                and type(own.epsilon) is str
                and math.isfinite(own.noise_multiplier)
                and own.noise_multiplier >= 0.0
                and float(own.epsilon) > 0.0
                and FEWEST_DEVICES <= own.smallest_cohort <= own.largest_cohort <= MAX_COHORT
                and 1 <= own.participation_cap <= spec.rounds
                and type(own.roster) is str
                and len(own.roster) in (0, 64)
                and (spec.noise, spec.unit, spec.extrapolation) == ("distributed", "user", 1.0)
            )
            if sound:
                own.noise(spec, own.largest_cohort)
                return own
        except (TypeError, ValueError, ArithmeticError):
            pass
        raise Refusal("bad-request", "the spec's secure sums are none that this version knows")

    def to_plain(self) -> dict[str, float | int | str]:
        """Return what stands in a spec."""
        return {name: value for name, value in asdict(self).items() if name != "roster" or value}

    def terms(self, spec: ReleaseSpec, number: int) -> Terms:
        """Return the terms of one round."""
        noise = self.noise(spec, self.largest_cohort)
        return Terms(
            run=spec.run,
            round=number,
            spec=spec.digest,
            dim=noise.padded_dim,
            bits=noise.bits,
            smallest_cohort=self.smallest_cohort,
            largest_cohort=self.largest_cohort,
            threshold=THRESHOLD,
            corrupt=CORRUPT,
        )

    def noise(self, spec: ReleaseSpec, devices: int) -> DistributedNoise:
        """Return how updates are encoded in a round of `devices`, and what noise each brings.

        Raises:
            ValueError: No round has so many devices, or no noise is like that.
        """
        if not self.smallest_cohort <= devices <= self.largest_cohort:
            raise ValueError("a round of this run has another number of devices")
        return _noise(spec.dim, spec.clip, spec.noise_multiplier, self, devices)

    def colluding(self) -> int:
        """Return how many devices of the largest round may collude."""
        return math.floor(CORRUPT * self.largest_cohort)


@lru_cache(maxsize=64)
def _noise(dim: int, clip: float, published: float, sums: SecureSum, devices: int) -> DistributedNoise:
    z = sums.noise_multiplier

    def sized(size: int, level: float) -> DistributedNoise:
        honest = honest_survivors(size, THRESHOLD, CORRUPT)
        return DistributedNoise(
            dim=dim,
            clip_norm=clip,
            noise_multiplier=z,
            fewest_honest=honest,
            largest_cohort=sums.largest_cohort,
            steps=_steps(dim, sums),
            level=level,
        )

    if z == 0.0:
        return sized(devices, 0.0)
    sensitivity = sized(devices, 1.0).sensitivity
    share = (z * sensitivity) ** 2 + SMOOTHING**2
    wanted = (published * sensitivity) ** 2 + SMOOTHING**2
    sizes = _sizes(sums.smallest_cohort, sums.largest_cohort)
    level = max(max(size * share / honest, wanted + out * share / honest) for size, honest, out in sizes)
    return sized(devices, math.sqrt(level + (LEAST_TOP_UP + 0.1) ** 2))


def _steps(dim: int, sums: SecureSum) -> float:
    """Return the steps in the clip norm: enough that rounding is cheap, and that no share is too fine."""
    root = math.sqrt(max(64, 1 << (dim - 1).bit_length()))
    if sums.noise_multiplier == 0.0:
        return math.ceil(STEPS_PER_ROOT * root)
    most = max(honest for _, honest, _ in _sizes(sums.smallest_cohort, sums.largest_cohort))
    return math.ceil(max(STEPS_PER_ROOT * root, LEAST_SHARE * math.sqrt(most) / sums.noise_multiplier))


@lru_cache(maxsize=64)
def _sizes(smallest: int, largest: int) -> tuple[tuple[int, int, int], ...]:
    """Return for every size of a round: devices, fewest honest ones in a sum, most that leave their noise out."""
    return tuple(
        (size, honest_survivors(size, THRESHOLD, CORRUPT), math.floor(CORRUPT * size))
        for size in range(smallest, largest + 1)
    )


def called_off(rate: float, population: int, rounds: int, smallest: int, largest: int) -> float:
    """Return the chance that in some round one user's coin decides whether it is called off for its size.

    A round goes on or not by its size alone. For one user that matters where the others are just too few, or just as
    many as there is room for, and the user is drawn: then their part is known. It is taken from delta. Where everybody
    comes to every round there is no coin, and nothing to tell.
    """
    if rate == 1.0:
        return 0.0
    edges = (smallest - 1, largest)
    return rounds * rate * sum(_binomial(population - 1, rate, edge) for edge in edges)


def size_cohorts(rate: float, population: int, rounds: int, delta: float) -> tuple[int, int]:
    """Return the fewest and the most devices of a round: as few as half of those expected, hardly ever fewer or more.

    Raises:
        ClaimRefused: No bounds are kept so surely that a called-off round tells nothing.
    """
    expected = rate * population
    if rate == 1.0:
        smallest, largest = max(FEWEST_DEVICES, math.ceil(expected / 2)), population
    else:
        smallest, largest = max(FEWEST_DEVICES, math.ceil(expected / 2)), math.ceil(expected)
        allowed = CALLED_OFF_SHARE * delta / (2.0 * rounds * rate)
        while smallest > FEWEST_DEVICES and _binomial(population - 1, rate, smallest - 1) > allowed:
            smallest -= 1
        while largest < population and _binomial(population - 1, rate, largest) > allowed:
            largest += 1
    if largest > MAX_COHORT:
        raise ClaimRefused(f"a secure sum takes at most {MAX_COHORT} devices; ask for a smaller cohort")
    if smallest > largest or called_off(rate, population, rounds, smallest, largest) > CALLED_OFF_SHARE * delta:
        raise ClaimRefused(
            f"cohorts of {expected:g} of {population} users fall below {FEWEST_DEVICES} so often that a called-off "
            "round tells who took part; ask for a larger cohort, or for everybody in every round"
        )
    return smallest, largest


def default_cap(rate: float, rounds: int) -> int:
    """Return the least cap under which a user is turned away from at most one in a hundred rounds."""
    chances = [_binomial(rounds, rate, hits) for hits in range(rounds + 1)]
    for cap in range(1, rounds):
        lost = sum((hits - cap) * chances[hits] for hits in range(cap + 1, rounds + 1))
        if lost <= TURNED_AWAY * rounds * rate:
            return cap
    return rounds


def with_secure_sums(
    spec: ReleaseSpec, *, epsilon: float, coordinator_epsilon: float | None, participation_cap: int | None
) -> ReleaseSpec:
    """Return `spec` with the secure sums and the noise that meet both budgets.

    Args:
        spec: Rate, population, rounds and delta are read; its noise is replaced.
        epsilon: Budget against outsiders; infinite asks for no noise.
        coordinator_epsilon: Budget against the coordinator. None: the devices bring as much of the noise as the
            published model has anyway; only the shares that colluding devices may leave out are noise on top of it.
        participation_cap: Rounds in which one user takes part at most; None: one that hardly anybody meets.

    Raises:
        ConfigError: A cap or a cohort that no run has.
        ClaimRefused: Sizes of cohorts would tell who took part.
    """
    rate, rounds = spec.sampling_rate, spec.rounds
    cap = default_cap(rate, rounds) if participation_cap is None else participation_cap
    if not 1 <= cap <= rounds:
        raise ConfigError("participation_cap: a user takes part in between one and all rounds, spare ones included")
    if spec.extrapolation != 1.0:
        raise ConfigError("as_if_population: distributed noise is not scaled down for a study")
    smallest, largest = size_cohorts(rate, spec.population, rounds, spec.delta)
    sizes = _sizes(smallest, largest)
    if any(honest < 1 for _, honest, _ in sizes):
        raise ConfigError("cohort: too few users for a sum in which nobody's part can be told")
    delta = spec.delta - called_off(rate, spec.population, rounds, smallest, largest)
    wanted = calibrate(epsilon=epsilon, delta=delta, rounds=rounds, sampling_rate=rate) if epsilon < math.inf else 0.0
    most = max(size / honest for size, honest, _ in sizes)
    missing = max(out / honest for _, honest, out in sizes)
    if wanted == 0.0:
        own, stated = 0.0, math.inf
    elif coordinator_epsilon is None:
        own = wanted / math.sqrt(most - missing)
        stated = epsilon_of(Repeated(Gaussian(own), cap), spec.delta)
    else:
        own = calibrate(epsilon=coordinator_epsilon, delta=spec.delta, rounds=cap)
        stated = coordinator_epsilon
    sums = SecureSum(
        smallest_cohort=smallest,
        largest_cohort=largest,
        participation_cap=cap,
        noise_multiplier=float(own),
        epsilon=repr(float(stated)),
    )
    # Where the coordinator's budget asks for more noise than the outsiders', outsiders get it too: at each size of
    # round the level less the shares that may be left out, with the smoothing's own variance left out of account.
    level = max(max(size * own**2 / honest, wanted**2 + out * own**2 / honest) for size, honest, out in sizes)
    faced = math.sqrt(min(level - out * own**2 / honest for _, honest, out in sizes)) * (1.0 - 1e-9)
    return replace(spec, noise_multiplier=max(wanted, faced), secure_sum=sums.to_plain())


def _binomial(count: int, rate: float, hits: int) -> float:
    """Return the probability of `hits` among `count` coins of `rate`."""
    if not 0 <= hits <= count or rate == 1.0:
        return float(rate == 1.0 and hits == count)
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return math.exp(ways + hits * math.log(rate) + (count - hits) * math.log1p(-rate))
