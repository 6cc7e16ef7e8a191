"""Budgets: what may still be released.

A budget is a value that is rebuilt from a ledger: replay the reservations and debits in their order and it is the same
again. It knows nothing of files, time or people.

Two rules, for two kinds of schedule:

- A *fixed* schedule (its rates, multipliers and number of rounds were all set before it began) is reserved and priced
  as one by privacy loss distributions, and debited by round. What it does not use is not given back once it has
  released anything: whoever stops early on what was seen and spends the rest otherwise has an adaptive schedule.
- An *adaptive* one, where a multiplier, a rate or the decision to go on may depend on what was released, is held by a
  Rényi filter, which is valid for it and costs more.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from common.accountants import Events, epsilon_of, is_unsampled_gaussian, renyi_divergences
from common.errors import BudgetSpent, VerificationError
from common.events import Composed, Event, Repeated, event_from_json
from common.privacy import Adjacency

__all__ = ["Budget", "Filter", "Reservation", "chosen_epsilon"]

FILTER_ORDERS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256)


@dataclass(frozen=True)
class Filter:
    """Refuses the first release that could exceed a budget, even when each is chosen after seeing the ones before.

    Each order keeps a filter of its own with an equal share of delta, and releases go on while any of them has room:
    the losses where that order fails add up to delta. Source: Feldman and Zrnic (2021), arXiv:2008.11193, Theorem 4.3
    with equal bounds for everyone, and a union over the orders, which were fixed in advance.

    Attributes:
        epsilon: The budget.
        delta: Failure probability of the whole.
        spent: Rényi divergence so far at each of `FILTER_ORDERS`.
        adjacency: What the events' multipliers were measured under; under replace-one, sampled events are refused.
    """

    epsilon: float
    delta: float
    spent: tuple[float, ...] = (0.0,) * len(FILTER_ORDERS)
    adjacency: Adjacency = Adjacency.ZERO_OUT

    def __post_init__(self) -> None:
        _check_budget(self.epsilon, self.delta)
        if len(self.spent) != len(FILTER_ORDERS):
            raise ValueError("a filter has one divergence for each of its orders")

    @property
    def spent_epsilon(self) -> float:
        """What has been released so far costs at most this."""
        return self._epsilon(self.spent)

    def would_exceed(self, event: Events) -> bool:
        """Return whether releasing `event` now could exceed the budget."""
        return self._epsilon(self._with(event)) > self.epsilon

    def after(self, event: Events) -> Self:
        """Return the filter after `event`.

        Raises:
            BudgetSpent: The event could exceed the budget; nothing has changed.
        """
        spent = self._with(event)
        if self._epsilon(spent) > self.epsilon:
            raise BudgetSpent(
                f"the release could exceed the budget of epsilon {self.epsilon:g} at delta {self.delta:g}"
            )
        return replace(self, spent=spent)

    def _with(self, event: Events) -> tuple[float, ...]:
        listed = (event,) if not isinstance(event, Iterable) else tuple(event)
        if Adjacency(self.adjacency) is Adjacency.REPLACE_ONE and any(_has_sampling(part) for part in listed):
            raise ValueError("a filter has no price for Poisson sampling under replace-one")
        return tuple(
            spent + cost for spent, cost in zip(self.spent, renyi_divergences(listed, FILTER_ORDERS), strict=True)
        )

    def _epsilon(self, spent: tuple[float, ...]) -> float:
        if not any(spent):
            return 0.0
        share = self.delta / len(FILTER_ORDERS)
        return min(cost + math.log(1.0 / share) / (order - 1) for order, cost in zip(FILTER_ORDERS, spent, strict=True))


def chosen_epsilon(schedules: Sequence[Event], delta: float, adjacency: Adjacency = Adjacency.ZERO_OUT) -> float:
    """Return what several runs on one subject's data cost, each of which may have been chosen after seeing the others.

    One schedule was fixed before it began, and has its price by privacy loss distributions. With a second one, whoever
    chose its rate, noise and rounds may have looked at what the first released. Unsampled Gaussians then cost what they
    cost together (Smith and Thakurta (2022), arXiv:2210.17520); else a Rényi filter holds (Feldman and Zrnic (2021),
    Theorem 4.3), and the price is the larger of the two. Whether the filter has any room for a second one does not
    depend on what the first released, so the two rules do not mix.
    """
    fixed = epsilon_of(schedules, delta, "pld", adjacency) if schedules else 0.0
    if len(schedules) < 2 or math.isinf(fixed) or is_unsampled_gaussian(schedules):
        return fixed
    return max(fixed, Filter(math.inf, delta, adjacency=adjacency).after(schedules).spent_epsilon)


@dataclass(frozen=True)
class Reservation:
    """A fixed schedule that a budget holds room for.

    Attributes:
        name: What reserved it, such as a run's id.
        schedule: (event, count), one event per round.
        debited: How many of each have been released, in the order of `schedule`.
        closed: Whether it takes no more debits.
    """

    name: str
    schedule: tuple[tuple[Event, int], ...]
    debited: tuple[int, ...]
    closed: bool = False

    @property
    def rounds_left(self) -> int:
        """Releases that may still be debited."""
        return 0 if self.closed else sum(count for _, count in self.schedule) - sum(self.debited)

    @property
    def released(self) -> tuple[Event, ...]:
        """What has been debited so far."""
        return _events(zip((event for event, _ in self.schedule), self.debited, strict=True))

    @property
    def whole(self) -> tuple[Event, ...]:
        """Everything that it holds room for."""
        return _events(self.schedule)


@dataclass(frozen=True)
class Budget:
    """An (epsilon, delta) that a subject or a run was granted; methods return the budget after them.

    Attributes:
        epsilon: The limit; infinite sets none.
        delta: Failure probability of the whole.
        adjacency: What the events' multipliers were measured under.
        reservations: In the order they were made.
    """

    epsilon: float
    delta: float
    adjacency: Adjacency = Adjacency.ZERO_OUT
    reservations: tuple[Reservation, ...] = ()

    def __post_init__(self) -> None:
        _check_budget(self.epsilon, self.delta)

    @property
    def charged(self) -> tuple[Event, ...]:
        """Everything that counts: whole reservations, whether debited yet or not."""
        return tuple(event for reservation in self.reservations for event in reservation.whole)

    @property
    def released(self) -> tuple[Event, ...]:
        """What has really been released."""
        return tuple(event for reservation in self.reservations for event in reservation.released)

    @property
    def charged_epsilon(self) -> float:
        """Epsilon of everything that counts."""
        return epsilon_of(self.charged, self.delta, "pld", self.adjacency)

    @property
    def released_epsilon(self) -> float:
        """Epsilon of what has really been released."""
        return epsilon_of(self.released, self.delta, "pld", self.adjacency)

    def would_exceed(self, events: Events, next: Events) -> bool:
        """Return whether `next` after `events` would cost more than this budget, priced as one fixed schedule."""
        both = [*_listed(events), *_listed(next)]
        return epsilon_of(both, self.delta, "pld", self.adjacency) > self.epsilon

    def reserve(self, schedule: Events, name: str = "run") -> Self:
        """Hold room for `schedule`, one event per round, all of which count from now on.

        Raises:
            BudgetSpent: It would exceed the budget; nothing is reserved.
            ValueError: The name is taken.
        """
        if self._find(name) is not None:
            raise ValueError("a reservation of this name exists")
        counted = _counted(_listed(schedule))
        if not counted:
            raise ValueError("a schedule has at least one round")
        if self.would_exceed(self.charged, _events(counted)):
            raise BudgetSpent(
                f"{sum(count for _, count in counted)} rounds would exceed the budget of epsilon {self.epsilon:g} "
                f"at delta {self.delta:g}"
            )
        return replace(self, reservations=(*self.reservations, Reservation(name, counted, (0,) * len(counted))))

    def debit(self, event: Event, name: str = "run") -> Self:
        """Charge one round's `event` to the reservation `name`; do this before it is released.

        Raises:
            BudgetSpent: Nothing of that kind is left in the reservation, or there is none.
        """
        index = self._find(name)
        reservation = None if index is None else self.reservations[index]
        if index is None or reservation is None or reservation.closed:
            raise BudgetSpent("nothing is reserved for this release")
        for place, (reserved, count) in enumerate(reservation.schedule):
            if reserved == event and reservation.debited[place] < count:
                debited = (
                    *reservation.debited[:place],
                    reservation.debited[place] + 1,
                    *reservation.debited[place + 1 :],
                )
                return self._with(index, replace(reservation, debited=debited))
        raise BudgetSpent("the reserved rounds of this kind are all used")

    def close(self, name: str = "run") -> Self:
        """End the reservation `name`; its room is given back only if it released nothing.

        Raises:
            ValueError: There is no such reservation.
        """
        index = self._find(name)
        if index is None:
            raise ValueError("there is no reservation of this name")
        reservation = self.reservations[index]
        if not any(reservation.debited):
            return replace(self, reservations=(*self.reservations[:index], *self.reservations[index + 1 :]))
        return self._with(index, replace(reservation, closed=True))

    def replay(self, entries: Iterable[Mapping[str, Any]]) -> Self:
        """Return the budget after `entries`, as a ledger holds them.

        Each is an object with `action` (`reserve`, `debit` or `close`), `name`, and `events` (a list, for `reserve`) or
        `event` (for `debit`).

        Raises:
            VerificationError: An entry that this budget could not have allowed, by its index.
        """
        budget = self
        for index, entry in enumerate(entries):
            try:
                budget = budget._replay_one(entry)
            except (BudgetSpent, ValueError, KeyError, TypeError, VerificationError) as error:
                reason = str(error) if isinstance(error, BudgetSpent | VerificationError) else "not a budget entry"
                raise VerificationError(reason, entry=index) from None
        return budget

    def _replay_one(self, entry: Mapping[str, Any]) -> Self:
        action, name = entry["action"], entry["name"]
        if not isinstance(name, str):
            raise ValueError("a reservation is named by text")
        if action == "reserve":
            return self.reserve([event_from_json(event) for event in entry["events"]], name)
        if action == "debit":
            return self.debit(event_from_json(entry["event"]), name)
        if action == "close":
            return self.close(name)
        raise ValueError("an action is reserve, debit or close")

    def _find(self, name: str) -> int | None:
        return next((index for index, held in enumerate(self.reservations) if held.name == name), None)

    def _with(self, index: int, reservation: Reservation) -> Self:
        return replace(self, reservations=(*self.reservations[:index], reservation, *self.reservations[index + 1 :]))


def _check_budget(epsilon: float, delta: float) -> None:
    if math.isnan(epsilon) or epsilon <= 0:
        raise ValueError("a privacy budget is positive")
    if not 0.0 < delta < 1.0:
        raise ValueError("delta is between 0 and 1")


def _listed(events: Events) -> tuple[Event, ...]:
    return tuple(events) if isinstance(events, Iterable) else (events,)


def _counted(events: Sequence[Event]) -> tuple[tuple[Event, int], ...]:
    """Return the single rounds in `events` and how often each occurs."""
    counts: Counter[Event] = Counter()

    def count(event: Event, times: int) -> None:
        if isinstance(event, Repeated):
            count(event.event, times * event.count)
        else:
            counts[event] += times

    for event in events:
        count(event, 1)
    return tuple(counts.items())


def _events(counted: Iterable[tuple[Event, int]]) -> tuple[Event, ...]:
    return tuple(Repeated(event, count) for event, count in counted if count)


def _has_sampling(event: Event) -> bool:
    if isinstance(event, Repeated):
        return _has_sampling(event.event)
    if isinstance(event, Composed):
        return any(_has_sampling(part) for part in event.events)
    return getattr(event, "sampling_rate", 1.0) < 1.0
