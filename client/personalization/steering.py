"""Steering: one direction inside the model that points from generic text to the user's own.

The direction is the mean difference of a layer's output at the answers' tokens, between what the user wrote and what
the model itself answered to the same prompts (Zhang et al., 2025, arXiv:2503.05213, "StyleVector"). Adding it while the
model reads and writes shifts the style; nothing is trained, and forgetting it is deleting one vector. It never leaves
the device.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from client.base_model import BaseModel
from client.packing import Example
from common.errors import ConfigError

__all__ = ["middle_layer", "steered", "style_vector"]


def middle_layer(base: BaseModel) -> int:
    """The layer that style is read from and added to where nobody says otherwise: half-way up."""
    return len(_layers(base)) // 2


@torch.no_grad()
def style_vector(
    base: BaseModel, layer: int, own: Sequence[Example], generic: Sequence[Example]
) -> NDArray[np.float32]:
    """Mean output of `layer` at the labels of the user's answers, minus that at generic ones; shape (hidden,).

    Args:
        base: The base; an adapter that is added into its weights is part of it.
        layer: Counted from 0.
        own: The user's records.
        generic: The same prompts with the model's own answers, in any number.

    Raises:
        ValueError: One side has no record.
    """
    if not own or not generic:
        raise ValueError("a direction needs the user's answers and generic ones")
    return _mean_output(base, layer, own) - _mean_output(base, layer, generic)


@contextmanager
def steered(base: BaseModel, layer: int, vector: NDArray[np.float32], strength: float) -> Generator[None]:
    """Add `strength` times `vector` to the output of `layer` at every token, for the duration.

    Only the model's own forward is steered (`client.personalization.soft_prompt.score_with_prefix`, generation); the
    trainer's pass by hand does not go through it, so nothing shared is ever trained under it.
    """
    added = torch.as_tensor(
        vector * np.float32(strength), device=base.device, dtype=next(base.model.parameters()).dtype
    )

    def shift(module: Any, arguments: Any, output: Any) -> Any:  # noqa: ARG001 - the shape of a hook
        if isinstance(output, tuple):
            return (output[0] + added, *output[1:])
        return output + added

    handle = _layers(base)[layer].register_forward_hook(shift)
    try:
        yield
    finally:
        handle.remove()


def _mean_output(base: BaseModel, layer: int, examples: Sequence[Example]) -> NDArray[np.float32]:
    """Mean over examples of the mean over an example's labels, so that no long answer outweighs the others."""
    found: list[NDArray[np.float32]] = []

    def read(module: Any, arguments: Any, output: Any) -> None:  # noqa: ARG001 - the shape of a hook
        hidden = output[0] if isinstance(output, tuple) else output
        found.append(hidden[0, first:].mean(dim=0).float().cpu().numpy())

    handle = _layers(base)[layer].register_forward_hook(read)
    try:
        for example in examples:
            first = max(example.first_label, 1)
            base.hidden(torch.from_numpy(np.asarray(example.ids, dtype=np.int64))[None].to(base.device))
    finally:
        handle.remove()
    return np.asarray(np.stack(found).mean(axis=0, dtype=np.float64), dtype=np.float32)


def _layers(base: BaseModel) -> Any:
    layers = getattr(base.model.base_model, "layers", None)
    if layers is None:
        raise ConfigError(f"steering: {type(base.model).__name__} does not name its layers as others do")
    return layers
