"""Tests of the accountants, against published and recomputed numbers and against each other."""

import math
import subprocess
import sys
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.accountants import renyi_divergences, renyi_epsilon
from common.accounting import (
    Composed,
    DiscreteGaussian,
    Gaussian,
    PoissonComposed,
    PoissonGaussian,
    Repeated,
    attack_rate,
    calibrate,
    curve,
    delta_of,
    epsilon_of,
    equivalent_mu,
    group_epsilon,
)
from common.noised_counts import NoisedCounts
from common.privacy import Adjacency

ROOT = Path(__file__).parents[2]


def sampled(rate: float, multiplier: float, count: int) -> Repeated:
    return Repeated(PoissonGaussian(rate, multiplier), count)


@pytest.mark.parametrize(
    ("multiplier", "rate", "steps", "delta", "pld", "rdp"),
    [
        (1.0, 0.01, 1000, 1e-5, 1.828, 2.101),
        (1.0, 0.25, 40, 1e-5, 11.28, 12.60),
        (1.0, 0.001, 10_000, 1e-6, 0.555, 0.980),
        (0.3, 0.1, 10, 1e-5, 35.66, 41.17),
        (1.0, 0.1, 100, 1e-5, 7.05, None),
        (5.0, 0.1, 100, 1e-5, 0.76, None),
        (1.0, 1.0, 100, 1e-5, 91.8, None),
        (1.0, 1.0, 10, 1e-5, 17.9, None),
        (5.0, 1.0, 10, 1e-5, 2.59, None),
    ],
)
def test_epsilon_equals_the_published_tables(multiplier, rate, steps, delta, pld, rdp):
    events = sampled(rate, multiplier, steps)
    # pessimistic rounding may only raise it, and here by less than 0.7 %
    assert epsilon_of(events, delta) == pytest.approx(pld, rel=7e-3)
    if rdp is not None:
        assert epsilon_of(events, delta, "rdp") == pytest.approx(rdp, rel=2e-3)
        assert epsilon_of(events, delta) <= epsilon_of(events, delta, "rdp")


def test_an_independent_accountant_agrees_from_above():
    events = [sampled(0.01, 1.0, 1000), sampled(0.02, 1.5, 50), Gaussian(30.0)]
    ours, theirs = epsilon_of(events, 1e-5), epsilon_of(events, 1e-5, "prv")
    assert ours <= theirs <= ours + 0.03


def test_prv_equals_its_published_value():
    assert epsilon_of(sampled(0.01, 1.0, 1000), 1e-5, "prv") == pytest.approx(1.838, abs=2e-3)


def test_an_accountant_that_does_not_apply_says_so():
    for accountant, events, adjacency in [
        ("prv", DiscreteGaussian(3.0), Adjacency.ZERO_OUT),
        ("prv", PoissonGaussian(0.1, 1.0), Adjacency.REPLACE_ONE),
        ("rdp", PoissonGaussian(0.1, 1.0), Adjacency.REPLACE_ONE),
        ("gdp", Gaussian(1.0), Adjacency.ZERO_OUT),
    ]:
        with pytest.raises(ValueError, match="pld"):
            epsilon_of(events, 1e-5, accountant, adjacency)


def test_the_adjacency_changes_the_number_as_published():
    # noise of standard deviation C: multiplier 1 against sensitivity C, one half against 2C
    assert epsilon_of(Gaussian(1.0), 1e-5) == pytest.approx(4.38, abs=0.005)
    assert epsilon_of(Gaussian(0.5), 1e-5, "pld", Adjacency.REPLACE_ONE) == pytest.approx(10.00, abs=0.005)
    assert epsilon_of(sampled(0.01, 1.0, 1000), 1e-5, "pld", Adjacency.ADD_REMOVE) == pytest.approx(1.83, abs=0.005)
    replaced = epsilon_of(sampled(0.01, 0.5, 1000), 1e-5, "pld", Adjacency.REPLACE_ONE)
    assert replaced == pytest.approx(2.84, abs=0.01)
    assert epsilon_of(sampled(1.0, 0.5, 1000), 1e-5, "pld", Adjacency.REPLACE_ONE) > 600


@pytest.mark.parametrize(("records", "published"), [(1, 1.83), (2, 3.98), (5, 11.6), (10, 27.9)])
def test_a_user_with_several_records_is_protected_less_as_published(records, published):
    assert group_epsilon(sampled(0.01, 1.0, 1000), 1e-5, records) == pytest.approx(published, rel=4e-3)


def test_a_group_of_unsampled_releases_moves_them_by_its_size():
    assert group_epsilon(Gaussian(4.0), 1e-5, 4) == pytest.approx(epsilon_of(Gaussian(1.0), 1e-5))
    assert group_epsilon(Gaussian(0.0), 1e-5, 4) == math.inf


def test_clipping_each_of_eight_layers_by_itself_costs_as_published():
    assert epsilon_of(sampled(0.01, 1 / math.sqrt(8), 1000), 1e-5) == pytest.approx(41.4, abs=0.05)


def test_unsampled_gaussians_have_the_closed_form():
    events = [Repeated(Gaussian(2.0), 4), Gaussian(1.0)]
    mu = math.sqrt(4 / 4 + 1)
    for epsilon in (0.0, 0.5, 3.0, 9.0):
        expected = stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu)
        assert delta_of(events, epsilon) == pytest.approx(expected, rel=1e-9)
    assert delta_of(events, epsilon_of(events, 1e-6)) == pytest.approx(1e-6, rel=1e-6)
    assert equivalent_mu(epsilon_of(events, 1e-6), 1e-6) == pytest.approx(mu, rel=1e-9)


def test_flowers_classic_formula_underestimates_and_the_analytic_one_does_not():
    # sqrt(2 ln(1.25/delta)) / epsilon is valid up to epsilon 1 only: asked 10, it gives 10.39
    classic = math.sqrt(2 * math.log(1.25 / 1e-5)) / 10.0
    assert epsilon_of(Gaussian(classic), 1e-5, "pld", Adjacency.REPLACE_ONE) == pytest.approx(10.39, abs=0.01)
    exact = calibrate(epsilon=10.0, delta=1e-5, rounds=1, adjacency=Adjacency.REPLACE_ONE)
    assert 9.99 < epsilon_of(Gaussian(exact), 1e-5, "pld", Adjacency.REPLACE_ONE) <= 10.0
    assert exact > classic


@pytest.mark.parametrize(("scale", "sensitivity"), [(0.7, 1), (1.0, 1), (6.0, 3)])
def test_discrete_noise_costs_what_its_mass_function_says(scale, sensitivity):
    support = np.arange(-400, 401)
    upper = np.exp(-((support - sensitivity) ** 2) / (2 * scale**2))
    lower = np.exp(-(support**2) / (2 * scale**2))
    upper, lower = upper / upper.sum(), lower / lower.sum()
    for epsilon in (0.1, 1.0, 2.0):
        exact = np.maximum(upper - math.exp(epsilon) * lower, 0.0).sum()
        priced = delta_of(DiscreteGaussian(scale, sensitivity), epsilon)
        assert exact - 1e-12 <= priced <= exact * 1.06 + 1e-6


def test_a_release_without_noise_costs_everything():
    for event in (
        Gaussian(0),
        PoissonGaussian(0.01, 0.0),
        DiscreteGaussian(0.0),
        PoissonComposed(0.1, (Gaussian(1.0), Gaussian(0.0))),
        Composed((Gaussian(5.0), Repeated(Gaussian(0.0), 2))),
    ):
        for accountant in ("pld", "rdp", "prv"):
            assert epsilon_of(event, 1e-5, accountant) == math.inf
        assert delta_of(event, 3.0) == 1.0
        assert attack_rate(event) == 1.0


def test_nothing_released_costs_nothing():
    assert epsilon_of([], 1e-5) == 0.0
    assert delta_of([], 1.0) == 0.0
    assert attack_rate([]) == 0.01


def test_how_events_are_written_does_not_change_their_price():
    one = PoissonGaussian(0.05, 1.1)
    price = epsilon_of(Repeated(one, 12), 1e-5)
    assert epsilon_of([one] * 12, 1e-5) == price
    assert epsilon_of([Composed((one, Repeated(one, 5))), Repeated(Repeated(one, 3), 2)], 1e-5) == price
    assert epsilon_of(PoissonGaussian(1.0, 1.1), 1e-5) == epsilon_of(Gaussian(1.1), 1e-5)


def test_everything_from_one_cohort_is_one_event_and_two_would_claim_too_little():
    parts = PoissonComposed(0.01, (Gaussian(math.sqrt(2)), Gaussian(math.sqrt(2))))
    assert parts.noise_multiplier == pytest.approx(1.0)
    together = epsilon_of(Repeated(parts, 1000), 1e-5)
    assert together == pytest.approx(1.829, abs=0.002)
    apart = epsilon_of([sampled(0.01, math.sqrt(2), 1000)] * 2, 1e-5)
    assert apart < 0.85 * together


def test_an_adaptive_clip_costs_the_noise_it_was_split_from():
    update, bits = NoisedCounts((), 0.5, share=1 / 256).multipliers(1.0)
    assert bits == pytest.approx(16.0)
    event = PoissonComposed(0.01, (Gaussian(update), Gaussian(bits)))
    assert epsilon_of(Repeated(event, 1000), 1e-5) == pytest.approx(
        epsilon_of(sampled(0.01, 1.0, 1000), 1e-5), rel=1e-6
    )


@given(
    rate=st.sampled_from([0.02, 0.2, 1.0]),
    multiplier=st.floats(0.5, 5.0),
    count=st.integers(1, 50),
)
@settings(max_examples=25, deadline=None)
def test_more_releases_cost_more_and_the_quick_bound_lies_above(rate, multiplier, count):
    fewer, more = sampled(rate, multiplier, count), sampled(rate, multiplier, count + 5)
    cheap = epsilon_of(fewer, 1e-5)
    assert cheap <= epsilon_of(more, 1e-5) * 1.01
    assert cheap <= renyi_epsilon(fewer, 1e-5) * 1.001
    assert cheap <= epsilon_of(Repeated(Gaussian(multiplier), count), 1e-5) * 1.001 + 1e-3


@pytest.mark.parametrize(("rate", "multiplier"), [(0.01, 0.7), (0.3, 2.0), (0.9, 1.0)])
def test_renyi_divergences_equal_those_of_dp_accounting(rate, multiplier):
    orders = (2, 3, 8, 33)
    theirs = RdpAccountant(orders)
    theirs.compose(dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier)), 7)
    ours = renyi_divergences(sampled(rate, multiplier, 7), orders)
    np.testing.assert_allclose(ours, theirs._rdp, rtol=1e-9)


def test_a_curve_falls_and_the_attack_reading_matches_the_gaussian_one():
    points = curve(sampled(0.05, 1.0, 30), (1e-4, 1e-5, 1e-7))
    assert [delta for delta, _ in points] == [1e-4, 1e-5, 1e-7]
    assert points[0][1] < points[1][1] < points[2][1]
    for mu in (0.2, 1.0, 2.5):
        exact = stats.norm.cdf(stats.norm.ppf(0.01) + mu)
        assert exact <= attack_rate(Gaussian(1 / mu)) <= exact * 1.01
    assert 0.01 < attack_rate(sampled(0.01, 1.0, 1000)) < 0.05


@pytest.mark.parametrize("delta", [0.0, 1.0, -1.0, math.nan])
def test_a_delta_that_is_no_probability_is_refused(delta):
    with pytest.raises(ValueError, match="delta"):
        epsilon_of(Gaussian(1.0), delta)


def test_importing_the_accounting_loads_no_heavy_package_and_pricing_neither_torch_nor_flwr():
    code = """
import sys
import common.accounting as accounting
names = ("scipy", "dp_accounting", "prv_accountant", "torch", "flwr")
print([name for name in names if name in sys.modules])
event = accounting.Repeated(accounting.PoissonGaussian(0.1, 1.0), 5)
for accountant in ("pld", "rdp", "prv"):
    accounting.epsilon_of(event, 1e-5, accountant)
print([name for name in ("torch", "flwr") if name in sys.modules])
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.split() == ["[]", "[]"]


def test_nearly_no_noise_lets_an_attacker_find_everybody_and_overflows_nowhere():
    # Whom no coin chose, an eighth of them, nobody finds.
    assert attack_rate(Repeated(PoissonGaussian(0.5, 0.004), 3)) == pytest.approx(7 / 8 + 0.01 / 8, abs=0.01)
