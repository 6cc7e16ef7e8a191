"""What a server reads from the noised counts of a round, publishes, and lets the next round's clip follow.

Everything here works on numbers that were noised and charged already (`common.noised_counts`), so it costs nothing.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.noised_counts import NoisedCounts
from common.promise import promise_of
from common.secure_sum import SecureSum
from common.wire import ReleaseSpec, canonical

__all__ = ["COUNTS", "ReleasedCounts", "digest_of", "noise_on_sum"]

COUNTS = "counts.jsonl"


class ReleasedCounts:
    """The counts of one run, round by round, in `counts.jsonl`."""

    def __init__(self, folder: Path, spec: ReleaseSpec) -> None:
        """Keep in `folder` what is released beside the adapter of `spec`."""
        self._path = folder / COUNTS
        self._spec = spec
        self._own = NoisedCounts.of(spec)

    def read(
        self, number: int, noised: NDArray[np.float64], clip_scale: float
    ) -> tuple[dict[str, float | None], float]:
        """Return what round `number` released beside the adapter, empty for nothing, and the next round's clip scale.

        Args:
            number: The round.
            noised: The whole noised sum, shape `(dim,)`.
            clip_scale: Of this round.
        """
        own, spec = self._own, self._spec
        if own is None:
            return {}, clip_scale
        values = noised[spec.model_dim : spec.row_dim]
        read = own.read(values, spec.clip, spec.sampling_rate * spec.population, noise_on_sum(spec))
        clip = spec.clip * own.update_share * clip_scale
        return {"round": number, "clip": clip, **read}, own.next_scale(clip_scale, read.get("within"))

    def keep(self, counts: Mapping[str, float | None]) -> None:
        """Publish what `read` returned."""
        if counts:
            with self._path.open("ab") as file:
                file.write(canonical(dict(counts)) + b"\n")


def digest_of(counts: Mapping[str, float | None]) -> str:
    """What the ledger's release entry says of the counts of its round, hex."""
    return hashlib.sha256(canonical(dict(counts))).hexdigest()


def noise_on_sum(spec: ReleaseSpec) -> float:
    """Standard deviation of the noise on each number of a round's sum, of an expected cohort."""
    if spec.noise == "distributed":
        sums = SecureSum.of(spec)
        noise = sums.noise(spec, sums.largest_cohort)
        return noise.level * noise.step
    scale = promise_of(spec).noise_scale(spec.noise_multiplier * spec.extrapolation, spec.clip)
    return scale * (math.sqrt(spec.sampling_rate * spec.population) if spec.noise == "local" else 1.0)
