"""The server's state between rounds: weights, velocity, round and ledger head in one atomic write.

One safetensors file holds all of it, so there is no instant at which weights and head disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.adapters import Vector
from common.errors import DataError
from common.files import write_private_file

__all__ = ["Checkpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """What a restart needs.

    Attributes:
        round: Rounds that are done.
        vector: The shared vector after them, shape `(dim,)`.
        velocity: The server optimizer's state, shape `(dim,)`, or `(2, dim)` for FedAdam.
        head: Hash of the ledger's entry that this state was released under, hex.
        layout: Digest of the shared layout.
        clip_scale: What an adaptive clip norm has become, over the one it started from.
    """

    round: int
    vector: Vector
    velocity: NDArray[np.float32]
    head: str
    layout: str
    clip_scale: float = 1.0

    def save(self, path: Path) -> None:
        """Write the checkpoint atomically."""
        from safetensors.numpy import save

        metadata = {
            "round": str(self.round),
            "head": self.head,
            "layout": self.layout,
            "clip_scale": repr(self.clip_scale),
            "format": "1",
        }
        write_private_file(
            path, save({"vector": self.vector, "velocity": self.velocity}, metadata=metadata), replace=True
        )

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read what `save` wrote.

        Raises:
            DataError: The file is not a checkpoint.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:  # pyright: ignore[reportUnknownVariableType]
                metadata: dict[str, str] = file.metadata() or {}
                vector = np.asarray(file.get_tensor("vector"), dtype=np.float32)
                velocity = np.asarray(file.get_tensor("velocity"), dtype=np.float32)
            scale = float(metadata.get("clip_scale", "1.0"))
            return cls(int(metadata["round"]), vector, velocity, metadata["head"], metadata["layout"], scale)
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise DataError(f"{path}: not a checkpoint ({type(error).__name__})") from None
