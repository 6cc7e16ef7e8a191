"""Gradient inversion: exact where the theory says so, and hidden by noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.trainer import Trainer
from common.adapters import initial_vector
from common.config import load_config, read_config_file
from common.wire import ReleaseSpec
from simulations import hosts
from simulations.inversion import first_layer_inputs, invert_updates, present_tokens


@pytest.fixture
def host(run):
    config = load_config(read_config_file(run / "config.toml"))
    return hosts.host_of(config.model_copy(update={"rehearsal": True}))


def test_a_token_is_present_exactly_if_it_lies_in_the_span():
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((50, 20))
    mixtures = generator.standard_normal((6, 5)) @ inputs[[3, 8, 13, 21, 34]]
    scores = present_tokens(mixtures, inputs)
    assert sorted(np.flatnonzero(scores > 1 - 1e-9)) == [3, 8, 13, 21, 34]
    assert not present_tokens(np.zeros((2, 20)), inputs).any()


def test_the_first_layer_sees_a_token_as_the_model_does(host):
    inputs = first_layer_inputs(host)
    model = host.base.model
    layer = model.model.layers[0]
    expected = layer.input_layernorm(model.model.embed_tokens.weight).double().detach().numpy()
    np.testing.assert_allclose(inputs, expected, atol=1e-6)


def test_the_words_of_a_record_are_read_exactly_off_a_plain_gradient_at_full_rank(host):
    record = host.population.encoded("3").train[0]
    trainer = Trainer(host.base, rank=16, scaling=1.0)
    generator = np.random.default_rng(0)
    start = initial_vector(trainer.layout, generator) + 0.05 * generator.standard_normal(trainer.layout.size)
    gradient = trainer.layout.split(trainer.example_gradients(start.astype(np.float32), [record])[0])
    # q_proj alone would miss the first word: it attends to nothing but itself, whatever its query is.
    rows = np.concatenate([value for name, value in gradient.items() if "layers.0." in name and ".lora_A." in name])
    scores = present_tokens(rows, first_layer_inputs(host))
    seen = sorted(set(np.asarray(record.ids[:-1]).tolist()))
    assert sorted(np.flatnonzero(scores > 0.999).tolist()) == seen


def test_an_update_is_judged_without_noise_with_it_and_against_the_best_case(host, run):
    spec = ReleaseSpec.from_text((run / "spec.json").read_text())
    vector = initial_vector(host.trainer.layout, np.random.default_rng(0))
    found = invert_updates(host, replace(spec, noise_multiplier=5.0), vector, 8, np.random.default_rng(0))
    assert found.samples == 8
    assert found.saturation == pytest.approx(1.0)
    assert found.low <= found.value <= found.high <= 1.0 + 1e-9
    assert abs(found.details["auc_with_noise"] - 0.5) < 0.25
    assert found.verdict in {"leaks, as expected", "not shown"}
