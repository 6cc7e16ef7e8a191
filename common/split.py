"""A method laid over the tensors of one base: which numbers a device trains, sends and keeps, and where each belongs.

A device trains one *trained vector* in a round. Part of it is filled from what the server sent, part from what the
device kept, and the rest is public and drawn from the run's seed. What leaves is the change of the first part. All
three are positions in the trained vector, so nothing here is done twice in words and in code.

`flexlora` has no such positions: a server sends the product of both factors for every layer, a device cuts it by
singular value decomposition into factors of the rank it has, trains those, and sends the change of their product. A
product is linear in what each device adds, so sums, clip and noise mean what they mean everywhere else; the factors
are not.

Source: Bai et al. (2024), arXiv:2402.11505, for products cut to a rank; Eckart and Young (1936).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.adapters import Layout, TensorSpec, Vector, initial_vector
from common.errors import ConfigError
from common.methods import Method

__all__ = ["Split", "cut_to_rank", "public_start", "sent_layout", "split_of"]

SHARED_START, PRIVATE_START = 0x5EED, 0x9E50
"""Streams of the public seed: where shared adapters start, and private ones."""

PRODUCT = "lora_product"

Positions = NDArray[np.intp]


@dataclass(frozen=True)
class Split:
    """What a method means for adapters of one layout.

    Attributes:
        method: The row.
        layout: An adapter of the run's rank.
        trained: What a device trains in a round.
        sent: What leaves.
        shared: Where the numbers of `sent` lie in a trained vector, in order; empty for products.
        kept: Where what stays lies in a trained vector; empty where it is a vector of its own, or nothing.
        start: The public trained vector before anything was learned, shape `(trained.size,)`.
        scaling: LoRA's alpha / rank.
        ranks: Ranks that devices have; the run's own where all are alike.
    """

    method: Method
    layout: Layout
    trained: Layout
    sent: Layout
    shared: Positions
    kept: Positions
    start: Vector
    scaling: float
    ranks: tuple[int, ...]

    @property
    def kept_size(self) -> int:
        """Numbers that a device keeps from round to round."""
        return self.layout.size if self.method.keeps == "copy" else self.kept.size

    @cached_property
    def moved(self) -> NDArray[np.bool_]:
        """Which numbers of a trained vector the shared steps move, shape `(trained.size,)`."""
        return np.ones(self.trained.size, dtype=bool) if self.method.sends == "products" else self._mask(self.shared)

    @cached_property
    def own(self) -> NDArray[np.bool_]:
        """Which numbers of a trained vector stay on the device, shape `(trained.size,)`."""
        return self._mask(self.kept)

    @cached_property
    def in_adapter(self) -> NDArray[np.bool_]:
        """Which numbers of an adapter of `layout` move what leaves, shape `(layout.size,)`."""
        whole = self.trained != self.layout or self.method.sends == "products"
        return np.ones(self.layout.size, dtype=bool) if whole else self.moved

    def rank_of(self, user: str) -> int:
        """The rank that a device has: one of `ranks` by a hash of its name, so that everyone finds the same."""
        digest = hashlib.sha256(f"rank/{user}".encode()).digest()
        return self.ranks[int.from_bytes(digest[:8]) % len(self.ranks)]

    def starts(self, vector: Vector, users: Sequence[str], kept: Sequence[Vector | None]) -> NDArray[np.float32]:
        """Where each user's trained vector starts, shape `(users, trained.size)`; one row, read-only, if all are alike.

        Args:
            vector: What the server sent, shape `(sent.size,)`.
            users: Their names, which say what rank they have.
            kept: What each kept, shape `(kept_size,)`; None where there is nothing yet.
        """
        if self.method.sends == "products":
            factors = _factors(vector, self.sent, self.layout, self.scaling, self.start)
            cuts = {rank: factors * self.at_rank(rank) for rank in set(self.ranks)}
            return np.stack([cuts[self.rank_of(user)] for user in users])
        alike = self.start.copy()
        alike[self.shared] = vector
        if all(own is None for own in kept) or not self.kept.size:
            return np.broadcast_to(alike, (len(users), alike.size))
        starts = np.repeat(alike[np.newaxis], len(users), axis=0)
        if self.kept.size:
            for index, own in enumerate(kept):
                if own is not None:
                    starts[index, self.kept] = own
        return starts

    def learned(self, trained: NDArray[np.float32]) -> NDArray[Any]:
        """Where each user's training got to in what is shared, shape `(users, sent.size)`; a view where it can be."""
        if self.method.sends == "products":
            return np.stack([self._product(one) for one in trained])
        return trained if self._shares_all else trained[:, self.shared]

    @cached_property
    def _shares_all(self) -> bool:
        return np.array_equal(self.shared, np.arange(self.trained.size))

    def updates(self, trained: NDArray[np.float32], vector: Vector) -> NDArray[np.float64]:
        """What each user's training changed in what is shared, shape `(users, sent.size)`, not clipped yet."""
        return self.learned(trained).astype(np.float64) - vector

    def adapter(self, vector: Vector) -> Vector:
        """The shared part as an adapter of its own, shape `(layout.size,)`, with what stays at its neutral start."""
        if self.method.sends == "products":
            return _factors(vector, self.sent, self.layout, self.scaling, self.start)
        trained = self.start.copy()
        trained[self.shared] = vector
        if self.trained == self.layout:
            return trained
        return trained[self.shared]

    def vector_of(self, adapter: Vector) -> Vector:
        """What a server would send for an adapter of `layout`: what `adapter` makes an adapter of."""
        if self.method.sends == "products":
            return self._product(adapter).astype(np.float32)
        return adapter.copy() if self.trained != self.layout else adapter[self.shared]

    def over(self, trained: NDArray[np.float32], vector: Vector) -> NDArray[np.float32]:
        """What stays, as a private adapter over the shared one, shape `(users, over_layout.size)`.

        The shared adapter and this one add up to what the user uses: what stays alone where tensors or layers are
        disjoint, and for a copy the copy less the shared adapter, as one adapter of twice the rank.

        Args:
            trained: Each user's trained vector, or copy.
            vector: What the server sent, shape `(sent.size,)`.
        """
        if self.method.keeps == "copy":
            return np.stack([self._difference(one, vector) for one in trained])
        if self.method.keeps == "second adapter":
            return trained[:, self.kept]
        if self.method.keeps == "B":  # the shared adapter has B = 0 and changes nothing: A and B together are the rest
            return trained
        return np.where(self.own, trained, np.float32(0.0))

    @cached_property
    def over_rank(self) -> int | None:
        """Rank of what `over` returns; None where a method keeps nothing in rounds."""
        if not self.method.remembers:
            return None
        rank = _rank(self.layout)
        if self.method.keeps == "copy":
            return 2 * rank
        return _rank(self.trained) - rank if self.method.keeps == "second adapter" else rank

    def at_rank(self, rank: int) -> NDArray[np.bool_]:
        """Which numbers of an adapter of `layout` one of a smaller `rank` has, shape `(layout.size,)`."""
        mask = np.zeros(self.layout.size, dtype=bool)
        for tensor in self.layout.tensors:
            own = mask[self.layout.offsets[tensor.name]].reshape(tensor.shape)
            own[(slice(rank), slice(None)) if _is_a(tensor.name) else (slice(None), slice(rank))] = True
        return mask

    def _mask(self, positions: Positions) -> NDArray[np.bool_]:
        mask = np.zeros(self.trained.size, dtype=bool)
        mask[positions] = True
        return mask

    def _product(self, adapter: NDArray[np.float32]) -> NDArray[np.float64]:
        tensors = self.layout.split(adapter.astype(np.float64))
        pieces = [(self.scaling * tensors[b.name] @ tensors[a.name]).ravel() for a, b in _pairs(self.layout)]
        return np.concatenate(pieces)

    def _difference(self, copy: NDArray[np.float32], vector: Vector) -> NDArray[np.float32]:
        mine, shared = self.layout.split(copy), self.layout.split(vector)
        pieces: list[NDArray[np.float32]] = []
        for a, b in _pairs(self.layout):
            pieces.append(np.concatenate([mine[a.name], shared[a.name]], axis=0).ravel())
            pieces.append(np.concatenate([mine[b.name], -shared[b.name]], axis=1).ravel())
        return np.concatenate(pieces)


def split_of(method: Method, layout: Layout, recipe: Mapping[str, float | int | str]) -> Split:
    """Lay `method` over adapters of `layout`, by the public facts of a release spec's recipe.

    Raises:
        ConfigError: The recipe does not say what the method needs, or says what the base has not.
    """
    scaling = float(recipe["scaling"])
    sent = sent_layout(method, layout, int(recipe.get("shared_layers", 0)))
    everywhere = np.arange(layout.size)
    nothing = np.zeros(0, dtype=np.intp)
    ranks = _ranks(recipe.get("ranks", ""), _rank(layout)) if method.sends == "products" else (_rank(layout),)

    def split(trained: Layout, shared: Positions, kept: Positions, start: Vector) -> Split:
        return Split(method, layout, trained, sent, shared, kept, start, scaling, ranks)

    if method.sends in ("nothing", "A and B") and method.keeps != "second adapter":
        return split(layout, everywhere if method.shared else nothing, nothing, np.zeros(layout.size, np.float32))
    if "start_seed" not in recipe:
        raise ConfigError(f"method {method.name}: the recipe names no public seed, which frozen and private parts need")
    seed = int(recipe["start_seed"])
    start = public_start(layout, seed)
    if method.sends == "products":
        return split(layout, nothing, nothing, start)
    if method.keeps == "second adapter":
        second = _of_rank(layout, int(recipe.get("personal_rank", 0)) or _rank(layout))
        wide, first, rest = _beside(layout, second)
        whole = np.empty(wide.size, np.float32)
        whole[first] = start
        whole[rest] = initial_vector(second, np.random.default_rng([seed, PRIVATE_START]))
        return split(wide, first, rest, whole)
    shared = np.concatenate([everywhere[layout.offsets[tensor.name]] for tensor in sent.tensors] or [nothing])
    kept = np.setdiff1d(everywhere, shared) if method.keeps in ("B", "upper layers") else nothing
    return split(layout, shared, kept, start)


def sent_layout(method: Method, layout: Layout, shared_layers: int = 0) -> Layout:
    """What leaves of an adapter of `layout`.

    Args:
        method: The row.
        layout: Of a whole adapter.
        shared_layers: For rows that share lower layers, how many; half of them, rounded down, when 0.

    Raises:
        ConfigError: There are not so many layers.
    """
    if method.sends == "products":
        shapes = [TensorSpec(_product_name(a.name), (b.shape[0], a.shape[1])) for a, b in _pairs(layout)]
        return Layout(tuple(shapes))
    if method.sends != "lower layers":
        factors = {"nothing": "", "A and B": "AB", "A": "A", "B": "B"}[method.sends]
        return layout.select(
            tensor.name for tensor in layout.tensors if ("A" if _is_a(tensor.name) else "B") in factors
        )
    numbers = sorted({_layer(tensor.name) for tensor in layout.tensors})
    count = shared_layers or len(numbers) // 2
    if not 1 <= count < len(numbers):
        raise ConfigError(
            f"shared_layers: {count} of {len(numbers)} layers would be shared; at least one is, and one stays private"
        )
    lower = set(numbers[:count])
    return layout.select(tensor.name for tensor in layout.tensors if _layer(tensor.name) in lower)


def public_start(layout: Layout, seed: int) -> Vector:
    """Where the shared adapter of a run starts, the same on every machine, shape `(layout.size,)`."""
    return initial_vector(layout, np.random.default_rng([seed, SHARED_START]))


def cut_to_rank(vector: Vector, sent: Layout, rank: int) -> Vector:
    """Bring every product in `vector` to at most `rank`, the nearest such matrix; other tensors stay as they are.

    Source: Eckart and Young (1936), Psychometrika 1(3).
    """
    if not any(PRODUCT in tensor.name for tensor in sent.tensors):
        return vector
    cut = vector.copy()
    for tensor in sent.tensors:
        if PRODUCT in tensor.name:
            own = sent.offsets[tensor.name]
            left, sizes, right = np.linalg.svd(
                vector[own].reshape(tensor.shape).astype(np.float64), full_matrices=False
            )
            cut[own] = ((left[:, :rank] * sizes[:rank]) @ right[:rank]).ravel()
    return cut


def _factors(vector: Vector, sent: Layout, layout: Layout, scaling: float, start: Vector) -> Vector:
    """Factors of `layout` whose product, times scaling, is nearest to that in `vector`.

    Larger singular values come first, so that the first rows of A and columns of B are the nearest factors of every
    smaller rank. Where a product has too small a rank, A goes on with the rows of `start` and B with zeros: nothing
    changes, and the rest can still learn.
    """
    products, starts = sent.split(vector), layout.split(start)
    adapter = np.empty(layout.size, np.float32)
    for a, b in _pairs(layout):
        rank = a.shape[0]
        product = products[_product_name(a.name)].astype(np.float64)
        left, sizes, right = np.linalg.svd(product, full_matrices=False)
        down = starts[a.name].astype(np.float64).copy()
        up = np.zeros(b.shape)
        there = min(rank, int((sizes > 1e-6 * max(float(sizes[0]), 1e-30)).sum()))
        down[:there] = right[:there]
        up[:, :there] = left[:, :there] * sizes[:there] / scaling
        adapter[layout.offsets[a.name]] = down.ravel()
        adapter[layout.offsets[b.name]] = up.ravel()
    return adapter


def _beside(one: Layout, other: Layout) -> tuple[Layout, Positions, Positions]:
    """Lay two adapters over the same layers as one of their summed rank; where the numbers of each lie in it."""
    tensors: list[TensorSpec] = []
    for a, b in zip(one.tensors, other.tensors, strict=True):
        (rows, columns), (more_rows, more_columns) = a.shape, b.shape
        shape = (rows + more_rows, columns) if _is_a(a.name) else (rows, columns + more_columns)
        tensors.append(TensorSpec(a.name, shape))
    wide = Layout(tuple(tensors))
    places = wide.split(np.arange(wide.size))
    first: list[Positions] = []
    second: list[Positions] = []
    for tensor in one.tensors:
        own, rank = places[tensor.name], _rank(one)
        parts = (own[:rank], own[rank:]) if _is_a(tensor.name) else (own[:, :rank], own[:, rank:])
        first.append(parts[0].ravel())
        second.append(parts[1].ravel())
    return wide, np.concatenate(first), np.concatenate(second)


def _of_rank(layout: Layout, rank: int) -> Layout:
    return Layout(
        tuple(
            TensorSpec(tensor.name, (rank, tensor.shape[1]) if _is_a(tensor.name) else (tensor.shape[0], rank))
            for tensor in layout.tensors
        )
    )


def _ranks(text: Any, rank: int) -> tuple[int, ...]:
    try:
        ranks = tuple(int(part) for part in str(text).split(",") if part.strip()) or (max(1, rank // 2), rank)
    except ValueError:
        ranks = (0,)
    if not all(1 <= one <= rank for one in ranks):
        raise ConfigError(f"ranks: every device's rank is between 1 and the run's rank, {rank}")
    return ranks


def _pairs(layout: Layout) -> list[tuple[TensorSpec, TensorSpec]]:
    """The factors A and B of every layer."""
    return list(zip(layout.tensors[::2], layout.tensors[1::2], strict=True))


def _rank(layout: Layout) -> int:
    return layout.tensors[0].shape[0]


def _is_a(name: str) -> bool:
    return ".lora_A." in name


def _product_name(name: str) -> str:
    return name.replace("lora_A", PRODUCT)


def _layer(name: str) -> int:
    """The number of a tensor's layer."""
    return next((int(part) for part in name.split(".") if part.isdigit()), 0)
