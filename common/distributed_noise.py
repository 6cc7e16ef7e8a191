"""An update as integers with a share of the noise, so that a sum modulo 2^bits is private to whoever computes it.

Clip, rotate, scale, round to whole steps, add a discrete Gaussian share, reduce modulo 2^bits; whoever has the sum
undoes it. After Kairouz, Liu and Steinke (2021), "The distributed discrete Gaussian mechanism for federated learning
with secure aggregation", arXiv:2102.06387, Algorithms 1 and 2. The charge is not their Theorem 1 but a plain Gaussian
multiplier, by a reduction that also holds under Poisson sampling and for any accountant:

Let d be the padded dimension; B the `sensitivity` in steps; m the fewest honest devices in the sum; sigma the
`share_scale`; s the constant `SMOOTHING`; rho_w(x) = exp(-x^2 / (2 w^2)); and eps(w) = 2 sum exp(-2 pi^2 w^2 k^2)
over k >= 1. By Poisson summation, the sum of rho_w over Z + a is w sqrt(2 pi) times something between 1 - eps(w) and
1 + eps(w), for any a.

1. *One device moves the sum by at most B in L2 norm.* The integers are checked after rounding, in integer arithmetic,
   and a rounding that fails is drawn again, at last towards zero; zeros become zeros. Test:
   `test_no_rounded_update_is_longer_than_the_sensitivity`.
2. *A sum of discrete Gaussians is nearly one.* X of scale a plus Y of scale b has mass proportional to
   rho_c(x) times the sum of rho_w over a shifted Z, with c^2 = a^2 + b^2 and w = a b / c: within a factor of
   (1 + eps(w)) / (1 - eps(w)), either way, of the discrete Gaussian of scale c. Adding share k + 1 to k shares has
   w^2 = sigma^2 k / (k + 1). Test: `test_a_sum_of_discrete_gaussians_is_as_close_to_one_as_stated`.
3. *A discrete Gaussian of scale c around an integer x is nearly made from a continuous one around x* of variance
   c^2 - s^2, without looking at x: round y to the integer z with probability proportional to rho_s(z - y). The result
   is within (1 + eps(s)) / (1 - eps(s)) of it. Test: `test_a_discrete_gaussian_is_nearly_a_rounded_continuous_one`.
4. So what m honest devices add to the sum is, in each of d coordinates, within exp(`closeness` / d) of a function of a
   Gaussian mechanism of sensitivity B and variance m sigma^2 - s^2. Its multiplier is what is charged, and a claim adds
   `closeness` to epsilon twice, and to log delta once. Test:
   `test_the_charge_is_what_the_fewest_honest_shares_add_up_to`.
5. Other honest devices' shares are further independent noise; colluding devices' vectors are constants; reduction
   modulo 2^bits and everything after it is a function of the sum.
   Under Poisson sampling one more thing is needed. With more devices there is more noise, and over many coordinates
   its level tells how many took part: who knows of all others' part would know of one's, and nothing would be
   amplified. So before anything is published the coordinator fills the noise up to one `level`, by a discrete Gaussian
   of its own (`top_up`; step 2 again), and the level is the same whoever took part. Tests:
   `test_filled_up_noise_has_one_level_for_every_number_of_survivors`,
   `test_without_filling_up_the_noise_level_tells_how_many_took_part`.
6. Assumed: who survives does not depend on the noise. Whoever decides that sees masked vectors only (`common.secagg`).
7. Assumed: the discrete Gaussian is exact. Its sampler compares in float64; see `common.privacy.discrete_gaussian`.
   The rotation is in float64 too, but nothing rests on it: step 1 checks the integers.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from common.claims import check_spread
from common.errors import Refusal
from common.mask_graph import honest_survivors
from common.masks import Words
from common.privacy import Randomness, clip_rows, discrete_gaussian
from common.secagg_messages import Terms, digest

__all__ = ["DistributedNoise", "poisson_error", "rotation", "unrotation"]

FloatArray = NDArray[np.floating[Any]]

SMOOTHING = 2.0
"""Scale, in steps, of the rounding that turns a continuous Gaussian into a discrete one; eps(2) is below 1e-33."""

LARGEST_CLOSENESS = 1e-9
"""Finer noise than this is refused, rather than charged."""

STEPS_PER_ROOT = 5.0
"""Steps in the clip norm, over the root of the dimension: rounding then adds half a percent to the sensitivity."""

LEAST_TOP_UP = 4.0
"""Smallest scale, in steps, of what fills the noise up, unless nothing is lacking."""

OVERFLOW = 1e-6
"""Largest chance per round that any coordinate of the sum wraps around."""

ATTEMPTS = 40
ROUNDING_FAILURE = math.exp(-0.5)
"""Beta of Kairouz et al.: a rounding is too long at most this often, and in fact hardly ever."""

NOISE_BLOCK = 1 << 14
RADIX = 32


@dataclass(frozen=True, kw_only=True)
class DistributedNoise:
    """How the updates of one run become integers, how much noise each brings, and what that is worth.

    Attributes:
        dim: Values of one update.
        clip_norm: Largest L2 norm of one update.
        noise_multiplier: What is charged: the noise's standard deviation over the sensitivity, when no more than
            `fewest_honest` honest devices are in the sum. 0 is no noise and no claim.
        fewest_honest: Honest devices in any sum that can be learned; `Terms.fewest_honest`.
        largest_cohort: Devices that the modulus has room for.
        steps: Steps of rounding in the clip norm; by default five times the root of the padded dimension.
        level: Standard deviation, in steps, that the noise is filled up to before anything is published; by default
            that of `largest_cohort` shares.
    """

    dim: int
    clip_norm: float
    noise_multiplier: float
    fewest_honest: int
    largest_cohort: int
    steps: float = 0.0
    level: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no sum can have, and noise so fine that its charge would not hold."""
        if not (1 <= self.dim <= 2**28 and 1 <= self.fewest_honest <= self.largest_cohort):
            raise ValueError("dimension and devices are positive, and no more are honest than there are")
        if not (math.isfinite(self.clip_norm) and self.clip_norm > 0):
            raise ValueError("the clip norm is a positive finite number")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError("the noise multiplier is finite and not negative")
        if self.steps == 0.0:
            object.__setattr__(self, "steps", math.ceil(STEPS_PER_ROOT * math.sqrt(self.padded_dim)))
        if not (math.isfinite(self.steps) and 1.0 <= self.steps <= 2.0**24):
            raise ValueError("the clip norm has between 1 and 2^24 steps")
        if self.level == 0.0:
            object.__setattr__(self, "level", math.sqrt(self.largest_cohort) * self.share_scale)
        if not (math.isfinite(self.level) and self.level >= 0):
            raise ValueError("the level of the published noise is finite and not negative")
        if self.closeness > LARGEST_CLOSENESS:
            raise ValueError("the noise is too fine for its steps; take more steps, or more noise")
        if self.bits > 32:
            raise ValueError("the sum does not fit a modulus of 32 bits; take fewer steps")

    @cached_property
    def padded_dim(self) -> int:
        """Coordinates of the integer vector: the next power of two, and at least 64."""
        return max(64, 1 << (self.dim - 1).bit_length())

    @cached_property
    def step(self) -> float:
        """What one step is worth, in units of the update."""
        return self.clip_norm / self.steps

    @cached_property
    def largest_square(self) -> int:
        """The largest squared L2 norm of a rounded update, in steps; an integer, checked in integers."""
        root = math.sqrt(self.padded_dim)
        likely = math.sqrt(2.0 * math.log(1.0 / ROUNDING_FAILURE)) * (self.steps + root / 2.0)
        return math.floor(min((self.steps + root) ** 2, self.steps**2 + self.padded_dim / 4.0 + likely))

    @property
    def sensitivity(self) -> float:
        """How far one device's update moves the sum, in steps, in L2 norm, when it is replaced by zeros."""
        return math.sqrt(self.largest_square)

    @property
    def inflation(self) -> float:
        """The sensitivity over the clip norm: what rounding costs."""
        return self.sensitivity / self.steps

    @cached_property
    def share_scale(self) -> float:
        """Scale of the discrete Gaussian that each device adds, in steps."""
        if self.noise_multiplier == 0.0:
            return 0.0
        variance = (self.noise_multiplier * self.sensitivity) ** 2 + SMOOTHING**2
        return math.sqrt(variance / self.fewest_honest)

    @cached_property
    def closeness(self) -> float:
        """Bound on the log ratio between a sum of shares, filled up or not, and what is charged; all coordinates."""
        if self.noise_multiplier == 0.0:
            return 0.0
        per_coordinate = _log_ratio(SMOOTHING) + sum(
            _log_ratio(self.share_scale * math.sqrt(count / (count + 1))) for count in range(1, self.largest_cohort)
        )
        # What fills up is 0, or a discrete Gaussian of scale at least LEAST_TOP_UP beside shares of scale at least s:
        # a b / (a^2 + b^2)^(1/2) is at least the smaller of the two over the root of 2.
        top_up = _log_ratio(min(self.share_scale, LEAST_TOP_UP) / math.sqrt(2.0))
        return self.padded_dim * (per_coordinate + top_up)

    @cached_property
    def bits(self) -> int:
        """Width of the modulus: no coordinate of a sum of `largest_cohort` wraps, but with chance `OVERFLOW`.

        A coordinate of the rotated sum is sub-Gaussian with variance at most (cohort * steps)^2 / d (Hoeffding, over
        the random signs), a discrete Gaussian share with at most its scale squared (Canonne et al. 2020, Lemma 21),
        and each rounding is off by less than 1.
        """
        cohort = self.largest_cohort
        variance = (cohort * self.steps) ** 2 / self.padded_dim + self.level**2
        reach = math.sqrt(2.0 * variance * math.log(2.0 * self.padded_dim / OVERFLOW)) + cohort
        return math.ceil(math.log2(2.0 * reach + 1.0))

    def check(self, terms: Terms, devices: int) -> None:
        """Return if this noise is enough for a round of `devices` under `terms`; a device asks before it encodes.

        Raises:
            Refusal: `few-honest`: the terms let fewer honest devices be left in a sum than the noise is sized for.
                `bad-message`: they are of another dimension or modulus, or of more devices than it has room for.
        """
        if honest_survivors(devices, terms.threshold, terms.corrupt) < self.fewest_honest:
            raise Refusal("few-honest", f"the noise is sized for {self.fewest_honest} honest devices in the sum")
        if (terms.dim, terms.bits) != (self.padded_dim, self.bits) or terms.largest_cohort > self.largest_cohort:
            raise Refusal("bad-message", "the terms are not those that the noise was made for")

    def multiplier_with(self, honest: int) -> float:
        """Return the multiplier that holds with `honest` honest devices in the sum, whatever the others do.

        Fewer than `fewest_honest` is what a coordinator reaches that enrols devices of its own beyond the share that
        was assumed; 1 is a device alone among them, and what its own share of the noise is worth.
        """
        variance = honest * self.share_scale**2 - SMOOTHING**2
        return math.sqrt(variance) / self.sensitivity if variance > 0 else 0.0

    def standard_deviation(self, survivors: int) -> float:
        """Return the standard deviation of the noise in one value of the decoded sum of `survivors`."""
        return math.sqrt(survivors) * self.share_scale * self.step

    def rounding_deviation(self, survivors: int) -> float:
        """Return a bound on the standard deviation that rounding adds to one value of the decoded sum."""
        return math.sqrt(survivors) * 0.5 * self.step

    def quantize(self, update: NDArray[Any], place: bytes, randomness: Randomness) -> NDArray[np.int64]:
        """Return `update` clipped, rotated and rounded to whole steps, without noise, shape (padded_dim,).

        Args:
            update: Shape (dim,), float32 or float64. What is not finite becomes zeros.
            place: The same public bytes for all devices of a round, which choose its rotation.
            randomness: `Randomness.system()`, or the run is a rehearsal.

        Guarantee: the L2 norm is at most `sensitivity`; an update of zeros becomes zeros.
        """
        if update.shape != (self.dim,):
            raise ValueError("the update does not have the dimension of the sum")
        vector = np.zeros(self.padded_dim)
        vector[: self.dim] = clip_rows(update[np.newaxis], self.clip_norm)[0]
        vector = rotation(vector, place) * (self.steps / self.clip_norm)
        lower = np.floor(vector)
        above = vector - lower
        floor = lower.astype(np.int64)
        for _ in range(ATTEMPTS):
            rounded = floor + (randomness.uniform(self.padded_dim) < above)
            if int(np.vdot(rounded, rounded)) <= self.largest_square:
                return rounded
        return np.trunc(vector).astype(np.int64)

    def encode(self, update: NDArray[Any], place: bytes, randomness: Randomness) -> Words:
        """Return `update` as integers modulo 2^bits, this device's share of the noise included, shape (padded_dim,).

        Takes the arguments of `quantize`.

        Guarantee: the sum over any devices, `fewest_honest` of them honest, is charged as `noise_multiplier`.
        """
        noised = self.quantize(update, place, randomness)
        self._add(noised, self.share_scale, randomness)
        return self._reduced(noised)

    def top_up_scale(self, survivors: int) -> float:
        """Return the scale of the noise that the shares of `survivors` lack to `level`; 0, or at least LEAST_TOP_UP."""
        if not 0 <= survivors <= self.largest_cohort:
            raise ValueError("no more devices survive than the modulus has room for")
        lacking = self.level**2 - survivors * self.share_scale**2
        if abs(lacking) <= min(1.0, 1e-9 * self.level**2):
            return 0.0
        if lacking < LEAST_TOP_UP**2:
            raise ValueError("the level of the published noise is below that of the shares, or hardly above it")
        return math.sqrt(lacking)

    def top_up(self, survivors: int, randomness: Randomness) -> Words:
        """Return the noise that the shares of `survivors` lack: what the coordinator adds before it publishes.

        Guarantee: the noise in total plus this, modulo 2^bits, has the same level for every number of survivors.
        """
        noise = np.zeros(self.padded_dim, dtype=np.int64)
        self._add(noise, self.top_up_scale(survivors), randomness)
        return self._reduced(noise)

    def decode(self, total: Words, place: bytes) -> FloatArray:
        """Return the sum of updates that `total`, a sum of encoded ones modulo 2^bits, stands for, shape (dim,)."""
        if total.shape != (self.padded_dim,):
            raise ValueError("the total does not have the dimension of the sum")
        centred = (total & np.uint32(2**self.bits - 1)).astype(np.int64)
        centred[centred >= 2 ** (self.bits - 1)] -= 2**self.bits
        return unrotation(centred * self.step, place)[: self.dim]

    def _add(self, vector: NDArray[np.int64], scale: float, randomness: Randomness) -> None:
        """Add a discrete Gaussian of `scale`, in steps, and look at what was drawn."""
        square = 0
        for start in range(0, self.padded_dim, NOISE_BLOCK):  # in the cache of one core: three times as fast
            block = vector[start : start + NOISE_BLOCK]
            drawn = discrete_gaussian(scale, block.size, randomness)
            square += int(np.vdot(drawn, drawn))
            block += drawn
        if scale > 0:
            check_spread(square / scale**2 / self.padded_dim, self.padded_dim)

    def _reduced(self, vector: NDArray[np.int64]) -> Words:
        return (vector & (2**self.bits - 1)).astype(np.uint32)


def poisson_error(width: float) -> float:
    """Return eps(w) of the proof above, rounded up: how far a sum of rho_w over shifted integers is from constant."""
    return 2.0 * sum(math.exp(-2.0 * (math.pi * width * k) ** 2) for k in range(1, 5)) * (1.0 + 1e-12)


def _log_ratio(width: float) -> float:
    error = poisson_error(width)
    return math.inf if error >= 1.0 else math.log1p(error) - math.log1p(-error)


def rotation(vector: FloatArray, place: bytes) -> FloatArray:
    """Return `vector`, shape (d,) for a power of two d, under random signs and an orthonormal Walsh-Hadamard transform.

    It spreads every vector evenly, so that one modulus fits all coordinates; the L2 norm stays.
    """
    return _transform(vector * _signs(vector.size, place))


def unrotation(vector: FloatArray, place: bytes) -> FloatArray:
    """Undo `rotation`."""
    return _transform(vector) * _signs(vector.size, place)


def _signs(dim: int, place: bytes) -> FloatArray:
    """Return public signs, the same for everybody who knows `place`."""
    key = digest("rotation", place, struct.pack(">Q", dim))
    stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(-(-dim // 8)))
    return 1.0 - 2.0 * np.unpackbits(np.frombuffer(stream, dtype=np.uint8), count=dim)


def _transform(vector: FloatArray) -> FloatArray:
    """Return the orthonormal Walsh-Hadamard transform of `vector`, in steps of a small matrix product."""
    dim = vector.size
    if dim & (dim - 1):
        raise ValueError("the transform takes a power of two of values")
    width = 1
    while width < dim:
        radix = min(RADIX, dim // width)
        vector = np.matmul(_hadamard(radix), vector.reshape(-1, radix, width))
        width *= radix
    return vector.reshape(-1) / math.sqrt(dim)


def _hadamard(order: int) -> FloatArray:
    matrix = np.ones((1, 1))
    while matrix.shape[0] < order:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix
