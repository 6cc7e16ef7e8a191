"""Canaries through the whole stack, small: seen without noise, hidden by honest noise, and a liar is contradicted."""

from __future__ import annotations

import math

import numpy as np
import pytest

import server.rounds
from common.config import load_config, read_config_file
from simulations import hosts
from simulations.canaries import (
    expected_exposure,
    exposure,
    judge_canary_examples,
    judge_canary_users,
    judge_extraction,
    run_canaries,
)


@pytest.fixture(autouse=True)
def _same(same_run):
    """A bound of 95 % is above the truth in one of twenty runs at most, and a test should not be that one."""


def open_host(folder, **changes):
    config = load_config(read_config_file(folder / "config.toml"))
    return hosts.host_of(config.model_copy(update={"rehearsal": True} | changes))


def canaries(host, seed=0, **changes):
    sizes = {"rounds": 3, "canary_users": 80, "canary_examples": 16, "real_users": 8} | changes
    return run_canaries(host, generator=np.random.default_rng(seed), **sizes)


def test_the_small_run_has_the_promise_of_the_audited_one_and_hides_its_canaries(run):
    host = open_host(run)
    found = canaries(host)
    assert found.spec.clip == host.config.clip
    assert found.spec.epsilon == "8.0"
    assert found.spec.sampling_rate == pytest.approx(6 / 24, abs=0.01)
    assert 0 < found.spent <= 8.0
    assert found.vectors.shape == (4, found.spec.model_dim)
    one_shot, one_run = judge_canary_users(found)
    examples, extraction = judge_canary_examples(host, found), judge_extraction(host, found)
    for result in (one_shot, one_run, examples, extraction):
        assert result.verdict in {"holds", "not shown"}
        assert result.value <= result.saturation
    assert "cannot fail" in one_run.why  # 80 canaries cannot refute an epsilon of 8, and the result says so
    assert extraction.low < extraction.chance < extraction.high


def test_without_noise_canary_users_are_found_and_their_number_limits_what_it_shows(run):
    found = canaries(open_host(run, epsilon=math.inf, cohort=24), real_users=2)
    one_shot, one_run = judge_canary_users(found)
    assert math.isinf(found.spent)
    assert one_run.verdict == one_shot.verdict == "not shown"  # nothing was claimed, so nothing is contradicted
    assert one_run.value > 0.8 * one_run.saturation > 2.0
    assert one_run.details["auc"] > 0.99
    assert one_shot.value > 2.0


def test_a_server_that_adds_no_noise_is_contradicted(run, monkeypatch):
    monkeypatch.setattr(server.rounds, "add_central_noise", lambda total, *_: total)
    found = canaries(open_host(run, epsilon=1.0, cohort=24), real_users=2, canary_users=120)
    assert found.spent <= 1.0
    one_shot, one_run = judge_canary_users(found)
    assert (one_shot.verdict, one_run.verdict) == ("contradicted", "contradicted")
    assert "was charged" in one_run.why


def test_the_attacker_recovers_the_means_from_what_every_device_sees(run):
    found = canaries(open_host(run, server_momentum=0.9, server_learning_rate=0.7, epsilon=math.inf, cohort=24))
    taken = found.means() @ found.directions.T * found.spec.sampling_rate * found.spec.population
    present, absent = taken[:, found.users_in], taken[:, ~found.users_in]
    assert present.mean() == pytest.approx(1.0, abs=0.15)
    assert abs(absent.mean()) < 0.15


def test_nothing_of_the_small_run_is_left_behind(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "elsewhere"))
    (tmp_path / "elsewhere").mkdir()
    before = sorted(run.rglob("*"))
    canaries(open_host(run), rounds=1, canary_users=8, canary_examples=4, real_users=2)
    assert sorted(run.rglob("*")) == before
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_exposure_is_the_bits_that_a_rank_saves():
    references = np.arange(7.0)
    assert exposure(np.array([10.0, 5.5, -1.0]), references).tolist() == pytest.approx([3.0, 2.0, 0.0])
    ranks = np.arange(1, 9)
    assert expected_exposure(7) == pytest.approx(np.mean(3.0 - np.log2(ranks)))
