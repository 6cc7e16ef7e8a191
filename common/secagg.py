"""A sum of vectors of which nobody sees one: both roles, as state machines over bytes.

There is no network and no clock here. Whoever drives a `Participant` or the `Coordinator` carries bytes between them,
decides how long to wait, and treats whoever is late as dropped. Five legs:

=========  =========================================  ========================================================
leg        the coordinator sends                      each device answers
=========  =========================================  ========================================================
keys       the terms of the round                     two fresh X25519 keys, signed by its enrolment key
shares     the roster: everybody's signed keys        its secrets in shares, each sealed to one holder
masked     who shared, and the shares for this one    the masked vector, and a signature over roster and sharers
consent    who survived and who dropped, with the     a signature over survivors and dropped
           survivors' signatures of the leg before
unmask     the consents                               of each survivor a share of its self mask, of each dropped
                                                      device a share of its mask key; never both
=========  =========================================  ========================================================

Source: Bonawitz et al. (2017), "Practical secure aggregation for privacy-preserving machine learning", the variant for
an active adversary; over the graph of `common.mask_graph`. Beyond it, each answer of the masked leg signs the list of
sharers it was made for, so that every survivor's view is known to be one before anybody unmasks.

Proof sketch. Of n devices with keys c collude with the coordinator, which may send anything to anybody; T = `needed(n)`
consents unmask, and c < 2T - n.

1. All honest devices that unmask hold one and the same roster, list of sharers and list of survivors: T consents to
   each of two would take 2 (T - c) honest devices, since one signs once, and there are n - c. Every honest survivor
   masked for that roster and those sharers, since its signature of the masked leg says so. Tests:
   `test_devices_that_were_told_different_survivors_do_not_unmask`,
   `test_a_device_that_masked_for_other_sharers_stops_the_round`.
2. So of one device the honest holders reveal shares of the self mask or of the mask key, never both, and only once.
   Tests: `test_a_device_listed_as_active_and_dead_is_protected`, `test_a_second_request_to_unmask_is_refused`.
3. Fewer than the threshold of shares say nothing (`common.shamir`), and a seed that nobody reveals masks perfectly
   (`common.masks`). So the coordinator learns sums over groups of honest survivors that no unrevealed pair seed ties
   to others: in a full graph only the sum over all of them, in another none of fewer than `Terms.fewest_honest`
   (`common.mask_graph`). Test: `test_nothing_is_learned_beyond_the_threshold`.
4. Public keys are those of enrolled devices: nobody stands between two of them. Enrolling devices that do not exist
   is not prevented here; it is what `Terms.corrupt` bounds. Test: `test_swapped_keys_are_refused`.

An honest device can be made to abort by anybody; then nothing is learned. A colluding device can spoil the sum.
"""

from __future__ import annotations

import struct
from collections.abc import Container, Generator, MutableSet
from contextlib import contextmanager

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import Refusal, StoreError
from common.keys import SIGNATURE_BYTES, SigningKey, open_sealed, seal
from common.masks import Words, add_streams, pack_words
from common.privacy import Randomness
from common.secagg_messages import AggregationPolicy, Leg, MessageReader, Terms, digest, write_message
from common.secagg_roster import BOX_BYTES, NAME_BYTES, Member, Roster
from common.shamir import SHARE_BYTES, split_secret

__all__ = ["Participant"]


class Participant:
    """A device in one round.

    Every method takes the coordinator's message of one leg and returns the answer, once and in order. A refusal ends
    the round for this device: it forgets its secrets and answers nothing more.

    Guarantee: see the proof sketch above. What leaves is keys, sealed shares, one masked vector and shares of masks.
    """

    def __init__(
        self,
        terms: Terms,
        *,
        policy: AggregationPolicy,
        signing_key: SigningKey,
        enrolled: Container[str],
        answered: MutableSet[tuple[str, int]],
        randomness: Randomness,
    ) -> None:
        """Take part in one round, or refuse.

        Args:
            terms: The round, as the coordinator offers it.
            policy: What the owner demands.
            signing_key: The device's enrolment key.
            enrolled: Enrolment keys of all devices, as hex.
            answered: Runs and rounds this device has begun, kept by the caller; this one is added.
            randomness: `Randomness.system()`, or the run is a rehearsal.

        Raises:
            Refusal: The terms are below the policy, or the round was answered before.
        """
        policy.check(terms)
        if (terms.run, terms.round) in answered:
            raise Refusal("round-answered", "this device has answered this round already")
        answered.add((terms.run, terms.round))
        self._terms = terms
        self._signing_key = signing_key
        self._enrolled = enrolled
        self._randomness = randomness
        self._roster = Roster(terms, ())
        self._expects: Leg | None = Leg.KEYS
        self._done = 0
        self._forget()

    @property
    def devices(self) -> int:
        """How many devices are in the round, by the roster that this one checked; 0 before it did."""
        return len(self._roster)

    def keys(self) -> bytes:
        """Return this device's signed keys of the round."""
        with self._step(Leg.KEYS):
            self._mask_key = X25519PrivateKey.from_private_bytes(self._randomness.bytes(32))
            self._box_key = X25519PrivateKey.from_private_bytes(self._randomness.bytes(32))
            name = self._signing_key.verify_key
            publics = (self._mask_key.public_key().public_bytes_raw(), self._box_key.public_key().public_bytes_raw())
            unsigned = Member(name, *publics)
            self._self = Member(name, *publics, self._signing_key.sign(unsigned.statement(self._terms)))
            return self._answer(Leg.KEYS, self._self.to_bytes()[NAME_BYTES:])

    def share(self, roster: bytes) -> bytes:
        """Check who is in the round, and return this device's secrets in shares, each sealed to one holder."""
        with self._step(Leg.SHARES):
            self._roster = Roster.from_message(roster, self._terms)
            self._roster.check(self._enrolled)
            count, degree = len(self._roster), self._roster.degree
            if self._self not in self._roster.members:
                raise Refusal("bad-lists", "the roster does not list this device with its keys")
            self._index = 1 + self._roster.members.index(self._self)
            others = [index for index in range(1, count + 1) if index != self._index]
            self._holders = {self._index, *(others[at] for at in self._randomness.choice(count - 1, degree))}
            self._self_secret = self._randomness.bytes(32)
            split = (self._holders, self._terms.needed(degree + 1), self._randomness.bytes)
            key_shares = split_secret(self._mask_key.private_bytes_raw(), *split)
            seed_shares = split_secret(self._self_secret, *split)
            boxes: list[bytes] = []
            for holder in sorted(self._holders):
                shares = key_shares[holder] + seed_shares[holder]
                if holder == self._index:
                    self._held[holder] = shares
                else:
                    key, context = self._roster.box_key(self._box_key, self._index, self._index, holder)
                    boxes.append(struct.pack("<H", holder) + seal(key, shares, context))
            commitment = self._roster.commitment(self._index, self._self_secret)
            return self._answer(Leg.SHARES, commitment, *boxes)

    def mask(self, delivery: bytes, vector: Words) -> bytes:
        """Take in the others' shares, and return `vector` masked.

        Args:
            delivery: Who shared, and the shares for this device.
            vector: Integers modulo 2^bits, shape (dim,): what is to be summed, noise included.
        """
        if vector.dtype != np.uint32 or vector.shape != (self._terms.dim,):
            raise ValueError("the vector does not have the dimension and type that the terms say")
        with self._step(Leg.MASKED):
            reader = MessageReader(delivery, Leg.DELIVERY, self._terms)
            count = len(self._roster)
            self._sharers = reader.indices(count)
            boxes = reader.indexed(BOX_BYTES, count)
            sharers = set(self._sharers)
            if self._index not in sharers or self._index in boxes or not boxes.keys() <= sharers:
                raise Refusal("bad-lists", "the list of who shared and the shares do not match")
            if len(self._holders) == count and len(boxes) != len(sharers) - 1:
                raise Refusal("bad-lists", "shares were held back from this device")
            if len(sharers) < self._roster.needed:
                raise Refusal("too-few", f"{len(sharers)} of {count} devices shared their secrets")
            if len(self._holders & sharers) < self._terms.needed(len(self._holders)):
                raise Refusal("too-few", "too few holders of this device's shares are left")
            for sender, box in boxes.items():
                key, context = self._roster.box_key(self._box_key, self._index, sender, self._index)
                try:
                    self._held[sender] = open_sealed(key, box, context)
                except StoreError:
                    raise Refusal("bad-share", "a share was changed on its way") from None
            seeds = [(self._roster.self_seed(self._self_secret), True)]
            for other in sorted((self._holders & sharers | boxes.keys()) - {self._index}):
                seeds.append((self._roster.pair_seed(self._mask_key, self._index, other), self._index < other))
            masked = vector.copy()
            add_streams(masked, seeds)
            signature = self._signing_key.sign(self._roster.view(self._sharers))
            return self._answer(Leg.MASKED, signature, pack_words(masked, self._terms.bits))

    def consent(self, survivors: bytes) -> bytes:
        """Check that every survivor masked in the same round as this device, and sign who survived and who dropped."""
        with self._step(Leg.CONSENT):
            reader = MessageReader(survivors, Leg.SURVIVORS, self._terms)
            count = len(self._roster)
            alive, dropped = reader.indices(count), reader.indices(count)
            signatures = reader.records(SIGNATURE_BYTES, len(alive))
            reader.finish()
            if set(alive) & set(dropped) or tuple(sorted(alive + dropped)) != self._sharers:
                raise Refusal("bad-lists", "survivors and dropped devices are not exactly those that shared, each once")
            if self._index not in alive:
                raise Refusal("bad-lists", "this device sent its vector and is listed as dropped")
            if len(alive) < self._roster.needed:
                raise Refusal("too-few", f"{len(alive)} of {count} devices are left")
            view = self._roster.view(self._sharers)
            for index, signature in zip(alive, signatures, strict=True):
                self._roster.verify(index, signature, view)
            self._alive = frozenset(alive)
            self._consented = self._roster.consent(self._sharers, alive, dropped)
            return self._answer(Leg.CONSENT, self._signing_key.sign(self._consented))

    def unmask(self, consents: bytes) -> bytes:
        """Check that enough survivors consented to the very same lists, and return the shares that unmask the sum."""
        with self._step(Leg.UNMASK):
            reader = MessageReader(consents, Leg.CONSENTS, self._terms)
            signatures = reader.indexed(SIGNATURE_BYTES, len(self._roster))
            if not signatures.keys() <= self._alive:
                raise Refusal("bad-lists", "a device consented that is not among the survivors")
            if len(signatures) < self._roster.needed:
                raise Refusal("too-few", f"{len(signatures)} of {len(self._roster)} devices consented")
            for index, signature in signatures.items():
                self._roster.verify(index, signature, self._consented)
            revealed = [
                struct.pack("<H", owner) + (shares[SHARE_BYTES:] if owner in self._alive else shares[:SHARE_BYTES])
                for owner, shares in sorted(self._held.items())
            ]
            answer = self._answer(Leg.UNMASK, *revealed)
            self._forget()
            return answer

    @contextmanager
    def _step(self, leg: Leg) -> Generator[None]:
        """Let a leg happen once and in order; whatever goes wrong in it ends the round for this device."""
        if self._expects is not leg:
            if leg <= self._done:
                raise Refusal("repeated", f"this device has answered leg {leg.name.lower()} already")
            code = "closed" if self._expects is None else "out-of-order"
            raise Refusal(code, f"this device does not expect leg {leg.name.lower()}")
        self._expects = None
        self._done = int(leg)
        try:
            yield
        except BaseException:
            self._forget()
            raise
        self._expects = None if leg is Leg.UNMASK else Leg(leg + 1)

    def _forget(self) -> None:
        """Drop every secret of the round."""
        self._held: dict[int, bytes] = {}
        self._self_secret = b""
        self._mask_key = self._box_key = _NO_KEY

    def _answer(self, leg: Leg, *parts: bytes) -> bytes:
        message = write_message(leg, self._terms, self._signing_key.verify_key.raw, *parts)
        return message + self._signing_key.sign(digest("answer", message))


_NO_KEY = X25519PrivateKey.from_private_bytes(bytes(32))
"""Stands where a key was before it was forgotten; nothing is ever agreed with it."""
