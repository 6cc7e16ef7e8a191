"""Audits in one run: against the papers' own algorithms written down naively, and over honest runs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from common.accountants import equivalent_mu
from simulations.one_run import (
    _chance,
    _refutes_gaussian,
    best_guesses,
    count_correct,
    one_run_bound,
    one_run_gaussian_bound,
)

DELTA = 1e-5
BOUNDS = {"Steinke et al.": one_run_bound, "f-DP": one_run_gaussian_bound}


def audit(generator, canaries, mu, bound, planned_mu=None):
    """One honest run: canaries in by a coin, scores as a Gaussian release of separation `mu` gives them."""
    guesses = best_guesses(canaries, mu if planned_mu is None else planned_mu, DELTA, bound)
    included = generator.random(canaries) < 0.5
    scores = generator.standard_normal(canaries) + mu * included
    return bound(count_correct(scores, included, guesses), guesses, canaries, DELTA)


def chance_as_published(m, r, v, epsilon, delta):
    """Appendix D of Steinke et al. (2023), step by step, with exact binomial sums."""
    q = 1 / (1 + math.exp(-epsilon))
    mass = [math.comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    beta, alpha, total = sum(mass[v:]), 0.0, 0.0
    for i in range(1, v + 1):
        total += mass[v - i]
        if total > i * alpha:
            alpha = total / i
    return min(1.0, beta + alpha * delta * 2 * m)


def refutes_as_published(mu, m, c, c_correct, alpha):
    """Algorithms 2 and 3 of Mahloujifar et al. (2025) for k = 2, with every step of both lists."""
    inverse_blow_up = lambda x: stats.norm.cdf(stats.norm.ppf(x) - mu)  # noqa: E731
    h, r = [0.0] * (c_correct + 1), [0.0] * (c_correct + 1)
    r[c_correct] = alpha * c_correct / m
    h[c_correct] = alpha * (c - c_correct) / m
    for i in range(c_correct - 1, -1, -1):
        h[i] = max(h[i + 1], inverse_blow_up(r[i + 1]))
        r[i] = min(1.0, r[i + 1] + i / (c - i) * (h[i] - h[i + 1]))
    return r[0] + h[0] > c / m


@pytest.mark.parametrize(("m", "r", "v"), [(10, 10, 10), (40, 20, 15), (60, 60, 41), (200, 30, 0), (200, 30, 30)])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [1e-9, 1e-3])
def test_the_chance_of_so_many_right_guesses_is_that_of_the_paper(m, r, v, epsilon, delta):
    assert _chance(v, r, m, epsilon, delta) == pytest.approx(chance_as_published(m, r, v, epsilon, delta), rel=1e-9)


def test_what_refutes_a_gaussian_is_what_the_paper_says():
    seen = set()
    for mu in (0.0, 0.3, 1.0, 2.5):
        for m, c, right in ((20, 20, 19), (50, 20, 15), (200, 100, 90), (200, 40, 40), (500, 500, 251)):
            expected = refutes_as_published(mu, m, c, right, 0.05)
            assert _refutes_gaussian(mu, right, c, m, 0.05) == expected
            seen.add(bool(expected))
    assert seen == {True, False}


def test_without_delta_the_bound_is_that_of_randomized_response():
    # The largest rate q with P[Binomial(r, q) >= v] <= 5 % is the lower Clopper-Pearson limit at 90 % two-sided.
    rate = stats.binomtest(80, 100).proportion_ci(0.90, "exact").low
    bound = one_run_bound(80, 100, 100, 1e-12)
    assert bound.epsilon == pytest.approx(math.log(rate / (1 - rate)), abs=1e-4)


def test_all_guesses_right_give_the_saturation_in_closed_form():
    bound = one_run_bound(100, 100, 100, 1e-12)
    rate = 0.05**0.01
    assert bound.epsilon == bound.saturation == pytest.approx(math.log(rate / (1 - rate)), abs=1e-4)


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_more_right_guesses_never_prove_less(bound):
    proven = [bound(right, 60, 100, DELTA).epsilon for right in range(0, 61, 4)]
    assert proven == sorted(proven)
    assert proven[0] == 0.0
    assert proven[-1] == bound(30, 60, 100, DELTA).saturation


# facts of ideal white-box audits at delta 1e-5: (epsilon, canaries) -> least median of both bounds
TABLE = {
    (1.0, 1000): (0.02, 0.03),
    (4.0, 100): (0.44, 0.67),
    (4.0, 1000): (1.22, 1.63),
    (8.0, 100): (1.02, 1.57),
    (8.0, 1000): (2.03, 2.84),
}


@pytest.mark.parametrize(("epsilon", "canaries"), TABLE)
def test_an_ideal_attack_proves_as_much_as_is_known_to_be_possible_and_not_more(epsilon, canaries):
    mu = equivalent_mu(epsilon, DELTA)
    for bound, least in zip(BOUNDS.values(), TABLE[epsilon, canaries], strict=True):
        generator = np.random.default_rng(3)
        proven = [audit(generator, canaries, mu, bound).epsilon for _ in range(7)]
        assert least <= np.median(proven) < epsilon


@pytest.mark.slow
def test_ten_thousand_canaries_prove_as_much_as_is_known_to_be_possible():
    for epsilon, least in ((1.0, 0.23), (4.0, 1.04), (8.0, 1.88)):
        generator = np.random.default_rng(4)
        mu = equivalent_mu(epsilon, DELTA)
        assert least <= np.median([audit(generator, 10_000, mu, one_run_bound).epsilon for _ in range(5)]) < epsilon


def test_a_hundred_canaries_cannot_see_that_noise_is_ten_times_too_small_and_say_so():
    mu = 10 * equivalent_mu(4.0, DELTA)
    planned = equivalent_mu(4.0, DELTA)
    few, many = (audit(np.random.default_rng(0), count, mu, one_run_bound, planned) for count in (100, 1000))
    assert few.epsilon <= few.saturation < 4.0
    assert audit(np.random.default_rng(0), 1000, mu, one_run_gaussian_bound, planned).epsilon > 4.0
    assert many.saturation > few.saturation


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_without_any_loss_hardly_any_run_proves_something(bound):
    generator = np.random.default_rng(5)
    assert sum(audit(generator, 100, 0.0, bound, 1.0).epsilon > 0 for _ in range(200)) <= 21


@pytest.mark.slow
@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
@pytest.mark.parametrize("epsilon", [0.25, 1.0, 4.0])
def test_few_of_two_hundred_honest_runs_prove_more_than_the_truth(bound, epsilon):
    generator = np.random.default_rng(6)
    mu = equivalent_mu(epsilon, DELTA)
    assert sum(audit(generator, 300, mu, bound).epsilon > epsilon for _ in range(200)) <= 21


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_few_of_two_hundred_runs_of_randomized_response_prove_more_than_the_truth(epsilon):
    # The mechanism on which the bound is tight: each coin is told rightly with probability e^eps / (1 + e^eps).
    generator = np.random.default_rng(7)
    rate = 1 / (1 + math.exp(-epsilon))
    right = generator.binomial(200, rate, size=200)
    wrong = sum(one_run_bound(int(count), 200, 200, 1e-9).epsilon > epsilon for count in right)
    assert 1 <= wrong <= 21


def test_guesses_are_counted_from_both_ends():
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0])
    included = np.array([True, False, True, True, False])
    assert count_correct(scores, included, 2) == 2
    assert count_correct(scores, included, 4) == 2
    assert count_correct(scores, included, 5) == 3
    assert count_correct(scores, ~included, 2) == 0


def test_the_number_of_guesses_follows_the_claim():
    few, many = (best_guesses(1000, mu, DELTA, one_run_bound) for mu in (1.0, 6.0))
    assert 2 <= few < many <= 1000
    assert best_guesses(10, 0.01, DELTA, one_run_bound) == 10  # nothing is to be had; the most is what could be


@pytest.mark.parametrize(
    "call",
    [
        lambda: one_run_bound(3, 2, 10, DELTA),
        lambda: one_run_bound(1, 2, 1, DELTA),
        lambda: one_run_gaussian_bound(1, 2, 10, 2.0),
        lambda: one_run_gaussian_bound(1, 2, 10, DELTA, confidence=0.1),
        lambda: count_correct([1.0], [True, False], 1),
        lambda: count_correct([1.0], [True], 2),
    ],
)
def test_what_is_no_audit_has_no_bound(call):
    with pytest.raises(ValueError, match=r"guesses|delta"):
        call()
