"""What a privacy claim says, and which configurations may make one.

A claim is never a number: `Statement` holds epsilon together with everything without which it means nothing, and
refuses to be turned into a float. `check_claim` refuses the configurations whose epsilon would not be true.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from common.errors import ClaimRefused, VerificationError
from common.privacy import Adjacency, Unit

__all__ = [
    "ASSUMPTIONS",
    "NOT_COVERED",
    "Statement",
    "check_claim",
    "check_spread",
    "default_delta",
    "rounded_up",
]

NOT_COVERED = (
    "the private adapter, which never leaves but shapes what its owner's assistant says to others",
    "when a device is online and how long it computes",
    "anything outside this run that uses the same data",
)
"""What no mode of ours covers."""

ASSUMPTIONS = (
    "noise is drawn as floating-point numbers, not real ones (Mironov 2012)",
    "the parameters of the schedule were fixed before anything was released",
)
"""What every claim of ours rests on beyond its mechanism."""

TRUST = {
    "central": "the coordinator sees each clipped update without noise: against the coordinator epsilon is infinite",
    "local": "nobody: each device adds its own noise before anything leaves",
    "silo": "nobody outside the silo: it adds the noise to every training step itself",
}

UNIT_WORDS = {Unit.USER: "one user, with all of that user's records", Unit.EXAMPLE: "one record"}
ADJACENCY_WORDS = {
    Adjacency.ZERO_OUT: "contributing or contributing zeros (zero-out)",
    Adjacency.REPLACE_ONE: "being replaced by any other (replace-one)",
    Adjacency.ADD_REMOVE: "being added or removed (add-remove)",
}


def default_delta(population: int) -> float:
    """Return the largest delta a claim may use: min(1e-5, 1 / (10 x population)).

    Args:
        population: Units in the data set: users, or records.

    Raises:
        ValueError: A population that is not a positive whole number.
    """
    if isinstance(population, bool) or population < 1 or population != int(population):
        raise ValueError("a population is a positive whole number")
    return min(1e-5, 1.0 / (10.0 * population))


@dataclass(frozen=True)
class Statement:
    """A privacy guarantee with everything without which its number means nothing.

    There is no way to a bare number but the field `epsilon`: `float(statement)` and number formats are errors.

    Attributes:
        epsilon: Of everything covered; infinite where nothing is claimed.
        delta: Failure probability.
        unit: Whose presence is hidden.
        adjacency: What neighbouring data sets differ in.
        mechanism: What was clipped and noised, in words.
        sampling: What is assumed about who took part, in words.
        trust: Who sees updates without noise, in words.
        accountant: Method and version, such as `pld (dp-accounting 0.6.0)`.
        population: Units in the data set.
        covered: What the guarantee covers.
        not_covered: What it does not.
        assumptions: What it rests on beyond the mechanism.
        second_opinion: Another accountant's method, version and epsilon.
        group: Records per user, and epsilon for such a user: the user-level reading of an example-level guarantee.
        equivalent_mu: mu of the Gaussian mechanism with this epsilon at this delta.
        attack_rate: Largest true positive rate of any membership test at a false positive rate of 1 %.
        rehearsal: Noise or cohorts came from a seed, so nothing is claimed.
        extrapolated_population: Noise was scaled as if there were this many units, so nothing is claimed.
    """

    epsilon: float
    delta: float
    unit: Unit
    adjacency: Adjacency
    mechanism: str
    sampling: str
    trust: str
    accountant: str
    population: int
    covered: tuple[str, ...] = ("the shared updates",)
    not_covered: tuple[str, ...] = NOT_COVERED
    assumptions: tuple[str, ...] = ASSUMPTIONS
    second_opinion: tuple[str, float] | None = None
    group: tuple[int, float] | None = None
    equivalent_mu: float | None = field(default=None)
    attack_rate: float | None = None
    rehearsal: bool = False
    extrapolated_population: int | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.epsilon) or self.epsilon < 0:
            raise ValueError("epsilon is not negative, and is a number or infinite")
        if not 0.0 < self.delta < 1.0:
            raise ValueError("delta is between 0 and 1")
        for name in ("mechanism", "sampling", "trust", "accountant"):
            if not getattr(self, name):
                raise ValueError(f"a statement names its {name}")
        if not self.covered or not self.not_covered:
            raise ValueError("a statement says what it covers and what it does not")
        object.__setattr__(self, "unit", Unit(self.unit))
        object.__setattr__(self, "adjacency", Adjacency(self.adjacency))

    @property
    def is_claimed(self) -> bool:
        """Whether this is a guarantee at all, and not a rehearsal, an extrapolation or a run without noise."""
        return math.isfinite(self.epsilon) and not self.rehearsal and self.extrapolated_population is None

    def sentence(self) -> str:
        """Return the statement as sentences that stand alone; never a bare number."""
        if math.isinf(self.epsilon):
            return "no privacy claim: what was released is not protected by noise"
        amount = f"epsilon {rounded_up(self.epsilon)} at delta {self.delta:.3g}"
        if self.rehearsal:
            return f"calibrated to epsilon {rounded_up(self.epsilon)}; rehearsal, not claimed"
        if self.extrapolated_population is not None:
            return (
                f"as if {self.extrapolated_population:,} {self.unit}s took part, {amount}; "
                f"extrapolated from {self.population:,}, not claimed"
            )
        parts = [
            f"{amount}, for {UNIT_WORDS[self.unit]}, {ADJACENCY_WORDS[self.adjacency]}",
            f"Mechanism: {self.mechanism}",
            f"Sampling: {self.sampling}",
            f"Trust: {self.trust}",
            f"Accountant: {self.accountant}",
        ]
        if self.second_opinion is not None:
            name, epsilon = self.second_opinion
            parts.append(f"Second opinion: epsilon {rounded_up(epsilon)} by {name}")
        if self.group is not None:
            records, epsilon = self.group
            parts.append(f"For a user with {records} records: epsilon {rounded_up(epsilon)} at delta {self.delta:.3g}")
        parts += [
            f"Covers: {'; '.join(self.covered)}",
            f"Does not cover: {'; '.join(self.not_covered)}",
            f"Assumes: {'; '.join(self.assumptions)}",
        ]
        return ". ".join(parts) + "."

    def to_json(self) -> dict[str, Any]:
        """Return the statement as a JSON object; an infinite epsilon is the string `inf`."""
        return {item.name: _plain(getattr(self, item.name)) for item in fields(self)}

    @classmethod
    def from_json(cls, value: object) -> Statement:
        """Read what `to_json` wrote.

        Raises:
            VerificationError: Missing or unknown fields, or values no statement can have.
        """
        names = {item.name for item in fields(cls)}
        if not isinstance(value, Mapping) or set(value) != names:
            raise VerificationError("a privacy statement does not have exactly its fields")
        read: dict[str, Any] = {name: _typed(name, value[name]) for name in names}
        try:
            return cls(**read)
        except (ValueError, TypeError):
            raise VerificationError("a privacy statement holds a value it cannot have") from None

    def __str__(self) -> str:
        return self.sentence()

    def __format__(self, format_spec: str) -> str:
        if format_spec:
            raise TypeError("a privacy statement is not a number; print its sentence()")
        return self.sentence()


_FLOATS = {"epsilon", "delta", "equivalent_mu", "attack_rate"}
_COUNTS = {"population", "extrapolated_population"}
_LISTS = {"covered", "not_covered", "assumptions"}
_OPTIONAL = {"second_opinion", "group", "equivalent_mu", "attack_rate", "extrapolated_population"}


def _typed(name: str, value: Any) -> Any:
    """Return the field `name` with the type that a statement holds it in."""
    if value is None and name in _OPTIONAL:
        return None
    if name in _FLOATS:
        return _number(value)
    if name in _COUNTS and type(value) is int:
        return value
    if name in _LISTS and isinstance(value, list) and all(isinstance(part, str) for part in value):
        return tuple(value)
    if name in {"second_opinion", "group"} and isinstance(value, list) and len(value) == 2:
        if type(value[0]) is (str if name == "second_opinion" else int):
            return value[0], _number(value[1])
    elif isinstance(value, bool if name == "rehearsal" else str) and name not in _FLOATS | _COUNTS | _LISTS | _OPTIONAL:
        return value
    raise VerificationError(f"the field {name} of a privacy statement has the wrong type")


def _number(value: Any) -> float:
    if value == "inf":
        return math.inf
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise VerificationError("a privacy statement holds something else where a number belongs")
    return float(value)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and math.isinf(value):
        return "inf"
    return str(value) if isinstance(value, Unit | Adjacency) else value


def rounded_up(epsilon: float) -> str:
    """Return epsilon with two decimals (three digits when small), never less than it is."""
    if math.isinf(epsilon):
        return "infinite"
    if epsilon == 0:
        return "0"
    digits = max(2, 2 - math.floor(math.log10(epsilon)))
    # A value calibrated to 8 comes back as 7.998 and reads 8.00; one of 8.0000001 must not read as 8.00.
    scaled = epsilon * 10.0**digits
    whole = round(scaled) if abs(scaled - round(scaled)) < 1e-9 * max(1.0, scaled) else math.ceil(scaled)
    return f"{whole / 10.0**digits:.{digits}f}"


def check_spread(spread: float, count: int) -> None:
    """Refuse noise of which `count` numbers, divided by the promised deviation, have a mean square of `spread`.

    It finds noise that a bug, a patched generator or a wrong factor made smaller, not a person who wants it smaller.
    True noise fails with probability below 1e-12, by the tail bounds of Laurent and Massart (2000), lemma 1; discrete
    Gaussians are below them, since their moments are (Canonne, Kamath and Steinke (2020), arXiv:2004.00010, Lemma 21).

    Raises:
        ClaimRefused: The mean square is outside what so many independent Gaussian numbers give.
    """
    slack = math.sqrt(30.0 / count)
    if not (spread > 0.0 and 1.0 - 2.0 * slack <= spread <= 1.0 + 2.0 * slack + 2.0 * slack**2):
        raise ClaimRefused("the noise that was drawn has not the spread that was promised; nothing was released")


def check_claim(
    *,
    unit: Unit,
    noise: Literal["central", "local", "distributed"],
    adjacency: Adjacency,
    sampling: Literal["poisson", "fixed", "shuffled", "none"],
    sampling_rate: float,
    delta: float,
    population: int,
    clip_scope: Literal["whole", "per-tensor"] = "whole",
    weights: Literal["uniform", "examples"] = "uniform",
    loss: Literal["per-example", "batch-mean"] = "per-example",
    metrics: Literal["none", "charged", "raw"] = "none",
    private_state_in_shared_forward: bool = False,
    private_state_training: Literal["none", "dp", "raw"] = "none",
    events_per_cohort: int = 1,
    participation_secret: bool = True,
    public_rate: bool = True,
    public_divisor: bool = True,
    public_steps: bool = True,
) -> None:
    """Refuse a configuration whose epsilon would not be true; return when the claim may be made.

    Args:
        unit: Whose presence the claim hides.
        noise: Who adds the noise.
        adjacency: What neighbouring data sets differ in.
        sampling: How cohorts (or batches, for examples) are really chosen.
        sampling_rate: The rate the events are priced with; 1 claims no amplification.
        delta: Failure probability of the claim.
        population: Units in the data set.
        clip_scope: One norm over everything that leaves, or one per tensor.
        weights: Whether a unit's weight in the sum depends on how much data it has.
        loss: Whether examples are normalised by themselves, or by their batch.
        metrics: What leaves beside the update: nothing, noised and charged values, or raw ones.
        private_state_in_shared_forward: Whether a private adapter, retrieved records, a profile, a soft prompt or
            steering is in the forward pass of the shared step.
        private_state_training: How that state came to be: not from the data at all, with DP that is composed with
            the shared phase, or raw.
        events_per_cohort: Sampled events priced per cohort that was drawn.
        participation_secret: Whether nothing published shows who was in a cohort.
        public_rate: Whether the sampling rate comes from the spec, not from the number of units.
        public_divisor: Whether sums are divided by the expected cohort or batch, not by who answered.
        public_steps: Whether the number of steps comes from the spec, not from the number of units.

    Raises:
        ClaimRefused: With every reason at once.
    """
    unit, adjacency = Unit(unit), Adjacency(adjacency)
    reasons: list[str] = []
    if not 0.0 < sampling_rate <= 1.0:
        raise ValueError("a sampling rate is above 0 and at most 1")
    if not 0.0 < delta <= default_delta(population):
        reasons.append(
            f"delta {delta:g} is above the rule for {population} {unit}s; use at most {default_delta(population):g}"
        )
    reasons += _sampling_faults(unit, noise, sampling, sampling_rate, events_per_cohort, participation_secret)
    reasons += _sensitivity_faults(unit, noise, adjacency, clip_scope, weights, loss, metrics)
    if unit is Unit.EXAMPLE and private_state_in_shared_forward and private_state_training == "raw":
        reasons.append(
            "private state that was made from the same records without DP is in the forward pass of the shared step, "
            "so one record moves the other records' gradients; take it out, train it with DP and compose both, or "
            "claim unit user"
        )
    if not public_divisor:
        reasons.append("the sum is divided by who answered; divide by the expected number, which is public")
    if adjacency is Adjacency.ADD_REMOVE:
        for name, public in (("sampling rate", public_rate), ("number of steps", public_steps)):
            if not public:
                reasons.append(
                    f"the {name} depends on the number of units, which is private under add-remove; fix it in the spec"
                )
    if reasons:
        raise ClaimRefused("; ".join(reasons))


def _sampling_faults(
    unit: Unit, noise: str, sampling: str, sampling_rate: float, events_per_cohort: int, participation_secret: bool
) -> list[str]:
    """Return what is wrong with an amplification claim."""
    faults: list[str] = []
    if sampling_rate < 1.0:
        if sampling != "poisson":
            faults.append(
                f"{sampling} sampling is not Poisson sampling; draw every unit by its own coin, or claim no "
                "amplification (rate 1)"
            )
        if unit is Unit.USER and noise == "local":
            faults.append("each device's noised update is visible, so there is no amplification; claim rate 1")
        elif not participation_secret:
            faults.append("amplification needs secret participation, and something shows it; claim rate 1")
        if events_per_cohort != 1:
            faults.append(
                f"{events_per_cohort} sampled events are priced for one cohort; compose its releases into one event"
            )
    return faults


def _sensitivity_faults(
    unit: Unit, noise: str, adjacency: Adjacency, clip_scope: str, weights: str, loss: str, metrics: str
) -> list[str]:
    """Return what makes one unit move the release by more than the bound the noise was measured against."""
    faults: list[str] = []
    if unit is Unit.USER and noise == "local" and adjacency is not Adjacency.REPLACE_ONE:
        faults.append("a device that noises its own update hides one user's data behind any other's; claim replace-one")
    if clip_scope != "whole":
        faults.append(
            "each tensor is clipped by itself, so together they exceed the bound; clip one norm over all that leaves"
        )
    if weights != "uniform":
        faults.append("weights by example count let one unit move the mean further than the bound; weigh uniformly")
    if unit is Unit.EXAMPLE and loss != "per-example":
        faults.append("a batch-mean loss lets one record rescale the others' gradients; sum a loss per example")
    if metrics == "raw":
        faults.append("metrics leave without noise; leave them out, or noise and charge them")
    return faults
