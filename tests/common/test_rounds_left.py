"""Rounds and weeks that a budget has left: against counting one by one, and against what the rounds really cost."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.accounting import PoissonGaussian, Repeated, epsilon_of
from common.rounds_left import pace_of, rounds_left, weeks_left


@given(most=st.integers(0, 3000), known=st.integers(0, 3000), limit=st.integers(1, 2500))
def test_as_many_are_left_as_fit_to_within_a_hundredth_and_never_more(most, known, limit):
    known = min(known, most)
    found = rounds_left(lambda count: count <= most, limit=limit, known=known)
    wanted = min(most, limit)
    assert wanted - wanted // 50 - 1 <= found <= wanted
    assert found == wanted or wanted > 100


def test_what_is_left_stays_within_the_budget_and_one_more_does_not():
    event, spent = PoissonGaussian(0.05, 1.0), Repeated(PoissonGaussian(0.05, 1.0), 10)

    def cost(count):
        return epsilon_of((spent, Repeated(event, count)), 1e-5)

    rounds = rounds_left(lambda count: cost(count) <= 2.0, limit=10**6)
    assert cost(rounds) <= 2.0 < cost(rounds + 1)
    assert rounds_left(lambda count: cost(count) <= 2.0, limit=10**6, known=rounds) == rounds


def test_a_budget_without_an_end_has_as_many_as_are_looked_for():
    assert rounds_left(lambda count: True, limit=4096) == 4096
    assert rounds_left(lambda count: False, limit=4096) == 0


def test_a_pace_turns_rounds_into_weeks():
    assert pace_of(["2026-01-01T00:00:00Z", "2026-01-03T00:00:00Z", "2026-01-08T00:00:00Z"]) == pytest.approx(2.0)
    assert pace_of(["2026-01-01T00:00:00Z"]) is None
    assert pace_of([]) is None
    assert pace_of(["2026-01-01T00:00:00Z"] * 2) is None
    assert weeks_left(14, 7.0) == 2.0
    assert weeks_left(14, None) is None


@pytest.mark.parametrize("pace", [0.0, -1.0, math.inf, math.nan])
def test_a_pace_is_a_positive_number(pace):
    with pytest.raises(ValueError, match="rounds per week"):
        weeks_left(3, pace)
