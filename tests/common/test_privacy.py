"""Tests of the mechanisms: the clip's bound, the generator, and the noise that leaves."""

import copy
import math
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from common.accounting import Gaussian, calibrate, epsilon_of
from common.privacy import (
    Adjacency,
    Bounded,
    Randomness,
    Unit,
    clip_rows,
    discrete_gaussian,
    gaussian_noise,
)

ROOT = Path(__file__).parents[2]
ANY_FLOAT32 = st.floats(width=32, allow_nan=True, allow_infinity=True)
ANY_FLOAT64 = st.floats(allow_nan=True, allow_infinity=True)
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=0, max_side=9)


def exact_norm(row: np.ndarray) -> float:
    """L2 norm by the exactly rounded sum of Python, scaled so that nothing overflows."""
    values = [abs(float(value)) for value in row]
    peak = max(values, default=0.0)
    return 0.0 if peak == 0.0 else peak * math.sqrt(math.fsum((value / peak) ** 2 for value in values))


def naive_clip(row: np.ndarray, clip_norm: float) -> np.ndarray:
    row = row.astype(np.float64)
    if not np.isfinite(row).all():
        return np.zeros_like(row)
    norm = exact_norm(row)
    return row if norm <= clip_norm else row / norm * clip_norm


# The clip


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@given(
    rows=hnp.arrays(np.float32, SHAPES, elements=ANY_FLOAT32) | hnp.arrays(np.float64, SHAPES, elements=ANY_FLOAT64),
    clip_norm=st.floats(1e-12, 1e12),
)
@settings(max_examples=200, deadline=None)
def test_the_norm_after_rounding_never_exceeds_the_clip_norm(dtype, rows, clip_norm):
    clipped = clip_rows(rows, clip_norm, dtype)
    assert clipped.shape == rows.shape
    assert clipped.dtype == dtype
    assert np.isfinite(clipped).all()
    for row in clipped.astype(np.float64):
        assert exact_norm(row) <= clip_norm
        assert np.linalg.norm(row) <= clip_norm
        assert np.linalg.norm(row[::-1]) <= clip_norm


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("dim", [3, 1000, 70_001, 300_000])
def test_the_bound_holds_and_is_used_on_long_rows(dtype, dim):
    rows = np.random.default_rng(dim).standard_normal((5, dim)).astype(np.float32)
    norms = np.linalg.norm(clip_rows(rows, 0.7, dtype).astype(np.float64), axis=1)
    assert (norms <= 0.7).all()
    assert (norms >= 0.7 * (1 - (1e-6 if dtype is np.float32 else 5e-2))).all()


@given(
    rows=hnp.arrays(np.float32, SHAPES, elements=st.floats(-100, 100, width=32)),
    clip_norm=st.floats(1e-3, 1e3),
)
@settings(max_examples=100, deadline=None)
def test_the_clip_equals_a_naive_one_and_is_idempotent(rows, clip_norm):
    clipped = clip_rows(rows, clip_norm)
    expected = [naive_clip(row, clip_norm) for row in rows]
    np.testing.assert_allclose(clipped, np.array(expected).reshape(rows.shape), rtol=1e-5, atol=1e-30)
    np.testing.assert_array_equal(clip_rows(clipped, clip_norm), clipped)


def test_a_row_within_the_bound_is_unchanged():
    rows = np.array([[0.3, -0.4], [0.0, 1e-30]], dtype=np.float32)
    np.testing.assert_array_equal(clip_rows(rows, 1.0), rows)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_non_finite_row_becomes_zeros_and_leaves_the_others_alone(value, dtype):
    rows = np.array([[1.0, 1.0], [value, 1.0], [0.1, 0.2]], dtype=dtype)
    clipped = clip_rows(rows, 10.0)
    np.testing.assert_array_equal(clipped[1], [0.0, 0.0])
    np.testing.assert_allclose(clipped[[0, 2]], rows[[0, 2]], rtol=1e-7)


@pytest.mark.parametrize(
    "row",
    [
        np.full(4, 1e38, dtype=np.float32),
        np.full(4, 1e300),
        np.array([1.7e308, -1.7e308, 1.0, 0.0]),
    ],
)
def test_a_huge_finite_row_is_scaled_exactly_and_not_lost(row):
    clipped = clip_rows(row[np.newaxis], 2.0)[0]
    direction = row / np.abs(row).max()
    np.testing.assert_allclose(clipped, 2.0 * direction / np.linalg.norm(direction), rtol=1e-6, atol=1e-40)


def test_a_tiny_row_is_still_held_by_a_tinier_clip_norm():
    clipped = clip_rows(np.full((1, 4), 1e-30, dtype=np.float32), 1e-35)[0]
    assert 0.9e-35 < exact_norm(clipped) <= 1e-35
    np.testing.assert_array_equal(clip_rows(np.full((1, 4), 1e-200), 1e-210), np.zeros((1, 4)))


def test_a_zero_row_stays_zero_without_a_warning():
    np.testing.assert_array_equal(clip_rows(np.zeros((2, 3), dtype=np.float32), 1.0), np.zeros((2, 3)))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_no_rows_and_no_values_keep_their_shape(shape):
    assert clip_rows(np.zeros(shape, dtype=np.float32), 1.0).shape == shape


@pytest.mark.parametrize(
    "updates",
    [
        np.zeros(3, dtype=np.float32),
        np.zeros((1, 2, 3), dtype=np.float32),
        np.zeros((2, 2), dtype=np.int64),
        np.zeros((2, 2), dtype=np.float16),
        np.zeros((2, 2), dtype=np.complex128),
        np.array([["a"]]),
    ],
)
def test_a_wrong_shape_or_dtype_is_refused(updates):
    with pytest.raises(ValueError, match="updates"):
        clip_rows(updates, 1.0)


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, math.nan, math.inf])
def test_a_clip_norm_that_bounds_nothing_is_refused(clip_norm):
    with pytest.raises(ValueError, match="clip norm"):
        clip_rows(np.zeros((1, 1), dtype=np.float32), clip_norm)


def test_an_output_dtype_without_a_proven_bound_is_refused():
    with pytest.raises(ValueError, match="float32 or float16"):
        clip_rows(np.zeros((1, 1), dtype=np.float32), 1.0, np.int8)


def test_the_input_is_never_written_to():
    rows = np.full((2, 3), 5.0)
    clip_rows(rows, 1.0)
    np.testing.assert_array_equal(rows, np.full((2, 3), 5.0))


@given(
    rows=hnp.arrays(np.float32, (6, 4), elements=ANY_FLOAT32), index=st.integers(0, 5), clip_norm=st.floats(0.01, 50)
)
@settings(max_examples=100, deadline=None)
def test_a_row_is_clipped_without_regard_to_the_other_rows(rows, index, clip_norm):
    alone = clip_rows(rows[index : index + 1], clip_norm)[0]
    np.testing.assert_array_equal(clip_rows(rows, clip_norm)[index], alone)


@given(
    rows=hnp.arrays(np.float32, (6, 4), elements=ANY_FLOAT32),
    other=hnp.arrays(np.float32, (1, 4), elements=ANY_FLOAT32),
    index=st.integers(0, 5),
    clip_norm=st.floats(0.01, 50),
)
@settings(max_examples=200, deadline=None)
def test_removing_one_row_moves_the_sum_by_at_most_the_stated_sensitivity(rows, other, index, clip_norm):
    whole = Bounded.sum_of_rows(rows, clip_norm, Unit.USER)
    removed = Bounded.sum_of_rows(np.delete(rows, index, axis=0), clip_norm, Unit.USER)
    zeroed = rows.copy()
    zeroed[index] = 0.0
    replaced = rows.copy()
    replaced[index] = other[0]
    slack = 1e-12 * clip_norm  # float64 sums of six numbers
    for neighbour, adjacency in (
        (removed, Adjacency.ADD_REMOVE),
        (Bounded.sum_of_rows(zeroed, clip_norm, Unit.USER), Adjacency.ZERO_OUT),
        (Bounded.sum_of_rows(replaced, clip_norm, Unit.USER), Adjacency.REPLACE_ONE),
    ):
        assert np.linalg.norm(whole.value - neighbour.value) <= whole.sensitivity(adjacency) + slack


def test_replacement_doubles_the_sensitivity_and_attains_it():
    one = Bounded.sum_of_rows(np.array([[3.0, 0.0]], dtype=np.float32), 1.5, Unit.USER)
    other = Bounded.sum_of_rows(np.array([[-3.0, 0.0]], dtype=np.float32), 1.5, Unit.USER)
    assert one.sensitivity(Adjacency.ZERO_OUT) == one.sensitivity(Adjacency.ADD_REMOVE) == 1.5
    assert one.sensitivity(Adjacency.REPLACE_ONE) == 3.0
    assert np.linalg.norm(one.value - other.value) == pytest.approx(3.0, rel=1e-6)


@given(
    rows=hnp.arrays(np.float32, SHAPES, elements=ANY_FLOAT32) | hnp.arrays(np.float64, SHAPES, elements=ANY_FLOAT64),
    clip_norm=st.floats(1e-12, 1e12),
    data=st.data(),
)
def test_the_distance_from_an_origin_is_clipped_as_a_row_of_its_own(rows, clip_norm, data):
    origin = data.draw(hnp.arrays(np.float32, rows.shape[1], elements=st.floats(-(2.0**100), 2.0**100, width=32)))
    with np.errstate(all="ignore"):
        wanted = clip_rows(rows.astype(np.float64) - origin, clip_norm)
    found = clip_rows(rows, clip_norm, origin=origin)
    np.testing.assert_array_equal(found, wanted)
    for row in found:
        assert exact_norm(row) <= clip_norm


@pytest.mark.parametrize("clip_norm", [2.0**-140, 1e-38, 1e-27, 2.0**-80, 1e-3, 1.0, 1e30])
@pytest.mark.parametrize("dim", [1, 7, 4096])
def test_rows_that_are_not_looked_at_again_hold_too(clip_norm, dim):
    generator = np.random.default_rng(dim)
    for factor in (1e-3, 0.9999999, 1.0, 1.0000001, 3.0, 1e6):
        rows = generator.normal(0, 1, (40, dim))
        rows *= factor * clip_norm / np.linalg.norm(rows, axis=1, keepdims=True)
        for row in clip_rows(rows, clip_norm):
            assert exact_norm(row) <= clip_norm
    ones = np.ones((1, dim)) * np.nextafter(np.float32(clip_norm / math.sqrt(dim)), np.float32(np.inf))
    assert exact_norm(clip_rows(ones, clip_norm)[0]) <= clip_norm


@pytest.mark.parametrize("origin", [np.zeros(2), np.zeros((1, 3)), np.zeros(3, int), np.array([0.0, np.nan, 0.0])])
def test_an_origin_of_another_kind_is_refused(origin):
    with pytest.raises(ValueError, match="origin"):
        clip_rows(np.zeros((2, 3)), 1.0, origin=origin)


def test_clipping_a_hundred_thousand_values_takes_far_less_than_a_millisecond_per_user():
    rows = np.random.default_rng(0).standard_normal((40, 100_000), dtype=np.float32)
    clip_rows(rows, 1.0)  # touches the memory once
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        clip_rows(rows, 1.0)
        best = min(best, (time.process_time() - start) / len(rows))
    assert best < 3e-3  # 0.2 ms alone; the rest is room for a busy machine


# The generator


def test_system_streams_are_secure_and_never_equal():
    first, second = Randomness.system(), Randomness.system()
    assert first.is_secure
    assert first.child("noise").is_secure
    assert not np.array_equal(first.normal(50), second.normal(50))
    assert first.child("noise").bytes(16) != first.child("noise").bytes(16)


def test_a_rehearsal_repeats_itself_and_is_not_secure():
    first, second = Randomness.rehearsal(7, "round", 3), Randomness.rehearsal(7, "round", 3)
    assert not first.is_secure
    assert not first.child("noise").is_secure
    np.testing.assert_array_equal(first.normal(501), second.normal(501))
    np.testing.assert_array_equal(first.child("a", 1).uniform(9), second.child("a", 1).uniform(9))


def test_a_rehearsal_is_the_same_in_another_process_whatever_its_hash_seed():
    code = "from common.privacy import Randomness; print(Randomness.rehearsal(7, 'x').bytes(16).hex())"
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        found = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment, check=True
        )
        assert found.stdout.strip() == Randomness.rehearsal(7, "x").bytes(16).hex()


def test_labels_that_look_alike_give_different_streams():
    labels = [("a", "b"), ("ab",), ("a", b"b"), (1,), ("1",), (b"1",), (), ("",), (11,), (1, 1), (-1,)]
    streams = {Randomness.rehearsal(0, *label).bytes(16) for label in labels}
    assert len(streams) == len(labels)
    assert Randomness.rehearsal(0).bytes(16) != Randomness.rehearsal(1).bytes(16)
    parent = Randomness.rehearsal(0, "a")
    assert parent.child("b").bytes(16) != Randomness.rehearsal(0, "a", "b").bytes(16)


def test_numpys_and_pythons_seeds_do_not_touch_system_noise():
    drawn = []
    for _ in range(2):
        np.random.seed(42)  # noqa: NPY002
        drawn.append(Randomness.system().normal(20))
    assert not np.array_equal(drawn[0], drawn[1])


@pytest.mark.parametrize("randomness", [Randomness.system(), Randomness.rehearsal(0)])
@pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_stream_is_never_copied_or_pickled(randomness, duplicate):
    with pytest.raises(TypeError, match="not copied"):
        duplicate(randomness)


def test_the_key_is_not_in_the_representation():
    randomness = Randomness.rehearsal(0)
    assert repr(randomness) == "Randomness(rehearsal)"


def _draw(randomness: Randomness, pipe) -> None:
    pipe.send(randomness.bytes(32))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform has no fork")
def test_a_forked_process_does_not_repeat_its_parents_noise():
    context = multiprocessing.get_context("fork")
    randomness = Randomness.system()
    randomness.bytes(5)
    drawn = []
    for _ in range(2):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_draw, args=(randomness, sender))
        child.start()
        drawn.append(receiver.recv())
        child.join()
    drawn.append(randomness.bytes(32))
    assert len(set(drawn)) == 3


def test_uniforms_and_normals_have_their_distribution():
    randomness = Randomness.rehearsal(1)
    uniforms = randomness.uniform(100_000)
    assert 0.0 <= uniforms.min() < uniforms.max() < 1.0
    assert stats.kstest(uniforms, "uniform").pvalue > 1e-4
    normals = randomness.normal((101, 1001))
    assert normals.shape == (101, 1001)
    assert stats.kstest(normals.ravel(), "norm").pvalue > 1e-4
    assert stats.kstest(normals.ravel()[:-1:2] * normals.ravel()[1::2], lambda x: _product_cdf(x)).pvalue > 1e-4


def _product_cdf(x: np.ndarray) -> np.ndarray:
    """Distribution of the product of two independent normals, by simulation with another generator."""
    rng = np.random.default_rng(0)
    sample = np.sort(rng.standard_normal(1_000_000) * rng.standard_normal(1_000_000))
    return np.searchsorted(sample, x) / sample.size


def test_neighbouring_normals_are_independent():
    normals = Randomness.rehearsal(2).normal(200_000)
    for lag in (1, 2, 1 << 15):
        correlation = np.corrcoef(normals[:-lag], normals[lag:])[0, 1]
        squared = np.corrcoef(normals[:-lag] ** 2, normals[lag:] ** 2)[0, 1]
        assert abs(correlation) < 0.015
        assert abs(squared) < 0.015


def test_a_draw_in_two_parts_has_no_overlap():
    randomness = Randomness.rehearsal(3)
    assert not np.intersect1d(randomness.uniform(10_000), randomness.uniform(10_000)).size


@pytest.mark.parametrize("count", [0, 1, 2, 3, 65_535, 65_537])
def test_any_number_of_normals_can_be_drawn(count):
    normals = Randomness.system().normal(count)
    assert normals.shape == (count,)
    assert np.isfinite(normals).all()


def test_a_million_normals_take_a_fraction_of_a_second():
    randomness = Randomness.system()
    best = math.inf
    for _ in range(3):
        start = time.process_time()
        randomness.normal(1_000_000)
        best = min(best, time.process_time() - start)
    assert best < 0.5  # 0.03 s alone


def test_coins_have_their_probability_and_certain_ones_are_certain():
    randomness = Randomness.rehearsal(4)
    assert not randomness.bernoulli(0.0, 1000).any()
    assert randomness.bernoulli(1.0, 1000).all()
    assert randomness.bernoulli(0.3, 100_000).mean() == pytest.approx(0.3, abs=0.006)
    with pytest.raises(ValueError, match="between 0 and 1"):
        randomness.bernoulli(math.nan, 1)


def test_poisson_cohorts_have_binomial_sizes_and_independent_members():
    randomness = Randomness.rehearsal(5)
    trials, count, rate = 4000, 40, 0.1
    chosen = np.zeros((trials, count))
    for trial in range(trials):
        cohort = randomness.poisson_sample(count, rate)
        assert (np.diff(cohort) > 0).all()
        chosen[trial, cohort] = 1.0
    sizes = chosen.sum(axis=1).astype(int)
    expected = stats.binom.pmf(np.arange(count + 1), count, rate) * trials
    kept = expected > 5
    observed = np.bincount(sizes, minlength=count + 1)
    table = np.append(observed[kept], observed[~kept].sum()), np.append(expected[kept], expected[~kept].sum())
    assert stats.chisquare(*table).pvalue > 1e-4
    assert (sizes == 0).any()  # an empty cohort is a cohort
    correlations = np.corrcoef(chosen.T)[np.triu_indices(count, 1)]
    assert np.abs(correlations).max() < 5.5 / math.sqrt(trials)


def test_integers_and_permutations_are_uniform():
    randomness = Randomness.rehearsal(6)
    counts = np.bincount(randomness.integers(7, 70_000), minlength=7)
    assert stats.chisquare(counts).pvalue > 1e-4
    orders = [tuple(randomness.permutation(3)) for _ in range(6000)]
    counts = np.unique(np.array(orders), axis=0, return_counts=True)[1]
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > 1e-4
    chosen = randomness.choice(100, 30)
    assert len(set(chosen.tolist())) == 30
    assert randomness.integers(2**63 - 1, 1000).min() >= 0


# Noise


def test_gaussian_noise_has_the_promised_deviation_and_shape():
    bounded = Bounded(np.zeros(3, dtype=np.float32), 0.5, Unit.USER)
    noise = gaussian_noise(bounded, 3.0, 100_000, Randomness.rehearsal(7), adjacency=Adjacency.REPLACE_ONE)
    assert noise.std() == pytest.approx(3.0, rel=0.01)  # 3 x (2 x 0.5)
    assert stats.kstest(noise / 3.0, "norm").pvalue > 1e-4
    noise = gaussian_noise(bounded, 3.0, 100_000, Randomness.rehearsal(8), adjacency=Adjacency.ZERO_OUT)
    assert noise.std() == pytest.approx(1.5, rel=0.01)
    assert not gaussian_noise(1.0, 0.0, 5, Randomness.system()).any()


def test_a_bounded_value_needs_an_adjacency_and_a_number_has_one():
    bounded = Bounded(np.zeros(1, dtype=np.float32), 1.0, Unit.USER)
    with pytest.raises(ValueError, match="adjacency"):
        gaussian_noise(bounded, 1.0, 1, Randomness.system())
    with pytest.raises(ValueError, match="adjacency"):
        gaussian_noise(1.0, 1.0, 1, Randomness.system(), adjacency=Adjacency.ZERO_OUT)


@pytest.mark.parametrize(
    ("sensitivity", "multiplier"), [(1.0, -1.0), (1.0, math.nan), (1.0, math.inf), (0.0, 1.0), (math.nan, 1.0)]
)
def test_noise_that_means_nothing_is_refused(sensitivity, multiplier):
    with pytest.raises(ValueError, match="finite"):
        gaussian_noise(sensitivity, multiplier, 1, Randomness.system())


@pytest.mark.parametrize("scale", [0.3, 1.0, 2.5, 17.0])
def test_discrete_noise_has_the_discrete_gaussian_distribution(scale):
    draws = discrete_gaussian(scale, 60_000, Randomness.rehearsal(9))
    support = np.arange(-200, 201)
    mass = np.exp(-(support**2) / (2 * scale**2))
    expected = mass / mass.sum() * draws.size
    kept = expected > 8
    observed = np.array([(draws == value).sum() for value in support[kept]])
    rest = draws.size - observed.sum(), expected[~kept].sum()
    assert rest[0] <= rest[1] + 6 * math.sqrt(rest[1] + 1)
    scaled = expected[kept] * observed.sum() / expected[kept].sum()
    assert stats.chisquare(observed, scaled).pvalue > 1e-4
    assert draws.dtype == np.int64


def test_discrete_noise_without_a_scale_is_none_and_a_bad_scale_is_refused():
    assert not discrete_gaussian(0.0, (2, 3), Randomness.system()).any()
    for scale in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="scale"):
            discrete_gaussian(scale, 1, Randomness.system())


def test_the_mechanisms_import_neither_scipy_nor_an_accountant():
    code = (
        "import sys, common.privacy; "
        "print([name for name in ('scipy', 'dp_accounting', 'torch', 'flwr') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"


# The mechanism as a whole: an attacker who knows everything but one canary


def _proven_epsilon(noise_factor: float) -> float:
    """Lower 95 % bound on epsilon at delta 1e-5 from 20,000 runs of clip, sum and noise with and without a canary.

    The noise is calibrated to epsilon 4 and then multiplied by `noise_factor`, as a bug would.
    """
    trials, dim, clip_norm = 20_000, 4, 0.5
    multiplier = calibrate(epsilon=4.0, delta=1e-5, rounds=1)
    randomness = Randomness.rehearsal(11)
    others = np.random.default_rng(0).standard_normal((3, dim)).astype(np.float32)
    canary = np.array([[1e6, 0.0, 0.0, 0.0]], dtype=np.float32)
    scores = []
    for rows in (others, np.concatenate([others, canary])):
        bounded = Bounded.sum_of_rows(rows, clip_norm, Unit.USER)
        noise = gaussian_noise(bounded, multiplier, trials * dim, randomness, adjacency=Adjacency.ZERO_OUT)
        scores.append((bounded.value + noise_factor * noise.reshape(trials, dim))[:, 0])
    without, present = scores
    # A threshold between the two means, and exact intervals on both error rates (Clopper and Pearson, 1934).
    threshold = 0.5 * (without.mean() + present.mean())
    false_positives, true_positives = int((without > threshold).sum()), int((present > threshold).sum())
    highest_false = stats.beta.ppf(0.975, false_positives + 1, trials - false_positives)
    lowest_true = stats.beta.ppf(0.025, true_positives, trials - true_positives + 1)
    return epsilon_of(Gaussian(1.0 / (stats.norm.ppf(lowest_true) - stats.norm.ppf(highest_false))), 1e-5)


def test_no_attack_proves_more_than_the_claim_and_a_good_one_proves_most_of_it():
    assert 3.6 < _proven_epsilon(1.0) < 4.0


def test_an_attack_catches_noise_that_was_halved():
    assert _proven_epsilon(0.5) > 8.0
