"""How long a device's budget lasts: releases that are left, and the weeks in which they go at the pace of late."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from client.budget_keeper import Account
from common.accounting import event_from_json
from common.budget import chosen_epsilon
from common.events import Event, Repeated
from common.ledger import Entry, debits
from common.rounds_left import pace_of, rounds_left, weeks_left

__all__ = ["Outlook", "outlook_of"]

RECENT = 20
"""Releases from which the pace is read."""

MOST_ROUNDS = 4096


@dataclass(frozen=True)
class Outlook:
    """What is left of a budget.

    Attributes:
        reserved: Releases that runs have reserved and not used yet.
        further: Releases like the last that a next run could reserve beside all that is reserved; at most 4,096.
        per_week: Releases per week of late, by this device's own clock; None with fewer than two.
        weeks: How long `reserved` lasts at that pace; None without one.
    """

    reserved: int
    further: int
    per_week: float | None
    weeks: float | None

    def sentence(self) -> str:
        """Say it in words."""
        further = f"{self.further:,} more" if self.further < MOST_ROUNDS else f"{MOST_ROUNDS:,} more or further"
        words = f"Left: {self.reserved:,} reserved release(s); a next run like the last could reserve {further}."
        if self.per_week is None or self.weeks is None:
            return words
        return f"{words} At the {self.per_week:.3g} a week of late, what is reserved lasts {self.weeks:.1f} weeks."


def outlook_of(entries: Sequence[Entry], account: Account) -> Outlook | None:
    """Read from a device's ledger what is left; None where nothing was ever released.

    Args:
        entries: Of the ledger.
        account: Read from the same entries.
    """
    made = [entry for entry in entries if entry.kind == "debit"]
    if not made:
        return None
    reserved = sum(max(0, run.rounds - run.debited) for run in account.runs)
    held = [event_from_json(one.event) for one in debits(entries)]
    further = _further(held, event_from_json(made[-1].body["event"]), account)
    pace = pace_of([entry.time for entry in made[-RECENT:]])
    return Outlook(reserved, further, pace, weeks_left(reserved, pace))


def _further(held: Sequence[Event], event: Event, account: Account) -> int:
    """Return the most releases that a next run could reserve, to within a hundredth."""

    def fits(count: int) -> bool:
        return chosen_epsilon([*held, Repeated(event, count)], account.delta, account.adjacency) <= account.limit

    return rounds_left(fits, limit=MOST_ROUNDS)
