"""The user's records."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Record", "User"]


@dataclass(frozen=True, slots=True)
class Record:
    """One thing a user was asked and how that user would have it answered.

    `time` is in seconds since 1970 UTC; `rejected` makes the record a preference pair; `kind` is the kind of
    query: extraction, abstraction or generalization.
    """

    prompt: str
    response: str
    time: float | None
    task: str = "text"
    rejected: str | None = None
    kind: str | None = None


@dataclass(frozen=True, slots=True)
class User:
    """A person's records, oldest first, and what is known of the person besides."""

    id: str
    records: tuple[Record, ...]
    profile: tuple[str, ...] = ()
