"""Tests of updates as integers: the bound, the noise and its charge, the modulus, and the way back."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import integrate, linalg, stats

from common.distributed_noise import SMOOTHING, DistributedNoise, poisson_error, rotation, unrotation
from common.errors import ClaimRefused, Refusal
from common.privacy import Randomness, discrete_gaussian

PLACE = b"run 1, round 1"
LEAST_P = 1e-6


def noise_with(**changes) -> DistributedNoise:
    facts = {"dim": 100, "clip_norm": 1.0, "noise_multiplier": 1.0, "fewest_honest": 10, "largest_cohort": 20}
    return DistributedNoise(**facts | changes)


def add_up(noise: DistributedNoise, updates, seed: int) -> np.ndarray:
    total = np.zeros(noise.padded_dim, dtype=np.uint64)
    for at, update in enumerate(updates):
        total += noise.encode(update, PLACE, Randomness.rehearsal(seed, at))
    return (total % 2**noise.bits).astype(np.uint32)


def centred(noise: DistributedNoise, words: np.ndarray) -> np.ndarray:
    values = words.astype(np.int64)
    return np.where(values >= 2 ** (noise.bits - 1), values - 2**noise.bits, values)


# The rotation


@pytest.mark.parametrize("dim", [1, 2, 64, 128, 2048])
def test_the_rotation_is_the_hadamard_matrix_after_signs_and_undoes_itself(dim):
    vector = Randomness.rehearsal(dim).normal(dim)
    turned = rotation(vector, PLACE)
    signs = np.round(rotation(np.ones(dim), PLACE) @ linalg.hadamard(dim) / math.sqrt(dim))
    assert set(signs.tolist()) <= {-1.0, 1.0}
    np.testing.assert_allclose(turned, linalg.hadamard(dim) @ (signs * vector) / math.sqrt(dim), atol=1e-10)
    np.testing.assert_allclose(unrotation(turned, PLACE), vector, atol=1e-10)
    assert np.linalg.norm(turned) == pytest.approx(np.linalg.norm(vector))


def test_the_rotation_spreads_one_large_value_over_all_and_changes_with_the_round():
    vector = np.zeros(1024)
    vector[3] = 1.0
    assert np.abs(rotation(vector, PLACE)).max() == pytest.approx(1 / 32)
    dense = np.ones(1024)
    assert np.abs(rotation(dense, PLACE)).max() < 6 / math.sqrt(1024) * math.sqrt(1024)
    assert (np.abs(rotation(dense, PLACE) - rotation(dense, b"another round")) > 1e-9).mean() > 0.9


def test_only_powers_of_two_are_turned():
    with pytest.raises(ValueError, match="power of two"):
        rotation(np.ones(48), PLACE)


# The bound


@settings(max_examples=150, deadline=None)
@given(
    update=hnp.arrays(np.float32, st.integers(1, 90), elements=st.floats(width=32)),
    clip_norm=st.floats(1e-3, 1e3),
    steps=st.sampled_from([0.0, 1.0, 7.5, 1000.0]),
    seed=st.integers(0, 2**32),
)
def test_no_rounded_update_is_longer_than_the_sensitivity(update, clip_norm, steps, seed):
    noise = noise_with(dim=update.size, clip_norm=clip_norm, steps=steps, noise_multiplier=20.0)
    rounded = noise.quantize(update, PLACE, Randomness.rehearsal(seed))
    assert sum(int(value) ** 2 for value in rounded) <= noise.largest_square
    assert noise.largest_square <= noise.sensitivity**2 * (1 + 1e-12)


class Upwards:
    """Rounds every coordinate up, the negative ones to zero at most, whatever their fraction."""

    def __init__(self):
        self.drawn = 0

    def uniform(self, size):
        self.drawn += 1
        return np.full(size, -1.0)


def test_a_rounding_that_is_always_too_long_ends_towards_zero():
    # With many steps the bound is tight, and rounding every coordinate up by almost one goes beyond it.
    noise = noise_with(dim=64, steps=1000.0, noise_multiplier=0.0)
    steps = np.repeat([126.0001, 123.0001], 32)
    update = unrotation(steps / 1000.0, PLACE).astype(np.float32)
    stubborn = Upwards()
    rounded = noise.quantize(update, PLACE, stubborn)
    assert stubborn.drawn == 40
    assert rounded.tolist() == [126] * 32 + [123] * 32


def test_the_sensitivity_is_kairouz_and_others_bound():
    # Theorem 1 of arXiv:2102.06387 with gamma = 1, beta = exp(-1/2), c = 5120, d = 2^20.
    noise = noise_with(dim=10**6)
    assert noise.steps == 5120
    theirs = min(
        (5120 + 1024) ** 2,
        5120**2 + 2**20 / 4 + math.sqrt(2 * math.log(1 / math.exp(-0.5))) * (5120 + 0.5 * 1024),
    )
    assert noise.largest_square == math.floor(theirs)
    assert noise.inflation == pytest.approx(1.0051, abs=1e-4)


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
def test_zeros_and_what_is_not_finite_become_zeros_and_are_noised_like_all_others(odd):
    noise = noise_with()
    update = np.zeros(100, dtype=np.float32)
    update[7] = odd
    assert not noise.quantize(update, PLACE, Randomness.rehearsal(1)).any()
    assert not noise.quantize(np.zeros(100, dtype=np.float32), PLACE, Randomness.rehearsal(1)).any()
    assert noise.encode(update, PLACE, Randomness.rehearsal(1)).any()


def test_rounding_has_no_bias_and_the_spread_that_is_stated():
    noise = noise_with(dim=128, noise_multiplier=0.0, steps=40.0)
    update = Randomness.rehearsal(8).normal(128).astype(np.float32)
    update /= 2 * np.linalg.norm(update)
    draws = np.stack(
        [noise.decode(add_up(noise, [update], seed), PLACE) - update.astype(np.float64) for seed in range(400)]
    )
    assert np.abs(draws.mean(axis=0)).max() < 6 * noise.rounding_deviation(1) / math.sqrt(400)
    assert draws.std() < noise.rounding_deviation(1)
    assert draws.std() > 0.5 * noise.rounding_deviation(1)


# The noise and its charge


def discrete_mass(scale: float, reach: int) -> np.ndarray:
    """Exact probabilities of the discrete Gaussian from -reach to reach."""
    points = np.arange(-reach, reach + 1, dtype=np.float64)
    mass = np.exp(-(points**2) / (2 * scale**2))
    return mass / mass.sum()


@pytest.mark.parametrize("scale", [0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("shares", [2, 3, 6])
def test_a_sum_of_discrete_gaussians_is_as_close_to_one_as_stated(scale, shares):
    reach = 60
    one = discrete_mass(scale, reach)
    total = one
    for _ in range(shares - 1):
        total = np.convolve(total, one)
    middle = total.size // 2
    ratio = np.log(
        total[middle - 8 : middle + 9] / discrete_mass(scale * math.sqrt(shares), middle)[middle - 8 : middle + 9]
    )
    errors = [poisson_error(scale * math.sqrt(count / (count + 1))) for count in range(1, shares)]
    bound = sum(math.log((1 + error) / (1 - error)) for error in errors)
    assert np.abs(ratio).max() <= bound
    assert np.abs(ratio).max() > 0.1 * bound or shares > 2  # and the bound is not idle


@pytest.mark.parametrize("smoothing", [0.5, 0.6, 0.8])
def test_a_discrete_gaussian_is_nearly_a_rounded_continuous_one(smoothing):
    scale = 1.5
    exact = discrete_mass(scale, 40)[40:46]

    def rounded_to(point: int, continuous: float) -> float:
        """Chance that the randomized rounding of a continuous Gaussian ends at `point`."""

        def density(y: float) -> float:
            grid = np.arange(math.floor(y) - 12, math.floor(y) + 13)
            weights = np.exp(-((grid - y) ** 2) / (2 * smoothing**2))
            chosen = math.exp(-((point - y) ** 2) / (2 * smoothing**2)) / weights.sum()
            return chosen * math.exp(-(y**2) / (2 * continuous**2)) / (continuous * math.sqrt(2 * math.pi))

        return integrate.quad(density, -12, 12, limit=400, epsabs=1e-13)[0]

    def furthest(continuous: float) -> float:
        return max(abs(math.log(rounded_to(point, continuous) / exact[point])) for point in range(6))

    error = poisson_error(smoothing)
    bound = math.log((1 + error) / (1 - error))
    assert furthest(math.sqrt(scale**2 - smoothing**2)) <= bound + 1e-9
    # Rounding one that was not made narrower first is not within it: the variance of the rounding has to be given up.
    assert furthest(scale) > bound


@pytest.mark.parametrize("width", [0.3, 0.5, 1.0])
def test_a_sum_over_shifted_integers_is_as_constant_as_stated(width):
    grid = np.arange(-60, 61)
    for shift in np.linspace(0, 1, 21):
        total = np.exp(-((grid + shift) ** 2) / (2 * width**2)).sum() / (width * math.sqrt(2 * math.pi))
        assert abs(total - 1) <= poisson_error(width) + 1e-14


@pytest.mark.parametrize("multiplier", [0.3, 1.0, 7.0])
@pytest.mark.parametrize("fewest", [1, 2, 57])
def test_the_charge_is_what_the_fewest_honest_shares_add_up_to(multiplier, fewest):
    noise = noise_with(noise_multiplier=multiplier, fewest_honest=fewest, largest_cohort=100)
    variance = fewest * noise.share_scale**2 - SMOOTHING**2
    assert math.sqrt(variance) / noise.sensitivity == pytest.approx(multiplier)
    assert noise.multiplier_with(fewest) == pytest.approx(multiplier)
    assert noise.multiplier_with(100) > noise.multiplier_with(fewest) or fewest == 100
    assert noise.closeness <= 1e-9


def test_the_small_term_is_below_that_of_kairouz_and_others():
    noise = noise_with(noise_multiplier=0.25, fewest_honest=20, steps=40.0)
    tau = 10 * sum(math.exp(-2 * math.pi**2 * noise.share_scale**2 * k / (k + 1)) for k in range(1, 20))
    # theirs bounds the sum of shares alone; ours has the rounding of the continuous Gaussian too
    ours = noise.closeness / noise.padded_dim - 2 * math.atanh(poisson_error(SMOOTHING))
    assert noise.closeness > 0
    assert ours <= tau


def test_noise_that_is_too_fine_for_its_charge_is_refused():
    with pytest.raises(ValueError, match="too fine"):
        noise_with(noise_multiplier=0.05, steps=5.0, fewest_honest=20)


@pytest.mark.parametrize("survivors", [10, 14, 20])
def test_noise_in_the_sum_has_the_variance_and_the_shape_that_are_charged(survivors):
    noise = noise_with(dim=1 << 14, noise_multiplier=1.0)
    total = add_up(noise, [np.zeros(1 << 14, dtype=np.float32)] * survivors, survivors)
    values = centred(noise, total).astype(np.float64)
    scale = math.sqrt(survivors) * noise.share_scale
    # Variance within six standard deviations of a chi-square, and never below what the fewest would have.
    assert abs((values**2).mean() / scale**2 - 1) < 6 * math.sqrt(2 / values.size)
    assert scale >= noise.noise_multiplier * noise.sensitivity
    standardized = values / scale
    assert stats.kstest(standardized, "norm").pvalue > LEAST_P
    assert abs((standardized**4).mean() - 3) < 6 * math.sqrt(96 / values.size)
    for edge in (2.0, 3.0):
        expected = 2 * stats.norm.sf(edge)
        assert stats.binomtest(int((np.abs(standardized) > edge).sum()), values.size, expected).pvalue > LEAST_P
    decoded = noise.decode(total, PLACE)
    assert decoded.std() == pytest.approx(noise.standard_deviation(survivors), rel=0.04)


def test_every_device_brings_noise_of_its_own():
    noise = noise_with(dim=1 << 12)
    zeros = np.zeros(1 << 12, dtype=np.float32)
    one, two = (centred(noise, noise.encode(zeros, PLACE, Randomness.system())) for _ in range(2))
    assert abs(np.corrcoef(one, two)[0, 1]) < 6 / 64
    assert (one == two).mean() < 0.05


def noise_levels(noise, survivors: int, filled: bool, seed: int) -> float:
    """The mean square of the noise that whoever sees the sum measures over its coordinates."""
    values = np.zeros(noise.padded_dim, dtype=np.int64)
    for at in range(survivors):
        values += discrete_gaussian(noise.share_scale, noise.padded_dim, Randomness.rehearsal(seed, at))
    if filled:
        values += centred(noise, noise.top_up(survivors, Randomness.rehearsal(seed, "coordinator")))
    return float((values.astype(np.float64) ** 2).mean()) / noise.share_scale**2


def test_without_filling_up_the_noise_level_tells_how_many_took_part():
    noise = noise_with(dim=1 << 15)
    spread = math.sqrt(2 / noise.padded_dim)
    for survivors in (10, 11):
        assert abs(noise_levels(noise, survivors, False, survivors) / survivors - 1) < 6 * spread
    assert 11 * spread < 1 / 11  # so one device more or less is seen


def test_filled_up_noise_has_one_level_for_every_number_of_survivors():
    noise = noise_with(dim=1 << 15)
    spread = math.sqrt(2 / noise.padded_dim)
    for survivors in (0, 10, 11, 20):
        assert abs(noise_levels(noise, survivors, True, survivors) / 20 - 1) < 6 * spread
    with pytest.raises(ValueError, match="no more devices survive"):
        noise.top_up(21, Randomness.rehearsal(1))


def test_the_noise_is_filled_up_to_any_level_above_that_of_the_shares():
    noise = noise_with(dim=1 << 15, level=5000.0)
    for survivors in (0, 11, 20):
        assert noise.top_up_scale(survivors) ** 2 + survivors * noise.share_scale**2 == pytest.approx(5000.0**2)
        level = noise_levels(noise, survivors, True, survivors) * noise.share_scale**2 / 5000.0**2
        assert abs(level - 1) < 6 * math.sqrt(2 / noise.padded_dim)
    with pytest.raises(ValueError, match="below that of the shares"):
        noise_with(level=math.sqrt(19) * noise_with().share_scale).top_up(20, Randomness.rehearsal(1))


def test_noise_that_was_lost_or_halved_on_its_way_is_not_released(monkeypatch):
    noise = noise_with(dim=1 << 12)
    update = np.zeros(1 << 12, dtype=np.float32)
    for factor in (0.0, 0.5):
        monkeypatch.setattr(
            "common.distributed_noise.discrete_gaussian",
            lambda scale, size, randomness, factor=factor: discrete_gaussian(factor * scale, size, randomness),
        )
        with pytest.raises(ClaimRefused, match="spread"):
            noise.encode(update, PLACE, Randomness.rehearsal(1))
        with pytest.raises(ClaimRefused, match="spread"):
            noise.top_up(3, Randomness.rehearsal(1))


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"corrupt": Fraction(1, 5)}, "few-honest"),
        ({"threshold": Fraction(3, 5)}, "few-honest"),
        ({"bits": 16}, "bad-message"),
        ({"dim": 64}, "bad-message"),
        ({"largest_cohort": 31}, "bad-message"),
    ],
)
def test_terms_for_which_the_noise_is_not_enough_are_refused(terms_with, change, code):
    facts = {"smallest_cohort": 20, "largest_cohort": 30, "dim": 128}
    noise = noise_with(fewest_honest=terms_with(**facts).fewest_honest, largest_cohort=30)
    noise.check(terms_with(**facts, bits=noise.bits), 20)
    with pytest.raises(Refusal) as refusal:
        noise.check(terms_with(**{"bits": noise.bits} | facts | change), 20)
    assert refusal.value.code == code


# The modulus and the way back


@pytest.mark.parametrize("cohort", [3, 20, 100])
@pytest.mark.parametrize("multiplier", [0.0, 0.5, 4.0])
def test_no_coordinate_wraps_around_even_if_all_updates_are_alike(cohort, multiplier):
    noise = noise_with(dim=1 << 10, noise_multiplier=multiplier, fewest_honest=2, largest_cohort=cohort)
    update = Randomness.rehearsal(3).normal(1 << 10).astype(np.float32)
    exact = np.zeros(1 << 10, dtype=np.int64)
    for at in range(cohort):
        exact += noise.quantize(update, PLACE, Randomness.rehearsal(at, "rounding"))
        exact += discrete_gaussian(noise.share_scale, 1 << 10, Randomness.rehearsal(at, "noise"))
    assert np.abs(exact).max() < 2 ** (noise.bits - 1)
    # And the modulus is not wider than it must be: within three bits of what was reached.
    assert np.abs(exact).max() > 2 ** (noise.bits - 1) / 16


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 20), seed=st.integers(0, 2**32), clip_norm=st.sampled_from([0.01, 1.0, 50.0]))
def test_the_decoded_sum_is_that_of_the_clipped_updates_but_for_rounding(count, seed, clip_norm):
    noise = noise_with(clip_norm=clip_norm, noise_multiplier=0.0, steps=2.0**16)
    updates = Randomness.rehearsal(seed).normal((count, 100)).astype(np.float32) * np.float32(clip_norm)
    norms = np.linalg.norm(updates.astype(np.float64), axis=1, keepdims=True)
    clipped = updates * np.minimum(1.0, clip_norm / norms)
    decoded = noise.decode(add_up(noise, updates, seed), PLACE)
    # Each device's rounding is off by less than one step in each of 128 coordinates, before the rotation.
    assert np.linalg.norm(decoded - clipped.sum(axis=0)) <= count * math.sqrt(128) * noise.step * 1.01


def test_a_million_values_fit_the_upload_that_is_allowed():
    noise = noise_with(dim=10**6, fewest_honest=57, largest_cohort=100)
    assert noise.padded_dim == 1 << 20
    assert noise.bits == 17
    assert noise.padded_dim * noise.bits / 8 < 2.5e6


@pytest.mark.parametrize(
    "change",
    [
        {"dim": 0},
        {"clip_norm": 0.0},
        {"clip_norm": math.nan},
        {"noise_multiplier": -1.0},
        {"noise_multiplier": math.inf},
        {"fewest_honest": 0},
        {"fewest_honest": 21},
        {"steps": 0.5},
        {"steps": 2.0**25},
        {"noise_multiplier": 1e6, "steps": 1e6},
    ],
)
def test_numbers_that_no_sum_can_have_are_refused(change):
    with pytest.raises(ValueError, match=r"."):
        noise_with(**change)


def test_a_vector_of_another_dimension_is_refused():
    noise = noise_with()
    with pytest.raises(ValueError, match="dimension"):
        noise.quantize(np.zeros(99, dtype=np.float32), PLACE, Randomness.rehearsal(1))
    with pytest.raises(ValueError, match="dimension"):
        noise.decode(np.zeros(100, dtype=np.uint32), PLACE)
