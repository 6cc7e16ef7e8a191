"""Question by question and user by user: against sums by hand, and what questions of one user may not pretend."""

from __future__ import annotations

import numpy as np
import pytest

from common.query_tests import compare_queries, holm


def frame_of(base, other, users, tokens=None):
    count = len(base)
    numbers = np.array([list(users[:at]).count(user) for at, user in enumerate(users)])
    tokens = np.ones(count, dtype=int) if tokens is None else tokens
    return {
        "user": np.array([*users, *users]),
        "system": np.array(["base"] * count + ["both"] * count),
        "query": np.concatenate([numbers, numbers]),
        "nats": np.concatenate([np.asarray(base) * tokens, np.asarray(other) * tokens]),
        "tokens": np.concatenate([tokens, tokens]),
    }


def test_the_gain_is_the_mean_over_questions_whoever_asked_them():
    users = ["a", "a", "a", "b"]
    frame = frame_of([2.0, 2.0, 2.0, 2.0], [1.0, 1.5, 2.0, 0.0], users, np.array([3, 1, 2, 5]))
    (found,) = compare_queries(frame, [("both", "base")], np.random.default_rng(0))
    assert found.gain.estimate == pytest.approx((1.0 + 0.5 + 0.0 + 2.0) / 4)
    assert (found.queries, found.users) == (4, 2)
    assert found.p_by_query == pytest.approx(2 / 8)  # the zero flips for nothing: 2 of 2^3 patterns are as extreme
    assert found.p_by_user == pytest.approx(2 / 4)


def test_a_pair_that_is_not_there_is_left_out_and_gains_turn_with_the_pair():
    frame = frame_of([2.0, 3.0], [1.0, 1.0], ["a", "b"])
    found = compare_queries(frame, [("both", "base"), ("base", "both"), ("x", "base")], np.random.default_rng(0))
    assert [one.gain.estimate for one in found] == pytest.approx([1.5, -1.5])
    assert found[0].gain.low >= 1.0 - 1e-12
    assert found[0].gain.high <= 2.0 + 1e-12


def test_many_questions_of_few_users_are_no_evidence_about_users():
    """Ten users with a common effect of their own each: by question all is clear, by user it is not."""
    generator = np.random.default_rng(3)
    effects = generator.normal(0.0, 1.0, 10)
    effects += 0.3 - effects.mean()
    users = [str(user) for user in range(10) for _ in range(40)]
    gains = np.repeat(effects, 40) + generator.normal(0.0, 0.1, 400)
    frame = frame_of(np.zeros(400), -gains, users)
    (found,) = compare_queries(frame, [("both", "base")], np.random.default_rng(0))
    assert found.p_by_query < 0.01
    assert found.p_by_user > 0.05
    assert found.gain.low < 0.0 < found.gain.high


def test_holm_is_the_published_correction():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
