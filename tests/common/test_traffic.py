"""What a round moves, and updates in float16: the bound holds for the numbers that leave."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.gate import Gate
from common.config import RunConfig
from common.errors import ConfigError, GateRefused
from common.noised_counts import NoisedCounts
from common.privacy import Randomness, clip_rows
from common.traffic import Traffic, check_dtype, fits_float16, traffic_of
from server.aggregation import RunningSum
from server.fleet_runs import for_devices
from server.run_folder import prepare_spec


def planned(tiny_base_folder, **options):
    config = RunConfig(**{"model": str(tiny_base_folder), "cohort": 4, "rounds": 3, "epsilon": 8.0} | options)
    return prepare_spec(for_devices(config), population=8, model=tiny_base_folder)[0]


def test_updates_leave_a_device_in_float16_by_default_and_cost_two_bytes_a_number(tiny_base_folder):
    spec = planned(tiny_base_folder)
    assert spec.dtype == "float16"
    moved = traffic_of(spec)
    assert moved == Traffic(4 * spec.model_dim, 2 * spec.dim, "float16")
    assert "3 kB up (float16)" in replace(moved, up=3000).sentence()
    assert "0.1 s at 384 kbit/s" in replace(moved, up=4800).sentence()
    assert traffic_of(planned(tiny_base_folder, update_dtype="float32")).up == 4 * spec.dim


def test_integers_of_a_secure_sum_are_counted_as_wide_as_they_are(tiny_base_folder):
    spec = planned(tiny_base_folder, noise="distributed", cohort=8)
    assert spec.dtype == "float32"
    moved = traffic_of(spec)
    bits = int(moved.dtype.split()[2])
    assert moved.up * 8 >= spec.dim * bits
    assert moved.up < 4 * 2 * spec.dim


@pytest.mark.parametrize(
    ("change", "fits"),
    [
        ({}, True),
        ({"clip": 1e-5}, False),  # numbers of an update would be where float16 has few digits
        ({"clip": 5e4}, True),
        ({"clip": 7e4}, False),  # one of them alone might overflow
        ({"noise": "local", "clip": 1e3, "noise_multiplier": 4.0}, False),  # noise might
        ({"noise": "local", "noise_multiplier": 4.0}, True),
        ({"noise": "distributed"}, False),
    ],
)
def test_float16_is_taken_where_it_has_room_at_both_ends(release_spec, change, fits):
    assert fits_float16(release_spec(**change)) is fits


@pytest.mark.parametrize("change", [{"clip": 7e4}, {"noise": "local", "clip": 1e3, "noise_multiplier": 4.0}])
def test_float16_that_would_overflow_is_refused_before_a_run_begins(release_spec, change):
    with pytest.raises(ConfigError, match="update_dtype"):
        check_dtype(release_spec(dtype="float16", **change))
    check_dtype(release_spec(dtype="float32", **change))


def test_counts_beside_an_update_stay_in_float32(tiny_base_folder):
    spec = planned(tiny_base_folder)
    assert NoisedCounts.of(spec) is None
    assert spec.dtype == "float16"


def rounded(spec, update):
    return clip_rows(update[np.newaxis], spec.clip, np.dtype(spec.dtype))


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100.0), st.floats(0.1, 1e4))
def test_what_leaves_in_float16_is_within_the_clip_in_float64(release_spec, seed, clip, size):
    spec = release_spec(dtype="float16", clip=clip)
    update = (size * np.random.default_rng(seed).normal(size=6)).astype(np.float32)
    release = Gate().release(rounded(spec, update), spec, 1)
    assert release.total.dtype == np.float16
    exact = release.total.astype(np.float64)
    assert math.sqrt(float(exact @ exact)) <= clip
    total = RunningSum(spec, 1)
    assert total.add(release, 1)
    np.testing.assert_array_equal(total.total, exact)


def test_rounding_that_lengthens_an_update_is_taken_back_before_it_leaves(release_spec):
    """Every number rounds up by nearly half a unit in the last place; the naive cast would be longer than the clip."""
    dim = 4096
    spec = release_spec(names=("a",), shapes=((dim,),), dtype="float16", clip=1.0, recipe={**release_spec().recipe})
    step = 2.0**-16  # of float16 between 2^-6 and 2^-5
    value = 2.0**-6 + 0.51 * step
    update = np.full(dim, value, np.float32)
    clip = float(np.linalg.norm(update.astype(np.float64)))
    spec = replace(spec, clip=clip)
    naive = update.astype(np.float16).astype(np.float64)
    assert math.sqrt(float(naive @ naive)) > clip
    with pytest.raises(GateRefused, match="longer"):
        Gate().release(update.astype(np.float16)[np.newaxis], spec, 1)
    kept = Gate().release(rounded(spec, update), spec, 1).total.astype(np.float64)
    assert math.sqrt(float(kept @ kept)) <= clip
    assert float(kept @ update) / clip**2 > 0.999


def test_a_rounded_update_is_nearly_the_update(release_spec):
    generator = np.random.default_rng(0)
    dim = 100_000
    update = generator.normal(size=dim)
    update /= np.linalg.norm(update)
    sent = clip_rows(update[np.newaxis], 1.0, np.float16)[0].astype(np.float64)
    assert np.linalg.norm(sent - update) < 5e-4


def test_local_noise_in_float16_is_the_noise_that_was_promised(release_spec):
    dim = 8192
    spec = release_spec(
        names=("a",), shapes=((dim,),), dtype="float16", noise="local", noise_multiplier=2.0, sampling_rate=1.0
    )
    release = Gate().release(np.zeros((1, dim), np.float16), spec, 1, Randomness.system())
    assert release.total.dtype == np.float16
    drawn = release.total.astype(np.float64)
    assert abs(drawn.std() / (2.0 * 2.0 * spec.clip) - 1) < 0.05
    assert RunningSum(spec, 1).add(release, 1)
