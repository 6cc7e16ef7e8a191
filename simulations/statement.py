"""What a simulated run may say about privacy: priced from the debits in its ledger, never from the plan."""

from __future__ import annotations

from common.accounting import PoissonGaussian, Repeated, Statement, make_statement
from common.config import RunConfig
from common.privacy import Adjacency, Unit
from common.wire import ReleaseSpec

__all__ = ["statement_of"]


def statement_of(config: RunConfig, spec: ReleaseSpec, debits: int) -> Statement:
    """State what `debits` releases under `spec` cost, with everything without which the number means nothing.

    A method that shares nothing releases nothing and costs nothing.
    """
    shared = debits > 0
    events = [Repeated(PoissonGaussian(spec.sampling_rate, spec.noise_multiplier), debits)] if shared else []
    return make_statement(
        events,
        delta=spec.delta,
        unit=Unit(spec.unit),
        adjacency=Adjacency.ZERO_OUT,
        mechanism=_mechanism(config, spec) if shared else "nothing is shared, so nothing is released",
        sampling=(
            f"each of {spec.population:,} users joins a round by a coin of their own, with probability "
            f"{spec.sampling_rate:.4g} (Poisson), {debits} rounds; who took part is secret"
        ),
        trust="the coordinator sees each clipped update without noise: against the coordinator epsilon is infinite",
        population=spec.population,
        covered=("the shared adapter after every round",),
        rehearsal=config.rehearsal,
        extrapolated_population=config.as_if_population,
    )


def _mechanism(config: RunConfig, spec: ReleaseSpec) -> str:
    if not config.private:
        return "no noise"
    return (
        f"the whole update of a user ({spec.dim:,} numbers) is clipped to L2 norm {spec.clip:g}; Gaussian noise of "
        f"{spec.noise_multiplier:.3f} times that is added to their sum, which is divided by the expected cohort"
    )
