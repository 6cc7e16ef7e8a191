"""The running sum takes what an honest node can send and nothing else; the server's step is plain momentum."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.privacy import Randomness
from common.wire import Release, receipt_digest
from server.aggregation import RunningSum, ServerStep

ROUND = 2


def release(spec, total, users=1, receipt=None):
    """A release whose receipt is right, unless another is given."""
    total = np.asarray(total)
    return Release(total, users, receipt or receipt_digest(total, spec, ROUND, users))


def full(value, dtype=np.float32):
    return np.full(6, value, dtype)


def test_releases_add_up_and_users_are_counted(release_spec):
    spec = release_spec()
    total = RunningSum(spec, ROUND)
    assert total.add(release(spec, full(0.1)), 1)
    assert total.add(release(spec, full(0.2, np.float64), users=2), 2)
    np.testing.assert_allclose(total.total, 0.1 + 0.2, atol=1e-8)
    assert (total.users, total.rejected) == (3, {})


@pytest.mark.parametrize(
    ("reason", "make"),
    [
        ("misshapen", lambda spec: release(spec, np.zeros(5, np.float32))),
        ("misshapen", lambda spec: release(spec, np.zeros(7, np.float32))),
        ("misshapen", lambda spec: release(spec, np.zeros((6, 1), np.float32))),
        ("misshapen", lambda spec: release(spec, np.float32(0.0))),
        ("misshapen", lambda spec: release(spec, np.zeros(6, np.float16))),
        ("misshapen", lambda spec: release(spec, np.zeros(6, np.int64))),
        ("misshapen", lambda spec: release(spec, np.zeros(6, np.complex128))),
        ("not-finite", lambda spec: release(spec, full(np.nan))),
        ("not-finite", lambda spec: release(spec, [0, 0, np.inf, 0, 0, 0])),
        ("not-finite", lambda spec: release(spec, [0, 0, -np.inf, np.inf, 0, 0])),
        ("not-finite", lambda spec: release(spec, full(1e300, np.float64))),
        ("too-long", lambda spec: release(spec, full(1e38))),
        ("too-long", lambda spec: release(spec, full(0.5))),
        ("too-long", lambda spec: release(spec, full(-0.5))),
        ("miscounted", lambda spec: release(spec, full(0.1), users=0)),
        ("miscounted", lambda spec: release(spec, full(0.1), users=-1)),
        ("miscounted", lambda spec: release(spec, full(0.1), users=4)),
        ("receipt", lambda spec: release(spec, full(0.1), receipt="0" * 64)),
        ("receipt", lambda spec: release(spec, full(0.2), receipt=receipt_digest(full(0.1), spec, ROUND, 1))),
        ("receipt", lambda spec: release(spec, full(0.1), users=2, receipt=receipt_digest(full(0.1), spec, ROUND, 1))),
        ("receipt", lambda spec: release(spec, full(0.1), receipt=receipt_digest(full(0.1), spec, ROUND - 1, 1))),
    ],
)
def test_what_an_honest_node_cannot_send_is_counted_and_not_added(release_spec, reason, make):
    spec = release_spec()
    total = RunningSum(spec, ROUND)
    total.add(release(spec, full(0.1)), 1)
    before = total.total.tobytes()
    hostile = make(spec)
    assert not total.add(hostile, 3)
    assert total.rejected == {reason: 3}
    assert total.total.tobytes() == before
    assert total.users == 1


def test_a_release_for_another_run_is_not_added(release_spec):
    total = RunningSum(release_spec(), ROUND)
    assert not total.add(release(release_spec(run="00" * 16), full(0.1)), 1)
    assert total.rejected == {"receipt": 1}


def test_a_zero_update_is_added_like_any_other(release_spec):
    spec = release_spec()
    total = RunningSum(spec, ROUND)
    assert total.add(release(spec, full(0.0)), 1)
    assert (total.users, total.total.any()) == (1, False)


def test_no_release_moves_the_sum_by_more_than_its_users_clips(release_spec):
    spec = release_spec(clip=0.25)
    for users in (1, 5, 40):
        longest = np.zeros(6)
        longest[2] = users * 0.25
        assert RunningSum(spec, ROUND).add(release(spec, longest, users=users), users)
        assert not RunningSum(spec, ROUND).add(release(spec, longest * 1.001, users=users), users)


def test_what_devices_noised_themselves_may_be_as_long_as_its_noise(release_spec):
    spec = release_spec(noise="local", noise_multiplier=3.0)
    noise = Randomness.rehearsal(5)
    for users in (1, 9):
        for _ in range(200):
            total = math.sqrt(users) * 2.0 * 3.0 * noise.normal(6)
            assert RunningSum(spec, ROUND).add(release(spec, total, users=users), users)
    assert not RunningSum(spec, ROUND).add(release(spec, full(1e3, np.float64)), 1)


NUMBERS = st.just(0.0) | st.floats(2.0**-30, 2.0**20, width=32) | st.floats(-(2.0**20), -(2.0**-30), width=32)
"""Within 2^80 of each other, as updates under one clip are."""


def exact_sum(parts):
    return [float(sum(map(Fraction, column), Fraction(0))) for column in np.asarray(parts, dtype=np.float64).T]


@given(
    parts=st.lists(st.lists(NUMBERS, min_size=6, max_size=6), min_size=1, max_size=12),
    data=st.data(),
)
def test_the_sum_is_the_exact_one_rounded_once_whoever_comes_first(release_spec, parts, data):
    spec = release_spec(clip=1e9)
    order = data.draw(st.permutations(parts))
    totals = []
    for arrival in (parts, order):
        total = RunningSum(spec, ROUND)
        for part in arrival:
            assert total.add(release(spec, np.array(part, np.float32)), 1)
        totals.append(total.total)
    assert totals[0].tobytes() == totals[1].tobytes()
    np.testing.assert_array_equal(totals[0], exact_sum(parts))


def test_small_updates_are_not_lost_beside_large_ones(release_spec):
    spec = release_spec(clip=1e30)
    for order in itertools.permutations((2.0**60, 1.5, -(2.0**60))):
        total = RunningSum(spec, ROUND)
        for value in order:
            total.add(release(spec, full(value)), 1)
        assert total.total.tolist() == [1.5] * 6


def test_the_servers_step_is_momentum_on_the_mean():
    """Oracle: Reddi et al. (2021), arXiv:2003.00295, algorithm 2 (FedAvgM): v = m v + mean; x = x + rate v."""
    generator = np.random.default_rng(0)
    step = ServerStep(0.5, 0.9)
    vector, velocity = generator.normal(size=6).astype(np.float32), np.zeros(6, np.float32)
    expected, moving = vector.astype(np.float64), np.zeros(6)
    for _ in range(5):
        mean = generator.normal(size=6)
        vector, velocity = step.apply(vector, velocity, mean)
        moving = 0.9 * moving + mean
        expected = expected + 0.5 * moving
    assert vector.dtype == velocity.dtype == np.float32
    np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_the_servers_step_can_be_fedadam():
    """Oracle: Reddi et al. (2021), arXiv:2003.00295, algorithm 2 (FedAdam), with v_{-1} = tau^2."""
    generator = np.random.default_rng(1)
    step = ServerStep(0.05, 0.9, "adam", adaptivity=1e-2)
    vector = generator.normal(size=6).astype(np.float32)
    state, expected, m, v = step.start(6), vector.astype(np.float64), np.zeros(6), np.full(6, 1e-4)
    for _ in range(5):
        mean = generator.normal(size=6)
        vector, state = step.apply(vector, state, mean)
        m = 0.9 * m + 0.1 * mean
        v = 0.99 * v + 0.01 * mean**2
        expected = expected + 0.05 * m / (np.sqrt(v) + 1e-2)
    assert state.shape == (2, 6)
    assert vector.dtype == state.dtype == np.float32
    np.testing.assert_allclose(vector, expected, atol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_fedadam_takes_no_step_that_is_not_finite_either(bad):
    vector, step = np.ones(3, np.float32), ServerStep(1.0, 0.9, "adam")
    after, state = step.apply(vector, step.start(3), np.array([0.0, bad, 0.0]))
    assert after.tobytes() == vector.tobytes()
    assert (state == step.start(3)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e39])
def test_a_step_that_is_not_finite_is_not_taken(bad):
    vector = np.ones(3, np.float32)
    after, velocity = ServerStep(1.0, 0.9).apply(vector, np.ones(3, np.float32), np.array([0.0, bad, 0.0]))
    assert after.tobytes() == vector.tobytes()
    assert not velocity.any()
