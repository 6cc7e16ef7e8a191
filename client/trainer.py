"""The one trainer: a cohort of users' adapters, stacked on one frozen base. A device is a cohort of one.

The loss of an example is the mean over its own labelled tokens; examples are summed, never averaged over a batch's
tokens, so that no example changes what another contributes. Logits exist at labelled positions only. Padding is on
the right, where causal attention does not look.

`fit` trains what whole-update clipping will bound (crowd mode) or what never leaves (private adapters).
`fit_example_dp` is DP-SGD over records (silo mode): Poisson batches, one clip per record over everything trainable,
noise every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from client.base_model import BaseModel
from client.label_loss import Scores, label_scores, loss_gradient
from client.llama_pass import Factors, LlamaPass, StackedGradients
from client.lora import StackedLora, of_owners
from client.native import keep_freed_memory
from client.optimizers import Recipe, StackedOptimizer, batch_order
from client.packing import Example, Packed, by_length, pack, passes, runs
from client.round_progress import PartProgress
from common.adapters import Layout, Vector, lora_layout
from common.privacy import Randomness
from common.promise import check_noise

__all__ = ["Example", "ExamplePromise", "Recipe", "Scores", "Trainer", "batch_order"]

TRAINED_TOKENS, SCORED_TOKENS = 1024, 2048
"""Tokens of one pass where nobody measured: what stays near a core at small widths, and is enough to keep it busy."""

DEVICE_TOKENS = 1 << 15
"""The same on a GPU, whose memory and many cores want long passes."""

CHECKPOINTED_WIDTH = 1024
"""From this hidden size on only the inputs of layers are kept for the way back (gradient checkpointing)."""


@dataclass(frozen=True)
class ExamplePromise:
    """What DP-SGD keeps: the clip of one record's gradient, the noise over it, and the public Poisson rate."""

    clip: float
    noise_multiplier: float
    rate: float


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
        pass_tokens: Tokens of one training pass.
    """

    def __init__(self, base: BaseModel, *, rank: int, scaling: float, pass_tokens: int | None = None) -> None:
        """Lay adapters of `rank` over the target layers of `base`.

        `pass_tokens` bounds the tokens of one training pass; a record alone may be longer.
        """
        self.base = base
        self.scaling = scaling
        self.layout: Layout = lora_layout(base.modules, rank)
        on_gpu = base.device.type == "cuda"
        self.pass_tokens = pass_tokens or (DEVICE_TOKENS if on_gpu else TRAINED_TOKENS)
        self._scored_tokens = DEVICE_TOKENS if on_gpu else SCORED_TOKENS
        keep_freed_memory()
        self._lora = _lora_of(base)
        self._fast = _pass_of(base)
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
        steps: Sequence[int] | None = None,
        progress: PartProgress | None = None,
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
            steps: Each user's own number of steps, instead of the recipe's; who is done leaves the stack.
            progress: Goes on where an earlier call was interrupted, and may end the training early.
        """
        users = len(examples)
        taken = np.full(users, recipe.steps) if steps is None else np.asarray(steps)
        picks = [
            batch_order(len(own), int(count), recipe.batch, order)
            for own, order, count in zip(examples, orders, taken, strict=True)
        ]
        # Who takes most steps comes first, so that whoever is done leaves from the end; then like beside like.
        tokens = np.array([sum(len(one.ids) for one in own) / len(own) for own in examples])
        ranked = np.lexsort((-tokens, -taken))
        device = self._device
        if start.ndim == 2 and start.strides[0] == 0:  # one row, shown as many
            start = start[0].copy()
        initial = torch.as_tensor(start, device=device, dtype=self._dtype).expand(users, -1)
        theta = initial[torch.from_numpy(ranked).to(device)]
        mask = None if trainable is None else torch.as_tensor(trainable, device=device)
        pull = None if anchor is None else (torch.as_tensor(anchor[0], device=device, dtype=self._dtype), anchor[1])
        optimizer, count = StackedOptimizer(recipe), int(taken.max(initial=0))
        with self.over_base(under):
            for step in range(optimizer.resume(theta, count, progress), count):
                active = int((taken > step).sum())
                rows = [examples[user][i] for user in ranked[:active] for i in picks[user][step]]
                owner = np.repeat(np.arange(active), recipe.batch)
                moving = theta[:active]
                gradient = self._gradient(rows, owner, moving) / recipe.batch
                if pull is not None:
                    gradient = gradient + pull[1] * (moving - pull[0])
                if mask is not None:
                    gradient = gradient * mask
                optimizer.step(moving, gradient)
                if progress and not progress.after(step + 1, count, lambda: optimizer.arrays(theta)):
                    break
        found: NDArray[np.float32] = theta.cpu().numpy()  # float64 on a base of that type
        trained = np.empty_like(found)
        trained[ranked] = found
        return trained

    def at_rank(self, rank: int) -> Trainer:
        """The same trainer for adapters of another rank on the same base."""
        other = type(self)(self.base, rank=rank, scaling=self.scaling)
        other.pass_tokens = self.pass_tokens
        return other

    def compile(self) -> bool:
        """Compile the pass from now on, for passes without gaps; False where the base has no pass by hand."""
        if self._fast is not None:
            self._fast.compiled = True
        return self._fast is not None

    def fit_example_dp(
        self,
        start: Vector,
        examples: Sequence[Example],
        recipe: Recipe,
        promise: ExamplePromise,
        randomness: Randomness,
        *,
        trainable: NDArray[np.bool_] | None = None,
        progress: PartProgress | None = None,
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
        theta = torch.as_tensor(np.array(start), device=self._device, dtype=self._dtype)[None]
        optimizer = StackedOptimizer(recipe)
        mask = np.ones(self.layout.size, dtype=bool) if trainable is None else trainable
        scale = promise.noise_multiplier * promise.clip
        for step in range(optimizer.resume(theta, recipe.steps, progress), recipe.steps):
            batch = [examples[int(i)] for i in randomness.poisson_sample(len(examples), promise.rate)]
            vector = theta[0].cpu().numpy().astype(np.float32)
            total = self.clipped_gradient_sum(vector, batch, promise.clip, trainable=mask)
            if scale > 0:
                noise = scale * randomness.normal(self.layout.size)
                check_noise(noise, scale)
                total += noise * mask
            gradient = torch.as_tensor(total / recipe.batch, device=self._device, dtype=self._dtype)
            optimizer.step(theta, gradient[None])
            if progress:
                progress.after(step + 1, recipe.steps, lambda: optimizer.arrays(theta))
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
        """Gradient of each example's loss at `vector`, shape `(examples, size)`; one backward finds many."""
        if not examples:
            return np.zeros((0, self.layout.size))
        theta = torch.as_tensor(vector, device=self._device, dtype=self._dtype)[None]
        cut = passes(examples, np.zeros(len(examples), dtype=np.intp), self.pass_tokens)
        return np.concatenate([self._apart(examples[piece], theta).double().cpu().numpy() for piece in cut])

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
        if adapters is not None and owner is not None:
            stacked = torch.as_tensor(adapters, device=self._device, dtype=self._dtype)
        with self.over_base(under):
            for rows in self._scored_rows(examples, None if stacked is None else owner):
                chosen = [examples[i] for i in rows]
                own = None if owner is None else owner[rows]
                hidden, targets, records, counts = self._labelled(chosen, own, stacked)
                losses, hits = label_scores(hidden, self.base.logits, targets)
                nats[rows] = np.bincount(records, losses.cpu().numpy(), len(rows))
                correct[rows] = np.bincount(records, hits.cpu().numpy(), len(rows))
                tokens[rows] = counts
        self._lora.lay_over()
        return Scores(nats, tokens, correct)

    def _scored_rows(self, examples: Sequence[Example], owner: NDArray[np.intp] | None) -> list[NDArray[np.intp]]:
        """Passes of records: by length where all have one model, else user by user."""
        if self._fast is None or owner is None:
            return by_length(examples, self._scored_tokens)
        order = np.argsort(owner, kind="stable")
        cut = passes([examples[i] for i in order], owner[order], self._scored_tokens)
        return [order[piece] for piece in cut]

    def _labelled(
        self, rows: Sequence[Example], owner: NDArray[np.intp] | None, adapters: Tensor | None
    ) -> tuple[Tensor, Tensor, NDArray[np.int64], NDArray[np.int64]]:
        """Final hidden states at the labels, the labels, the record of each, and labels per record."""
        if self._takes(rows):
            names, sizes = runs(np.zeros(len(rows), dtype=np.intp) if adapters is None or owner is None else owner)
            packed = pack(rows, sizes, self._device)
            factors = {} if adapters is None else self._factors(adapters[torch.from_numpy(names).to(adapters.device)])
            hidden = self._passing().labelled(packed, factors)
            return hidden, packed.targets, packed.label_records.cpu().numpy(), packed.counts
        batch = self._collate(rows)
        if adapters is None or owner is None:
            self._lora.lay_over()
        else:
            each = adapters[torch.from_numpy(owner).to(adapters.device)]
            self._lora.lay_over(self._lora.factors(each.to(self._weights_dtype), self.layout, self.scaling))
        hidden = self.base.hidden(batch.ids).flatten(0, 1).index_select(0, batch.positions)
        return hidden, batch.targets, batch.rows.cpu().numpy(), batch.counts.cpu().numpy()

    @cached_property
    def _weights_dtype(self) -> torch.dtype:
        return next(self.base.model.parameters()).dtype

    @cached_property
    def _device(self) -> torch.device:
        return self.base.device

    @property
    def _dtype(self) -> torch.dtype:
        """Type of adapters in training: the base's, but never below float32, where small steps would be lost."""
        return torch.promote_types(self._weights_dtype, torch.float32)

    def over_base(self, adapter: tuple[Vector, Layout, float] | None) -> AbstractContextManager[None]:
        """Add one adapter (vector, layout, scaling) into the base for a block; None leaves the base as it is."""
        if adapter is None:
            return self._lora.merged(None, self.layout, self.scaling)
        vector, layout, scaling = adapter
        return self._lora.merged(
            torch.as_tensor(vector, device=self._device, dtype=self._weights_dtype), layout, scaling
        )

    def lay_over_rows(self, adapters: NDArray[np.float32] | None, owner: NDArray[np.intp] | None) -> None:
        """Lay each row's adapter over the base, for its own forward on just those rows; None takes adapters off."""
        if adapters is None or owner is None:
            return self._lora.lay_over()
        each = torch.as_tensor(adapters[owner], device=self.base.device, dtype=self._weights_dtype)
        return self._lora.lay_over(self._lora.factors(each, self.layout, self.scaling))

    @torch.no_grad()
    def _gradient(self, rows: Sequence[Example], owner: NDArray[np.intp], theta: Tensor) -> Tensor:
        """Gradient of the summed losses with respect to each adapter, shape `(users, size)`; `owner` does not fall."""
        total = torch.zeros_like(theta)
        if not self._takes(rows):
            for piece in by_length(rows, self.pass_tokens):
                piece = np.sort(piece)  # rows of one user lie together again
                with torch.enable_grad():
                    leaf = theta.detach().requires_grad_()
                    loss = self.example_losses([rows[i] for i in piece], owner[piece], leaf).sum()
                    total += torch.autograd.grad(loss, leaf)[0]
            return total
        for piece in passes(rows, owner, self.pass_tokens):
            names, sizes = runs(owner[piece])
            here = slice(int(names[0]), int(names[-1]) + 1)
            packed = pack(rows[piece], sizes, self._device)
            self._train(packed, theta[here], StackedGradients(total[here], self._offsets, self.scaling))
        return total

    @torch.no_grad()
    def _apart(self, rows: Sequence[Example], theta: Tensor) -> Tensor:
        """Gradient of each row's loss at the one adapter `theta`, shape `(rows, size)`."""
        if self._takes(rows):
            found = theta.new_zeros(len(rows), self.layout.size)
            packed = pack(rows, [len(rows)], self._device)
            self._train(packed, theta, StackedGradients(found, self._offsets, self.scaling, per_record=True))
            return found
        with torch.enable_grad(), self._lora.per_example() as collected:
            leaf = theta.detach().requires_grad_()
            loss = self.example_losses(rows, np.zeros(len(rows), dtype=np.intp), leaf).sum()
            torch.autograd.grad(loss, leaf)
        return self._lora.flatten(collected, self.scaling)

    def _train(self, packed: Packed, theta: Tensor, sink: StackedGradients) -> None:
        head: Tensor = self.base.model.get_output_embeddings().weight

        def loss(hidden: Tensor) -> Tensor:
            return loss_gradient(hidden, head, packed.targets, packed.weights)

        self._passing().train(packed, self._factors(theta), sink, loss)

    def _takes(self, rows: Sequence[Example]) -> bool:
        """Whether the pass by hand can do these rows."""
        longest = None if self._fast is None else self._fast.longest
        return self._fast is not None and (longest is None or max(len(row.ids) for row in rows) <= longest)

    def _passing(self) -> LlamaPass:
        if self._fast is None:
            raise TypeError("this base has no pass by hand")
        return self._fast

    def _factors(self, adapters: Tensor) -> Factors:
        parts = self._lora.factors(adapters.to(self._weights_dtype), self.layout, self.scaling)
        return {layer.name: pair for layer, pair in zip(self._lora.layers, parts, strict=True)}

    @cached_property
    def _offsets(self) -> dict[str, tuple[int, int, int]]:
        """Layer name -> where its A begins, where its B begins, and where that ends."""
        ends = np.cumsum([tensor.size for tensor in self.layout.tensors])
        starts = ends - [tensor.size for tensor in self.layout.tensors]
        return {
            layer.name: (int(starts[2 * i]), int(starts[2 * i + 1]), int(ends[2 * i + 1]))
            for i, layer in enumerate(self._lora.layers)
        }

    def example_losses(self, rows: Sequence[Example], owner: NDArray[np.intp], theta: Tensor) -> Tensor:
        """Loss of each row, shape `(rows,)`, under the adapter of `theta` that `owner` names."""
        batch = self._collate(rows)
        stacked = of_owners(theta, owner).to(self._weights_dtype)
        self._lora.lay_over(self._lora.factors(stacked, self.layout, self.scaling))
        losses = F.cross_entropy(self._labelled_logits(batch).to(self._dtype), batch.targets, reduction="none")
        self._lora.lay_over()
        summed = losses.new_zeros(len(rows)).index_add(0, batch.rows, losses)
        return summed / batch.counts.clamp(min=1)

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
        device = self._device
        return _Batch(
            ids=torch.from_numpy(ids).to(device),
            positions=torch.from_numpy(np.concatenate(positions)).to(device),
            targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device),
            rows=torch.from_numpy(np.repeat(np.arange(len(rows)), counts)).to(device),
            counts=torch.from_numpy(counts).to(device),
        )


def _lora_of(base: BaseModel) -> StackedLora:
    """Wrap the base once; trainers of several ranks share the wrapped layers."""
    existing = getattr(base.model, "_homespun_lora", None)
    if existing is None:
        existing = StackedLora(base.model, [module.name for module in base.modules])
        base.model._homespun_lora = existing
    return existing


def _pass_of(base: BaseModel) -> LlamaPass | None:
    """The pass by hand over this base, found out once; None where its layers are not known."""
    if not hasattr(base.model, "_homespun_pass"):
        found = LlamaPass.of(base.model)
        config = base.model.config
        capped = getattr(config, "final_logit_softcapping", None), getattr(config, "logits_scaling", None)
        if capped != (None, None) or base.model.get_output_embeddings().bias is not None:
            found = None
        if found is not None:
            found.keep_little = config.hidden_size >= CHECKPOINTED_WIDTH
        base.model._homespun_pass = found
    return base.model._homespun_pass
