"""Training with compiled kernels equals training without, over every layer that can carry an adapter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client import label_loss, llama_native, llama_pass, native, native_layers, native_products
from client.base_model import load_base
from client.llama_native import NativeLayer
from client.trainer import Trainer

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason=f"no kernels here: {native.why_no_kernels()}")
ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def without(monkeypatch):
    """Switch kernels off for what follows."""

    def switch():
        for module in (llama_pass, label_loss):
            monkeypatch.setattr(module, "kernels_for", lambda like: None)

    return switch


def trainer_of(folder, targets=("q_proj", "v_proj"), dtype=torch.float32):
    return Trainer(load_base(folder, targets, dtype=dtype), rank=3, scaling=2.0)


@pytest.fixture(params=["compiled layers", "compiled products", "torch's products"])
def products(request, monkeypatch):
    """One thread, and layers and products by either; a machine for which there are none goes by torch's every time."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    if request.param == "compiled products":
        monkeypatch.setattr(llama_native, "layers_for", lambda like: None)
    if request.param == "torch's products":
        for module in (llama_native, label_loss):
            monkeypatch.setattr(module, "products_for", lambda like: None)


@needs_kernels
@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("o_proj", "up_proj"), ("k_proj", "down_proj"), ALL])
def test_gradients_with_kernels_are_those_without(tiny_base_folder, random_examples, monkeypatch, targets):
    used = []
    real = NativeLayer.backward
    monkeypatch.setattr(NativeLayer, "backward", lambda *a, **k: used.append(1) or real(*a, **k))
    trainer = trainer_of(tiny_base_folder, targets)
    rows = random_examples(np.random.default_rng(3), 7, shortest=4, longest=40)
    owner = np.array([0, 0, 1, 1, 1, 2, 2])
    theta = torch.from_numpy(np.random.default_rng(4).normal(0, 0.1, (3, trainer.layout.size)).astype(np.float32))
    exact = found_by(trainer_of(tiny_base_folder, targets, torch.float64), rows, owner, theta.double())
    for keep_little in (False, True):
        trainer._passing().keep_little = keep_little
        trainer._passing()._native = None
        own = found_by(trainer, rows, owner, theta)
        assert used
        with monkeypatch.context() as context:
            for module in (llama_pass, label_loss):
                context.setattr(module, "kernels_for", lambda like: None)
            plain = found_by(trainer, rows, owner, theta)
        assert (plain[2] - plain[0]).abs().max() > 1e-3
        for found, other, wanted in zip(own, plain, exact, strict=True):
            most = max(1.0, float(wanted.abs().max()))
            assert (found - other).abs().max() < 4e-6 * most
            # No more than twice as far from float64 as what torch computes in float32.
            assert (found - wanted).norm() < 2 * (other - wanted).norm()


def found_by(trainer, rows, owner, theta):
    """Gradients by user, by record, by user over other matrices, and by user again."""
    under = (theta[0].float().numpy(), trainer.layout, trainer.scaling)
    found = [trainer._gradient(rows, owner, theta)]
    found.append(torch.from_numpy(trainer.example_gradients(theta[1].numpy(), rows)))
    with trainer.over_base(under):
        found.append(trainer._gradient(rows, owner, theta))
    return [*found, trainer._gradient(rows, owner, theta)]


@needs_kernels
@pytest.mark.usefixtures("products")
def test_scores_with_kernels_are_those_without(tiny_base_folder, random_examples, without):
    trainer = trainer_of(tiny_base_folder)
    rows = random_examples(np.random.default_rng(3), 9, shortest=4, longest=40)
    adapters = np.random.default_rng(4).normal(0, 0.1, (2, trainer.layout.size)).astype(np.float32)
    owner = np.array([0, 1, 0, 1, 1, 0, 0, 1, 1])
    own = trainer.score(rows, adapters=adapters, owner=owner)
    without()
    plain = trainer.score(rows, adapters=adapters, owner=owner)
    np.testing.assert_allclose(own.nats, plain.nats, rtol=1e-6)
    np.testing.assert_array_equal(own.correct, plain.correct)


@needs_kernels
@pytest.mark.usefixtures("products")
def test_weights_that_were_changed_are_not_the_ones_that_were_joined(tiny_base_folder, random_examples, without):
    trainer = trainer_of(tiny_base_folder)
    rows = random_examples(np.random.default_rng(3), 2)
    before = trainer.score(rows).nats
    with torch.no_grad():
        for block in trainer.base.model.model.layers:
            block.mlp.up_proj.weight.mul_(1.5)
    after = trainer.score(rows).nats
    without()
    np.testing.assert_allclose(trainer.score(rows).nats, after, rtol=1e-5)
    assert (before != after).all()


@needs_kernels
def test_long_records_go_by_torchs_own_attention(tiny_base_folder, random_examples, monkeypatch):
    monkeypatch.setattr(llama_native, "LONGEST_RECORD", 10)
    monkeypatch.setattr(NativeLayer, "forward", None)
    trainer = trainer_of(tiny_base_folder)
    rows = random_examples(np.random.default_rng(3), 2, shortest=11, longest=20)
    assert np.isfinite(trainer.score(rows).nats).all()


@needs_kernels
@pytest.mark.parametrize("whole", [True, False])
def test_layers_and_products_are_compiled_ones_with_one_thread_only(
    tiny_base_folder, random_examples, monkeypatch, whole
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    if native_layers.layers_for(torch.empty(0)) is None:
        pytest.skip("no compiled layers here")
    if not whole:
        monkeypatch.setattr(llama_native, "layers_for", lambda like: None)
    used = []
    for kind, method in ((native_layers.Layers, "backward"), (native_products.Products, "mlp_back")):
        real = getattr(kind, method)
        monkeypatch.setattr(kind, method, lambda *a, _real=real, **k: used.append(a[0]) or _real(*a, **k))
    trainer = trainer_of(tiny_base_folder)
    rows, theta = random_examples(np.random.default_rng(3), 2), torch.zeros(1, trainer.layout.size)
    trainer._gradient(rows, np.array([0, 0]), theta)
    assert len(used) == len(trainer._passing()._blocks)
    assert all(isinstance(one, native_layers.Layers) == whole for one in used)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    trainer._gradient(rows, np.array([0, 0]), theta)
    assert len(used) == len(trainer._passing()._blocks)
