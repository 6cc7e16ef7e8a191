"""A frozen linear layer whose weight is kept as int8: a quarter of float32's memory, and gradients that are right.

One scale per output row: `W[o, i] ~ scale[o] * q[o, i]`, `scale[o] = max |W[o]| / 127`, so each weight is off by at
most half a scale. The weight is dequantized for the time of one product, forward and again backward; inputs and
low-rank factors get the gradients of that dequantized layer, to float tolerance. torch's dynamic quantization gives
them none (`torch.ao.nn.quantized.dynamic.Linear` has no derivative, and says nothing), which is why this exists.

Source: weight-only quantization as in Dettmers et al. (2022), arXiv:2208.07339, without outlier columns, because
activations stay in float.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Int8Linear", "is_kept", "quantize"]

LEVELS = 127


class _Product(torch.autograd.Function):
    """`y = x W^T` that keeps the int8 weight for the way back, not the dequantized one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.layer = layer
        return F.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (dy,) = gradients
        return (dy @ ctx.layer.weight.to(dy.dtype) if ctx.needs_input_grad[0] else None), None


class Int8Linear(nn.Module):
    """`y = x W^T + bias` with W in int8.

    Attributes:
        quantized: Shape `(outputs, inputs)`, int8.
        scale: Shape `(outputs, 1)`.
        bias: Shape `(outputs,)`, or None.
        added: Factors `(B, A)` of an adapter that is merged for a while: the weight is then `W + B A`.
    """

    quantized: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Quantize `weight`, shape `(outputs, inputs)`."""
        super().__init__()
        values = weight.detach().float()
        scale = values.abs().amax(dim=1, keepdim=True) / LEVELS
        scale[scale == 0] = 1.0
        self.out_features, self.in_features = weight.shape
        self.register_buffer("quantized", torch.round(values / scale).to(torch.int8), persistent=False)
        self.register_buffer("scale", scale, persistent=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().float(), requires_grad=False)
        self.added: tuple[Tensor, Tensor] | None = None

    @property
    def weight(self) -> Tensor:
        """The dequantized weight, shape `(outputs, inputs)`, made anew each time."""
        weight = self.quantized * self.scale
        return weight if self.added is None else torch.addmm(weight, *self.added)

    def dequantized(self) -> nn.Linear:
        """The same layer in float, as it is now: what its gradients are held against."""
        plain = nn.Linear(self.in_features, self.out_features, self.bias is not None, device=self.scale.device)
        plain.weight.data = self.weight
        if self.bias is not None:
            plain.bias.data = self.bias.data
        return plain.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> Tensor:
        """Map `x`, shape `(..., inputs)`, to shape `(..., outputs)`."""
        y = _Product.apply(x, self)
        return y if self.bias is None else y + self.bias


def is_kept(name: str) -> bool:
    """Whether a linear layer stays in float: the output layer, which usually is the embedding as well."""
    return name.rpartition(".")[2] in ("lm_head", "embed_out")


def quantize(model: nn.Module) -> None:
    """Replace the linear layers of `model`, one after the other, so that both forms never lie in memory as a whole."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not is_kept(name):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, Int8Linear(module.weight, module.bias).eval())
