"""What one run promises: which event a round is, under which adjacency, and the statement about what was debited.

The four columns of docs/privacy.md, as one table that the server, the device, the planner and the auditor read:

=================  ===========================  =========================  ======================================
unit, noise        adjacency (sensitivity)      event of one round         who sees an update without noise
=================  ===========================  =========================  ======================================
user, central      zero-out (C)                 PoissonGaussian(q, z)      the coordinator
user, local        replace-one (2C)             Gaussian(z)                nobody; there is no amplification
user, distributed  zero-out (C)                 PoissonGaussian(q, z)      nobody; the coordinator sees noised sums
example (silo)     add-remove (C per record)    steps x PoissonGaussian    nobody; noise enters at every step
=================  ===========================  =========================  ======================================

Where counts leave beside the update (`common.noised_counts`), the event is a PoissonComposed of the same multiplier z.

In every column a round charges every enrolled unit, chosen or not. With distributed noise there is a second number
beside it, against the coordinator, who knows the cohort: Gaussian(z') for each round that a user takes part in, up to a
cap (`common.secure_sum`). A device accounts for that one: it is the one that the device enforces.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from common.accounting import (
    Event,
    Gaussian,
    PoissonComposed,
    PoissonGaussian,
    Repeated,
    Statement,
    calibrate,
    check_claim,
    epsilon_of,
    make_statement,
)
from common.claims import NOT_COVERED, check_spread
from common.distributed_claims import distributed_claims
from common.noised_counts import NoisedCounts
from common.privacy import Adjacency, Unit
from common.secure_sum import SecureSum
from common.wire import ReleaseSpec

__all__ = ["Promise", "check_noise", "promise_of"]

STUDIED = "scores, counts, timings and learning curves that are kept beside the adapter: they are taken without noise"
PARTICIPATION = "which device was asked, and when it answered"
COORDINATOR = (
    "anything from the coordinator: it sees each clipped update without noise, may ask one user alone, drop all others "
    "or enrol users of its own, and that it draws cohorts and adds noise as promised is its word"
)
RECORDS = "one party's records as a whole: the unit is one record"


@dataclass(frozen=True)
class Promise:
    """How the releases of one run are priced.

    Attributes:
        unit: Whose presence is hidden.
        noise: Who adds the noise.
        adjacency: What the noise is measured against.
        rate: Poisson rate that may be claimed: of users in a round, or of records in a step; 1 claims none.
        steps: Noised steps per release.
        population: Units that the delta rule counts.
        counts: What leaves beside the update, under the same noise.
    """

    unit: Unit
    noise: Literal["central", "local", "distributed"]
    adjacency: Adjacency
    rate: float
    steps: int
    population: int
    counts: NoisedCounts | None = None

    def event(self, noise_multiplier: float) -> Event:
        """The event of one round."""
        step = self._step(noise_multiplier)
        return step if self.steps == 1 else Repeated(step, self.steps)

    def schedule(self, noise_multiplier: float, rounds: int) -> Event:
        """The event of all rounds, which is reserved as one."""
        return Repeated(self._step(noise_multiplier), self.steps * rounds)

    def _step(self, noise_multiplier: float) -> Event:
        if self.counts is not None:  # update and counts of one cohort are one event, see common.noised_counts
            return PoissonComposed(self.rate, tuple(map(Gaussian, self.counts.multipliers(noise_multiplier))))
        return PoissonGaussian(self.rate, noise_multiplier) if self.rate < 1 else Gaussian(noise_multiplier)

    def own_schedule(self, spec: ReleaseSpec) -> tuple[Event, int]:
        """What a device reserves for itself: one release's event, and how many there may be."""
        if self.noise == "distributed":
            sums = SecureSum.of(spec)
            return Gaussian(sums.noise_multiplier), sums.participation_cap
        return self.event(spec.noise_multiplier), spec.rounds

    def calibrate(self, epsilon: float, delta: float, rounds: int) -> float:
        """The least noise multiplier with which `rounds` rounds cost at most `epsilon`; checks that it may be claimed.

        Raises:
            ClaimRefused: The epsilon would not be true.
        """
        check_claim(
            unit=self.unit,
            noise=self.noise,
            adjacency=self.adjacency,
            sampling="poisson" if self.rate < 1 else "none",
            sampling_rate=self.rate,
            delta=delta,
            population=self.population,
            metrics="none" if self.counts is None else "charged",
        )
        multiplier = calibrate(
            epsilon=epsilon,
            delta=delta,
            rounds=rounds * self.steps,
            sampling_rate=self.rate,
            unit=self.unit,
            adjacency=self.adjacency,
        )
        # Parts that are put together again may be a rounding error below what they were split from.
        while self.counts and epsilon_of(self.schedule(multiplier, rounds), delta, "pld", self.adjacency) > epsilon:
            multiplier *= 1.0 + 1e-12
        return multiplier

    def noise_scale(self, noise_multiplier: float, clip: float) -> float:
        """Standard deviation of the noise on each number: multiplier times sensitivity."""
        return noise_multiplier * clip * (2.0 if self.adjacency is Adjacency.REPLACE_ONE else 1.0)

    def statement(
        self, spec: ReleaseSpec, debits: int, *, rehearsal: bool = False, as_if_population: int | None = None
    ) -> Statement:
        """State what `debits` releases under `spec` cost, with everything without which the number means nothing.

        A method that shares nothing releases nothing and costs nothing. Distributed noise has more statements:
        `common.distributed_claims`; this is the one to outsiders, which names the coordinator's number.
        """
        shared = debits > 0
        if shared and self.noise == "distributed":
            return distributed_claims(
                spec,
                debits,
                rehearsal=rehearsal,
                covered=self._covered(),
                not_covered=(*NOT_COVERED, STUDIED),
            ).outsiders
        return make_statement(
            [self.schedule(spec.noise_multiplier, debits)] if shared else [],
            delta=spec.delta,
            unit=self.unit,
            adjacency=self.adjacency,
            mechanism=self._mechanism(spec) if shared else "nothing is shared, so nothing is released",
            sampling=self._sampling(spec, debits),
            trust=self._trust(),
            population=self.population,
            covered=self._covered(),
            not_covered=self._not_covered(),
            rehearsal=rehearsal,
            extrapolated_population=as_if_population,
        )

    def _mechanism(self, spec: ReleaseSpec) -> str:
        if spec.noise_multiplier == 0:
            return "no noise"
        scale = f"Gaussian noise of {self.noise_scale(spec.noise_multiplier, 1.0):.3f} times that"
        if self.unit is Unit.EXAMPLE:
            return (
                f"the gradient of each record ({spec.model_dim:,} numbers) is clipped to L2 norm {spec.clip:g}; "
                f"{scale} is added to their sum at each of {self.steps} steps per round, on the device"
            )
        whole = f"the whole update of a user ({spec.model_dim:,} numbers) is clipped to L2 norm {spec.clip:g}"
        if self.counts is not None:
            whole = _with_counts(self.counts, spec)
        if self.noise == "local":
            return f"{whole}; {scale} is added on the device before it leaves"
        return f"{whole}; {scale} is added to their sum, which is divided by the expected cohort"

    def _sampling(self, spec: ReleaseSpec, debits: int) -> str:
        if self.unit is Unit.EXAMPLE:
            return (
                f"each record joins a step by a coin of its own, with probability {self.rate:.4g} (Poisson), "
                f"{debits} rounds of {self.steps} steps; every party is charged for every round"
            )
        if self.noise == "local":
            return f"none is claimed: every user is charged for all {debits} rounds, chosen or not"
        return (
            f"each of {spec.population:,} users joins a round by a coin of their own, with probability "
            f"{spec.sampling_rate:.4g} (Poisson), {debits} rounds; who took part is secret"
        )

    def _covered(self) -> tuple[str, ...]:
        counts = () if self.counts is None else ("the noised counts beside it: " + ", ".join(self.counts.names),)
        return ("the shared adapter after every round", *counts)

    def _trust(self) -> str:
        if self.noise == "local" or self.unit is Unit.EXAMPLE:
            return "nobody sees an update without noise: it is added on the device"
        return "the coordinator sees each clipped update without noise: against the coordinator epsilon is infinite"

    def _not_covered(self) -> tuple[str, ...]:
        own = [RECORDS] if self.unit is Unit.EXAMPLE else []
        return (*NOT_COVERED, STUDIED, *own, COORDINATOR if self.noise == "central" else PARTICIPATION)


def _with_counts(counts: NoisedCounts, spec: ReleaseSpec) -> str:
    """Say what one row is clipped to when counts leave with the update."""
    moving = ""
    if counts.clip_quantile is not None:
        moving = f"in units of a clip norm that follows the {counts.clip_quantile:g} quantile of their lengths, "
    return (
        f"{moving}the whole update of a user ({spec.model_dim:,} numbers) and {len(counts.names)} counts beside it "
        f"({', '.join(counts.names)}) are clipped to L2 norm {spec.clip:g} together, and charged as one event"
    )


def check_noise(noise: NDArray[np.float64], scale: float) -> None:
    """Refuse to release under `noise`, as it was added, if its standard deviation cannot be `scale`.

    Args:
        noise: What was released less what it was added to, shape `(dim,)`.
        scale: Standard deviation that was promised, above 0.

    Raises:
        ClaimRefused: The mean square is outside what so many independent Gaussian numbers give.
    """
    if noise.size:
        check_spread(float(np.mean(np.square(noise / scale))), noise.size)


def promise_of(spec: ReleaseSpec) -> Promise:
    """Read from a spec how its releases are priced."""
    if spec.unit == Unit.EXAMPLE:
        NoisedCounts.of(spec)  # refuses: counts are of users
        return Promise(
            Unit.EXAMPLE,
            "local",
            Adjacency.ADD_REMOVE,
            spec.example_rate,
            int(spec.recipe["local_steps"]),
            int(spec.recipe["example_records"]),
        )
    counts = NoisedCounts.of(spec)
    if spec.noise == "local":
        return Promise(Unit.USER, "local", Adjacency.REPLACE_ONE, 1.0, 1, spec.population, counts)
    if spec.noise == "distributed":
        return Promise(Unit.USER, "distributed", Adjacency.ZERO_OUT, spec.sampling_rate, 1, spec.population, counts)
    return Promise(Unit.USER, "central", Adjacency.ZERO_OUT, spec.sampling_rate, 1, spec.population, counts)
