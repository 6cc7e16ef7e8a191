"""A personal model over time: what it belongs to, what it is fitted on again, and what is taken back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.personalization.lifelong import Belonging, drift_p_value, keep_refit, refit_reason, rehearsal
from common.errors import StoreError

SHARED = np.arange(6, dtype=np.float32)
BASE = "ab" * 32


def test_an_adapter_names_its_base_and_shared_adapter_and_refuses_others():
    own = Belonging.over(BASE, SHARED, run="spring", round=7, records=20)
    own.check(BASE, SHARED.copy())
    with pytest.raises(StoreError, match="another base"):
        own.check("cd" * 32, SHARED)
    with pytest.raises(StoreError, match="round 7"):
        own.check(BASE, SHARED + 1)
    with pytest.raises(StoreError, match="round 7"):
        own.check(BASE, None)
    alone = Belonging.over(BASE, None)
    alone.check(BASE, None)
    with pytest.raises(StoreError):
        alone.check(BASE, SHARED)


def test_what_it_belongs_to_survives_being_written_and_anything_else_is_refused():
    own = Belonging.over(BASE, SHARED, run="spring", round=7, records=20)
    assert Belonging.from_text(own.to_text()) == own
    for text in ("", "{}", "[1]", '{"base": 1}'):
        with pytest.raises(StoreError):
            Belonging.from_text(text)


def test_a_refit_is_due_when_the_base_or_the_shared_adapter_moves_or_records_come_or_drift():
    own = Belonging.over(BASE, SHARED, round=7, records=20)
    now = {"base": BASE, "shared": SHARED, "records": 20}
    assert refit_reason(own, **now) is None
    assert refit_reason(own, **now | {"records": 24}) is None
    assert "5 records" in refit_reason(own, **now | {"records": 25})
    assert "shared" in refit_reason(own, **now | {"shared": SHARED + 1})
    assert "base" in refit_reason(own, **now | {"base": "cd" * 32})
    assert "unlike" in refit_reason(own, **now, drift=0.001)
    assert refit_reason(own, **now, drift=0.2) is None
    assert "none" in refit_reason(None, **now)


@settings(deadline=None)
@given(st.integers(0, 60), st.integers(0, 20), st.integers(0, 40))
def test_the_new_is_trained_on_whole_and_the_old_by_a_sample(count, new, size):
    names = [f"record {number}" for number in range(count)]
    picked = rehearsal(names, new, size)
    older = max(count - new, 0)
    assert picked == sorted(set(picked))
    assert [position for position in picked if position >= older] == list(range(older, count))
    assert sum(position < older for position in picked) == min(size, older)


def test_the_sample_is_uniform_and_one_arrival_changes_one_record_of_it():
    names = [f"record {number}" for number in range(200)]
    before = {names[position] for position in rehearsal(names, 0, 32)}
    after = {names[position] for position in rehearsal([*names, "late"], 0, 32) if position < 200}
    assert len(before - after) <= 1
    counts = np.zeros(100)
    for user in range(2000):
        counts[rehearsal([f"{user}/{number}" for number in range(100)], 0, 10)] += 1
    assert abs(counts[:50].sum() / counts.sum() - 0.5) < 0.02  # neither the oldest nor the newest


def test_a_removed_record_leaves_the_sample_and_moves_no_other_out():
    names = [f"record {number}" for number in range(80)]
    kept = {names[position] for position in rehearsal(names, 0, 16)}
    gone = sorted(kept)[0]
    left = [name for name in names if name != gone]
    now = {left[position] for position in rehearsal(left, 0, 16)}
    assert gone not in now
    assert kept - {gone} <= now


def test_the_drift_test_is_exact_where_all_arrangements_are_known():
    older, newer = np.array([0.9, 0.8, 0.7]), np.array([0.1, 0.2])
    assert drift_p_value(older, newer) == pytest.approx(1 / 10, abs=0.01)  # 1 of the 10 ways to choose two
    assert drift_p_value(newer, older) == pytest.approx(1.0, abs=0.01)
    assert drift_p_value(older, np.zeros(0)) == 1.0


def test_drift_is_cried_seldom_where_there_is_none_and_mostly_where_there_is():
    generator = np.random.default_rng(1)
    false, true = 0, 0
    for _ in range(200):
        older = generator.standard_t(3, 12) * 0.4 + 0.3
        false += drift_p_value(older, generator.standard_t(3, 6) * 0.4 + 0.3) <= 0.05
        true += drift_p_value(older, generator.standard_t(3, 6) * 0.4 - 0.9) <= 0.05
    assert false / 200 <= 0.09  # 0.05 and three standard errors
    assert true / 200 >= 0.7


def test_a_refit_that_is_worse_on_validation_records_is_taken_back():
    tokens = np.array([10, 20])
    before = np.array([20.0, 40.0])
    assert keep_refit(before, before - 3, tokens)
    assert keep_refit(before, before + 0.1, tokens)  # within the tolerance
    assert not keep_refit(before, before + 1.0, tokens)
    assert not keep_refit(before, np.array([np.nan, 1.0]), tokens)
    assert keep_refit(np.array([np.inf, 1.0]), before, tokens)
    assert keep_refit(np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64))
