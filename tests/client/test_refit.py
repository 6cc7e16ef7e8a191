"""Training for the owner alone: what is learned is judged on records that it was not trained on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.base_model import SharedBase, load_base
from client.device_home import DeviceHome
from client.feedback_store import FeedbackStore
from client.learned_store import LearnedStore
from client.level_store import LevelStore
from client.optimizers import Recipe
from client.personal_model import PersonalModel
from client.record_store import NewRecord, RecordStore
from client.refit import FEWEST_STEPS, TAKEN_BACK, Fitted, Wish, judged, learn, own_parts
from client.removal import remove_records
from client.trainer import Trainer
from client.user_data import Encoder, Record, User
from common.errors import DataError, Refusal

WISH = Wish(rank=1, steps=2, max_tokens=24)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return DeviceHome.open(tmp_path / "device", create=True)


def add(home, count, start=0):
    records = [Record(f"w{n + 3} w7", f"w{n + 4} w8 w9", float(n), "reply") for n in range(start, start + count)]
    return RecordStore(home).add([NewRecord(record, "x") for record in records]).ids


def say(text):
    pass


def test_a_device_alone_learns_and_says_what_it_is_worth(home, tiny_base_folder):
    add(home, 10)
    said = []
    found = learn(home, tiny_base_folder, WISH, said.append)
    assert said == ["training on 6 records, 2 steps of 4"]
    assert np.abs(found.alone).max() > 0
    assert (found.rank, found.rank_alone, found.shared, found.over_global) == (0, 1, None, None)
    assert {"base", "private", "profile", "retrieval", "private+retrieval"} <= found.losses.keys()
    assert found.losses.keys() == found.test_losses.keys()
    assert found.chosen in found.losses
    assert found.report["records"] == found.report["test_records"] == 2
    kept = LearnedStore(home).load(found.base)
    assert np.array_equal(kept.alone, found.alone)
    assert (kept.chosen, kept.losses) == (found.chosen, found.losses)


def test_it_is_the_same_twice_and_other_records_make_another(home, tiny_base_folder):
    ids = add(home, 9)
    first = learn(home, tiny_base_folder, WISH, say)
    assert np.array_equal(first.alone, learn(home, tiny_base_folder, WISH, say).alone)
    remove_records(home, ids[:1])
    assert not np.array_equal(first.alone, learn(home, tiny_base_folder, WISH, say).alone)


def test_a_removed_record_is_not_trained_on_again(home, tiny_base_folder, monkeypatch):
    import client.refit as module

    ids = add(home, 9)
    seen = []
    real = module.own_parts
    monkeypatch.setattr(module, "own_parts", lambda user, **more: seen.append(user) or real(user, **more))
    learn(home, tiny_base_folder, WISH, say)
    remove_records(home, ids[4:5])
    assert LearnedStore(home).load() is None
    learn(home, tiny_base_folder, WISH, say)
    assert [len(user.records) for user in seen] == [9, 8]
    assert LearnedStore(home).load().alone is not None


def test_a_record_that_is_removed_during_training_ends_it(home, tiny_base_folder, monkeypatch):
    import client.refit as module

    ids = add(home, 9)
    real = module.judged

    def removing(*arguments):
        remove_records(home, ids[:1])
        return real(*arguments)

    monkeypatch.setattr(module, "judged", removing)
    with pytest.raises(Refusal, match="removed while"):
        learn(home, tiny_base_folder, WISH, say)
    assert LearnedStore(home).load() is None


def test_over_a_global_adapter_that_is_kept_both_are_trained(home, tiny_base_folder):
    add(home, 9)
    alone = learn(home, tiny_base_folder, WISH, say)
    shared = np.full(alone.alone.size, 0.05, np.float32)
    LearnedStore(home).keep(replace(alone, rank=1, shared=shared, run="ab" * 16, round=3))
    found = learn(home, tiny_base_folder, WISH, say)
    assert {"global", "both", "both+retrieval"} <= found.losses.keys()
    assert (found.run, found.round, found.rank_over_global) == ("ab" * 16, 3, 1)
    assert np.array_equal(found.shared, shared)
    assert not np.array_equal(found.over_global, found.alone)


def test_levels_that_are_off_are_neither_built_nor_chosen(home, tiny_base_folder):
    add(home, 9)
    for level in ("adapter", "retrieval", "profile", "soft-prompt", "steering"):
        LevelStore(home).switch(level, on=False)
    found = learn(home, tiny_base_folder, WISH, say)
    assert found.alone is None
    assert set(found.losses) == {"base"}
    assert found.chosen == "base"


def test_too_few_records_are_all_trained_on_and_nothing_is_claimed(home, tiny_base_folder):
    add(home, 2)
    found = learn(home, tiny_base_folder, WISH, say)
    assert found.alone is not None
    assert (found.losses, found.chosen) == ({}, "base")


def test_preferences_are_learned_from(home, tiny_base_folder):
    add(home, 9)
    pairs = [Record(f"w{n}", "w20 w21", n / 10, "preference", "w30 w31") for n in range(3, 8)]
    RecordStore(home).add([NewRecord(record, "feedback") for record in pairs])
    found = learn(home, tiny_base_folder, WISH, say)
    assert "preference" in found.losses
    assert not np.array_equal(found.others["preference"], found.alone)


def test_without_records_there_is_nothing_to_learn(home, tiny_base_folder):
    with pytest.raises(DataError, match="data add"):
        learn(home, tiny_base_folder, WISH, say)


def test_parts_of_an_owner_with_few_records_hold_all_of_them():
    records = (Record("", "one"), Record("", " "))
    assert own_parts(User("x", records)).train == records[:1]
    many = own_parts(User("x", tuple(Record("", f"w{n}") for n in range(10))))
    assert (len(many.train), len(many.validation), len(many.test)) == (6, 2, 2)
    assert FEWEST_STEPS <= 12


def test_a_soft_prompt_and_a_style_vector_are_built_where_their_levels_are_on(home, tiny_base_folder):
    add(home, 9)
    found = learn(home, tiny_base_folder, WISH, say)
    assert {"soft-prompt", "steering"} <= found.losses.keys()
    assert found.others["steering"].ndim == 1
    assert found.others["soft-prompt"].shape == (8, found.others["steering"].size)
    for level in ("soft-prompt", "steering"):
        LevelStore(home).switch(level, on=False)
    without = learn(home, tiny_base_folder, WISH, say)
    assert not {"soft-prompt", "steering"} & (without.losses.keys() | without.others.keys())


def test_a_refit_that_is_worse_on_validation_records_is_taken_back_with_its_global_adapter(
    home, tiny_base_folder, monkeypatch
):
    import client.refit as module

    add(home, 10)
    first = learn(home, tiny_base_folder, WISH, say)
    judgements = []

    def keep(was, now, tokens):
        judgements.append((was.sum() / tokens.sum(), now.sum() / tokens.sum()))
        return len(judgements) > 1

    monkeypatch.setattr(module, "keep_refit", keep)
    shared = np.random.default_rng(0).normal(0, 0.3, first.alone.size).astype(np.float32)
    before = LearnedStore(home).load(first.base)
    again = _over(home, tiny_base_folder, shared, before)
    assert judgements[0][0] == pytest.approx(first.losses["private"], rel=1e-4)  # the pair that was there, as it was
    assert TAKEN_BACK in again.report
    assert again.shared is None
    assert np.array_equal(again.alone, first.alone)
    good = _over(home, tiny_base_folder, shared, before)
    assert TAKEN_BACK not in good.report
    assert judgements[1][1] == pytest.approx(good.losses["both"], rel=1e-4)
    assert np.array_equal(good.shared, shared)


def test_validation_records_that_the_old_adapter_was_trained_on_do_not_judge_it(home, tiny_base_folder, monkeypatch):
    import client.refit as module

    add(home, 10)
    before = learn(home, tiny_base_folder, WISH, say)
    monkeypatch.setattr(module, "keep_refit", lambda *arguments: False)
    validation = own_parts(RecordStore(home).user()).validation
    seen = replace(before, trained=(*before.trained, module._mark(validation[0])))
    shared = np.zeros(before.alone.size, np.float32)
    assert TAKEN_BACK in _over(home, tiny_base_folder, shared, before).report
    assert TAKEN_BACK not in _over(home, tiny_base_folder, shared, seen).report


def _over(home, folder, shared, before):
    """Fit over a global adapter as the vault's child does, with what was there before."""
    base = load_base(folder, before.targets)
    trainer = Trainer(base, rank=before.rank_alone, scaling=before.scaling)
    parts = own_parts(RecordStore(home).user())
    encoder, recipe = Encoder(base.tokenizer, 24), Recipe(2, 2, 5e-3, "adam")
    examples = [one for one in encoder.encode_batch(parts.train) if one is not None]
    start = np.zeros(trainer.layout.size, np.float32)
    under = (shared, trainer.layout, trainer.scaling)
    over = trainer.fit(start, [examples], recipe, [np.random.default_rng(0)], under=under)[0]
    fitted = Fitted(trainer, shared, before.alone, trainer, over, trainer)
    return judged(home, parts, fitted, recipe, encoder, before.removals, before)


def test_corrections_are_learned_from_although_they_are_the_newest():
    texts = tuple(Record("", f"w{n}", float(n)) for n in range(20))
    few = tuple(Record(f"q{n}", "good", 100.0 + n, "preference", "bad") for n in range(3))
    many = tuple(Record(f"q{n}", "good", 100.0 + n, "preference", "bad") for n in range(10))
    with_few, with_many = own_parts(User("x", texts + few)), own_parts(User("x", texts + many))
    assert set(few) <= set(with_few.train)
    assert with_few.test == own_parts(User("x", texts)).test
    assert len([one for one in with_many.train if one.rejected]) == 6
    assert {one.prompt for one in with_many.test if one.rejected} == {"q8", "q9"}
    everything = (*with_many.train, *with_many.validation, *with_many.test)
    assert sorted(map(repr, everything)) == sorted(map(repr, texts + many))
    assert len(everything) == len({id(one) for one in everything})
    assert own_parts(User("x", few)).train == few


def test_an_owners_corrections_tune_the_next_refit_which_says_what_it_bought(home, tiny_base_folder):
    said = [
        NewRecord(Record(f"w{n % 7 + 3} w9", f"w{n % 5 + 20} w30", float(n), task="reply"), "test") for n in range(20)
    ]
    RecordStore(home).add(said)
    feedback = FeedbackStore(home)
    for number in range(4):
        feedback.add(f"w{number + 3} w9", "w40 w41", "edit", f"w{number + 20} w30")
    found = learn(home, tiny_base_folder, Wish(steps=30), lambda text: None)
    told = found.report["preferences"]
    assert (told["pairs"], told["set_aside"]) == (4, False)
    assert told["after"] >= told["before"]
    assert "preference" in found.others
    assert "preference" in PersonalModel(home, SharedBase(tiny_base_folder)).systems()
