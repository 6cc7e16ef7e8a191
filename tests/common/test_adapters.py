"""Adapters as vectors: layouts, sums of adapters, and PEFT's folders."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.adapters import (
    Layout,
    TensorSpec,
    concatenate,
    initial_vector,
    lora_layout,
    read_peft,
    write_peft,
)
from common.errors import DataError
from common.model_files import LinearModule

MODULES = (LinearModule("model.layers.0.q_proj", 6, 4), LinearModule("model.layers.0.v_proj", 6, 2))


def random_vector(layout, seed=0):
    return np.random.default_rng(seed).normal(size=layout.size).astype(np.float32)


def delta_weights(vector, layout, scaling):
    tensors = layout.split(vector)
    return {
        name.replace("lora_A", "W"): scaling * tensors[name.replace("lora_A", "lora_B")] @ value
        for name, value in tensors.items()
        if "lora_A" in name
    }


def test_a_layout_is_a_then_b_of_each_module():
    layout = lora_layout(MODULES, 3)
    assert [tensor.shape for tensor in layout.tensors] == [(3, 6), (4, 3), (3, 6), (2, 3)]
    assert layout.size == 3 * 6 + 4 * 3 + 3 * 6 + 2 * 3


@given(st.integers(0, 2**31), st.integers(1, 5))
def test_split_and_join_are_inverse(seed, rank):
    layout = lora_layout(MODULES, rank)
    vector = random_vector(layout, seed)
    assert (layout.join(layout.split(vector)) == vector).all()
    assert Layout.from_json(json.loads(json.dumps(layout.to_json()))) == layout


def test_the_digest_changes_with_a_name_a_shape_and_the_order():
    one, two = TensorSpec("a", (2, 3)), TensorSpec("b", (2, 3))
    digests = {
        Layout(tensors).digest
        for tensors in ((one, two), (two, one), (one,), (TensorSpec("a", (3, 2)), two), (TensorSpec("c", (2, 3)), two))
    }
    assert len(digests) == 5


def test_a_tensor_that_is_missing_unknown_or_misshapen_is_refused():
    layout = lora_layout(MODULES, 2)
    tensors = dict(layout.split(random_vector(layout)))
    name = layout.tensors[0].name
    for wrong in (
        {key: value for key, value in tensors.items() if key != name},
        tensors | {"private": np.zeros(3)},
        tensors | {name: np.zeros((2, 7))},
    ):
        with pytest.raises(ValueError, match=r"layout|shape"):
            layout.join(wrong)
    with pytest.raises(ValueError, match="shape"):
        layout.split(np.zeros(layout.size + 1))
    with pytest.raises(ValueError, match="once"):
        Layout((TensorSpec("a", (1,)), TensorSpec("a", (2,))))


def test_an_adapter_starts_as_peft_starts_it():
    layout = lora_layout(MODULES, 50)
    tensors = layout.split(initial_vector(layout, np.random.default_rng(0)))
    for name, value in tensors.items():
        if "lora_B" in name:
            assert not value.any()
        else:
            bound = 1 / np.sqrt(6)
            assert np.abs(value).max() <= bound
            assert np.std(value) == pytest.approx(bound / np.sqrt(3), rel=0.1)


def test_concatenated_adapters_add_up_exactly():
    one, two = lora_layout(MODULES, 2), lora_layout(MODULES, 5)
    first, second = random_vector(one, 1), random_vector(two, 2)
    joined, layout = concatenate([(first, one, 2.0), (second, two, 0.5)])
    together = delta_weights(joined, layout, 1.0)
    for name, value in delta_weights(first, one, 2.0).items():
        np.testing.assert_allclose(together[name], value + delta_weights(second, two, 0.5)[name], atol=1e-5)


@pytest.mark.parametrize("scaling", [2.0, 0.5])
def test_a_peft_folder_reads_back_and_another_scaling_is_folded_in(tmp_path, scaling):
    layout = lora_layout(MODULES, 3)
    vector = random_vector(layout)
    write_peft(tmp_path, vector, layout, scaling, "base")
    assert (read_peft(tmp_path, layout, scaling) == vector).all()
    other = read_peft(tmp_path, layout, 1.0)
    for name, value in delta_weights(vector, layout, scaling).items():
        np.testing.assert_allclose(delta_weights(other, layout, 1.0)[name], value, atol=1e-5)


def test_a_folder_that_is_no_plain_lora_of_this_layout_is_refused(tmp_path):
    layout = lora_layout(MODULES, 3)
    with pytest.raises(DataError, match="not a PEFT"):
        read_peft(tmp_path, layout, 1.0)
    write_peft(tmp_path, random_vector(layout), layout, 1.0, "base")
    with pytest.raises(DataError, match="rank"):
        read_peft(tmp_path, lora_layout(MODULES, 2), 1.0)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(DataError, match="plain LoRA"):
        read_peft(tmp_path, layout, 1.0)
