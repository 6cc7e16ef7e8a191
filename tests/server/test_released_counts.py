"""Counts of a round as a server reads, publishes and follows them."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace

import numpy as np
import pytest

from common.noised_counts import NoisedCounts
from common.secure_sum import with_secure_sums
from common.wire import ReleaseSpec
from server.released_counts import COUNTS, ReleasedCounts, digest_of, noise_on_sum

SPEC = ReleaseSpec(
    run="0" * 32,
    method="dual",
    names=("a",),
    shapes=((10,),),
    dtype="float32",
    unit="user",
    noise="central",
    clip=2.0,
    noise_multiplier=1.5,
    sampling_rate=0.05,
    rounds=20,
    epsilon="8.0",
    delta=1e-5,
    population=1000,
    recipe={"local_steps": 3, "local_batch": 8},
    model="0" * 64,
    source="0" * 64,
    witnesses=4,
    counts=NoisedCounts(("loss",), 0.5).to_plain(),
)


def test_a_round_is_read_from_its_place_in_the_sum_and_moves_the_clip(tmp_path):
    counts = ReleasedCounts(tmp_path, replace(SPEC, noise_multiplier=0.5))
    unit = 2.0 * math.sqrt(0.02)
    noised = np.concatenate([np.full(10, 7.0), unit * np.array([25.0, 40.0, -20.0]), np.full(4, 9.0)])
    read, scale = counts.read(3, noised, 2.0)
    assert read["round"] == 3
    assert read["clip"] == pytest.approx(2.0 * NoisedCounts(("loss",), 0.5).update_share * 2.0)
    assert read["within"] == pytest.approx(0.75)  # of a cohort of 50
    assert read["measured"] == pytest.approx(40.0)
    assert read["loss"] == pytest.approx(2.0)  # half way below the middle of 0 to 8
    assert scale == pytest.approx(2.0 * math.exp(-0.2 * 0.25))
    counts.keep(read)
    (line,) = (tmp_path / COUNTS).read_bytes().splitlines()
    assert hashlib.sha256(line).hexdigest() == digest_of(read)


def test_a_run_without_counts_publishes_none_and_moves_nothing(tmp_path):
    counts = ReleasedCounts(tmp_path, replace(SPEC, counts=None))
    read, scale = counts.read(1, np.zeros(14), 1.0)
    assert (read, scale) == ({}, 1.0)
    counts.keep(read)
    assert not (tmp_path / COUNTS).exists()


def test_the_noise_on_a_sum_is_that_of_the_mode():
    assert noise_on_sum(SPEC) == 3.0
    assert noise_on_sum(replace(SPEC, noise="local")) == pytest.approx(6.0 * math.sqrt(50))
    summed = with_secure_sums(
        replace(SPEC, noise="distributed"), epsilon=8.0, coordinator_epsilon=None, participation_cap=None
    )
    assert noise_on_sum(summed) >= 2.0 * summed.noise_multiplier > 0
