"""Tests of events, accountants, calibration, budgets and claims, against published and recomputed numbers."""

import json
import math
import subprocess
import sys
from pathlib import Path

import dp_accounting
import numpy as np
import pytest
import rfc8785
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.accountants import renyi_divergences, renyi_epsilon
from common.accounting import (
    Budget,
    Composed,
    DiscreteGaussian,
    Filter,
    Gaussian,
    PoissonComposed,
    PoissonGaussian,
    Repeated,
    Statement,
    attack_rate,
    calibrate,
    check_claim,
    curve,
    default_delta,
    delta_of,
    epsilon_of,
    equivalent_mu,
    event_from_json,
    group_epsilon,
    make_statement,
)
from common.errors import BudgetSpent, ClaimRefused, VerificationError
from common.privacy import Adjacency, Unit, split_noise

ROOT = Path(__file__).parents[2]

MULTIPLIERS = st.just(0.0) | st.floats(1e-3, 1e3)
RATES = st.floats(1e-6, 1.0)
EVENTS = st.recursive(
    st.builds(Gaussian, MULTIPLIERS)
    | st.builds(PoissonGaussian, RATES, MULTIPLIERS)
    | st.builds(PoissonComposed, RATES, st.lists(st.builds(Gaussian, MULTIPLIERS), min_size=1, max_size=3).map(tuple))
    | st.builds(DiscreteGaussian, st.floats(0.1, 1e3), st.integers(1, 100)),
    lambda inner: (
        st.builds(Repeated, inner, st.integers(1, 10**6))
        | st.builds(Composed, st.lists(inner, min_size=1, max_size=3).map(tuple))
    ),
    max_leaves=4,
)


def sampled(rate: float, multiplier: float, count: int) -> Repeated:
    return Repeated(PoissonGaussian(rate, multiplier), count)


# Events


@given(EVENTS)
@settings(max_examples=150, deadline=None)
def test_every_event_survives_canonical_json(event):
    written = rfc8785.dumps(event.to_json())
    assert event_from_json(json.loads(written)) == event


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "gaussian",
        {},
        {"kind": "gaussian"},
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"kind": ["gaussian"], "noise_multiplier": 1.0},
        {"kind": "dp_accounting.GaussianDpEvent", "noise_multiplier": 1.0},
        {"kind": "gaussian", "noise_multiplier": 1.0, "note": "x"},
        {"kind": "gaussian", "noise_multiplier": "1.0"},
        {"kind": "gaussian", "noise_multiplier": True},
        {"kind": "gaussian", "noise_multiplier": None},
        {"kind": "gaussian", "noise_multiplier": -1.0},
        {"kind": "gaussian", "noise_multiplier": math.nan},
        {"kind": "gaussian", "noise_multiplier": math.inf},
        {"kind": "gaussian", "noise_multiplier": 10**400},
        {"kind": "poisson-gaussian", "sampling_rate": 0.0, "noise_multiplier": 1.0},
        {"kind": "poisson-gaussian", "sampling_rate": 1.1, "noise_multiplier": 1.0},
        {"kind": "poisson-gaussian", "sampling_rate": math.nan, "noise_multiplier": 1.0},
        {"kind": "poisson-composed", "sampling_rate": 0.1, "parts": []},
        {"kind": "poisson-composed", "sampling_rate": 0.1, "parts": "gaussian"},
        {
            "kind": "poisson-composed",
            "sampling_rate": 0.1,
            "parts": [{"kind": "poisson-gaussian", "sampling_rate": 0.1, "noise_multiplier": 1.0}],
        },
        {"kind": "discrete-gaussian", "scale": 1.0, "sensitivity": 1.0},
        {"kind": "discrete-gaussian", "scale": 1.0, "sensitivity": 0},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": 0},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": -3},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": True},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": 1.5},
        {"kind": "repeated", "event": 3, "count": 1},
        {"kind": "composed", "events": []},
        {"kind": "composed", "events": {"kind": "gaussian"}},
    ],
)
def test_an_event_that_is_not_on_the_list_or_not_possible_is_evidence_that_fails(value):
    with pytest.raises(VerificationError):
        event_from_json(value)


def test_deep_nesting_is_refused_and_not_followed():
    value = {"kind": "gaussian", "noise_multiplier": 1.0}
    for _ in range(2000):
        value = {"kind": "repeated", "event": value, "count": 2}
    with pytest.raises(VerificationError, match="deeply"):
        event_from_json(value)


@pytest.mark.parametrize(
    "make", [lambda: Gaussian(-1), lambda: PoissonGaussian(0.0, 1), lambda: Repeated(Gaussian(1), 0)]
)
def test_an_impossible_event_cannot_be_made(make):
    with pytest.raises(ValueError, match="is"):
        make()


# Accountants against the tables of published and recomputed values


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
    update = split_noise(1.0, 8.0)
    event = PoissonComposed(0.01, (Gaussian(update), Gaussian(16.0)))
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


# Calibration


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


# Budgets


def test_a_calibrated_schedule_fits_its_budget_and_every_round_can_be_debited():
    multiplier = calibrate(epsilon=8.0, delta=1e-5, rounds=27, sampling_rate=0.05)
    event = PoissonGaussian(0.05, multiplier)
    budget = Budget(8.0, 1e-5).reserve(Repeated(event, 27))
    for left in range(26, -1, -1):
        budget = budget.debit(event)
        assert budget.reservations[0].rounds_left == left
    assert budget.released_epsilon <= 8.0
    with pytest.raises(BudgetSpent, match="all used"):
        budget.debit(event)
    with pytest.raises(BudgetSpent, match="exceed"):
        budget.reserve(event, "one more")


def test_a_refused_reservation_changes_nothing_and_a_smaller_one_still_fits():
    budget = Budget(2.0, 1e-5)
    assert budget.would_exceed([], Repeated(Gaussian(1.0), 5))
    with pytest.raises(BudgetSpent):
        budget.reserve(Repeated(Gaussian(1.0), 5))
    assert budget == Budget(2.0, 1e-5)
    assert budget.reserve(Gaussian(10.0)).charged_epsilon <= 2.0


def test_another_event_or_run_cannot_be_debited_to_a_reservation():
    budget = Budget(10.0, 1e-5).reserve(Repeated(Gaussian(5.0), 3), "first")
    with pytest.raises(BudgetSpent):
        budget.debit(Gaussian(4.0), "first")
    with pytest.raises(BudgetSpent, match="nothing is reserved"):
        budget.debit(Gaussian(5.0), "second")
    with pytest.raises(ValueError, match="exists"):
        budget.reserve(Gaussian(5.0), "first")


def test_a_new_name_for_a_run_does_not_refill_the_budget():
    budget = Budget(3.0, 1e-5).reserve(Repeated(Gaussian(5.0), 9), "first")
    for _ in range(9):
        budget = budget.debit(Gaussian(5.0), "first")
    budget = budget.close("first")
    with pytest.raises(BudgetSpent):
        budget.reserve(Repeated(Gaussian(5.0), 9), "renamed")


def test_what_released_nothing_gives_its_room_back_and_what_stopped_early_does_not():
    untouched = Budget(3.0, 1e-5).reserve(Repeated(Gaussian(5.0), 9)).close()
    assert untouched.charged == ()
    begun = Budget(3.0, 1e-5).reserve(Repeated(Gaussian(5.0), 9)).debit(Gaussian(5.0)).close()
    assert begun.charged_epsilon == pytest.approx(epsilon_of(Repeated(Gaussian(5.0), 9), 1e-5))
    assert begun.released_epsilon == pytest.approx(epsilon_of(Gaussian(5.0), 1e-5))
    with pytest.raises(BudgetSpent):
        begun.debit(Gaussian(5.0))


def test_a_budget_is_rebuilt_from_its_entries_and_a_forged_debit_is_named():
    event = Gaussian(5.0).to_json()
    entries = [
        {"action": "reserve", "name": "r", "events": [Repeated(Gaussian(5.0), 2).to_json()]},
        {"action": "debit", "name": "r", "event": event},
        {"action": "debit", "name": "r", "event": event},
    ]
    replayed = Budget(3.0, 1e-5).replay(entries)
    assert replayed == Budget(3.0, 1e-5).reserve(Repeated(Gaussian(5.0), 2), "r").debit(Gaussian(5.0), "r").debit(
        Gaussian(5.0), "r"
    )
    for forged in ({"action": "debit", "name": "r", "event": event}, {"action": "refill"}, {}, {"action": "close"}):
        with pytest.raises(VerificationError, match="entry 3") as caught:
            Budget(3.0, 1e-5).replay([*entries, forged])
        assert caught.value.entry == 3


def test_an_infinite_budget_never_refuses():
    assert not Budget(math.inf, 1e-5).would_exceed([], Gaussian(0.0))


def test_a_filter_refuses_before_it_changes_and_never_passes_its_budget():
    held = Filter(4.0, 1e-5)
    event = PoissonGaussian(0.05, 1.0)
    spent = []
    while not held.would_exceed(event):
        held = held.after(event)
        spent.append(event)
    assert held.spent_epsilon <= 4.0
    before = held
    with pytest.raises(BudgetSpent):
        held.after(event)
    assert held == before
    # It may be used on, by something smaller; and it is never cheaper than the price of the fixed schedule.
    assert not held.would_exceed(PoissonGaussian(0.001, 20.0))
    assert epsilon_of(spent, 1e-5) <= held.spent_epsilon
    assert len(spent) > 10


def test_a_filter_refuses_noiseless_releases_and_what_it_cannot_price():
    assert Filter(100.0, 1e-5).would_exceed(Gaussian(0.0))
    with pytest.raises(ValueError, match="replace-one"):
        Filter(1.0, 1e-5, adjacency=Adjacency.REPLACE_ONE).would_exceed(
            Composed((Gaussian(5.0), Repeated(PoissonGaussian(0.1, 5.0), 2)))
        )


@given(st.lists(st.floats(0.5, 20.0), min_size=1, max_size=12))
@settings(max_examples=40, deadline=None)
def test_no_order_of_adaptive_releases_passes_a_filters_budget(multipliers):
    held, spent = Filter(3.0, 1e-5), []
    for multiplier in multipliers:
        if not held.would_exceed(Gaussian(multiplier)):
            held = held.after(Gaussian(multiplier))
            spent.append(Gaussian(multiplier))
    assert epsilon_of(spent, 1e-5) <= 3.0


# Statements


def statement(**changes) -> Statement:
    facts = {
        "delta": 1e-5,
        "unit": Unit.USER,
        "adjacency": Adjacency.ZERO_OUT,
        "mechanism": "L2 clip of the whole update, Gaussian noise on the sum",
        "sampling": "Poisson cohorts at rate 0.01, secret",
        "trust": "the coordinator sees each clipped update without noise: against it epsilon is infinite",
        "population": 4000,
    }
    return make_statement(sampled(0.01, 1.0, 1000), **{**facts, **changes})


def test_a_sentence_holds_everything_a_claim_needs():
    said = statement().sentence()
    for part in (
        "epsilon 1.83 at delta 1e-05",
        "one user",
        "zero-out",
        "Gaussian noise on the sum",
        "Poisson",
        "coordinator",
        "pld (dp-accounting 0.6",
        "Second opinion: epsilon 2.11 by rdp",
        "Does not cover: the private adapter",
        "Mironov 2012",
    ):
        assert part in said
    assert str(statement()) == f"{statement()}" == said


def test_a_statement_cannot_become_a_bare_number():
    made = statement()
    with pytest.raises(TypeError):
        float(made)
    with pytest.raises(TypeError, match="not a number"):
        f"{made:.2f}"
    with pytest.raises(TypeError):
        made + 1


def test_a_rehearsal_an_extrapolation_and_a_run_without_noise_claim_nothing():
    rehearsed = statement(rehearsal=True)
    assert rehearsed.sentence() == "calibrated to epsilon 1.83; rehearsal, not claimed"
    assert not rehearsed.is_claimed
    assert "not claimed" in statement(extrapolated_population=10**6).sentence()
    bare = make_statement(
        Gaussian(0.0),
        delta=1e-5,
        unit=Unit.USER,
        adjacency=Adjacency.ZERO_OUT,
        mechanism="none",
        sampling="none",
        trust="everyone",
        population=10,
    )
    assert bare.sentence().startswith("no privacy claim")
    assert not bare.is_claimed
    assert json.loads(json.dumps(bare.to_json(), allow_nan=False))["epsilon"] == "inf"
    assert statement().is_claimed


def test_a_rounded_epsilon_is_never_below_the_real_one():
    facts = statement().to_json()
    for epsilon, shown in [(1.8201, "1.83"), (8.0, "8.00"), (0.012301, "0.0124"), (0.0, "0"), (2.0000001, "2.01")]:
        assert f"epsilon {shown} at" in Statement.from_json({**facts, "epsilon": epsilon}).sentence()


def test_an_example_level_statement_reads_out_the_user_level_too():
    made = statement(unit=Unit.EXAMPLE, adjacency=Adjacency.ADD_REMOVE, records_per_user=10)
    assert "For a user with 10 records: epsilon 27.9" in made.sentence()
    assert "one record" in made.sentence()


def test_a_statement_survives_json_and_a_changed_one_is_refused():
    made = statement(unit=Unit.EXAMPLE, adjacency=Adjacency.ADD_REMOVE, records_per_user=2)
    written = json.loads(json.dumps(made.to_json()))
    assert Statement.from_json(written) == made
    for name, value in [
        ("epsilon", "low"),
        ("epsilon", -1.0),
        ("epsilon", True),
        ("delta", 2.0),
        ("unit", "tweet"),
        ("adjacency", 3),
        ("covered", "all"),
        ("covered", []),
        ("population", 1.5),
        ("rehearsal", "no"),
        ("second_opinion", [1, 2]),
        ("mechanism", ""),
        ("extra", 1),
    ]:
        with pytest.raises(VerificationError):
            Statement.from_json({**written, name: value})
    del written["trust"]
    with pytest.raises(VerificationError):
        Statement.from_json(written)


# Claims that would not be true


def test_delta_is_far_below_one_over_the_population():
    assert default_delta(1) == default_delta(10_000) == 1e-5
    assert default_delta(1_000_000) == pytest.approx(1e-7)
    for population in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="population"):
            default_delta(population)


CROWD = {
    "unit": Unit.USER,
    "noise": "central",
    "adjacency": Adjacency.ZERO_OUT,
    "sampling": "poisson",
    "sampling_rate": 0.05,
    "delta": 1e-5,
    "population": 4000,
}
SILO = {**CROWD, "unit": Unit.EXAMPLE, "noise": "local", "adjacency": Adjacency.ADD_REMOVE}
LOCAL = {**CROWD, "noise": "local", "adjacency": Adjacency.REPLACE_ONE, "sampling_rate": 1.0, "sampling": "none"}


@pytest.mark.parametrize("facts", [CROWD, SILO, LOCAL])
def test_the_three_modes_may_make_their_claim(facts):
    check_claim(**facts)


@pytest.mark.parametrize(
    ("facts", "change", "reason"),
    [
        (SILO, {"private_state_in_shared_forward": True, "private_state_training": "raw"}, "forward pass"),
        (CROWD, {"sampling": "fixed"}, "not Poisson"),
        (SILO, {"sampling": "shuffled"}, "not Poisson"),
        (CROWD, {"participation_secret": False}, "secret"),
        (CROWD, {"clip_scope": "per-tensor"}, "one norm"),
        (CROWD, {"weights": "examples"}, "uniformly"),
        (SILO, {"loss": "batch-mean"}, "per example"),
        (CROWD, {"metrics": "raw"}, "metrics"),
        (CROWD, {"delta": 1e-4}, "above the rule"),
        (CROWD, {"population": 1_000_000}, "above the rule"),
        (CROWD, {"delta": math.nan}, "above the rule"),
        (CROWD, {"events_per_cohort": 2}, "one event"),
        (SILO, {"public_rate": False}, "sampling rate"),
        (SILO, {"public_steps": False}, "number of steps"),
        (CROWD, {"public_divisor": False}, "who answered"),
        (LOCAL, {"sampling": "poisson", "sampling_rate": 0.1}, "no amplification"),
        (LOCAL, {"adjacency": Adjacency.ZERO_OUT}, "replace-one"),
    ],
)
def test_a_configuration_whose_epsilon_would_be_false_is_refused_with_the_reason(facts, change, reason):
    with pytest.raises(ClaimRefused, match=reason) as caught:
        check_claim(**{**facts, **change})
    assert caught.value.code == "claim-refused"
    assert caught.value.exit_code == 3


def test_what_the_clip_covers_is_not_refused():
    check_claim(**CROWD, private_state_in_shared_forward=True, private_state_training="raw")
    check_claim(**SILO, private_state_in_shared_forward=True, private_state_training="dp")
    check_claim(**{**CROWD, "sampling": "fixed", "sampling_rate": 1.0}, participation_secret=False)
    check_claim(**CROWD, loss="batch-mean", metrics="charged")


def test_every_reason_is_given_at_once():
    with pytest.raises(ClaimRefused) as caught:
        check_claim(**CROWD, weights="examples", metrics="raw", clip_scope="per-tensor")
    assert str(caught.value).count(";") >= 3


# Start-up


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
