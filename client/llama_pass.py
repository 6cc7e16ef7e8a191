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
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from client.int8_linear import Int8Linear
from client.llama_attention import RotaryAttention
from client.llama_layer import Own, TorchLayer, Weights
from client.llama_native import NativeLayer
from client.lora import LoraLinear
from client.native import kernels_for
from client.native_layers import Kept
from client.packing import Packed, pack

__all__ = ["Factors", "LlamaPass", "StackedGradients"]

KNOWN = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"}
FIXED_ROTATIONS = {"default", "linear", "llama3"}
"""Rotary embeddings whose angles depend on the position alone."""

JOINED_WIDTH = 256
"""Hidden size up to which matrices that read the same input are also kept as one: a copy of a few megabytes."""

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

    def places(self, name: str) -> tuple[Tensor, Tensor]:
        """Where gradients of the factors over layer `name` lie, one row per user or record; B's still to be scaled."""
        begin, middle, end = self.offsets[name]
        return self.target[:, begin:middle], self.target[:, middle:end]

    def add(self, name: str, a: Tensor, b: Tensor) -> None:
        """Take gradients of the factors over layer `name`, shapes `(runs, rank, inputs)`, `(runs, outputs, rank)`."""
        to_a, to_b = self.places(name)
        to_a.add_(a.flatten(1))
        to_b.add_(b.flatten(1), alpha=self.scaling)


@dataclass(frozen=True)
class _Block:
    """One decoder layer's parts; weights are read at use, because an adapter may be merged into them meanwhile."""

    attention_norm: nn.Module
    mlp_norm: nn.Module
    linears: tuple[nn.Module, ...]

    @property
    def plain(self) -> list[Any]:
        """The base's own layers, without what is laid over them."""
        return [each.linear if isinstance(each, LoraLinear) else each for each in self.linears]

    @property
    def is_plain(self) -> bool:
        """Whether its weights lie in memory as they are used."""
        return not any(isinstance(each, Int8Linear) for each in self.plain)

    @property
    def weights(self) -> Weights:
        plain = self.plain
        return Weights(
            _weight(self.attention_norm),
            _weight(self.mlp_norm),
            tuple(each.weight for each in plain),
            tuple(each.bias for each in plain),
            self.is_plain and not any(each.merged for each in self.linears if isinstance(each, LoraLinear)),
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
        self._layer = TorchLayer(self._attention, self._epsilon)
        self._native: NativeLayer | None = None
        self._narrow: bool = config.hidden_size <= JOINED_WIDTH
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
            difference = (self._layer.final(states, _weight(self._norm))[0] - theirs).abs().max()
            if not float(difference) <= close * (float(theirs.float().std()) + 1e-6):
                return False
        return True

    def labelled(self, packed: Packed, factors: Factors) -> Tensor:
        """Final hidden states at the labelled positions, shape `(labels, hidden)`."""
        chosen = self.hidden(packed, factors).index_select(0, packed.positions)
        return self._layer.final(chosen, _weight(self._norm))[0]

    def hidden(self, packed: Packed, factors: Factors) -> Tensor:
        """Hidden states before the last norm, shape `(tokens, hidden)`."""
        states = F.embedding(packed.ids, _weight(self._embedding))
        layer = self._layer_for(packed, states)
        for block in self._blocks:
            states, _ = layer.forward(layer.prepared(block.weights), block.own(factors), states, packed)
        return states

    def train(self, packed: Packed, factors: Factors, sink: StackedGradients, loss: Callable[[Tensor], Tensor]) -> None:
        """One forward and backward.

        Args:
            packed: The records.
            factors: The adapters, one per user of `packed`.
            sink: Where gradients of factors go.
            loss: Maps final hidden states at the labels, shape `(labels, hidden)`, to their gradient of that shape.
        """
        states = F.embedding(packed.ids, _weight(self._embedding))
        layer = self._layer_for(packed, states)
        forward, backward = self._programs(packed, layer)
        inputs: list[Tensor] = []
        kept: list[Any] = []
        # Weights that are made for the occasion, as of an int8 layer, are made one layer at a time.
        held = [layer.prepared(block.weights) if block.is_plain else None for block in self._blocks]

        def weights(index: int) -> Weights:
            return held[index] or layer.prepared(self._blocks[index].weights)

        owns = [block.own(factors) for block in self._blocks]
        for index in range(len(self._blocks)):
            inputs.append(states)
            states, parts = forward(weights(index), owns[index], states, packed)
            kept.append(None if self.keep_little else parts)
        chosen = states.index_select(0, packed.positions)
        normed, last = layer.final(chosen, _weight(self._norm))
        gradient = layer.final_back(loss(normed), last)
        back = torch.zeros_like(states).index_copy_(0, packed.positions, gradient)
        adapted = [any(pair is not None for pair in own) for own in owns]
        lowest = adapted.index(True) if any(adapted) else len(adapted)
        for index in range(len(self._blocks) - 1, lowest - 1, -1):
            block, own, parts = self._blocks[index], owns[index], kept[index]
            kept[index] = None
            if parts is None:
                _, parts = forward(weights(index), own, inputs[index], packed)
            if isinstance(parts, Kept) and isinstance(layer, NativeLayer):
                places = tuple(
                    sink.places(each.name) if pair is not None and isinstance(each, LoraLinear) else None
                    for each, pair in zip(block.linears[:3], own[:3], strict=True)
                )
                back, _ = layer.backward_onto(
                    weights(index), own, back, parts, packed, sink.per_record, index > lowest, places, sink.scaling
                )
                continue
            back, found = backward(weights(index), own, back, parts, packed, sink.per_record, index > lowest)
            for linear, pair in zip(block.linears, found, strict=True):
                if pair is not None and isinstance(linear, LoraLinear):
                    sink.add(linear.name, *pair)

    def _layer_for(self, packed: Packed, states: Tensor) -> TorchLayer | NativeLayer:
        """How a layer is computed here: by compiled kernels where they serve, else in torch's operations."""
        if self.compiled or self._attention.heads[2] % 2:
            return self._layer
        found = kernels_for(states)
        if found is None:
            return self._layer
        if self._native is None:
            self._native = NativeLayer(found, self._attention, self._epsilon, join=self._narrow)
        return self._native if self._native.takes(packed) else self._layer

    def _programs(
        self, packed: Packed, layer: TorchLayer | NativeLayer
    ) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The layer's two programs: compiled where that was asked for and the pass has no gaps, else as they are."""
        users, records = packed.users, packed.records
        if self.compiled and users.uniform and records.uniform:
            shape = (users.count, users.width, records.count)
            if shape not in self._shapes and len(self._shapes) >= COMPILED_SHAPES:
                return layer.forward, layer.backward
            self._shapes.add(shape)
            if self._compiled is None:
                self._compiled = (
                    torch.compile(self._layer.forward, dynamic=False),
                    torch.compile(self._layer.backward, dynamic=False),
                )
            return self._compiled
        return layer.forward, layer.backward


@dataclass(frozen=True)
class _Probe:
    ids: NDArray[np.int32]
    first_label: int = 1


def _weight(module: nn.Module) -> Tensor:
    return module.weight  # pyright: ignore[reportReturnType]
