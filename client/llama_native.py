"""One decoder layer of a Llama-like base with compiled kernels: a CPU, float32, and few threads.

With one thread and a narrow base, a layer is one call there and one back (`native_layers`) where its adapters allow,
else products and what stands between them are `native_products`', over rows that stay in a cache; elsewhere the
products are torch's. Norms, rotary attention and the gated activation are `native`'s, each one
pass over memory. Queries, keys and values lie side by side in one tensor, and so do gates and ups. Attention walks over
records as they lie, so records of unlike lengths cost no padding. The result is `llama_layer.TorchLayer`'s, to
rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from client.llama_attention import RotaryAttention
from client.llama_layer import DOWN, GATE, KEY, OUTPUT, QUERY, UP, VALUE, Own, Way, Weights
from client.native import Kernels
from client.native_layers import Kept, WholeLayer, layers_for
from client.native_products import LaidLayer, products_for
from client.packing import Packed

__all__ = ["NativeLayer"]

LONGEST_RECORD = 512
"""Tokens of a record beyond which torch's blocked attention is as fast."""

ATTENTION, MLP, WHOLE_MLP = (QUERY, KEY, VALUE), (GATE, UP), (GATE, UP, DOWN)


class NativeLayer:
    """The layer's forward and backward; one object serves all layers of a base."""

    def __init__(self, kernels: Kernels, attention: RotaryAttention, epsilon: float, *, join: bool) -> None:
        """Take what all layers share.

        Args:
            kernels: Of this machine.
            attention: Knows heads and angles.
            epsilon: What a norm adds below its root.
            join: Keep copies of a layer's matrices that read the same input as one, which saves a tenth of their
                products, and lay them out for compiled products; a wide base's are not copied, because workers share
                their memory.
        """
        self._kernels = kernels
        self._attention = attention
        self._epsilon = epsilon
        self._join = join
        self._joined: dict[tuple[int, ...], tuple[tuple[Tensor, ...], tuple[int, ...], Tensor]] = {}
        self._laid: dict[tuple[int, ...], tuple[tuple[Tensor, ...], tuple[int, ...], LaidLayer, WholeLayer | None]] = {}
        self._turns: tuple[Tensor, Tensor] | None = None

    def takes(self, packed: Packed) -> bool:
        """Whether these records are short enough."""
        return packed.records.width <= LONGEST_RECORD

    def prepared(self, weights: Weights) -> Weights:
        """What `forward` and `backward` take as `weights`; looked up once per pass."""
        if not self._join or not weights.lasting or products_for(weights.attention_norm) is None:
            return weights
        laid, whole = self._laid_out(weights)
        return weights._replace(laid=laid, whole=whole)

    @staticmethod
    def _whole(weights: Weights, own: Own) -> WholeLayer | None:
        """The layer as one call, where it serves these adapters."""
        whole = weights.whole
        if whole is None or any(own[OUTPUT:]) or not whole.layers.takes(own[:OUTPUT]):
            return None
        return whole

    def forward(self, weights: Weights, own: Own, states: Tensor, packed: Packed) -> tuple[Tensor, Any]:
        """States after the layer, and what the way back needs of the way there."""
        whole = self._whole(weights, own)
        if whole is not None:
            return whole.layers.forward(whole, packed, self._angles(packed), own[:OUTPUT], states)
        kernels, lows = self._kernels, list[Tensor | None]([None] * 7)
        adapted = any(own[part] for part in ATTENTION)
        laid = weights.laid
        if laid is not None:
            qkv, inner, scale = laid.products.norm_product(
                states, weights.attention_norm, self._epsilon, laid.qkv, keep=adapted
            )
            self._finish(weights, own, ATTENTION, inner, qkv, packed, lows)
        else:
            inner, scale = kernels.norm(states, weights.attention_norm, self._epsilon)
            qkv = self._side_by_side(weights, own, ATTENTION, inner, packed, lows)
        mixed, logs = kernels.attention(qkv, packed.records.bounds, *self._angles(packed), *self._attention.heads)
        added = self._onto(weights, own, OUTPUT, mixed, states, packed, lows)
        # What only a factor's gradient would read is let go, and its memory, still near the core, is written again.
        inner = inner if adapted else None
        mixed = mixed if own[OUTPUT] else None
        kept = (states, scale, inner, qkv, logs, mixed, added)
        if laid is not None and laid.mlp and not any(own[part] for part in WHOLE_MLP):
            result, fed_scale = laid.products.mlp(added, weights.mlp_norm, self._epsilon, laid)
            return result, (*kept, fed_scale, laid, None, None, None, tuple(lows))
        fed, fed_scale = kernels.norm(added, weights.mlp_norm, self._epsilon)
        both = self._side_by_side(weights, own, MLP, fed, packed, lows)
        product = kernels.gate(both)
        result = self._onto(weights, own, DOWN, product, added, packed, lows)
        fed = fed if any(own[part] for part in MLP) else None
        product = product if own[DOWN] else None
        return result, (*kept, fed_scale, None, fed, both, product, tuple(lows))

    def backward(
        self, weights: Weights, own: Own, back: Tensor, parts: Any, packed: Packed, per_record: bool, deeper: bool
    ) -> tuple[Tensor, tuple[tuple[Tensor, Tensor] | None, ...]]:
        """Gradient at the layer's input, from `back` at its output, and those of the factors; uses `parts` up.

        Where nothing `deeper` needs it, the first is not finished.
        """
        if isinstance(parts, Kept):
            toward, found = self.backward_onto(weights, own, back, parts, packed, per_record, deeper)
            return toward, (*found, None, None, None, None)
        states, scale, inner, qkv, logs, mixed, added, fed_scale, fused, fed, both, product, lows = parts
        kernels, step = self._kernels, _Way(weights, own, lows, packed, per_record, [None] * 7, self._kernels)
        below_output = deeper or any(pair is not None for pair in own[:OUTPUT])
        below_mlp = below_output or own[OUTPUT] is not None
        inside = below_mlp or own[GATE] is not None or own[UP] is not None
        if fused is not None:  # no adapter in the MLP: what comes back is for something below
            middle = fused.products.mlp_back(back, added, fed_scale, weights.mlp_norm, fused)
        else:
            toward = step.back(DOWN, back, product, None, inside)
            if toward is None:
                return back, tuple(step.found)
            toward = self._back_together(weights, step, MLP, kernels.gate_back(toward, both), fed, below_mlp)
            if toward is None:
                return back, tuple(step.found)
            middle = kernels.norm_back(toward, added, fed_scale, weights.mlp_norm, back)
        toward = step.back(OUTPUT, middle, mixed, None, below_output)
        if toward is None:
            return middle, tuple(step.found)
        keyed = deeper or own[KEY] is not None
        turns, heads = self._angles(packed), self._attention.heads
        to_qkv = kernels.attention_back(toward, qkv, logs, packed.records.bounds, *turns, *heads, keyed=keyed)
        toward = self._back_together(weights, step, ATTENTION, to_qkv, inner, deeper)
        if toward is not None:
            middle = kernels.norm_back(toward, states, scale, weights.attention_norm, middle)
        return middle, tuple(step.found)

    def backward_onto(
        self,
        weights: Weights,
        own: Own,
        back: Tensor,
        kept: Kept,
        packed: Packed,
        per_record: bool,
        deeper: bool,
        onto: Own | None = None,
        scaling: float = 1.0,
    ) -> tuple[Tensor, Own]:
        """As `backward`, of a layer that was one call on the way there, and of queries, keys and values.

        Gradients of factors are added `onto` what is there, one row per user or record, those of B times `scaling`.
        """
        whole = weights.whole
        if whole is None:
            raise TypeError("these weights are not those of the way there")
        runs, turns = (packed.records if per_record else packed.users).bounds, self._angles(packed)
        toward, found = whole.layers.backward(
            whole, packed, turns, own[:OUTPUT], kept, back, runs, deeper=deeper, onto=onto, scaling=scaling
        )
        return back if toward is None else toward, tuple(found)

    def final(self, states: Tensor, weight: Tensor) -> tuple[Tensor, Any]:
        """States under the last norm, and what `final_back` needs."""
        normed, scale = self._kernels.norm(states, weight, self._epsilon)
        return normed, (states, scale, weight)

    def final_back(self, back: Tensor, parts: Any) -> Tensor:
        """Gradient at the states that `final` took."""
        states, scale, weight = parts
        return self._kernels.norm_back(back, states, scale, weight, torch.zeros_like(back))

    def _side_by_side(
        self,
        weights: Weights,
        own: Own,
        group: tuple[int, ...],
        rows: Tensor,
        packed: Packed,
        lows: list[Tensor | None],
    ) -> Tensor:
        """The group's linear layers over the same `rows`, their results beside each other; fills in `lows`."""
        sizes = [weights.matrices[part].shape[0] for part in group]
        out = torch.empty(rows.shape[0], sum(sizes))
        joined = self._as_one(weights, group)
        if joined is not None:
            torch.mm(rows, joined.t(), out=out)
        else:
            for part, piece in zip(group, out.split(sizes, dim=1), strict=True):
                torch.mm(rows, weights.matrices[part].t(), out=piece)
        self._finish(weights, own, group, rows, out, packed, lows)
        return out

    def _finish(
        self,
        weights: Weights,
        own: Own,
        group: tuple[int, ...],
        rows: Tensor | None,
        out: Tensor,
        packed: Packed,
        lows: list[Tensor | None],
    ) -> None:
        """Add biases and the users' own products to a group's results; `rows` are there where there are any."""
        for part, piece in zip(
            group, out.split([weights.matrices[part].shape[0] for part in group], dim=1), strict=True
        ):
            bias = weights.biases[part]
            if bias is not None:
                piece += bias
            if rows is not None:
                self._adapt(own, part, rows, piece, packed, lows)

    def _onto(
        self,
        weights: Weights,
        own: Own,
        part: int,
        rows: Tensor,
        onto: Tensor,
        packed: Packed,
        lows: list[Tensor | None],
    ) -> Tensor:
        """One linear layer over `rows`, added onto what is there; fills in `lows`."""
        laid, bias = weights.laid, weights.biases[part]
        if laid is None:
            out = torch.addmm(onto, rows, weights.matrices[part].t())
        else:
            out = laid.products.product(rows, laid.output if part == OUTPUT else laid.down, onto)
        if bias is not None:
            out += bias
        self._adapt(own, part, rows, out, packed, lows)
        return out

    def _adapt(self, own: Own, part: int, rows: Tensor, out: Tensor, packed: Packed, lows: list[Tensor | None]) -> None:
        """Add the users' own products to `out`."""
        pair, users = own[part], packed.users
        if pair is None:
            return
        if self._kernels.takes_factors(*pair):
            lows[part] = self._kernels.factors(rows, *pair, out, users.bounds)
        else:
            lows[part] = low = users.products(rows, pair[0].transpose(1, 2))
            users.add_products(out, low, pair[1].transpose(1, 2))

    def _back_together(
        self, weights: Weights, step: Way, group: tuple[int, ...], back: Tensor, rows: Tensor | None, deeper: bool
    ) -> Tensor | None:
        """Find the factors' gradients of a group; return that at `rows` where something `deeper` needs it."""
        pieces = back.split([weights.matrices[part].shape[0] for part in group], dim=1)
        laid = weights.laid if group is ATTENTION else None
        joined = None if laid is not None else self._as_one(weights, group)
        toward = None
        if deeper:
            if laid is not None:
                toward = laid.products.product(back, laid.qkv_back)
            elif joined is not None:
                toward = back @ joined
            else:
                toward = pieces[0] @ weights.matrices[group[0]]
                for part, piece in zip(group[1:], pieces[1:], strict=True):
                    toward.addmm_(piece, weights.matrices[part])
        for part, piece in zip(group, pieces, strict=True):
            step.factors(part, piece, rows, toward)
        return toward

    def _as_one(self, weights: Weights, group: tuple[int, ...]) -> Tensor | None:
        """A group's matrices on top of each other: the base's own are kept, those of a merged adapter are not joined.

        An entry holds on to the matrices that it was made of, so their addresses cannot come to mean others.
        """
        if not self._join:
            return None
        matrices = tuple(weights.matrices[part] for part in group)
        key = tuple(each.data_ptr() for each in matrices)
        versions = tuple(each._version for each in matrices)
        known = self._joined.get(key)
        if known is None or known[1] != versions:
            if not weights.lasting:
                return None
            kept = tuple(each.detach() for each in matrices)
            known = self._joined[key] = (kept, versions, torch.cat(kept))
        return known[2]

    def _laid_out(self, weights: Weights) -> tuple[LaidLayer | None, WholeLayer | None]:
        """The base's own matrices for compiled products, and the layer for one call; kept as `_as_one` keeps them."""
        biases = weights.biases[:OUTPUT]
        tensors = (
            weights.attention_norm,
            weights.mlp_norm,
            *weights.matrices,
            *(one for one in biases if one is not None),
        )
        key = tuple(each.data_ptr() for each in tensors)
        versions = tuple(each._version for each in tensors[2:])  # norms are read where they lie
        known = self._laid.get(key)
        if known is None or known[1] != versions:
            products, layers = products_for(weights.attention_norm), layers_for(weights.attention_norm)
            if products is None:
                return None, None
            kept = tuple(each.detach() for each in tensors)
            mlp = all(weights.biases[part] is None for part in WHOLE_MLP)
            laid, whole = products.layer(kept[2 : 2 + len(weights.matrices)], mlp=mlp), None
            if layers is not None and mlp and weights.biases[OUTPUT] is None:
                whole = layers.layer(laid, (kept[0], kept[1]), biases, self._attention.heads, self._epsilon)
            known = self._laid[key] = (kept, versions, laid, whole)
        return known[2], known[3]

    def _angles(self, packed: Packed) -> tuple[Tensor, Tensor]:
        if self._turns is None or self._turns[0].shape[0] < packed.records.width:
            self._turns = self._attention.angles(packed.records.width)
        return self._turns


@dataclass(frozen=True)
class _Way(Way):
    """The way back whose factors go by a kernel where their shapes allow."""

    kernels: Kernels

    def back(self, part: int, back: Tensor, rows: Tensor | None, onto: Tensor | None, deeper: bool) -> Tensor | None:
        laid = self.weights.laid
        if laid is None or not deeper:
            return super().back(part, back, rows, onto, deeper)
        toward = laid.products.product(back, laid.output_back if part == OUTPUT else laid.down_back, onto)
        self.factors(part, back, rows, toward)
        return toward

    def factors(self, part: int, back: Tensor, rows: Tensor | None, toward: Tensor | None) -> None:
        pair, low = self.own[part], self.lows[part]
        if pair is None or low is None or rows is None or not self.kernels.takes_factors(*pair):
            super().factors(part, back, rows, toward)
            return
        runs = (self.packed.records if self.per_record else self.packed.users).bounds
        self.found[part] = self.kernels.factors_back(back, rows, low, *pair, toward, self.packed.users.bounds, runs)
