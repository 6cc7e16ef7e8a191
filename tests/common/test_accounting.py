"""Tests of calibration: noise that keeps a promise and wastes none."""

import math

import pytest

from common.accounting import (
    PoissonGaussian,
    Repeated,
    calibrate,
    epsilon_of,
)
from common.privacy import Adjacency


def sampled(rate: float, multiplier: float, count: int) -> Repeated:
    return Repeated(PoissonGaussian(rate, multiplier), count)


def test_the_calibrated_multiplier_equals_the_published_one():
    assert calibrate(epsilon=2, delta=1e-5, rounds=100, sampling_rate=0.1) == pytest.approx(2.248, abs=2e-3)
    assert calibrate(epsilon=8, delta=1e-5, rounds=30) == pytest.approx(3.3, abs=0.05)


@pytest.mark.parametrize("adjacency", list(Adjacency))
@pytest.mark.parametrize("rate", [1.0, 0.05])
@pytest.mark.parametrize("epsilon", [0.3, 8.0, 60.0])
def test_calibrated_noise_never_costs_more_than_was_asked_and_hardly_less(epsilon, rate, adjacency):
    multiplier = calibrate(epsilon=epsilon, delta=1e-6, rounds=27, sampling_rate=rate, adjacency=adjacency)
    cost = epsilon_of(sampled(rate, multiplier, 27), 1e-6, "pld", adjacency)
    assert epsilon * (1 - 2e-3) <= cost <= epsilon


def test_no_promise_needs_no_noise_and_an_impossible_one_is_refused():
    assert calibrate(epsilon=math.inf, delta=1e-5, rounds=5) == 0.0
    for epsilon in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="positive"):
            calibrate(epsilon=epsilon, delta=1e-5, rounds=5)
    with pytest.raises(ValueError, match="no noise meets"):
        calibrate(epsilon=1e-9, delta=1e-12, rounds=10**6)
    with pytest.raises(ValueError, match="count"):
        calibrate(epsilon=1.0, delta=1e-5, rounds=0)
