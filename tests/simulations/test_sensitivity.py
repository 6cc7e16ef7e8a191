"""The property that every epsilon rests on, for every method in both modes; and that the trial can fail."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.base_model import load_base
from client.trainer import Trainer
from common.errors import ClaimRefused
from common.methods import METHODS
from simulations.sensitivity import TOLERANCE, movement

SHARING = sorted(name for name, row in METHODS.items() if row.shared)
# A product is sent by flexlora: post-processing of a step whose factors are clipped and noised like everybody's.
OUTSIDE_THE_PASS = sorted(name for name in SHARING if not METHODS[name].private_in_pass and name != "flexlora")
IN_THE_PASS = sorted(name for name in SHARING if METHODS[name].private_in_pass)
SEEDS = st.integers(0, 2**32 - 1)


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)


@settings(max_examples=16, deadline=None)
@given(method=st.sampled_from(SHARING), seed=SEEDS, optimizer=st.sampled_from(["sgd", "adam"]))
def test_crowd_silencing_one_person_whose_private_part_was_overfitted_moves_the_sum_by_at_most_the_clip(
    trainer, method, seed, optimizer
):
    assert movement(method, trainer, np.random.default_rng(seed), optimizer=optimizer) <= 1 + TOLERANCE


@settings(max_examples=10, deadline=None)
@given(method=st.sampled_from(OUTSIDE_THE_PASS), seed=SEEDS)
def test_silo_taking_one_record_away_moves_a_step_by_at_most_the_clip(trainer, method, seed):
    assert movement(method, trainer, np.random.default_rng(seed), unit="example") <= 1 + TOLERANCE


@settings(max_examples=10, deadline=None)
@given(method=st.sampled_from(IN_THE_PASS), seed=SEEDS)
def test_silo_with_noise_on_the_private_part_too_the_step_is_inside_the_clip(trainer, method, seed):
    moved = movement(method, trainer, np.random.default_rng(seed), unit="example", private_noise=1)
    assert moved <= 1 + TOLERANCE


@pytest.mark.parametrize("method", IN_THE_PASS)
def test_silo_with_a_private_part_in_the_pass_is_refused_where_anything_is_promised(trainer, method):
    with pytest.raises(ClaimRefused, match="private part"):
        movement(method, trainer, np.random.default_rng(0), unit="example")


@pytest.mark.parametrize("method", ["fedsa", "dual-joint"])
def test_the_trial_can_fail_what_is_refused_moves_further_than_the_clip(trainer, method):
    """Promising nothing, the vault lets it run: this is what the field's code does, and why it is refused."""
    generator = np.random.default_rng(0)
    moved = [movement(method, trainer, generator, unit="example", claimed=False) for _ in range(6)]
    assert max(moved) > 1.2
