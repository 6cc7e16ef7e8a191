"""What both sides of a secure sum agree on before it starts, and how its messages are written.

A round has five legs. Every message names its leg and the digest of the round's `Terms`, which holds run and round, so
that nothing of one round means anything in another. Records are of fixed size and numbers little-endian; a message
has no gap, no option and no free text, and what is not exactly of that form is refused. docs/secagg.md has the table.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from enum import IntEnum
from fractions import Fraction
from functools import cached_property
from typing import Any

from common.canonical import canonical, read_canonical
from common.errors import Refusal
from common.mask_graph import MAX_COHORT, honest_survivors, needed

__all__ = ["AggregationPolicy", "Leg", "MessageReader", "Terms", "digest", "write_message"]

MAGIC = b"homespun-secagg-1"
FORMAT = 1
FEWEST_DEVICES = 3
"""A sum of two tells each of them the other's part."""

LARGEST_DIM = 2**28


class Leg(IntEnum):
    """What a message is: the answers of the five legs, and the coordinator's requests for the last four."""

    KEYS = 1
    SHARES = 2
    MASKED = 3
    CONSENT = 4
    UNMASK = 5
    ROSTER = 12
    DELIVERY = 13
    SURVIVORS = 14
    CONSENTS = 15


@dataclass(frozen=True, kw_only=True)
class Terms:
    """The public facts of one round, the same for every device.

    Attributes:
        run: Identifier of the run, hex.
        round: Round number, from 1.
        spec: Digest of what may be released, 64 hex digits.
        dim: Coordinates of the masked vector.
        bits: The vector's integers are modulo 2^bits.
        smallest_cohort: Devices with keys without which nothing starts.
        largest_cohort: Devices that the modulus has room for.
        threshold: Share of the devices with keys that must stay, above one half.
        corrupt: Share of them that may collude with the coordinator without harm to the others.
    """

    run: str
    round: int
    spec: str
    dim: int
    bits: int
    smallest_cohort: int
    largest_cohort: int
    threshold: Fraction = Fraction(2, 3)
    corrupt: Fraction = Fraction(1, 10)

    def __post_init__(self) -> None:
        """Refuse terms that no round can have."""
        if not re.fullmatch(r"[0-9a-f]{1,64}", self.run) or not re.fullmatch(r"[0-9a-f]{64}", self.spec):
            raise ValueError("run and spec are hex digits")
        counts = (self.round, self.dim, self.bits, self.smallest_cohort, self.largest_cohort)
        if any(type(count) is not int or count < 1 for count in counts):
            raise ValueError("the numbers of a round are positive whole numbers")
        if self.bits > 32 or self.dim > LARGEST_DIM or self.round >= 2**53:
            raise ValueError("the modulus has at most 32 bits, the vector at most 2^28 coordinates")
        if not FEWEST_DEVICES <= self.smallest_cohort <= self.largest_cohort <= MAX_COHORT:
            raise ValueError(f"a cohort has between {FEWEST_DEVICES} and {MAX_COHORT} devices, the smallest first")
        if not Fraction(1, 2) < self.threshold <= 1 or not 0 <= self.corrupt < 2 * self.threshold - 1:
            raise ValueError("the threshold is above one half, by more than half the share that may collude")

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 over the terms, 32 bytes; part of every message, signature and key of the round."""
        return digest("terms", self.to_bytes())

    @cached_property
    def fewest_honest(self) -> int:
        """The fewest honest devices in any sum that can be learned: what the noise is sized for."""
        sizes = range(self.smallest_cohort, self.largest_cohort + 1)
        return min(honest_survivors(size, self.threshold, self.corrupt) for size in sizes)

    def needed(self, devices: int) -> int:
        """Return how many of `devices` with keys must stay."""
        return needed(devices, self.threshold)

    def to_bytes(self) -> bytes:
        """Write the terms as canonical JSON."""
        plain: dict[str, Any] = asdict(self) | {"format": FORMAT}
        for name in ("threshold", "corrupt"):
            plain[name] = [plain[name].numerator, plain[name].denominator]
        return canonical(plain)

    @classmethod
    def from_bytes(cls, text: bytes) -> Terms:
        """Read what `to_bytes` wrote.

        Raises:
            Refusal: They are not terms of this format, or no round can have them.
        """
        try:
            value = read_canonical(text)
            if value.pop("format") != FORMAT:
                raise ValueError("another format")
            return cls(**value | {name: Fraction(*value[name]) for name in ("threshold", "corrupt")})
        except (ArithmeticError, AttributeError, KeyError, RecursionError, TypeError, ValueError):
            raise Refusal("bad-message", "these are no terms of a secure sum that this device speaks") from None


@dataclass(frozen=True, kw_only=True)
class AggregationPolicy:
    """What a device's owner demands of a secure sum; the coordinator may offer more, never less.

    Attributes:
        smallest_cohort: Fewest devices with keys.
        threshold: Least share of them that must stay.
        corrupt: Least share of them that may collude without harm.
    """

    smallest_cohort: int
    threshold: Fraction = Fraction(2, 3)
    corrupt: Fraction = Fraction(0)

    def check(self, terms: Terms) -> None:
        """Return if `terms` are good enough.

        Raises:
            Refusal: `small-cohort`, `low-threshold` or `few-honest`.
        """
        if terms.smallest_cohort < self.smallest_cohort:
            raise Refusal("small-cohort", f"sums of fewer than {self.smallest_cohort} devices are not allowed")
        if terms.threshold < self.threshold:
            raise Refusal("low-threshold", f"fewer than {self.threshold} of the devices could be left in the sum")
        if terms.corrupt < self.corrupt or terms.fewest_honest < 2:
            raise Refusal("few-honest", "the sum assumes more honest devices than the policy does")


def digest(label: str, *parts: bytes) -> bytes:
    """Return SHA-256 over `parts`, each with its length before it, for one purpose; 32 bytes."""
    hashed = hashlib.sha256(MAGIC)
    for part in (label.encode(), *parts):
        hashed.update(struct.pack(">Q", len(part)))
        hashed.update(part)
    return hashed.digest()


def write_message(leg: Leg, terms: Terms, *parts: bytes | Iterable[int]) -> bytes:
    """Return a message of `parts`: bytes as they are, lists of indices with their count before them."""
    body = [MAGIC, bytes([leg]), terms.digest]
    for part in parts:
        if isinstance(part, bytes):
            body.append(part)
        else:
            listed = list(part)
            body.append(struct.pack(f"<{len(listed) + 1}H", len(listed), *listed))
    return b"".join(body)


class MessageReader:
    """Reads a message of one leg and one round, part by part, to its last byte.

    Every method raises `Refusal`: `bad-message` where the form is wrong, `wrong-round` where it is of another round,
    `bad-lists` where indices are not in ascending order, repeat, or are out of range.
    """

    def __init__(self, message: bytes, leg: Leg, terms: Terms) -> None:
        """Read the head of `message`, and refuse if it is not of this leg and round."""
        self._view = memoryview(message)
        if self.take(len(MAGIC)) != MAGIC:
            raise Refusal("bad-message", "not a message of a secure sum")
        if self.take(1) != bytes([leg]):
            raise Refusal("out-of-order", f"not the message of leg {leg.name.lower()}")
        if self.take(len(terms.digest)) != terms.digest:
            raise Refusal("wrong-round", "the message belongs to another round, run or spec")

    def take(self, count: int) -> bytes:
        """Return the next `count` bytes."""
        if len(self._view) < count:
            raise Refusal("bad-message", "a message ends too early")
        part, self._view = bytes(self._view[:count]), self._view[count:]
        return part

    def indices(self, largest: int) -> tuple[int, ...]:
        """Return the next list of indices: ascending, each once, from 1 to `largest`."""
        (count,) = struct.unpack("<H", self.take(2))
        listed: tuple[int, ...] = struct.unpack(f"<{count}H", self.take(2 * count))
        _check_indices(listed, largest)
        return listed

    def records(self, size: int, count: int | None = None) -> list[bytes]:
        """Return the next `count` records of `size` bytes, or all that is left."""
        if count is None:
            count, odd = divmod(len(self._view), size)
            if odd:
                raise Refusal("bad-message", "a message ends within a record")
        body = self.take(count * size)
        return [body[start : start + size] for start in range(0, count * size, size)]

    def indexed(self, size: int, largest: int) -> dict[int, bytes]:
        """Return all that is left as records of an index and `size` bytes, ascending by index."""
        rows = [(struct.unpack("<H", row[:2])[0], row[2:]) for row in self.records(2 + size)]
        _check_indices([index for index, _ in rows], largest)
        return dict(rows)

    def finish(self) -> None:
        """Refuse if anything is left."""
        if len(self._view):
            raise Refusal("bad-message", "a message goes on after its end")


def _check_indices(listed: Iterable[int], largest: int) -> None:
    before = 0
    for index in listed:
        if not before < index <= largest:
            raise Refusal("bad-lists", "a list of devices is not in order, repeats one, or names one that is not there")
        before = index
