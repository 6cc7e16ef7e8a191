"""Compiled kernels for what stands between a small Llama's matrix products, where this machine has a C compiler.

What `kernels.c` compiles to (`compiled_code`) has to agree with torch on the spot before it is used. Without a
compiler, with an unknown processor or after any disagreement there are no kernels, and the same numbers come from
torch, more slowly. `HOMESPUN_KERNELS=0` switches them off.

The functions hold no state and no lock, and run without Python's: any number of threads may call them.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from client.compiled_code import compiled, compiler, load_library

__all__ = ["Kernels", "all_agree", "keep_freed_memory", "kernels", "kernels_for", "plain_attention", "why_no_kernels"]

SOURCE = Path(__file__).with_name("kernels.c")
FEW_THREADS = 4
"""The kernels are of one thread each; where torch has more than this for its own, it is faster without them."""

KEPT_BYTES = 1 << 28
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Names of mallopt(3)."""

AGREES = 2e-6
"""Largest difference from torch, relative to the largest number of an answer."""

_Pointer = ctypes.c_void_p
_Count = ctypes.c_int64


class Kernels:
    """The compiled functions over float32 tensors on the CPU; rows of every tensor lie one after the other."""

    def __init__(self, path: Path) -> None:
        """Load what was compiled.

        Raises:
            OSError: It cannot be loaded.
            AttributeError: It is something else.
        """
        real = ctypes.c_float
        signatures: dict[str, list[Any]] = {
            "rms_forward": [_Pointer] * 4 + [_Count] * 2 + [real],
            "rms_backward": [_Pointer] * 6 + [_Count] * 2,
            "gate_forward": [_Pointer] * 2 + [_Count] * 2,
            "gate_backward": [_Pointer] * 3 + [_Count] * 2,
            "loss_backward": [_Pointer] * 3 + [_Count] * 2,
            "factors_forward": [_Pointer, _Count] * 3 + [_Pointer] * 2 + [_Count, _Pointer] + [_Count] * 4,
            "factors_backward": [_Pointer, _Count] * 2
            + [_Pointer]
            + [_Pointer, _Count] * 2
            + [_Pointer] * 4
            + [_Count, _Pointer]
            + [_Count] * 3,
            "vector_width": [],
            "attention_forward": [_Pointer] * 6 + [_Count] + [_Pointer] * 2 + [_Count] * 5 + [real],
            "attention_backward": [_Pointer] * 6 + [_Count] + [_Pointer] * 5 + [_Count] * 5 + [real],
        }
        self._library = load_library(path, signatures, returning=("attention", "factors", "vector"))
        self._width: int = self._library.vector_width()

    def norm(self, x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        """Return `x` over its root mean square, times `weight`; and one over that root, shape `(rows,)`."""
        inner, scale = torch.empty_like(x), torch.empty(x.shape[0])
        self._library.rms_forward(
            x.data_ptr(), weight.data_ptr(), inner.data_ptr(), scale.data_ptr(), x.shape[0], x.shape[1], epsilon
        )
        return inner, scale

    def norm_back(self, back: Tensor, x: Tensor, scale: Tensor, weight: Tensor, beside: Tensor) -> Tensor:
        """Gradient at `x` of `norm`, from `back` at its result, added to what is `beside`."""
        out = torch.empty_like(x)
        self._library.rms_backward(
            back.data_ptr(), x.data_ptr(), scale.data_ptr(), weight.data_ptr(), beside.data_ptr(), out.data_ptr(),
            *x.shape,
        )  # fmt: skip
        return out

    def gate(self, both: Tensor) -> Tensor:
        """silu(gates) times ups, shape `(rows, width)`, of `both`, shape `(rows, 2 * width)`, gates first."""
        rows, width = both.shape[0], both.shape[1] // 2
        product = torch.empty(rows, width)
        self._library.gate_forward(both.data_ptr(), product.data_ptr(), rows, width)
        return product

    def gate_back(self, back: Tensor, both: Tensor) -> Tensor:
        """Gradient at `both`, from `back` at the product; takes the place of `both`."""
        self._library.gate_backward(back.data_ptr(), both.data_ptr(), both.data_ptr(), *back.shape)
        return both

    def loss_back(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Turn logits, shape `(rows, vocabulary)`, into the gradient of weighted cross-entropy, in place."""
        self._library.loss_backward(logits.data_ptr(), targets.data_ptr(), weights.data_ptr(), *logits.shape)
        return logits

    def takes_factors(self, a: Tensor, b: Tensor) -> bool:
        """Whether `factors` serves adapters of these shapes, as they lie."""
        return (
            a.shape[2] % self._width == 0 == b.shape[1] % self._width
            and a.stride()[1:] == (a.shape[2], 1)
            and b.stride()[1:] == (b.shape[2], 1)
        )

    def factors(self, x: Tensor, a: Tensor, b: Tensor, y: Tensor, users: Tensor) -> Tensor:
        """Add every user's own low-rank product to `y`, whose rows may lie apart; returns what the way back needs.

        Args:
            x: Shape `(tokens, inputs)`.
            a: Shape `(users, rank, inputs)`.
            b: Shape `(users, outputs, rank)`.
            y: Shape `(tokens, outputs)`.
            users: Where each user's tokens start, and the end, int64.
        """
        rank, inputs, outputs = a.shape[1], a.shape[2], b.shape[1]
        low = torch.empty(x.shape[0], -(-rank // self._width) * self._width)
        _has_memory(
            self._library.factors_forward(
                x.data_ptr(), x.stride(0), a.data_ptr(), a.stride(0), b.data_ptr(), b.stride(0), low.data_ptr(),
                y.data_ptr(), y.stride(0), users.data_ptr(), a.shape[0], rank, inputs, outputs,
            )
        )  # fmt: skip
        return low

    def factors_back(
        self, back: Tensor, x: Tensor, low: Tensor, a: Tensor, b: Tensor, toward: Tensor | None,
        users: Tensor, runs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Gradients of the factors for each of `runs`, which are users or their records; adds to `toward` at `x`."""
        rank, inputs, outputs, count = a.shape[1], a.shape[2], b.shape[1], len(runs) - 1
        to_a, to_b = torch.empty(count, rank, inputs), torch.empty(count, outputs, rank)
        _has_memory(
            self._library.factors_backward(
                back.data_ptr(), back.stride(0), x.data_ptr(), x.stride(0), low.data_ptr(), a.data_ptr(), a.stride(0),
                b.data_ptr(), b.stride(0), None if toward is None else toward.data_ptr(),
                to_a.data_ptr(), to_b.data_ptr(), users.data_ptr(), a.shape[0], runs.data_ptr(), rank, inputs, outputs,
            )
        )  # fmt: skip
        return to_a, to_b

    def attention(
        self, qkv: Tensor, starts: Tensor, cosines: Tensor, sines: Tensor, heads: int, share: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """Rotary causal attention within records.

        Args:
            qkv: Queries, keys and values side by side, shape `(tokens, (heads * share + 2 * heads) * width)`.
            starts: Where each record starts, and the end, int64.
            cosines: Of each position's angles, shape `(positions, width / 2)`.
            sines: Likewise.
            heads: Heads of keys.
            share: Heads of queries per head of keys.
            width: Numbers per head.

        Returns:
            Shape `(tokens, heads * share * width)`, and what `attention_back` needs.
        """
        tokens, across = qkv.shape[0], heads * share * width
        out, logs = torch.empty(tokens, across), torch.empty(2, heads * share, tokens)
        at = qkv.data_ptr()
        _has_memory(
            self._library.attention_forward(
                at, at + 4 * across, at + 4 * (across + heads * width), cosines.data_ptr(), sines.data_ptr(),
                starts.data_ptr(), len(starts) - 1, out.data_ptr(), logs.data_ptr(),
                heads, share, width, qkv.shape[1], across, width**-0.5,
            )
        )  # fmt: skip
        return out, logs

    def attention_back(
        self, back: Tensor, qkv: Tensor, logs: Tensor, starts: Tensor, cosines: Tensor, sines: Tensor,
        heads: int, share: int, width: int, *, keyed: bool,
    ) -> Tensor:  # fmt: skip
        """Gradient at `qkv`, of its shape; keys' part is zero unless `keyed`."""
        across = heads * share * width
        found = torch.empty_like(qkv)
        if not keyed:
            found[:, across : across + heads * width] = 0.0
        at, to = qkv.data_ptr(), found.data_ptr()
        _has_memory(
            self._library.attention_backward(
                at, at + 4 * across, at + 4 * (across + heads * width), cosines.data_ptr(), sines.data_ptr(),
                starts.data_ptr(), len(starts) - 1, logs.data_ptr(), back.data_ptr(),
                to, to + 4 * across if keyed else None, to + 4 * (across + heads * width),
                heads, share, width, qkv.shape[1], across, width**-0.5,
            )
        )  # fmt: skip
        return found


def _has_memory(code: int) -> None:
    if code:
        raise MemoryError("no memory for attention")


def kernels() -> Kernels | None:
    """The kernels of this machine, compiled at the first call; None where there are none, see `why_no_kernels`."""
    return _made()[0]


def kernels_for(like: Tensor) -> Kernels | None:
    """The kernels where they serve tensors such as `like` best."""
    if like.dtype != torch.float32 or like.device.type != "cpu" or torch.get_num_threads() > FEW_THREADS:
        return None
    return kernels()


def why_no_kernels() -> str | None:
    """Say why there are none; None where there are."""
    return _made()[1]


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Let the C library keep up to 256 MB that were freed, for the next pass, where it is glibc.

    Otherwise it hands tensors of a pass back to the operating system and asks for them anew, thousands of pages per
    pass, each of which costs more than what is computed on it.
    """
    if sys.platform != "linux":
        return
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return  # another C library
    set_option(TRIM_THRESHOLD, KEPT_BYTES)
    set_option(MMAP_THRESHOLD, KEPT_BYTES)


@lru_cache(maxsize=1)
def _made() -> tuple[Kernels | None, str | None]:
    if os.environ.get("HOMESPUN_KERNELS") == "0":
        return None, "HOMESPUN_KERNELS=0 switched them off"
    if compiler() is None:
        return None, "there is no C compiler"
    try:
        made = Kernels(compiled(SOURCE))
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        return None, f"they could not be compiled or loaded ({type(error).__name__})"
    return (made, None) if _agree(made) else (None, "they disagree with torch on this machine")


@torch.no_grad()
def _agree(made: Kernels) -> bool:
    """Whether every kernel gives what torch gives, on rows and records of odd lengths."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, weight, back, both, wide = random(7, 37), random(37), random(7, 37), 3 * random(7, 74), random(7, 37)
    inner, scale = made.norm(x, weight, 1e-5)
    logits, targets, weights = 4 * random(5, 53), torch.tensor([0, 52, 7, 7, 30]), random(5).abs()
    starts, qkv = torch.tensor([0, 1, 20, 90]), random(90, 4 * 12)
    angles = torch.outer(torch.arange(70.0), 0.5 ** torch.arange(6.0))
    turn = (angles.cos(), angles.sin())
    mixed, logs = made.attention(qkv, starts, *turn, 1, 2, 12)
    onto = random(90, 24)
    a, b, rows, added = random(2, 3, 32), random(2, 16, 3), random(90, 32), random(90, 16)
    users, adapted, toward = torch.tensor([0, 20, 90]), added.clone(), random(90, 32)
    low, before = made.factors(rows, a, b, adapted, users), toward.clone()
    to_factors = made.factors_back(added, rows, low, a, b, toward, users, starts)
    found = [
        inner,
        made.norm_back(back, x, scale, weight, wide),
        made.gate(both),
        made.gate_back(back, both.clone()),
        made.loss_back(logits.clone(), targets, weights),
        mixed,
        made.attention_back(onto, qkv, logs, starts, *turn, 1, 2, 12, keyed=True),
        adapted,
        toward - before,
        *to_factors,
    ]
    with torch.enable_grad():
        leaves = [each.double().requires_grad_() for each in (x, both, logits, qkv)]
        normed = leaves[0] * torch.rsqrt(leaves[0].square().mean(1, keepdim=True) + 1e-5) * weight
        gates, ups = leaves[1].split(37, dim=1)
        gated = torch.nn.functional.silu(gates) * ups
        losses = torch.nn.functional.cross_entropy(leaves[2], targets, reduction="none") * weights
        plain = plain_attention(leaves[3], starts.tolist(), angles.double(), 12)
        slopes = torch.autograd.grad(
            [normed, gated, losses, plain],
            leaves,
            [back.double(), back.double(), torch.ones(5).double(), onto.double()],
        )
    wanted = [normed, slopes[0] + wide, gated, slopes[1], slopes[2], plain, slopes[3]]
    wanted += _factors(rows.double(), a.double(), b.double(), added.double(), starts.tolist())
    return all_agree(found, wanted)


def all_agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    """Whether no number of any tensor is further from the one that is wanted than rounding explains."""
    return all(
        float((own - other).abs().max()) <= AGREES * max(1.0, float(other.abs().max()))
        for own, other in zip(found, wanted, strict=True)
    )


def _factors(rows: Tensor, a: Tensor, b: Tensor, y: Tensor, starts: Sequence[int]) -> list[Tensor]:
    """Low-rank products of two users, the first with two records, onto `y`; and gradients from `y` at the result."""
    owner = torch.tensor([0] * starts[2] + [1] * (starts[3] - starts[2]))
    low = torch.einsum("ti,tri->tr", rows, a[owner])
    to_low = torch.einsum("to,tor->tr", y, b[owner])
    pieces = [slice(*each) for each in pairwise(starts)]
    return [
        y + torch.einsum("tr,tor->to", low, b[owner]),
        torch.einsum("tr,tri->ti", to_low, a[owner]),
        torch.stack([to_low[each].t() @ rows[each] for each in pieces]),
        torch.stack([y[each].t() @ low[each] for each in pieces]),
    ]


def plain_attention(qkv: Tensor, starts: Sequence[int], angles: Tensor, width: int) -> Tensor:
    """Attention of two query heads over one head of keys in torch's operations, for comparison."""
    outs: list[Tensor] = []
    for start, stop in pairwise(starts):
        heads = list(qkv[start:stop].split(width, dim=1))
        cosine, sine = angles[: stop - start].cos(), angles[: stop - start].sin()
        for index in range(3):
            first, second = heads[index].split(width // 2, dim=1)
            heads[index] = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=1)
        mask = torch.full((stop - start, stop - start), float("-inf"), dtype=qkv.dtype).triu(1)
        mixed = [torch.softmax(each @ heads[2].t() * width**-0.5 + mask, dim=1) @ heads[3] for each in heads[:2]]
        outs.append(torch.cat(mixed, dim=1))
    return torch.cat(outs)
