"""The device's part in the secure sums of its rounds: begun, held while the letters go back and forth, and forgotten.

The update waits here between training and the leg that sends it; its share of the noise is drawn and its debit written
only then, when the device has seen how many take part and that enough of them shared their secrets. A device that is
restarted in the middle of a round has forgotten its secrets and is, for that round, gone; that it began the round it
does not forget (`Joined`).

The door is the gate's, as ever: what leaves here beside it is keys, sealed shares, signatures and shares of masks, made
by `common.secagg` without a look at the update.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, MutableSet, Sequence
from dataclasses import dataclass
from pathlib import Path

from client.budget_keeper import BudgetKeeper
from client.device_home import DeviceHome
from client.gate import Shares
from common.errors import Refusal
from common.keys import SigningKey
from common.ledger import Entry
from common.masks import Words
from common.privacy import Randomness
from common.secagg import Participant
from common.secagg_messages import AggregationPolicy, Leg
from common.secure_sum import SecureSum
from common.sum_wire import read_roster, simulated_identity
from common.wire import Release, ReleaseSpec

__all__ = ["Joined", "SecureSums", "SumIdentity", "after", "share_randomness", "sums_of_device", "sums_of_simulation"]

MOST_HELD = 4
"""Rounds of a subject that may be in flight; an older one is given up, so that a bundle cannot fill the memory."""


class Joined(MutableSet[tuple[str, int]]):
    """The runs and rounds that a device has begun a secure sum in: entries of its ledger, on disk before it begins."""

    def __init__(self, entries: Iterable[Entry], note: Callable[[str, int], None]) -> None:
        """Know what `entries` say; `note` writes another run and round down, on disk when it returns."""
        self._note = note
        self._known: set[tuple[str, int]] = set()
        for entry in entries:
            bodies = [entry.body] if entry.kind == "join" else []
            if entry.kind == "compact":
                bodies = [total["body"] for total in entry.body["totals"] if total["kind"] == "join"]
            self._known.update((str(body["run"]), int(body["round"])) for body in bodies)

    def __contains__(self, item: object) -> bool:
        return item in self._known

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._known)

    def __len__(self) -> int:
        return len(self._known)

    def add(self, value: tuple[str, int]) -> None:
        """Note, on disk when this returns, that a round was begun."""
        self._note(*value)
        self._known.add(value)

    def discard(self, value: tuple[str, int]) -> None:
        """Refuse: what was begun stays begun."""
        raise TypeError(f"round {value[1]} was begun, and that is not forgotten")


@dataclass(frozen=True)
class SumIdentity:
    """Who a device is to the others of its rounds.

    Attributes:
        key: Its enrolment key, which signs its keys of every round.
        enrolled: Enrolment keys of all devices, as hex, asked anew in every round; what the owner trusts, not what a
            message says.
        policy: What the owner demands of a secure sum, asked anew in every round.
        joined: Rounds that were begun.
    """

    key: SigningKey
    enrolled: Callable[[], Container[str]]
    policy: Callable[[], AggregationPolicy]
    joined: MutableSet[tuple[str, int]]


@dataclass
class _Part:
    """One subject's part in one sum; `leave` lets the update leave, once."""

    spec: ReleaseSpec
    sums: SecureSum
    participant: Participant
    leave: Callable[[Shares], Release] | None = None


class SecureSums:
    """Takes part in secure sums for the subjects that live here."""

    def __init__(
        self, identity_of: Callable[[ReleaseSpec, str], SumIdentity], randomness_of: Callable[[int, str], Randomness]
    ) -> None:
        """Take part.

        Args:
            identity_of: Who a subject is in the run of a spec.
            randomness_of: What is drawn from for a subject in a round.
        """
        self._identity_of = identity_of
        self._randomness_of = randomness_of
        self._parts: dict[tuple[str, str, int], _Part] = {}
        self._lock = threading.Lock()

    def begin(self, spec: ReleaseSpec, number: int, subject: str) -> None:
        """Take part in a round, or refuse; asked before the work.

        Raises:
            Refusal: The round was begun before, its terms are below the owner's, or nobody is known to be enrolled.
        """
        identity, sums = self._identity_of(spec, subject), SecureSum.of(spec)
        with self._lock:
            participant = Participant(
                sums.terms(spec, number),
                policy=identity.policy(),
                signing_key=identity.key,
                enrolled=identity.enrolled(),
                answered=identity.joined,
                randomness=self._randomness_of(number, subject).child("protocol"),
            )
            own = [key for key in self._parts if key[0] == subject]
            for old in own[: max(0, len(own) + 1 - MOST_HELD)]:
                del self._parts[old]
            self._parts[subject, spec.run, number] = _Part(spec, sums, participant)

    def keys(self, spec: ReleaseSpec, number: int, subject: str, leave: Callable[[Shares], Release]) -> bytes:
        """Return the signed keys of a round that was begun; `leave` is kept until the vector is asked for."""
        with self._lock:
            part = self._part(subject, spec.run, number)
            part.leave = leave
            return part.participant.keys()

    def answer(self, run: str, number: int, subject: str, leg: Leg, message: bytes) -> bytes:
        """Answer one of the later legs.

        Raises:
            Refusal: The protocol, the owner or the door says no; of this round nothing more leaves.
        """
        with self._lock:
            part = self._part(subject, run, number)
            participant = part.participant
            if leg is Leg.SHARES:
                return participant.share(message)
            if leg is Leg.MASKED:
                return self._masked(part, number, subject, message)
            if leg is Leg.CONSENT:
                return participant.consent(message)
            if leg is Leg.UNMASK:
                try:
                    return participant.unmask(message)
                finally:
                    del self._parts[subject, run, number]
        raise Refusal("out-of-order", "keys are answered with the training that they belong to")

    def _masked(self, part: _Part, number: int, subject: str, message: bytes) -> bytes:
        """Let the update through the gate: noised with a share for the round's devices, debited, and masked."""
        leave, part.leave = part.leave, None
        if leave is None:
            raise Refusal("repeated", "this device has sent its vector already, or has none")
        devices = part.participant.devices
        terms = part.sums.terms(part.spec, number)
        try:
            noise = part.sums.noise(part.spec, devices)
        except ValueError:
            raise Refusal("small-cohort", "the round has more or fewer devices than the run allows") from None
        noise.check(terms, devices)

        def mask(words: Words) -> bytes:
            return part.participant.mask(message, words)

        randomness = self._randomness_of(number, subject)
        return leave(Shares(noise, terms.digest, [randomness], mask)).total.tobytes()

    def _part(self, subject: str, run: str, number: int) -> _Part:
        part = self._parts.get((subject, run, number))
        if part is None:
            raise Refusal("closed", "this device is not, or not any more, in that round")
        return part


def sums_of_simulation(
    subjects: Sequence[str], randomness_of: Callable[[int, str], Randomness], *, smallest_cohort: int = 3
) -> SecureSums:
    """Take part in secure sums for every one of `subjects`, which are simulated in this process."""
    rosters: dict[str, frozenset[str]] = {}

    def enrolled(run: str) -> frozenset[str]:
        if run not in rosters:
            rosters[run] = frozenset(simulated_identity(run, name).verify_key.hex for name in subjects)
        return rosters[run]

    joined: dict[str, set[tuple[str, int]]] = {}

    def identity(spec: ReleaseSpec, subject: str) -> SumIdentity:
        return SumIdentity(
            simulated_identity(spec.run, subject),
            lambda: enrolled(spec.run),
            lambda: AggregationPolicy(smallest_cohort=smallest_cohort),
            joined.setdefault(subject, set()),
        )

    return SecureSums(identity, randomness_of)


def sums_of_device(home: DeviceHome, keeper: BudgetKeeper, roster: Path | None) -> SecureSums:
    """Take part in secure sums with a device's enrolment key, under its owner's policy.

    Args:
        home: Whose key and policy.
        keeper: Of its ledger, which remembers the rounds that were begun.
        roster: JSON list of the enrolment keys of all devices, as hex; read anew in every round. Without it nobody is
            known, and every round is refused.
    """
    joined = Joined(keeper.entries(), keeper.note_join)

    def enrolled() -> frozenset[str]:
        if roster is None:
            raise Refusal(
                "unknown-key", "this device was given no roster of enrolled devices; see `device up --roster`"
            )
        return read_roster(roster)

    def policy() -> AggregationPolicy:
        return AggregationPolicy(smallest_cohort=home.policy().smallest_cohort)

    identity = SumIdentity(home.key, enrolled, policy, joined)
    return SecureSums(lambda *_: identity, lambda *_: Randomness.system())


def share_randomness(seed: int | None) -> Callable[[int, str], Randomness]:
    """Return what draws a user's share in a round: the system, or a rehearsal's seed, whoever trains beside."""
    if seed is None:
        return lambda *_: Randomness.system()
    return lambda number, subject: Randomness.rehearsal(seed, "sum", number, subject)


def after(count: int, then: Callable[[], None]) -> Callable[[], None]:
    """Return what calls `then` when it was called `count` times: what stays is kept when all updates left."""
    left = iter(range(count - 1, -1, -1))

    def count_down() -> None:
        if next(left) == 0:
            then()

    return count_down
