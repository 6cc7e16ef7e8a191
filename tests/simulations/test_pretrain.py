import math
import re
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from simulations.worlds.built_in import WORLD_VERSION, base_folder, population, public_people
from simulations.worlds.pretrain import Recipe, file_digests, make_base

TINY = Recipe(people=12, vocabulary=400, hidden=32, intermediate=48, layers=1, heads=2, steps=4, batch_tokens=256)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_folder())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(base_folder()).eval()


def encode(tokenizer, record):
    """Token ids of a record as a chat, and the first of the response."""
    turns = [{"role": "user", "content": record.prompt}, {"role": "assistant", "content": record.response}]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    asked = tokenizer.apply_chat_template(turns[:1], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert ids[: len(asked)] == asked
    return ids, len(asked)


@torch.no_grad()
def nats(model, tokenizer, records):
    """Summed negative log-likelihood of each response, and its tokens."""
    found = []
    for record in records:
        ids, first = encode(tokenizer, record)
        logits = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append((-sum(logits[at - 1, ids[at]].item() for at in range(first, len(ids))), len(ids) - first))
    return np.asarray(found)


def card():
    return (base_folder() / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_the_base_is_a_small_llama_that_transformers_opens(model, tokenizer):
    assert type(model).__name__ == "LlamaForCausalLM"
    assert 1_000_000 <= sum(each.numel() for each in model.parameters()) <= 3_000_000
    assert len(tokenizer) == model.config.vocab_size == 2048
    assert sum(path.stat().st_size for path in base_folder().iterdir()) < 10_000_000
    assert {path.name for path in base_folder().iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "MODEL_CARD.md",
    }  # fmt: skip


def test_the_card_names_the_files_that_lie_beside_it():
    listed = dict(re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", card(), flags=re.MULTILINE))
    assert listed == file_digests(base_folder())


def test_the_card_states_the_recipe_and_the_world_that_made_the_base():
    stated = tomllib.loads(re.search(r"```toml\n(.*?)```", card(), flags=re.DOTALL).group(1))
    assert stated.pop("world_version") == WORLD_VERSION
    assert Recipe(**stated) == Recipe()


def test_the_special_tokens_are_single_and_the_end_is_set(model, tokenizer):
    names = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
    assert [tokenizer.encode(name, add_special_tokens=False) for name in names] == [[at] for at in range(6)]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert model.generation_config.eos_token_id == 2


def test_any_text_survives_the_tokenizer(tokenizer):
    for text in ("Ahoy Ben — it is mega ready ~", "naïve 東京 🎈", "  two  spaces\n", "price: 3.50 €"):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_records_are_short_in_the_base_s_own_tokens(tokenizer):
    lengths = [len(encode(tokenizer, record)[0]) for user in population(0, 25) for record in user.records[:40]]
    assert max(lengths) <= 64
    assert 18 <= np.mean(lengths) <= 35


def test_the_base_knows_public_people_and_is_surprised_by_today(model, tokenizer):
    public = [record for person in public_people(20, first=900_000) for record in person.records[:6]]
    today = [record for user in population(9, 20) for record in user.records[:6]]
    known, new = nats(model, tokenizer, public), nats(model, tokenizer, today)
    known_mean, new_mean = known[:, 0].sum() / known[:, 1].sum(), new[:, 0].sum() / new[:, 1].sum()
    assert known_mean < 1.0
    assert known_mean + 0.3 < new_mean < math.log(model.config.vocab_size) / 3


def test_the_base_answers_from_what_stands_before_the_question(tokenizer, model):
    turns = [
        {"role": "user", "content": "Note that my dog is called Waffle."},
        {"role": "assistant", "content": "Got it, your dog is Waffle"},
        {"role": "user", "content": "What is my dog called?"},
        {"role": "assistant", "content": "That is Waffle."},
    ]
    ids = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    alone = tokenizer.apply_chat_template(turns[2:], tokenize=True, return_dict=False)
    (waffle,) = tokenizer.encode(" Waffle", add_special_tokens=False)

    def probability(tokens):
        at = len(tokens) - tokens[::-1].index(waffle) - 1
        with torch.no_grad():
            return model(input_ids=torch.tensor([tokens])).logits[0, at - 1].softmax(-1)[waffle].item()

    assert probability(ids) > 0.5
    assert probability(alone) < 0.2


def test_the_same_recipe_makes_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        make_base(tmp_path / name, TINY)
    make_base(tmp_path / "other", replace(TINY, seed=2))
    one, two, other = (file_digests(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert one["model.safetensors"] != other["model.safetensors"]
    assert one["tokenizer.json"] == other["tokenizer.json"]
