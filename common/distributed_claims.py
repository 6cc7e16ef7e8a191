"""What may be said of sums with distributed noise: to outsiders, about the coordinator, and if more devices collude.

Three readings of the same noise, none of which stands for another:

- *Outsiders* see the published models. They do not know who took part, so that Poisson sampling amplifies, and the
  noise they face is the public level to which the coordinator fills it up, less what colluding devices may leave out.
- *The coordinator* knows who took part, and so does every device of the round. Nothing is amplified; what binds is
  how often one user takes part. The noise is that of the fewest honest devices that can be left in a sum.
- *More colluding devices than assumed*, such as a coordinator enrols that makes devices up. Nothing here prevents it;
  what is left of the guarantee is computed: at the most that the protocol bears, and for a device that is alone among
  them, whose vector can be singled out and is noised by its own share only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.accounting import Event, Gaussian, PoissonGaussian, Repeated, Statement, make_statement
from common.claims import NOT_COVERED, rounded_up
from common.mask_graph import FULL_GRAPH, honest_survivors, needed
from common.privacy import Adjacency, Unit
from common.secure_sum import CORRUPT, THRESHOLD, SecureSum, called_off

if TYPE_CHECKING:
    from common.wire import ReleaseSpec

__all__ = ["DistributedClaims", "coordinator_event", "distributed_claims"]

ASSUMPTIONS = (
    "the sampler of the discrete noise compares floating-point numbers",
    "whether a device drops out does not depend on what it computed",
    "X25519, AES-256, SHA-256 and Ed25519 hold, and devices' enrolment keys are their own",
    "the parameters of the schedule were fixed before anything was released",
)
SYBILS = (
    "anything from a coordinator that enrols devices of its own beyond those that are said to collude; what is left "
    "then is stated beside this number"
)
TRUSTED_WITH = "outsiders: that the coordinator fills the noise up as promised and keeps the sums and who took part"


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

    def to_json(self) -> dict[str, Any]:
        """Return what a run's statement says beside the outsiders' number."""
        return {
            "coordinator": {**self.coordinator.to_json(), "sentence": self.coordinator.sentence()},
            "collusion": [[honest, one.to_json()["epsilon"]] for honest, one in self.collusion],
        }


def coordinator_event(spec: ReleaseSpec, rounds: int | None = None) -> Event:
    """Return what a user who took part in `rounds` rounds released to the coordinator; at the cap when absent."""
    sums = SecureSum.of(spec)
    return Repeated(Gaussian(sums.noise_multiplier), sums.participation_cap if rounds is None else rounds)


def distributed_claims(
    spec: ReleaseSpec,
    rounds: int,
    *,
    rehearsal: bool = False,
    covered: tuple[str, ...] = ("the shared updates",),
    not_covered: tuple[str, ...] = NOT_COVERED,
) -> DistributedClaims:
    """Return what may be said of `rounds` sums under `spec`, with zero-out adjacency, for unit user.

    Args:
        spec: What devices were asked for.
        rounds: Sums that were debited, called-off ones included; at least one.
        rehearsal: Whether noise or cohorts came from a seed.
        covered: What the statements cover.
        not_covered: What they do not.

    Raises:
        Refusal: The spec has no secure sums.
    """
    sums = SecureSum.of(spec)
    noise = sums.noise(spec, sums.largest_cohort)
    colluding, cap = sums.colluding(), min(sums.participation_cap, rounds)
    revealed = called_off(spec.sampling_rate, spec.population, rounds, sums.smallest_cohort, sums.largest_cohort)
    everyone = PoissonGaussian(spec.sampling_rate, spec.noise_multiplier)
    often = f"no user takes part in more than {sums.participation_cap} of {spec.rounds} rounds"

    def state(event: Event, count: int, spent: float, sampling: str, trust: str, second: bool = True) -> Statement:
        # Pointwise within exp(closeness) per round of what is priced, see `common.distributed_noise`, step 4.
        away = noise.closeness * count
        priced = make_statement(
            event,
            delta=(spec.delta - spent) * math.exp(-away),
            unit=Unit.USER,
            adjacency=Adjacency.ZERO_OUT,
            mechanism=_mechanism(spec, sums),
            sampling=sampling,
            trust=trust,
            population=spec.population,
            covered=covered,
            not_covered=(*not_covered, SYBILS),
            assumptions=ASSUMPTIONS,
            second="rdp" if second else None,
            rehearsal=rehearsal,
        )
        opinion = priced.second_opinion
        if opinion is not None:
            opinion = (opinion[0], opinion[1] + 2.0 * away)
        return replace(priced, epsilon=priced.epsilon + 2.0 * away, delta=spec.delta, second_opinion=opinion)

    def known(multiplier: float, sampling: str, trust: str, second: bool = True) -> Statement:
        event = Repeated(Gaussian(multiplier if multiplier >= 1e-4 else 0.0), cap)
        return state(event, cap, 0.0, sampling, trust, second)

    coordinator = known(
        sums.noise_multiplier,
        f"no amplification; {often}",
        f"nobody: the coordinator may do as it likes, with up to {colluding} devices of a round; it sees who takes "
        "part and the noised sum, never one user's update",
    )
    against = (
        f"epsilon {rounded_up(coordinator.epsilon)} at the same delta"
        if math.isfinite(coordinator.epsilon)
        else "no finite epsilon"
    )
    outsiders = state(
        Repeated(everyone, rounds),
        rounds,
        revealed,
        f"each of {spec.population:,} users joins a round by a coin of their own, with probability "
        f"{spec.sampling_rate:.4g} (Poisson), {rounds} rounds; who took part is secret",
        f"nobody sees an update without noise. The coordinator and the devices of a round know who takes part; against "
        f"them, with up to {colluding} colluding devices, {against}: no amplification, and {often}. Trusted by "
        f"{TRUSTED_WITH}",
    )
    collusion = tuple(
        (
            honest,
            known(
                _left(spec, sums, honest),
                f"no amplification; {often}",
                f"{honest} honest devices in the sum, this one among them; all others collude with the coordinator",
                second=False,
            ),
        )
        for honest in sorted({*_fewest_borne(sums), 1}, reverse=True)
    )
    return DistributedClaims(outsiders, coordinator, collusion)


def _mechanism(spec: ReleaseSpec, sums: SecureSum) -> str:
    if spec.noise_multiplier == 0:
        return "no noise"
    return (
        f"the whole update of a user ({spec.model_dim:,} numbers) is clipped to L2 norm {spec.clip:g}, rotated and "
        "rounded; each device adds a share of discrete Gaussian noise, and the sum is taken under masks; the shares of "
        f"the fewest honest devices have {sums.noise_multiplier:.3f} times that, and what is published "
        f"{spec.noise_multiplier:.3f} times"
    )


def _left(spec: ReleaseSpec, sums: SecureSum, honest: int) -> float:
    """Return the multiplier with `honest` devices left, at the size of round whose shares are the smallest."""
    sizes = range(sums.smallest_cohort, sums.largest_cohort + 1)
    size = max(sizes, key=lambda size: honest_survivors(size, THRESHOLD, CORRUPT))
    return sums.noise(spec, size).multiplier_with(honest)


def _fewest_borne(sums: SecureSum) -> tuple[int, ...]:
    """Return the honest devices in a sum when as many collude as the protocol bears, in the largest full graph."""
    size = min(sums.largest_cohort, FULL_GRAPH)
    if size < sums.smallest_cohort:
        return ()
    # With c < 2T - n colluding, T - c are left.
    return (size - needed(size, THRESHOLD) + 1,) if math.floor(CORRUPT * size) < 2 * needed(size, THRESHOLD) else ()
