import math
import re
import tomllib
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from client.user_data import split
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
    assert len(tokenizer) == model.config.vocab_size == 1536
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


class Reference:
    """PEFT and a plain loop: a shared adapter fitted to pooled records, and private ones."""

    def __init__(self, model, tokenizer):
        config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])
        self.model, self.tokenizer = get_peft_model(model, config, adapter_name="shared"), tokenizer
        self.model.add_adapter("private", config)
        self.fresh = {name: value.clone() for name, value in self.model.state_dict().items() if "private" in name}

    def losses(self, encoded, *adapters):
        """Summed loss and number of tokens of each response."""
        ids = torch.zeros(len(encoded), max(len(row) for row, _ in encoded), dtype=torch.long)
        for line, (row, _) in enumerate(encoded):
            ids[line, : len(row)] = torch.tensor(row)
        if adapters:
            self.model.base_model.enable_adapter_layers()
            self.model.base_model.set_adapter(list(adapters))
        else:
            self.model.base_model.disable_adapter_layers()
        logits = self.model(input_ids=ids).logits
        found = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        labels = torch.zeros_like(found)
        for line, (row, first) in enumerate(encoded):
            labels[line, first - 1 : len(row) - 1] = 1.0
        return (found * labels).sum(1), labels.sum(1)

    def fit(self, name, encoded, steps, batch, learning_rate, *under):
        torch.manual_seed(0)
        parameters = [value for key, value in self.model.named_parameters() if f".{name}." in key]
        optimizer = torch.optim.Adam(parameters, learning_rate)
        for _ in range(steps):
            chosen = torch.randperm(len(encoded))[:batch].tolist()
            loss, tokens = self.losses([encoded[each] for each in chosen], *under, name)
            (loss / tokens).mean().backward()
            optimizer.step()
            self.model.zero_grad()

    def fit_private(self, encoded, *under):
        self.model.load_state_dict(self.fresh, strict=False)
        self.fit("private", encoded, 20, 8, 5e-3, *under)

    @torch.no_grad()
    def score(self, encoded, *adapters):
        loss, tokens = self.losses(encoded, *adapters)
        return (loss.sum() / tokens.sum()).item()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_right_order_emerges_from_the_data(tokenizer):
    torch.manual_seed(0)
    reference = Reference(AutoModelForCausalLM.from_pretrained(base_folder()).eval(), tokenizer)
    pooled = [encode(tokenizer, record) for user in population(1, 150) for record in split(user).train[:40]]
    reference.fit("shared", pooled, 150, 32, 1e-2)
    scores = {"base": [], "global": [], "private": [], "both": []}
    for user in population(0, 40):
        parts = split(user)
        train, test = ([encode(tokenizer, record) for record in part] for part in (parts.train, parts.test))
        scores["base"].append(reference.score(test))
        scores["global"].append(reference.score(test, "shared"))
        reference.fit_private(train)
        scores["private"].append(reference.score(test, "private"))
        reference.fit_private(train, "shared")
        scores["both"].append(reference.score(test, "shared", "private"))
    mean = {name: np.mean(found) for name, found in scores.items()}
    worst = {name: np.mean(np.sort(found)[-4:]) for name, found in scores.items()}
    few = [index for index, user in enumerate(population(0, 40)) if len(user.records) < 15]
    for found in (mean, worst):
        assert found["global"] < found["base"] - 0.05
        assert found["private"] < found["base"] - 0.05
        assert found["both"] < min(found["global"], found["private"]) - 0.05
    gains = np.asarray(scores["global"]) - np.asarray(scores["both"])
    assert np.mean(gains[few]) > 0.03, "users with few records gain too"
