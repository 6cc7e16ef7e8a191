"""Tests of the numbers of a run's secure sums: two budgets that both hold, cohorts, caps, and what is refused."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.accounting import Gaussian, PoissonGaussian, Repeated, calibrate, epsilon_of
from common.distributed_noise import SMOOTHING
from common.errors import ClaimRefused, ConfigError, Refusal
from common.mask_graph import honest_survivors
from common.secure_sum import CORRUPT, THRESHOLD, SecureSum, called_off, default_cap, size_cohorts, with_secure_sums

DELTA = 1e-5


@pytest.fixture(scope="module")
def plain(release_spec):
    """Cohorts of 200 of 4,000 users, 22 rounds."""
    return release_spec(
        noise="distributed", sampling_rate=0.05, population=4000, rounds=22, shapes=((8, 256), (256, 8))
    )


@pytest.fixture(scope="module")
def spec(plain):
    return with_secure_sums(plain, epsilon=8.0, coordinator_epsilon=None, participation_cap=None)


def honest(size: int) -> int:
    return honest_survivors(size, THRESHOLD, CORRUPT)


@pytest.mark.parametrize("coordinator_epsilon", [None, 30.0, 8.0, 1.0])
def test_both_budgets_hold_at_every_size_of_a_round(plain, coordinator_epsilon):
    spec = with_secure_sums(plain, epsilon=8.0, coordinator_epsilon=coordinator_epsilon, participation_cap=4)
    sums = SecureSum.of(spec)
    known = epsilon_of(Repeated(Gaussian(sums.noise_multiplier), 4), DELTA)
    assert known <= float(sums.epsilon) * (1 + 1e-9)
    assert coordinator_epsilon is None or float(sums.epsilon) == coordinator_epsilon
    assert epsilon_of(Repeated(PoissonGaussian(0.05, spec.noise_multiplier), 22), DELTA) <= 8.0
    levels = set()
    for size in range(sums.smallest_cohort, sums.largest_cohort + 1):
        noise = sums.noise(spec, size)
        levels.add((noise.level, noise.bits, noise.steps))
        # Whatever the coordinator does, the fewest honest shares are the multiplier that is charged.
        assert noise.multiplier_with(honest(size)) == pytest.approx(sums.noise_multiplier)
        # Outsiders face the level less the shares of those that may have left theirs out.
        missing = math.floor(CORRUPT * size) * noise.share_scale**2
        faced = math.sqrt(noise.level**2 - missing - SMOOTHING**2) / noise.sensitivity
        assert faced >= spec.noise_multiplier
        # And every number of survivors can be filled up to it.
        assert noise.top_up_scale(size) >= 4.0
        assert noise.closeness <= 1e-9
    assert len(levels) == 1


def test_where_nobody_asks_for_more_the_published_noise_is_hardly_above_that_of_central_noise(spec):
    sums = SecureSum.of(spec)
    noise = sums.noise(spec, 200)
    central = calibrate(epsilon=8.0, delta=DELTA, rounds=22, sampling_rate=0.05)
    assert 1.0 < noise.level * noise.step / central < 1.07
    # The shares are most of it: the coordinator adds what is lacking, not the noise.
    assert 200 * noise.share_scale**2 > 0.85 * noise.level**2


def test_a_smaller_budget_against_the_coordinator_is_noise_that_outsiders_get_too(plain):
    loose, tight = (
        with_secure_sums(plain, epsilon=8.0, coordinator_epsilon=epsilon, participation_cap=4)
        for epsilon in (30.0, 4.0)
    )
    assert tight.noise_multiplier > 2 * loose.noise_multiplier
    assert loose.noise_multiplier == pytest.approx(
        calibrate(epsilon=8.0, delta=DELTA, rounds=22, sampling_rate=0.05), rel=2e-3
    )


def test_without_noise_sums_are_exact_and_promise_nothing(plain):
    spec = with_secure_sums(plain, epsilon=math.inf, coordinator_epsilon=None, participation_cap=None)
    sums = SecureSum.of(spec)
    assert (spec.noise_multiplier, sums.noise_multiplier, sums.epsilon) == (0.0, 0.0, "inf")
    assert sums.noise(spec, 150).share_scale == 0.0
    assert sums.noise(spec, 150).top_up_scale(120) == 0.0


@settings(max_examples=40, deadline=None)
@given(
    population=st.integers(60, 5000),
    share=st.floats(0.02, 0.9),
    rounds=st.integers(1, 60),
    delta=st.sampled_from([1e-5, 1e-6, 1e-8]),
)
def test_cohorts_are_bounded_so_that_a_called_off_round_tells_nearly_nothing(population, share, rounds, delta):
    try:
        smallest, largest = size_cohorts(share, population, rounds, delta)
    except ClaimRefused:
        # Then even the smallest sum that there is would be missed too often, or the largest is too large.
        size = stats.binom(population - 1, share)
        assert rounds * share * size.pmf(2) > 0.005 * delta or share * population > 1500
        return
    size = stats.binom(population - 1, share)
    spent = rounds * share * (size.pmf(smallest - 1) + size.pmf(largest))
    assert spent <= 0.02 * delta
    assert called_off(share, population, rounds, smallest, largest) == pytest.approx(spent, rel=1e-6, abs=1e-30)
    assert 3 <= smallest <= math.ceil(share * population) <= largest <= 2000


def test_where_everybody_comes_to_every_round_half_of_them_may_be_gone():
    assert size_cohorts(1.0, 5, 10, DELTA) == (3, 5)
    assert size_cohorts(1.0, 40, 10, DELTA) == (20, 40)


def test_a_user_is_hardly_ever_turned_away_at_the_default_cap():
    for rate, rounds in ((0.05, 22), (0.5, 30), (0.01, 100)):
        cap, hits = default_cap(rate, rounds), np.arange(rounds + 1)
        chances = stats.binom(rounds, rate).pmf(hits)
        assert (np.maximum(hits - cap, 0) * chances).sum() <= 0.01 * rate * rounds
        assert cap == 1 or (np.maximum(hits - cap + 1, 0) * chances).sum() > 0.01 * rate * rounds
    assert default_cap(1.0, 7) == 7


def test_turning_users_away_costs_outsiders_nothing():
    """Two rounds, a cap of one: a user is in the second only if not in the first; by exact integration."""
    rate, z = 0.3, 0.8
    grid = np.linspace(-7, 8, 1501)
    step = grid[1] - grid[0]
    absent, present = stats.norm.pdf(grid, 0, z), stats.norm.pdf(grid, 1, z)
    first, second = np.meshgrid(np.arange(grid.size), np.arange(grid.size), indexing="ij", sparse=True)

    def density(chances):
        """Of (first, second) sums; `chances` are those of taking part in (none, first, second, both)."""
        parts = [(absent, absent), (present, absent), (absent, present), (present, present)]
        return sum(c * a[first] * b[second] for c, (a, b) in zip(chances, parts, strict=True))

    without = density((1.0, 0.0, 0.0, 0.0))
    capped = density(((1 - rate) ** 2, rate, (1 - rate) * rate, 0.0))
    free = density(((1 - rate) ** 2, rate * (1 - rate), (1 - rate) * rate, rate**2))

    def delta(p, q, epsilon):
        return float(np.maximum(p - math.exp(epsilon) * q, 0).sum() * step**2)

    for epsilon in (0.1, 0.3, 0.6):
        assert delta(capped, without, epsilon) < delta(free, without, epsilon)
        assert delta(without, capped, epsilon) < delta(without, free, epsilon)


def test_cohorts_that_fall_short_so_often_that_it_tells_who_took_part_are_refused(plain):
    with pytest.raises(ClaimRefused, match="called-off round tells who took part"):
        with_secure_sums(
            replace(plain, population=40, sampling_rate=0.2),
            epsilon=8.0,
            coordinator_epsilon=None,
            participation_cap=None,
        )
    with pytest.raises(ClaimRefused, match="at most 2000 devices"):
        with_secure_sums(
            replace(plain, population=5000, sampling_rate=1.0),
            epsilon=8.0,
            coordinator_epsilon=None,
            participation_cap=None,
        )


@pytest.mark.parametrize("cap", [0, 23])
def test_a_cap_that_no_run_has_is_refused(plain, cap):
    with pytest.raises(ConfigError, match="participation_cap"):
        with_secure_sums(plain, epsilon=8.0, coordinator_epsilon=None, participation_cap=cap)


def test_noise_that_is_scaled_down_is_refused(plain):
    with pytest.raises(ConfigError, match="as_if_population"):
        with_secure_sums(
            replace(plain, extrapolation=0.5), epsilon=8.0, coordinator_epsilon=None, participation_cap=None
        )


@pytest.mark.parametrize(
    "change",
    [
        {"smallest_cohort": 2},
        {"smallest_cohort": 1000},
        {"smallest_cohort": 100.0},
        {"largest_cohort": 2001},
        {"participation_cap": 0},
        {"participation_cap": 23},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": "1"},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": 1e-9},
        {"epsilon": 8.0},
        {"epsilon": "nan"},
        {"epsilon": "-1"},
        {"extra": 1},
    ],
)
def test_a_device_refuses_sums_that_no_run_of_this_version_has(spec, change):
    hostile = dict(spec.secure_sum) | change
    with pytest.raises(Refusal) as refusal:
        SecureSum.of(_unchecked(spec, secure_sum=hostile))
    assert refusal.value.code == "bad-request"


@pytest.mark.parametrize(
    "change", [{"noise": "central"}, {"unit": "example"}, {"extrapolation": 0.5}, {"secure_sum": None}]
)
def test_secure_sums_go_with_distributed_noise_for_users_and_with_nothing_else(spec, change):
    with pytest.raises(Refusal):
        SecureSum.of(replace(spec, **change))


def test_the_terms_of_a_round_follow_from_the_spec_alone(spec):
    sums = SecureSum.of(spec)
    terms = sums.terms(spec, 7)
    assert (terms.run, terms.round, terms.spec) == (spec.run, 7, spec.digest)
    assert (terms.smallest_cohort, terms.largest_cohort) == (sums.smallest_cohort, sums.largest_cohort)
    noise = sums.noise(spec, 200)
    assert (terms.dim, terms.bits) == (noise.padded_dim, noise.bits)
    noise.check(terms, 200)
    assert sums.terms(spec, 8).digest != terms.digest
    for devices in (sums.smallest_cohort - 1, sums.largest_cohort + 1):
        with pytest.raises(ValueError, match="another number of devices"):
            sums.noise(spec, devices)


def _unchecked(spec, **changes):
    """A spec as a hostile server would write it, past its own checks."""
    from copy import copy

    other = copy(spec)
    for name, value in changes.items():
        object.__setattr__(other, name, value)
    return other
