"""What may be said of a sum with distributed noise: to outsiders, about the coordinator, and if more devices collude.

Three readings of the same noise, none of which stands for another:

- *Outsiders* see the published models. They do not know who took part, so that Poisson sampling amplifies, and the
  noise they face is that of all honest devices of a full cohort, as the coordinator fills it up.
- *The coordinator* knows who took part, and so does every device of the round. Nothing is amplified; what binds is
  how often one user takes part. The noise is that of the fewest honest devices that can be left in a sum.
- *More colluding devices than assumed*, such as a coordinator enrols that makes devices up. Nothing here prevents it;
  what is left of the guarantee is computed: at the most that the protocol bears, and for a device that is alone among
  them, whose vector can be singled out and is noised by its own share only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from common.accounting import Event, Gaussian, PoissonGaussian, Repeated, Statement, make_statement
from common.distributed_noise import DistributedNoise
from common.errors import ClaimRefused
from common.mask_graph import FULL_GRAPH
from common.privacy import Adjacency, Unit
from common.secagg_messages import Terms

__all__ = ["DistributedClaims", "distributed_claims"]

MECHANISM = (
    "each device's whole update clipped in L2 norm, rotated and rounded; a discrete Gaussian share from each device; "
    "summed under masks modulo a power of two"
)
ASSUMPTIONS = (
    "the sampler of the discrete noise compares floating-point numbers",
    "whether a device drops out does not depend on what it computed",
    "X25519, AES-256, SHA-256 and Ed25519 hold, and devices' enrolment keys are their own",
    "the parameters of the schedule were fixed before anything was released",
)


@dataclass(frozen=True)
class DistributedClaims:
    """The statements about one schedule of secure sums.

    Attributes:
        outsiders: Against whoever sees what is published and does not know who took part.
        coordinator: Against the coordinator with as many colluding devices as are assumed, and against any device.
        collusion: The coordinator's statement again, by honest devices left in a sum: from those assumed down to one.
    """

    outsiders: Statement
    coordinator: Statement
    collusion: tuple[tuple[int, Statement], ...]


def distributed_claims(
    noise: DistributedNoise,
    terms: Terms,
    *,
    rounds: int,
    participation_cap: int,
    sampling_rate: float,
    population: int,
    delta: float,
    rehearsal: bool = False,
) -> DistributedClaims:
    """Return what may be said of `rounds` sums under zero-out adjacency, for unit user.

    Args:
        noise: The numbers of the sums.
        terms: Any round's; all have the same cohorts, threshold and share of colluding devices.
        rounds: Rounds of the run, spare ones included.
        participation_cap: Rounds that any one user takes part in at most; the device enforces it.
        sampling_rate: Rate of the Poisson cohorts.
        population: Enrolled users.
        delta: Failure probability.
        rehearsal: Whether noise or cohorts came from a seed.

    Raises:
        ClaimRefused: Rounds would be called off for their size so often that this tells who took part; or the noise is
            sized for more honest devices, or the modulus for fewer devices, than the terms allow.
        ValueError: Numbers that no run has.
    """
    if not 1 <= participation_cap <= rounds:
        raise ValueError("a user takes part in between one and all rounds")
    if noise.fewest_honest > terms.fewest_honest or noise.largest_cohort < terms.largest_cohort:
        raise ClaimRefused(
            f"the noise is sized for {noise.fewest_honest} honest of at most {noise.largest_cohort} devices, but the "
            f"terms allow {terms.fewest_honest} of {terms.largest_cohort}"
        )
    colluding = math.floor(terms.corrupt * terms.largest_cohort)
    # A round goes on or not by its size alone. For one user that matters where the others are just too few, or just as
    # many as there is room for, and the user is drawn: then the user's part is known, and nothing is amplified.
    edges = (terms.smallest_cohort - 1, terms.largest_cohort)
    revealed = rounds * sampling_rate * sum(_binomial(population - 1, sampling_rate, edge) for edge in edges)
    if revealed > delta / 2:
        raise ClaimRefused(
            f"cohorts of {terms.smallest_cohort} to {terms.largest_cohort} devices are missed so often at rate "
            f"{sampling_rate:g} that a called-off round tells who took part; widen them, or change the rate"
        )
    everyone = PoissonGaussian(sampling_rate, noise.multiplier_with(noise.largest_cohort - colluding))
    known = Repeated(Gaussian(noise.noise_multiplier), participation_cap)

    def state(event: Event, count: int, spent: float, sampling: str, trust: str, second: bool = True) -> Statement:
        # Pointwise within exp(closeness) per round of what is priced, see `common.distributed_noise`, step 4.
        away = noise.closeness * count
        priced = make_statement(
            event,
            delta=(delta - spent) * math.exp(-away),
            unit=Unit.USER,
            adjacency=Adjacency.ZERO_OUT,
            mechanism=MECHANISM,
            sampling=sampling,
            trust=trust,
            population=population,
            assumptions=ASSUMPTIONS,
            second="rdp" if second else None,
            rehearsal=rehearsal,
        )
        opinion = priced.second_opinion
        if opinion is not None:
            opinion = (opinion[0], opinion[1] + 2.0 * away)
        return replace(priced, epsilon=priced.epsilon + 2.0 * away, delta=delta, second_opinion=opinion)

    outsiders = state(
        Repeated(everyone, rounds),
        rounds,
        revealed,
        f"every user by an independent secret coin of rate {sampling_rate:g} in each of {rounds} rounds",
        "the coordinator adds the missing shares of noise and keeps to itself who took part and the sums; devices of a "
        "round see who else is in it, and for them the coordinator's number holds",
    )
    coordinator = state(
        known,
        participation_cap,
        0.0,
        f"no amplification; no user takes part in more than {participation_cap} of {rounds} rounds",
        f"nobody: the coordinator may do as it likes, with up to {colluding} devices of a round; it sees who takes "
        "part and the noised sum, never one user's update",
    )
    left = sorted({noise.fewest_honest, *_fewest_borne(terms), 1}, reverse=True)
    collusion = tuple(
        (
            honest,
            state(
                Repeated(Gaussian(_at_least(noise.multiplier_with(honest))), participation_cap),
                participation_cap,
                0.0,
                f"no amplification; no user takes part in more than {participation_cap} of {rounds} rounds",
                f"{honest} honest devices in the sum, this one among them; all others collude with the coordinator",
                second=False,
            ),
        )
        for honest in left
    )
    return DistributedClaims(outsiders, coordinator, collusion)


def _fewest_borne(terms: Terms) -> tuple[int, ...]:
    """Return the honest devices in a sum when as many collude as the protocol bears, in cohorts with a full graph."""
    if terms.largest_cohort > FULL_GRAPH:
        return ()
    # With c < 2T - n colluding, T - c are left.
    sizes = range(terms.smallest_cohort, terms.largest_cohort + 1)
    return (min(size - terms.needed(size) + 1 for size in sizes),)


def _at_least(multiplier: float) -> float:
    return multiplier if multiplier >= 1e-4 else 0.0


def _binomial(count: int, rate: float, hits: int) -> float:
    """Return the probability of `hits` among `count` coins of `rate`."""
    if hits > count or not 0.0 < rate < 1.0:
        return float(rate == 1.0 and hits == count)
    ways = math.lgamma(count + 1) - math.lgamma(hits + 1) - math.lgamma(count - hits + 1)
    return math.exp(ways + hits * math.log(rate) + (count - hits) * math.log1p(-rate))
