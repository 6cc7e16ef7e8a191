"""Attack 4 and the audit's own attacks on distributed noise: one captured message, the mechanism, and one run."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from common.privacy import Randomness
from simulations.canaries import judge_canary_users, run_canaries
from simulations.inversion import invert_updates
from simulations.mechanism import probe_mechanism

EVERYBODY = {"noise": "distributed", "cohort": 20, "rounds": 2, "rehearsal": True}
"""A rehearsal, so that noise is the same each time: what is measured over a few hundred trials has a wide spread."""


@pytest.fixture
def host(study):
    return study.host(**EVERYBODY)


@pytest.fixture
def spec(study, host):
    from server.run_folder import prepare_spec

    return prepare_spec(host.config, population=20, model=study.base, digest=host.base.digest, run="ab" * 16)[0]


def start_of(spec):
    return np.random.default_rng(0).standard_normal(spec.model_dim).astype(np.float32) * 0.1


def test_attack_04_one_captured_message_of_a_sum_gives_gradient_inversion_no_more_than_chance(host, spec, monkeypatch):
    masks = itertools.count()
    monkeypatch.setattr(Randomness, "system", lambda: Randomness.rehearsal(0, "mask", next(masks)))
    found = invert_updates(host, spec, start_of(spec), 12, np.random.default_rng(1))
    assert found.verdict == "holds"
    assert abs(found.value - 0.5) < 0.15
    assert found.low < 0.55
    # The same attack does find words where it can: an unclipped gradient of full rank, without mask and noise.
    assert found.details["auc_of_control"] > 0.8


def test_the_mechanism_test_drives_share_sum_and_level_and_sees_nothing_beyond_the_claim(host, spec):
    found = probe_mechanism(host.config, spec, host.base, trials=600, generator=np.random.default_rng(2))
    assert found.verdict == "holds", found.why
    assert found.value <= found.claimed_epsilon
    assert found.details["noise_multiplier"] >= spec.noise_multiplier
    assert found.details["longest_over_clip"] <= 1.0 + 1e-6
    # And it sees the canary at all: the separation is that of the noise which is published.
    assert found.details["separation"] * found.details["noise_multiplier"] == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize("factor", [0.0, 0.5])
def test_the_mechanism_test_contradicts_a_server_that_fills_up_less(host, spec, factor, monkeypatch):
    from common.distributed_noise import DistributedNoise

    real = DistributedNoise.top_up_scale
    monkeypatch.setattr(DistributedNoise, "top_up_scale", lambda self, count: factor * real(self, count))
    found = probe_mechanism(host.config, spec, host.base, trials=400, generator=np.random.default_rng(3))
    assert found.verdict == "contradicted"


def test_one_run_with_canaries_shows_no_more_than_was_charged(host, same_run):
    found = run_canaries(
        host,
        rounds=2,
        canary_users=40,
        canary_examples=4,
        real_users=4,
        generator=np.random.default_rng(4),
    )
    for result in judge_canary_users(found):
        assert result.verdict != "contradicted"
        assert result.value <= found.spent
    assert math.isfinite(found.spent)
