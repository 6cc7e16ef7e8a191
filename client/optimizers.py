"""Optimizers of stacked adapters: every user's state beside the others', every user as if alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.round_progress import PartProgress

__all__ = ["OPTIMIZERS", "Recipe", "StackedOptimizer", "batch_order"]

OPTIMIZERS = ("sgd", "momentum", "adam")
MOMENTUM = 0.9


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained: optimizer steps, records per step, and the optimizer, one of `OPTIMIZERS`."""

    steps: int
    batch: int
    learning_rate: float
    optimizer: str = "sgd"
    gradient_clip: float | None = None


class StackedOptimizer:
    """SGD, SGD with momentum 0.9, or Adam on stacked parameters, shape `(users, size)`.

    Users may leave from the end: a later step on fewer rows is a step of the first ones.

    Source: Polyak (1964), Kingma and Ba (2015), arXiv:1412.6980.
    """

    def __init__(self, recipe: Recipe) -> None:
        """Keep no state before the first step.

        Raises:
            ValueError: The recipe's optimizer is unknown.
        """
        if recipe.optimizer not in OPTIMIZERS:
            raise ValueError(f"the optimizer is one of {', '.join(OPTIMIZERS)}")
        self._recipe = recipe
        self._first: Tensor | None = None
        self._second: Tensor | None = None
        self._steps = 0

    def arrays(self, theta: Tensor) -> dict[str, NDArray[np.float32]]:
        """What the next step needs: `theta` itself and the optimizer's own state, float32, on the CPU."""
        kept = {"theta": theta, "first": self._first, "second": self._second}
        return {name: one.float().cpu().numpy() for name, one in kept.items() if one is not None}

    def resume(self, theta: Tensor, steps: int, progress: PartProgress | None) -> int:
        """Put an interrupted training of `steps` steps back, `theta` in place; return the step to go on with."""
        state = progress.resume(steps) if progress else None
        names = {"sgd": ("theta",), "momentum": ("theta", "first"), "adam": ("theta", "first", "second")}
        wanted = names[self._recipe.optimizer]
        if state is None or set(state.arrays) != set(wanted):
            return 0
        if any(state.arrays[name].shape != tuple(theta.shape) for name in wanted):
            return 0
        found = [torch.from_numpy(state.arrays[name]).to(theta) for name in wanted]
        theta.copy_(found[0])
        self._first, self._second = (*found[1:], None, None)[:2]
        self._steps = state.steps
        return state.steps

    def step(self, theta: Tensor, gradient: Tensor) -> None:
        """Move `theta` in place; both of shape `(users, size)`, the first rows of the first step's."""
        if self._recipe.gradient_clip is not None:
            norms = gradient.norm(dim=1, keepdim=True).clamp(min=1e-30)
            gradient = gradient * (self._recipe.gradient_clip / norms).clamp(max=1.0)
        rate = self._recipe.learning_rate
        if self._recipe.optimizer == "sgd":
            theta.sub_(gradient, alpha=rate)
            return
        if self._first is None:
            self._first = torch.zeros_like(theta)
        first = self._first[: theta.shape[0]]
        if self._recipe.optimizer == "momentum":
            theta.sub_(first.mul_(MOMENTUM).add_(gradient), alpha=rate)
            return
        if self._second is None:
            self._second = torch.zeros_like(theta)
        second = self._second[: theta.shape[0]]
        self._steps += 1
        first.mul_(0.9).add_(gradient, alpha=0.1)
        second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        mean = first / (1 - 0.9**self._steps)
        spread = (second / (1 - 0.999**self._steps)).sqrt_()
        theta.sub_(rate * mean / (spread + 1e-8))


def batch_order(count: int, steps: int, batch: int, order: np.random.Generator) -> NDArray[np.intp]:
    """Which records each step takes, shape `(steps, batch)`: one permutation after the other, cut into batches."""
    needed = steps * batch
    if not needed:  # personal_steps = 0: private adapters stay where they start
        return np.zeros((0, batch), np.intp)
    rounds = math.ceil(needed / count)
    return np.concatenate([order.permutation(count) for _ in range(rounds)])[:needed].reshape(steps, batch)
