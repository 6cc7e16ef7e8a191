"""What a device measures for a run that asks: the shared adapter on validation records, user by user."""

from __future__ import annotations

import numpy as np
import pytest

from client.base_model import load_base
from client.measures import measure
from client.trainer import Trainer
from common.adapters import initial_vector


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)


@pytest.fixture(scope="module")
def people(random_examples):
    generator = np.random.default_rng(5)
    return [random_examples(generator, 3), [], random_examples(generator, 1)]


def somewhere(trainer):
    vector = initial_vector(trainer.layout, np.random.default_rng(0))
    return vector + np.random.default_rng(1).normal(0, 0.05, vector.size).astype(np.float32)


def test_loss_and_gain_are_each_users_own_per_token(trainer, people):
    vector = somewhere(trainer)
    found = measure(trainer, vector, people, ("loss", "gain"))
    for user, own in enumerate(people):
        if not own:
            assert np.isnan(found["loss"][user])
            assert np.isnan(found["gain"][user])
            continue
        under = (vector, trainer.layout, trainer.scaling)
        with_it, without = trainer.score(own, under=under), trainer.score(own)
        loss = with_it.nats.sum() / with_it.tokens.sum()
        assert found["loss"][user] == pytest.approx(loss, rel=1e-5)
        assert found["gain"][user] == pytest.approx(without.nats.sum() / without.tokens.sum() - loss, abs=1e-5)


def test_nothing_is_measured_that_nobody_asked_for(trainer, people, monkeypatch):
    assert set(measure(trainer, somewhere(trainer), people, ("loss",))) == {"loss"}
    monkeypatch.setattr(Trainer, "score", None)
    assert measure(trainer, somewhere(trainer), people, ()) == {}
    none = measure(trainer, somewhere(trainer), [[], []], ("gain",))
    assert np.isnan(none["gain"]).all()
