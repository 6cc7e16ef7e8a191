"""The subject's budget, kept on the device: asked before the work, debited on disk before the bytes leave.

The budget belongs to the subject, not to a run, a server or a file: every run that this ledger holds counts, under
whatever name, with whatever records, before and after `forget`, a restart or another enrolment. What a run costs is
priced from what would really run (its rate, noise and rounds), never from the epsilon that a server writes beside it.

1. *Before the work* `check` asks the owner's signed policy and the budget. A run's whole schedule is priced as one,
   together with every schedule that was reserved before: by a filter, since who chose this one may have seen what the
   others released (`common.budget.chosen_epsilon`).
2. *At the door* `record` asks both again and writes, with one flush to disk, the reservation (once per run and spec),
   the debit and the receipt. Only then does the gate hand the bytes over.

What is in flight when the budget ends: work that passed `check` and has not reached the door holds nothing. The first
of two such runs to reach the door reserves; the second is refused there, and nothing of it leaves. A release that was
debited and did not get out (a crash, a lost message) stays debited; the very same bytes may be sent again under that
debit. A policy that was tightened meanwhile holds at the door.

What a spent budget stops is sending. The personal model, training for its owner and global updates do not pass here.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from client.device_home import RESTORED, DeviceHome
from client.policy import Policy, ReleaseRequest
from common.accounting import Event, Repeated, epsilon_of, event_from_json
from common.budget import chosen_epsilon
from common.claims import ADJACENCY_WORDS, UNIT_WORDS, rounded_up
from common.errors import BudgetSpent, ClaimRefused, Refusal
from common.ledger import Entry, Ledger, debits
from common.noised_counts import NoisedCounts
from common.privacy import Adjacency, Unit
from common.promise import promise_of
from common.secure_sum import SecureSum
from common.wire import ReleaseSpec, raw_bytes

__all__ = ["Account", "BudgetKeeper", "RunAccount", "account_of", "sent_bytes"]

SENT = "sent"
"""Name under which the bytes that left lie in the store of what was sent, one version per release."""


@dataclass(frozen=True)
class RunAccount:
    """One reservation: a run under one release spec.

    Attributes:
        run: Id of the run.
        spec: Digest of what was asked for.
        rounds: Releases that the reservation covers.
        debited: Releases that were debited.
        reserved_epsilon: What the whole reservation costs by itself, at the account's delta.
    """

    run: str
    spec: str
    rounds: int
    debited: int
    reserved_epsilon: float


@dataclass(frozen=True)
class Account:
    """What a subject may release and has released.

    Attributes:
        limit: Epsilon over everything this subject ever releases.
        delta: Failure probability of all of it.
        unit: Whose presence is hidden; None until something is reserved.
        adjacency: What neighbouring data sets differ in.
        reserved: Epsilon of all reservations, which is what counts against the limit.
        released: Epsilon of what was debited so far.
        runs: The reservations in their order.
        refills: How often the owner raised the limit.
    """

    limit: float
    delta: float
    unit: Unit | None
    adjacency: Adjacency
    reserved: float
    released: float
    runs: tuple[RunAccount, ...]
    refills: int

    def sentence(self) -> str:
        """Say it with unit, adjacency and delta."""
        limit = f"The budget is epsilon {rounded_up(self.limit)} at delta {self.delta:.3g}"
        if self.unit is None:
            return f"{limit}, over everything this device ever releases. Nothing was released."
        return (
            f"{limit}, over everything this device ever releases, for {UNIT_WORDS[self.unit]}, "
            f"{ADJACENCY_WORDS[self.adjacency]}. Reserved, which counts: epsilon {rounded_up(self.reserved)}, by "
            f"{len(self.runs)} run(s); released so far: epsilon {rounded_up(self.released)}, in "
            f"{sum(run.debited for run in self.runs)} release(s), both at the same delta."
        )


class BudgetKeeper:
    """Keeps the budget of one subject in its ledger, under the policy of its owner."""

    def __init__(self, home: DeviceHome, ledger: Ledger) -> None:
        """Account in `ledger`, which was opened from `home` and stays open."""
        self._home = home
        self._ledger = ledger
        self._serial = 1
        self._prices: dict[tuple[object, ...], float] = {}
        self._lock = threading.RLock()

    @property
    def subject(self) -> str:
        """The random name of the person this device belongs to; it never changes."""
        return str(self._ledger.header["subject"])

    def check(self, spec: ReleaseSpec, number: int) -> None:
        """Return if a release in round `number` is granted and can be paid for; nothing is written.

        Raises:
            Refusal: The owner does not grant it, with the policy's code.
            BudgetSpent: It would exceed the subject's budget, or the run has used what it reserved.
        """
        with self._lock:
            policy = self._granted(spec, number)
            if any(one.body["spec"] == spec.digest for one in self._answers(spec.run, number)):
                return  # the same bytes may go out again under their debit; the door tells whether they are the same
            self._check_not_taken(spec.run, number)
            self._reservation(policy, spec)

    def keep(self, receipt: dict[str, Any], total: NDArray[Any]) -> None:
        """Seal the very bytes that are about to leave, for `homespun device sent ID`."""
        with self._home.open_sent() as store:
            store.put(self.subject, SENT, raw_bytes(total), base_digest=receipt["spec"], version_note=receipt["sha256"])

    def record(self, spec: ReleaseSpec, receipt: dict[str, Any]) -> None:
        """Debit one release and write its receipt; both are on disk when this returns.

        Guarantee: what is reserved never costs more than the budget in force, and every release has a debit of its
            own, except for the same bytes in the same round of the same spec, which are the same release.

        Raises:
            Refusal: The owner does not grant it any more, or the round of a sampled run was answered with other bytes.
            BudgetSpent: It would exceed the budget or the reservation; nothing was written.
            StoreError: The disk failed; nothing may leave.
        """
        with self._lock:
            number = int(receipt["round"])
            policy = self._granted(spec, number)
            answers = self._answers(spec.run, number)
            if any((one.body["sha256"], one.body["spec"]) == (receipt["sha256"], spec.digest) for one in answers):
                return
            self._check_not_taken(spec.run, number)
            promise = promise_of(spec)
            if answers and promise.unit is Unit.USER and (promise.rate < 1 or promise.noise == "distributed"):
                # Two releases from one cohort are not two sampled events, see common.events.PoissonComposed.
                raise Refusal(
                    "bad-request", "this round was answered before, with other bytes; one cohort, one release"
                )
            reservation = self._reservation(policy, spec)
            event, releases = promise.own_schedule(spec)
            bound = {"run": spec.run, "spec": spec.digest}
            entries: list[tuple[str, dict[str, Any]]] = []
            first = self._ledger.head.index + 1
            if not any(entry.kind == "refill" for entry in self._ledger.entries()):
                entries.append(("refill", _grant_body(policy.epsilon, policy.delta, policy)))
            if reservation is None:
                reservation = first + len(entries)
                schedule = Repeated(event, releases)
                facts = {"unit": str(promise.unit), "adjacency": str(promise.adjacency), "policy": policy.digest}
                entries.append(("reserve", {"event": schedule.to_json(), **bound, **facts}))
            entries.append(("debit", {"event": event.to_json(), "reservation": reservation, "round": number, **bound}))
            entries.append(("release", {"debit": first + len(entries) - 1, **receipt}))
            self._home.keep_head(self._ledger.append_many(entries)[-1])

    def take_as_spent(self, spec: ReleaseSpec, rounds: int) -> int:
        """Debit the first `rounds` rounds of a run that this ledger does not hold; return how many those are.

        For a ledger that was put back from a copy: what was released since is not in it, nor what was granted since, so
        no policy is asked. Of runs in another unit of privacy nothing was released: the door mixes no units.
        """
        with self._lock:
            policy, promise = self._policy(), promise_of(spec)
            event, releases = promise.own_schedule(spec)
            entries, held = self._ledger.entries(), _reservations(self._ledger.entries())
            if held and held[0].body["unit"] != promise.unit:
                return 0
            own = next((one for one in held if (one.body["run"], one.body["spec"]) == (spec.run, spec.digest)), None)
            known = {entry.body.get("round") for entry in entries if own and entry.body.get("reservation") == own.index}
            missing = [number for number in range(1, min(rounds, releases) + 1) if number not in known]
            if not missing:
                return 0
            bound = {"run": spec.run, "spec": spec.digest}
            new: list[tuple[str, dict[str, Any]]] = []
            if not any(entry.kind == "refill" for entry in entries):
                new.append(("refill", _grant_body(policy.epsilon, policy.delta, policy)))
            reservation = self._ledger.head.index + 1 + len(new) if own is None else own.index
            if own is None:
                facts = {"unit": str(promise.unit), "adjacency": str(promise.adjacency), "policy": policy.digest}
                new.append(("reserve", {"event": Repeated(event, releases).to_json(), **bound, **facts}))
            for number in missing:
                body = {"event": event.to_json(), "reservation": reservation, "round": number, **bound}
                new.append(("debit", body))
            self._home.keep_head(self._ledger.append_many(new)[-1])
            return len(missing)

    def note_join(self, run: str, number: int) -> None:
        """Write down, on disk when this returns, that a secure sum was begun in a round of a run."""
        with self._lock:
            self._home.keep_head(self._ledger.append("join", {"run": run, "round": number}))

    def entries(self) -> Sequence[Entry]:
        """Return what the ledger holds."""
        with self._lock:
            return self._ledger.entries()

    def account(self) -> Account:
        """Return what was spent and what is left."""
        with self._lock:
            return account_of(self._ledger.entries(), self._policy())

    def refill(self, epsilon: float, delta: float | None = None) -> Account:
        """Raise the limit to `epsilon`, on the owner's explicit word; everything released before still counts.

        Raises:
            Refusal: The policy grants less than that.
            ValueError: It is no more than the limit in force, or not a budget.
        """
        with self._lock:
            policy = self._policy()
            before = account_of(self._ledger.entries(), policy)
            if not (epsilon > before.limit and epsilon > 0):
                raise ValueError("a refill raises the limit; a policy with a smaller epsilon lowers it")
            if epsilon > policy.epsilon:
                raise Refusal("policy-epsilon", f"the policy grants epsilon {policy.epsilon:g} at most; set that first")
            limit_delta = before.delta if delta is None else min(delta, policy.delta)
            self._home.keep_head(self._ledger.append("refill", _grant_body(epsilon, limit_delta, policy)))
            return account_of(self._ledger.entries(), policy)

    def forget(self, scope: Literal["records", "adapters", "profile", "all"] = "all") -> None:
        """Note that the owner had state erased, and erase what methods kept and copies of what was sent.

        The budget stays spent.

        The subject's id and this ledger stay: whoever enrols again goes on where this ended.
        """
        with self._lock:
            items: list[tuple[str, dict[str, Any]]] = [("forget", {"scope": scope, "subject": self.subject})]
            if scope == "all":
                items.append(("tombstone", {"subject": self.subject}))
            self._home.keep_head(self._ledger.append_many(items)[-1])
            if scope in ("adapters", "all"):
                with self._home.open_kept() as store:
                    store.erase(self.subject)
            if scope == "all":
                with self._home.open_sent() as store:
                    store.erase(self.subject)

    def _policy(self) -> Policy:
        """Read the policy in force; an older one that the owner once signed is none."""
        policy = self._home.policy(least_serial=self._serial)
        self._serial = policy.serial
        return policy

    def _granted(self, spec: ReleaseSpec, number: int) -> Policy:
        if (self._home.folder / RESTORED).exists():
            raise Refusal(
                "not-now", "this device was put back from a copy; it sends nothing until its coordinator has answered"
            )
        policy = self._policy()
        if spec.extrapolation != 1.0:
            raise ClaimRefused("noise that is scaled down promises nothing, so nothing leaves under it")
        # With distributed noise the owner is asked about what holds against the coordinator: the larger number.
        multiplier, epsilon = spec.noise_multiplier, float(spec.epsilon)
        if spec.noise == "distributed":
            sums = SecureSum.of(spec)
            multiplier, epsilon = sums.noise_multiplier, max(epsilon, float(sums.epsilon))
        counts = NoisedCounts.of(spec)
        policy.check(
            ReleaseRequest(
                run_id=spec.run,
                round=number,
                unit=spec.unit,
                noise=spec.noise,
                clip=spec.clip,
                noise_multiplier=multiplier,
                sampling_rate=spec.sampling_rate,
                rounds=spec.rounds,
                cohort=round(spec.sampling_rate * spec.population),
                population=spec.population,
                epsilon=epsilon,
                delta=spec.delta,
                metrics=() if counts is None else counts.metrics,
            )
        )
        return policy

    def _reservation(self, policy: Policy, spec: ReleaseSpec) -> int | None:
        """Return the reservation of `spec`, None where it would be a new one; all of them together are affordable."""
        entries = self._ledger.entries()
        held = _reservations(entries)
        own = next((one for one in held if (one.body["run"], one.body["spec"]) == (spec.run, spec.digest)), None)
        used = 0 if own is None else _debited(entries, own.index)
        promise = promise_of(spec)
        event, releases = promise.own_schedule(spec)
        if used >= releases:
            raise BudgetSpent(f"all {releases} releases that the run reserved are used")
        if held and held[0].body["unit"] != promise.unit:
            raise Refusal("policy-unit", "this subject's budget is in another unit of privacy, and they do not add up")
        events = [event_from_json(one.body["event"]) for one in held]
        adjacencies = [Adjacency(one.body["adjacency"]) for one in held]
        if own is None:
            events.append(Repeated(event, releases))
            adjacencies.append(promise.adjacency)
        limit, delta = _limit(entries, policy)
        if self._price(events, delta, _common_adjacency(adjacencies)) > limit:
            raise BudgetSpent(
                f"{releases} rounds of this run would exceed the subject's budget of epsilon {limit:g} "
                f"at delta {delta:g}"
            )
        return None if own is None else own.index

    def _price(self, events: Sequence[Event], delta: float, adjacency: Adjacency) -> float:
        key = (tuple(events), delta, adjacency)
        if key not in self._prices:
            if len(self._prices) >= 16:
                self._prices.clear()
            self._prices[key] = chosen_epsilon(events, delta, adjacency)
        return self._prices[key]

    def _check_not_taken(self, run: str, number: int) -> None:
        """Refuse a round that was taken as spent: it may have been answered, with bytes that are not known any more.

        Raises:
            Refusal: It was.
        """
        taken = any(
            entry.kind == "debit" and (entry.body.get("run"), entry.body.get("round")) == (run, number)
            for entry in self._ledger.entries()
        )
        if taken and not self._answers(run, number):
            raise Refusal("bad-request", "this round was taken as spent when the device was put back from a copy")

    def _answers(self, run: str, number: int) -> list[Entry]:
        return [
            entry
            for entry in self._ledger.entries()
            if entry.kind == "release" and (entry.body.get("run"), entry.body.get("round")) == (run, number)
        ]


def sent_bytes(home: DeviceHome, receipt: str) -> bytes | None:
    """Return the very bytes that left under the digest `receipt`; None where they are not kept any more."""
    subject = str(home.read_ledger().header["subject"])
    with home.open_sent() as store:
        for version in store.versions(subject, SENT):
            if version.version_note == receipt:
                return store.get(subject, SENT, version=version.version)
    return None


def account_of(entries: Sequence[Entry], policy: Policy) -> Account:
    """Read an account from the entries of a device's ledger."""
    held = _reservations(entries)
    limit, delta = _limit(entries, policy)
    adjacency = _common_adjacency([Adjacency(one.body["adjacency"]) for one in held])
    runs: list[RunAccount] = []
    released: list[Event] = []
    for one in held:
        event = event_from_json(one.body["event"])
        own = [
            event_from_json(entry.body["event"])
            for entry in entries
            if entry.kind == "debit" and entry.body.get("reservation") == one.index
        ]
        released += own
        rounds = event.count if isinstance(event, Repeated) else 1
        price = epsilon_of([event], delta, "pld", Adjacency(one.body["adjacency"]))
        runs.append(RunAccount(one.body["run"], one.body["spec"], rounds, len(own), price))
    reserved = [event_from_json(one.event) for one in debits(entries)]
    return Account(
        limit=limit,
        delta=delta,
        unit=Unit(held[0].body["unit"]) if held else None,
        adjacency=adjacency,
        reserved=chosen_epsilon(reserved, delta, adjacency),
        released=epsilon_of(released, delta, "pld", adjacency),
        runs=tuple(runs),
        refills=max(0, sum(1 for entry in entries if entry.kind == "refill") - 1),
    )


def _limit(entries: Sequence[Entry], policy: Policy) -> tuple[float, float]:
    """Return the epsilon and delta in force: the owner's last word in the ledger, and never more than the policy.

    A policy can only lower it: raising the epsilon in a file is not the explicit command that a refill is.
    """
    granted = next((entry.body for entry in reversed(entries) if entry.kind == "refill"), None)
    if granted is None:
        return policy.epsilon, policy.delta
    epsilon = math.inf if granted["epsilon"] == "inf" else float(granted["epsilon"])
    return min(epsilon, policy.epsilon), min(float(granted["delta"]), policy.delta)


def _grant_body(epsilon: float, delta: float, policy: Policy) -> dict[str, Any]:
    return {"epsilon": "inf" if math.isinf(epsilon) else epsilon, "delta": delta, "policy": policy.digest}


def _reservations(entries: Sequence[Entry]) -> list[Entry]:
    return [entry for entry in entries if entry.kind == "reserve"]


def _debited(entries: Sequence[Entry], reservation: int) -> int:
    return sum(1 for entry in entries if entry.kind == "debit" and entry.body.get("reservation") == reservation)


def _common_adjacency(adjacencies: Sequence[Adjacency]) -> Adjacency:
    """Return the adjacency under which all of them hold together.

    A multiplier against replacement, the doubled sensitivity, bounds zeroing out as well.
    """
    kinds = set(adjacencies)
    return kinds.pop() if len(kinds) == 1 else Adjacency.ZERO_OUT
