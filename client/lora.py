"""Stacked LoRA: many users' adapters on one frozen base.

The base's linear layers run once over the rows of all users; only the low-rank factors are batched per user. A
*group* is a run of consecutive rows that share one adapter: `A` has shape `(groups, rank, inputs)`, `B` has shape
`(groups, outputs, rank)`, and the rows are `groups` times as many consecutive rows. One group per row serves ragged
users.

Per-example gradients need no second backward and no hooks on the base: the gradient of a factor for one example is an
outer product of what the layer has in hand (its input, the low-rank activation, the gradient of its output), summed
over that example's own tokens. `ExampleGradients` collects them on the way back.

Source: Hu et al. (2021), arXiv:2106.09685; per-example clipping after Abadi et al. (2016), arXiv:1607.00133.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.int8_linear import Int8Linear
from common.adapters import Layout
from common.errors import ConfigError

__all__ = ["ExampleGradients", "LoraLinear", "StackedLora", "of_owners"]


@dataclass
class ExampleGradients:
    """Per-example gradients of one backward pass, by layer.

    Attributes:
        factors: Layer name -> (gradient of A, shape `(rows, rank, inputs)`; gradient of B, shape `(rows, outputs,
            rank)`).
    """

    factors: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])


class _LowRank(torch.autograd.Function):
    """`y = x A^T B^T` for groups of rows; its backward can keep the gradients of each row apart."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, layer: LoraLinear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        groups = a.shape[0]
        grouped = x.reshape(groups, -1, x.shape[-1])
        low = torch.bmm(grouped, a.transpose(1, 2))
        ctx.save_for_backward(grouped, low, a, b)
        ctx.layer, ctx.shape = layer, x.shape
        return torch.bmm(low, b.transpose(1, 2)).view(*x.shape[:-1], b.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = gradients
        grouped, low, a, b = ctx.saved_tensors
        dy = dy.reshape(grouped.shape[0], -1, dy.shape[-1])
        dlow = torch.bmm(dy, b)
        dx = torch.bmm(dlow, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        collect = ctx.layer.example_gradients
        if collect is None:
            da = torch.bmm(dlow.transpose(1, 2), grouped) if ctx.needs_input_grad[1] else None
            db = torch.bmm(dy.transpose(1, 2), low) if ctx.needs_input_grad[2] else None
            return dx, da, db, None
        rows, tokens = ctx.shape[0], ctx.shape[1]
        per_row = (rows, tokens, -1)
        collect.factors[ctx.layer.name] = (
            torch.bmm(dlow.reshape(per_row).transpose(1, 2), grouped.reshape(per_row)),
            torch.bmm(dy.reshape(per_row).transpose(1, 2), low.reshape(per_row)),
        )
        return dx, torch.zeros_like(a), torch.zeros_like(b), None


class LoraLinear(nn.Module):
    """A frozen linear layer of the base and the adapters that are laid over it at the moment.

    Attributes:
        a: Down projections, shape `(groups, rank, inputs)`, or None when no adapter is on.
        b: Up projections with LoRA's scaling folded in, shape `(groups, outputs, rank)`.
        example_gradients: Where the next backward keeps each row's gradients apart, or None.
        merged: Whether an adapter lies in the base's own weights for the moment.
    """

    def __init__(self, name: str, linear: nn.Linear | Int8Linear) -> None:
        """Wrap `linear`, the layer that the base calls `name`."""
        super().__init__()
        self.name = name
        self.linear = linear
        self.a: Tensor | None = None
        self.b: Tensor | None = None
        self.example_gradients: ExampleGradients | None = None
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        """Map `x`, shape `(rows, tokens, inputs)`, to shape `(rows, tokens, outputs)`."""
        y = self.linear(x)
        if self.a is None or self.b is None:
            return y
        return y + _LowRank.apply(x, self.a, self.b, self)


class StackedLora:
    """The target layers of one base, and what is laid over them.

    Attributes:
        layers: The wrapped layers in the layout's order.
    """

    def __init__(self, model: nn.Module, modules: Sequence[str]) -> None:
        """Wrap the linear layers of `model` named in `modules`, in place.

        Raises:
            ConfigError: A module is not an `nn.Linear`; the message names it and what it is.
        """
        self.layers: list[LoraLinear] = []
        for name in modules:
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                raise ConfigError(f"targets: the base has no layer {name}") from None
            if type(linear) not in (nn.Linear, Int8Linear):
                raise ConfigError(
                    f"targets: layer {name} is {type(linear).__name__}, and only Linear layers can be adapted"
                )
            parent, _, leaf = name.rpartition(".")
            layer = LoraLinear(name, cast("nn.Linear | Int8Linear", linear))
            setattr(model.get_submodule(parent), leaf, layer)
            self.layers.append(layer)
        for parameter in model.parameters():
            parameter.requires_grad_(False)

    def factors(self, vectors: Tensor, layout: Layout, scaling: float) -> list[tuple[Tensor, Tensor]]:
        """Cut stacked adapters, shape `(groups, layout.size)`, into `(A, scaling * B)` per layer; differentiable."""
        groups = vectors.shape[0]
        pieces = vectors.split([tensor.size for tensor in layout.tensors], dim=1)
        shaped = [piece.view(groups, *tensor.shape) for piece, tensor in zip(pieces, layout.tensors, strict=True)]
        return [(shaped[i], scaling * shaped[i + 1]) for i in range(0, len(shaped), 2)]

    def lay_over(self, *adapters: list[tuple[Tensor, Tensor]]) -> None:
        """Put one or several adapters on every layer; several add up, as one adapter of the summed rank.

        Each adapter is a list over layers of `(A, B)` with scaling folded into B; no adapter at all takes everything
        off.
        """
        for index, layer in enumerate(self.layers):
            parts = [adapter[index] for adapter in adapters]
            if not parts:
                layer.a = layer.b = None
            elif len(parts) == 1:
                layer.a, layer.b = parts[0]
            else:
                layer.a = torch.cat([a for a, _ in parts], dim=1)
                layer.b = torch.cat([b for _, b in parts], dim=2)

    @contextmanager
    def merged(self, vector: Tensor | None, layout: Layout, scaling: float) -> Generator[None]:
        """Add one adapter, shape `(layout.size,)`, into the base's weights for the duration; None adds nothing.

        The weights are put back bit for bit: they are kept, not recomputed.
        """
        if vector is None:
            yield
            return
        kept: list[Tensor] = []
        factors = self.factors(vector[None], layout, scaling)
        for layer, (a, b) in zip(self.layers, factors, strict=True):
            layer.merged = True
            if isinstance(layer.linear, Int8Linear):
                layer.linear.added = b[0], a[0]
                continue
            kept.append(layer.linear.weight.data)
            layer.linear.weight.data = layer.linear.weight.data + b[0] @ a[0]
        try:
            yield
        finally:
            weights = iter(kept)
            for layer in self.layers:
                if isinstance(layer.linear, Int8Linear):
                    layer.linear.added = None
                else:
                    layer.linear.weight.data = next(weights)
                layer.merged = False

    @contextmanager
    def per_example(self) -> Generator[ExampleGradients]:
        """Keep every row's gradients apart in the backward passes of the block."""
        collect = ExampleGradients()
        for layer in self.layers:
            layer.example_gradients = collect
        try:
            yield collect
        finally:
            for layer in self.layers:
                layer.example_gradients = None

    def flatten(self, gradients: ExampleGradients, scaling: float) -> Tensor:
        """Lay per-example gradients out as vectors, shape `(rows, size)`, in the layout's order.

        `scaling` is LoRA's factor that was folded into B, so that the result is the gradient of the stored B.
        """
        pieces: list[Tensor] = []
        for layer in self.layers:
            da, db = gradients.factors[layer.name]
            pieces += [da.flatten(1), scaling * db.flatten(1)]
        return torch.cat(pieces, dim=1)


def of_owners(theta: Tensor, owner: NDArray[np.intp]) -> Tensor:
    """Adapters of the groups of rows: one group per user where users have equal runs of rows, else one per row."""
    users = theta.shape[0]
    if len(owner) % users == 0 and (owner == np.repeat(np.arange(users), len(owner) // users)).all():
        return theta
    return theta.index_select(0, torch.from_numpy(owner).to(theta.device))
