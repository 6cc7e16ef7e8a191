"""The one trainer: a cohort of users' adapters, stacked on one frozen base. A device is a cohort of one.

The loss of an example is the mean over its own labelled tokens; examples are summed, never averaged over a batch's
tokens, so that no example changes what another contributes. Logits exist at labelled positions only. Padding is on
the right, where causal attention does not look.

`fit` trains what whole-update clipping will bound (crowd mode) or what never leaves (private adapters).
`fit_example_dp` is DP-SGD over records (silo mode): Poisson batches, one clip per record over everything trainable,
noise every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from client.base_model import BaseModel
from client.lora import StackedLora
from common.adapters import Layout, Vector, lora_layout
from common.privacy import Randomness
from common.promise import check_noise

__all__ = ["Example", "ExamplePromise", "Recipe", "Scores", "StackedOptimizer", "Trainer", "batch_order"]

TRAINED_TOKENS, SCORED_TOKENS = 512, 2048
"""Tokens of one pass: what stays in a core's cache at small widths, and is enough to keep it busy."""


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


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained: optimizer steps, records per step, and the optimizer."""

    steps: int
    batch: int
    learning_rate: float
    optimizer: str = "sgd"
    gradient_clip: float | None = None


@dataclass(frozen=True)
class ExamplePromise:
    """What DP-SGD keeps: the clip of one record's gradient, the noise over it, and the public Poisson rate."""

    clip: float
    noise_multiplier: float
    rate: float


@dataclass(frozen=True)
class Scores:
    """What one system says about some records: arrays of shape `(records,)` in the order they came.

    Attributes:
        nats: Summed negative log-likelihood of the labelled tokens.
        tokens: Number of labelled tokens.
        correct: Labelled tokens that were the model's first choice.
        exact: Whether every labelled token was.
    """

    nats: NDArray[np.float64]
    tokens: NDArray[np.int64]
    correct: NDArray[np.int64]

    @property
    def exact(self) -> NDArray[np.bool_]:
        """Records whose every labelled token was the first choice."""
        return self.correct == self.tokens


@dataclass(frozen=True)
class _Batch:
    ids: Tensor  # (rows, tokens)
    positions: Tensor  # (labels,) into the flattened rows, of the token before each label
    targets: Tensor  # (labels,)
    rows: Tensor  # (labels,) row of each label
    counts: Tensor  # (rows,) labels per row


class Trainer:
    """Trains and scores adapters of one rank on one base.

    Attributes:
        layout: The adapter's tensors.
        scaling: LoRA's alpha / rank.
    """

    def __init__(self, base: BaseModel, *, rank: int, scaling: float) -> None:
        """Lay adapters of `rank` over the target layers of `base`."""
        self.base = base
        self.scaling = scaling
        self.layout: Layout = lora_layout(base.modules, rank)
        self._lora = _lora_of(base)
        self._pad = int(base.tokenizer.pad_token_id or 0)

    def fit(
        self,
        start: NDArray[np.float32],
        examples: Sequence[Sequence[Example]],
        recipe: Recipe,
        orders: Sequence[np.random.Generator],
        *,
        under: tuple[Vector, Layout, float] | None = None,
        trainable: NDArray[np.bool_] | None = None,
        anchor: tuple[Vector, float] | None = None,
    ) -> NDArray[np.float32]:
        """Train one adapter per user, all at once, and return them, shape `(users, layout.size)`.

        Args:
            start: Where each adapter starts, shape `(users, size)` or, for all alike, `(size,)`.
            examples: Each user's records; at least one each.
            recipe: Steps, batch and optimizer; a user with fewer records than a batch sees some twice.
            orders: One generator per user for the order of its records.
            under: A frozen adapter below the trained one: vector, layout, scaling.
            trainable: Which of the `size` values may move; all when absent.
            anchor: A vector of shape `(size,)` and the weight of half the squared distance to it (Ditto's proximal
                term).
        """
        users = len(examples)
        device = self.base.device
        theta = self.stacked(start, users)
        mask = None if trainable is None else torch.as_tensor(trainable, device=device)
        pull = None if anchor is None else (torch.as_tensor(anchor[0], device=device, dtype=self._dtype), anchor[1])
        optimizer = StackedOptimizer(recipe)
        picks = [
            batch_order(len(own), recipe.steps, recipe.batch, order)
            for own, order in zip(examples, orders, strict=True)
        ]
        with self.over_base(under):
            for step in range(recipe.steps):
                rows = [own[i] for own, pick in zip(examples, picks, strict=True) for i in pick[step]]
                gradient = self._gradient(rows, np.repeat(np.arange(users), recipe.batch), theta) / recipe.batch
                with torch.no_grad():
                    if pull is not None:
                        gradient = gradient + pull[1] * (theta - pull[0])
                    if mask is not None:
                        gradient = gradient * mask
                    optimizer.step(theta, gradient)
        return theta.detach().cpu().numpy().astype(np.float32, copy=False)

    def at_rank(self, rank: int) -> Trainer:
        """The same trainer for adapters of another rank on the same base."""
        return type(self)(self.base, rank=rank, scaling=self.scaling)

    def fit_example_dp(
        self,
        start: Vector,
        examples: Sequence[Example],
        recipe: Recipe,
        promise: ExamplePromise,
        randomness: Randomness,
        *,
        trainable: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float32]:
        """Train one adapter by DP-SGD over records; returns shape `(layout.size,)`.

        Every step takes each record by a coin of its own, clips each record's gradient over all tensors, adds Gaussian
        noise to the sum and divides by the public expected batch. An empty batch is a step of noise alone.

        Guarantee: each step is one Poisson-sampled Gaussian mechanism of `promise`, whatever the records are: rate,
            divisor and number of steps come from the recipe, and nothing else of the records is looked at.

        Raises:
            ClaimRefused: What was drawn is not the noise that was promised.

        Source: Abadi et al. (2016), arXiv:1607.00133, algorithm 1.
        """
        theta = torch.as_tensor(start, device=self.base.device, dtype=self._dtype)[None].clone()
        optimizer = StackedOptimizer(recipe)
        mask = np.ones(self.layout.size, dtype=bool) if trainable is None else trainable
        scale = promise.noise_multiplier * promise.clip
        for _ in range(recipe.steps):
            batch = [examples[int(i)] for i in randomness.poisson_sample(len(examples), promise.rate)]
            vector = theta[0].cpu().numpy().astype(np.float32)
            total = self.clipped_gradient_sum(vector, batch, promise.clip, trainable=mask)
            if scale > 0:
                noise = scale * randomness.normal(self.layout.size)
                check_noise(noise, scale)
                total += noise * mask
            gradient = torch.as_tensor(total / recipe.batch, device=self.base.device, dtype=self._dtype)
            optimizer.step(theta, gradient[None])
        return theta[0].cpu().numpy().astype(np.float32)

    def clipped_gradient_sum(
        self,
        vector: Vector,
        examples: Sequence[Example],
        clip_norm: float,
        *,
        trainable: NDArray[np.bool_] | None = None,
    ) -> NDArray[np.float64]:
        """Sum the gradients of `examples` at `vector`, each clipped to L2 norm `clip_norm`; shape `(size,)`, float64.

        Guarantee: removing one example moves the result by at most `clip_norm`: the loss is per example, examples
            share no row, the clip spans all trainable tensors, and a non-finite gradient counts as zero. No example
            at all gives zeros.
        """
        total = np.zeros(self.layout.size)
        gradients = self.example_gradients(vector, examples)
        if gradients.shape[0] == 0:
            return total
        if trainable is not None:
            gradients = gradients * trainable
        gradients[~np.isfinite(gradients).all(axis=1)] = 0.0
        norms = np.linalg.norm(gradients, axis=1)
        factors = np.minimum(1.0, clip_norm * (1.0 - 1e-12) / np.maximum(norms, np.finfo(np.float64).tiny))
        return factors @ gradients

    def example_gradients(self, vector: Vector, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Gradient of each example's loss at `vector`, shape `(examples, size)`, in one backward pass."""
        if not examples:
            return np.zeros((0, self.layout.size))
        theta = torch.as_tensor(vector, device=self.base.device, dtype=self._dtype)[None].clone().requires_grad_(True)
        with self._lora.per_example() as collected:
            loss = self._example_losses(examples, np.zeros(len(examples), dtype=np.intp), theta).sum()
            torch.autograd.grad(loss, theta)
        return self._lora.flatten(collected, self.scaling).double().cpu().numpy()

    @torch.no_grad()
    def score(
        self,
        examples: Sequence[Example],
        *,
        adapters: NDArray[np.float32] | None = None,
        owner: NDArray[np.intp] | None = None,
        under: tuple[Vector, Layout, float] | None = None,
    ) -> Scores:
        """Score records of many users in few passes, sorted by length so that there is little padding.

        Args:
            examples: Records of any users.
            adapters: Adapters, shape `(users, size)`; none when absent.
            owner: For each record, which of `adapters` it is scored with.
            under: A frozen adapter below: vector, layout, scaling.
        """
        count = len(examples)
        nats = np.zeros(count)
        correct = np.zeros(count, dtype=np.int64)
        tokens = np.zeros(count, dtype=np.int64)
        stacked = None
        if adapters is not None:
            stacked = torch.as_tensor(adapters, device=self.base.device, dtype=self._dtype)
        with self.over_base(under):
            for rows in _by_length(examples, SCORED_TOKENS):
                batch = self._collate([examples[i] for i in rows])
                if stacked is not None and owner is not None:
                    self._lora.lay_over(self._lora.factors(stacked[owner[rows]], self.layout, self.scaling))
                else:
                    self._lora.lay_over()
                logits = self._labelled_logits(batch)
                losses = F.cross_entropy(logits.float(), batch.targets, reduction="none").double()
                hits = logits.argmax(dim=1) == batch.targets
                size = len(rows)
                nats[rows] = losses.new_zeros(size).index_add_(0, batch.rows, losses).cpu().numpy()
                correct[rows] = (
                    torch.zeros(size, device=hits.device).index_add_(0, batch.rows, hits.float()).cpu().numpy()
                )
                tokens[rows] = batch.counts.cpu().numpy()
        self._lora.lay_over()
        return Scores(nats, tokens, correct)

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.base.model.parameters()).dtype

    def over_base(self, adapter: tuple[Vector, Layout, float] | None) -> AbstractContextManager[None]:
        """Add one adapter (vector, layout, scaling) into the base for a block; None leaves the base as it is."""
        if adapter is None:
            return self._lora.merged(None, self.layout, self.scaling)
        vector, layout, scaling = adapter
        return self._lora.merged(torch.as_tensor(vector, device=self.base.device, dtype=self._dtype), layout, scaling)

    def _gradient(self, rows: Sequence[Example], owner: NDArray[np.intp], theta: Tensor) -> Tensor:
        """Gradient of the summed losses with respect to each adapter, shape `(users, size)`.

        Rows are passed longest first in pieces of like length, so there is little padding and a piece stays in the
        cache.
        """
        total = torch.zeros_like(theta)
        for piece in _by_length(rows, TRAINED_TOKENS):
            piece = np.sort(piece)  # rows of one user lie together again
            loss = self._example_losses([rows[i] for i in piece], owner[piece], theta).sum()
            total += torch.autograd.grad(loss, theta)[0]
        return total

    def _example_losses(self, rows: Sequence[Example], owner: NDArray[np.intp], theta: Tensor) -> Tensor:
        """Loss of each row, shape `(rows,)`, under the adapter of `theta` that `owner` names."""
        counts = [len(row.ids) - max(row.first_label, 1) for row in rows]
        return self.nats(theta, rows, owner) / torch.tensor(counts, device=theta.device).clamp(min=1)

    def stacked(self, vectors: NDArray[np.float32], users: int) -> Tensor:
        """Lay adapters out as one leaf that can be trained, shape `(users, size)`; one vector serves all users."""
        theta = torch.as_tensor(vectors, device=self.base.device, dtype=self._dtype)
        return theta.expand(users, -1).clone().requires_grad_(True)

    def nats(self, theta: Tensor, rows: Sequence[Example], owner: NDArray[np.intp]) -> Tensor:
        """Summed negative log-likelihood of each row's labels, shape `(rows,)`; differentiable in `theta`.

        Args:
            theta: Stacked adapters, shape `(users, size)`.
            rows: Records.
            owner: For each record, which adapter of `theta` lies over it.
        """
        batch = self._collate(rows)
        self._lora.lay_over(self._lora.factors(_of_owners(theta, owner), self.layout, self.scaling))
        losses = F.cross_entropy(self._labelled_logits(batch), batch.targets, reduction="none")
        self._lora.lay_over()
        return losses.new_zeros(len(rows)).index_add(0, batch.rows, losses)

    def _labelled_logits(self, batch: _Batch) -> Tensor:
        hidden = self.base.hidden(batch.ids).flatten(0, 1)
        return self.base.logits(hidden.index_select(0, batch.positions))

    def _collate(self, rows: Sequence[Example]) -> _Batch:
        width = max(len(row.ids) for row in rows)
        ids = np.full((len(rows), width), self._pad, dtype=np.int64)
        positions: list[NDArray[np.intp]] = []
        targets: list[NDArray[np.int32]] = []
        counts = np.empty(len(rows), dtype=np.int64)
        for index, row in enumerate(rows):
            length = len(row.ids)
            first = max(row.first_label, 1)
            ids[index, :length] = row.ids
            positions.append(np.arange(first - 1, length - 1) + index * width)
            targets.append(row.ids[first:])
            counts[index] = length - first
        device = self.base.device
        return _Batch(
            ids=torch.from_numpy(ids).to(device),
            positions=torch.from_numpy(np.concatenate(positions)).to(device),
            targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device),
            rows=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(device),
            counts=torch.from_numpy(counts).to(device),
        )


class StackedOptimizer:
    """SGD or Adam on stacked parameters, shape `(users, size)`; every user as if alone.

    Source: Kingma and Ba (2015), arXiv:1412.6980.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._first: Tensor | None = None
        self._second: Tensor | None = None
        self._steps = 0

    def step(self, theta: Tensor, gradient: Tensor) -> None:
        """Move `theta` in place, against `gradient` of the same shape."""
        if self._recipe.gradient_clip is not None:
            norms = gradient.norm(dim=1, keepdim=True).clamp(min=1e-30)
            gradient = gradient * (self._recipe.gradient_clip / norms).clamp(max=1.0)
        rate = self._recipe.learning_rate
        if self._recipe.optimizer == "sgd":
            theta.sub_(rate * gradient)
            return
        if self._first is None or self._second is None:
            self._first, self._second = torch.zeros_like(theta), torch.zeros_like(theta)
        self._steps += 1
        self._first.mul_(0.9).add_(gradient, alpha=0.1)
        self._second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
        mean = self._first / (1 - 0.9**self._steps)
        spread = (self._second / (1 - 0.999**self._steps)).sqrt_()
        theta.sub_(rate * mean / (spread + 1e-8))


def batch_order(count: int, steps: int, batch: int, order: np.random.Generator) -> NDArray[np.intp]:
    """Which records each step takes, shape `(steps, batch)`: one permutation after the other, cut into batches."""
    needed = steps * batch
    rounds = math.ceil(needed / count)
    return np.concatenate([order.permutation(count) for _ in range(rounds)])[:needed].reshape(steps, batch)


def _of_owners(theta: Tensor, owner: NDArray[np.intp]) -> Tensor:
    """Adapters of the groups of rows: one group per user where users have equal runs of rows, else one per row."""
    users = theta.shape[0]
    if len(owner) % users == 0 and (owner == np.repeat(np.arange(users), len(owner) // users)).all():
        return theta
    return theta.index_select(0, torch.from_numpy(owner).to(theta.device))


def _by_length(examples: Sequence[Example], tokens: int) -> list[NDArray[np.intp]]:
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


def _lora_of(base: BaseModel) -> StackedLora:
    """Wrap the base once; trainers of several ranks share the wrapped layers."""
    existing = getattr(base.model, "_homespun_lora", None)
    if existing is None:
        existing = StackedLora(base.model, [module.name for module in base.modules])
        base.model._homespun_lora = existing
    return existing
