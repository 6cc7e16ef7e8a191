"""Cross-entropy at labelled positions, a piece of positions at a time: tokens times vocabulary never lie in memory.

A piece is as large as stays in a core's cache where the vocabulary is small, and at least 64 positions, so that the
output layer is read from memory seldom enough. Gradients are formed in the same piece: the output layer is frozen, and
so the gradient at the hidden states is all there is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.native import kernels_for
from client.native_products import products_for

__all__ = ["Scores", "label_scores", "loss_gradient", "positions_per_piece"]

CACHED_LOGITS = 1 << 19
DEVICE_LOGITS = 1 << 26
FEWEST_POSITIONS = 64


@dataclass(frozen=True)
class Scores:
    """What one system says about some records: arrays of shape `(records,)` in the order they came.

    Attributes:
        nats: Summed negative log-likelihood of the labelled tokens.
        tokens: Number of labelled tokens.
        correct: Labelled tokens that were the model's first choice.
        exact: Whether every labelled token was.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    correct: NDArray[np.int64]

    @property
    def exact(self) -> NDArray[np.bool_]:
        """Records whose every labelled token was the first choice."""
        return self.correct == self.tokens


def positions_per_piece(vocabulary: int, device: torch.device) -> int:
    """How many positions' logits exist at a time."""
    return max(FEWEST_POSITIONS, (DEVICE_LOGITS if device.type == "cuda" else CACHED_LOGITS) // vocabulary)


def loss_gradient(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Gradient at `hidden`, shape `(labels, hidden)`, of the weighted sum of cross-entropies.

    Args:
        hidden: Final hidden states at the labelled positions.
        weight: The output layer, shape `(vocabulary, hidden)`.
        targets: The labels.
        weights: What each label counts.
    """
    kernels = kernels_for(hidden)
    products = None if kernels is None else products_for(hidden)
    if products is not None:
        found = products.loss_back(hidden, weight, targets, weights.to(hidden.dtype))
        if found is not None:
            return found
    gradient = torch.empty_like(hidden)
    step = positions_per_piece(weight.shape[0], hidden.device)
    for start in range(0, hidden.shape[0], step):
        here = slice(start, start + step)
        if kernels is not None:
            logits = kernels.loss_back(hidden[here] @ weight.t(), targets[here], weights[here].to(hidden.dtype))
            torch.mm(logits, weight, out=gradient[here])
            continue
        logits = (hidden[here] @ weight.t()).to(_wide(hidden))
        logits.sub_(logits.amax(dim=1, keepdim=True)).exp_()
        counted = weights[here, None].to(logits.dtype)
        logits.mul_(counted / logits.sum(dim=1, keepdim=True))
        logits.scatter_add_(1, targets[here, None], -counted)
        torch.mm(logits.to(hidden.dtype), weight, out=gradient[here])
    return gradient


def label_scores(hidden: Tensor, logits_of: Callable[[Tensor], Tensor], targets: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of each label, float64, and whether it was the first choice, both shape `(labels,)`."""
    nats = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
    hits = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    start = 0
    step = FEWEST_POSITIONS
    while start < len(targets):
        here = slice(start, start + step)
        logits = logits_of(hidden[here])
        logits = logits.to(_wide(logits))
        step = positions_per_piece(logits.shape[1], hidden.device)
        best, choice = logits.max(dim=1)
        chosen = logits.gather(1, targets[here, None])[:, 0]
        size = logits.sub_(best[:, None]).exp_().sum(dim=1)
        nats[here] = (size.log() + best - chosen).double()
        hits[here] = choice == targets[here]
        start = here.stop
    return nats, hits


def _wide(like: Tensor) -> torch.dtype:
    return torch.float32 if like.dtype in (torch.bfloat16, torch.float16) else like.dtype
