"""Who is in a round, and everything that is signed, agreed or derived from that: one place for both sides.

Indices count from 1, in the order of the roster; they are the points of the secret shares too.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import Refusal, VerificationError
from common.keys import SIGNATURE_BYTES, VerifyKey
from common.mask_graph import neighbours
from common.masks import agree_seed, derive_seed
from common.secagg_messages import Leg, MessageReader, Terms, digest, write_message
from common.shamir import SHARE_BYTES

__all__ = ["BOX_BYTES", "COMMITMENT_BYTES", "KEYS_BYTES", "NAME_BYTES", "Member", "Roster"]

NAME_BYTES = 32
PUBLIC_BYTES = 32
KEYS_BYTES = 2 * PUBLIC_BYTES + SIGNATURE_BYTES
BOX_BYTES = 2 * SHARE_BYTES + 29
"""A share of the mask key and one of the self mask, sealed."""

COMMITMENT_BYTES = 32


@dataclass(frozen=True)
class Member:
    """One device of a round.

    Attributes:
        name: Its enrolment key.
        mask_key: Public X25519 key of this round that masks are agreed with.
        box_key: Public X25519 key of this round that shares are sealed to.
        signature: By the enrolment key, over both and the terms.
    """

    name: VerifyKey
    mask_key: bytes
    box_key: bytes
    signature: bytes = b""

    def statement(self, terms: Terms) -> bytes:
        """Return what the signature is over."""
        return digest("keys", terms.digest, self.name.raw, self.mask_key, self.box_key)

    def to_bytes(self) -> bytes:
        """Write the record, 160 bytes."""
        return self.name.raw + self.mask_key + self.box_key + self.signature

    @classmethod
    def from_bytes(cls, record: bytes) -> Member:
        """Read what `to_bytes` wrote."""
        box, end = NAME_BYTES + PUBLIC_BYTES, NAME_BYTES + 2 * PUBLIC_BYTES
        return cls(VerifyKey(record[:NAME_BYTES]), record[NAME_BYTES:box], record[box:end], record[end:])


@dataclass(frozen=True)
class Roster:
    """The devices of one round, in order of their names.

    Attributes:
        terms: The round.
        members: Its devices; index 1 is the first.
    """

    terms: Terms
    members: tuple[Member, ...]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over terms and members."""
        return digest("roster", self.terms.digest, *(member.to_bytes() for member in self.members))

    @cached_property
    def degree(self) -> int:
        """Holders that each device draws beside itself."""
        return neighbours(len(self.members), self.terms.threshold, self.terms.corrupt)

    @cached_property
    def needed(self) -> int:
        """Devices without which nothing is unmasked."""
        return self.terms.needed(len(self.members))

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Member:
        """Return the device of an index, from 1."""
        return self.members[index - 1]

    def to_message(self) -> bytes:
        """Write the roster as the coordinator sends it."""
        return write_message(Leg.ROSTER, self.terms, *(member.to_bytes() for member in self.members))

    @classmethod
    def from_message(cls, message: bytes, terms: Terms) -> Roster:
        """Read what `to_message` wrote; nothing in it is checked yet.

        Raises:
            Refusal: It is not a roster of this round.
        """
        records = MessageReader(message, Leg.ROSTER, terms).records(NAME_BYTES + KEYS_BYTES)
        return cls(terms, tuple(Member.from_bytes(record) for record in records))

    def check(self, enrolled: Container[str]) -> None:
        """Return if the round may go on with these devices.

        Raises:
            Refusal: `small-cohort`, `bad-lists`, `unknown-key` or `bad-signature`.
        """
        if len(self) < self.terms.smallest_cohort:
            raise Refusal("small-cohort", f"the round has {len(self)} devices, {self.terms.smallest_cohort} are needed")
        if len(self) > self.terms.largest_cohort:
            raise Refusal("bad-lists", "the round has more devices than its modulus has room for")
        if any(one.name.raw >= other.name.raw for one, other in pairwise(self.members)):
            raise Refusal("bad-lists", "the roster is not in order, or lists a device twice")
        for index, member in enumerate(self.members, 1):
            if member.name.hex not in enrolled:
                raise Refusal("unknown-key", "the roster lists a device that is not enrolled")
            self.verify(index, member.signature, member.statement(self.terms))

    def verify(self, index: int, signature: bytes, statement: bytes) -> None:
        """Return if `signature` over `statement` is that of device `index`.

        Raises:
            Refusal: `bad-signature`.
        """
        try:
            self[index].name.verify(signature, statement)
        except VerificationError:
            raise Refusal("bad-signature", "a device's signature does not check out") from None

    def view(self, sharers: Iterable[int]) -> bytes:
        """Return what a survivor signs with its vector: the round as it was when it masked."""
        return digest("view", self.digest, _pack(sharers))

    def consent(self, sharers: Iterable[int], alive: Iterable[int], dropped: Iterable[int]) -> bytes:
        """Return what a survivor signs before anybody unmasks."""
        return digest("consent", self.view(sharers), _pack(alive), _pack(dropped))

    def commitment(self, index: int, secret: bytes) -> bytes:
        """Return what device `index` publishes of the secret of its self mask, so that false shares are noticed."""
        return digest("self mask", self.terms.digest, self[index].name.raw, secret)

    def self_seed(self, secret: bytes) -> bytes:
        """Return the seed of the self mask that `secret` stands for."""
        return derive_seed(secret, b"homespun secagg self", *self._place)

    def pair_seed(self, private: X25519PrivateKey, owner: int, other: int) -> bytes:
        """Return the seed that `owner`, whose mask key is `private`, and `other` mask with; the same from either side.

        Raises:
            Refusal: `bad-key`: the other's key is none.
        """
        names = sorted((self[owner].name.raw, self[other].name.raw))
        return self._agree(private, self[other].mask_key, b"homespun secagg pair", *self._place, *names)

    def box_key(self, private: X25519PrivateKey, owner: int, sender: int, holder: int) -> tuple[bytes, bytes]:
        """Return the key that shares are sealed under on their way from `sender` to `holder`, and their context.

        Args:
            private: The box key of `owner`.
            owner: One of the two.
            sender: Whose secrets are shared.
            holder: Who keeps the shares.

        Raises:
            Refusal: `bad-key`: the other's key is none.
        """
        other = self[holder if owner == sender else sender]
        context = digest("box", self.digest, self[sender].name.raw, self[holder].name.raw)
        return self._agree(private, other.box_key, b"homespun secagg box", *self._place, context), context

    @property
    def _place(self) -> tuple[bytes, ...]:
        return self.terms.run.encode(), struct.pack(">Q", self.terms.round), self.terms.digest

    def _agree(self, private: X25519PrivateKey, public: bytes, label: bytes, *parts: bytes) -> bytes:
        try:
            return agree_seed(private, public, label, *parts)
        except ValueError:
            raise Refusal("bad-key", "a device's key cannot be used") from None


def _pack(indices: Iterable[int]) -> bytes:
    listed = list(indices)
    return struct.pack(f"<{len(listed)}H", *listed)
