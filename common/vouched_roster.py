"""Whose keys may be in the secure sums of a run, in a form that a device checks by itself.

The coordinator hands the roster out, so a device takes none of it on the coordinator's word. Three signatures lead from
a key that the coordinator's process does not use to every device:

1. The *enroller* is a key of the operator, named in every invite. It signs each invite: so many devices.
2. An *invite* is a key too: who holds its file can vouch for a device. The coordinator learns its public half only.
3. A device's *enrolment key*, the one that signs its ledger, signs that it joined by that invite.

A roster is made once, when a run is prepared, and its digest stands in the spec. So every device of a run has the same
roster, the terms of every round are bound to it, and the ledgers of both sides name it for an auditor.

Guarantee: a roster that `VouchedRoster.check` lets pass holds no more devices than the enroller's invites allow, each
    vouched for by a holder of its invite. What nothing here prevents: whoever holds the enroller's key, or an invite
    with uses left, can make devices up (Sybils). What those could do is computed in `common.distributed_claims`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from common.canonical import canonical, canonical_digest
from common.errors import Refusal, VerificationError
from common.keys import SigningKey, VerifyKey

__all__ = ["Grant", "Vouched", "VouchedRoster", "check_enrolment", "enrolment", "federation_of", "invite_key"]

FORMAT = 1
MOST_BYTES = 4 << 20
"""A roster of 2,000 devices, the most that one sum takes, has about 1 MB."""

_IS_KEY = re.compile("[0-9a-f]{64}")
_IS_SIGNATURE = re.compile("[0-9a-f]{128}")


def federation_of(authority: str) -> str:
    """Name a federation after its authority's certificate, PEM; what is signed for one means nothing in another."""
    return hashlib.sha256(authority.strip().encode()).hexdigest()


def invite_key(token: str) -> SigningKey:
    """The key that an invite's token stands for."""
    return SigningKey(hashlib.sha256(b"homespun invite key 1\n" + token.encode()).digest())


@dataclass(frozen=True)
class Grant:
    """What the enroller signed about one invite.

    Attributes:
        invite: Public key of the invite, hex.
        uses: Devices that it lets in.
        signature: By the enroller, hex.
    """

    invite: str
    uses: int
    signature: str

    @classmethod
    def sign(cls, enroller: SigningKey, federation: str, invite: str, uses: int) -> Grant:
        """Let so many devices in by an invite."""
        return cls(invite, uses, enroller.sign(_grant(federation, invite, uses)).hex())

    def check(self, enroller: VerifyKey, federation: str) -> None:
        """Return if `enroller` signed it.

        Raises:
            VerificationError: It did not.
        """
        enroller.verify(bytes.fromhex(self.signature), _grant(federation, self.invite, self.uses))


@dataclass(frozen=True)
class Vouched:
    """One device as others may check it.

    Attributes:
        key: Its enrolment key, hex.
        invite: Public key of the invite that it joined by, hex.
        voucher: By the invite, over the enrolment key, hex.
        joined: By the enrolment key, over the invite, hex.
    """

    key: str
    invite: str
    voucher: str
    joined: str

    @classmethod
    def sign(cls, token: str, federation: str, key: SigningKey) -> Vouched:
        """Vouch for a device, on the device, with the token of the invite that it joins by."""
        invite, own = invite_key(token), key.verify_key.hex
        public = invite.verify_key.hex
        return cls(
            own, public, invite.sign(_voucher(federation, own)).hex(), key.sign(_joined(federation, public)).hex()
        )

    def check(self, federation: str) -> None:
        """Return if both signatures are what they should be.

        Raises:
            VerificationError: One is not.
        """
        try:
            VerifyKey.from_hex(self.invite).verify(bytes.fromhex(self.voucher), _voucher(federation, self.key))
            VerifyKey.from_hex(self.key).verify(bytes.fromhex(self.joined), _joined(federation, self.invite))
        except ValueError:
            raise VerificationError("not a device that was vouched for") from None

    @classmethod
    def from_plain(cls, value: Any) -> Vouched:
        """Read what `asdict` wrote.

        Raises:
            VerificationError: It is of another form.
        """
        forms = {"key": _IS_KEY, "invite": _IS_KEY, "voucher": _IS_SIGNATURE, "joined": _IS_SIGNATURE}
        if (
            not isinstance(value, dict)
            or value.keys() != forms.keys()
            or not all(isinstance(value[name], str) and form.fullmatch(value[name]) for name, form in forms.items())
        ):
            raise VerificationError("not a device as it is vouched for")
        return cls(**value)


@dataclass(frozen=True)
class VouchedRoster:
    """The devices of a run.

    Attributes:
        grants: The invites that they joined by, in the order of their keys.
        devices: The devices, in the order of their keys.
    """

    grants: tuple[Grant, ...]
    devices: tuple[Vouched, ...]

    @classmethod
    def of(cls, grants: Mapping[str, Grant], devices: Mapping[str, Vouched]) -> VouchedRoster:
        """Put a roster together from grants by invite and devices by key; grants that nobody needs are left out."""
        needed = {device.invite for device in devices.values()}
        return cls(tuple(grants[invite] for invite in sorted(needed)), tuple(devices[key] for key in sorted(devices)))

    @property
    def keys(self) -> frozenset[str]:
        """Enrolment keys, hex."""
        return frozenset(device.key for device in self.devices)

    @property
    def digest(self) -> str:
        """SHA-256 of the roster, hex; what a spec names."""
        return canonical_digest(self._plain())

    def to_bytes(self) -> bytes:
        """Write the roster as canonical JSON."""
        return canonical(self._plain())

    def _plain(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "grants": [asdict(grant) for grant in self.grants],
            "devices": [asdict(device) for device in self.devices],
        }

    @classmethod
    def from_bytes(cls, content: bytes) -> VouchedRoster:
        """Read what `to_bytes` wrote; no signature is checked yet.

        Raises:
            VerificationError: It is no roster of this format.
        """
        try:
            if len(content) > MOST_BYTES:
                raise ValueError
            value = json.loads(content)
            if value["format"] != FORMAT:
                raise ValueError
            grants = tuple(Grant(**one) for one in value["grants"])
            devices = tuple(Vouched.from_plain(one) for one in value["devices"])
            if not all(
                type(one.uses) is int and _IS_KEY.fullmatch(one.invite) and _IS_SIGNATURE.fullmatch(one.signature)
                for one in grants
            ):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise VerificationError("not a roster of this format") from None
        return cls(grants, devices)

    def check(self, *, enroller: str, federation: str, own: str, population: int) -> None:
        """Return if a device may take part in secure sums with these others.

        Args:
            enroller: Key that the device's own invite named, hex.
            federation: That it joined.
            own: Its own enrolment key, hex.
            population: Devices that the run's numbers are calibrated for.

        Raises:
            Refusal: `unknown-key`; the reason says what is wrong.
        """
        keys = [device.key for device in self.devices]
        if keys != sorted(set(keys)):
            raise Refusal("unknown-key", "the roster is not in order, or lists a device twice")
        if len(keys) != population:
            raise Refusal("unknown-key", f"the roster has {len(keys)} devices, the run is calibrated for {population}")
        if own not in keys:
            raise Refusal("unknown-key", "the roster does not list this device")
        grants = {grant.invite: grant for grant in self.grants}
        used = dict.fromkeys(grants, 0)
        try:
            signer = VerifyKey.from_hex(enroller)
            for grant in self.grants:
                grant.check(signer, federation)
            for device in self.devices:
                device.check(federation)
                used[device.invite] += 1
        except (VerificationError, ValueError, KeyError):
            raise Refusal(
                "unknown-key", "the roster lists a device that no invite of this federation's enroller vouches for"
            ) from None
        if any(count > grants[invite].uses for invite, count in used.items()):
            raise Refusal("unknown-key", "more devices joined by one invite than the enroller allowed")


def enrolment(token: str, federation: str, key: SigningKey, device: str) -> dict[str, Any]:
    """What a device named `device` enrols with, in place of the token, which stays with the invite's holders.

    What others get to see of it, the roster's part, enrols nobody: two more signatures are for this device alone.
    """
    vouched, invite = Vouched.sign(token, federation, key), invite_key(token)
    message = _enrolment(federation, vouched, device)
    return {"vouched": asdict(vouched), "by_invite": invite.sign(message).hex(), "by_key": key.sign(message).hex()}


def check_enrolment(value: Any, federation: str, device: str) -> Vouched:
    """Read what `enrolment` made for the device whose request it came with.

    Raises:
        VerificationError: A signature is missing, or is another's.
    """
    try:
        vouched = Vouched.from_plain(value["vouched"])
        message = _enrolment(federation, vouched, device)
        vouched.check(federation)
        VerifyKey.from_hex(vouched.invite).verify(bytes.fromhex(value["by_invite"]), message)
        VerifyKey.from_hex(vouched.key).verify(bytes.fromhex(value["by_key"]), message)
    except (KeyError, TypeError, ValueError):
        raise VerificationError("not an enrolment as a device signs one") from None
    return vouched


def _enrolment(federation: str, vouched: Vouched, device: str) -> bytes:
    return f"homespun-enrol-1\n{federation}\n{vouched.key}\n{vouched.invite}\n{device}\n".encode()


def _grant(federation: str, invite: str, uses: int) -> bytes:
    return f"homespun-grant-1\n{federation}\n{invite}\n{uses}\n".encode()


def _voucher(federation: str, key: str) -> bytes:
    return f"homespun-voucher-1\n{federation}\n{key}\n".encode()


def _joined(federation: str, invite: str) -> bytes:
    return f"homespun-joined-1\n{federation}\n{invite}\n".encode()
