"""A layer in one compiled call against the same layer in torch's operations in float64."""

from __future__ import annotations

import subprocess
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from client import compiled_code, native, native_layers, native_products
from client.llama_attention import RotaryAttention
from client.llama_layer import TorchLayer, Weights
from client.native_layers import Layers
from client.packing import pack

EPSILON = 1e-5


@pytest.fixture
def layers(monkeypatch) -> Layers:
    """Those of this machine, as with one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = native_layers.layers_for(torch.empty(0))
    if found is None:
        pytest.skip("no compiled layers here")
    return found


class Case:
    """One layer with random weights, users with random factors, and records of given lengths."""

    def __init__(self, lengths, users, heads, width, inner, *, rank=3, adapted=(0, 2), biased=()):
        self.generator = torch.Generator().manual_seed(sum(lengths) + width)
        self.heads, self.rank, self.adapted = heads, rank, adapted
        key_heads, share, each = heads
        asked, keys = key_heads * share * each, key_heads * each
        shapes = [(asked, width), (keys, width), (keys, width), (width, asked)] + [(inner, width)] * 2
        matrices = tuple(self.random(*shape) / shape[1] ** 0.5 for shape in (*shapes, (width, inner)))
        biases = tuple(self.random(shapes[part][0]) if part in biased else None for part in range(7))
        self.weights = Weights(self.random(width), self.random(width), matrices, biases)
        self.own = tuple(
            (
                self.random(len(users), rank, width) / width**0.5,
                self.random(len(users), matrices[part].shape[0], rank) / (4 * rank**0.5),
            )
            if part in adapted
            else None
            for part in range(7)
        )
        rows = [SimpleNamespace(ids=np.zeros(length, np.int32), first_label=1) for length in lengths]
        self.packed = pack(rows, users, torch.device("cpu"))
        self.states, self.back = (self.random(sum(lengths), width) for _ in range(2))
        self.config = SimpleNamespace(
            num_key_value_heads=key_heads, num_attention_heads=key_heads * share, head_dim=each, hidden_size=width
        )
        self.rotary = SimpleNamespace(inv_freq=0.7 ** torch.arange(each / 2), attention_scaling=1.0)

    def random(self, *shape):
        return torch.randn(shape, generator=self.generator)

    def wanted(self, per_record, deeper):
        """What torch's operations give in float64."""

        def double(one):
            return tuple(map(double, one)) if isinstance(one, tuple) else None if one is None else one.double()

        weights, own = Weights(*double(tuple(self.weights[:4]))), double(self.own)
        layer = TorchLayer(RotaryAttention(self.config, self.rotary), EPSILON)
        out, parts = layer.forward(weights, own, self.states.double(), self.packed)
        toward, found = layer.backward(weights, own, self.back.double(), parts, self.packed, per_record, deeper)
        return out, toward, found

    def found(self, layers, products, per_record, deeper, **kwargs):
        laid = products.layer(self.weights.matrices)
        norms = (self.weights.attention_norm, self.weights.mlp_norm)
        layer = layers.layer(laid, norms, self.weights.biases[:3], self.heads, EPSILON)
        turns = RotaryAttention(self.config, self.rotary).angles(max(self.packed.records.lengths))
        out, kept = layers.forward(layer, self.packed, turns, self.own[:3], self.states)
        runs = (self.packed.records if per_record else self.packed.users).bounds
        toward, found = layers.backward(
            layer, self.packed, turns, self.own[:3], kept, self.back, runs, deeper=deeper, **kwargs
        )
        return out, toward, found


def close(found, wanted):
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 4e-6 * max(1.0, float(wanted.abs().max()))


def compare(case, layers, products=None, *, per_record=False, deeper=True):
    products = products or native_products.products_for(torch.empty(0))
    out, toward, found = case.found(layers, products, per_record, deeper)
    wanted = case.wanted(per_record, deeper)
    close(out, wanted[0])
    if deeper:
        close(toward, wanted[1])
    else:
        assert toward is None
    for own, pair in zip(found, wanted[2][:3], strict=True):
        assert (own is None) == (pair is None)
        if own is not None:
            close(own[0], pair[0])
            close(own[1], pair[1])


@pytest.mark.parametrize(
    ("lengths", "users"),
    [
        ([1], [1]),
        ([64] * 5, [2, 3]),
        ([4, 64, 33, 17, 16, 15, 1, 2], [1, 3, 4]),
        ([1] * 130, [129, 1]),
        ([200, 3, 121], [1, 1, 1]),
        ([512, 5], [2]),
    ],
)
@pytest.mark.parametrize("heads", [(4, 1, 32), (1, 3, 16)])
def test_a_layer_and_its_gradients_over_records_of_any_length(layers, lengths, users, heads):
    for per_record, deeper in product((False, True), repeat=2):
        compare(Case(lengths, users, heads, 32, 40), layers, per_record=per_record, deeper=deeper)


@pytest.mark.parametrize(
    ("heads", "width", "inner"), [((2, 2, 8), 16, 5), ((1, 1, 64), 48, 64), ((4, 1, 32), 128, 344)]
)
def test_layers_of_any_width(layers, heads, width, inner):
    compare(Case([30, 3, 70], [2, 1], heads, width, inner), layers)


@pytest.mark.parametrize("adapted", [(), (1,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("rank", [1, 8, 20])
def test_adapters_on_any_of_queries_keys_and_values(layers, adapted, rank):
    for deeper in (False, True):
        compare(Case([20, 9, 60], [2, 1], (2, 1, 16), 32, 40, rank=rank, adapted=adapted), layers, deeper=deeper)


@pytest.mark.parametrize("biased", [(0, 1, 2), (2,)])
def test_biases_of_queries_keys_and_values(layers, biased):
    compare(Case([20, 9], [1, 1], (2, 1, 16), 32, 40, biased=biased), layers)


@pytest.mark.parametrize("per_record", [False, True])
def test_gradients_are_added_onto_what_is_there(layers, per_record):
    case = Case([20, 9, 60], [2, 1], (2, 1, 16), 32, 40)
    products = native_products.products_for(torch.empty(0))
    plain = case.found(layers, products, per_record, True)[2]
    runs = 3 if per_record else 2
    target = torch.ones(runs, 1000)
    places = ((target[:, 3:99], target[:, 200:296]), None, (target[:, 300:396], target[:, 500:596]))
    case.found(layers, products, per_record, True, onto=places, scaling=2.0)
    for (a, b), pair in zip((places[0], places[2]), (plain[0], plain[2]), strict=True):
        close(a - 1.0, pair[0].flatten(1).double())
        close(b - 1.0, 2 * pair[1].flatten(1).double())
    assert int((target == 1.0).sum()) == runs * (1000 - 4 * 96)


def test_more_users_than_fit_a_block_and_a_user_over_many_blocks(layers):
    compare(Case([2] * 200 + [50] * 9, [1] * 200 + [9], (1, 1, 16), 32, 40), layers)


def test_factors_of_other_shapes_go_another_way(layers):
    def pair(rank, width, outputs):
        return torch.empty(2, rank, width), torch.empty(2, outputs, rank)

    assert layers.takes((pair(3, 32, 16), None, pair(3, 32, 32)))
    assert layers.takes((None, None, None))
    assert not layers.takes((pair(3, 32, 16), None, pair(4, 32, 16)))
    assert not layers.takes((pair(3, 33, 16), None, None))
    assert not layers.takes((None, pair(3, 32, 15), None))
    assert not layers.takes((tuple(one.transpose(1, 2) for one in pair(32, 32, 32)), None, None))


def test_what_is_not_a_number_stays_in_its_record(layers):
    case = Case([20, 30, 7], [2, 1], (2, 1, 16), 32, 40)
    case.states[25, 3] = torch.nan
    products = native_products.products_for(torch.empty(0))
    out, toward, _ = case.found(layers, products, False, True)
    for rows in (out, toward):
        assert rows[:20].isfinite().all()
        assert rows[50:].isfinite().all()
    assert out[25:50].isnan().all()


def test_layers_that_disagree_with_torch_are_not_used(layers, monkeypatch):
    products = native_products.products_for(torch.empty(0))
    assert native_layers._agree(layers, products)
    real = Layers.forward
    monkeypatch.setattr(Layers, "forward", lambda *given: (real(*given)[0] * 1.0001, real(*given)[1]))
    assert not native_layers._agree(layers, products)


def test_there_are_none_without_products(monkeypatch):
    monkeypatch.setattr(native_layers, "products_for", lambda like: None)
    assert native_layers.layers_for(torch.empty(0)) is None


@pytest.mark.skipif(" avx2 " not in compiled_code.processor() + " ", reason="a processor without AVX2")
def test_vectors_of_eight_numbers_give_the_same(layers, monkeypatch, tmp_path):
    source = tmp_path / "layers.c"
    for path in (native_products.SOURCE, native_products.INCLUDED, native.SOURCE):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(compiled_code, "NATIVE", ("-mavx2", "-mfma"))
    try:
        products = native_products.Products(compiled_code.compiled(source))
    except (OSError, subprocess.SubprocessError):
        pytest.skip("no compiler, or none that knows these processors, or a machine too busy for it")
    assert products.vector == 8
    assert native_products._agree(products)
    narrow = Layers(products)
    assert native_layers._agree(narrow, products)
    compare(Case([4, 64, 33, 130], [1, 3], (2, 2, 16), 32, 40), narrow, products)
