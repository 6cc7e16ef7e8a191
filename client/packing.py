"""Records of many users laid end to end, so that no layer that works token by token ever sees padding.

A pass holds whole records, all of one user's together. Three ways of looking at its tokens are needed: by user, for the
low-rank factors; by record, for gradients that are kept apart; and by record of like length, for attention, which
alone has to see a rectangle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["Example", "Grid", "Packed", "by_length", "pack", "passes", "runs"]

WORTH_A_GRID = 128
"""Padded places of attention that have to be saved for another, smaller rectangle to pay for its calls."""


FEW = 24
"""Runs of unequal length that are multiplied one by one on a CPU; more are laid out."""


class Example(Protocol):
    """One encoded record: token ids, and the first position that carries a label."""

    @property
    def ids(self) -> NDArray[np.int32]:
        """Token ids, shape `(tokens,)`."""
        ...

    @property
    def first_label(self) -> int:
        """Positions from here on are predicted and enter the loss."""
        ...


class Segments:
    """Consecutive runs of tokens, such as a user's or a record's; tokens as rows become `(runs, longest, values)`.

    Attributes:
        count: Runs.
        width: Tokens of the longest.
        uniform: Whether all are that long: then nothing is copied.
        lengths: Tokens of each.
        few: Whether one small product per run costs less than laying the runs out as a rectangle.
    """

    def __init__(self, lengths: NDArray[np.int64], device: torch.device) -> None:
        """Cut tokens into runs of `lengths`, each at least 1."""
        self.count = len(lengths)
        self.width = int(lengths.max())
        self.uniform = bool((lengths == self.width).all())
        self.lengths: list[int] = lengths.tolist()
        self.few = self.count <= FEW and device.type == "cpu"
        self._counts = lengths
        self._device = device

    @cached_property
    def bounds(self) -> Tensor:
        """Where each run starts, and the end, shape `(runs + 1,)`, on the CPU."""
        return torch.from_numpy(np.append(0, np.cumsum(self._counts)))

    @cached_property
    def _gaps(self) -> tuple[Tensor, Tensor]:
        """Where each token lies in the rectangle, and which token lies at each of its places."""
        lengths = self._counts
        starts = np.cumsum(lengths) - lengths
        offsets = np.arange(self.width)
        inside = offsets < lengths[:, None]
        places = torch.from_numpy(np.flatnonzero(inside)).to(self._device)
        return places, torch.from_numpy(np.where(inside, starts[:, None] + offsets, 0).ravel()).to(self._device)

    def products(self, rows: Tensor, own: Tensor) -> Tensor:
        """Multiply each run by a matrix of its own, shape `(runs, inputs, outputs)`: `(tokens, outputs)`."""
        if self.few and not self.uniform:
            out = rows.new_empty(rows.shape[0], own.shape[2])
            for source, matrix, target in zip(rows.split(self.lengths), own, out.split(self.lengths), strict=True):
                torch.mm(source, matrix, out=target)
            return out
        return self.collect(torch.bmm(self.spread(rows), own))

    def add_products(self, target: Tensor, rows: Tensor, own: Tensor) -> Tensor:
        """Add what `products` gives to `target`, which is changed."""
        if self.uniform:
            target.view(self.count, self.width, -1).baddbmm_(self.spread(rows), own)
        elif self.few:
            for source, matrix, place in zip(rows.split(self.lengths), own, target.split(self.lengths), strict=True):
                place.addmm_(source, matrix)
        else:
            target += self.collect(torch.bmm(self.spread(rows), own))
        return target

    def outer(self, left: Tensor, right: Tensor) -> Tensor:
        """Sum outer products over each run's tokens: `(runs, left values, right values)`."""
        if self.few and not self.uniform:
            pairs = zip(left.split(self.lengths), right.split(self.lengths), strict=True)
            return torch.stack([one.t() @ other for one, other in pairs])
        return torch.bmm(self.spread_zero(left).transpose(1, 2), self.spread(right))

    def spread(self, rows: Tensor) -> Tensor:
        """Shape `(tokens, values)` to `(runs, longest, values)`; what fills the gaps is finite and means nothing."""
        source = rows if self.uniform else rows.index_select(0, self._gaps[1])
        return source.view(self.count, self.width, -1)

    def spread_zero(self, rows: Tensor) -> Tensor:
        """As `spread`, with zeros in the gaps."""
        if self.uniform:
            return rows.view(self.count, self.width, -1)
        target = rows.new_zeros(self.count * self.width, rows.shape[1])
        return target.index_copy_(0, self._gaps[0], rows).view(self.count, self.width, -1)

    def collect(self, spread: Tensor) -> Tensor:
        """Back to shape `(tokens, values)`."""
        rows = spread.reshape(self.count * self.width, -1)
        return rows if self.uniform else rows.index_select(0, self._gaps[0])


@dataclass(frozen=True)
class Grid:
    """Records of like length as the rectangle that attention sees.

    Attributes:
        rows: Records in it.
        width: Tokens of the longest.
        tokens: The token at each place, shape `(rows * width,)`; None where the tokens lie so already.
    """

    rows: int
    width: int
    tokens: Tensor | None


@dataclass(frozen=True)
class Packed:
    """One pass: `tokens` tokens of whole records, user by user.

    Attributes:
        ids: Token ids, shape `(tokens,)`.
        users: Runs of one user each.
        records: Runs of one record each.
        positions: The token before each label, shape `(labels,)`.
        targets: The labels.
        weights: One over the number of labels of the label's record, shape `(labels,)`, float32.
        label_records: The record of each label.
        counts: Labels per record.
    """

    ids: Tensor
    users: Segments
    records: Segments
    positions: Tensor
    targets: Tensor
    weights: Tensor
    label_records: Tensor
    counts: NDArray[np.int64]

    @cached_property
    def _layout(self) -> tuple[tuple[Grid, ...], Tensor | None]:
        bounds = self.records.bounds.numpy()
        return _grids(np.diff(bounds), bounds[:-1], self.ids.device)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Rectangles for attention, for those who need them; together they hold every token once."""
        return self._layout[0]

    @property
    def places(self) -> Tensor | None:
        """Where each token lies in the grids laid end to end, shape `(tokens,)`; None for one full grid."""
        return self._layout[1]

    @property
    def padded_places(self) -> int:
        """Places of all grids, padding included."""
        return sum(grid.rows * grid.width for grid in self.grids)


def pack(rows: Sequence[Example], records_per_user: Sequence[int], device: torch.device) -> Packed:
    """Lay records end to end; `records_per_user` says how many of `rows`, in order, belong to each user."""
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    firsts = np.array([max(row.first_label, 1) for row in rows], dtype=np.int64)
    counts = np.maximum(lengths - firsts, 0)
    ids = np.concatenate([row.ids for row in rows]).astype(np.int64)
    label_records = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(label_records)) - np.repeat(np.cumsum(counts) - counts, counts)
    labels = (starts + firsts)[label_records] + within
    ends = np.cumsum(records_per_user)
    totals = np.add.reduceat(lengths, ends - np.asarray(records_per_user))
    return Packed(
        ids=torch.from_numpy(ids).to(device),
        users=Segments(totals, device),
        records=Segments(lengths, device),
        positions=torch.from_numpy(labels - 1).to(device),
        targets=torch.from_numpy(ids[labels]).to(device),
        weights=torch.from_numpy((1.0 / np.maximum(counts, 1))[label_records].astype(np.float64)).to(device),
        label_records=torch.from_numpy(label_records).to(device),
        counts=counts,
    )


def _grids(
    lengths: NDArray[np.int64], starts: NDArray[np.int64], device: torch.device
) -> tuple[tuple[Grid, ...], Tensor | None]:
    """Put records, longest first, into few rectangles with little padding."""
    widest = int(lengths.max())
    if (lengths == widest).all():
        return (Grid(len(lengths), widest, None),), None
    order = np.argsort(-lengths, kind="stable")
    cuts = _cuts(lengths[order])
    grids: list[Grid] = []
    places = np.empty(int(lengths.sum()), dtype=np.int64)
    before = 0
    for start, stop in zip(cuts, [*cuts[1:], len(order)], strict=True):
        members = order[start:stop]
        width = int(lengths[members[0]])
        offsets = np.arange(width)
        inside = offsets < lengths[members][:, None]
        tokens = starts[members][:, None] + offsets
        places[tokens[inside]] = before + np.flatnonzero(inside)
        grids.append(Grid(len(members), width, torch.from_numpy(np.where(inside, tokens, 0).ravel()).to(device)))
        before += len(members) * width
    return tuple(grids), torch.from_numpy(places).to(device)


def _cuts(lengths: NDArray[np.int64]) -> list[int]:
    """Where, in falling lengths, a new rectangle begins: where it saves enough places."""
    cuts = [0]
    while True:
        start = cuts[-1]
        width = int(lengths[start])
        rest = np.arange(start, len(lengths))
        saved = (len(lengths) - rest) * (width - lengths[start:])
        best = int(saved.argmax())
        if saved[best] < WORTH_A_GRID:
            return cuts
        cuts.append(start + best)


def runs(owner: NDArray[np.intp]) -> tuple[NDArray[np.intp], list[int]]:
    """Who comes in a row, and how often each."""
    starts = np.flatnonzero(np.diff(owner, prepend=owner[0] - 1))
    return owner[starts], np.diff(starts, append=len(owner)).tolist()


def passes(examples: Sequence[Example], owner: NDArray[np.intp], tokens: int) -> list[slice]:
    """Cut records in their order into passes of at most `tokens` tokens, between users where a user fits into one."""
    lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
    whole = np.bincount(owner, lengths, int(owner.max()) + 1)
    cuts: list[slice] = []
    start = held = 0
    for index, length in enumerate(lengths):
        begins = index == 0 or owner[index] != owner[index - 1]
        ahead = int(whole[owner[index]]) if begins and whole[owner[index]] <= tokens else int(length)
        if index > start and held + ahead > tokens:
            cuts.append(slice(start, index))
            start, held = index, 0
        held += int(length)
    cuts.append(slice(start, len(lengths)))
    return cuts


def by_length(examples: Sequence[Example], tokens: int) -> list[NDArray[np.intp]]:
    """Cut records, longest first, into passes of about `tokens` tokens, padding included."""
    lengths = np.array([len(example.ids) for example in examples], dtype=np.int64)
    order = np.argsort(-lengths, kind="stable")
    passes: list[NDArray[np.intp]] = []
    start = 0
    while start < len(order):
        rows = max(1, tokens // int(lengths[order[start]]))
        passes.append(order[start : start + rows])
        start += rows
    return passes
