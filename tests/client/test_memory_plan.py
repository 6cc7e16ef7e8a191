"""What training will take of memory: whole passes where they fit, smaller ones where not, else a reason."""

from __future__ import annotations

import json

import pytest

from client.base_model import load_base
from client.memory_plan import INTERPRETER_MEGABYTES, MemoryPlan
from client.trainer import Trainer
from common.errors import DataError, Refusal
from common.model_files import PRECISIONS

HALF_BILLION = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "intermediate_size": 4864,
    "vocab_size": 151936,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(HALF_BILLION))
    return tmp_path


def test_a_large_grant_gets_whole_passes_that_keep_everything(folder):
    plan = MemoryPlan.of(folder, "float32", 1e5)
    assert (plan.pass_tokens, plan.keep_little) == (512, False)


def test_a_smaller_grant_gets_a_more_frugal_plan_that_fits_and_a_tiny_one_a_reason(folder):
    before = MemoryPlan.of(folder, "float32", 1e5)
    for granted in (3600.0, 3200.0, 2900.0):
        plan = MemoryPlan.of(folder, "float32", granted)
        assert plan.megabytes <= granted
        assert (plan.pass_tokens, not plan.keep_little) <= (before.pass_tokens, not before.keep_little)
        before = plan
    assert before != MemoryPlan.of(folder, "float32", 1e5)
    with pytest.raises(Refusal, match="int8 base takes less") as refused:
        MemoryPlan.of(folder, "float32", 1000.0)
    assert refused.value.code == "not-now"


def test_what_float32_does_not_fit_into_int8_does(folder):
    sizes = {one: MemoryPlan.of(folder, one, 1e5).megabytes - INTERPRETER_MEGABYTES for one in PRECISIONS}
    assert sizes["int8"] < 0.75 * sizes["float32"]
    with pytest.raises(Refusal):
        MemoryPlan.of(folder, "float32", 2000.0)
    assert MemoryPlan.of(folder, "int8", 2000.0).megabytes <= 2000.0


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"hidden_size": "large"}'])
def test_a_model_that_does_not_say_how_large_it_is_is_no_model(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(DataError, match="how large"):
        MemoryPlan.of(tmp_path, "float32", 1000.0)


def test_a_frugal_plan_is_applied_to_the_pass_by_hand(tiny_base_folder):
    base = load_base(tiny_base_folder, ("q_proj",))
    trainer = Trainer(base, rank=2, scaling=1.0, pass_tokens=64)
    MemoryPlan(64, True, 0.0).apply(base)
    assert trainer._fast is not None
    assert trainer._fast.keep_little
    assert trainer.at_rank(3).pass_tokens == 64


@pytest.mark.parametrize(
    ("hidden", "layers", "heads", "keys", "inner", "vocabulary", "precision", "measured"),
    [
        (576, 30, 9, 3, 1536, 49152, "float32", 1548),
        (576, 30, 9, 3, 1536, 49152, "bfloat16", 1313),
        (576, 30, 9, 3, 1536, 49152, "int8", 1240),
        (896, 24, 14, 2, 4864, 151936, "float32", 3312),
        (896, 24, 14, 2, 4864, 151936, "bfloat16", 3230),
        (896, 24, 14, 2, 4864, 151936, "int8", 3018),
    ],
)
def test_no_measured_peak_is_above_what_was_planned_for(
    tmp_path, hidden, layers, heads, keys, inner, vocabulary, precision, measured
):
    """The peaks of docs/devices.md, in megabytes, of passes of 512 tokens that keep everything."""
    config = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = MemoryPlan.of(tmp_path, precision, 1e9)
    assert (plan.pass_tokens, plan.keep_little) == (512, False)
    assert measured <= plan.megabytes <= 1.7 * measured
