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

__all__ = ["fit_soft_prompt", "score_with_prefix", "start_from_own_tokens"]

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


def fit_soft_prompt(
    base: BaseModel,
    start: NDArray[np.float32],
    examples: Sequence[Example],
    recipe: Recipe,
    order: np.random.Generator,
) -> NDArray[np.float32]:
    """Train a prefix on one user's records; shape (length, hidden).

    The loss is that of an adapter: per record the mean over its own labels, summed, divided by the batch.

    Args:
        base: The frozen base; an adapter that is added into its weights is part of it.
        start: Where the prefix starts.
        examples: The user's records, at least one.
        recipe: Steps, records per step and optimizer.
        order: Draws the order of the records.
    """
    dtype = next(base.model.parameters()).dtype
    prefix = torch.as_tensor(start, device=base.device, dtype=torch.promote_types(dtype, torch.float32)).clone()
    flat = prefix.flatten()[None]  # the optimizer knows rows of users
    optimizer = StackedOptimizer(recipe)
    for picks in batch_order(len(examples), recipe.steps, recipe.batch, order):
        rows = [examples[i] for i in picks]
        leaf = flat.view_as(prefix).detach().requires_grad_()
        total = torch.zeros_like(leaf)
        for piece in by_length(rows, PASS_TOKENS):
            nats, counts, _ = _label_nats(base, leaf, [rows[i] for i in piece])
            total += torch.autograd.grad((nats / counts).sum(), leaf)[0]
        with torch.no_grad():
            optimizer.step(flat, total.flatten()[None] / recipe.batch)
    return flat.view_as(prefix).float().cpu().numpy()


@torch.no_grad()
def score_with_prefix(base: BaseModel, prefix: NDArray[np.float32] | None, examples: Sequence[Example]) -> Scores:
    """Score records behind a prefix, or behind none, through the model's own forward."""
    nats = np.zeros(len(examples))
    tokens = np.zeros(len(examples), dtype=np.int64)
    correct = np.zeros(len(examples), dtype=np.int64)
    vectors = None if prefix is None else torch.as_tensor(prefix, device=base.device)
    for rows in by_length(examples, PASS_TOKENS):
        found, counts, hits = _label_nats(base, vectors, [examples[i] for i in rows])
        nats[rows], tokens[rows], correct[rows] = found.cpu(), counts.cpu(), hits.cpu()
    return Scores(nats, tokens, correct)


def _label_nats(base: BaseModel, prefix: Tensor | None, rows: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Summed nats, number and hits of each row's labels, shapes (rows,); padding on the right is never looked at."""
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
        length = prefix.shape[0]
        before = prefix.to(embedded.dtype).expand(len(rows), -1, -1)
        embedded = torch.cat([before, embedded], dim=1)
    hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state[:, length:]
    places = labels[:, 1:]
    logits = base.logits(hidden[:, :-1][places]).float()
    targets = ids[:, 1:][places]
    owner = torch.nonzero(places)[:, 0]
    zero = torch.zeros(len(rows), device=base.device)
    nats = zero.index_add(0, owner, F.cross_entropy(logits, targets, reduction="none"))
    hits = zero.index_add(0, owner, (logits.argmax(dim=1) == targets).float())
    return nats, labels.sum(dim=1).clamp(min=1), hits
