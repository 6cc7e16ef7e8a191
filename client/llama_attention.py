"""Causal attention with rotary positions over records laid end to end, forward and backward by hand.

Attention alone has to see rectangles: records of like length are placed into few of them (`packing.Grid`), and padding
stands on the right, where no token looks. Short records on a CPU take plain batched products; everything else takes
the fused kernel that torch chooses.

Source: Vaswani et al. (2017), arXiv:1706.03762; Su et al. (2021), arXiv:2104.09864.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from client.packing import Grid, Packed

__all__ = ["RotaryAttention"]

SHORT = 128
"""Up to this many tokens attention by plain products is faster on a CPU than a fused kernel, and as small."""


class RotaryAttention:
    """The part of every layer between its projections; one object serves all layers."""

    def __init__(self, config: Any, rotary: Any) -> None:
        """Take heads and widths from a Llama-like `config`, and angles from its `rotary` embedding."""
        self._key_heads: int = config.num_key_value_heads
        self._share: int = config.num_attention_heads // config.num_key_value_heads
        self._width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self._scale = self._width**-0.5
        self._rotary = rotary
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self._masks: dict[Any, Tensor] = {}

    @property
    def heads(self) -> tuple[int, int, int]:
        """Heads of keys, heads of queries per head of keys, and numbers per head."""
        return self._key_heads, self._share, self._width

    def angles(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of at least `length` positions, shape `(positions, width / 2)`, float32 on the CPU."""
        cosine, sine = self._table(max(length, SHORT), torch.empty(0))
        return cosine[:, : self._width // 2].contiguous(), sine.contiguous()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, packed: Packed) -> tuple[Tensor, Any]:
        """What each token takes from its record so far, shape `(tokens, heads * width)`, and what to keep."""
        outs: list[Tensor] = []
        kept: list[Any] = []
        for grid in packed.grids:
            out, saved = self._grid(query, key, value, grid)
            outs.append(out)
            kept.append(saved)
        if packed.places is None:
            return outs[0], kept
        return torch.cat(outs).index_select(0, packed.places), kept

    def _grid(self, query: Tensor, key: Tensor, value: Tensor, grid: Grid) -> tuple[Tensor, Any]:
        heads, share, width = self._key_heads, self._share, self._width
        shape = (grid.rows, grid.width, heads)

        def placed(rows: Tensor) -> Tensor:
            return rows if grid.tokens is None else rows.index_select(0, grid.tokens)

        asked = self._turned(placed(query).view(*shape, share, width).permute(0, 2, 3, 1, 4), grid.width)
        keys = self._turned(placed(key).view(*shape, width).transpose(1, 2), grid.width)
        values = placed(value).view(*shape, width).transpose(1, 2).contiguous()
        if grid.width <= SHORT and not query.is_cuda:
            asked = asked.view(grid.rows * heads, share * grid.width, width)
            keys, values = (each.view(-1, grid.width, width) for each in (keys, values))
            chances = torch.baddbmm(self._mask(grid.width, query), asked, keys.transpose(1, 2), alpha=self._scale)
            chances = torch.softmax(chances, dim=-1)
            out, saved = torch.bmm(chances, values), (asked, keys, values, chances)
        else:
            asked = asked.view(grid.rows, heads * share, grid.width, width)
            with torch.enable_grad():
                asked, keys, values = (each.detach().requires_grad_() for each in (asked, keys, values))
                out = F.scaled_dot_product_attention(
                    asked, keys, values, is_causal=True, scale=self._scale, enable_gqa=share > 1
                )
            saved = (asked, keys, values, out)
            out = out.detach()
        out = out.view(grid.rows, heads, share, grid.width, width).permute(0, 3, 1, 2, 4)
        return out.reshape(grid.rows * grid.width, -1), saved

    def backward(self, back: Tensor, kept: Any, packed: Packed, keyed: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients at queries, keys (where asked for) and values, shapes as of the forward's arguments."""
        if packed.places is not None:
            back = back.new_zeros(packed.padded_places, back.shape[1]).index_copy_(0, packed.places, back)
        found: list[list[Tensor]] = [[], [], []]
        start = 0
        for grid, saved in zip(packed.grids, kept, strict=True):
            piece = back[start : start + grid.rows * grid.width]
            start += grid.rows * grid.width
            for each, gradient in zip(found, self._grid_back(piece, saved, grid), strict=True):
                each.append(gradient)

        def whole(pieces: list[Tensor]) -> Tensor:
            return pieces[0] if packed.places is None else torch.cat(pieces).index_select(0, packed.places)

        return whole(found[0]), whole(found[1]) if keyed else None, whole(found[2])

    def _grid_back(self, back: Tensor, saved: Any, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        heads, share, width = self._key_heads, self._share, self._width
        back = back.view(grid.rows, grid.width, heads, share, width).permute(0, 2, 3, 1, 4)
        asked, keys, values, last = saved
        if last.requires_grad:
            back = back.reshape(grid.rows, heads * share, grid.width, width)
            to_asked, to_keys, to_values = torch.autograd.grad(last, (asked, keys, values), back)
        else:
            back = back.reshape(grid.rows * heads, share * grid.width, width)
            to_values = torch.bmm(last.transpose(1, 2), back)
            to_scores = torch.ops.aten._softmax_backward_data(
                torch.bmm(back, values.transpose(1, 2)), last, -1, last.dtype
            ).mul_(self._scale)
            to_asked = torch.bmm(to_scores, keys)
            to_keys = torch.bmm(to_scores.transpose(1, 2), asked)
        tokens = grid.rows * grid.width
        shape = (grid.rows, heads, grid.width, width)
        turned = self._turned_back(to_asked.view(grid.rows, heads, share, grid.width, width), grid.width)
        keyed = self._turned_back(to_keys.view(shape), grid.width)
        plain = to_values.reshape(shape).transpose(1, 2).reshape(tokens, -1)
        return turned.view(tokens, -1), keyed.view(tokens, -1), plain

    def _turned(self, rows: Tensor, length: int) -> Tensor:
        """Rotate `(..., tokens, width)` by position, into memory of that order."""
        cosine, sine = self._table(length, rows)
        half = self._width // 2
        if torch.compiler.is_compiling():
            first, second, narrow = rows[..., :half], rows[..., half:], cosine[:, :half]
            return torch.cat([first * narrow - second * sine, second * narrow + first * sine], dim=-1)
        out = torch.mul(rows, cosine, out=torch.empty(rows.shape, dtype=rows.dtype, device=rows.device))
        out[..., :half].addcmul_(rows[..., half:], sine, value=-1.0)
        out[..., half:].addcmul_(rows[..., :half], sine)
        return out

    def _turned_back(self, rows: Tensor, length: int) -> Tensor:
        """Rotate `(records, heads..., tokens, width)` back, into memory of `(records, tokens, heads..., width)`."""
        cosine, sine = self._table(length, rows)
        half = self._width // 2
        if torch.compiler.is_compiling():
            first, second, narrow = rows[..., :half], rows[..., half:], cosine[:, :half]
            turned = torch.cat([first * narrow + second * sine, second * narrow - first * sine], dim=-1)
            return turned.movedim(-2, 1).contiguous()
        memory = torch.empty(rows.movedim(-2, 1).shape, dtype=rows.dtype, device=rows.device)
        out = torch.mul(rows, cosine, out=memory.movedim(1, -2))
        out[..., :half].addcmul_(rows[..., half:], sine)
        out[..., half:].addcmul_(rows[..., :half], sine, value=-1.0)
        return memory

    def _table(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines, shape `(length, width)`, and sines of one half."""
        key = (like.dtype, like.device)
        known = self._tables.get(key)
        if known is None or known[0].shape[0] < length:
            angle = torch.outer(
                torch.arange(max(length, SHORT), dtype=torch.float64, device=like.device),
                self._rotary.inv_freq.to(like.device, torch.float64),
            )
            factor = self._rotary.attention_scaling
            cosine = torch.cat([angle, angle], dim=1).cos() * factor
            known = (cosine.to(like.dtype), (angle.sin() * factor).to(like.dtype))
            self._tables[key] = known
        return known[0][:length], known[1][:length]

    def _mask(self, length: int, like: Tensor) -> Tensor:
        key = (length, like.dtype, like.device)
        if key not in self._masks:
            mask = torch.full((length, length), float("-inf"), dtype=like.dtype, device=like.device).triu_(1)
            self._masks[key] = mask.repeat(self._share, 1)
        return self._masks[key]
