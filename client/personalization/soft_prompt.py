"""A soft prompt: a few private vectors before every record, in place of words; the base stays as it is.

It is the smallest thing that can be trained of a user (tokens times hidden width), it works with bases whose layers
carry no adapter, and it costs as many tokens of every question as it has vectors. It starts from the embeddings of
tokens the user writes (Lester et al., 2021, arXiv:2104.08691, section 3.2), and goes before the tokens that open a
record. It never leaves the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from client.base_model import BaseModel
from client.label_loss import Scores
from client.optimizers import Recipe, StackedOptimizer, batch_order
from client.packing import Example, by_length

__all__ = ["fit_soft_prompts", "score_with_prefix", "start_from_own_tokens"]

PASS_TOKENS = 2048


def start_from_own_tokens(
    base: BaseModel, examples: Sequence[Example], length: int, generator: np.random.Generator
) -> NDArray[np.float32]:
    """Take the embeddings of `length` tokens that the user wrote, drawn by `generator`; shape (length, hidden)."""
    if length < 1 or not examples:
        raise ValueError("a soft prompt of at least one vector starts from at least one record")
    written = np.concatenate([one.ids[max(one.first_label, 1) :] for one in examples])
    drawn = torch.from_numpy(generator.choice(written, size=length).astype(np.int64)).to(base.device)
    return base.model.get_input_embeddings()(drawn).detach().float().cpu().numpy()


def fit_soft_prompts(
    base: BaseModel,
    starts: NDArray[np.float32],
    people: Sequence[Sequence[Example]],
    recipe: Recipe,
    orders: Sequence[np.random.Generator],
) -> NDArray[np.float32]:
    """Train a prefix for each of some users on the user's own records, side by side; shape (users, length, hidden).

    The loss is that of an adapter: per record the mean over its own labels, summed, divided by the batch. Users share
    passes and nothing else: each prefix is what training it alone would give.

    Args:
        base: The frozen base; an adapter that is added into its weights is part of it.
        starts: Where each prefix starts, shape (users, length, hidden).
        people: Each user's records, at least one each.
        recipe: Steps, records per step and optimizer.
        orders: One generator per user for the order of its records.
    """
    dtype = next(base.model.parameters()).dtype
    prefixes = torch.as_tensor(starts, device=base.device, dtype=torch.promote_types(dtype, torch.float32)).clone()
    flat = prefixes.flatten(1)  # the optimizer knows rows of users
    optimizer = StackedOptimizer(recipe)
    picks = [
        batch_order(len(own), recipe.steps, recipe.batch, order) for own, order in zip(people, orders, strict=True)
    ]
    owner = np.repeat(np.arange(len(people)), recipe.batch)
    for step in range(recipe.steps):
        rows = [own[i] for own, pick in zip(people, picks, strict=True) for i in pick[step]]
        leaf = flat.view_as(prefixes).detach().requires_grad_()
        total = torch.zeros_like(leaf)
        for piece in by_length(rows, PASS_TOKENS):
            before = leaf[torch.from_numpy(owner[piece]).to(base.device)]
            nats, counts, _ = _label_nats(base, before, [rows[i] for i in piece])
            total += torch.autograd.grad((nats / counts).sum(), leaf)[0]
        with torch.no_grad():
            optimizer.step(flat, total.flatten(1) / recipe.batch)
    return flat.view_as(prefixes).float().cpu().numpy()


@torch.no_grad()
def score_with_prefix(base: BaseModel, prefix: NDArray[np.float32] | None, examples: Sequence[Example]) -> Scores:
    """Score records behind a prefix, or behind none, through the model's own forward."""
    nats = np.zeros(len(examples))
    tokens = np.zeros(len(examples), dtype=np.int64)
    correct = np.zeros(len(examples), dtype=np.int64)
    vectors = None if prefix is None else torch.as_tensor(prefix, device=base.device)
    for rows in by_length(examples, PASS_TOKENS):
        before = None if vectors is None else vectors.expand(len(rows), -1, -1)
        found, counts, hits = _label_nats(base, before, [examples[i] for i in rows])
        nats[rows], tokens[rows], correct[rows] = found.cpu(), counts.cpu(), hits.cpu()
    return Scores(nats, tokens, correct)


def _label_nats(base: BaseModel, prefix: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats, number and hits of each row's labels, shapes (rows,), behind prefixes (rows, length, hidden).

    Padding is on the right and never looked at.
    """
    model: Any = base.model
    width = max(len(row.ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        ids[index, : len(row.ids)] = torch.from_numpy(np.asarray(row.ids, dtype=np.int64))
        labels[index, max(row.first_label, 1) : len(row.ids)] = True
    ids, labels = ids.to(base.device), labels.to(base.device)
    embedded = model.get_input_embeddings()(ids)
    length = 0
    if prefix is not None:
        length = prefix.shape[1]
        embedded = torch.cat([prefix.to(embedded.dtype), embedded], dim=1)
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, length:]
    places = labels[:, 1:]
    logits = base.logits(hidden[:, :-1][places]).float()
    targets = ids[:, 1:][places]
    owner = torch.nonzero(places)[:, 0]
    zero = torch.zeros(len(rows), device=base.device)
    nats = zero.index_add(0, owner, F.cross_entropy(logits, targets, reduction="none"))
    hits = zero.index_add(0, owner, (logits.argmax(dim=1) == targets).float())
    return nats, labels.sum(dim=1).clamp(min=1), hits
