"""Preference optimization against a plain PyTorch loop, and what keeps it from spoiling plain quality."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.optimizers import Recipe, batch_order
from client.personalization.preference import (
    PreferenceLoss,
    guarded,
    preference_margins,
    tune,
    tune_example_dp,
)
from client.trainer import ExamplePromise, Trainer
from client.user_data import Encoded
from common.privacy import Randomness

TARGETS = ("q_proj", "v_proj")
LOSS = PreferenceLoss(beta=0.3, quality=0.2)


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, TARGETS, dtype=torch.float64), rank=2, scaling=2.0)


def make_pairs(generator, count):
    found = []
    for _ in range(count):
        prompt = generator.integers(3, 128, size=3)
        answers = [generator.integers(3, 128, size=int(generator.integers(2, 6))) for _ in range(2)]
        one, other = (Encoded(np.concatenate([[1], prompt, own]).astype(np.int32), 4) for own in answers)
        found.append(Encoded(one.ids, one.first_label, rejected=other))
    return found


def vectors(trainer, users, seed=0, scale=0.1):
    return np.random.default_rng(seed).normal(0, scale, (users, trainer.layout.size)).astype(np.float32)


def plain_dpo(folder, trainer, under, start, pairs, recipe, order):
    """One user by PEFT and autograd: the reference has the global adapter only, the policy both."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    for tensors in [trainer.layout.split(under)]:
        names = [tensor.name for tensor in trainer.layout.tensors]
        for a_name, b_name in zip(names[::2], names[1::2], strict=True):
            module = reference.get_submodule(a_name.removeprefix("base_model.model.").rsplit(".lora_A", 1)[0])
            low, high = (torch.from_numpy(tensors[name].astype(np.float64)) for name in (a_name, b_name))
            module.weight.data += trainer.scaling * high @ low
    import copy

    configuration = LoraConfig(r=2, lora_alpha=4, target_modules=list(TARGETS), task_type="CAUSAL_LM")
    policy = get_peft_model(copy.deepcopy(reference), configuration).eval()
    parameters = dict(policy.named_parameters())
    for name, value in trainer.layout.split(start).items():
        parameters[name.replace(".weight", ".default.weight")].data = torch.from_numpy(value.astype(np.float64))

    def log_likelihood(model, one):
        ids = torch.from_numpy(one.ids.astype(np.int64))[None]
        log_probabilities = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        return log_probabilities.gather(1, ids[0, 1:, None])[one.first_label - 1 :, 0].sum()

    trained = [parameter for name, parameter in policy.named_parameters() if "lora" in name]
    optimizer = torch.optim.SGD(trained, lr=recipe.learning_rate)
    for picks in batch_order(len(pairs), recipe.steps, recipe.batch, order):
        optimizer.zero_grad()
        for pair in (pairs[i] for i in picks):
            with torch.no_grad():
                base = log_likelihood(reference, pair) - log_likelihood(reference, pair.rejected)
            chosen = log_likelihood(policy, pair)
            margin = LOSS.beta * (chosen - log_likelihood(policy, pair.rejected) - base)
            loss = -torch.nn.functional.logsigmoid(margin) - LOSS.quality * chosen / (len(pair.ids) - pair.first_label)
            (loss / recipe.batch).backward()
        optimizer.step()
    tensors = {
        tensor.name: parameters[tensor.name.replace(".weight", ".default.weight")].detach().float().numpy()
        for tensor in trainer.layout.tensors
    }
    return trainer.layout.join(tensors)


def test_users_are_tuned_as_peft_and_a_plain_loop_tune_each(trainer, tiny_base_folder):
    generator = np.random.default_rng(1)
    pairs = [make_pairs(generator, count) for count in (3, 0, 5)]
    start, (under,) = vectors(trainer, 3), vectors(trainer, 1, seed=7)
    recipe = Recipe(steps=3, batch=2, learning_rate=0.2)
    orders = [np.random.default_rng(user) for user in range(3)]
    tuned = tune(trainer, start, pairs, recipe, orders, loss=LOSS, under=(under, trainer.layout, trainer.scaling))
    assert (tuned[1] == start[1]).all()
    for user in (0, 2):
        expected = plain_dpo(
            tiny_base_folder, trainer, under, start[user], pairs[user], recipe, np.random.default_rng(user)
        )
        assert np.abs(tuned[user] - start[user]).max() > 1e-3
        np.testing.assert_allclose(tuned[user], expected, atol=1e-5)


def test_tuning_raises_the_share_of_pairs_that_are_right(trainer):
    pairs = [make_pairs(np.random.default_rng(2), 6)]
    start = vectors(trainer, 1, scale=0.05)
    recipe = Recipe(steps=30, batch=4, learning_rate=0.01, optimizer="adam")
    tuned = tune(trainer, start, pairs, recipe, [np.random.default_rng(0)])
    before, after = (preference_margins(trainer, own, pairs, None)[0] for own in (start, tuned))
    assert (after > 0).mean() > (before > 0).mean()
    assert (after > 0).all()


def test_a_user_whose_margin_is_reached_takes_no_step(trainer):
    pairs = [make_pairs(np.random.default_rng(3), 4)]
    start = vectors(trainer, 1)
    recipe = Recipe(steps=2, batch=2, learning_rate=0.1)
    still = tune(trainer, start, pairs, recipe, [np.random.default_rng(0)], loss=PreferenceLoss(margin=-100.0))
    assert (still == start).all()


def test_plain_quality_is_kept_by_going_back(trainer):
    """A tuned adapter that spoils the validation records is taken back, in part or whole; one that helps is kept."""
    validation = [[Encoded(np.array([1, 5, 6, 7, 8], np.int32), 2)] for _ in range(3)]
    start = vectors(trainer, 3)
    owner = np.arange(3)
    flat = [own[0] for own in validation]
    better = trainer.fit(start, validation, Recipe(3, 1, 0.3), [np.random.default_rng(user) for user in range(3)])
    tuned = np.stack([better[0], start[1] + 3.0 * (start[1] - better[1]) + 1.0, start[2]])
    kept = guarded(trainer, start, tuned.astype(np.float32), validation)
    nats = trainer.score(flat, adapters=kept, owner=owner).nats / 3
    before = trainer.score(flat, adapters=start, owner=owner).nats / 3
    assert (kept[0] == tuned.astype(np.float32)[0]).all()
    assert (nats <= before + 0.01).all()
    assert (kept[2] == start[2]).all()
    assert (guarded(trainer, start, tuned.astype(np.float32), [[], [], []]) == start).all()


def test_noised_tuning_without_noise_is_the_sum_of_clipped_pair_gradients(trainer):
    pairs = make_pairs(np.random.default_rng(4), 5)
    start = vectors(trainer, 1)[0]
    recipe = Recipe(steps=1, batch=5, learning_rate=1.0)
    everyone = ExamplePromise(clip=1e6, noise_multiplier=0.0, rate=1.0)
    noised = tune_example_dp(trainer, start, pairs, recipe, everyone, Randomness.rehearsal(1), loss=LOSS)
    plain = tune(trainer, start[None], [pairs], recipe, [np.random.default_rng(0)], loss=LOSS)[0]
    np.testing.assert_allclose(noised, plain, atol=1e-5)


@pytest.mark.parametrize("clip", [0.01, 1.0])
def test_one_pair_moves_a_noised_step_by_at_most_the_clip(trainer, clip):
    pairs = make_pairs(np.random.default_rng(5), 6)
    start = vectors(trainer, 1)[0]
    recipe, promise = Recipe(steps=1, batch=1, learning_rate=1.0), ExamplePromise(clip, 0.0, 1.0)
    results = [
        tune_example_dp(trainer, start, own, recipe, promise, Randomness.rehearsal(1), loss=LOSS)
        for own in (pairs, pairs[:-1], [])
    ]
    assert np.linalg.norm(results[0] - results[1]) <= clip * (1 + 1e-4)
    assert (results[2] == start).all()


def test_noised_tuning_is_noisy_even_without_a_single_pair(trainer):
    start = vectors(trainer, 1)[0]
    promise = ExamplePromise(clip=0.5, noise_multiplier=2.0, rate=0.5)
    recipe = Recipe(steps=1, batch=1, learning_rate=1.0)
    moved = tune_example_dp(trainer, start, [], recipe, promise, Randomness.rehearsal(2)) - start
    assert np.std(moved) == pytest.approx(1.0, rel=0.2)
