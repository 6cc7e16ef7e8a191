"""Int8 layers: what they compute, the gradients that they give, and adapters that are trained over them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from client.base_model import load_base
from client.int8_linear import Int8Linear, quantize
from client.preflight import Preflight
from client.trainer import ExamplePromise, Recipe, Trainer
from common.model_files import PRECISIONS, model_digest, precise_digest, precision_of
from common.privacy import Randomness

TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def trainers(tiny_base_folder):
    """Over an int8 base, and over the same weights dequantized into ordinary layers."""
    eighth = Trainer(load_base(tiny_base_folder, TARGETS, precision="int8"), rank=3, scaling=2.0)
    plain = load_base(tiny_base_folder, TARGETS)
    for name, layer in eighth.base.model.named_modules():
        if isinstance(layer, Int8Linear):
            plain.model.get_submodule(name.removesuffix(".linear")).weight.data = layer.weight
    return eighth, Trainer(plain, rank=3, scaling=2.0)


@pytest.fixture(scope="module")
def records(random_examples):
    return random_examples(np.random.default_rng(0), 7)


def vectors(trainer, users, seed=0):
    return np.random.default_rng(seed).normal(0, 0.1, (users, trainer.layout.size)).astype(np.float32)


@given(st.integers(1, 9), st.integers(1, 9), st.floats(1e-6, 1e6), st.integers(0, 2**32 - 1))
def test_each_weight_is_off_by_half_a_scale_at_most(rows, columns, size, seed):
    weight = size * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    layer = Int8Linear(weight)
    assert layer.quantized.dtype == torch.int8
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((layer.weight - weight).abs() <= scale * 0.5001).all()
    assert layer.quantized.abs().max() <= 127


def test_rows_of_zeros_stay_zeros():
    layer = Int8Linear(torch.zeros(2, 3), torch.ones(2))
    assert torch.equal(layer(torch.ones(1, 3)), torch.ones(1, 2))


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_get_the_gradient_of_the_dequantized_layer(bias):
    torch.manual_seed(0)
    float_layer = nn.Linear(16, 12, bias)
    layer = Int8Linear(float_layer.weight, float_layer.bias)
    plain = layer.dequantized()
    x = torch.randn(3, 5, 16)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(one) ** 2).sum().backward()
    (plain(two) ** 2).sum().backward()
    torch.testing.assert_close(one.grad, two.grad)
    assert one.grad.abs().max() > 0
    layer.scale, layer.bias = layer.scale.double(), None
    assert torch.autograd.gradcheck(layer, x[0].double().requires_grad_())


@pytest.mark.parametrize("merged", [False, True])
def test_factors_get_the_gradients_of_the_dequantized_model(trainers, records, merged):
    eighth = trainers[0]
    under = (vectors(eighth, 1, 3)[0], eighth.layout, 2.0) if merged else None
    start = vectors(eighth, 1)[0]
    for by_hand in (True, False):
        found = []
        for trainer in trainers:
            fast = trainer._fast
            assert fast is not None  # the pass by hand takes an int8 base
            trainer._fast = fast if by_hand else None
            with trainer.over_base(under):
                found.append(trainer.example_gradients(start, records))
            trainer._fast = fast
        np.testing.assert_allclose(found[0], found[1], atol=1e-5 * np.abs(found[1]).max())
        assert np.abs(found[0]).max() > 0


def test_adapters_train_over_an_int8_base_as_over_its_dequantized_weights(trainers, records):
    recipe = Recipe(steps=3, batch=2, learning_rate=0.1, optimizer="momentum")
    trained = []
    for trainer in trainers:
        orders = [np.random.default_rng(user) for user in range(2)]
        trained.append(trainer.fit(vectors(trainer, 2), [records[:3], records[3:]], recipe, orders))
    np.testing.assert_allclose(trained[0], trained[1], atol=1e-4)
    promise = ExamplePromise(0.1, 0.0, 1.0)
    silos = [
        trainer.fit_example_dp(vectors(trainer, 1)[0], records, recipe, promise, Randomness.rehearsal(0))
        for trainer in trainers
    ]
    np.testing.assert_allclose(silos[0], silos[1], atol=1e-4)


def test_scores_are_those_of_the_dequantized_model_and_close_to_the_floats(trainers, records, tiny_base_folder):
    eighth, plain = trainers
    np.testing.assert_allclose(eighth.score(records).nats, plain.score(records).nats, rtol=1e-5)
    floats = Trainer(load_base(tiny_base_folder, TARGETS), rank=3, scaling=2.0).score(records).nats
    assert np.abs(eighth.score(records).nats / floats - 1).max() < 0.02


def test_a_merged_adapter_is_taken_out_again_to_the_bit(trainers, records):
    eighth, _ = trainers
    before = eighth.score(records).nats
    merged = eighth.score(records, under=(vectors(eighth, 1, 5)[0], eighth.layout, 2.0)).nats
    assert np.abs(merged - before).max() > 1e-3
    assert np.array_equal(eighth.score(records).nats, before)


@pytest.mark.parametrize("unit", ["user", "example"])
def test_preflight_passes_on_an_int8_base(trainers, release_spec, unit):
    eighth, _ = trainers
    recipe = {
        "local_steps": 1,
        "local_batch": 2,
        "learning_rate": 0.1,
        "optimizer": "sgd",
        "scaling": 2.0,
        "example_records": 20,
        "rank": 3,
        "start_seed": 7,
    }
    layout = eighth.layout
    spec = release_spec(
        names=tuple(tensor.name for tensor in layout.tensors),
        shapes=tuple(tensor.shape for tensor in layout.tensors),
        recipe=recipe,
        model=eighth.base.digest,
        method="fedavg",
        unit=unit,
        noise_multiplier=0.0,
    )
    report = Preflight(eighth).check(spec)
    assert dict(report.checks)["layers"].endswith("base held at int8")
    assert unit == "user" or "same per-record gradients" in report.second_opinion


def test_what_is_opened_tensor_by_tensor_is_what_is_quantized_as_a_whole(tiny_base_folder):
    lean = load_base(tiny_base_folder, TARGETS, precision="int8")
    whole = load_base(tiny_base_folder, TARGETS)
    quantize(whole.model)
    ids = torch.arange(1, 9)[None]
    assert torch.equal(lean.model(input_ids=ids).logits, whole.model(input_ids=ids).logits)
    kinds = {name: type(one) for name, one in lean.model.named_modules() if hasattr(one, "in_features")}
    assert {kind for name, kind in kinds.items() if name != "lm_head"} == {Int8Linear}
    assert kinds["lm_head"] is nn.Linear


def test_a_base_has_another_name_at_another_precision(tiny_base_folder):
    digest = model_digest(tiny_base_folder)
    names = {one: precise_digest(digest, one) for one in PRECISIONS}
    assert len(set(names.values())) == 3
    assert names["float32"] == digest
    for precision, name in names.items():
        assert precision_of(name, digest) == precision
        assert load_base(tiny_base_folder, TARGETS, precision=precision).digest == name
    assert precision_of("ab" * 32, digest) is None
    with pytest.raises(ValueError, match="precision"):
        precise_digest(digest, "int4")


def test_dynamic_quantization_would_give_no_gradient():
    """The reason for a layer of our own: the stock one trains nothing, silently."""
    layer = nn.Linear(8, 8)
    layer.qconfig = torch.ao.quantization.default_dynamic_qconfig
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it will go
            quantized = torch.ao.nn.quantized.dynamic.Linear.from_float(layer)
    except (AttributeError, RuntimeError):
        pytest.skip("this torch has no dynamic quantization, or no engine for it")
    x = torch.randn(2, 8, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions say so, and go on
        y = quantized(x)
        if y.requires_grad:
            y.sum().backward()
    assert x.grad is None
