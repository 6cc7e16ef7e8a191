"""What crosses the network, and nothing else: the record keys, the assignment, the release and its receipts.

A server asks with an `Assignment` (which users, in which round) under a `ReleaseSpec` (what exactly may leave); a
node answers with a `Release`: the sum of the assigned users' bounded updates and one receipt per release, or with a
refusal's code. A device is assigned one user; a simulation's chunk, many. No metric, no loss, no example count and no
exception text has a key here.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import Refusal

if TYPE_CHECKING:
    from flwr.app import RecordDict

__all__ = ["Assignment", "Release", "ReleaseSpec", "canonical"]

WIRE_FORMAT = 1
MAX_USERS_PER_ASSIGNMENT = 100_000


def canonical(value: Any) -> bytes:
    """Write a JSON value of plain strings, integers, booleans and floats in one way only (sorted keys, no spaces)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


@dataclass(frozen=True, kw_only=True)
class ReleaseSpec:
    """What one run may ask a device to release; public, the same for every user and round.

    Attributes:
        run: Random identifier of the run, hex.
        method: Row of the method table.
        names: Tensors that leave, in order.
        shapes: Their shapes.
        dtype: Type of the numbers that leave.
        unit: Whose presence is hidden.
        noise: Who adds the noise: central or local.
        clip: L2 bound over everything one user sends, in this dtype.
        noise_multiplier: Noise standard deviation over sensitivity.
        sampling_rate: Probability that an enrolled user is in a round.
        rounds: Releases that the promise covers, spares included.
        epsilon: Budget of the whole run as text; "inf" promises nothing.
        delta: Failure probability.
        population: Enrolled users when the run began.
        recipe: Local training, as plain values.
        model: Digest of the base.
        source: Digest of the code that both sides run.
    """

    run: str
    method: str
    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtype: str
    unit: str
    noise: str
    clip: float
    noise_multiplier: float
    sampling_rate: float
    rounds: int
    epsilon: str
    delta: float
    population: int
    recipe: dict[str, float | int | str]
    model: str
    source: str

    @cached_property
    def dim(self) -> int:
        """Numbers that leave per user."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form, hex."""
        return hashlib.sha256(canonical(asdict(self))).hexdigest()

    def to_text(self) -> str:
        """Write the spec as canonical JSON."""
        return canonical(asdict(self)).decode()

    @classmethod
    def from_text(cls, text: str) -> ReleaseSpec:
        """Read what `to_text` wrote.

        Raises:
            Refusal: The text is not a spec of this format.
        """
        try:
            value = json.loads(text)
            value["names"] = tuple(value["names"])
            value["shapes"] = tuple(tuple(map(int, shape)) for shape in value["shapes"])
            return cls(**value)
        except (ValueError, TypeError, KeyError):
            raise Refusal("bad-request", "the release spec is not one of this format") from None


@dataclass(frozen=True)
class Assignment:
    """Which users a node is asked to train in a round, from which shared vector.

    Attributes:
        spec: What may leave.
        round: Round number, from 1.
        users: Who trains: one subject id on a device, many numbers in a simulation's chunk.
        vector: The shared vector that training starts from, shape `(dim,)`, float32.
    """

    spec: ReleaseSpec
    round: int
    users: tuple[str, ...]
    vector: NDArray[np.float32]

    def to_records(self) -> RecordDict:
        """Write the assignment as Flower records."""
        from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

        request: dict[str, Any] = {
            "format": WIRE_FORMAT,
            "spec": self.spec.to_text(),
            "round": self.round,
            "users": list(self.users),
        }
        return RecordDict({"request": ConfigRecord(request), "shared": ArrayRecord({"vector": Array(self.vector)})})

    @classmethod
    def from_records(cls, records: RecordDict) -> Assignment:
        """Read an assignment, or refuse.

        Raises:
            Refusal: A record is missing, misshapen or of another format.
        """
        try:
            request = records.config_records["request"]
            if request["format"] != WIRE_FORMAT:
                raise Refusal("format", f"this device speaks wire format {WIRE_FORMAT}")
            spec = ReleaseSpec.from_text(str(request["spec"]))
            users = request["users"]
            vector = records.array_records["shared"]["vector"].numpy()
            number = request["round"]
        except (KeyError, ValueError, TypeError):
            raise Refusal("bad-request", "a record of the assignment is missing or misshapen") from None
        if not isinstance(users, list) or not 0 < len(users) <= MAX_USERS_PER_ASSIGNMENT or not isinstance(number, int):
            raise Refusal("bad-request", "the assignment names no users or no round")
        if vector.shape != (spec.dim,) or vector.dtype != np.float32 or not np.isfinite(vector).all():
            raise Refusal("bad-request", "the shared vector has not the spec's shape, or is not finite")
        return cls(spec, number, tuple(map(str, users)), vector)


@dataclass(frozen=True)
class Release:
    """What leaves: a sum of bounded updates, how many users it holds, and the receipt of exactly these bytes.

    Attributes:
        total: Sum over the assigned users that took part, shape `(dim,)`.
        users: How many took part.
        receipt: SHA-256 over the bytes of `total`, bound to run, round and spec, hex.
    """

    total: NDArray[Any]
    users: int
    receipt: str

    def to_records(self) -> RecordDict:
        """Write the release as Flower records."""
        from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

        return RecordDict(
            {
                "release": ArrayRecord({"total": Array(np.ascontiguousarray(self.total))}),
                "receipt": ConfigRecord({"format": WIRE_FORMAT, "users": self.users, "sha256": self.receipt}),
            }
        )

    @classmethod
    def from_records(cls, records: RecordDict) -> Release:
        """Read a release as the server receives it; nothing in it is trusted yet.

        Raises:
            Refusal: The reply carries a refusal's code, or is not a release.
        """
        refused = records.config_records.get("refusal")
        if refused is not None:
            raise Refusal(str(refused.get("code", "unknown"))[:40], "the device refused")
        try:
            receipt = records.config_records["receipt"]
            total = records.array_records["release"]["total"].numpy()
            return cls(total, int(receipt["users"]), str(receipt["sha256"]))  # pyright: ignore[reportArgumentType]
        except (KeyError, ValueError, TypeError):
            raise Refusal("bad-reply", "the reply is not a release") from None


def receipt_digest(total: NDArray[Any], spec: ReleaseSpec, number: int, users: int) -> str:
    """Bind the bytes of a release to its run, round and spec, hex."""
    head = canonical([spec.digest, number, users, str(total.dtype), list(total.shape)])
    digest = hashlib.sha256(head)
    digest.update(np.ascontiguousarray(total).data)
    return digest.hexdigest()


def refusal_records(code: str) -> RecordDict:
    """A reply that says no: a code from a closed list, and not a word more."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({"refusal": ConfigRecord({"format": WIRE_FORMAT, "code": code})})
