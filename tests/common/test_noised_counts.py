"""Counts beside the update: one norm, one noise, one event; and a clip norm that follows a quantile."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.accounting import Gaussian, PoissonGaussian, Repeated, epsilon_of
from common.config import RunConfig, load_config
from common.errors import ConfigError, Refusal
from common.noised_counts import METRICS, NoisedCounts
from common.privacy import Adjacency
from common.promise import promise_of
from common.wire import ReleaseSpec

SPEC = ReleaseSpec(
    run="0" * 32,
    method="dual",
    names=("a",),
    shapes=((10,),),
    dtype="float32",
    unit="user",
    noise="central",
    clip=1.0,
    noise_multiplier=1.0,
    sampling_rate=0.05,
    rounds=20,
    epsilon="8.0",
    delta=1e-5,
    population=1000,
    recipe={"local_steps": 3, "local_batch": 8},
    model="0" * 64,
    source="0" * 64,
)
ALL = NoisedCounts(("loss", "gain"), 0.5)


@given(
    users=st.integers(1, 4),
    length=st.sampled_from([0.0, 1e-30, 0.3, 0.99, 1.0, 7.0, 1e30, math.inf, math.nan]),
    clip=st.sampled_from([1e-3, 1.0, 17.3]),
    scale=st.sampled_from([1e-3, 1.0, 250.0]),
    measured=st.sampled_from([-1e9, -1.0, 0.2, 1.0, 9.0, math.inf, math.nan]),
    dtype=st.sampled_from(["float32", "float16"]),
)
@settings(max_examples=150, deadline=None)
def test_the_update_and_its_counts_together_are_never_longer_than_the_clip(users, length, clip, scale, measured, dtype):
    updates = np.random.default_rng(0).normal(size=(users, 10)) * length * scale
    rows = ALL.rows(updates, clip, scale, {"loss": [measured] * users, "gain": [measured] * users}, dtype)
    assert rows.shape == (users, 10 + 4)
    assert rows.dtype == dtype
    assert np.isfinite(rows).all()
    assert (np.linalg.norm(rows.astype(np.float64), axis=1) <= clip).all()


def test_a_bit_says_whether_the_clip_cut_and_a_metric_is_cut_to_its_range():
    counts = NoisedCounts(("loss",), 0.5, share=0.04)
    bound = counts.update_share
    updates = np.zeros((3, 4))
    updates[:, 0] = [0.99 * bound, 1.01 * bound, 0.99 * bound]
    rows = counts.rows(updates, 1.0, 1.0, {"loss": [0.0, 4.0, math.nan]})
    unit = math.sqrt(0.04)
    assert rows[:, 4] == pytest.approx([unit, -unit, unit], rel=1e-6)  # within
    assert rows[:, 5] == pytest.approx([unit, unit, 0.0], rel=1e-6)  # measured
    assert rows[:, 6] == pytest.approx([-unit, 0.0, 0.0], rel=1e-6, abs=1e-9)  # the loss, centred
    # Twice the clip norm: the second is within too, and comes out half as long.
    moved = counts.rows(updates, 1.0, 2.0, {"loss": [0.0, 4.0, 0.0]})
    assert (moved[:, 4] > 0).all()
    assert moved[0, 0] == pytest.approx(0.99 * bound / 2.0)


@given(
    z=st.floats(0.3, 30.0),
    quantile=st.sampled_from([None, 0.5]),
    metrics=st.sampled_from([("gain",), ("loss", "gain")]),
    share=st.sampled_from([0.01, 0.02, 0.1]),
)
@settings(max_examples=40, deadline=None)
def test_the_parts_of_a_round_cost_together_what_its_noise_costs(z, quantile, metrics, share):
    counts = NoisedCounts(metrics, quantile, share=share)
    parts = counts.multipliers(z)
    assert len(parts) == 1 + len(counts.names)
    assert math.fsum(part**-2 for part in parts) ** -0.5 == pytest.approx(z, rel=1e-12)
    assert parts[0] > z  # what the counts take is noise on the update
    # Andrew et al. (2021), Theorem 1, with sigma_b half the count's multiplier.
    alone = NoisedCounts((), 0.5, share=share)
    update, count = alone.multipliers(z)
    assert update == pytest.approx((z**-2 - count**-2) ** -0.5)


def test_the_price_of_a_round_with_counts_is_one_event_and_update_alone_would_claim_too_little():
    spec = replace(SPEC, counts=ALL.to_plain())
    promise = promise_of(spec)
    whole = epsilon_of(promise.schedule(1.0, 20), 1e-5)
    assert whole == pytest.approx(epsilon_of(Repeated(PoissonGaussian(0.05, 1.0), 20), 1e-5), rel=1e-6)
    update_alone = Repeated(PoissonGaussian(0.05, ALL.multipliers(1.0)[0]), 20)
    assert epsilon_of(update_alone, 1e-5) < whole
    apart = [Repeated(PoissonGaussian(0.05, part), 20) for part in ALL.multipliers(1.0)]
    assert epsilon_of(apart, 1e-5) < whole  # five sampled events from one cohort would claim too little


@pytest.mark.parametrize("noise", ["central", "local", "distributed"])
def test_noise_for_a_round_with_counts_is_calibrated_to_the_whole_of_it(noise):
    spec = replace(SPEC, counts=ALL.to_plain(), noise=noise)
    promise = promise_of(spec)
    multiplier = promise.calibrate(8.0, 1e-5, 20)
    cost = epsilon_of(promise.schedule(multiplier, 20), 1e-5, adjacency=promise.adjacency)
    assert 7.9 < cost <= 8.0
    if noise == "local":
        assert promise.adjacency is Adjacency.REPLACE_ONE
        assert epsilon_of(Repeated(Gaussian(multiplier), 20), 1e-5) == pytest.approx(cost, rel=1e-6)


@pytest.mark.parametrize("start", [2.0**-8, 2.0**8])
def test_the_clip_norm_finds_the_quantile_from_both_sides(start):
    generator = np.random.default_rng(0)
    counts = NoisedCounts((), 0.5)
    updates = np.exp(generator.normal(0.5, 0.7, (1000, 1)))
    scale, deviation = start, 1.0
    for _ in range(120):
        total = counts.rows(updates, 1.0, scale, {}).astype(np.float64).sum(axis=0)[1:]
        noised = total + deviation * generator.normal(size=1)
        scale = counts.next_scale(scale, counts.read(noised, 1.0, 1000, deviation)["within"])
    assert scale * counts.update_share == pytest.approx(float(np.median(updates)), rel=0.15)


def test_the_clip_norm_moves_by_the_published_rule_and_never_without_limit():
    counts = NoisedCounts((), 0.5)
    assert counts.next_scale(1.0, 1.0) == pytest.approx(math.exp(-0.2 * 0.5))
    assert counts.next_scale(1.0, 0.0) == pytest.approx(math.exp(0.2 * 0.5))
    assert counts.next_scale(1.0, 0.5) == 1.0
    assert counts.next_scale(2.0**20, 0.0) == 2.0**20
    assert NoisedCounts(("loss",)).next_scale(1.0, None) == 1.0
    # Nobody answered: the best guess of the share is one half, not none.
    assert counts.read(np.zeros(1), 1.0, 100.0, 0.0)["within"] == 0.5


def test_metrics_are_read_over_the_noised_number_of_those_who_had_one():
    generator = np.random.default_rng(1)
    counts = NoisedCounts(("loss", "gain"), share=0.02)
    losses = generator.uniform(0.5, 3.0, 400)
    gains = generator.uniform(-0.2, 0.4, 400)
    losses[300:] = gains[300:] = math.nan  # a quarter has nothing to measure on
    rows = counts.rows(np.zeros((400, 2)), 1.0, 1.0, {"loss": losses, "gain": gains}).astype(np.float64)
    exact = counts.read(rows.sum(axis=0)[2:], 1.0, 400, 0.0)
    assert exact["measured"] == pytest.approx(300, rel=1e-5)
    assert exact["loss"] == pytest.approx(np.nanmean(losses), rel=1e-5)
    assert exact["gain"] == pytest.approx(np.nanmean(gains), rel=1e-4)
    deviation, errors = 0.8, []
    for _ in range(2000):
        noised = rows.sum(axis=0)[2:] + deviation * generator.normal(size=3)
        read = counts.read(noised, 1.0, 400, deviation)
        errors.append((read["loss"] - np.nanmean(losses)) / read["loss_noise"])
    assert np.std(errors) == pytest.approx(1.0, abs=0.1)
    few = counts.read(np.array([1.0, 1.0, 1.0]), 1.0, 400, 5.0)
    assert (few["loss"], few["gain"]) == (None, None)  # nothing is divided by noise


def test_counts_go_through_a_spec_and_come_back():
    for own in (ALL, NoisedCounts((), 0.9, 1.0), NoisedCounts(("gain",))):
        spec = ReleaseSpec.from_text(replace(SPEC, counts=own.to_plain()).to_text())
        assert NoisedCounts.of(spec) == own
        assert spec.row_dim == 10 + len(own.names)
        assert spec.tensors[-1] == ("noised_counts", (len(own.names),))
    assert NoisedCounts.of(SPEC) is None
    assert "counts" not in SPEC.to_text()  # an earlier spec keeps its digest


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"metrics": "", "share": 0.02},
        {"metrics": "loss,loss", "share": 0.02},
        {"metrics": "words", "share": 0.02},
        {"metrics": "loss", "share": 0.0},
        {"metrics": "loss", "share": 0.3},
        {"metrics": "loss", "share": 1},
        {"metrics": "loss", "share": 0.02, "clip_quantile": 1.5},
        {"metrics": "loss", "share": 0.02, "clip_quantile": "0.5"},
        {"metrics": "loss", "share": 0.02, "more": 1.0},
    ],
)
def test_counts_that_are_not_known_are_refused(plain):
    with pytest.raises(Refusal) as refusal:
        NoisedCounts.from_plain(plain, "user")
    assert refusal.value.code == "bad-request"


def test_counts_of_records_are_refused():
    with pytest.raises(Refusal):
        promise_of(replace(SPEC, unit="example", counts=ALL.to_plain()))
    for key in ({"clip_quantile": 0.5}, {"noised_metrics": ("gain",)}):
        with pytest.raises(ConfigError, match="unit example"):
            RunConfig(unit="example", **key)


def test_clip_adaptive_is_a_word_for_the_median():
    config = load_config({"clip": "adaptive"})
    assert (config.clip, config.clip_quantile) == (1.0, 0.5)
    assert load_config({"clip": "adaptive", "clip_quantile": 0.8}).clip_quantile == 0.8
    assert load_config({"clip": 2.0, "clip_quantile": 0.8}).clip == 2.0
    with pytest.raises(ConfigError, match="clip"):
        load_config({"clip": "sometimes"})
    assert load_config(dict(config.model_dump())) == config


def test_every_metric_has_a_public_range():
    assert all(low < high and math.isfinite(low) and math.isfinite(high) for low, high in METRICS.values())
