"""Bounds from two sets of scores: against closed forms and naive oracles, at no privacy loss and over honest runs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from common.accountants import equivalent_mu
from simulations.lower_bounds import (
    LowerBound,
    clopper_pearson,
    clopper_pearson_bound,
    cosine_bound,
    epsilon_of_mu,
    gaussian_bound,
)

DELTA = 1e-5
HONEST_RUNS, MOST_WRONG = 200, 21
"""Of 200 runs each wrong with 5 %, more than 21 are wrong with probability 5e-4."""


def gaussian_scores(generator, mu, trials):
    return generator.normal(mu, 1.0, trials), generator.normal(0.0, 1.0, trials)


def hits(scores, threshold):
    return int((scores > threshold).sum())


def from_counts(one, other, threshold, **options):
    return clopper_pearson_bound(hits(one, threshold), one.size, hits(other, threshold), other.size, DELTA, **options)


# Clopper and Pearson


@pytest.mark.parametrize(("successes", "trials"), [(0, 5), (1, 7), (5, 5), (13, 40)])
def test_the_ends_of_the_interval_are_where_the_binomial_tails_are_small(successes, trials):
    low, high = clopper_pearson(successes, trials, 0.95)
    if successes:
        tail = sum(math.comb(trials, k) * low**k * (1 - low) ** (trials - k) for k in range(successes, trials + 1))
        assert tail == pytest.approx(0.025)
    else:
        assert low == 0.0
    if successes < trials:
        tail = sum(math.comb(trials, k) * high**k * (1 - high) ** (trials - k) for k in range(successes + 1))
        assert tail == pytest.approx(0.025)
    else:
        assert high == 1.0


def test_a_published_interval():
    # Newcombe (1998), Statistics in Medicine 17, Table I, method 5: 81 of 263 and 15 of 148.
    assert clopper_pearson(81, 263) == pytest.approx((0.2527, 0.3676), abs=5e-5)
    assert clopper_pearson(15, 148) == pytest.approx((0.0578, 0.1617), abs=5e-5)


def test_randomized_response_is_bounded_by_what_it_is():
    # True and false positive rates of 3/4 and 1/4: epsilon is log 3, and many trials come close to it.
    bound = clopper_pearson_bound(750_000, 1_000_000, 250_000, 1_000_000, 1e-12)
    assert math.log(3) - 0.02 < bound.epsilon < math.log(3)


def test_a_rule_that_says_no_too_often_counts_as_much_as_one_that_says_yes_too_often():
    one = clopper_pearson_bound(900, 1000, 500, 1000, DELTA)
    mirrored = clopper_pearson_bound(500, 1000, 100, 1000, DELTA)
    assert one.epsilon == pytest.approx(mirrored.epsilon)
    assert one.epsilon > 1.0


def test_without_noise_the_bound_is_its_saturation_and_grows_with_the_trials_only():
    perfect = [clopper_pearson_bound(n, n, 0, n, DELTA) for n in (100, 10_000)]
    assert all(bound.epsilon == bound.saturation for bound in perfect)
    assert perfect[0].saturation == pytest.approx(math.log((0.025**0.01 - DELTA) / (1 - 0.025**0.01)))
    assert perfect[1].saturation > perfect[0].saturation
    assert clopper_pearson_bound(50, 100, 50, 100, DELTA).saturation == perfect[0].saturation


# Two Gaussians


def test_the_gaussian_bound_is_the_one_that_statistics_books_give():
    one, other = np.array([2.0, 3.0, 4.0, 5.0]), np.array([0.0, 1.0, 1.5, 2.5])
    test = stats.ttest_ind(one, other)
    low = test.confidence_interval(0.95).low  # two-sided: its lower end fails with 2.5 %
    pooled = (one.var(ddof=1) * 3 + other.var(ddof=1) * 3) / 6
    widest = math.sqrt(pooled * 6 / stats.chi2.ppf(0.025, 6))
    bound = gaussian_bound(one, other, DELTA)
    assert bound.mu == pytest.approx(low / widest)
    assert bound.epsilon == pytest.approx(epsilon_of_mu(low / widest, DELTA))


def test_an_epsilon_of_mu_is_the_one_whose_mu_it_is():
    for epsilon in (0.5, 4.0, 20.0):
        assert epsilon_of_mu(equivalent_mu(epsilon, DELTA), DELTA) == pytest.approx(epsilon, rel=1e-6)
    assert epsilon_of_mu(0.0, DELTA) == 0.0
    assert math.isinf(epsilon_of_mu(math.inf, DELTA))


def test_a_release_without_noise_has_no_finite_bound():
    bound = gaussian_bound(np.ones(50), np.zeros(50), DELTA)
    assert math.isinf(bound.epsilon)
    assert bound.to_json()["epsilon"] == "inf"


@pytest.mark.parametrize(("epsilon", "least"), [(1.0, 0.75), (4.0, 3.6), (8.0, 7.3)])
def test_twenty_thousand_trials_prove_most_of_what_a_gaussian_release_loses(epsilon, least):
    mu = equivalent_mu(epsilon, DELTA)
    proven = [
        gaussian_bound(*gaussian_scores(np.random.default_rng(seed), mu, 10_000), DELTA).epsilon for seed in range(9)
    ]
    assert min(proven) >= least
    assert np.median(proven) <= epsilon
    counted = from_counts(*gaussian_scores(np.random.default_rng(9), mu, 10_000), mu / 2, as_gaussian=True)
    assert least - 0.25 <= counted.epsilon <= epsilon


def test_halved_noise_is_seen_by_all_that_look_at_mu():
    mu = 2 * equivalent_mu(4.0, DELTA)
    scores = gaussian_scores(np.random.default_rng(0), mu, 10_000)
    assert gaussian_bound(*scores, DELTA).epsilon > 8.0
    assert from_counts(*scores, mu / 2, as_gaussian=True).epsilon > 8.0
    assert from_counts(*scores, 3.3).epsilon > 4.0


# Canary users in one run


def released(generator, canaries, dim, noise):
    """One release that holds `canaries` random unit updates; gives the cosines with them."""
    directions = generator.standard_normal((canaries, dim))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    total = directions.sum(axis=0) + noise * generator.standard_normal(dim)
    return directions @ total / np.linalg.norm(total)


def test_canary_users_prove_much_of_what_one_release_loses_and_not_more():
    mu = equivalent_mu(4.0, DELTA)
    proven = [cosine_bound(released(np.random.default_rng(s), 300, 20_000, 1 / mu), 20_000, DELTA) for s in range(2)]
    assert all(2.5 < bound.epsilon < 4.0 for bound in proven)
    assert all(bound.epsilon < bound.saturation for bound in proven)


def test_the_saturation_of_canary_users_is_what_a_release_without_noise_shows():
    bound = cosine_bound(released(np.random.default_rng(0), 200, 20_000, 0.0), 20_000, DELTA)
    assert bound.epsilon == pytest.approx(bound.saturation, rel=0.15)


def test_canaries_that_took_no_part_prove_nothing():
    generator = np.random.default_rng(0)
    wrong = 0
    for _ in range(60):
        directions = generator.standard_normal((100, 500))
        other = generator.standard_normal(500)
        cosines = directions @ other / np.linalg.norm(directions, axis=1) / np.linalg.norm(other)
        wrong += cosine_bound(cosines, 500, DELTA).epsilon > 0
    assert wrong <= 9  # of 60, each wrong with 5 %


# All of them


ESTIMATORS = {
    "true and false positives": lambda one, other, mu: from_counts(one, other, mu / 2 + 1.0),
    "as Gaussian, true and false positives": lambda one, other, mu: from_counts(one, other, mu / 2, as_gaussian=True),
    "two Gaussians": lambda one, other, _: gaussian_bound(one, other, DELTA),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 4.0])
def test_few_bounds_on_honest_runs_are_above_the_truth(estimator, epsilon):
    mu = equivalent_mu(epsilon, DELTA) if epsilon else 0.0
    generator = np.random.default_rng(1)
    bounds = [ESTIMATORS[estimator](*gaussian_scores(generator, mu, 200), mu) for _ in range(HONEST_RUNS)]
    assert sum(bound.epsilon > epsilon for bound in bounds) <= MOST_WRONG
    assert all(bound.confidence == 0.95 and bound.samples == 400 for bound in bounds)
    assert all(bound.epsilon <= bound.saturation for bound in bounds)


@pytest.mark.slow
def test_few_bounds_from_canary_users_are_above_zero_where_nothing_was_lost():
    # Canaries that took no part: the release is of others, and every direction is as good as any.
    generator = np.random.default_rng(3)
    wrong = 0
    for _ in range(HONEST_RUNS):
        directions = generator.standard_normal((100, 2_000))
        other = generator.standard_normal(2_000)
        cosines = directions @ other / np.linalg.norm(directions, axis=1) / np.linalg.norm(other)
        wrong += cosine_bound(cosines, 2_000, DELTA).epsilon > 0
    assert wrong <= MOST_WRONG


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 4.0])
def test_few_bounds_from_canary_users_are_above_the_truth(epsilon):
    mu = equivalent_mu(epsilon, DELTA)
    wrong = sum(
        cosine_bound(released(np.random.default_rng(seed), 100, 5_000, 1 / mu), 5_000, DELTA).epsilon > epsilon
        for seed in range(HONEST_RUNS)
    )
    assert wrong <= MOST_WRONG


@pytest.mark.parametrize(
    "call",
    [
        lambda: clopper_pearson(3, 2),
        lambda: clopper_pearson(0, 0),
        lambda: clopper_pearson(1, 2, 0.2),
        lambda: clopper_pearson_bound(1, 2, 1, 2, 0.0),
        lambda: gaussian_bound([1.0], [0.0, 1.0], DELTA),
        lambda: gaussian_bound([1.0, math.nan], [0.0, 1.0], DELTA),
        lambda: cosine_bound([0.1, 2.0], 10, DELTA),
        lambda: cosine_bound([0.1, 0.2], 1, DELTA),
    ],
)
def test_what_is_no_test_has_no_bound(call):
    with pytest.raises(ValueError, match=r"trial|confidence|delta|finite|cosines"):
        call()


def test_more_evidence_never_proves_less():
    for hits_seen, alarms in itertools.product((100, 150, 200), (0, 50, 100)):
        weaker = clopper_pearson_bound(hits_seen, 200, alarms + 20, 200, DELTA).epsilon
        assert clopper_pearson_bound(hits_seen, 200, alarms, 200, DELTA).epsilon >= weaker or hits_seen <= alarms + 20


def test_a_bound_is_written_with_all_that_it_needs():
    assert LowerBound("x", 1.0, DELTA, 0.95, 10, math.inf).to_json() == {
        "method": "x",
        "epsilon": 1.0,
        "delta": DELTA,
        "confidence": 0.95,
        "samples": 10,
        "saturation": "inf",
        "mu": None,
    }
