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
from client.greedy_answers import greedy_answers
from client.packing import Example, by_length
from client.trainer import Trainer
from client.user_data import Encoded
from common.adapters import Layout, Vector
from common.errors import ConfigError

__all__ = ["middle_layer", "steered", "style_vector", "style_vectors"]

MOST_QUESTIONS = 8
"""Of a user's records that the model answers itself: a mean direction needs no more, and answers cost time."""
PASS_TOKENS = 2048


def middle_layer(base: BaseModel) -> int:
    """The layer that style is read from and added to where nobody says otherwise: half-way up."""
    return len(_layers(base)) // 2


def style_vectors(
    trainer: Trainer, people: Sequence[Sequence[Example]], *, under: tuple[Vector, Layout, float] | None = None
) -> NDArray[np.float32]:
    """Style vectors of the middle layer for each of some users; shape (users, hidden).

    Up to `MOST_QUESTIONS` of a user's newest records count. The model under `under` answers their questions itself, at
    most as long as the user did; plain text, which has no question, it continues from its first token. A user without
    records, or whom the model answers nothing at all, has the vector zero.
    """
    asked = [list(own[-MOST_QUESTIONS:]) for own in people]
    flat = [one for own in asked for one in own]
    vectors = np.zeros((len(people), trainer.base.model.config.get_text_config().hidden_size), np.float32)
    if not flat:
        return vectors
    prompts = [np.asarray(one.ids[: max(one.first_label, 1)], dtype=np.int32) for one in flat]
    longest = max(len(one.ids) - len(prompt) for one, prompt in zip(flat, prompts, strict=True))
    answers = iter(greedy_answers(trainer, prompts, longest, under=under))
    layer = middle_layer(trainer.base)
    with trainer.over_base(under):
        for user, own in enumerate(asked):
            cut = [(one, next(answers)) for one in own]
            generic = [_answered(one, answer) for one, answer in cut if len(answer)]
            if generic:
                vectors[user] = style_vector(trainer.base, layer, own, generic)
    return vectors


def _answered(example: Example, answer: NDArray[np.int32]) -> Example:
    first = max(example.first_label, 1)
    answer = answer[: len(example.ids) - first]
    return Encoded(np.concatenate([example.ids[:first], answer]).astype(np.int32), first)


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
    found = np.zeros((len(examples), base.model.config.get_text_config().hidden_size))
    rows: list[int] = []

    def read(module: Any, arguments: Any, output: Any) -> None:  # noqa: ARG001 - the shape of a hook
        hidden = output[0] if isinstance(output, tuple) else output
        for place, row in enumerate(rows):
            one = examples[row]
            found[row] = hidden[place, max(one.first_label, 1) : len(one.ids)].mean(dim=0).double().cpu().numpy()

    handle = _layers(base)[layer].register_forward_hook(read)
    try:
        for piece in by_length(examples, PASS_TOKENS):
            rows = piece.tolist()
            ids = torch.zeros(len(rows), max(len(examples[row].ids) for row in rows), dtype=torch.int64)
            for place, row in enumerate(rows):  # padding on the right is never looked at
                ids[place, : len(examples[row].ids)] = torch.from_numpy(np.asarray(examples[row].ids, dtype=np.int64))
            base.hidden(ids.to(base.device))
    finally:
        handle.remove()
    return found.mean(axis=0).astype(np.float32)


def _layers(base: BaseModel) -> Any:
    layers = getattr(base.model.base_model, "layers", None)
    if layers is None:
        raise ConfigError(f"steering: {type(base.model).__name__} does not name its layers as others do")
    return layers
