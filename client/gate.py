"""The only door out of a device.

Whatever wants to leave is checked against the release spec: exactly one array, of the spec's length and type, finite,
every user's row inside the clip after rounding. The receipt is written before the bytes are handed over. There is no
other path: the vault returns a `Release`, and only the gate makes one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import GateRefused
from common.wire import Release, ReleaseSpec, receipt_digest

__all__ = ["Gate"]

DTYPES = {"float32": np.float32, "float16": np.float16}


class Gate:
    """Checks a release against its spec, records it, and only then hands it over."""

    def __init__(self, record: Callable[[ReleaseSpec, dict[str, Any]], None] | None = None) -> None:
        """Keep `record`, which returns when the receipt is durable; a simulation's driver keeps its own ledger."""
        self._record = record

    def release(self, updates: NDArray[Any], spec: ReleaseSpec, number: int) -> Release:
        """Let the sum of clipped `updates`, shape `(users, dim)`, leave in round `number`.

        One user's update leaves in the spec's dtype, byte for byte what was clipped; the sum over a simulation's
        chunk is exact in float64, so that rounding cannot widen the bound.

        Guarantee: every row's L2 norm, computed in float64 from the rounded values, is at most `spec.clip`.

        Raises:
            GateRefused: Anything differs from the spec; nothing was recorded and nothing leaves.
        """
        dtype = DTYPES.get(spec.dtype)
        if dtype is None:
            raise GateRefused(f"the spec asks for {spec.dtype}, which cannot leave")
        if updates.ndim != 2 or updates.shape[0] == 0 or updates.shape[1] != spec.dim:
            raise GateRefused(f"expected updates of {spec.dim} numbers, found shape {updates.shape}")
        if updates.dtype != dtype:
            raise GateRefused(f"expected {spec.dtype}, found {updates.dtype}")
        exact = updates.astype(np.float64)
        squares = np.einsum("ij,ij->i", exact, exact)
        if not np.isfinite(squares).all():
            raise GateRefused("an update is not finite")
        if (squares > spec.clip**2 * (1 + 1e-15)).any():
            raise GateRefused("an update is longer than the clip")
        users = updates.shape[0]
        total: NDArray[Any] = updates[0].copy() if users == 1 else exact.sum(axis=0)
        receipt = receipt_digest(total, spec, number, users)
        if self._record is not None:
            self._record(
                spec,
                {
                    "run": spec.run,
                    "round": number,
                    "spec": spec.digest,
                    "names": list(spec.names),
                    "shapes": [list(shape) for shape in spec.shapes],
                    "dtype": str(total.dtype),
                    "bytes": total.nbytes,
                    "sha256": receipt,
                },
            )
        return Release(total, users, receipt)
