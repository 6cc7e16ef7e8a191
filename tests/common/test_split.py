"""A method laid over tensors: every number has one place, and nothing that stays is among what leaves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.adapters import concatenate, lora_layout
from common.errors import ConfigError
from common.methods import METHODS
from common.model_files import LinearModule
from common.split import cut_to_rank, public_start, sent_layout, split_of

LAYERS = [(layer, name, out) for layer in (2, 10) for name, out in (("q", 6), ("v", 4))]
LAYOUT = lora_layout([LinearModule(f"model.layers.{layer}.self_attn.{name}", 6, out) for layer, name, out in LAYERS], 3)
RECIPE = {"scaling": 2.0, "start_seed": 7, "personal_rank": 2, "shared_layers": 0}


def laid(name, **recipe):
    return split_of(METHODS[name], LAYOUT, RECIPE | recipe)


def product(adapter, layout=LAYOUT, scaling=2.0):
    """The change of every weight, one after the other: what an adapter does, whatever its factors are."""
    tensors = layout.split(np.asarray(adapter, float))
    names = [tensor.name for tensor in layout.tensors]
    pairs = zip(names[::2], names[1::2], strict=True)
    return np.concatenate([scaling * (tensors[b] @ tensors[a]).ravel() for a, b in pairs])


@pytest.mark.parametrize(
    ("name", "leaves"),
    [
        ("local", ()),
        ("fedavg", ("2.self_attn.q.lora_A", "2.self_attn.q.lora_B", "10.self_attn.v.lora_B")),
        ("ffa", ("2.self_attn.q.lora_B", "10.self_attn.v.lora_B")),
        ("fedsa", ("2.self_attn.q.lora_A", "10.self_attn.v.lora_A")),
        ("layers", ("2.self_attn.q.lora_A", "2.self_attn.v.lora_B")),
        ("flexlora", ("2.self_attn.q.lora_product", "10.self_attn.v.lora_product")),
    ],
)
def test_what_leaves_is_exactly_what_the_row_says(name, leaves):
    sent = {tensor.name for tensor in laid(name).sent.tensors}
    assert {f"base_model.model.model.layers.{one}.weight" for one in leaves} <= sent
    assert len(sent) == {"local": 0, "fedavg": 8, "ffa": 4, "fedsa": 4, "layers": 4, "flexlora": 4}[name]


@pytest.mark.parametrize("name", METHODS)
def test_what_leaves_and_what_stays_share_no_number(name):
    split = laid(name)
    assert not set(split.shared.tolist()) & set(split.kept.tolist())
    assert not (split.moved & split.own).any()
    if split.method.sends != "products":
        assert split.shared.size == split.sent.size
    if split.method.private_in_pass:
        assert split.shared.size + split.kept.size == split.trained.size


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(name for name, row in METHODS.items() if row.private_in_pass)), st.integers(0, 2**32 - 1))
def test_what_a_device_keeps_comes_back_and_never_shows_in_its_update(name, seed):
    split, generator = laid(name), np.random.default_rng(seed)
    vector = generator.normal(size=split.sent.size).astype(np.float32)
    kept = generator.normal(size=split.kept_size).astype(np.float32)
    (start,) = split.starts(vector, ["ada"], [kept])
    assert (start[split.kept] == kept).all()
    assert not split.updates(start[np.newaxis], vector).any()
    moved = start + split.own * generator.normal(size=start.size).astype(np.float32)
    assert not split.updates(moved[np.newaxis], vector).any()
    changed = start.copy()
    changed[split.shared] += 1.0
    np.testing.assert_allclose(split.updates(changed[np.newaxis], vector), 1.0, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(name for name, row in METHODS.items() if row.shared)), st.integers(0, 2**32 - 1))
def test_the_shared_part_alone_is_an_adapter_and_comes_back_from_it(name, seed):
    split = laid(name)
    adapter = split.adapter(split.vector_of(public_start(LAYOUT, 7)))
    assert not product(adapter).any(), "a run starts with an adapter that changes nothing"
    vector = np.random.default_rng(seed).normal(size=split.sent.size).astype(np.float32)
    vector = cut_to_rank(vector, split.sent, 3)
    np.testing.assert_allclose(split.vector_of(split.adapter(vector)), vector, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(name for name, row in METHODS.items() if row.remembers)), st.integers(0, 2**32 - 1))
def test_the_shared_adapter_and_the_private_one_over_it_add_up_to_what_was_trained(name, seed):
    split, generator = laid(name), np.random.default_rng(seed)
    vector = generator.normal(size=split.sent.size).astype(np.float32)
    kept = generator.normal(size=split.kept_size).astype(np.float32)
    (whole,) = [kept] if name == "ditto" else split.starts(vector, ["ada"], [kept])
    used = product(whole, LAYOUT if name == "ditto" else split.trained)
    (over,) = split.over(whole[np.newaxis], vector)
    shape = [
        LinearModule(a.name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"), a.shape[1], b.shape[0])
        for a, b in zip(LAYOUT.tensors[::2], LAYOUT.tensors[1::2], strict=True)
    ]
    own = lora_layout(shape, split.over_rank)
    joined, layout = concatenate([(split.adapter(vector), LAYOUT, 2.0), (over, own, 2.0)])
    np.testing.assert_allclose(product(joined, layout, 1.0), used, atol=1e-4)


def test_products_are_cut_to_the_nearest_matrix_of_the_rank():
    split = laid("flexlora")
    vector = np.random.default_rng(0).normal(size=split.sent.size).astype(np.float32)
    cut = cut_to_rank(vector, split.sent, 2)
    for name, one in split.sent.split(cut).items():
        whole = split.sent.split(vector)[name]
        left = np.linalg.svd(whole.astype(float), compute_uv=False)[2:]
        assert np.linalg.matrix_rank(one, tol=1e-4) == 2
        assert np.linalg.norm(whole - one) == pytest.approx(np.linalg.norm(left), rel=1e-5)
    factors = laid("fedavg").sent
    untouched = np.arange(factors.size, dtype=np.float32)
    assert cut_to_rank(untouched, factors, 1) is untouched


def test_every_device_gets_the_nearest_factors_of_its_own_rank():
    split = laid("flexlora", ranks="1,3")
    vector = cut_to_rank(np.random.default_rng(1).normal(size=split.sent.size).astype(np.float32), split.sent, 3)
    users = [f"{n}" for n in range(12)]
    assert {split.rank_of(user) for user in users} == {1, 3}
    for user, start in zip(users, split.starts(vector, users, [None] * len(users)), strict=True):
        np.testing.assert_allclose(product(start), cut_to_rank(vector, split.sent, split.rank_of(user)), atol=1e-4)
        ranks = {name: np.linalg.matrix_rank(value, tol=1e-5) for name, value in LAYOUT.split(start).items()}
        assert max(ranks.values()) == split.rank_of(user)


@pytest.mark.parametrize(
    ("name", "recipe", "words"),
    [
        ("layers", {"shared_layers": 2}, "stays private"),
        ("flexlora", {"ranks": "1,4"}, "between 1 and"),
        ("flexlora", {"ranks": "two"}, "between 1 and"),
        ("flexlora", {"ranks": "0"}, "between 1 and"),
    ],
)
def test_what_this_base_has_not_is_refused(name, recipe, words):
    with pytest.raises(ConfigError, match=words):
        laid(name, **recipe)


@pytest.mark.parametrize("name", ["ffa", "fedsa", "dual-joint", "layers", "flexlora"])
def test_what_is_frozen_or_private_needs_a_public_seed(name):
    with pytest.raises(ConfigError, match="seed"):
        split_of(METHODS[name], LAYOUT, {"scaling": 2.0})


def test_layers_are_counted_by_number_not_by_letter():
    assert {tensor.name.split(".")[4] for tensor in sent_layout(METHODS["layers"], LAYOUT, 1).tensors} == {"2"}
