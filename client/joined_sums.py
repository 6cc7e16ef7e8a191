"""A joined device's part in secure sums: the roster that it checks, and secrets that outlive the work of the child.

The child trains and keeps the ledger; the resident part of the vault holds the round's keys, the update and the door,
in memory only. So a child that is killed or put away between two legs costs nothing: another one writes the debit.
A vault that is restarted in the middle of a round has forgotten its secrets and is, for that round, gone. That it began
the round is in its ledger, so it neither masks nor answers twice.

Order: the child says whether the work is granted; `join` is in the ledger; the child trains, and hands the clipped
update over; in the third leg the door draws the share and masks, the child writes debit and receipt; then it leaves.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from client.device_home import DeviceHome
from client.gate import Gate, Shares
from client.membership import Membership
from client.secure_sums import Joined, SecureSums, SumIdentity
from client.vault_child import Message
from common.errors import DataError, Refusal, VerificationError
from common.files import write_private_file
from common.privacy import Randomness
from common.secagg_messages import AggregationPolicy, Leg
from common.secure_sum import SecureSum
from common.sum_wire import SumLetters
from common.vouched_roster import VouchedRoster, federation_of
from common.wire import Assignment, Release, ReleaseSpec, from_raw_bytes, raw_bytes

__all__ = ["JoinedSums", "has_roster", "keep_roster"]

LEG_SECONDS = 180.0
"""How long after a letter the next one is waited for before other work goes first; a coordinator waits 120 s."""


def has_roster(home: DeviceHome, spec: ReleaseSpec) -> bool:
    """Whether this device holds the roster that a spec names."""
    try:
        _roster(home, spec)
    except Refusal:
        return False
    return True


def keep_roster(membership: Membership, spec: ReleaseSpec, content: bytes) -> None:
    """Check the roster of a run, and keep it.

    Raises:
        Refusal: `unknown-key`: it is not the one that the spec names, or lists a device that nobody vouches for.
    """
    try:
        roster = VouchedRoster.from_bytes(content)
    except VerificationError as error:
        raise Refusal("unknown-key", f"the coordinator sent {error}") from None
    if roster.digest != SecureSum.of(spec).roster:
        raise Refusal("unknown-key", "the coordinator sent another roster than the run's spec names")
    if not membership.invite.enroller:
        raise Refusal("unknown-key", "the invite names nobody who vouches for devices; leave, and join by a new one")
    roster.check(
        enroller=membership.invite.enroller,
        federation=federation_of(membership.invite.authority),
        own=membership.home.key.verify_key.hex,
        population=spec.population,
    )
    write_private_file(membership.home.folder / _name(membership, spec), roster.to_bytes(), replace=True)


class JoinedSums:
    """Secure sums of one device, whose work `ask` has a child do."""

    def __init__(
        self,
        home: DeviceHome,
        subject: str,
        ask: Callable[[Message], Message],
        fetch_roster: Callable[[ReleaseSpec], None],
    ) -> None:
        """Take part for `subject`.

        Args:
            home: Whose key, policy and roster.
            subject: Who lives here.
            ask: Has the child do something; it raises `Refusal` where that does not work.
            fetch_roster: Fetches, checks and keeps the roster of a run that is not here yet, or raises `Refusal`.
        """
        self._home = home
        self._subject = subject
        self._ask = ask
        self._fetch_roster = fetch_roster
        self._sums = SecureSums(self._identity, lambda *_: Randomness.system())
        self._until = float("-inf")

    @property
    def is_under_way(self) -> bool:
        """Whether a round waits for letters that this device has to answer soon."""
        return time.monotonic() < self._until

    def join(self, assignment: Assignment) -> SumLetters:
        """Train, and begin a secure sum; the update stays here until its leg has come.

        Raises:
            Refusal: The owner, the spec, the roster or the ledger says no, or the child did not get through.
        """
        spec, number = assignment.spec, assignment.round
        if spec.noise != "distributed" or assignment.devices or assignment.users != (self._subject,):
            raise Refusal("bad-request", "that is no secure sum of this device's")
        facts = {
            "spec": spec.to_text(),
            "round": number,
            "users": assignment.users,
            "clip_scale": assignment.clip_scale,
        }
        self._ask(Message({"do": "check", **facts}))
        if not has_roster(self._home, spec):
            self._fetch_roster(spec)
        self._sums.begin(spec, number, self._subject)
        held = self._ask(Message({"do": "hold", **facts}, raw_bytes(assignment.vector)))
        row = from_raw_bytes(held.content, spec.dtype).reshape(1, -1)

        def leave(shares: Shares) -> Release:
            return self._gate(facts).release(row, spec, number, shares=shares)

        keys = self._sums.keys(spec, number, self._subject, leave)
        self._until = time.monotonic() + LEG_SECONDS
        return SumLetters(spec.run, number, Leg.KEYS, {self._subject: keys}, {})

    def answer(self, asked: SumLetters) -> tuple[SumLetters, list[Refusal]]:
        """Answer the letters of one later leg, each with a letter or a code; return why as well, for the owner."""
        letters: dict[str, bytes] = {}
        refusals: list[Refusal] = []
        for name, message in asked.letters.items():
            try:
                if name != self._subject:
                    raise Refusal("not-here", "the letter is to somebody who does not live here")
                letters[name] = self._sums.answer(asked.run, asked.round, name, asked.leg, message)
                self._until = time.monotonic() + (LEG_SECONDS if asked.leg is not Leg.UNMASK else 0.0)
            except Refusal as refusal:
                refusals.append(refusal)
        codes = {name: refusals[-1].code for name in asked.letters if name not in letters}
        return SumLetters(asked.run, asked.round, asked.leg, letters, codes), refusals

    def _gate(self, facts: dict[str, Any]) -> Gate:
        """The door, whose ledger and store of what was sent the child keeps."""
        kept: list[NDArray[Any]] = []

        def record(_: ReleaseSpec, receipt: dict[str, Any]) -> None:
            self._ask(Message({"do": "record", **facts, "receipt": receipt}, raw_bytes(kept.pop())))

        return Gate(record, keep=lambda _, total: kept.append(total))

    def _identity(self, spec: ReleaseSpec, subject: str) -> SumIdentity:
        def note(run: str, number: int) -> None:
            facts = {"spec": spec.to_text(), "round": number, "users": (subject,)}
            if run != spec.run:
                raise Refusal("wrong-round", "the round is of another run than its spec")
            self._ask(Message({"do": "join", **facts}))

        return SumIdentity(
            self._home.key,
            lambda: _roster(self._home, spec).keys,
            lambda: AggregationPolicy(smallest_cohort=self._home.policy().smallest_cohort),
            Joined(self._home.read_ledger().entries, note),
        )


def _roster(home: DeviceHome, spec: ReleaseSpec) -> VouchedRoster:
    """The roster that a spec names; it was checked before it was kept.

    Raises:
        Refusal: `unknown-key`: it is not here, or another.
    """
    wanted = SecureSum.of(spec).roster
    try:
        content = (home.folder / _name(Membership.load(home), spec)).read_bytes()
        if hashlib.sha256(content).hexdigest() != wanted:
            raise ValueError
        return VouchedRoster.from_bytes(content)
    except (OSError, ValueError, VerificationError, DataError):
        raise Refusal("unknown-key", "this device holds no roster that it could check of that run's devices") from None


def _name(membership: Membership, spec: ReleaseSpec) -> str:
    """Of a roster that was checked for this federation and its enroller; another's check counts for nothing here."""
    checked_for = f"{federation_of(membership.invite.authority)}\n{membership.invite.enroller}\n{spec.run}"
    return f"roster-{hashlib.sha256(checked_for.encode()).hexdigest()[:32]}.json"
