"""The mechanism test: honest code holds in every mode, and each fraud in the code is contradicted, with the reason."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

import client.gate
import client.trainer
import client.vault
import common.privacy
import server.rounds
from common.config import load_config, read_config_file
from common.privacy import Randomness, clip_rows
from common.promise import promise_of
from common.wire import ReleaseSpec
from server.cohort import Roster
from simulations.lower_bounds import epsilon_of_mu
from simulations.mechanism import probe_mechanism, probe_sampling

TRIALS = 1_600


@pytest.fixture(scope="module")
def base(audited_base):
    from client.base_model import load_base
    from simulations.planning import base_of

    config = load_config(read_config_file(audited_base / "run" / "config.toml"))
    return load_base(base_of(config), config.targets)


@pytest.fixture
def told(audited_base):
    """A rehearsal's configuration, so that a test is the same each time, and a spec whose release costs epsilon 4."""
    folder = audited_base / "run"
    spec = ReleaseSpec.from_text((folder / "spec.json").read_text())
    config = load_config(read_config_file(folder / "config.toml")).model_copy(update={"rehearsal": True})
    return config, replace(spec, noise_multiplier=1.08, delta=1e-5)


def probe(told, base, trials=TRIALS, seed=0):
    return probe_mechanism(*told, base, trials=trials, generator=np.random.default_rng(seed))


def in_mode(told, mode):
    config, spec = told
    changes = {"central": {}, "local": {"noise": "local"}, "silo": {"unit": "example", "witnesses": 0}}[mode]
    return config, replace(spec, **changes)


def without_guards(monkeypatch, clips):
    """A liar takes the gate's and the server's own checks out as well."""
    monkeypatch.setattr(ReleaseSpec, "update_norm", property(lambda self: clips * self.clip))


# Honest code


@pytest.mark.parametrize("mode", ["central", "local", "silo"])
def test_honest_code_holds_and_the_bound_comes_close(told, base, mode):
    told = in_mode(told, mode)
    found = probe(told, base)
    assert (found.verdict, found.samples) == ("holds", TRIALS)
    assert found.claimed_epsilon == pytest.approx(epsilon_of_mu(1 / 1.08, 1e-5))
    assert 0.75 * found.claimed_epsilon < found.value < found.saturation
    assert found.value < 1.1 * found.claimed_epsilon
    assert found.details["noise_multiplier"] == pytest.approx(1.08, rel=0.01)
    assert found.details["longest_over_clip"] == pytest.approx(1.0, abs=1e-6)
    assert promise_of(told[1]).adjacency in {"zero-out", "replace-one", "add-remove"}
    assert len(found.bounds) == 3
    assert found.to_json()["high"] == "inf"


@pytest.mark.parametrize("mode", ["central", "local", "silo"])
def test_the_systems_noise_holds_as_well(told, base, mode):
    config, spec = in_mode(told, mode)
    found = probe((config.model_copy(update={"rehearsal": False}), spec), base, trials=400)
    assert found.verdict == "holds"


def test_what_claims_nothing_is_not_shown(told, base):
    config, spec = told
    for change in ({"noise_multiplier": 0.0}, {"extrapolation": 0.25}):
        found = probe((config, replace(spec, **change)), base, trials=300)
        assert (found.verdict, math.isinf(found.claimed_epsilon)) == ("not shown", True)


@pytest.mark.slow
@pytest.mark.parametrize(("multiplier", "least"), [(1.081, 3.6), (0.6003, 7.3)])
def test_twenty_thousand_trials_of_the_real_code_prove_what_is_known_to_be_possible(told, base, multiplier, least):
    config, spec = told
    found = probe((config, replace(spec, noise_multiplier=multiplier)), base, trials=20_000)
    assert least <= found.value
    assert found.verdict == "holds"


@pytest.mark.slow
def test_an_honest_code_is_not_accused(told, base):
    config, spec = told
    system = config.model_copy(update={"rehearsal": False}), spec
    assert all(probe(system, base, trials=400, seed=seed).verdict == "holds" for seed in range(40))


# Frauds in the code


def test_noise_that_was_halved(told, base, monkeypatch):
    real = server.rounds.add_central_noise
    monkeypatch.setattr(
        server.rounds, "add_central_noise", lambda total, spec, noise: total + (real(total, spec, noise) - total) / 2
    )
    found = probe(told, base)
    assert found.verdict == "contradicted"
    assert "standard deviation" in found.why
    assert "one release loses at least" in found.why
    assert found.value > found.claimed_epsilon


@pytest.mark.parametrize("mode", ["local", "silo"])
def test_noise_that_was_halved_on_the_device(told, base, monkeypatch, mode):
    real = Randomness.normal
    monkeypatch.setattr(common.privacy.Randomness, "normal", lambda self, size: real(self, size) / 2)
    refused = probe(in_mode(told, mode), base)
    assert (refused.verdict, "spread that was promised" in refused.why) == ("contradicted", True)
    for module in (client.gate, client.trainer):
        monkeypatch.setattr(module, "check_noise", lambda *_: None)
    found = probe(in_mode(told, mode), base)
    assert found.verdict == "contradicted"
    assert "one release loses at least" in found.why


def test_noise_that_is_off(told, base, monkeypatch):
    monkeypatch.setattr(server.rounds, "add_central_noise", lambda total, *_: total)
    found = probe(told, base, trials=400)
    assert found.verdict == "contradicted"
    assert math.isinf(found.value)


def test_noise_that_is_off_in_one_tensor(told, base, monkeypatch):
    real = server.rounds.add_central_noise

    def all_but_the_first(total, spec, noise):
        noised = real(total, spec, noise)
        noised[:64] = total[:64]
        return noised

    monkeypatch.setattr(server.rounds, "add_central_noise", all_but_the_first)
    found = probe(told, base, trials=400)
    assert found.verdict == "contradicted"
    assert "64 of" in found.why


def test_noise_from_a_fixed_seed(told, base, monkeypatch):
    monkeypatch.setattr(Randomness, "system", classmethod(lambda cls: cls.rehearsal(42)))
    config, spec = told
    found = probe((config.model_copy(update={"rehearsal": False}), spec), base, trials=400)
    assert found.verdict == "contradicted"
    assert "fixed seed" in found.why
    assert "seeded stream" in found.why


def test_a_clip_that_was_doubled(told, base, monkeypatch):
    monkeypatch.setattr(client.vault, "clip_rows", lambda rows, clip, *a, **k: clip_rows(rows, 2 * clip, *a, **k))
    refused = probe(told, base)
    assert (refused.verdict, "longer than the clip" in refused.why) == ("contradicted", True)
    without_guards(monkeypatch, 2)
    found = probe(told, base)
    assert found.verdict == "contradicted"
    assert "2.000 clips got through the door" in found.why
    assert found.value > found.claimed_epsilon


def test_a_clip_per_tensor_that_is_claimed_to_be_one(told, base, monkeypatch):
    _, spec = told
    sizes = [math.prod(shape) for shape in spec.shapes]

    def per_tensor(rows, clip, dtype, origin=0.0):
        parts = np.split(rows.astype(np.float64) - origin, np.cumsum(sizes)[:-1], axis=1)
        return np.concatenate([clip_rows(part, spec.clip, dtype) for part in parts], axis=1)

    monkeypatch.setattr(client.vault, "clip_rows", per_tensor)
    without_guards(monkeypatch, 99)
    found = probe(told, base)
    assert found.verdict == "contradicted"
    assert f"{math.sqrt(len(sizes)):.3f} clips got through the door" in found.why


def test_a_record_clip_that_was_dropped(told, base, monkeypatch):
    from client.trainer import Trainer

    def unclipped(self, vector, examples, clip, *, trainable=None):
        return self.example_gradients(vector, examples).sum(axis=0) if examples else np.zeros(self.layout.size)

    monkeypatch.setattr(Trainer, "clipped_gradient_sum", unclipped)
    found = probe(in_mode(told, "silo"), base, trials=400)
    assert (found.verdict, "through the door" in found.why) == ("contradicted", True)


# Sampling


def test_honest_cohorts_are_poisson(told):
    config, spec = told
    for seed in range(10):
        rehearsal = config.model_copy(update={"rehearsal": True, "seed": seed})
        found = probe_sampling(rehearsal, replace(spec, population=200, sampling_rate=0.1), rounds=400)
        assert found.verdict == "holds"
        assert found.low < 1.0 < found.high or abs(found.value - 1) < 0.3
    whole = probe_sampling(config, replace(spec, sampling_rate=1.0), rounds=5)
    assert whole.verdict == "holds"


def fixed_size(self, rate, randomness):
    chosen = randomness.permutation(len(self.subjects))[: round(rate * len(self.subjects))]
    return [self.subjects[int(index)] for index in chosen]


def in_turn(self, rate, randomness):
    in_turn.turn = getattr(in_turn, "turn", 0) + 1
    count = len(self.subjects)
    size = randomness.poisson_sample(count, rate).size
    return [self.subjects[(in_turn.turn * 7 + index) % count] for index in range(size)]


def favourites(self, rate, randomness):
    count = len(self.subjects)
    weights = np.where(np.arange(count) < count // 2, 1.3, 0.7)
    return [self.subjects[index] for index in np.flatnonzero(randomness.uniform(count) < rate * weights)]


@pytest.mark.parametrize(
    ("cohort", "why"), [(fixed_size, "spread 0.00"), (in_turn, "round before"), (favourites, "more often")]
)
def test_cohorts_that_are_not_poisson(told, monkeypatch, cohort, why):
    config, spec = told
    monkeypatch.setattr(Roster, "cohort", cohort)
    found = probe_sampling(config, replace(spec, population=200, sampling_rate=0.1), rounds=600)
    assert (found.verdict, why in found.why) == ("contradicted", True)
