"""Many prompts at once are answered as each alone, and with each row's own adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client import greedy_answers as greedy_module
from client.base_model import load_base
from client.greedy_answers import end_tokens, greedy_answers
from client.trainer import Trainer
from common.adapters import concatenate


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)


def alone(trainer, prompt, tokens, adapter=None):
    """The token-by-token loop over one prompt, through the model's own logits."""
    ids = prompt.tolist()
    with trainer.over_base(adapter), torch.no_grad():
        for _ in range(tokens):
            token = int(trainer.base.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token in end_tokens(trainer.base):
                break
            ids.append(token)
    return ids[len(prompt) :]


def prompts_of(examples):
    return [one.ids[: max(one.first_label, 1)] for one in examples]


def test_prompts_side_by_side_are_answered_as_each_alone(trainer, random_examples):
    prompts = prompts_of(random_examples(np.random.default_rng(0), 70))
    answers = greedy_answers(trainer, prompts, 6)
    for prompt, answer in list(zip(prompts, answers, strict=True))[::7]:
        assert answer.tolist() == alone(trainer, prompt, 6)


def test_each_prompt_is_answered_with_its_own_adapter_over_the_one_below(trainer, random_examples):
    generator = np.random.default_rng(1)
    prompts = prompts_of(random_examples(generator, 6))
    adapters = generator.normal(0, 0.3, (3, trainer.layout.size)).astype(np.float32)
    below = (generator.normal(0, 0.3, trainer.layout.size).astype(np.float32), trainer.layout, trainer.scaling)
    owner = np.array([2, 0, 1, 1, 0, 2])
    answers = greedy_answers(trainer, prompts, 5, adapters=adapters, owner=owner, under=below)
    for prompt, whose, answer in zip(prompts, owner, answers, strict=True):
        vector, layout = concatenate([below, (adapters[whose], trainer.layout, trainer.scaling)])
        assert answer.tolist() == alone(trainer, prompt, 5, (vector, layout, 1.0))
    np.testing.assert_array_equal(greedy_answers(trainer, prompts[:1], 5)[0], alone(trainer, prompts[0], 5))


def test_an_answer_stops_before_the_token_that_ends_it(trainer, random_examples, monkeypatch):
    prompts = prompts_of(random_examples(np.random.default_rng(2), 4))
    (first,) = greedy_answers(trainer, prompts[:1], 1)[0]
    monkeypatch.setattr(greedy_module, "end_tokens", lambda base: frozenset({int(first)}))
    ended = greedy_answers(trainer, prompts, 3)
    assert not len(ended[0])
    assert all(first not in answer for answer in ended)
