"""Which bases are taken, and which are refused by the name of the layer that does not fit."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from client.base_model import load_base
from client.trainer import Recipe, Trainer
from common.errors import ConfigError, DataError
from common.model_files import linear_modules, model_digest, model_folder

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def saved(kind, folder, tokenizer_from, **changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**(SMALL | changes))
    names = {"Gemma2": "Gemma2ForCausalLM", "GPT2": "GPT2LMHeadModel"}
    model = getattr(transformers, names.get(kind, f"{kind}ForCausalLM"))(config)
    model.save_pretrained(folder)
    for file in tokenizer_from.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("Llama", {}), ("Qwen2", {}), ("Gemma", {"head_dim": 8}), ("Gemma2", {"head_dim": 8}), ("Mistral", {})],
)
def test_llama_qwen_gemma_and_mistral_train_and_score(kind, changes, tmp_path, tiny_base_folder, random_examples):
    base = load_base(saved(kind, tmp_path / "model", tiny_base_folder, **changes), ("q_proj", "v_proj"))
    trainer = Trainer(base, rank=2, scaling=2.0)
    users = [random_examples(np.random.default_rng(0), 4)]
    start = np.random.default_rng(0).normal(0, 0.1, trainer.layout.size).astype(np.float32)
    trained = trainer.fit(start, users, Recipe(8, 4, 0.02, "adam"), [np.random.default_rng(0)])
    before = trainer.score(users[0], adapters=start[None], owner=np.zeros(4, dtype=np.intp))
    after = trainer.score(users[0], adapters=trained, owner=np.zeros(4, dtype=np.intp))
    assert after.nats.sum() < before.nats.sum()


def test_layers_that_are_not_linear_are_refused_by_name(tmp_path, tiny_base_folder):
    folder = saved("GPT2", tmp_path / "model", tiny_base_folder, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    with pytest.raises(ConfigError, match=r"h\.0\.attn\.c_attn is Conv1D"):
        load_base(folder, ("c_attn",))


def test_a_mixture_of_experts_is_refused_by_the_layer_that_routes(tmp_path, tiny_base_folder):
    folder = saved("Mixtral", tmp_path / "model", tiny_base_folder, num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(ConfigError, match="expert"):
        load_base(folder, ("q_proj",))


def test_a_target_that_is_nowhere_is_named(tiny_base_folder):
    with pytest.raises(ConfigError, match="w_nothing"):
        linear_modules(tiny_base_folder, ["q_proj", "w_nothing"])


def test_layers_are_in_the_order_of_their_numbers(tmp_path, tiny_base_folder):
    folder = saved("Llama", tmp_path / "model", tiny_base_folder, num_hidden_layers=11)
    names = [module.name for module in linear_modules(folder, ["q_proj"])]
    assert names == [f"model.layers.{number}.self_attn.q_proj" for number in range(11)]


def test_missing_and_broken_files_are_named(tmp_path, tiny_base_folder):
    with pytest.raises(DataError, match="safetensors"):
        linear_modules(tmp_path, ["q_proj"])
    broken = shutil.copytree(tiny_base_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header {")
    with pytest.raises(DataError, match=r"model\.safetensors"):
        linear_modules(broken, ["q_proj"])
    without = shutil.copytree(tiny_base_folder, tmp_path / "without")
    (without / "config.json").unlink()
    with pytest.raises(DataError, match="without"):
        load_base(without, ("q_proj",))


def test_a_torn_file_of_weights_is_named(tmp_path, tiny_base_folder):
    torn = shutil.copytree(tiny_base_folder, tmp_path / "torn")
    whole = (torn / "model.safetensors").read_bytes()
    (torn / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="torn"):
        load_base(torn, ("q_proj",))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_tensor_that_no_file_has_is_named_and_never_drawn_at_random(tmp_path, tiny_base_folder, precision):
    folder = shutil.copytree(tiny_base_folder, tmp_path / "holey")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=name):
        load_base(folder, ("q_proj",), precision=precision)


def test_a_tokenizer_of_more_tokens_than_the_model_knows_is_refused(tmp_path, tiny_base_folder):
    folder = saved("Llama", tmp_path / "model", tiny_base_folder, vocab_size=64)
    with pytest.raises(DataError, match="knows 64 of them"):
        load_base(folder, ("q_proj",))


def test_a_pickle_is_never_read(tmp_path, tiny_base_folder):
    folder = shutil.copytree(tiny_base_folder, tmp_path / "pickled")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(DataError, match="safetensors"):
        load_base(folder, ("q_proj",))


def test_the_digest_names_the_weights(tmp_path, tiny_base_folder):
    copy = shutil.copytree(tiny_base_folder, tmp_path / "copy")
    assert model_digest(copy) == model_digest(tiny_base_folder)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert model_digest(copy) != model_digest(tiny_base_folder)


def test_a_name_that_is_neither_folder_nor_hub_model_says_so():
    for name in ("/no/such/folder", "./nothing", "a/b/c"):
        with pytest.raises(DataError, match="no model folder"):
            model_folder(name)
    with pytest.raises(DataError, match="neither a model folder nor"):
        model_folder("homespun-test/no-such-model")
