"""Steering: what the direction is, and that it is gone afterwards."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.personalization.soft_prompt import score_with_prefix
from client.personalization.steering import middle_layer, steered, style_vector, style_vectors
from client.trainer import Trainer


@pytest.fixture(scope="module")
def base(tiny_base_folder):
    return load_base(tiny_base_folder, ("q_proj", "v_proj"))


def test_the_direction_is_the_difference_of_mean_outputs_at_answers(base, random_examples):
    own, generic = (random_examples(np.random.default_rng(seed), count) for seed, count in ((0, 3), (1, 4)))

    def mean(examples):
        outputs = []
        for one in examples:
            ids = torch.from_numpy(one.ids.astype(np.int64))[None]
            with torch.no_grad():
                states = base.model(input_ids=ids, output_hidden_states=True).hidden_states
            outputs.append(states[1][0, max(one.first_label, 1) :].mean(dim=0).numpy())
        return np.mean(outputs, axis=0)

    np.testing.assert_allclose(style_vector(base, 0, own, generic), mean(own) - mean(generic), atol=1e-5)
    np.testing.assert_allclose(style_vector(base, 0, own, own), 0.0, atol=1e-7)
    with pytest.raises(ValueError, match="generic"):
        style_vector(base, 0, own, [])


def test_steering_changes_scores_while_it_lasts_and_nothing_afterwards(base, random_examples):
    examples = random_examples(np.random.default_rng(2), 6)
    vector = np.random.default_rng(0).normal(size=base.model.config.hidden_size).astype(np.float32)
    before = score_with_prefix(base, None, examples).nats
    with steered(base, middle_layer(base), vector, 2.0):
        during = score_with_prefix(base, None, examples).nats
    with steered(base, middle_layer(base), vector, 0.0):
        nothing = score_with_prefix(base, None, examples).nats
    assert np.abs(during - before).max() > 0.1
    np.testing.assert_allclose(nothing, before)
    np.testing.assert_array_equal(score_with_prefix(base, None, examples).nats, before)


def test_an_error_inside_takes_the_direction_off_as_well(base, random_examples):
    examples = random_examples(np.random.default_rng(3), 2)
    before = score_with_prefix(base, None, examples).nats
    with pytest.raises(RuntimeError), steered(base, 0, np.ones(base.model.config.hidden_size, np.float32), 1.0):
        raise RuntimeError
    np.testing.assert_array_equal(score_with_prefix(base, None, examples).nats, before)


def test_each_user_s_direction_is_against_the_model_s_own_answers_to_the_user_s_questions(base, random_examples):
    trainer = Trainer(base, rank=2, scaling=2.0)
    people = [random_examples(np.random.default_rng(seed), count) for seed, count in ((4, 3), (5, 2))]
    vectors = style_vectors(trainer, [*people, []])
    for own, vector in zip(people, vectors, strict=False):
        generic = []
        for one in own:
            first, ids = max(one.first_label, 1), list(one.ids[: max(one.first_label, 1)])
            with torch.no_grad():
                while len(ids) < len(one.ids):
                    token = int(base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
                    if token in (base.tokenizer.eos_token_id, base.model.generation_config.eos_token_id):
                        break
                    ids.append(token)
            if len(ids) > first:
                generic.append(type(one)(np.array(ids, np.int32), first))
        expected = style_vector(base, middle_layer(base), own, generic) if generic else 0.0
        np.testing.assert_allclose(vector, expected + np.zeros_like(vector), atol=1e-4)
    assert not vectors[2].any()
