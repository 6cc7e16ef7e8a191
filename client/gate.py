"""The only door out of a device.

Whatever wants to leave is checked against the release spec: exactly one array, of the spec's length and type, finite,
every user's row inside the clip after rounding. The receipt is written before the bytes are handed over. There is no
other path: the vault returns a `Release`, and only the gate makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.distributed_noise import DistributedNoise
from common.errors import GateRefused
from common.masks import Words
from common.privacy import Randomness
from common.promise import check_noise
from common.wire import Release, ReleaseSpec, receipt_digest

__all__ = ["Gate", "Shares"]

DTYPES = {"float32": np.float32, "float16": np.float16}


@dataclass(frozen=True)
class Shares:
    """What distributed noise needs beside the updates.

    Attributes:
        noise: Sized for the devices of the round.
        place: Public bytes that choose the round's rotation.
        randomness: One stream for each user.
        mask: Masks the integers of one device, shape `(padded_dim,)`, and gives back what leaves; None skips the masks
            where they would cancel, in a simulation.
    """

    noise: DistributedNoise
    place: bytes
    randomness: Sequence[Randomness]
    mask: Callable[[Words], bytes] | None = None

    def encode(self, updates: NDArray[Any]) -> NDArray[Any]:
        """Return the sum modulo 2^bits of every row's integers, its share included; or one row's, masked, as bytes."""
        total = np.zeros(self.noise.padded_dim, np.uint32)
        for row, own in zip(updates, self.randomness, strict=True):
            total += self.noise.encode(row, self.place, own)
        total &= np.uint32(2**self.noise.bits - 1)
        if self.mask is None:
            return total
        if len(updates) != 1:
            raise GateRefused("a mask is one device's")
        return np.frombuffer(self.mask(total), np.uint8)


class Gate:
    """Checks a release against its spec, records it, and only then hands it over."""

    def __init__(
        self,
        record: Callable[[ReleaseSpec, dict[str, Any]], None] | None = None,
        *,
        keep: Callable[[dict[str, Any], NDArray[Any]], None] | None = None,
    ) -> None:
        """Write down what leaves; a simulation's driver keeps its own ledger.

        Args:
            record: Returns when the debit and the receipt are durable, or raises, and nothing leaves.
            keep: Takes the very numbers that leave, for the owner to look at; asked before `record`.
        """
        self._record = record
        self._keep = keep

    def release(
        self,
        updates: NDArray[Any],
        spec: ReleaseSpec,
        number: int,
        randomness: Randomness | None = None,
        *,
        shares: Shares | None = None,
    ) -> Release:
        """Let the sum of bounded `updates`, shape `(users, row_dim)`, leave in round `number`.

        Witness coordinates are appended here, as zeros, and local noise is added here: nothing that leaves is out of
        this function's sight. One user's update without local noise leaves as it was clipped, byte for byte but for the
        sign of zeros; the sum over a simulation's chunk is exact in float64, so that rounding cannot widen the bound.
        Rounding noised numbers to the spec's dtype is post-processing. A chunk's local noise is drawn once, with the
        variance of its users' draws.

        Args:
            updates: Clipped and rounded to the spec's dtype, counts behind the shared numbers where the spec has any.
            spec: What may leave.
            number: The round.
            randomness: Where local noise comes from; needed in local mode only.
            shares: How updates become integers with a share of the noise each; needed in distributed mode only.

        Guarantee: every row's L2 norm, computed in float64 from the rounded values, is at most `spec.update_norm`; in
            local mode every number that leaves carries noise of standard deviation multiplier x 2 x clip per user;
            in distributed mode each user's share, and outside of a simulation a mask.

        Raises:
            GateRefused: Anything differs from the spec; nothing was recorded and nothing leaves.
            ClaimRefused: What was drawn is not the noise that was promised; nothing was recorded and nothing leaves.
        """
        dtype = DTYPES.get(spec.dtype)
        if dtype is None:
            raise GateRefused(f"the spec asks for {spec.dtype}, which cannot leave")
        if type(updates) is not np.ndarray:  # a subclass may answer what it likes about itself
            raise GateRefused("what wants to leave is no plain array of numbers")
        if updates.ndim != 2 or updates.shape[0] == 0 or updates.shape[1] != spec.row_dim:
            raise GateRefused(f"expected updates of {spec.row_dim} numbers, found shape {updates.shape}")
        if updates.dtype != dtype:
            raise GateRefused(f"expected {spec.dtype}, found {updates.dtype}")
        users = updates.shape[0]
        total: NDArray[Any] = np.zeros(spec.dim, dtype if users == 1 else np.float64)  # witnesses last
        exact, longest = np.empty(spec.row_dim), spec.update_norm**2 * (1 + 1e-15)
        for row in updates:  # one at a time: in float64 it stays in the cache of a core
            exact[...] = row
            square = float(np.vecdot(exact, exact))
            if not np.isfinite(square):
                raise GateRefused("an update is not finite")
            if square > longest:
                raise GateRefused("an update is longer than the clip")
            # Added to zeros, so that the sign of a zero, which no norm counts, does not leave.
            total[: spec.row_dim] += row if users == 1 else exact
        if spec.noise == "local" and spec.unit == "user" and spec.noise_multiplier > 0:
            if randomness is None:
                raise GateRefused("local noise was promised, and there is nothing to draw it from")
            scale = spec.noise_multiplier * spec.extrapolation * 2.0 * spec.clip * np.sqrt(users)
            before = total.astype(np.float64)
            total = (before + scale * randomness.normal(spec.dim)).astype(total.dtype)
            check_noise(total.astype(np.float64) - before, scale)
        if spec.noise == "distributed":
            if shares is None:
                raise GateRefused("a share of the noise was promised, and there is nothing to draw it from")
            padded = np.concatenate([updates, np.zeros((users, spec.witnesses), updates.dtype)], axis=1)
            total = shares.encode(padded)
        receipt = receipt_digest(total, spec, number, users)
        facts: dict[str, Any] = {
            "run": spec.run,
            "round": number,
            "spec": spec.digest,
            "names": [name for name, _ in spec.tensors],
            "shapes": [list(shape) for _, shape in spec.tensors],
            "dtype": str(total.dtype),
            "bytes": total.nbytes,
            "sha256": receipt,
        }
        if self._keep is not None:
            self._keep(facts, total)
        if self._record is not None:
            self._record(spec, facts)
        return Release(total, users, receipt)
