"""The loss in pieces against the loss at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from client.label_loss import label_scores, loss_gradient, positions_per_piece


@pytest.mark.parametrize("vocabulary", [7, 300, 9000])
def test_the_gradient_in_pieces_is_the_gradient_at_once(vocabulary):
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(150, 12, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, 12, dtype=torch.float64, generator=generator)
    targets = torch.randint(0, vocabulary, (150,), generator=generator)
    weights = torch.rand(150, dtype=torch.float64, generator=generator)
    (F.cross_entropy(hidden @ weight.t(), targets, reduction="none") * weights).sum().backward()
    found = loss_gradient(hidden.detach(), weight, targets, weights)
    np.testing.assert_allclose(found, hidden.grad, atol=1e-12)


def test_extreme_logits_neither_overflow_nor_lose_their_loss():
    hidden = torch.tensor([[1000.0], [-1000.0]])
    weight = torch.tensor([[1.0], [-1.0], [0.0]])
    gradient = loss_gradient(hidden, weight, torch.tensor([0, 0]), torch.ones(2))
    assert torch.isfinite(gradient).all()
    nats, hits = label_scores(hidden, lambda rows: rows @ weight.t(), torch.tensor([0, 0]))
    assert nats.tolist() == [0.0, 2000.0]
    assert hits.tolist() == [True, False]


def test_scores_in_pieces_are_scores_at_once():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(333, 8, generator=generator), torch.randn(4000, 8, generator=generator)
    targets = torch.randint(0, 4000, (333,), generator=generator)
    nats, hits = label_scores(hidden, lambda rows: rows @ weight.t(), targets)
    np.testing.assert_allclose(nats, F.cross_entropy(hidden @ weight.t(), targets, reduction="none"), atol=1e-5)
    assert torch.equal(hits, (hidden @ weight.t()).argmax(dim=1) == targets)


def test_logits_of_all_positions_never_exist_together():
    largest = []

    def logits_of(rows):
        largest.append(len(rows))
        return rows @ torch.zeros(150_000, 4).t()

    label_scores(torch.zeros(500, 4), logits_of, torch.zeros(500, dtype=torch.long))
    assert max(largest) == positions_per_piece(150_000, torch.device("cpu")) == 64
