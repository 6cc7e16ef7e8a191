"""Compiled matrix products of a narrow Llama, together with what stands between them, where one thread computes.

A torch product goes over all rows of a pass, and what it leaves has gone from the core's cache when the next operation
reads it. `products.c` takes a hundred rows at a time through norm, product and activation. Its own products run at the
rate of torch's (MKL) here, because frozen matrices are laid out for them once, as panels.

It is compiled and checked as `native` does it, and served where `native.kernels` are. What it does not serve, torch
does.
"""

from __future__ import annotations

import ctypes
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from client import native
from client.compiled_code import compiled, load_library

__all__ = ["Laid", "LaidLayer", "Products", "products_for"]

SOURCE = Path(__file__).with_name("layers.c")
INCLUDED = Path(__file__).with_name("products.c")

NARROWEST_PANEL = 16
"""With shorter vectors (SSE, NEON) torch's products were not measured against these, and are taken."""

LARGEST_HEAD = 1 << 21
"""Numbers of an output layer up to which two more copies of it are kept for each process, 16 MB together."""


class Laid(NamedTuple):
    """A matrix in panels: `panels` has shape `(panels, depth, panel width)`."""

    panels: Tensor
    depth: int
    columns: int


class LaidLayer(NamedTuple):
    """One decoder layer's matrices, for the way there and (`_back`) for the way back.

    Attributes:
        products: Whose panels these are.
        mlp: Whether `Products.mlp` serves it: its linear layers have no biases.
    """

    products: Products
    mlp: bool
    qkv: Laid
    output: Laid
    gates_ups: Laid
    down: Laid
    qkv_back: Laid
    output_back: Laid
    gates_ups_back: Laid
    down_back: Laid


class Products:
    """The compiled functions over float32 tensors on the CPU whose rows lie one after the other."""

    def __init__(self, path: Path) -> None:
        """Load what was compiled.

        Raises:
            OSError: It cannot be loaded.
            AttributeError: It is something else.
        """
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        signatures: dict[str, list[Any]] = {
            "product": [pointer, count] + [pointer] * 3 + [count] * 4,
            "norm_product": [pointer] * 6 + [count] * 3 + [ctypes.c_float],
            "mlp_forward": [pointer] * 6 + [count] * 3 + [ctypes.c_float],
            "mlp_backward": [pointer] * 8 + [count] * 3,
            "loss_product": [pointer] * 6 + [count] * 3,
            "panel_width": [],
            "vector_width": [],
        }
        self._library = load_library(path, signatures)
        self._heads = WeakIdKeyDictionary()
        self.panel: int = self._library.panel_width()
        self.vector: int = self._library.vector_width()

    @property
    def library(self) -> ctypes.CDLL:
        """What was compiled; `native_layers` takes whole layers from it."""
        return self._library

    def laid(self, matrix: Tensor) -> Laid:
        """Lay out a matrix, shape `(depth, columns)`."""
        depth, columns = matrix.shape
        filled = F.pad(matrix.detach(), (0, -columns % self.panel))
        return Laid(filled.view(depth, -1, self.panel).transpose(0, 1).contiguous(), depth, columns)

    def layer(self, matrices: tuple[Tensor, ...], *, mlp: bool = True) -> LaidLayer:
        """Lay out a layer's seven matrices, each of shape `(outputs, inputs)`, in the order of `llama_layer`."""
        query, key, value, output, gate, up, down = (each.detach() for each in matrices)
        qkv = torch.cat([query, key, value])
        half = self.panel // 2
        more = -gate.shape[0] % half
        gate, up = F.pad(gate, (0, 0, 0, more)), F.pad(up, (0, 0, 0, more))
        width = gate.shape[1]
        beside = torch.stack([gate.t().reshape(width, -1, half), up.t().reshape(width, -1, half)], dim=2)
        return LaidLayer(
            self,
            mlp,
            self.laid(qkv.t()),
            self.laid(output.t()),
            Laid(beside.transpose(0, 1).contiguous(), width, 2 * gate.shape[0]),
            self.laid(down.t()),
            self.laid(qkv),
            self.laid(output),
            self.laid(torch.cat([gate, up])),
            self.laid(down),
        )

    def product(self, rows: Tensor, matrix: Laid, onto: Tensor | None = None) -> Tensor:
        """`rows` times the matrix, added `onto`, whose rows lie one after the other."""
        out = torch.empty(rows.shape[0], matrix.columns)
        _has_memory(
            self._library.product(
                rows.data_ptr(), rows.stride(0), matrix.panels.data_ptr(), None if onto is None else onto.data_ptr(),
                out.data_ptr(), matrix.columns, rows.shape[0], matrix.depth, matrix.columns,
            )
        )  # fmt: skip
        return out

    def norm_product(
        self, x: Tensor, weight: Tensor, epsilon: float, matrix: Laid, *, keep: bool
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """`x` under its norm times the matrix; the norm where it is to `keep`; and the norm's scale, `(rows,)`."""
        out, scale = torch.empty(x.shape[0], matrix.columns), torch.empty(x.shape[0])
        inner = torch.empty_like(x) if keep else None
        _has_memory(
            self._library.norm_product(
                x.data_ptr(), weight.data_ptr(), matrix.panels.data_ptr(), None if inner is None else inner.data_ptr(),
                scale.data_ptr(), out.data_ptr(), *x.shape, matrix.columns, epsilon,
            )
        )  # fmt: skip
        return out, inner, scale

    def mlp(self, x: Tensor, weight: Tensor, epsilon: float, layer: LaidLayer) -> tuple[Tensor, Tensor]:
        """`x` plus the gated MLP of its norm, and the norm's scale; nothing else is needed for `mlp_back`."""
        out, scale = torch.empty_like(x), torch.empty(x.shape[0])
        _has_memory(
            self._library.mlp_forward(
                x.data_ptr(), weight.data_ptr(), layer.gates_ups.panels.data_ptr(), layer.down.panels.data_ptr(),
                scale.data_ptr(), out.data_ptr(), *x.shape, layer.down.depth, epsilon,
            )
        )  # fmt: skip
        return out, scale

    def mlp_back(self, back: Tensor, x: Tensor, scale: Tensor, weight: Tensor, layer: LaidLayer) -> Tensor:
        """Gradient at `x` of `mlp`, from `back` at its result; gates and ups are computed again."""
        out = torch.empty_like(x)
        _has_memory(
            self._library.mlp_backward(
                back.data_ptr(), x.data_ptr(), scale.data_ptr(), weight.data_ptr(), layer.gates_ups.panels.data_ptr(),
                layer.down_back.panels.data_ptr(), layer.gates_ups_back.panels.data_ptr(), out.data_ptr(),
                *x.shape, layer.down.depth,
            )
        )  # fmt: skip
        return out

    def loss_back(self, hidden: Tensor, head: Tensor, targets: Tensor, weights: Tensor) -> Tensor | None:
        """Gradient at `hidden` of weighted cross-entropy under the output layer `head`, shape `(vocabulary, hidden)`.

        None where that layer is too large to be laid out beside itself.
        """
        if head.numel() > LARGEST_HEAD:
            return None
        known = self._heads.get(head)
        # The third holds on to the memory, so that its address cannot come to mean another matrix.
        if known is None or known[2].data_ptr() != head.data_ptr() or known[3] != head._version:
            known = self.laid(head.detach().t()), self.laid(head), head.detach(), head._version
            self._heads[head] = known
        gradient = torch.empty_like(hidden)
        _has_memory(
            self._library.loss_product(
                hidden.data_ptr(), known[0].panels.data_ptr(), known[1].panels.data_ptr(), targets.data_ptr(),
                weights.data_ptr(), gradient.data_ptr(), *hidden.shape, head.shape[0],
            )
        )  # fmt: skip
        return gradient


def _has_memory(code: int) -> None:
    if code:
        raise MemoryError("no memory for a product")


def products_for(like: Tensor) -> Products | None:
    """The products where they serve tensors such as `like` best: one thread, and kernels that serve them too."""
    if torch.get_num_threads() > 1 or native.kernels_for(like) is None:
        return None
    return _made()


@lru_cache(maxsize=1)
def _made() -> Products | None:
    try:
        made = Products(compiled(SOURCE, INCLUDED, native.SOURCE))
    except (OSError, AttributeError, subprocess.SubprocessError):
        return None
    return made if made.panel >= NARROWEST_PANEL and _agree(made) else None


@torch.no_grad()
def _agree(made: Products) -> bool:
    """Whether each gives what torch gives in float64, at sizes that leave rest in every loop."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    wide, inner, rows, vocabulary = 40, 53, 131, 277
    shapes = [(wide, wide)] * 4 + [(inner, wide)] * 2 + [(wide, inner)]
    matrices = tuple(random(*shape) / 6 for shape in shapes)
    laid = made.layer(matrices)
    x, back, weight, head = random(rows, wide), random(rows, wide), random(wide), random(vocabulary, wide)
    targets, counted = torch.arange(rows) * 2, random(rows).abs()
    qkv, kept, scale = made.norm_product(x, weight, 1e-5, laid.qkv, keep=True)
    fed, fed_scale = made.mlp(x, weight, 1e-5, laid)
    to_hidden = made.loss_back(x, head, targets, counted)
    if kept is None or to_hidden is None:
        return False
    found = [
        kept, scale, qkv, fed, made.mlp_back(back, x, fed_scale, weight, laid), to_hidden,
        made.product(qkv, laid.qkv_back, x), made.product(x, laid.down_back),
    ]  # fmt: skip
    with torch.enable_grad():
        leaf, hidden = (x.double().requires_grad_() for _ in range(2))
        root = torch.rsqrt(leaf.square().mean(1, keepdim=True) + 1e-5)
        normed = leaf * root * weight.double()
        gate, up, down = (each.double() for each in matrices[4:])
        result = leaf + (F.silu(normed @ gate.t()) * (normed @ up.t())) @ down.t()
        losses = F.cross_entropy(hidden @ head.double().t(), targets, reduction="none") * counted
        slope, to_loss = torch.autograd.grad(
            [result, losses], [leaf, hidden], [back.double(), torch.ones(rows).double()]
        )
    joined = torch.cat(matrices[:3]).double()
    wanted = [
        normed, root[:, 0], normed @ joined.t(), result, slope, to_loss,
        (normed @ joined.t()) @ joined + x, x.double() @ down,
    ]  # fmt: skip
    return native.all_agree(found, wanted)
