"""The pass by hand against transformers' own forward and autograd, over every layer that can carry an adapter."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from client.label_loss import loss_gradient
from client.llama_pass import LlamaPass, StackedGradients
from client.lora import StackedLora
from client.packing import pack
from common.adapters import Layout, TensorSpec

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "llama with biases": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
}


def model_of(name):
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    with torch.no_grad():  # biases and norms start at zero and one, which would hide them
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def adapted(model, targets, users):
    names = [name for name, _ in model.named_modules() if name.endswith(targets)]
    lora = StackedLora(model, names)
    generator = torch.Generator().manual_seed(2)
    factors, tensors = {}, []
    for layer in lora.layers:
        inputs, outputs = layer.linear.in_features, layer.linear.out_features
        a = 0.3 * torch.randn(users, 3, inputs, generator=generator)
        b = 0.3 * torch.randn(users, outputs, 3, generator=generator)
        factors[layer.name] = (a, b)
        tensors += [TensorSpec(layer.name + "A", (3, inputs)), TensorSpec(layer.name + "B", (outputs, 3))]
    offsets = Layout(tuple(tensors)).offsets
    places = {
        layer.name: (
            offsets[layer.name + "A"].start,
            offsets[layer.name + "B"].start,
            offsets[layer.name + "B"].stop,
        )
        for layer in lora.layers
    }
    return lora, factors, places, Layout(tuple(tensors)).size


def naive(model, lora, factors, rows, owner):
    """Each record's gradient of the factors by autograd through the model's own forward, shape `(rows, size)`."""
    found = []
    for row, user in zip(rows, owner, strict=True):
        own = [
            (a[user : user + 1].clone().requires_grad_(), b[user : user + 1].clone().requires_grad_())
            for a, b in factors.values()
        ]
        lora.lay_over(own)
        ids = torch.from_numpy(row.ids).long()[None]
        labels = ids.clone()
        labels[:, : row.first_label] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        found.append(torch.cat([part.grad.flatten() for pair in own for part in pair]))
        lora.lay_over()
    return torch.stack(found)


@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj",), ("up_proj",), ("k_proj", "down_proj"), ALL])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_models_own_forward(name, targets, random_examples):
    model = model_of(name)
    rows = random_examples(np.random.default_rng(3), 5, vocabulary=96, shortest=4, longest=40)
    owner, sizes = [0, 0, 0, 1, 1], [3, 2]
    lora, factors, places, size = adapted(model, targets, 2)
    by_hand = LlamaPass.of(model)
    assert by_hand is not None
    wanted = naive(model, lora, factors, rows, owner)
    packed = pack(rows, sizes, torch.device("cpu"))

    def loss(hidden):
        return loss_gradient(hidden, model.lm_head.weight, packed.targets, packed.weights)

    for keep_little in (False, True):
        by_hand.keep_little = keep_little
        users = StackedGradients(torch.zeros(2, size), places, 1.0)
        records = StackedGradients(torch.zeros(5, size), places, 1.0, per_record=True)
        with torch.no_grad():
            by_hand.train(packed, factors, users, loss)
            by_hand.train(packed, factors, records, loss)
        np.testing.assert_allclose(records.target, wanted, atol=2e-5, rtol=1e-3)
        together = torch.stack([wanted[:3].sum(dim=0), wanted[3:].sum(dim=0)])
        np.testing.assert_allclose(users.target, together, atol=4e-5, rtol=1e-3)


@pytest.mark.parametrize("length", [9, 150])  # by plain products, and by the fused kernel
def test_records_of_one_length_and_long_ones_take_their_own_ways(length, random_examples):
    model = model_of("llama")
    rows = random_examples(np.random.default_rng(4), 4, vocabulary=96, shortest=length, longest=length)
    lora, factors, places, size = adapted(model, ("q_proj", "v_proj"), 2)
    by_hand = LlamaPass.of(model)
    packed = pack(rows, [2, 2], torch.device("cpu"))
    sink = StackedGradients(torch.zeros(4, size), places, 1.0, per_record=True)
    with torch.no_grad():
        by_hand.train(
            packed,
            factors,
            sink,
            lambda hidden: loss_gradient(hidden, model.lm_head.weight, packed.targets, packed.weights),
        )
    np.testing.assert_allclose(sink.target, naive(model, lora, factors, rows, [0, 0, 1, 1]), atol=2e-5, rtol=1e-3)


def test_a_model_that_computes_something_else_is_not_taken():
    model = model_of("llama")
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    assert LlamaPass.of(model) is None
    assert LlamaPass.of(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))) is None


def test_what_a_record_says_depends_on_no_other_record(random_examples):
    model = model_of("llama")
    rows = random_examples(np.random.default_rng(5), 4, vocabulary=96, shortest=5, longest=50)
    by_hand = LlamaPass.of(model)
    with torch.no_grad():
        whole = by_hand.hidden(pack(rows, [4], torch.device("cpu")), {})
        changed = [*rows[:3], dataclasses.replace(rows[3], ids=rows[3].ids[::-1].copy())]
        other = by_hand.hidden(pack(changed, [4], torch.device("cpu")), {})
    kept = sum(len(row.ids) for row in rows[:3])
    torch.testing.assert_close(whole[:kept], other[:kept], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole[kept:], other[kept:])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_gradients_of_the_cpu(random_examples, dtype):
    rows = random_examples(np.random.default_rng(3), 5, vocabulary=96, shortest=4, longest=40)
    found = []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = model_of("llama")
        _, factors, places, size = adapted(model, ALL, 2)
        model = model.to(device, kind)
        packed = pack(rows, [3, 2], torch.device(device))
        sink = StackedGradients(torch.zeros(2, size, device=device), places, 1.0)
        weight = model.lm_head.weight
        with torch.no_grad():
            LlamaPass.of(model).train(
                packed,
                {name: (a.to(device, kind), b.to(device, kind)) for name, (a, b) in factors.items()},
                sink,
                lambda hidden, p=packed, w=weight: loss_gradient(hidden, w, p.targets, p.weights),
            )
        found.append(sink.target.cpu())
    far = (found[1] - found[0]).norm() / found[0].norm()
    assert far < (1e-3 if dtype == torch.float32 else 0.1)
