"""Rounds with distributed noise, as the server sees them: who may come, when a round is called off, what is published.

What is published of a round is its sum, filled up to the one level of noise that every round has (`published`). A round
with too few devices or too many is called off; its debit stays, because that it was called off is seen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.distributed_noise import DistributedNoise
from common.errors import DataError
from common.files import write_private_file
from common.mask_graph import needed
from common.masks import Words
from common.privacy import Randomness
from common.secure_sum import THRESHOLD, SecureSum
from common.wire import ReleaseSpec
from server.aggregation import ModularSum

__all__ = ["CalledOff", "Participation", "fill_up", "modular_sum", "published"]

TAKEN_PART = "participation.json"


class CalledOff(Exception):
    """A round of another size than the run allows, or with too few left in it; nothing of it is published."""


class Participation:
    """How often each simulated user took part; a device counts for itself, in its ledger."""

    def __init__(self, path: Path, cap: int, counts: Counter[str]) -> None:
        """Keep `counts` in `path`; use `open`."""
        self._path, self._cap, self._counts = path, cap, counts

    @classmethod
    def open(cls, folder: Path, spec: ReleaseSpec) -> Participation:
        """Go on counting where a run stands; counts nothing where no noise is distributed.

        Raises:
            DataError: The file is damaged, so that nobody knows who took part how often.
        """
        cap = SecureSum.of(spec).participation_cap if spec.secure_sum is not None else 0
        path = folder / TAKEN_PART
        try:
            counts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            return cls(path, cap, Counter({str(name): int(count) for name, count in counts.items()}))
        except (OSError, ValueError, AttributeError, TypeError):
            raise DataError(f"{path}: not the count of who took part; the run cannot be continued") from None

    def admit(self, cohort: Sequence[str]) -> tuple[list[str], int]:
        """Return who of `cohort` is below the cap, and how many are not; who comes is counted, on disk."""
        admitted = [name for name in cohort if self._counts[name] < self._cap]
        self._counts.update(admitted)
        write_private_file(self._path, json.dumps(dict(self._counts)).encode() + b"\n", replace=True)
        return admitted, len(cohort) - len(admitted)


def modular_sum(spec: ReleaseSpec, number: int, devices: int) -> ModularSum:
    """Begin the sum of a round of `devices` without masks.

    Raises:
        CalledOff: The run allows no round of this size.
    """
    try:
        return ModularSum(spec, number, SecureSum.of(spec).noise(spec, devices), devices)
    except ValueError:
        raise CalledOff from None


def published(total: ModularSum, randomness: Randomness) -> NDArray[np.float64]:
    """Return what a sum without masks becomes before anything is made of it, shape `(dim,)`.

    Raises:
        CalledOff: So few of the round's devices are in it that masks could not have been taken off.
    """
    if total.users < needed(total.devices, THRESHOLD):
        raise CalledOff
    place = SecureSum.of(total.spec).terms(total.spec, total.number).digest
    return fill_up(total.words, total.noise, total.users, place, randomness)


def fill_up(
    total: Words, noise: DistributedNoise, survivors: int, place: bytes, randomness: Randomness
) -> NDArray[np.float64]:
    """Fill the noise in `total`, the sum of `survivors`, up to its level, and decode it, shape `(dim,)`.

    Guarantee: what comes out has noise of one level, whoever took part; see `common.distributed_noise`, step 5.

    Raises:
        ClaimRefused: What was drawn is not such noise; nothing is released.
    """
    filled = total + noise.top_up(survivors, randomness)
    return np.asarray(noise.decode(filled & np.uint32(2**noise.bits - 1), place), np.float64)
