"""A private prefix: against the model's own embeddings, and what training it does."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.optimizers import Recipe
from client.personalization.soft_prompt import fit_soft_prompts, score_with_prefix, start_from_own_tokens
from client.trainer import Trainer


@pytest.fixture(scope="module")
def base(tiny_base_folder):
    return load_base(tiny_base_folder, ("q_proj", "v_proj"))


def test_without_a_prefix_scores_are_the_trainer_s(base, random_examples):
    examples = random_examples(np.random.default_rng(0), 12)
    ours, theirs = score_with_prefix(base, None, examples), Trainer(base, rank=2, scaling=2.0).score(examples)
    np.testing.assert_allclose(ours.nats, theirs.nats, rtol=1e-4)
    assert (ours.tokens == theirs.tokens).all()
    assert (ours.correct == theirs.correct).all()


def test_a_prefix_of_tokens_embeddings_is_those_tokens(base, random_examples):
    examples = random_examples(np.random.default_rng(1), 8)
    prefix = base.model.get_input_embeddings()(torch.tensor([7, 9])).detach().numpy()
    longer = [type(one)(np.concatenate([[7, 9], one.ids]).astype(np.int32), one.first_label + 2) for one in examples]
    np.testing.assert_allclose(
        score_with_prefix(base, prefix, examples).nats, score_with_prefix(base, None, longer).nats, rtol=1e-4
    )


def test_training_follows_the_gradient_of_the_mean_of_each_record(base, random_examples):
    """One step of plain gradient descent on one record equals autograd through the model's own loss."""
    (example,) = random_examples(np.random.default_rng(2), 1)
    start = start_from_own_tokens(base, [example], 3, np.random.default_rng(0))
    (trained,) = fit_soft_prompts(base, start[None], [[example]], Recipe(1, 1, 0.5), [np.random.default_rng(0)])
    leaf = torch.from_numpy(start).requires_grad_()
    ids = torch.from_numpy(example.ids.astype(np.int64))[None]
    embedded = torch.cat([leaf[None], base.model.get_input_embeddings()(ids)], dim=1)
    labels = torch.cat([torch.full((1, 3), -100), ids], dim=1)
    labels[:, : 3 + max(example.first_label, 1)] = -100
    base.model(inputs_embeds=embedded, labels=labels).loss.backward()
    np.testing.assert_allclose(trained, (leaf - 0.5 * leaf.grad).detach().numpy(), atol=1e-5)


def test_training_helps_the_records_it_was_trained_on(base, random_examples):
    examples = random_examples(np.random.default_rng(3), 4)
    start = start_from_own_tokens(base, examples, 4, np.random.default_rng(0))
    recipe = Recipe(steps=20, batch=4, learning_rate=0.05, optimizer="adam")
    (trained,) = fit_soft_prompts(base, start[None], [examples], recipe, [np.random.default_rng(0)])
    before, after = (score_with_prefix(base, prefix, examples).nats.sum() for prefix in (start, trained))
    assert after < before - 1
    assert trained.shape == (4, base.model.config.hidden_size)


def test_a_prefix_starts_from_tokens_that_the_user_wrote(base, random_examples):
    examples = random_examples(np.random.default_rng(4), 3)
    written = np.concatenate([one.ids[max(one.first_label, 1) :] for one in examples])
    table = base.model.get_input_embeddings().weight.detach().numpy()
    start = start_from_own_tokens(base, examples, 5, np.random.default_rng(0))
    assert all(any(np.array_equal(vector, table[token]) for token in written) for vector in start)
    with pytest.raises(ValueError, match="at least one"):
        start_from_own_tokens(base, [], 5, np.random.default_rng(0))


def test_users_side_by_side_end_as_each_alone(base, random_examples):
    people = [random_examples(np.random.default_rng(seed), count) for seed, count in ((5, 2), (6, 5), (7, 1))]
    starts = np.stack([start_from_own_tokens(base, own, 3, np.random.default_rng(0)) for own in people])
    recipe = Recipe(steps=3, batch=2, learning_rate=0.05, optimizer="adam")
    orders = [np.random.default_rng(seed) for seed in range(3)]
    together = fit_soft_prompts(base, starts, people, recipe, orders)
    for index, own in enumerate(people):
        (alone,) = fit_soft_prompts(base, starts[index][None], [own], recipe, [np.random.default_rng(index)])
        np.testing.assert_allclose(together[index], alone, atol=1e-4)
