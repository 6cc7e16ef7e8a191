"""What can be released, as a closed list of events; the ledger stores these, and epsilon is a view of them.

A noise multiplier here is always the noise's standard deviation divided by the L2 sensitivity of what it was added
to, *under the adjacency that the claim states*: with replacement the sensitivity is 2C, and noise of standard
deviation C is a multiplier of one half.

On disk an event is a JSON object with its `kind` and exactly the fields of that kind. Kinds are looked up in one table
here; nothing is imported by a name that data supply.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

from common.errors import VerificationError

__all__ = [
    "Composed",
    "DiscreteGaussian",
    "Event",
    "Gaussian",
    "PoissonComposed",
    "PoissonGaussian",
    "Repeated",
    "event_from_json",
]

MAX_DEPTH = 6
MAX_PARTS = 100_000
MAX_COUNT = 10**9


@dataclass(frozen=True)
class Gaussian:
    """Gaussian noise on a value that every unit may have moved; no amplification by sampling.

    A multiplier of 0 is a release without noise: its epsilon is infinite.
    """

    noise_multiplier: float
    kind: ClassVar[str] = "gaussian"

    def __post_init__(self) -> None:
        _check_multiplier(self.noise_multiplier)

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        return {"kind": self.kind, "noise_multiplier": float(self.noise_multiplier)}


@dataclass(frozen=True)
class PoissonGaussian:
    """Gaussian noise on a sum over a cohort that independent, secret coins of `sampling_rate` chose."""

    sampling_rate: float
    noise_multiplier: float
    kind: ClassVar[str] = "poisson-gaussian"

    def __post_init__(self) -> None:
        _check_rate(self.sampling_rate)
        _check_multiplier(self.noise_multiplier)

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        return {
            "kind": self.kind,
            "sampling_rate": float(self.sampling_rate),
            "noise_multiplier": float(self.noise_multiplier),
        }


@dataclass(frozen=True)
class PoissonComposed:
    """Everything that is released from one Poisson cohort: the update, the clip count, the metrics.

    Two releases from one cohort are not two sampled events: who was chosen is the same secret, so their losses are
    composed first and sampled once. Several Gaussian releases are one, of multiplier (sum z^-2)^(-1/2).
    """

    sampling_rate: float
    parts: tuple[Gaussian, ...]
    kind: ClassVar[str] = "poisson-composed"

    def __post_init__(self) -> None:
        _check_rate(self.sampling_rate)
        if not isinstance(self.parts, tuple) or not self.parts or len(self.parts) > MAX_PARTS:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError("a composed event has a tuple of parts, at least one")
        if not all(type(part) is Gaussian for part in self.parts):
            raise ValueError("the parts of one cohort's release are Gaussian")

    @property
    def noise_multiplier(self) -> float:
        """The multiplier of the one Gaussian release that all parts together are."""
        if any(part.noise_multiplier == 0 for part in self.parts):
            return 0.0
        return math.fsum(part.noise_multiplier**-2 for part in self.parts) ** -0.5

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        return {
            "kind": self.kind,
            "sampling_rate": float(self.sampling_rate),
            "parts": [part.to_json() for part in self.parts],
        }


@dataclass(frozen=True)
class DiscreteGaussian:
    """Integer noise with mass proportional to exp(-x^2 / (2 scale^2)) on an integer of integer sensitivity."""

    scale: float
    sensitivity: int = 1
    kind: ClassVar[str] = "discrete-gaussian"

    def __post_init__(self) -> None:
        if not _is_number(self.scale) or not 0.0 <= self.scale <= 1e4:
            raise ValueError("the scale of discrete noise is between 0 and 10,000 steps")
        if type(self.sensitivity) is not int or not 1 <= self.sensitivity <= 10**6:
            raise ValueError("the sensitivity of a discrete release is a positive whole number")

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        return {"kind": self.kind, "scale": float(self.scale), "sensitivity": self.sensitivity}


@dataclass(frozen=True)
class Repeated:
    """The same event `count` times over, each with fresh noise and a fresh cohort."""

    event: Event
    count: int
    kind: ClassVar[str] = "repeated"

    def __post_init__(self) -> None:
        _check_event(self.event)
        if type(self.count) is not int or not 1 <= self.count <= MAX_COUNT:
            raise ValueError("a count is a whole number between 1 and 1e9")

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        return {"kind": self.kind, "event": self.event.to_json(), "count": self.count}


@dataclass(frozen=True)
class Composed:
    """Several events on the same data, each with its own noise and its own cohort."""

    events: tuple[Event, ...]
    kind: ClassVar[str] = "composed"

    def __post_init__(self) -> None:
        if not isinstance(self.events, tuple) or not self.events or len(self.events) > MAX_PARTS:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ValueError("a composed event has a tuple of events, at least one")
        for event in self.events:
            _check_event(event)

    def to_json(self) -> dict[str, Any]:
        """Return the event as a JSON object."""
        return {"kind": self.kind, "events": [event.to_json() for event in self.events]}


Event: TypeAlias = Gaussian | PoissonGaussian | PoissonComposed | DiscreteGaussian | Repeated | Composed

KINDS: dict[str, type[Event]] = {
    kind.kind: kind for kind in (Gaussian, PoissonGaussian, PoissonComposed, DiscreteGaussian, Repeated, Composed)
}
"""The closed list. Adding a kind is a change of this table, of the accountants, and of docs/ledger.md."""


def event_from_json(value: object) -> Event:
    """Read an event that `to_json` wrote.

    Whole floats may have been written as integers, as RFC 8785 does.

    Raises:
        VerificationError: An unknown kind, a missing or unknown field, or a value no event can have.
    """
    return _read(value, 0)


def _read(value: object, depth: int) -> Event:
    if depth > MAX_DEPTH:
        raise VerificationError("an event is nested too deeply")
    if not isinstance(value, Mapping):
        raise VerificationError("an event is not a JSON object")
    kind = KINDS.get(value["kind"]) if isinstance(value.get("kind"), str) else None
    if kind is None:
        raise VerificationError("an event is of a kind that is not on the list")
    names = {field.name for field in fields(kind)}
    if set(value) != names | {"kind"}:
        raise VerificationError(f"a {kind.kind} event does not have exactly its fields")
    try:
        if kind is Repeated:
            return Repeated(_read(value["event"], depth + 1), value["count"])
        if kind in (Composed, PoissonComposed):
            listed = value["events" if kind is Composed else "parts"]
            if not isinstance(listed, list) or len(listed) > MAX_PARTS:
                raise VerificationError(f"the parts of a {kind.kind} event are not a list")
            parts: Any = tuple(_read(part, depth + 1) for part in listed)
            return Composed(parts) if kind is Composed else PoissonComposed(value["sampling_rate"], parts)
        return kind(**{name: value[name] for name in names})
    except (ValueError, OverflowError) as error:
        raise VerificationError(f"a {kind.kind} event holds a value it cannot have: {error}") from None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_multiplier(value: object) -> None:
    # Below 1e-4 nothing is protected and the arithmetic of the accountants ends; it is written as 0.
    if not _is_number(value) or not (value == 0 or 1e-4 <= float(value) <= 1e6):  # type: ignore[arg-type]
        raise ValueError("a noise multiplier is 0, or between 1e-4 and 1e6")


def _check_rate(value: object) -> None:
    if not _is_number(value) or not 0.0 < float(value) <= 1.0:  # type: ignore[arg-type]
        raise ValueError("a sampling rate is above 0 and at most 1")


def _check_event(value: object) -> None:
    if type(value) not in KINDS.values():
        raise ValueError("not an event of the closed list")
