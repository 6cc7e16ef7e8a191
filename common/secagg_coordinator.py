"""The coordinator's side of a secure sum; `common.secagg` has the protocol, the devices' side and the proof."""

from __future__ import annotations

import struct
from collections.abc import Container
from typing import NoReturn

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import Refusal, VerificationError
from common.keys import SIGNATURE_BYTES, VerifyKey
from common.masks import Words, add_streams, packed_bytes, unpack_words
from common.secagg_messages import Leg, MessageReader, Terms, digest, write_message
from common.secagg_roster import BOX_BYTES, COMMITMENT_BYTES, KEYS_BYTES, NAME_BYTES, Member, Roster
from common.shamir import SHARE_BYTES, join_shares

__all__ = ["Coordinator"]


class Coordinator:
    """The coordinator's side of one round: takes answers in any order, and says what to send next.

    `receive` everything that comes in, then `advance` to the next leg; after the last leg, `total`. Whoever has not
    answered when `advance` is called has dropped. A refusal or an error from `advance` or `total` ends the round:
    nothing was learned.
    """

    def __init__(self, terms: Terms, *, enrolled: Container[str]) -> None:
        """Open a round under `terms` for devices whose keys are in `enrolled`, as hex."""
        self._terms = terms
        self._enrolled = enrolled
        self._leg: Leg | None = Leg.KEYS
        self._answers: dict[str, bytes] = {}
        self._keys: dict[str, Member] = {}
        self._roster = Roster(terms, ())
        self._indices: dict[str, int] = {}
        self._commitments: dict[int, bytes] = {}
        self._boxes: dict[int, dict[int, bytes]] = {}
        self._views: dict[int, bytes] = {}
        self._consents: dict[int, bytes] = {}
        self._shares: dict[int, dict[int, bytes]] = {}
        self._expected: frozenset[str] = frozenset()
        self._sum = np.zeros(terms.dim, dtype=np.uint32)

    @property
    def leg(self) -> Leg | None:
        """The leg whose answers are being received; None when the round is over."""
        return self._leg

    @property
    def devices(self) -> int:
        """Devices on the roster, once it is closed."""
        return len(self._roster)

    @property
    def survivors(self) -> int:
        """Devices whose vectors are in the sum."""
        return len(self._views)

    @property
    def waiting_for(self) -> frozenset[str]:
        """The devices that have not answered this leg yet; empty in the first, where nobody is expected."""
        return self._expected - self._answers.keys()

    def receive(self, message: bytes) -> str:
        """Take one device's answer of this leg, and return the device's name.

        Raises:
            VerificationError: It is not an answer of this leg by a device that owes one, or it does not check out. It
                is as if it had not come.
        """
        leg = self._leg
        if leg is None:
            raise VerificationError("the round is over")
        try:
            reader = MessageReader(message[:-SIGNATURE_BYTES], leg, self._terms)
            name = VerifyKey(reader.take(NAME_BYTES))
            if name.hex in self._answers:
                raise VerificationError("the device has answered this leg already")
            if name.hex not in (self._enrolled if leg is Leg.KEYS else self._expected):
                raise VerificationError("not a device that owes an answer")
            name.verify(message[-SIGNATURE_BYTES:], digest("answer", message[:-SIGNATURE_BYTES]))
            take = {
                Leg.KEYS: self._take_keys,
                Leg.SHARES: self._take_shares,
                Leg.MASKED: self._take_masked,
                Leg.CONSENT: self._take_consent,
                Leg.UNMASK: self._take_unmasking,
            }
            take[leg](name, reader)
        except Refusal as refusal:
            raise VerificationError(str(refusal)) from None
        self._answers[name.hex] = b""
        return name.hex

    def advance(self) -> dict[str, bytes]:
        """End this leg and return the next leg's message to each device that is still there, by name.

        Raises:
            Refusal: `small-cohort` or `too-few`: too few devices are left. The round is over, nothing was learned.
        """
        leg = self._leg
        if leg is None or leg is Leg.UNMASK:
            raise ValueError("there is no leg after this one")
        self._leg = None
        requests = {
            Leg.KEYS: self._close_keys,
            Leg.SHARES: self._close_shares,
            Leg.MASKED: self._close_masked,
            Leg.CONSENT: self._close_consent,
        }[leg]()
        self._leg = Leg(leg + 1)
        self._expected = frozenset(requests)
        self._answers = {}
        return requests

    def total(self) -> Words:
        """Return the sum of the survivors' vectors modulo 2^bits, shape (dim,).

        Raises:
            Refusal: `too-few`: too few shares came in to unmask the sum.
            VerificationError: Shares that do not join to what they were split from.
        """
        if self._leg is not Leg.UNMASK:
            raise ValueError("the round has not come to its end")
        self._leg = None
        alive = sorted(self._views)
        seeds: list[tuple[bytes, bool]] = []
        for owner in alive:
            secret = self._join(owner)
            if self._roster.commitment(owner, secret) != self._commitments[owner]:
                raise VerificationError("the shares of a self mask do not join to what was committed to")
            seeds.append((self._roster.self_seed(secret), False))
        for owner in sorted(self._boxes.keys() - self._views.keys()):
            key = X25519PrivateKey.from_private_bytes(self._join(owner))
            if key.public_key().public_bytes_raw() != self._roster[owner].mask_key:
                raise VerificationError("the shares of a mask key do not join to the key")
            for other in alive:
                if other in self._boxes[owner] or owner in self._boxes[other]:
                    # A survivor with the higher index subtracted this stream, so it is added back.
                    seeds.append((self._roster.pair_seed(key, owner, other), owner < other))
        add_streams(self._sum, seeds)
        return self._sum & np.uint32(2**self._terms.bits - 1)

    def _take_keys(self, name: VerifyKey, reader: MessageReader) -> None:
        body = reader.take(KEYS_BYTES)
        reader.finish()
        member = Member.from_bytes(name.raw + body)
        name.verify(member.signature, member.statement(self._terms))
        self._keys[name.hex] = member

    def _take_shares(self, name: VerifyKey, reader: MessageReader) -> None:
        index = self._indices[name.hex]
        commitment = reader.take(COMMITMENT_BYTES)
        boxes = reader.indexed(BOX_BYTES, len(self._roster))
        if len(boxes) != self._roster.degree or index in boxes:
            raise VerificationError("a device did not share with as many others as it must")
        self._commitments[index], self._boxes[index] = commitment, boxes

    def _take_masked(self, name: VerifyKey, reader: MessageReader) -> None:
        signature = reader.take(SIGNATURE_BYTES)
        packed = reader.take(packed_bytes(self._terms.dim, self._terms.bits))
        reader.finish()
        name.verify(signature, self._roster.view(sorted(self._boxes)))
        self._sum += unpack_words(packed, self._terms.dim, self._terms.bits)
        self._views[self._indices[name.hex]] = signature

    def _take_consent(self, name: VerifyKey, reader: MessageReader) -> None:
        signature = reader.take(SIGNATURE_BYTES)
        reader.finish()
        name.verify(signature, self._roster.consent(sorted(self._boxes), *self._lists()))
        self._consents[self._indices[name.hex]] = signature

    def _take_unmasking(self, name: VerifyKey, reader: MessageReader) -> None:
        index = self._indices[name.hex]
        shares = reader.indexed(SHARE_BYTES, len(self._roster))
        owed = {owner for owner, boxes in self._boxes.items() if index in boxes or owner == index}
        if shares.keys() != owed:
            raise VerificationError("a device did not reveal exactly the shares that it holds")
        for owner, share in shares.items():
            self._shares.setdefault(owner, {})[index] = share

    def _close_keys(self) -> dict[str, bytes]:
        if len(self._keys) < self._terms.smallest_cohort:
            self._stop("small-cohort", len(self._keys), self._terms.smallest_cohort)
        if len(self._keys) > self._terms.largest_cohort:
            raise Refusal("bad-lists", "more devices sent keys than the modulus has room for")
        members = tuple(sorted(self._keys.values(), key=lambda member: member.name.raw))
        self._roster = Roster(self._terms, members)
        self._indices = {member.name.hex: index for index, member in enumerate(members, 1)}
        return dict.fromkeys(self._keys, self._roster.to_message())

    def _close_shares(self) -> dict[str, bytes]:
        self._check_enough(len(self._boxes))
        sharers = sorted(self._boxes)
        requests: dict[str, bytes] = {}
        for index in sharers:
            boxes = [struct.pack("<H", at) + self._boxes[at][index] for at in sharers if index in self._boxes[at]]
            requests[self._name(index)] = write_message(Leg.DELIVERY, self._terms, sharers, *boxes)
        return requests

    def _close_masked(self) -> dict[str, bytes]:
        self._check_enough(len(self._views))
        signatures = (self._views[index] for index in sorted(self._views))
        message = write_message(Leg.SURVIVORS, self._terms, *self._lists(), *signatures)
        return {self._name(index): message for index in self._views}

    def _close_consent(self) -> dict[str, bytes]:
        self._check_enough(len(self._consents))
        records = (struct.pack("<H", index) + self._consents[index] for index in sorted(self._consents))
        message = write_message(Leg.CONSENTS, self._terms, *records)
        return {self._name(index): message for index in self._consents}

    def _join(self, owner: int) -> bytes:
        shares = self._shares.get(owner, {})
        threshold = self._terms.needed(len(self._boxes[owner]) + 1)
        if len(shares) < threshold:
            self._stop("too-few", len(shares), threshold)
        try:
            secret = join_shares({index: shares[index] for index in sorted(shares)[:threshold]})
        except ValueError:
            secret = None
        if secret is None:
            raise VerificationError("shares do not join to a secret")
        return secret

    def _lists(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the survivors and the dropped devices."""
        return tuple(sorted(self._views)), tuple(sorted(self._boxes.keys() - self._views.keys()))

    def _name(self, index: int) -> str:
        return self._roster[index].name.hex

    def _check_enough(self, devices: int) -> None:
        if devices < self._roster.needed:
            self._stop("too-few", devices, self._roster.needed)

    def _stop(self, code: str, found: int, wanted: int) -> NoReturn:
        raise Refusal(code, f"{found} devices are left in the round, {wanted} are needed")
