"""A Llama-like base forward and backward by hand, over records laid end to end.

transformers' own forward spends most of a small model's time on what is not a matrix product: casts, copies, rotations
by concatenation, padding, and autograd's bookkeeping over all of it. This one runs the same layers on the same weights
with every product in place, and keeps exactly what its backward needs. Only the low-rank factors have gradients, so
no gradient of a frozen weight is ever formed, and nothing below the lowest adapter is gone back through.

It is taken for models it knows by class, and only after it has reproduced the model's own hidden states on the spot
(`LlamaPass.of`). Norm and rotation are computed in the base's own type where that is float32 or float64 (transformers
computes both in float32 always), and in float32 below that.

Source: Touvron et al. (2023), arXiv:2302.13971; Su et al. (2021), arXiv:2104.09864; Zhang and Sennrich (2019),
arXiv:1910.07467.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from client.llama_attention import RotaryAttention
from client.lora import LoraLinear
from client.packing import Packed, pack

__all__ = ["Factors", "LlamaPass", "StackedGradients"]

KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
FIXED_ROTATIONS = {"default", "linear", "llama3"}
"""Rotary embeddings whose angles depend on the position alone."""

COMPILED_SHAPES = 2
"""Shapes of a pass that are compiled, each in seconds; what comes after them runs as it is."""

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""Layer name -> `A`, shape `(users, rank, inputs)`, and `B` with LoRA's scaling, shape `(users, outputs, rank)`."""


@dataclass(frozen=True)
class StackedGradients:
    """Gathers gradients of factors into stacked vectors, beside what is there.

    Attributes:
        target: Shape `(users, size)`, or `(records, size)`.
        offsets: Layer name -> where its A begins, where its B begins, and where that ends.
        scaling: LoRA's factor, which B carries in a pass and not in a vector.
        per_record: Whether gradients of each record are kept apart, not of each user.
    """

    target: Tensor
    offsets: Mapping[str, tuple[int, int, int]]
    scaling: float
    per_record: bool = False

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        """Take gradients of the factors over layer `name`, shapes `(runs, rank, inputs)`, `(runs, outputs, rank)`."""
        begin, middle, end = self.offsets[name]
        self.target[:, begin:middle].add_(a.flatten(1))
        self.target[:, middle:end].add_(b.flatten(1), alpha=self.scaling)


QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN = range(7)
"""The linear layers of a decoder layer, in the order in which it keeps things of them."""


class _Weights(NamedTuple):
    """One decoder layer's tensors: plain values, so that one compiled program serves all layers."""

    attention_norm: Tensor
    mlp_norm: Tensor
    matrices: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]


Own = tuple[tuple[Tensor, Tensor] | None, ...]
"""The users' factors over one decoder layer, one entry per linear layer."""


@dataclass(frozen=True)
class _Block:
    """One decoder layer's parts; weights are read at use, because an adapter may be merged into them meanwhile."""

    attention_norm: nn.Module
    mlp_norm: nn.Module
    linears: tuple[nn.Module, ...]

    @property
    def weights(self) -> _Weights:
        plain: list[Any] = [each.linear if isinstance(each, LoraLinear) else each for each in self.linears]
        return _Weights(
            _weight(self.attention_norm),
            _weight(self.mlp_norm),
            tuple(each.weight for each in plain),
            tuple(each.bias for each in plain),
        )

    def own(self, factors: Factors) -> Own:
        return tuple(factors.get(each.name) if isinstance(each, LoraLinear) else None for each in self.linears)


class LlamaPass:
    """Forward and backward of one base of the Llama family.

    Attributes:
        longest: Longest record it can take, in tokens; None where there is no limit.
        keep_little: Keep each layer's input only and compute the rest again on the way back.
        compiled: Compile the layer for passes without gaps (needs a C++ compiler on a CPU; seconds, once per shape).
    """

    def __init__(self, model: Any) -> None:
        """Take the parts of `model`; see `of`, which checks them."""
        config = model.config
        decoder = model.base_model
        self._embedding: nn.Module = decoder.embed_tokens
        self._norm: nn.Module = decoder.norm
        self._blocks = [
            _Block(
                layer.input_layernorm,
                layer.post_attention_layernorm,
                (
                    *(getattr(layer.self_attn, f"{part}_proj") for part in "qkvo"),
                    *(getattr(layer.mlp, f"{part}_proj") for part in ("gate", "up", "down")),
                ),
            )
            for layer in decoder.layers
        ]
        self._epsilon: float = config.rms_norm_eps
        self._attention = RotaryAttention(config, decoder.rotary_emb)
        self.longest: int | None = getattr(config, "sliding_window", None)
        self.keep_little = False
        self.compiled = False
        self._shapes: set[tuple[int, int, int]] = set()
        self._compiled: tuple[Callable[..., Any], Callable[..., Any]] | None = None

    @classmethod
    def of(cls, model: Any) -> LlamaPass | None:
        """Give the pass of a model that it reproduces; None for any other."""
        config = model.config
        rotation = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        plain = getattr(config, "hidden_act", "") == "silu" and rotation in FIXED_ROTATIONS
        if type(model).__name__ not in KNOWN or not plain:
            return None
        try:
            own = cls(model)
            with torch.no_grad():
                return own if own._reproduces(model) else None
        except (AttributeError, RuntimeError, TypeError):  # another build of a class of this name
            return None

    def _reproduces(self, model: Any) -> bool:
        """Whether three records of unequal length come out as the model's own forward has them."""
        device = next(model.parameters()).device
        generator = torch.Generator().manual_seed(0)
        probes = [
            _Probe(torch.randint(0, model.config.vocab_size, (length,), generator=generator).int().numpy())
            for length in (7, 3, 12)
        ]
        ours = self.hidden(pack(probes, [2, 1], device), {})
        for probe, states in zip(probes, ours.split([len(probe.ids) for probe in probes]), strict=True):
            ids = torch.from_numpy(probe.ids).long().to(device)
            theirs = model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state[0]
            close = 0.1 if theirs.dtype in (torch.bfloat16, torch.float16) else 1e-3
            difference = (self._final(states) - theirs).abs().max()
            if not float(difference) <= close * (float(theirs.float().std()) + 1e-6):
                return False
        return True

    def labelled(self, packed: Packed, factors: Factors) -> Tensor:
        """Final hidden states at the labelled positions, shape `(labels, hidden)`."""
        return self._final(self.hidden(packed, factors).index_select(0, packed.positions))

    def hidden(self, packed: Packed, factors: Factors) -> Tensor:
        """Hidden states before the last norm, shape `(tokens, hidden)`."""
        states = F.embedding(packed.ids, _weight(self._embedding))
        for block in self._blocks:
            states, _ = self._forward(block.weights, block.own(factors), states, packed)
        return states

    def train(self, packed: Packed, factors: Factors, sink: StackedGradients, loss: Callable[[Tensor], Tensor]) -> None:
        """One forward and backward.

        Args:
            packed: The records.
            factors: The adapters, one per user of `packed`.
            sink: Where gradients of factors go.
            loss: Maps final hidden states at the labels, shape `(labels, hidden)`, to their gradient of that shape.
        """
        forward, backward = self._programs(packed)
        states = F.embedding(packed.ids, _weight(self._embedding))
        inputs: list[Tensor] = []
        kept: list[Any] = []
        for block in self._blocks:
            inputs.append(states)
            states, parts = forward(block.weights, block.own(factors), states, packed)
            kept.append(None if self.keep_little else parts)
        chosen = states.index_select(0, packed.positions)
        normed, scale = self._normalized(chosen)
        weight = _weight(self._norm)
        gradient = self._norm_back(loss(normed * weight), normed, scale, weight)
        back = torch.zeros_like(states).index_copy_(0, packed.positions, gradient)
        owns = [block.own(factors) for block in self._blocks]
        adapted = [any(pair is not None for pair in own) for own in owns]
        lowest = adapted.index(True) if any(adapted) else len(adapted)
        for index in range(len(self._blocks) - 1, lowest - 1, -1):
            block, own, parts = self._blocks[index], owns[index], kept[index]
            kept[index] = None
            if parts is None:
                _, parts = forward(block.weights, own, inputs[index], packed)
            back, found = backward(block.weights, own, back, parts, packed, sink.per_record, index > lowest)
            for linear, pair in zip(block.linears, found, strict=True):
                if pair is not None and isinstance(linear, LoraLinear):
                    sink.add(linear.name, *pair)

    def _programs(self, packed: Packed) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The layer's two programs: compiled where that was asked for and the pass has no gaps, else as they are."""
        users, records = packed.users, packed.records
        if self.compiled and users.uniform and records.uniform:
            shape = (users.count, users.width, records.count)
            if shape not in self._shapes and len(self._shapes) >= COMPILED_SHAPES:
                return self._forward, self._backward
            self._shapes.add(shape)
            if self._compiled is None:
                self._compiled = (
                    torch.compile(self._forward, dynamic=False),
                    torch.compile(self._backward, dynamic=False),
                )
            return self._compiled
        return self._forward, self._backward

    # one decoder layer; `parts` is what the way back needs of the way there

    def _forward(self, weights: _Weights, own: Own, states: Tensor, packed: Packed) -> tuple[Tensor, Any]:
        normed, scale = self._normalized(states)
        inner = normed * weights.attention_norm
        query, low_query = _linear(weights, own, QUERY, inner, packed)
        key, low_key = _linear(weights, own, KEY, inner, packed)
        value, low_value = _linear(weights, own, VALUE, inner, packed)
        mixed, attention = self._attention.forward(query, key, value, packed)
        added, low_output = _linear(weights, own, OUTPUT, mixed, packed, onto=states)
        second, second_scale = self._normalized(added)
        fed = second * weights.mlp_norm
        gate, low_gate = _linear(weights, own, GATE, fed, packed)
        up, low_up = _linear(weights, own, UP, fed, packed)
        switched = F.silu(gate)
        product = switched * up
        result, low_down = _linear(weights, own, DOWN, product, packed, onto=added)
        lows = (low_query, low_key, low_value, low_output, low_gate, low_up, low_down)
        parts = (normed, scale, inner, attention, mixed, second, second_scale, fed, gate, up, switched, product, lows)
        return result, parts

    def _backward(
        self, weights: _Weights, own: Own, back: Tensor, parts: Any, packed: Packed, per_record: bool, deeper: bool
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor] | None, ...]]:
        """Gradient at the layer's input, from `back` at its output, and those of the factors.

        Where nothing `deeper` needs it, the first is not finished.
        """
        normed, scale, inner, attention, mixed, second, second_scale, fed, gate, up, switched, product, lows = parts
        step = _Way(weights, own, lows, packed, per_record, [None] * 7)
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
        middle = self._norm_back(toward, second, second_scale, weights.mlp_norm).add_(back)
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
            middle = self._norm_back(toward, normed, scale, weights.attention_norm).add_(middle)
        return middle, tuple(step.found)

    def _normalized(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The states over their root mean square, and one over that; a norm's own weight is not applied yet."""
        wide = states.float() if states.dtype in (torch.bfloat16, torch.float16) else states
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = torch.rsqrt(size * size / states.shape[-1] + self._epsilon)
        return (wide * scale).to(states.dtype), scale

    def _final(self, states: Tensor) -> Tensor:
        return self._normalized(states)[0] * _weight(self._norm)

    @staticmethod
    def _norm_back(back: Tensor, normed: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
        toward = back * weight
        wide = toward.float() if toward.dtype in (torch.bfloat16, torch.float16) else toward
        along = (wide * normed).mean(dim=-1, keepdim=True)
        return (torch.addcmul(wide, normed.to(wide.dtype), along, value=-1.0) * scale).to(back.dtype)


@dataclass(frozen=True)
class _Probe:
    ids: NDArray[np.int32]
    first_label: int = 1


@dataclass(frozen=True)
class _Way:
    """The way back through the linear layers of one decoder layer, and the factors' gradients found on it."""

    weights: _Weights
    own: Own
    lows: tuple[Tensor | None, ...]
    packed: Packed
    per_record: bool
    found: list[tuple[Tensor, Tensor] | None]

    def back(self, part: int, back: Tensor, rows: Tensor, onto: Tensor | None, deeper: bool) -> Tensor | None:
        """Find the factors' gradients; return that at `rows`, added `onto`, where something `deeper` needs it."""
        weight = self.weights.matrices[part]
        toward = None
        if deeper:
            toward = back @ weight if onto is None else torch.addmm(onto, back, weight)
        pair, low = self.own[part], self.lows[part]
        if pair is None or low is None:
            return toward
        users = self.packed.users
        to_low = users.products(back, pair[1])
        if toward is not None:
            toward = users.add_products(toward, to_low, pair[0])
        runs = self.packed.records if self.per_record else users
        to_a, to_b = runs.outer(to_low, rows), runs.outer(back, low)
        self.found[part] = (to_a, to_b)
        return toward


def _linear(
    weights: _Weights, own: Own, part: int, rows: Tensor, packed: Packed, onto: Tensor | None = None
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


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # pyright: ignore[reportReturnType]
