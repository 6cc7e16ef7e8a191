"""What this device has released and may still release: asked before the work, written before bytes leave.

A run's whole schedule is reserved and priced as one when it first releases anything; every release is a debit under
that reservation. The price is taken from what would really run (rate, noise, rounds), never from what a server says it
costs. Budgets belong to the subject: every run that this ledger holds counts. Runs that promise under one adjacency are
priced together; prices under different ones are added up.
"""

from __future__ import annotations

from typing import Any

from client.policy import Policy, ReleaseRequest
from common.accounting import Event, epsilon_of, event_from_json
from common.errors import BudgetSpent
from common.ledger import Entry, Ledger
from common.privacy import Adjacency
from common.promise import promise_of
from common.wire import ReleaseSpec

__all__ = ["DeviceLedger"]


class DeviceLedger:
    """The ledger of one subject under the policy of its owner. One thread at a time."""

    def __init__(self, ledger: Ledger, policy: Policy) -> None:
        """Account in `ledger`, which is open, for what `policy` grants."""
        self._ledger = ledger
        self._policy = policy
        self._affordable = ""  # the spec whose price was last found to fit, until something is reserved

    def check(self, spec: ReleaseSpec, number: int) -> None:
        """Return if a release in round `number` is granted and can be paid for; changes nothing.

        Raises:
            Refusal: The owner does not grant it, with the policy's code.
            BudgetSpent: It would exceed the subject's budget, or the run has used what it reserved.
        """
        self._policy.check(
            ReleaseRequest(
                run_id=spec.run,
                round=number,
                unit=spec.unit,
                noise=promise_of(spec).noise,
                clip=spec.clip,
                noise_multiplier=spec.noise_multiplier,
                sampling_rate=spec.sampling_rate,
                rounds=spec.rounds,
                cohort=round(spec.sampling_rate * spec.population),
                population=spec.population,
                epsilon=float(spec.epsilon),
                delta=spec.delta,
            )
        )
        reservation = self._reservation(spec)
        if reservation is None:
            self._check_price(spec)
        elif self._debits(reservation) >= spec.rounds and not self._releases(spec, number):
            raise BudgetSpent(f"all {spec.rounds} releases that the run reserved are used")

    def record(self, spec: ReleaseSpec, receipt: dict[str, Any]) -> None:
        """Debit one release and write its receipt; both are on disk when this returns.

        The same bytes for the same run, round and spec are the same release and need no second debit.

        Raises:
            BudgetSpent: It would exceed the budget or the reservation; nothing was written.
            StoreError: The disk failed; nothing may leave.
        """
        number = int(receipt["round"])
        if any(entry.body["sha256"] == receipt["sha256"] for entry in self._releases(spec, number)):
            return
        promise = promise_of(spec)
        event = promise.event(spec.noise_multiplier)
        bound = {"run": spec.run, "spec": spec.digest}
        entries: list[tuple[str, dict[str, Any]]] = []
        index = self._ledger.head.index + 1
        reservation = self._reservation(spec)
        if reservation is None:
            self._check_price(spec)
            whole = promise.schedule(spec.noise_multiplier, spec.rounds)
            kind = {"adjacency": promise.adjacency.value, "unit": promise.unit.value, "delta": spec.delta}
            entries.append(("reserve", {"event": whole.to_json(), **kind, **bound}))
            reservation = index
            self._affordable = ""
        elif self._debits(reservation) >= spec.rounds:
            raise BudgetSpent(f"all {spec.rounds} releases that the run reserved are used")
        entries.append(("debit", {"event": event.to_json(), "reservation": reservation, "round": number, **bound}))
        entries.append(("release", {"debit": index + len(entries) - 1, **receipt}))
        self._ledger.append_many(entries)

    def _check_price(self, spec: ReleaseSpec) -> None:
        if spec.digest == self._affordable:
            return
        promise = promise_of(spec)
        charged: dict[Adjacency, list[Event]] = {
            promise.adjacency: [promise.schedule(spec.noise_multiplier, spec.rounds)]
        }
        for entry in self._ledger.entries():
            if entry.kind == "reserve":
                charged.setdefault(Adjacency(entry.body["adjacency"]), []).append(event_from_json(entry.body["event"]))
        delta = self._policy.delta / len(charged)
        if sum(epsilon_of(events, delta, "pld", kind) for kind, events in charged.items()) > self._policy.epsilon:
            raise BudgetSpent(
                f"{spec.rounds} rounds of this run would exceed the subject's budget of epsilon "
                f"{self._policy.epsilon:g} at delta {self._policy.delta:g}"
            )
        self._affordable = spec.digest

    def _reservation(self, spec: ReleaseSpec) -> int | None:
        for entry in self._ledger.entries():
            if entry.kind == "reserve" and (entry.body["run"], entry.body["spec"]) == (spec.run, spec.digest):
                return entry.index
        return None

    def _debits(self, reservation: int) -> int:
        return sum(
            1
            for entry in self._ledger.entries()
            if entry.kind == "debit" and entry.body.get("reservation") == reservation
        )

    def _releases(self, spec: ReleaseSpec, number: int) -> list[Entry]:
        wanted = (spec.run, spec.digest, number)
        return [
            entry
            for entry in self._ledger.entries()
            if entry.kind == "release"
            and (entry.body.get("run"), entry.body.get("spec"), entry.body.get("round")) == wanted
        ]
