"""The owner's own model: what was learned is laid over the base, levels stand before the question, off means off."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.base_model import SharedBase
from client.conversation import Turn
from client.device_home import DeviceHome
from client.generation import Sampling
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.personal_model import PersonalModel
from client.personalization.profile import Profile
from client.record_store import NewRecord, RecordStore
from client.trainer import Trainer
from client.user_data import Record
from common.adapters import lora_layout
from common.errors import DataError
from common.model_files import base_folder

TARGETS = ("q_proj", "v_proj")
SHORT = Sampling(max_tokens=10)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return DeviceHome.open(create=True)


@pytest.fixture(scope="module")
def shared(tiny_base_folder):
    return SharedBase(tiny_base_folder)


def answer(model, system, *texts):
    turns = [Turn("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts)]
    found = model.answer(system, turns, SHORT)
    return "".join(piece.text for piece in found.pieces), found


def learn(home, base, *, seed=0, **changes):
    """Keep random adapters as if they had been learned."""
    generator = np.random.default_rng(seed)

    def vector(rank):
        return (0.4 * generator.standard_normal(lora_layout(base.modules, rank).size)).astype(np.float32)

    fields = {
        "rank": 2,
        "rank_alone": 3,
        "rank_over_global": 3,
        "shared": vector(2),
        "alone": vector(3),
        "over_global": vector(3),
        "chosen": "both",
        "removals": RecordStore(home).removals,
    }
    learned = Learned(base.digest, TARGETS, 2.0, **(fields | changes))
    LearnedStore(home).keep(learned)
    return learned


def test_a_new_device_answers_with_its_base_and_says_why(home, shared):
    model = PersonalModel(home, shared)
    texts = {system: answer(model, system, "w5 w6")[0] for system in ("base", "global", "personal")}
    assert len(set(texts.values())) == 1
    assert "nothing was learned" in model.systems()["personal"].reason


def test_adapters_add_up_to_what_merged_weights_say(home, shared):
    base = shared.model(TARGETS)
    learned = learn(home, base)
    text, found = answer(PersonalModel(home, shared), "personal", "w5 w6 w7")
    assert found.system.name == "both"
    ids, made = found.prompt.ids.tolist(), []
    merged = shared.model(TARGETS)
    state = merged.model.state_dict()
    with torch.no_grad():
        for vector, rank in ((learned.shared, 2), (learned.over_global, 3)):
            tensors = lora_layout(merged.modules, rank).split(vector)
            for module in merged.modules:
                a, b = (tensors[f"base_model.model.{module.name}.lora_{side}.weight"] for side in "AB")
                weight = merged.model.get_submodule(module.name).weight
                weight.data = weight.data + 2.0 * torch.from_numpy(b @ a)
        while len(made) < 10:
            token = int(merged.model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax())
            if token == merged.tokenizer.eos_token_id:
                break
            made.append(token)
    assert text == merged.tokenizer.decode(made, skip_special_tokens=True)
    assert set(state) == set(merged.model.state_dict())
    assert answer(PersonalModel(home, shared), "base", "w5 w6 w7")[0] != text


def test_what_is_laid_over_for_one_answer_is_not_there_for_the_next(home, shared):
    model = PersonalModel(home, shared)
    before = answer(model, "base", "w5")[0]
    learn(home, shared.model(TARGETS))
    one = model.answer("personal", [Turn("user", "w5")], SHORT).pieces
    other = model.answer("base", [Turn("user", "w5")], SHORT).pieces
    texts = ["", ""]
    for pair in zip(one, other, strict=False):  # in turns
        texts = [text + piece.text for text, piece in zip(texts, pair, strict=True)]
    assert before.startswith(texts[1].strip())
    assert answer(model, "base", "w5")[0] == before


def test_training_beside_it_changes_nothing_that_it_says(home, shared, random_examples):
    model = PersonalModel(home, shared)
    before = answer(model, "base", "w5 w6")[0]
    trainer = Trainer(shared.model(TARGETS), rank=2, scaling=2.0)
    vector = np.ones(trainer.layout.size, np.float32)
    with trainer.over_base((vector, trainer.layout, 2.0)):
        assert answer(model, "base", "w5 w6")[0] == before
        hidden = trainer.base.hidden(torch.tensor([[5, 6]]))
    assert not torch.equal(hidden, trainer.base.hidden(torch.tensor([[5, 6]])))


def test_what_is_learned_later_is_used_at_the_next_question(home, shared):
    model = PersonalModel(home, shared)
    assert model.systems()["personal"].name == "base"
    learn(home, shared.model(TARGETS))
    assert model.systems()["personal"].name == "both"
    LearnedStore(home).erase_private()
    assert model.systems()["personal"].name == "global"


@pytest.mark.parametrize(
    ("off", "chosen", "used"),
    [
        ("adapter", "both", "global"),
        ("retrieval", "global+retrieval", "global"),
        ("profile", "profile", "global"),
        ("steering", "both", "both"),
    ],
)
def test_a_level_that_is_off_is_not_used(home, shared, off, chosen, used):
    RecordStore(home).add([NewRecord(Record("w5", "w6"), "test")])
    learn(home, shared.model(TARGETS), chosen=chosen)
    model = PersonalModel(home, shared)
    assert model.systems()["personal"].name == chosen
    LevelStore(home).switch(off, on=False)
    assert model.systems()["personal"].name == used
    if used != chosen:
        assert chosen not in model.systems()


@pytest.mark.parametrize(
    ("off", "used"), [(("retrieval",), "both"), (("retrieval", "adapter"), "profile"), (("adapter",), "retrieval")]
)
def test_without_a_level_the_next_best_of_what_is_surely_better_is_used(home, shared, off, used):
    RecordStore(home).add([NewRecord(Record("w5", "w6"), "test")])
    base = shared.model(TARGETS)
    bounds = {"both+retrieval": 0.4, "retrieval": 0.3, "both": 0.2, "profile": 0.1, "private": -0.1, "global": 0.0}
    vector = np.full(lora_layout(base.modules, 3).size, 0.1, np.float32)
    facts = {"in_context": vector, "removals": RecordStore(home).removals, "report": {"lower_bounds": bounds}}
    learn(home, base, chosen="both+retrieval", **facts)
    model = PersonalModel(home, shared)
    assert model.systems()["personal"].name == "both+retrieval"
    for level in off:
        LevelStore(home).switch(level, on=False)
    personal = model.systems()["personal"]
    assert personal.name == used
    assert "both+retrieval" in personal.reason


def test_nothing_that_is_not_surely_better_takes_the_place_of_a_level_that_is_off(home, shared):
    RecordStore(home).add([NewRecord(Record("w5", "w6"), "test")])
    report = {"lower_bounds": {"retrieval": 0.3, "both": -0.2, "profile": None}}
    learn(home, shared.model(TARGETS), chosen="retrieval", report=report)
    model = PersonalModel(home, shared)
    LevelStore(home).switch("retrieval", on=False)
    assert model.systems()["personal"].name == "global"


def test_the_owner_may_say_what_personal_is(home, shared):
    learn(home, shared.model(TARGETS), chosen="global")
    model = PersonalModel(home, shared)
    LevelStore(home).prefer("private")
    assert model.systems()["personal"].name == "private"
    LevelStore(home).switch("profile", on=False)  # leaves it alone
    assert model.systems()["personal"].reason == "you asked for it"
    LevelStore(home).prefer("")
    assert model.systems()["personal"].name == "global"


def test_own_words_stand_before_every_question_to_personal_and_to_no_other(home):
    model = PersonalModel(home, SharedBase(base_folder("built-in")))
    LevelStore(home).keep_profile(Profile().edited(1, "My dog is called Rufus."))
    question = "what is my dog called?"
    text, found = answer(model, "personal", question)
    assert "Rufus" in text
    assert found.prompt.lines == ("My dog is called Rufus.",)
    assert "Rufus" not in answer(model, "base", question)[0]
    LevelStore(home).switch("profile", on=False)
    assert "Rufus" not in answer(model, "personal", question)[0]


def test_it_says_which_records_it_was_shown(home):
    added = RecordStore(home).add([NewRecord(Record("what is my dog called?", "Biscuit", task="reply"), "test")])
    _, found = answer(PersonalModel(home, SharedBase(base_folder("built-in"))), "retrieval", "my dog is called what?")
    (record,) = found.records
    assert (record.id, record.response, record.reason) == (added.ids[0], "Biscuit", "words")
    assert "Biscuit" not in repr(record)


def test_a_system_that_is_not_there_is_named_as_such(home, shared):
    with pytest.raises(DataError, match="both: not a model of this device; it has base, global, personal"):
        answer(PersonalModel(home, shared), "both", "w5")


@pytest.mark.parametrize("level", ["soft-prompt", "steering"])
def test_what_acts_inside_the_model_is_there_for_its_own_answers_and_gone_when_off(home, shared, level):
    base = shared.model(TARGETS)
    hidden = base.model.config.hidden_size
    shape = (4, hidden) if level == "soft-prompt" else (hidden,)
    vector = np.random.default_rng(5).normal(0, 3.0, shape).astype(np.float32)
    learn(home, base, chosen=level, others={level: vector})
    model = PersonalModel(home, shared)
    plain = answer(model, "global", "w5 w6 w7")[0]
    personal, found = answer(model, "personal", "w5 w6 w7")
    assert (found.system.name, found.system.inside) == (level, level)
    assert personal != plain
    assert answer(model, "global", "w5 w6 w7")[0] == plain
    LevelStore(home).switch(level, on=False)
    assert level not in model.systems()
    assert answer(model, "personal", "w5 w6 w7")[0] == plain


def test_a_mixture_with_retrieval_that_was_chosen_can_be_used(home, shared):
    base = shared.model(TARGETS)
    RecordStore(home).add([NewRecord(Record("w5 w6", "w7", 1.0, "reply"), "x")])
    vector = learn(home, base).over_global
    learn(home, base, chosen="both+retrieval@1/0.5", in_context=vector, removals=RecordStore(home).removals)
    found = PersonalModel(home, shared).systems()["personal"]
    assert found.vectors == (("shared", 1.0), ("in_context", 0.5))
    assert found.levels == {"retrieval"}


def test_a_soft_prompt_and_a_direction_take_part_when_they_were_chosen(home, shared):
    base = shared.model(TARGETS)
    generator = np.random.default_rng(3)
    hidden = base.model.config.hidden_size
    others = {
        "soft-prompt": generator.standard_normal((3, hidden)).astype(np.float32),
        "steering": (5 * generator.standard_normal(hidden)).astype(np.float32),
    }
    texts = {}
    for name in others:
        learn(home, base, chosen=name, others=others)
        texts[name], found = answer(PersonalModel(home, shared), "personal", "w5 w6 w7")
        assert found.system.inside == name
    plain, _ = answer(PersonalModel(home, shared), "global", "w5 w6 w7")
    assert len({plain, *texts.values()}) == 3
    assert answer(PersonalModel(home, shared), "global", "w5 w6 w7")[0] == plain  # nothing of it stays
    LevelStore(home).switch("steering", on=False)
    assert "steering" not in PersonalModel(home, shared).systems()
