"""Mixing weights: how strongly the shared and the private adapter act, from a small public grid.

What an adapter adds to a layer is linear in its up projection B, so its strength is a factor on B alone. Every pair of
strengths is one candidate of the choice (`client.personalization.choice`), scored on the user's validation records and
paid for in its correction: a weight is fitted the way a system is chosen. Half the shared adapter is for users whom
noise or other people's habits harm; a part of the private one for those whose few records it learned too well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.adapters import Layout

__all__ = ["MIXES", "Mix", "mix_of", "strengthened"]


@dataclass(frozen=True)
class Mix:
    """Strength of the shared and of the private adapter; (1, 1) is how the private one was trained."""

    shared: float
    private: float

    @property
    def suffix(self) -> str:
        """What the name of a mixed system ends in."""
        return f"@{self.shared:g}/{self.private:g}"


MIXES = (Mix(1.0, 0.5), Mix(1.0, 1.5), Mix(0.5, 1.0))
"""What is tried beside (1, 1)."""


def mix_of(system: str) -> Mix:
    """Read the strengths that a system's name ends in; (1, 1) where it ends in none."""
    shared, found, private = system.partition("@")[2].partition("/")
    return Mix(float(shared), float(private)) if found else Mix(1.0, 1.0)


def strengthened(adapters: NDArray[np.float32], layout: Layout, strength: float) -> NDArray[np.float32]:
    """Multiply what adapters add to the base by `strength`; shape (users, size) or (size,) as they come."""
    scaled = adapters.copy()
    for tensor in layout.tensors:
        if ".lora_B." in tensor.name:
            scaled[..., layout.offsets[tensor.name]] *= np.float32(strength)
    return scaled
