"""What crosses the network, and nothing else: the record keys, the assignment, the release and its receipts.

A server asks with an `Assignment` (which users, in which round) under a `ReleaseSpec` (what exactly may leave); a
node answers with a `Release`: the sum of the assigned users' bounded updates and one receipt per release, or with a
refusal's code. A device is assigned one user; a simulation's chunk, many. No metric, no loss, no example count and no
exception text has a key here.

Both sides read what the other wrote as if it were hostile: every field's type and size is checked before it is used,
arrays are plain little-endian bytes whose number is checked first, and whatever does not fit is one `Refusal`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from common.errors import Refusal
from common.formats import readable, said, written
from common.noised_counts import NoisedCounts

if TYPE_CHECKING:
    from flwr.app import Array, RecordDict

__all__ = ["REFUSAL_CODES", "Assignment", "Release", "ReleaseSpec", "canonical"]

WIRE_FORMAT = 1
MAX_USERS_PER_ASSIGNMENT = 100_000
MAX_ROUND = 2**31 - 1
MAX_DIM = 2**31 - 1
MAX_SPEC_CHARACTERS = 1 << 20
MAX_NAME_CHARACTERS = 256
MAX_RECIPE_KEYS = 64
MAX_WITNESSES = 1 << 16
COUNTS, WITNESS = "noised_counts", "noise_witness"
EXAMPLE_UPDATE_CLIPS = 10.0

RAW = "raw-little-endian"
"""How an array's bytes are laid out: no header, so nothing in them is parsed."""

REFUSAL_CODES = frozenset(
    {
        "bad-key",
        "bad-lists",
        "bad-message",
        "bad-reply",
        "bad-request",
        "bad-share",
        "bad-signature",
        "budget-spent",
        "busy",
        "claim-refused",
        "closed",
        "failed",
        "few-honest",
        "format",
        "gate-refused",
        "layout-mismatch",
        "low-threshold",
        "model-mismatch",
        "no-vault",
        "not-built",
        "not-here",
        "not-now",
        "out-of-order",
        "policy-clip",
        "policy-cohort",
        "policy-delta",
        "policy-epsilon",
        "policy-metrics",
        "policy-noise",
        "policy-not-signed",
        "policy-rounds",
        "policy-trust",
        "policy-unit",
        "preflight",
        "repeated",
        "round-answered",
        "small-cohort",
        "too-few",
        "unknown",
        "unknown-key",
        "unknown-ticket",
        "wrong-round",
    }
)
"""The closed list: all that a device ever says about why it did not answer."""

T = TypeVar("T")

_IS_RUN = re.compile(r"[0-9a-f]{8,64}")
_IS_DIGEST = re.compile(r"[0-9a-f]{64}")


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
        noise: Who adds the noise: central, local or distributed.
        clip: L2 bound of one unit's contribution: of everything a user sends, or of a record's gradient.
        noise_multiplier: Noise standard deviation over sensitivity.
        sampling_rate: Probability that an enrolled user is in a round.
        rounds: Releases that the promise covers, spares included.
        epsilon: Budget of the whole run as text; "inf" promises nothing.
        delta: Failure probability.
        population: Enrolled users when the run began.
        recipe: Local training, as plain values.
        model: Digest of the base.
        source: Digest of the code that both sides run.
        witnesses: Numbers that leave beside the shared ones and that the gate forces to zero before there is noise, so
            that anyone can test the noise in what was released.
        extrapolation: Factor on the noise that is drawn; below 1 nothing is claimed.
        secure_sum: Distributed noise: the numbers of the secure sums, see `common.secure_sum`; None for others.
        counts: What leaves beside the update, see `common.noised_counts`; None where nothing does.

    Raises:
        ValueError: A field has another type, or is outside its range.
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
    witnesses: int = 0
    extrapolation: float = 1.0
    secure_sum: dict[str, float | int | str] | None = None
    counts: dict[str, float | int | str] | None = None

    def __post_init__(self) -> None:
        sound = (
            _matches(_IS_RUN, self.run)
            and _matches(_IS_DIGEST, self.model)
            and _matches(_IS_DIGEST, self.source)
            and all(map(_is_name, (self.method, self.dtype, self.unit, self.noise)))
            and _is_epsilon(self.epsilon)
            and all(map(_is_name, self.names))
            and _are_shapes(self.shapes, len(self.names))
            and _is_number(self.clip, above=0.0)
            and _is_number(self.noise_multiplier)
            and _is_number(self.sampling_rate, above=0.0, most=1.0)
            and _is_number(self.delta, above=0.0, most=1.0)
            and _is_count(self.rounds, MAX_ROUND)
            and _is_count(self.population, MAX_DIM)
            and _is_recipe(self.recipe)
            and (self.witnesses == 0 or _is_count(self.witnesses, MAX_WITNESSES))
            and _is_number(self.extrapolation, above=0.0, most=1.0)
            and (self.secure_sum is None or _is_recipe(self.secure_sum))
            and (self.counts is None or _is_recipe(self.counts))
        )
        if not sound:
            raise ValueError("a field of the release spec has another type, or is outside its range")

    @cached_property
    def model_dim(self) -> int:
        """Shared numbers, which the model is made of."""
        return sum(math.prod(shape) for shape in self.shapes)

    @cached_property
    def row_dim(self) -> int:
        """Numbers that a user's clip is over: the shared ones, then the counts."""
        own = NoisedCounts.of(self)
        return self.model_dim + (0 if own is None else len(own.names))

    @cached_property
    def dim(self) -> int:
        """Numbers that leave per user, witnesses last."""
        return self.row_dim + self.witnesses

    @property
    def tensors(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Name and shape of everything that leaves, in order."""
        counts = self.row_dim - self.model_dim
        return (
            *zip(self.names, self.shapes, strict=True),
            *(((COUNTS, (counts,)),) if counts else ()),
            *(((WITNESS, (self.witnesses,)),) if self.witnesses else ()),
        )

    @property
    def update_norm(self) -> float:
        """L2 bound of one user's whole update before local noise.

        For unit example the promise does not rest on it (the noise is in the steps), but a server does: one broken
        party must not move the sum without limit.
        """
        return self.clip if self.unit == "user" else EXAMPLE_UPDATE_CLIPS * self.clip

    @property
    def example_rate(self) -> float:
        """Unit example: probability that a record is in a step's batch, from public numbers alone."""
        return min(1.0, float(self.recipe["local_batch"]) / float(self.recipe["example_records"]))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical form, hex."""
        return hashlib.sha256(self._canonical).hexdigest()

    def to_text(self) -> str:
        """Write the spec as canonical JSON."""
        return self._canonical.decode()

    @cached_property
    def _canonical(self) -> bytes:
        # A field that came later is left out while it says nothing, so that an earlier spec keeps its digest.
        values = asdict(self)
        for name in ("secure_sum", "counts"):
            if values[name] is None:
                del values[name]
        return canonical(values)

    @classmethod
    def from_text(cls, text: str) -> ReleaseSpec:
        """Read what `to_text` wrote.

        Raises:
            Refusal: The text is not a spec of this format.
        """
        try:
            if len(text) > MAX_SPEC_CHARACTERS:
                raise ValueError
            value = json.loads(text)
            value["names"] = tuple(value["names"])
            value["shapes"] = tuple(tuple(shape) for shape in value["shapes"])
            return cls(**value)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise Refusal("bad-request", "the release spec is not one of this format") from None


@dataclass(frozen=True)
class Assignment:
    """Which users a node is asked to train in a round, from which shared vector.

    Attributes:
        spec: What may leave.
        round: Round number, from 1.
        users: Who trains: one subject id on a device, many numbers in a simulation's chunk.
        vector: The shared vector that training starts from, shape `(model_dim,)`, float32.
        devices: Distributed noise without masks, in a simulation alone: devices of the whole round; 0 else.
        clip_scale: What the clip norm of this round is of the one that an adaptive clip started from; 1 else. The
            device divides by it before it clips, so no guarantee depends on it.

    Raises:
        Refusal: A field has another type, shape or size, or the vector is not finite.
    """

    spec: ReleaseSpec
    round: int
    users: tuple[str, ...]
    vector: NDArray[np.float32]
    devices: int = 0
    clip_scale: float = 1.0

    def __post_init__(self) -> None:
        if not _is_number(self.clip_scale, above=0.0) or not 2.0**-21 < self.clip_scale < 2.0**21:
            raise Refusal("bad-request", "the clip norm of the round is no number that it can have")
        if self.clip_scale != 1.0 and (self.spec.counts is None or "clip_quantile" not in self.spec.counts):
            raise Refusal("bad-request", "the clip norm moves, and the spec does not say so")
        if not _is_count(self.round, MAX_ROUND) or not (self.devices == 0 or _is_count(self.devices, MAX_DIM)):
            raise Refusal("bad-request", "the assignment names no round")
        if not 0 < len(self.users) <= MAX_USERS_PER_ASSIGNMENT or not all(map(_is_name, self.users)):
            raise Refusal("bad-request", "the assignment names no users")
        if self.vector.shape != (self.spec.model_dim,) or self.vector.dtype != np.float32:
            raise Refusal("bad-request", "the shared vector has not the spec's shape")
        if not np.isfinite(self.vector).all():
            raise Refusal("bad-request", "the shared vector is not finite")

    def to_records(self) -> RecordDict:
        """Write the assignment as Flower records."""
        from flwr.app import ArrayRecord, ConfigRecord, RecordDict

        request: dict[str, Any] = {
            "format": written(WIRE_FORMAT),
            "spec": self.spec.to_text(),
            "round": self.round,
            "users": list(self.users),
            "devices": self.devices,
            "clip_scale": self.clip_scale,
        }
        return RecordDict({"request": ConfigRecord(request), "shared": ArrayRecord({"vector": _to_array(self.vector)})})

    @classmethod
    def from_records(cls, records: RecordDict) -> Assignment:
        """Read an assignment, or refuse.

        Raises:
            Refusal: A record is missing, misshapen or of another format.
        """

        def read() -> Assignment:
            request: Any = records.config_records["request"]
            if not readable(request["format"], WIRE_FORMAT):
                raise Refusal("format", said(request["format"], WIRE_FORMAT, "the assignment"))
            users, spec = request["users"], request["spec"]
            if not isinstance(users, list) or not isinstance(spec, str):
                raise TypeError
            vector = _from_array(records.array_records["shared"]["vector"], ("float32",))
            # A server of an earlier version sends no scale, and has no clip that moves.
            scale = request.get("clip_scale", 1.0)
            return cls(ReleaseSpec.from_text(spec), request["round"], tuple(users), vector, request["devices"], scale)

        return _read(read, Refusal("bad-request", "a record of the assignment is missing or misshapen"))


@dataclass(frozen=True)
class Release:
    """What leaves: a sum of bounded updates, how many users it holds, and the receipt of exactly these bytes.

    Attributes:
        total: Sum over the assigned users that took part, shape `(dim,)`; with distributed noise as integers.
        users: How many took part.
        receipt: SHA-256 over the bytes of `total`, bound to run, round and spec, hex.
    """

    total: NDArray[Any]
    users: int
    receipt: str

    def to_records(self) -> RecordDict:
        """Write the release as Flower records."""
        from flwr.app import ArrayRecord, ConfigRecord, RecordDict

        return RecordDict(
            {
                "release": ArrayRecord({"total": _to_array(self.total)}),
                "receipt": ConfigRecord({"format": written(WIRE_FORMAT), "users": self.users, "sha256": self.receipt}),
            }
        )

    @classmethod
    def from_records(cls, records: RecordDict) -> Release:
        """Read a release as the server receives it; what its numbers are is not trusted yet.

        Raises:
            Refusal: The reply carries a refusal's code, or is not a release.
        """

        def read() -> Release:
            refused: Any = records.config_records.get("refusal")
            if refused is not None:
                code = refused["code"]
                raise Refusal(code if code in REFUSAL_CODES else "unknown", "the device refused")
            receipt: Any = records.config_records["receipt"]
            users, digest = receipt["users"], receipt["sha256"]
            if not _is_count(users, MAX_USERS_PER_ASSIGNMENT) or not _matches(_IS_DIGEST, digest):
                raise TypeError
            total = _from_array(records.array_records["release"]["total"], ("float16", "float32", "float64", "uint32"))
            return cls(total, users, digest)

        return _read(read, Refusal("bad-reply", "the reply is not a release"))


def receipt_digest(total: NDArray[Any], spec: ReleaseSpec, number: int, users: int) -> str:
    """Bind the bytes of a release to its run, round and spec, hex."""
    return receipt_of_bytes(raw_bytes(total), spec.digest, number, users, str(total.dtype))


def receipt_of_bytes(data: bytes, spec_digest: str, number: int, users: int, dtype: str) -> str:
    """The same from the bytes as they left, and the digest of their spec."""
    head = canonical([spec_digest, number, users, dtype, [len(data) // np.dtype(dtype).itemsize]])
    return hashlib.sha256(head + data).hexdigest()


def refusal_records(code: str) -> RecordDict:
    """A reply that says no: a code from the closed list, and not a word more."""
    from flwr.app import ConfigRecord, RecordDict

    code = code if code in REFUSAL_CODES else "failed"
    return RecordDict({"refusal": ConfigRecord({"format": written(WIRE_FORMAT), "code": code})})


def raw_bytes(values: NDArray[Any]) -> bytes:
    """Write numbers as they travel: in order, little-endian, nothing else."""
    return values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes()


def from_raw_bytes(data: bytes, dtype: str) -> NDArray[Any]:
    """Read what `raw_bytes` wrote into a new array, shape `(numbers,)`.

    Raises:
        ValueError: The bytes are not a whole number of numbers, or there are none.
    """
    return np.frombuffer(data, np.dtype(dtype).newbyteorder("<")).astype(dtype)


def _to_array(values: NDArray[Any]) -> Array:
    from flwr.app import Array

    return Array(str(values.dtype), tuple(values.shape), RAW, raw_bytes(values))


def _from_array(array: Array, dtypes: tuple[str, ...]) -> NDArray[Any]:
    if array.stype != RAW or array.dtype not in dtypes or len(array.shape) != 1:
        raise ValueError
    if array.shape[0] > MAX_DIM or len(array.data) != array.shape[0] * np.dtype(array.dtype).itemsize:
        raise ValueError
    return from_raw_bytes(array.data, array.dtype)


def _read(read: Callable[[], T], otherwise: Refusal) -> T:
    """Read hostile records; whatever they are, the outcome is a value or a `Refusal`."""
    try:
        return read()
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, MemoryError):
        raise otherwise from None


def _matches(expression: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and expression.fullmatch(value) is not None


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARACTERS and value.isprintable()


def _is_count(value: Any, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: Any, *, above: float = -math.ulp(0.0), most: float = math.inf) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and above < value <= most and value < math.inf


def _is_epsilon(value: Any) -> bool:
    """Whether it is the text of a positive number, or "inf"."""
    try:
        return value == "inf" or (_is_name(value) and _is_number(float(value), above=0.0))
    except ValueError:
        return False


def _are_shapes(value: Any, count: int) -> bool:
    """Whether it is a tuple of `count` shapes that together have a size that can be stored."""
    if not isinstance(value, tuple) or len(value) != count:
        return False
    for shape in value:
        if not isinstance(shape, tuple) or not 0 < len(shape) <= 8 or not all(_is_count(n, MAX_DIM) for n in shape):
            return False
    return sum(math.prod(shape) for shape in value) <= MAX_DIM


def _is_recipe(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and len(value) <= MAX_RECIPE_KEYS
        and all(_is_name(key) for key in value)
        and all(_is_name(entry) or _is_number(entry, above=-math.inf) for entry in value.values())
    )
