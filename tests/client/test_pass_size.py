"""The size of a pass is measured once, remembered, and changes nothing but rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client import pass_size
from client.base_model import load_base
from client.optimizers import Recipe
from client.pass_size import known_pass_tokens, measure_pass_tokens
from client.trainer import Trainer


@pytest.fixture
def trainer(tiny_base_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pass_size, "cache_home", lambda: tmp_path / "cache")
    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)


def taking(monkeypatch, seconds):
    """Let a pass of each size take so many seconds per token."""
    asked = []
    monkeypatch.setattr(
        pass_size, "_seconds_per_token", lambda trainer, size: asked.append(size) or next(seconds[size])
    )
    return asked


def always(**each):
    def forever(value):
        while True:
            yield value

    return {int(size.removeprefix("s")): forever(value) for size, value in each.items()}


def test_it_is_measured_once_and_remembered(trainer, tmp_path):
    before = trainer.pass_tokens
    assert known_pass_tokens(trainer) is None
    found = measure_pass_tokens(trainer)
    assert found in pass_size.CPU_SIZES
    assert trainer.pass_tokens == before
    assert known_pass_tokens(trainer) == found
    assert len(list((tmp_path / "cache").rglob("*.json"))) == 1


def test_what_is_remembered_is_not_measured_again(trainer, monkeypatch):
    asked = taking(monkeypatch, always(s512=3.0, s1024=2.0, s2048=1.0))
    assert measure_pass_tokens(trainer) == 2048
    count = len(asked)
    assert measure_pass_tokens(trainer) == 2048
    assert len(asked) == count


@pytest.mark.parametrize(
    ("times", "wanted"),
    [((1.0, 0.99, 0.98), 512), ((1.0, 0.9, 0.89), 1024), ((1.0, 1.2, 0.9), 2048), ((1.0, 2.0, 3.0), 512)],
)
def test_a_longer_pass_has_to_be_worth_it(trainer, monkeypatch, times, wanted):
    taking(monkeypatch, always(s512=times[0], s1024=times[1], s2048=times[2]))
    assert measure_pass_tokens(trainer) == wanted


def test_a_base_that_takes_too_long_to_measure_keeps_its_size(trainer, monkeypatch):
    monkeypatch.setattr(pass_size, "MOST_SECONDS", 0.0)
    assert measure_pass_tokens(trainer) == trainer.pass_tokens


def test_a_size_that_does_not_fit_into_memory_is_left_out(trainer, monkeypatch):
    def seconds(trainer, size):
        if size > 1024:
            raise torch.OutOfMemoryError
        return 1.0 / size

    monkeypatch.setattr(pass_size, "_seconds_per_token", seconds)
    assert measure_pass_tokens(trainer) == 1024


@pytest.mark.parametrize("text", ["", "[]", '{"tokens": -1}', '{"tokens": "512"}', '{"tokens": true}', "{"])
def test_a_broken_note_counts_as_none(trainer, text):
    path = pass_size._path(trainer)
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="utf-8")
    assert known_pass_tokens(trainer) is None


def test_another_base_rank_or_thread_count_has_a_note_of_its_own(trainer, monkeypatch):
    paths = {pass_size._path(trainer), pass_size._path(trainer.at_rank(3))}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert len(paths | {pass_size._path(trainer)}) == 3


def test_any_size_trains_the_same(trainer, random_examples):
    people = [random_examples(np.random.default_rng(user), 9) for user in range(3)]
    start = np.random.default_rng(0).normal(0, 0.1, trainer.layout.size).astype(np.float32)
    found = []
    for size in (30, 512, 2048):
        trainer.pass_tokens = size
        orders = [np.random.default_rng(user) for user in range(3)]
        found.append(trainer.fit(start, people, Recipe(3, 4, 0.1), orders))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)
    np.testing.assert_allclose(found[0], found[2], rtol=0, atol=1e-5)
