"""A narrow Llama's decoder layer as one compiled call there and one back, where one thread computes.

`layers.c` takes whole records, about a hundred rows at a time, through norm, queries, keys and values with the users'
own low-rank products, rotary attention, output and MLP, so that what one step leaves is still in the core's cache when
the next one reads it. It serves layers whose adapters lie on queries, keys and values; `llama_native` has the rest.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from client import native
from client.native_products import LaidLayer, Products, products_for
from client.packing import Segments

__all__ = ["Kept", "Layers", "WholeLayer", "layers_for"]

PARTS = 3
"""Queries, keys and values."""

Pairs = Sequence[tuple[Tensor, Tensor] | None]
"""The users' factors over queries, keys and values: A, shape `(users, rank, width)`, B, `(users, outputs, rank)`."""

_Pointer, _Count = ctypes.c_void_p, ctypes.c_int64
_LAID = ("qkv", "output", "gates_ups", "down", "qkv_back", "output_back", "gates_ups_back", "down_back")


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, _Pointer) for name in ("first_norm", "second_norm", _LAID[0], "bias", *_LAID[1:])),
        *((name, _Count) for name in ("width", "inner", "heads", "share", "each")),
        ("epsilon", ctypes.c_float),
    )


class _Rows(ctypes.Structure):
    _fields_ = (
        ("records", _Pointer),
        ("users", _Pointer),
        ("record_count", _Count),
        ("user_count", _Count),
        ("cosines", _Pointer),
        ("sines", _Pointer),
    )


_FACTORS = (
    ("a", _Pointer * PARTS),
    ("b", _Pointer * PARTS),
    ("step_a", _Count * PARTS),
    ("step_b", _Count * PARTS),
)


class _Own(ctypes.Structure):
    _fields_ = (
        *_FACTORS,
        ("rank", _Count),
    )


class _Kept(ctypes.Structure):
    _fields_ = tuple((name, _Pointer) for name in ("scale", "qkv", "attention", "low", "added", "second_scale"))


class _Gradients(ctypes.Structure):
    _fields_ = (
        *_FACTORS,
        ("runs", _Pointer),
        ("scaling", ctypes.c_float),
    )


class Runs(Protocol):
    """Where records and users begin; `packing.Packed` is one."""

    @property
    def records(self) -> Segments:
        """Runs of one record each."""
        ...

    @property
    def users(self) -> Segments:
        """Runs of one user each."""
        ...


class WholeLayer(NamedTuple):
    """One layer as the compiled functions take it, and the tensors whose memory that names."""

    layers: Layers
    structure: Any
    columns: int
    query_heads: int
    held: tuple[Tensor | LaidLayer | None, ...]


class Kept(NamedTuple):
    """What the way back needs of the way there."""

    states: Tensor
    scale: Tensor
    qkv: Tensor
    attention: Tensor
    low: Tensor | None
    added: Tensor
    second_scale: Tensor

    @property
    def structure(self) -> Any:
        """The same for the compiled functions."""
        return _Kept(*(None if each is None else each.data_ptr() for each in self[1:]))


class Layers:
    """The compiled functions over float32 tensors on the CPU whose rows lie one after the other."""

    def __init__(self, products: Products) -> None:
        """Take the functions of the library that `products` come from."""
        self._library = products.library
        for name, count in (("layer_forward", 6), ("layer_backward", 8)):
            function = getattr(self._library, name)
            function.argtypes, function.restype = [_Pointer] * count, ctypes.c_int
        self._width = products.vector

    def layer(
        self,
        laid: LaidLayer,
        norms: tuple[Tensor, Tensor],
        biases: tuple[Tensor | None, ...],
        heads: tuple[int, int, int],
        epsilon: float,
    ) -> WholeLayer:
        """Put one layer together.

        Args:
            laid: Its matrices.
            norms: The weights of the norms before attention and before the MLP.
            biases: Of queries, keys and values, or None.
            heads: Heads of keys, heads of queries per head of keys, and numbers per head.
            epsilon: What a norm adds below its root.
        """
        key_heads, share, each = heads
        sizes = (key_heads * share * each, key_heads * each, key_heads * each)
        bias = None
        if any(one is not None for one in biases):
            bias = torch.cat(
                [torch.zeros(size) if one is None else one.detach() for one, size in zip(biases, sizes, strict=True)]
            )
        pointers = {name: getattr(laid, name).panels.data_ptr() for name in _LAID}
        structure = _Layer(
            first_norm=norms[0].data_ptr(),
            second_norm=norms[1].data_ptr(),
            bias=None if bias is None else bias.data_ptr(),
            **pointers,
            width=laid.qkv.depth,
            inner=laid.down.depth,
            heads=key_heads,
            share=share,
            each=each,
            epsilon=epsilon,
        )
        return WholeLayer(self, structure, sum(sizes), key_heads * share, (laid, *norms, bias))

    def takes(self, pairs: Pairs) -> bool:
        """Whether it serves factors of these shapes, as they lie."""
        some = [pair for pair in pairs if pair is not None]
        return all(
            a.shape[1] == some[0][0].shape[1]
            and a.shape[2] % self._width == 0 == b.shape[1] % self._width
            and a.stride()[1:] == (a.shape[2], 1)
            and b.stride()[1:] == (b.shape[2], 1)
            for a, b in some
        )

    def forward(
        self, layer: WholeLayer, packed: Runs, turns: tuple[Tensor, Tensor], pairs: Pairs, states: Tensor
    ) -> tuple[Tensor, Kept]:
        """States after the layer, and what the way back needs."""
        tokens = states.shape[0]
        some = [pair for pair in pairs if pair is not None]
        lows = len(some) * (some[0][0].shape[1] if some else 0)
        out = torch.empty_like(states)
        kept = Kept(
            states,
            torch.empty(tokens),
            torch.empty(tokens, layer.columns),
            torch.empty(2, layer.query_heads, tokens),
            torch.empty(tokens, -(-lows // self._width) * self._width) if some else None,
            torch.empty_like(states),
            torch.empty(tokens),
        )
        _has_memory(
            self._library.layer_forward(
                ctypes.byref(layer.structure), ctypes.byref(_rows(packed, turns)), _own(pairs), states.data_ptr(),
                ctypes.byref(kept.structure), out.data_ptr(),
            )
        )  # fmt: skip
        return out, kept

    def backward(
        self,
        layer: WholeLayer,
        packed: Runs,
        turns: tuple[Tensor, Tensor],
        pairs: Pairs,
        kept: Kept,
        back: Tensor,
        runs: Tensor,
        *,
        deeper: bool,
        onto: Pairs | None = None,
        scaling: float = 1.0,
    ) -> tuple[Tensor | None, Pairs]:
        """Gradients at the layer's input, where something `deeper` needs it, and of the factors for each of `runs`.

        Args:
            layer: As `forward` took it, like what follows.
            packed: Where records and users begin.
            turns: Cosines and sines of each position's angles, shape `(positions, numbers per head / 2)`.
            pairs: The users' factors.
            kept: What `forward` gave.
            back: Gradient at the states after the layer.
            runs: Where users, or their records, begin, and the end.
            deeper: Whether something below needs the gradient at the input.
            onto: Where gradients of A and B are added, each run's in a row of its own; into zeros when absent.
            scaling: What those of B are multiplied by.
        """
        found: Pairs = onto or [
            None if pair is None else (_zeros(runs, pair[0]), _zeros(runs, pair[1])) for pair in pairs
        ]
        out = torch.empty_like(back) if deeper else None
        gradients = _Gradients(*_pointers(found), runs.data_ptr(), scaling)
        _has_memory(
            self._library.layer_backward(
                ctypes.byref(layer.structure), ctypes.byref(_rows(packed, turns)), _own(pairs), kept.states.data_ptr(),
                ctypes.byref(kept.structure), back.data_ptr(), ctypes.byref(gradients),
                None if out is None else out.data_ptr(),
            )
        )  # fmt: skip
        return out, found


def _zeros(runs: Tensor, factors: Tensor) -> Tensor:
    return torch.zeros(len(runs) - 1, *factors.shape[1:])


def _pointers(pairs: Pairs) -> tuple[Any, ...]:
    """Where each part's A and B lie, and how far one user's are from the next's."""
    columns = [
        (None, None, 0, 0)
        if pair is None
        else (pair[0].data_ptr(), pair[1].data_ptr(), pair[0].stride(0), pair[1].stride(0))
        for pair in pairs
    ]
    kinds = (_Pointer, _Pointer, _Count, _Count)
    return tuple((kind * PARTS)(*values) for kind, values in zip(kinds, zip(*columns, strict=True), strict=True))


def _own(pairs: Pairs) -> Any:
    some = [pair for pair in pairs if pair is not None]
    return ctypes.byref(_Own(*_pointers(pairs), some[0][0].shape[1])) if some else None


def _rows(packed: Runs, turns: tuple[Tensor, Tensor]) -> _Rows:
    records, users = packed.records, packed.users
    return _Rows(
        records.bounds.data_ptr(), users.bounds.data_ptr(), records.count, users.count,
        turns[0].data_ptr(), turns[1].data_ptr(),
    )  # fmt: skip


class _Runs(NamedTuple):
    records: Segments
    users: Segments


def _has_memory(code: int) -> None:
    if code:
        raise MemoryError("no memory for a layer")


def layers_for(like: Tensor) -> Layers | None:
    """The compiled layers where compiled products serve tensors such as `like`, and where they agree with torch."""
    products = products_for(like)
    return None if products is None else _made(products)


@lru_cache(maxsize=1)
def _made(products: Products) -> Layers | None:
    try:
        made = Layers(products)
    except AttributeError:
        return None
    return made if _agree(made, products) else None


@torch.no_grad()
def _agree(made: Layers, products: Products) -> bool:
    """Whether a layer there and back gives what torch gives in float64, with records and users of odd lengths."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # Two query heads over one head of keys; three users, one of them with two records and one longer than a block.
    width, inner, heads, each, rank = 48, 53, (1, 2, 16), 16, 3
    users, records = np.array([9, 300, 31]), np.array([5, 4, 300, 31])
    shapes = [(32, width), (16, width), (16, width), (width, 32), (inner, width), (inner, width), (width, inner)]
    matrices = tuple(random(*shape) / shape[1] ** 0.5 for shape in shapes)
    norms, bias = (random(width) / 2, random(width) / 2), random(16)
    layer = made.layer(products.layer(matrices), norms, (None, bias, None), heads, 1e-5)
    cpu = torch.device("cpu")
    packed = _Runs(Segments(records, cpu), Segments(users, cpu))
    angles = torch.outer(torch.arange(300.0), 0.5 ** torch.arange(8.0))
    turns = (angles.cos(), angles.sin())
    pairs = [
        (random(3, rank, width) / 7, random(3, 32, rank) / 4),
        None,
        (random(3, rank, width) / 7, random(3, 16, rank) / 4),
    ]
    states, back = random(340, width), random(340, width)
    out, kept = made.forward(layer, packed, turns, pairs, states)
    found = made.backward(layer, packed, turns, pairs, kept, back, packed.users.bounds, deeper=True)
    apart = made.backward(layer, packed, turns, pairs, kept, back, packed.records.bounds, deeper=False)
    with torch.enable_grad():
        leaf = states.double().requires_grad_()
        leaves = [one.double().requires_grad_() for pair in pairs if pair is not None for one in pair]
        matrix = [one.double() for one in matrices]
        owner = torch.repeat_interleave(torch.arange(3), torch.from_numpy(users))
        normed = F.rms_norm(leaf, (width,), norms[0].double(), 1e-5)
        parts = [normed @ one.t() for one in matrix[:3]]
        parts[1] = parts[1] + bias.double()
        for part, (a, b) in zip((0, 2), (leaves[:2], leaves[2:]), strict=True):
            low = torch.einsum("ti,tri->tr", normed, a[owner])
            parts[part] = parts[part] + torch.einsum("tr,tor->to", low, b[owner])
        mixed = native.plain_attention(torch.cat(parts, dim=1), packed.records.bounds.tolist(), angles.double(), each)
        added = leaf + mixed @ matrix[3].t()
        fed = F.rms_norm(added, (width,), norms[1].double(), 1e-5)
        wanted = added + (F.silu(fed @ matrix[4].t()) * (fed @ matrix[5].t())) @ matrix[6].t()
        slopes = torch.autograd.grad(wanted, [leaf, *leaves], back.double())
    gradients = [one for pair in found[1] if pair is not None for one in pair]
    pieces = [one for pair in apart[1] if pair is not None for one in pair]
    if found[0] is None or apart[0] is not None:
        return False
    summed = [torch.cat([one[:2].sum(0, keepdim=True), one[2:]]) for one in pieces]
    return native.all_agree([out, found[0], *gradients, *summed], [wanted, *slopes, *slopes[1:]])
