"""The mechanisms: clip, noise, and the one generator that both rely on.

Everything whose privacy is claimed passes through here, and what comes out carries the facts its noise must be
measured against: `Bounded` knows its clip norm and unit, and answers what its sensitivity is under an adjacency.

What `clip_rows` does with input that is not an ordinary update; none of it raises in the middle of a round:

==============================================  ===============================================================
row                                             result
==============================================  ===============================================================
L2 norm at most the clip norm                   unchanged, but for rounding to the output dtype
L2 norm above the clip norm                     scaled down, to just below the clip norm after rounding
holds a NaN or an infinity                      zeros: it adds nothing to a sum and cannot be seen in one
finite, but its square overflows (1e38, 1e300)  scaled down exactly; norms are taken without overflow
finite, but its square underflows (1e-200)      measured exactly, so a still smaller clip norm holds
all zeros                                       zeros; there is no division by the norm
zero values per row, shape (users, 0)           shape (users, 0)
no rows, shape (0, dim)                         shape (0, dim)
not a two-dimensional float32 or float64 array  `ValueError`, before any row is read
==============================================  ===============================================================

Proof sketch of the bound. Let C be the clip norm.

1. Each returned row has L2 norm at most C, in float64 and in any order of summation, after rounding to the dtype
   that leaves: rows are scaled so far below C less the largest error such a sum can have (`_certain_bound`) that
   rounding cannot lift them above it (`_holds_without_looking`), or are checked after the cast. Test:
   `test_the_norm_after_rounding_never_exceeds_the_clip_norm`.
2. A row depends on that unit's data alone: no statistic of the batch enters. Test:
   `test_a_row_is_clipped_without_regard_to_the_other_rows`.
3. So removing or zeroing one row moves the sum by at most C, replacing it by at most 2C. Test:
   `test_removing_one_row_moves_the_sum_by_at_most_the_stated_sensitivity`.
4. Gaussian noise of standard deviation `noise_multiplier * sensitivity` is drawn from a generator keyed by the
   operating system, never shared by two processes. Test: `test_a_forked_process_does_not_repeat_its_parents_noise`.
5. Not proven: the noise is a float64, not a real number. Mironov (2012), "On significance of the least significant
   bits for differential privacy". Every statement lists it as an assumption.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NoReturn, Self

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = [
    "Adjacency",
    "Bounded",
    "Randomness",
    "Unit",
    "clip_rows",
    "discrete_gaussian",
    "gaussian_noise",
]

FloatArray = NDArray[np.float64]

INPUT_DTYPES = (np.dtype(np.float32), np.dtype(np.float64))
OUTPUT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))

BLOCK_VALUES = 1 << 16
"""Values clipped at a time: in float64 they stay in the cache of one core."""

NORMAL_PAIRS = 1 << 15
"""Pairs of normals made at a time, for the same reason."""


class Unit(StrEnum):
    """Whose presence a guarantee hides."""

    USER = "user"
    EXAMPLE = "example"


class Adjacency(StrEnum):
    """What two neighbouring data sets differ in."""

    ZERO_OUT = "zero-out"
    """One unit's contribution is replaced by zeros; how many units there are is public."""
    REPLACE_ONE = "replace-one"
    """One unit's data are replaced by any other."""
    ADD_REMOVE = "add-remove"
    """One unit is added or removed; how many units there are is private."""


@dataclass(frozen=True)
class Bounded:
    """A vector, or a sum of vectors, to which no unit contributes more than `clip_norm` in L2 norm.

    Attributes:
        value: Shape (dim,), or (users, dim) before it is summed.
        clip_norm: Largest L2 norm of one unit's contribution, after rounding.
        unit: Who that unit is.
    """

    value: NDArray[np.floating[Any]]
    clip_norm: float
    unit: Unit

    def __post_init__(self) -> None:
        _check_clip_norm(self.clip_norm)

    @classmethod
    def sum_of_rows(cls, updates: ArrayLike, clip_norm: float, unit: Unit, dtype: DTypeLike = np.float32) -> Self:
        """Clip each row of `updates`, shape (users, dim), and add them up in float64, shape (dim,).

        Guarantee: one row more or less moves the value by at most `clip_norm`.
        """
        rows = clip_rows(updates, clip_norm, dtype)
        return cls(rows.sum(axis=0, dtype=np.float64), clip_norm, unit)

    def sensitivity(self, adjacency: Adjacency) -> float:
        """Return how far the value can move, in L2 norm, between two neighbouring data sets."""
        return self.clip_norm * (2.0 if Adjacency(adjacency) is Adjacency.REPLACE_ONE else 1.0)


def clip_rows(
    updates: ArrayLike, clip_norm: float, dtype: DTypeLike = np.float32, *, origin: NDArray[Any] | None = None
) -> NDArray[Any]:
    """Clip each row to an L2 norm of at most `clip_norm`; the table above says what happens to odd input.

    Args:
        updates: Shape (users, dim), float32 or float64.
        clip_norm: The bound C, positive and finite.
        dtype: What leaves: float32 or float16. The bound holds after rounding to it.
        origin: Shape (dim,), float32 or float64: subtracted from every row in float64 first, where rows are where
            something got to and the update is how far that is from where it began.

    Returns:
        Shape (users, dim), a new array.

    Guarantee: every row's L2 norm, taken in float64 in any order, is at most `clip_norm`. Clipping twice equals
    clipping once.

    Raises:
        ValueError: Wrong dtype or shape, or a clip norm that is not a positive finite number.
    """
    _check_clip_norm(clip_norm)
    rows = np.asarray(updates)
    if rows.ndim != 2:
        raise ValueError(f"updates have {rows.ndim} dimensions, not (users, dim)")
    if rows.dtype not in INPUT_DTYPES:
        raise ValueError(f"updates are {rows.dtype}, not float32 or float64")
    target = np.dtype(dtype)
    if target not in OUTPUT_DTYPES:
        raise ValueError(f"updates leave as float32 or float16, not {target}")
    users, dim = rows.shape
    clipped = np.empty((users, dim), dtype=target)
    if clipped.size == 0:
        return clipped
    begins = None if origin is None else _origin(origin, dim)
    step = max(1, BLOCK_VALUES // dim)
    scratch = np.zeros((2, min(step, users), dim), dtype=np.float64)
    for start in range(0, users, step):
        block = rows[start : start + step]
        _clip_block(block, begins, float(clip_norm), clipped[start : start + step], scratch[:, : len(block)])
    return clipped


def _origin(origin: NDArray[Any], dim: int) -> FloatArray:
    if origin.shape != (dim,) or origin.dtype not in INPUT_DTYPES or not np.isfinite(origin).all():
        raise ValueError(f"an origin is {dim} finite float32 or float64 numbers, one for each value of a row")
    return origin.astype(np.float64)


def _check_clip_norm(clip_norm: float) -> None:
    if not (math.isfinite(clip_norm) and clip_norm > 0):
        raise ValueError("the clip norm is a positive finite number")


def _certain_bound(clip_norm: float, dim: int) -> float:
    """Return the largest computed norm that shows, in any order of summation, a norm of at most `clip_norm`."""
    # Higham (2002), Accuracy and Stability of Numerical Algorithms, section 3.1: a sum of `dim` rounded squares is
    # off by a factor of at most 1 + dim * u, its root by half of that; twice, as both sides of a comparison are.
    return clip_norm * (1.0 - (dim + 8) * 2.0**-52)


def _holds_without_looking(clip_norm: float, dim: int, dtype: np.dtype[Any]) -> bool:
    """Whether rounding to `dtype` cannot lift a norm that is `1 - 2^-24` of the certain bound above that bound.

    To nearest, a float32 moves by at most 2^-24 of itself, and below 2^-126 by at most 2^-150; so a row's norm moves
    by at most 2^-24 of itself and 2^-150 sqrt(dim). The product (1 - 2^-24)(1 + 2^-24) leaves 2^-48 of the bound, of
    which scaling a row in float64 takes some 2^-52 and the second term, for such clip norms, less than 2^-60.
    """
    return dtype == np.float32 and clip_norm >= 2.0**-90 * math.sqrt(dim)


def _clip_block(
    rows: NDArray[Any], origin: FloatArray | None, clip_norm: float, clipped: NDArray[Any], scratch: FloatArray
) -> None:
    """Clip `rows`, less `origin`, into `clipped`, both (users, dim), with scratch space of shape (2, users, dim)."""
    exact, rounded = scratch
    bound = _certain_bound(clip_norm, rows.shape[1])
    aim = bound * (1.0 - 2.0**-24)
    exact[...] = rows
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        if origin is not None:
            exact -= origin
        squares = np.vecdot(exact, exact)
    # Outside this range the sum of squares may have lost everything to overflow, underflow or a NaN.
    odd = ~((squares > 1e-280) & (squares < 1e300))
    norms = np.sqrt(np.where(odd, 0.0, squares))
    for user in np.flatnonzero(odd):
        exact[user], norms[user] = _measure(exact[user])
    largest = float(np.finfo(clipped.dtype).max)
    within = norms <= bound
    scales = np.where(within, 1.0, aim / np.where(within, 1.0, norms))
    if not within.all():
        exact *= scales[:, np.newaxis]
    if min(clip_norm, float(norms.max())) >= largest:
        np.clip(exact, -largest, largest, out=exact)
    with np.errstate(under="ignore"):
        clipped[...] = exact
    # A row that was neither scaled nor rounded is as it was when it was measured.
    as_it_was = rows.dtype == clipped.dtype and origin is None
    unsure = ~within | odd if as_it_was else np.ones(len(rows), dtype=bool)
    if _holds_without_looking(clip_norm, rows.shape[1], clipped.dtype):
        unsure &= odd | (within & (norms > aim))
    unsure = np.flatnonzero(unsure)
    if not unsure.size:
        return
    rounded[unsure] = clipped[unsure]
    with np.errstate(under="ignore"):
        squares = np.vecdot(rounded, rounded)
    safe = (squares > 1e-280) & (squares <= bound * bound)
    for user in unsure[~safe[unsure]]:
        clipped[user] = _shrink(exact[user], clipped[user], bound)


def _measure(row: FloatArray) -> tuple[FloatArray, float]:
    """Return a finite row and its L2 norm without overflow or underflow; a non-finite row becomes zeros.

    A row that comes near the end of float64 is divided by 2^64, since it is about to be scaled down anyway.
    """
    peak = float(np.abs(row).max())
    if not math.isfinite(peak):
        return np.zeros_like(row), 0.0
    if peak == 0.0:
        return row, 0.0
    unit = row / peak if peak >= 1e-300 else (row * 2.0**600) / (peak * 2.0**600)
    norm = float(np.sqrt(np.vecdot(unit, unit)))
    if peak > 1e300:
        return row * 2.0**-64, (peak * 2.0**-64) * norm
    return row, peak * norm


def _shrink(wanted: FloatArray, rounded: NDArray[Any], bound: float) -> NDArray[Any]:
    """Round `wanted`, shape (dim,), so that its norm holds: rescale first, then cut towards zero."""
    current = rounded
    factor = 1.0
    for _ in range(4):
        _, norm = _measure(current.astype(np.float64))
        if norm <= bound:
            return current
        factor *= math.nextafter(bound / norm, 0.0)
        with np.errstate(under="ignore"):
            current = (wanted * factor).astype(rounded.dtype)
    zero = np.zeros((), dtype=rounded.dtype)
    while _measure(current.astype(np.float64))[1] > bound:
        current = np.nextafter(current, zero)
    return current


class Randomness:
    """A stream of random numbers: AES-256 in counter mode, all of it derived from one key.

    `Randomness.system()` takes its key from the operating system and is the only source of noise a claim may rest
    on. `Randomness.rehearsal()` derives it from a seed, for reproduction and tests; whatever used it claims nothing.

    Guarantee: a system stream is never seeded, saved, copied or pickled, and a forked process starts a new one. A
    snapshot of a whole machine that is started twice repeats its streams; nothing here can notice.
    """

    __slots__ = ("_key", "_lock", "_process", "_secure", "_stream")

    def __init__(self, key: bytes, *, secure: bool) -> None:
        """Use `system` or `rehearsal` instead."""
        self._secure = secure
        self._start(key)

    @classmethod
    def system(cls) -> Self:
        """Return a new stream that is keyed by the operating system."""
        return cls(os.urandom(32), secure=True)

    @classmethod
    def rehearsal(cls, seed: int, *labels: str | int | bytes) -> Self:
        """Return the stream of `seed` and `labels`, the same one every time; not for anything that is claimed."""
        return cls(_derive(b"homespun rehearsal", (seed, *labels)), secure=False)

    @property
    def is_secure(self) -> bool:
        """Whether a privacy claim may rest on this stream."""
        return self._secure

    def child(self, *labels: str | int | bytes) -> Self:
        """Return another stream: of a system stream a new, unrelated one; of a rehearsal the one of these labels."""
        if self._secure:
            return type(self)(os.urandom(32), secure=True)
        return type(self)(_derive(self._key, labels), secure=False)

    def bytes(self, count: int) -> bytes:
        """Return `count` random bytes."""
        if count < 0:
            raise ValueError("the number of bytes is not negative")
        return self._take(count)

    def uniform(self, size: int | tuple[int, ...]) -> FloatArray:
        """Return float64 in [0, 1), multiples of 2^-53."""
        count = math.prod(_shape(size))
        return np.multiply(self._words(count) >> np.uint64(11), 2.0**-53, dtype=np.float64).reshape(_shape(size))

    def normal(self, size: int | tuple[int, ...]) -> FloatArray:
        """Return standard normals as float64, of magnitude at most 8.6.

        Source: Box and Muller (1958), on 53-bit uniforms. The tail that is cut off has probability 2^-53.
        """
        shape = _shape(size)
        count = math.prod(shape)
        normals = np.empty(count + count % 2, dtype=np.float64)
        pairs = normals.size // 2
        for start in range(0, pairs, NORMAL_PAIRS):
            length = min(NORMAL_PAIRS, pairs - start)
            words = self._words(2 * length)
            words >>= np.uint64(11)
            uniforms = words.astype(np.float64)
            radius = uniforms[:length]
            radius += 1.0  # in (0, 1], so that the logarithm is finite
            radius *= 2.0**-53
            np.log(radius, out=radius)
            radius *= -2.0
            np.sqrt(radius, out=radius)
            angle = uniforms[length:]
            angle *= 2.0**-52 * math.pi
            np.multiply(radius, np.cos(angle), out=normals[2 * start : 2 * start + length])
            np.multiply(radius, np.sin(angle), out=normals[2 * start + length : 2 * (start + length)])
        return normals[:count].reshape(shape)

    def bernoulli(self, probability: float, size: int | tuple[int, ...]) -> NDArray[np.bool_]:
        """Return independent coins that are True with `probability`, exact to 2^-53."""
        if not 0.0 <= probability <= 1.0:
            raise ValueError("a probability is between 0 and 1")
        return self.uniform(size) < probability

    def poisson_sample(self, count: int, rate: float) -> NDArray[np.int64]:
        """Return the indices below `count` that independent coins of `rate` chose, in order; often not `count * rate`.

        Guarantee: this is the sampling that `PoissonGaussian` assumes. It may be empty, and the caller must then
        release noise alone.
        """
        return np.flatnonzero(self.bernoulli(rate, count)).astype(np.int64)

    def integers(self, bound: int, size: int | tuple[int, ...]) -> NDArray[np.int64]:
        """Return integers in [0, bound), without bias."""
        if not 0 < bound <= 2**63 - 1:
            raise ValueError("the bound is positive and below 2^63")
        count = math.prod(_shape(size))
        limit = np.uint64((2**64 // bound) * bound - 1)
        words = self._words(count)
        while (rejected := np.flatnonzero(words > limit)).size:
            words[rejected] = self._words(rejected.size)
        return (words % np.uint64(bound)).astype(np.int64).reshape(_shape(size))

    def permutation(self, count: int) -> NDArray[np.int64]:
        """Return 0 to `count` - 1 in a uniformly random order."""
        # Two of n 64-bit sort keys are equal with probability n^2 / 2^65.
        return np.argsort(self._words(count), kind="stable").astype(np.int64)

    def choice(self, count: int, size: int) -> NDArray[np.int64]:
        """Return `size` different indices below `count`, in random order; never a Poisson sample."""
        if not 0 <= size <= count:
            raise ValueError("a choice without repetition is no larger than what it chooses from")
        return self.permutation(count)[:size]

    def __repr__(self) -> str:
        """Name the kind of stream, never its key."""
        return f"Randomness({'system' if self._secure else 'rehearsal'})"

    def __reduce__(self) -> NoReturn:
        """Refuse to be copied or pickled: two holders of one key would share their noise."""
        raise TypeError("a random stream is not copied or pickled; give the other side a child, or a seed and labels")

    def _start(self, key: bytes) -> None:
        self._key = key
        self._process = os.getpid()
        self._lock = threading.Lock()
        # The counter starts at zero: a key is used for one stream only.
        self._stream: CipherContext = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def _take(self, count: int) -> bytes:
        if self._secure and self._process != os.getpid():
            self._start(os.urandom(32))
        with self._lock:
            return self._stream.update(bytes(count))

    def _words(self, count: int) -> NDArray[np.uint64]:
        """Return `count` random 64-bit words, writable."""
        return np.frombuffer(bytearray(self._take(8 * count)), dtype="<u8").astype(np.uint64, copy=False)


def _shape(size: int | tuple[int, ...]) -> tuple[int, ...]:
    return size if isinstance(size, tuple) else (size,)


def _derive(secret: bytes, labels: tuple[str | int | bytes, ...]) -> bytes:
    """Return a key of `secret` and `labels`; labels are written with type and length, so no two lists collide."""
    digest = hashlib.sha256()
    for label in labels:
        if isinstance(label, bytes):
            kind, text = b"b", label
        elif isinstance(label, str):
            kind, text = b"s", label.encode()
        else:
            kind, text = b"i", str(int(label)).encode()
        digest.update(kind + struct.pack(">Q", len(text)) + text)
    return HKDF(algorithm=SHA256(), length=32, salt=None, info=digest.digest()).derive(secret)


def gaussian_noise(
    sensitivity: float | Bounded,
    noise_multiplier: float,
    dim: int,
    randomness: Randomness,
    *,
    adjacency: Adjacency | None = None,
) -> FloatArray:
    """Return Gaussian noise of standard deviation `noise_multiplier * sensitivity`, shape (dim,), float64.

    Args:
        sensitivity: L2 sensitivity of what the noise is added to; or that `Bounded` itself, with `adjacency`.
        noise_multiplier: Standard deviation over sensitivity, the number that the accountant is given.
        dim: Number of values.
        randomness: `Randomness.system()`, or the run is a rehearsal.
        adjacency: Needed with a `Bounded`: under replacement its sensitivity is twice its clip norm.

    Raises:
        ValueError: A negative or non-finite number, or a `Bounded` without an adjacency.
    """
    if isinstance(sensitivity, Bounded):
        if adjacency is None:
            raise ValueError("the sensitivity of a bounded value depends on the adjacency; say which")
        sensitivity = sensitivity.sensitivity(adjacency)
    elif adjacency is not None:
        raise ValueError("an adjacency goes with a bounded value; a plain sensitivity already has one")
    if not (math.isfinite(sensitivity) and sensitivity > 0):
        raise ValueError("the sensitivity is a positive finite number")
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise ValueError("the noise multiplier is finite and not negative")
    noise = randomness.normal(dim)
    noise *= noise_multiplier * sensitivity
    return noise


def discrete_gaussian(scale: float, size: int | tuple[int, ...], randomness: Randomness) -> NDArray[np.int64]:
    """Return integers with probability proportional to exp(-x^2 / (2 scale^2)): noise for counts and for metrics.

    Add it to an integer of integer sensitivity; the event is `DiscreteGaussian(scale, sensitivity)`. Metrics are
    rounded to a public grid first.

    Source: Canonne, Kamath and Steinke (2020), arXiv:2004.00010, Algorithm 3, vectorised: a discrete Laplace proposal,
    accepted with probability exp(-(|y| - scale^2 / t)^2 / (2 scale^2)). The acceptance is a float64 comparison, not the
    exact rational one of the paper.

    Raises:
        ValueError: A scale that is negative, not finite, or above 2^40.
    """
    if not (math.isfinite(scale) and 0.0 <= scale <= 2.0**40):
        raise ValueError("the scale is between 0 and 2^40")
    shape = _shape(size)
    count = math.prod(shape)
    accepted = np.zeros(count, dtype=np.int64)
    if scale == 0.0:
        return accepted.reshape(shape)
    proposal_scale = math.floor(scale) + 1
    filled = 0
    while filled < count:
        draws = int((count - filled) * 1.6) + 16
        uniforms = 1.0 - randomness.uniform((3, draws))
        # The difference of two geometric variables is a discrete Laplace variable.
        geometric = np.floor(-proposal_scale * np.log(uniforms[:2]))
        proposals = geometric[0] - geometric[1]
        distance = (np.abs(proposals) - scale * scale / proposal_scale) / scale
        kept = proposals[uniforms[2] <= np.exp(-0.5 * distance * distance)][: count - filled]
        accepted[filled : filled + kept.size] = kept
        filled += kept.size
    return accepted.reshape(shape)
