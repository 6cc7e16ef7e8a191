"""Tests of budgets and filters: refused before, never exceeded, rebuilt from their entries."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.accounting import (
    Budget,
    Composed,
    Filter,
    Gaussian,
    PoissonGaussian,
    Repeated,
    calibrate,
    epsilon_of,
)
from common.budget import chosen_epsilon
from common.errors import BudgetSpent, VerificationError
from common.privacy import Adjacency


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


# Several runs, each chosen after the others


def test_one_schedule_costs_its_own_price_and_a_second_is_held_by_a_filter():
    first, second = Repeated(Gaussian(6.0), 10), Repeated(PoissonGaussian(0.1, 1.5), 10)
    assert chosen_epsilon([], 1e-5) == 0.0
    assert chosen_epsilon([first], 1e-5) == epsilon_of(first, 1e-5)
    both = chosen_epsilon([first, second], 1e-5)
    assert both == Filter(1e9, 1e-5).after([first, second]).spent_epsilon
    assert both > epsilon_of([first, second], 1e-5)
    assert math.isinf(chosen_epsilon([first, Gaussian(0.0)], 1e-5))
    # Where nothing is sampled, Gaussians that are chosen one after the other cost what they cost together.
    assert chosen_epsilon([first, Gaussian(3.0)], 1e-5) == epsilon_of([first, Gaussian(3.0)], 1e-5)


@given(picks=st.lists(st.sampled_from([2.0, 5.0, 20.0]), min_size=1, max_size=12), limit=st.sampled_from([2.0, 6.0]))
@settings(max_examples=30, deadline=None)
def test_runs_that_are_admitted_one_by_one_stay_within_every_order_of_the_filter_from_the_second_on(picks, limit):
    """The property that Feldman and Zrnic's theorem needs: at some order, the sum is within the bound at all times."""
    held: list[PoissonGaussian] = []
    for z in picks:
        if chosen_epsilon([*held, PoissonGaussian(0.5, z)], 1e-5) <= limit:
            held.append(PoissonGaussian(0.5, z))
    if len(held) > 1:
        assert Filter(limit, 1e-5).after(held).spent_epsilon <= limit
