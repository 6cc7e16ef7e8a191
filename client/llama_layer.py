"""One decoder layer of a Llama-like base, forward and back by hand, in torch's own operations.

Any device and any type of numbers; `llama_native` does the same with compiled kernels, on a CPU in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from client.llama_attention import RotaryAttention
from client.native_layers import WholeLayer
from client.native_products import LaidLayer
from client.packing import Packed

__all__ = ["Own", "TorchLayer", "Way", "Weights", "linear"]

QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN = range(7)
"""The linear layers of a decoder layer, in the order in which it keeps things of them."""


class Weights(NamedTuple):
    """One decoder layer's tensors: plain values, so that one compiled program serves all layers."""

    attention_norm: Tensor
    mlp_norm: Tensor
    matrices: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    lasting: bool = True
    """Whether these are the base's own, with no adapter merged into them for the moment."""
    laid: LaidLayer | None = None
    """The matrices laid out for compiled products. For `llama_native`."""
    whole: WholeLayer | None = None
    """The layer for one compiled call. For `llama_native`."""


Own = tuple[tuple[Tensor, Tensor] | None, ...]
"""The users' factors over one decoder layer, one entry per linear layer."""


class TorchLayer:
    """The layer's forward and backward; one object serves all layers of a base."""

    def __init__(self, attention: RotaryAttention, epsilon: float) -> None:
        """Take what all layers share: their attention, and what a norm adds below its root."""
        self._attention = attention
        self._epsilon = epsilon

    def prepared(self, weights: Weights) -> Weights:
        """What `forward` and `backward` take as `weights`; looked up once per pass."""
        return weights

    def forward(self, weights: Weights, own: Own, states: Tensor, packed: Packed) -> tuple[Tensor, Any]:
        """States after the layer, and what the way back needs of the way there."""
        normed, scale = self.normalized(states)
        inner = normed * weights.attention_norm
        query, low_query = linear(weights, own, QUERY, inner, packed)
        key, low_key = linear(weights, own, KEY, inner, packed)
        value, low_value = linear(weights, own, VALUE, inner, packed)
        mixed, attention = self._attention.forward(query, key, value, packed)
        added, low_output = linear(weights, own, OUTPUT, mixed, packed, onto=states)
        second, second_scale = self.normalized(added)
        fed = second * weights.mlp_norm
        gate, low_gate = linear(weights, own, GATE, fed, packed)
        up, low_up = linear(weights, own, UP, fed, packed)
        switched = F.silu(gate)
        product = switched * up
        result, low_down = linear(weights, own, DOWN, product, packed, onto=added)
        lows = (low_query, low_key, low_value, low_output, low_gate, low_up, low_down)
        parts = (normed, scale, inner, attention, mixed, second, second_scale, fed, gate, up, switched, product, lows)
        return result, parts

    def backward(
        self, weights: Weights, own: Own, back: Tensor, parts: Any, packed: Packed, per_record: bool, deeper: bool
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor] | None, ...]]:
        """Gradient at the layer's input, from `back` at its output, and those of the factors.

        Where nothing `deeper` needs it, the first is not finished.
        """
        normed, scale, inner, attention, mixed, second, second_scale, fed, gate, up, switched, product, lows = parts
        step = Way(weights, own, lows, packed, per_record, [None] * 7)
        below_output = deeper or any(pair is not None for pair in own[:OUTPUT])
        below_mlp = below_output or own[OUTPUT] is not None
        inside = below_mlp or own[GATE] is not None or own[UP] is not None
        toward = step.back(DOWN, back, product, None, inside)
        if toward is None:
            return back, tuple(step.found)
        toward_up = toward * switched
        toward_gate = torch.ops.aten.silu_backward(toward * up, gate)
        toward = step.back(UP, toward_up, fed, None, below_mlp)
        toward = step.back(GATE, toward_gate, fed, toward, below_mlp)
        if toward is None:
            return back, tuple(step.found)
        middle = self.norm_back(toward, second, second_scale, weights.mlp_norm).add_(back)
        toward = step.back(OUTPUT, middle, mixed, None, below_output)
        if toward is None:
            return middle, tuple(step.found)
        keyed = deeper or own[KEY] is not None
        to_query, to_key, to_value = self._attention.backward(toward, attention, packed, keyed)
        toward = step.back(QUERY, to_query, inner, None, deeper)
        if to_key is not None:
            toward = step.back(KEY, to_key, inner, toward, deeper)
        toward = step.back(VALUE, to_value, inner, toward, deeper)
        if toward is not None:
            middle = self.norm_back(toward, normed, scale, weights.attention_norm).add_(middle)
        return middle, tuple(step.found)

    def normalized(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The states over their root mean square, and one over that; a norm's own weight is not applied yet."""
        wide = states.float() if states.dtype in (torch.bfloat16, torch.float16) else states
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.rsqrt(size * size / states.shape[-1] + self._epsilon)
        return (wide * scale).to(states.dtype), scale

    def final(self, states: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        """States under the last norm, and what `final_back` needs."""
        normed, scale = self.normalized(states)
        return normed * weight, (normed, scale, weight)

    def final_back(self, back: Tensor, parts: Any) -> Tensor:
        """Gradient at the states that `final` took."""
        return self.norm_back(back, *parts)

    @staticmethod
    def norm_back(back: Tensor, normed: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        """Gradient at the states that were normalized, from `back` at what came out."""
        toward = back * weight
        wide = toward.float() if toward.dtype in (torch.bfloat16, torch.float16) else toward
        along = (wide * normed).mean(dim=-1, keepdim=True)
        return (torch.addcmul(wide, normed.to(wide.dtype), along, value=-1.0) * scale).to(back.dtype)


@dataclass(frozen=True)
class Way:
    """The way back through the linear layers of one decoder layer, and the factors' gradients found on it."""

    weights: Weights
    own: Own
    lows: tuple[Tensor | None, ...]
    packed: Packed
    per_record: bool
    found: list[tuple[Tensor, Tensor] | None]

    def back(self, part: int, back: Tensor, rows: Tensor | None, onto: Tensor | None, deeper: bool) -> Tensor | None:
        """Find the factors' gradients; return that at `rows`, added `onto`, where something `deeper` needs it."""
        weight = self.weights.matrices[part]
        toward = None
        if deeper:
            toward = back @ weight if onto is None else torch.addmm(onto, back, weight)
        self.factors(part, back, rows, toward)
        return toward

    def factors(self, part: int, back: Tensor, rows: Tensor | None, toward: Tensor | None) -> None:
        """Find the gradients of one layer's factors, and add what they let through to the gradient at `rows`."""
        pair, low = self.own[part], self.lows[part]
        if pair is None or low is None or rows is None:
            return
        users = self.packed.users
        to_low = users.products(back, pair[1])
        if toward is not None:
            users.add_products(toward, to_low, pair[0])
        runs = self.packed.records if self.per_record else users
        self.found[part] = (runs.outer(to_low, rows), runs.outer(back, low))


def linear(
    weights: Weights, own: Own, part: int, rows: Tensor, packed: Packed, onto: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`rows W^T`, plus what is added `onto` and the users' own products; and the low-rank activations."""
    weight, bias = weights.matrices[part].t(), weights.biases[part]
    if onto is not None:
        out = torch.addmm(onto, rows, weight)
        out = out if bias is None else out + bias
    else:
        out = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
    pair, users = own[part], packed.users
    if pair is None:
        return out, None
    low = users.products(rows, pair[0].transpose(1, 2))
    return users.add_products(out, low, pair[1].transpose(1, 2)), low
