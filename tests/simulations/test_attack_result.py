"""How results are told: rankings and intervals against naive counts, and every number with its neighbours."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from common.accountants import equivalent_mu
from simulations.attack_result import AttackResult, bound_from_scores, mean_interval, ranking


def test_the_auc_is_the_share_of_pairs_in_the_right_order():
    generator = np.random.default_rng(0)
    members, others = generator.integers(0, 8, 30), generator.integers(0, 6, 40)
    pairs = [1.0 if m > o else 0.5 if m == o else 0.0 for m, o in itertools.product(members, others)]
    assert ranking(members, others).auc[0] == pytest.approx(np.mean(pairs))


def test_the_interval_of_the_auc_holds_the_truth_about_as_often_as_it_says():
    truth = stats.norm.cdf(1 / math.sqrt(2))
    inside = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        _, low, high = ranking(generator.normal(1, 1, 60), generator.normal(0, 1, 60)).auc
        inside += low <= truth <= high
    assert inside >= 180


def test_the_true_positive_rate_is_counted_at_one_percent_false_positives():
    others = np.arange(1000.0)
    members = np.array([995.0] * 30 + [500.0] * 70)
    found = ranking(members, others)
    assert (others > np.quantile(others, 0.99, method="higher")).mean() <= 0.01
    assert found.caught[0] == pytest.approx(0.3)
    assert found.caught[1] < 0.3 < found.caught[2] <= 1.0
    assert found.most_caught == pytest.approx(0.025 ** (1 / 100))


def test_a_bound_from_scores_is_not_above_the_truth_though_it_chose_its_threshold():
    generator = np.random.default_rng(1)
    bounds = [bound_from_scores(generator.normal(0, 1, 100), generator.normal(0, 1, 100), 1e-5) for _ in range(24)]
    assert sum(bound.epsilon > 0 for bound in bounds) <= 5
    assert bound_from_scores(generator.normal(9, 1, 400), generator.normal(0, 1, 400), 1e-5).epsilon > 3.0


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.0, 1.0, 4.0])
def test_few_bounds_from_scores_are_above_the_truth(epsilon):
    mu = equivalent_mu(epsilon, 1e-5) if epsilon else 0.0
    generator = np.random.default_rng(2)
    scores = [(generator.normal(mu, 1, 100), generator.normal(0, 1, 100)) for _ in range(200)]
    assert sum(bound_from_scores(one, other, 1e-5).epsilon > epsilon for one, other in scores) <= 21


def test_the_interval_of_a_mean_is_students():
    values = np.array([1.0, 2.0, 4.0, 9.0])
    expected = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert mean_interval(values)[1:] == pytest.approx(expected)


def test_a_result_is_a_line_and_an_object_with_everything():
    result = AttackResult(
        "an attack", "a target", "bits", 1.0, 0.5, math.inf, 0.1, 9.0, 12, "holds", "Because.", claimed_epsilon=math.inf
    )
    told = (
        "holds: an attack on a target: bits 1.000 [0.500, inf], by chance 0.100, at most 9.000 (12 samples). Because."
    )
    assert result.line() == told
    written = result.to_json()
    assert (written["high"], written["claimed_epsilon"], written["saturation"]) == ("inf", "inf", 9.0)


@pytest.mark.parametrize("scores", [[], [1.0], [1.0, 2.0, 3.0, math.nan], [[1.0] * 4] * 4])
def test_too_few_scores_or_odd_ones_are_refused(scores):
    with pytest.raises(ValueError, match="finite scores"):
        ranking(scores, [1.0, 2.0, 3.0, 4.0])
