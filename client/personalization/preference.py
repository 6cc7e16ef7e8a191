"""The objective level: direct preference optimization of the private adapter, with the global model as reference.

A pair is an answer that the user preferred and one that was not, to the same prompt. Pairs come as such, or from what
the user said of answers (`client.feedback_store`). Tuning raises the margin by which the private
adapter moves the preferred answer above the other, measured against the frozen model below it (Rafailov et al., 2023,
arXiv:2305.18290, equation 7). Likelihood alone may fall for both answers while the margin grows; three things hold it:

- the likelihood of the preferred answer is part of the loss (Pang et al., 2024, arXiv:2404.19733);
- a user whose margin is reached is not tuned further;
- `guarded` goes back towards the start until plain quality on validation records is not worse.

Nothing here leaves the device, so no noise is needed; `tune_example_dp` adds it for an owner who wants the private
adapter itself not to give single pairs away.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from client.optimizers import Recipe, StackedOptimizer, batch_order
from client.packing import Example
from client.trainer import ExamplePromise, Trainer
from client.user_data import Encoded
from common.adapters import Layout, Vector
from common.privacy import Randomness
from common.promise import check_noise

__all__ = ["PreferenceLoss", "guarded", "preference_margins", "tune", "tune_example_dp"]

Under = tuple[Vector, Layout, float]
T = TypeVar("T")


@dataclass(frozen=True)
class PreferenceLoss:
    """What is minimized over a pair.

    Attributes:
        beta: Weight of the log-ratios in the margin.
        quality: Weight of the preferred answer's own loss, in nats per token.
        margin: A user whose mean margin over a batch is above it takes no step on that batch.
    """

    beta: float = 0.2
    quality: float = 0.2
    margin: float = 4.0


def preference_margins(
    trainer: Trainer, adapters: NDArray[np.float32], pairs: Sequence[Sequence[Encoded]], under: Under | None
) -> list[NDArray[np.float64]]:
    """How far each adapter moves the preferred answer above the other, in nats, one array of shape (pairs,) per user.

    Positive counts as right: the share of positive margins is the preference accuracy of the tuned model against its
    reference.
    """
    flat, owner = _flat(pairs)
    if not flat:
        return [np.zeros(0) for _ in pairs]
    preferred, other = _answers(flat)
    moved = np.zeros(len(flat))
    for rows, sign in ((preferred, 1.0), (other, -1.0)):
        reference = trainer.score(rows, under=under).nats
        moved += sign * (reference - trainer.score(rows, adapters=adapters, owner=owner, under=under).nats)
    return [moved[owner == user] for user in range(len(pairs))]


def tune(
    trainer: Trainer,
    start: NDArray[np.float32],
    pairs: Sequence[Sequence[Encoded]],
    recipe: Recipe,
    orders: Sequence[np.random.Generator],
    *,
    loss: PreferenceLoss | None = None,
    under: Under | None = None,
) -> NDArray[np.float32]:
    """Tune each user's private adapter on the user's own pairs, all users at once; shape (users, size).

    Args:
        trainer: Of the private adapters.
        start: The private adapters so far, shape (users, size).
        pairs: Each user's pairs; a user without any keeps the start.
        recipe: Steps, pairs per step and optimizer.
        orders: One generator per user for the order of its pairs.
        loss: What is minimized.
        under: The global adapter below; with nothing over it, it is the reference.
    """
    loss = loss or PreferenceLoss()
    having = [user for user, own in enumerate(pairs) if own]
    tuned = np.array(start, dtype=np.float32)
    if not having:
        return tuned
    own_pairs = [list(pairs[user]) for user in having]
    theta = _parameters(trainer, tuned[having]).requires_grad_()
    optimizer = StackedOptimizer(recipe)
    picks = [
        batch_order(len(own), recipe.steps, recipe.batch, orders[user])
        for own, user in zip(own_pairs, having, strict=True)
    ]
    owner = np.repeat(np.arange(len(having)), recipe.batch)
    with trainer.over_base(under):
        for step in range(recipe.steps):
            rows = [own[i] for own, pick in zip(own_pairs, picks, strict=True) for i in pick[step]]
            preferred, other = _answers(rows)
            with torch.no_grad():
                reference = torch.as_tensor(
                    trainer.score(preferred).nats - trainer.score(other).nats, device=theta.device, dtype=theta.dtype
                )
            own = trainer.example_losses(preferred, owner, theta)  # nats per token
            nats = own * _label_counts(preferred, theta)
            margins = reference - nats + trainer.example_losses(other, owner, theta) * _label_counts(other, theta)
            margins = loss.beta * margins
            losses = -F.logsigmoid(margins) + loss.quality * own
            gradient = torch.autograd.grad(losses.sum(), theta)[0] / recipe.batch
            with torch.no_grad():
                unfinished = margins.view(len(having), recipe.batch).mean(dim=1) < loss.margin
                optimizer.step(theta, gradient * unfinished[:, None])
    tuned[having] = theta.detach().cpu().numpy().astype(np.float32, copy=False)
    return tuned


def tune_example_dp(
    trainer: Trainer,
    start: Vector,
    pairs: Sequence[Encoded],
    recipe: Recipe,
    promise: ExamplePromise,
    randomness: Randomness,
    *,
    loss: PreferenceLoss | None = None,
    under: Under | None = None,
) -> NDArray[np.float32]:
    """Tune one private adapter by DP-SGD over pairs; returns shape (size,).

    Guarantee: each step is one Poisson-sampled Gaussian mechanism of `promise` over pairs: each pair's gradient is a
        function of that pair and the adapter alone, clipped as one, and the noise is drawn whatever the pairs are.
        No step is left out for a reached margin, because that would depend on the pairs.

    Raises:
        ClaimRefused: What was drawn is not the noise that was promised.
    """
    loss = loss or PreferenceLoss()
    theta = _parameters(trainer, start[None])
    optimizer = StackedOptimizer(recipe)
    scale = promise.noise_multiplier * promise.clip
    with trainer.over_base(under):
        for _ in range(recipe.steps):
            batch = [pairs[int(i)] for i in randomness.poisson_sample(len(pairs), promise.rate)]
            vector = theta[0].cpu().numpy().astype(np.float32)
            gradients = _pair_gradients(trainer, vector, batch, loss)
            gradients[~np.isfinite(gradients).all(axis=1)] = 0.0
            norms = np.linalg.norm(gradients, axis=1)
            factors = np.minimum(1.0, promise.clip * (1.0 - 1e-12) / np.maximum(norms, np.finfo(np.float64).tiny))
            total = factors @ gradients if len(batch) else np.zeros(trainer.layout.size)
            if scale > 0:
                noise = scale * randomness.normal(trainer.layout.size)
                check_noise(noise, scale)
                total = total + noise
            gradient = torch.as_tensor(total / recipe.batch, device=theta.device, dtype=theta.dtype)
            optimizer.step(theta, gradient[None])
    return theta[0].cpu().numpy().astype(np.float32)


def guarded(
    trainer: Trainer,
    start: NDArray[np.float32],
    tuned: NDArray[np.float32],
    validation: Sequence[Sequence[Example]],
    *,
    under: Under | None = None,
    tolerance: float = 0.01,
) -> NDArray[np.float32]:
    """Go back from `tuned` towards `start` until plain quality is kept; shape (users, size).

    Each user keeps the largest of 1, 1/2, 1/4 and 0 of the way whose nats per token on the user's validation records
    are at most `tolerance` above those of the start. A user without validation records keeps the start.
    """
    kept = np.array(start, dtype=np.float32)
    open_users = np.array([bool(own) for own in validation]) & (np.abs(tuned - start).max(axis=1) > 0)
    before = _nats_per_token(trainer, start, validation, under)
    for share in (1.0, 0.5, 0.25):
        if not open_users.any():
            break
        tried = tuned if share == 1.0 else (start + share * (tuned - start)).astype(np.float32)
        good = open_users & (_nats_per_token(trainer, tried, validation, under) <= before + tolerance)
        kept[good] = tried[good]
        open_users &= ~good
    return kept


def _pair_gradients(
    trainer: Trainer, vector: Vector, batch: Sequence[Encoded], loss: PreferenceLoss
) -> NDArray[np.float64]:
    """Gradient of each pair's loss, shape (pairs, size), from the gradients of its two answers."""
    if not batch:
        return np.zeros((0, trainer.layout.size))
    preferred, other = _answers(batch)
    owner = np.zeros(len(batch), dtype=np.intp)
    stacked = vector[None]
    margins = np.zeros(len(batch))
    for rows, sign in ((preferred, 1.0), (other, -1.0)):
        own = trainer.score(rows, adapters=stacked, owner=owner).nats
        margins += sign * loss.beta * (trainer.score(rows).nats - own)
    pull = loss.beta / (1.0 + np.exp(np.clip(margins, -500, 500)))
    tokens = [np.array([_labels(row) for row in rows], dtype=np.float64) for rows in (preferred, other)]
    means = [trainer.example_gradients(vector, rows) for rows in (preferred, other)]
    return ((pull * tokens[0] + loss.quality)[:, None] * means[0]) - (pull * tokens[1])[:, None] * means[1]


def _nats_per_token(
    trainer: Trainer, adapters: NDArray[np.float32], people: Sequence[Sequence[Example]], under: Under | None
) -> NDArray[np.float64]:
    flat, owner = _flat(people)
    result = np.zeros(len(people))
    if flat:
        scores = trainer.score(flat, adapters=adapters, owner=owner, under=under)
        np.add.at(result, owner, scores.nats)
        tokens = np.zeros(len(people))
        np.add.at(tokens, owner, scores.tokens)
        result /= np.maximum(tokens, 1)
    return result


def _flat(people: Sequence[Sequence[T]]) -> tuple[list[T], NDArray[np.intp]]:
    return [one for own in people for one in own], np.repeat(np.arange(len(people)), [len(own) for own in people])


def _answers(pairs: Sequence[Encoded]) -> tuple[list[Encoded], list[Encoded]]:
    others = [pair.rejected for pair in pairs]
    return list(pairs), [other for other in others if other is not None]


def _parameters(trainer: Trainer, vectors: NDArray[np.float32]) -> Tensor:
    """Lay adapters out to be trained, in the base's type but never below float32; shape (users, size)."""
    weights = next(trainer.base.model.parameters())
    return torch.as_tensor(
        vectors, device=weights.device, dtype=torch.promote_types(weights.dtype, torch.float32)
    ).clone()


def _label_counts(rows: Sequence[Example], like: Tensor) -> Tensor:
    return torch.tensor([_labels(row) for row in rows], device=like.device, dtype=like.dtype)


def _labels(row: Example) -> int:
    return len(row.ids) - max(row.first_label, 1)
