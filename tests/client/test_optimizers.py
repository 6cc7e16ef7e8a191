"""Stacked optimizers against PyTorch's own, one user at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.optimizers import OPTIMIZERS, Recipe, StackedOptimizer, batch_order


def torchs_own(name, parameter):
    if name == "adam":
        return torch.optim.Adam([parameter], lr=0.05)
    return torch.optim.SGD([parameter], lr=0.05, momentum=0.9 if name == "momentum" else 0.0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_user_moves_as_under_torchs_own_optimizer(name):
    generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 5, dtype=torch.float64, generator=generator)
    alone = [row.clone().requires_grad_() for row in theta]
    theirs = [torchs_own(name, parameter) for parameter in alone]
    ours = StackedOptimizer(Recipe(6, 1, 0.05, name))
    for step in range(6):
        active = 3 if step < 3 else 2  # the last user is done after three steps
        gradient = torch.randn(3, 5, dtype=torch.float64, generator=generator)
        ours.step(theta[:active], gradient[:active])
        for user in range(active):
            alone[user].grad = gradient[user]
            theirs[user].step()
    for row, parameter in zip(theta, alone, strict=True):
        np.testing.assert_allclose(row, parameter.detach(), atol=1e-12)


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match="sgd, momentum, adam"):
        StackedOptimizer(Recipe(1, 1, 0.1, "lion"))


def test_every_record_is_seen_once_before_any_is_seen_twice():
    picks = batch_order(5, 4, 3, np.random.default_rng(0)).ravel()
    assert sorted(picks[:5]) == sorted(picks[5:10]) == list(range(5))


def test_no_steps_take_no_records():
    assert batch_order(5, 0, 3, np.random.default_rng(0)).shape == (0, 3)
