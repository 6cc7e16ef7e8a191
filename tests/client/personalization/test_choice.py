"""The choice: what it rests on, and how often it errs where nothing is better."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from client.personalization.choice import PRIOR_RECORDS, PRIOR_SPREAD, WEIGHTS, choose

NAMES = ("base", "global", "both")


def naive_bound(reference, candidate, tokens, share, confidence, spread=PRIOR_SPREAD):
    gain = sum(r - c for r, c in zip(reference, candidate, strict=True)) / sum(tokens)
    squares = sum((r - c - gain * t) ** 2 / t for r, c, t in zip(reference, candidate, tokens, strict=True))
    freedom = PRIOR_RECORDS + len(tokens) - 1
    variance = (PRIOR_RECORDS * spread**2 + squares) / freedom
    return gain - stats.t.ppf(1 - (1 - confidence) * share, freedom) * np.sqrt(variance / sum(tokens))


def test_the_bounds_are_the_formula_s():
    nats = np.array([[9.0, 7.0, 30.0], [8.0, 6.0, 24.0], [2.0, 3.0, 8.0]])
    tokens = np.array([4, 3, 12])
    choice = choose(NAMES, nats, tokens, confidence=0.9)
    for index, share in ((0, 1 / 3), (2, WEIGHTS["both"] / 3)):
        expected = naive_bound(nats[1], nats[index], tokens, share, confidence=0.9)
        assert choice.lower_bounds[index] == pytest.approx(expected)
    assert choice.gains[2] == pytest.approx((38 - 13) / 19)
    assert choice.system == "both"
    assert choice.records == 3


def test_what_is_surely_better_is_used_and_what_may_be_chance_is_not():
    tokens = np.full(20, 10)
    reference = np.full(20, 20.0)
    noise = np.random.default_rng(0).normal(0, 2, 20)
    clear = choose(("global", "both"), np.stack([reference, reference - 6 + noise]), tokens)
    slight = choose(("global", "both"), np.stack([reference, reference - 0.3 + noise]), tokens)
    assert (clear.system, slight.system) == ("both", "global")


def test_one_record_is_little_evidence_and_none_is_none():
    one = choose(("global", "both"), np.array([[20.0], [17.0]]), np.array([10]))
    none = choose(("global", "both"), np.zeros((2, 0)), np.zeros(0, dtype=np.int64))
    assert (one.system, none.system) == ("global", "global")


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_more_candidates_ask_for_more_evidence(seed, records):
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 20, records)
    nats = generator.gamma(2.0, size=(3, records)) * tokens
    few = choose(("global", "a"), nats[:2], tokens)
    many = choose(("global", "a", "b"), nats, tokens)
    assert many.lower_bounds[1] < few.lower_bounds[1]


def test_what_is_not_finite_is_never_chosen():
    nats = np.array([[9.0, 9.0, 9.0], [-np.inf, 1.0, 1.0], [np.nan, 1.0, 1.0]])
    assert choose(("global", "a", "b"), nats, np.array([5, 5, 5])).system == "global"


def test_a_mixture_at_half_strength_is_judged_by_half_the_guess():
    tokens = np.array([4, 3, 12])
    nats = np.array([[8.0, 6.0, 24.0], [6.0, 5.0, 20.0], [6.0, 5.0, 20.0]])
    choice = choose(("global", "both@1/0.5", "both@1/1.5"), nats, tokens, confidence=0.9)
    assert choice.lower_bounds[1] == pytest.approx(naive_bound(nats[0], nats[1], tokens, 0.5, 0.9, PRIOR_SPREAD / 2))
    assert choice.lower_bounds[2] == pytest.approx(naive_bound(nats[0], nats[2], tokens, 0.5, 0.9))
    assert choice.lower_bounds[1] > choice.lower_bounds[2]


def test_what_usually_helps_pays_less_for_the_company_of_others():
    tokens = np.full(4, 10)
    nats = np.stack([np.full(4, 20.0), *[np.full(4, 17.0)] * 8])
    names = ("global", "both+retrieval", *"abcdefg")
    bounds = choose(names, nats, tokens).lower_bounds
    alone = choose(names[:2], nats[:2], tokens).lower_bounds[1]
    assert bounds[2] < bounds[1] < alone
    doubt = [0.05 * weight / 13 for weight in (6, 1)]
    assert sum(doubt[:1]) + 7 * doubt[1] == pytest.approx(0.05)  # all bounds hold at once


@pytest.mark.parametrize("spread", [0.3, 0.8])
def test_where_no_candidate_is_better_few_users_leave_the_reference(spread):
    """Of 3,000 users with 1 to 12 records and 6 candidates that differ by chance, at most 5 % switch."""
    generator = np.random.default_rng(3)
    names = ("global", "both", "both+retrieval", *"cdef")
    switched = 0
    for _ in range(3000):
        tokens = generator.integers(2, 25, generator.integers(1, 13))
        gains = generator.normal(0, spread * np.sqrt(tokens), size=(6, len(tokens)))
        nats = np.concatenate([np.zeros((1, len(tokens))), -gains]) + 3.0 * tokens
        switched += choose(names, nats, tokens).system != "global"
    assert switched / 3000 <= 0.05


def test_shapes_and_the_reference_are_checked():
    with pytest.raises(ValueError, match="reference"):
        choose(("a", "b"), np.zeros((2, 1)), np.array([1]))
    with pytest.raises(ValueError, match="one row"):
        choose(NAMES, np.zeros((2, 1)), np.array([1]))
