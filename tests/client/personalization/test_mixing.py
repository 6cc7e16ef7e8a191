"""Strengths act on what an adapter adds, and on nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from client.base_model import load_base
from client.personalization.mixing import MIXES, Mix, mix_of, strengthened
from client.trainer import Trainer


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)


def test_strength_scales_what_an_adapter_adds_and_nothing_else(trainer):
    adapters = np.random.default_rng(0).normal(size=(3, trainer.layout.size)).astype(np.float32)
    halved = strengthened(adapters, trainer.layout, 0.5)
    for tensor in trainer.layout.tensors:
        place = trainer.layout.offsets[tensor.name]
        factor = 0.5 if ".lora_B." in tensor.name else 1.0
        np.testing.assert_array_equal(halved[:, place], factor * adapters[:, place])
    np.testing.assert_array_equal(strengthened(adapters[1], trainer.layout, 0.5), halved[1])


def test_strength_is_a_factor_on_the_adapter_s_scaling(trainer, random_examples):
    """And at 0 the adapter is not there."""
    examples = random_examples(np.random.default_rng(1), 8)
    adapter = np.random.default_rng(2).normal(0, 0.3, trainer.layout.size).astype(np.float32)
    for strength in (0.0, 0.5, 1.5):
        ours = strengthened(adapter, trainer.layout, strength)
        found = trainer.score(examples, under=(ours, trainer.layout, trainer.scaling))
        expected = trainer.score(examples, under=(adapter, trainer.layout, trainer.scaling * strength))
        np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-5)


def test_the_grid_is_small_has_no_mixture_twice_and_not_the_one_that_is_there_already():
    assert len(set(MIXES)) == len(MIXES) <= 8
    assert Mix(1.0, 1.0) not in MIXES
    assert Mix(0.5, 1.5).suffix == "@0.5/1.5"
    assert mix_of("both+retrieval@0.5/1.5") == Mix(0.5, 1.5)
    assert mix_of("both") == Mix(1.0, 1.0)
    assert [mix_of(f"both{mix.suffix}") for mix in MIXES] == list(MIXES)
