"""What a coordinator and its devices say to each other beside Flower: the invite, and requests that a device signs.

An invite is a file that somebody carries: where the coordinator is, which authority its certificate must come from,
a token that may be used a number of times, what it will ask of a device, and which base model that is about.

Every request after it is signed by the device's key, over the path, the time, a number used once and the body, so that
who recorded one, inside TLS even, cannot send it again. Readers take fields that they do not know for those of a
later minor version and leave them alone; another `format` they refuse.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from common.errors import DataError, Refusal
from common.formats import readable, said

__all__ = ["FORMAT", "Asks", "Base", "Invite", "RequestGuard", "device_id", "signed_headers"]

FORMAT = 1
"""Of the invite, and of every request."""

CLOCK_SECONDS = 300.0
"""How far two clocks may be apart; Flower allows no more either."""

HEADERS = ("x-homespun-key", "x-homespun-time", "x-homespun-nonce", "x-homespun-signature")
MOST_NONCES = 1 << 20
MOST_INVITE_BYTES = 1 << 20

_IS_NONCE = re.compile("[0-9a-f]{32}")


class Asks(BaseModel):
    """What the coordinator will ask of a device; the device compares it with what its owner grants.

    Attributes:
        epsilon: Of the whole run, as text, because JSON has no infinity.
        coordinator_epsilon: With distributed noise, what holds against the coordinator; empty with any other.
        coordinator_noise_multiplier: Noise behind that; 0 with any other.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    unit: str
    noise: str
    clip: float
    noise_multiplier: float
    sampling_rate: float
    rounds: int
    population: int
    epsilon: str
    delta: float
    megabytes_per_round: float = 0.0
    coordinator_epsilon: str = ""
    coordinator_noise_multiplier: float = 0.0


class Base(BaseModel):
    """Which base model a run is about, and where it may be had.

    Attributes:
        digest: What names it; a device takes no other.
        name: What people call it.
        megabytes: How much there is to fetch.
        sources: In order of preference: `coordinator`, `hub:NAME`, `https://...`, or a folder.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    digest: str = Field(pattern="^[0-9a-f]{64}$")
    name: str
    megabytes: float = 0.0
    sources: tuple[str, ...] = ("coordinator",)


class Invite(BaseModel):
    """An enrolment file.

    Attributes:
        name: What the federation is called.
        address: Of the coordinator, `host:port`.
        authority: Certificate that the coordinator's must come from, PEM; no other authority is trusted.
        writer: Key that signs the heads of the coordinator's ledgers, hex.
        token: Lets so many devices in, until `expires`; it stands for a key that vouches for them, too.
        enroller: Key that signed how many devices each invite lets in, hex; empty where secure sums are not offered.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int
    name: str
    address: str = Field(pattern=r"^[^\s/:]+:[0-9]{1,5}$")
    authority: str
    writer: str = Field(pattern="^[0-9a-f]{64}$")
    token: str = Field(pattern="^[A-Za-z0-9_-]{32,128}$")
    expires: datetime
    asks: Asks
    base: Base
    version: str = ""
    enroller: str = Field("", pattern="^([0-9a-f]{64})?$")

    @field_validator("authority")
    @classmethod
    def _is_certificate(cls, value: str) -> str:
        x509.load_pem_x509_certificate(value.encode("ascii"))
        return value

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read an invite.

        Raises:
            DataError: It cannot be read, or is none of this format.
        """
        try:
            if path.stat().st_size > MOST_INVITE_BYTES:
                raise ValueError
            values = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(values, dict) and not readable(values.get("format", FORMAT), FORMAT):
                raise DataError(f"{path}: {said(values['format'], FORMAT, 'the invite')}")
            return cls.model_validate(values)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}") from None
        except ValidationError as error:
            fields = sorted({".".join(map(str, entry["loc"])) for entry in error.errors()})
            where = f"; look at {', '.join(fields)}" if any(fields) else ""
            raise DataError(f"{path}: not an invite{where}") from None
        except ValueError:
            raise DataError(f"{path}: not an invite") from None

    def to_text(self) -> str:
        """Write the invite as JSON."""
        return self.model_dump_json(indent=1) + "\n"

    def has_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return now >= self.expires


def device_id(public_key: bytes) -> str:
    """Name a device after its public key, hex."""
    return hashlib.sha256(public_key).hexdigest()[:16]


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """A device's public key as Flower writes it: PEM."""
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def signed_headers(
    key: ec.EllipticCurvePrivateKey, path: str, body: bytes, *, now: datetime, nonce: str | None = None
) -> dict[str, str]:
    """Return the headers that make a request the device's own."""
    time, number = now.astimezone(UTC).isoformat(), secrets.token_hex(16) if nonce is None else nonce
    signature = key.sign(_message(path, time, number, body), ec.ECDSA(hashes.SHA256()))
    values = (_text(public_bytes(key.public_key())), time, number, _text(signature))
    return dict(zip(HEADERS, values, strict=True))


class RequestGuard:
    """Knows whose a request is, and which were there before."""

    def __init__(self) -> None:
        """Remember nothing yet."""
        self._seen: dict[tuple[bytes, str], float] = {}

    def check(self, headers: Mapping[str, str], path: str, body: bytes, *, now: datetime) -> bytes:
        """Return the public key, PEM, of who signed a request.

        Guarantee: each signed request passes once, and only within five minutes of the time it bears.

        Raises:
            Refusal: `bad-signature`, `clock`, `repeated`, or `busy` where too many were seen to tell.
        """
        try:
            key, time, nonce, signature = (headers[name] for name in HEADERS)
            public = base64.b64decode(key, validate=True)
            loaded = serialization.load_pem_public_key(public)
            if not isinstance(loaded, ec.EllipticCurvePublicKey) or public_bytes(loaded) != public:
                raise ValueError
            if not _IS_NONCE.fullmatch(nonce):
                raise ValueError
            signed_at = datetime.fromisoformat(time)
            message = _message(path, time, nonce, body)
            loaded.verify(base64.b64decode(signature, validate=True), message, ec.ECDSA(hashes.SHA256()))
            away = abs((now - signed_at).total_seconds())
        except (KeyError, ValueError, TypeError, binascii.Error, InvalidSignature, UnicodeError, UnsupportedAlgorithm):
            raise Refusal("bad-signature", "the request is not signed as a device signs") from None
        if away > CLOCK_SECONDS:
            raise Refusal("clock", f"the clocks are more than {CLOCK_SECONDS:g} s apart")
        self.once(public, nonce, now)
        return public

    def once(self, key: bytes, number: str, now: datetime) -> None:
        """Note a number used once.

        Raises:
            Refusal: It was used before.
        """
        limit = now.timestamp() - 2 * CLOCK_SECONDS
        if len(self._seen) >= MOST_NONCES or (self._seen and next(iter(self._seen.values())) < limit):
            self._seen = {one: when for one, when in self._seen.items() if when >= limit}
        if len(self._seen) >= MOST_NONCES:
            raise Refusal("busy", "too many requests to tell whether this one was there before")
        if (key, number) in self._seen:
            raise Refusal("repeated", "this very request was there before")
        self._seen[(key, number)] = now.timestamp()


def reply_object(content: bytes) -> dict[str, Any]:
    """Read the JSON object of a request or a reply.

    Raises:
        DataError: It is none, or of another format.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise DataError("not a message")
    if not readable(values.get("format"), FORMAT):
        raise DataError(said(values.get("format"), FORMAT, "the message"))
    return values


def _message(path: str, time: str, nonce: str, body: bytes) -> bytes:
    return f"homespun-request-1\n{path}\n{time}\n{nonce}\n{hashlib.sha256(body).hexdigest()}\n".encode()


def _text(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
