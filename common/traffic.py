"""What a round moves, and how the numbers of an update are written.

Numbers leave as float16 where that loses nothing that matters, which halves what a device sends. The clip comes first:
`common.privacy.clip_rows` rounds, measures the rounded numbers in float64, and where rounding made the update longer
than the clip, scales it down and rounds again. So the bound that noise is measured against holds for what leaves, in
the type in which it leaves, and no statement depends on the type. Numbers travel times 1: float16 has a digit for every
number that an update of a usual clip is made of, and where it had none (`fits_float16`) float32 is used.

Noise that a device adds itself is added in float64 and rounded afterwards, which is post-processing. Distributed noise
travels as integers, whose width secure sums choose.

int8 is not offered. One scale per update would keep the bound (decoded numbers can be clipped as these are), and halve
a message once more; but the scale is made from private data, and would leave beside numbers that local noise covers, so
it would need a place in the mechanism of each noise. For adapters of usual size the gain is seconds on a slow line, see
docs/devices.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from common.errors import ConfigError
from common.secure_sum import SecureSum
from common.wire import ReleaseSpec

__all__ = ["LEAST_FLOAT16", "Traffic", "check_dtype", "fits_float16", "traffic_of"]

LEAST_FLOAT16 = 2.0**-12
"""A number of this size has ten bits in float16, and one of a quarter of it still eleven binary places of its own."""

MOST_FLOAT16 = 60_000.0
SIGMAS = 9.0
"""Draws of `common.privacy.Randomness` are shorter."""

SLOW_LINE = 384_000 / 8
"""Bytes per second up of a 3G line (UMTS, 384 kbit/s)."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that a device of a cohort moves in one round, Flower's envelope apart.

    Attributes:
        down: The shared vector.
        up: The update.
        dtype: How its numbers are written, as words.
    """

    down: int
    up: int
    dtype: str

    def sentence(self) -> str:
        """Say it, and how long it takes on a slow line."""
        seconds = self.up / SLOW_LINE
        return (
            f"per round and device {_size(self.down)} down and {_size(self.up)} up ({self.dtype}); "
            f"up takes {seconds:.1f} s at 384 kbit/s"
        )


def traffic_of(spec: ReleaseSpec) -> Traffic:
    """What a round under `spec` moves."""
    down = 4 * spec.model_dim
    if spec.secure_sum is not None:
        sums = SecureSum.of(spec)
        noise = sums.noise(spec, sums.largest_cohort)
        return Traffic(down, math.ceil(noise.padded_dim * noise.bits / 8), f"integers of {noise.bits} bits")
    return Traffic(down, spec.dim * (2 if spec.dtype == "float16" else 4), spec.dtype)


def fits_float16(spec: ReleaseSpec) -> bool:
    """Whether an update under `spec` loses nothing that matters in float16.

    Numbers of an update at its clip are `clip / sqrt(dim)` on average; they must be far from where float16 runs out of
    digits, and noise that a device adds far from where it overflows. Counts beside an update stay in float32.
    """
    if spec.noise == "distributed" or spec.counts is not None or not spec.model_dim:
        return False
    typical = spec.update_norm / math.sqrt(spec.model_dim)
    return typical >= LEAST_FLOAT16 and _largest(spec) <= MOST_FLOAT16


def check_dtype(spec: ReleaseSpec) -> None:
    """Return if numbers under `spec` can be written as it says.

    Raises:
        ConfigError: They would overflow, or counts and integers leave beside them.
    """
    if spec.dtype == "float16" and (spec.noise == "distributed" or spec.counts is not None):
        raise ConfigError("update_dtype: distributed noise and counts beside an update leave as they are; take auto")
    if spec.dtype == "float16" and _largest(spec) > MOST_FLOAT16:
        raise ConfigError("update_dtype: clip and noise are too large for float16; take auto")


def _largest(spec: ReleaseSpec) -> float:
    noise = 2.0 * spec.clip * spec.noise_multiplier if spec.noise == "local" and spec.unit == "user" else 0.0
    return spec.update_norm + SIGMAS * noise


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.0f} kB"
