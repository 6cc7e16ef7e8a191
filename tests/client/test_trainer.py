"""The cohort trainer against PEFT, plain PyTorch loops and itself."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.base_model import load_base
from client.trainer import Recipe, Trainer, batch_order

TARGETS = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, TARGETS), rank=3, scaling=2.0)


@pytest.fixture(scope="module")
def exact_trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, TARGETS, dtype=torch.float64), rank=3, scaling=2.0)


def start_vectors(trainer, users, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (users, trainer.layout.size)).astype(np.float32)


def peft_model(folder, trainer, vector, dtype=torch.float32):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype),
        LoraConfig(r=3, lora_alpha=6, target_modules=list(TARGETS), task_type="CAUSAL_LM"),
    )
    parameters = dict(model.named_parameters())
    for name, value in trainer.layout.split(vector).items():
        parameters[name.replace(".weight", ".default.weight")].data = torch.from_numpy(value.copy()).to(dtype)
    return model.eval()


class ExactNorm(torch.nn.Module):
    """RMSNorm in the model's own type; transformers computes it in float32 whatever the type."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, states):
        return self.weight * states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + self.epsilon)


class ExactRotation(torch.nn.Module):
    """Rotary angles in float64, for the same reason."""

    def __init__(self, rotation):
        super().__init__()
        self.frequencies = rotation.inv_freq.double()

    def forward(self, _states, position_ids):
        angles = position_ids[..., None].double() * self.frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def in_double(model):
    """Replace what transformers computes in float32 in a float64 model."""
    decoder = model.get_base_model().model
    decoder.norm, decoder.rotary_emb = ExactNorm(decoder.norm), ExactRotation(decoder.rotary_emb)
    for layer in decoder.layers:
        layer.input_layernorm = ExactNorm(layer.input_layernorm)
        layer.post_attention_layernorm = ExactNorm(layer.post_attention_layernorm)
    return model


def plain_loss(model, example):
    ids = torch.from_numpy(example.ids.astype(np.int64))[None]
    labels = ids.clone()
    labels[:, : max(example.first_label, 1)] = -100
    logits = model(input_ids=ids).logits[0, :-1]  # transformers' own loss is computed in float32
    return torch.nn.functional.cross_entropy(logits, labels[0, 1:])


def plain_vector(trainer, model):
    parameters = dict(model.named_parameters())
    tensors = {
        tensor.name: parameters[tensor.name.replace(".weight", ".default.weight")].detach().float().numpy()
        for tensor in trainer.layout.tensors
    }
    return trainer.layout.join(tensors)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_cohort_trains_as_peft_and_a_plain_loop_train_each_user(
    trainer, tiny_base_folder, optimizer, random_examples
):
    generator = np.random.default_rng(1)
    users = [random_examples(generator, count) for count in (3, 5, 9)]
    start = start_vectors(trainer, 3)
    recipe = Recipe(steps=3, batch=4, learning_rate=0.05 if optimizer == "sgd" else 0.003, optimizer=optimizer)
    stacked = trainer.fit(start, users, recipe, [np.random.default_rng(u) for u in range(3)])
    for user, own in enumerate(users):
        model = peft_model(tiny_base_folder, trainer, start[user])
        trainable = [p for n, p in model.named_parameters() if "lora" in n]
        kind = torch.optim.SGD if optimizer == "sgd" else torch.optim.Adam
        loop = kind(trainable, lr=recipe.learning_rate)
        for picks in batch_order(len(own), recipe.steps, recipe.batch, np.random.default_rng(user)):
            loop.zero_grad()
            (sum(plain_loss(model, own[i]) for i in picks) / recipe.batch).backward()
            loop.step()
        assert np.abs(stacked[user] - start[user]).max() > 1e-3
        np.testing.assert_allclose(stacked[user], plain_vector(trainer, model), atol=2e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_stacked_equals_one_by_one_in_double_precision(exact_trainer, optimizer, random_examples):
    generator = np.random.default_rng(2)
    users = [random_examples(generator, 6) for _ in range(5)]
    start = start_vectors(exact_trainer, 5)
    recipe = Recipe(steps=3, batch=4, learning_rate=0.01, optimizer=optimizer, gradient_clip=1.0)
    together = exact_trainer.fit(start, users, recipe, [np.random.default_rng(u) for u in range(5)])
    for user in range(5):
        alone = exact_trainer.fit(start[user : user + 1], [users[user]], recipe, [np.random.default_rng(user)])
        np.testing.assert_allclose(together[user], alone[0], atol=1e-9)


def test_example_gradients_are_those_of_each_example_alone(exact_trainer, tiny_base_folder, random_examples):
    examples = random_examples(np.random.default_rng(3), 7)
    vector = start_vectors(exact_trainer, 1)[0]
    gradients = exact_trainer.example_gradients(vector, examples)
    model = in_double(peft_model(tiny_base_folder, exact_trainer, vector, torch.float64))
    parameters = dict(model.named_parameters())
    for gradient, example in zip(gradients, examples, strict=True):
        model.zero_grad()
        plain_loss(model, example).backward()
        naive = np.concatenate(
            [
                parameters[t.name.replace(".weight", ".default.weight")].grad.numpy().ravel()
                for t in exact_trainer.layout.tensors
            ]
        )
        np.testing.assert_allclose(gradient, naive, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(1, 8), clip=st.floats(1e-3, 10))
def test_removing_one_example_moves_the_clipped_sum_by_at_most_the_clip(trainer, seed, count, clip, random_examples):
    generator = np.random.default_rng(seed)
    examples = random_examples(generator, count)
    vector = generator.normal(0, 0.5, trainer.layout.size).astype(np.float32)
    whole = trainer.clipped_gradient_sum(vector, examples, clip)
    without = trainer.clipped_gradient_sum(vector, examples[:-1], clip)
    # float32 batched matrix products may differ in the last bit with the number of rows
    assert np.linalg.norm(whole - without) <= clip * (1 + 1e-4)


def test_an_empty_poisson_batch_sums_to_zero(trainer):
    assert not trainer.clipped_gradient_sum(start_vectors(trainer, 1)[0], [], 1.0).any()


def test_frozen_values_stay_and_the_anchor_pulls(trainer, random_examples):
    generator = np.random.default_rng(4)
    users = [random_examples(generator, 4)]
    start = start_vectors(trainer, 1)
    mask = np.arange(trainer.layout.size) % 2 == 0
    recipe = Recipe(steps=2, batch=4, learning_rate=0.1)
    moved = trainer.fit(start, users, recipe, [np.random.default_rng(0)], trainable=mask)
    assert (moved[0][~mask] == start[0][~mask]).all()
    assert (moved[0][mask] != start[0][mask]).any()
    pulled = trainer.fit(
        start, users, recipe, [np.random.default_rng(0)], anchor=(np.zeros(trainer.layout.size, np.float32), 5.0)
    )
    assert np.linalg.norm(pulled) < np.linalg.norm(trainer.fit(start, users, recipe, [np.random.default_rng(0)]))


def test_scores_equal_a_plain_loop_with_and_without_adapters(trainer, tiny_base_folder, random_examples):
    examples = random_examples(np.random.default_rng(5), 9)
    adapters = start_vectors(trainer, 2)
    owner = np.arange(9) % 2
    scores = trainer.score(examples, adapters=adapters, owner=owner)
    models = [peft_model(tiny_base_folder, trainer, vector) for vector in adapters]
    for index, example in enumerate(examples):
        tokens = len(example.ids) - max(example.first_label, 1)
        assert scores.tokens[index] == tokens
        naive = plain_loss(models[owner[index]], example).item() * tokens
        assert scores.nats[index] == pytest.approx(naive, abs=1e-4)
    under = trainer.score(examples, under=(adapters[0], trainer.layout, trainer.scaling))
    same = trainer.score(examples, adapters=adapters, owner=np.zeros(9, dtype=np.intp))
    np.testing.assert_allclose(under.nats, same.nats, atol=1e-4)
    base = trainer.score(examples)
    assert np.abs(base.nats - under.nats).max() > 1e-3


def test_merging_puts_the_base_back_bit_for_bit(trainer, random_examples):
    before = {n: p.clone() for n, p in trainer.base.model.state_dict().items()}
    trainer.score(
        random_examples(np.random.default_rng(6), 3),
        under=(start_vectors(trainer, 1)[0], trainer.layout, trainer.scaling),
    )
    after = trainer.base.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_training_and_scoring_on_a_gpu_are_those_of_the_cpu(tiny_base_folder, trainer, random_examples):
    people = [random_examples(np.random.default_rng(user), 6) for user in range(3)]
    start = start_vectors(trainer, 3)
    on_gpu = Trainer(load_base(tiny_base_folder, TARGETS, device="cuda"), rank=3, scaling=2.0)
    half = Trainer(load_base(tiny_base_folder, TARGETS, device="cuda", dtype=torch.bfloat16), rank=3, scaling=2.0)
    losses, found = [], []
    for each in (trainer, on_gpu, half):
        orders = [np.random.default_rng(user) for user in range(3)]
        trained = each.fit(start, people, Recipe(3, 4, 0.1), orders)
        rows = [record for own in people for record in own]
        scores = each.score(rows, adapters=trained, owner=np.repeat(np.arange(3), 6))
        losses.append(scores.nats.sum() / scores.tokens.sum())
        found.append(trained)
    np.testing.assert_allclose(found[1], found[0], atol=1e-4)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=0.02)
