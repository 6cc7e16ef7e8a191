"""What a device needs: measured on a tiny base, so that the measurement itself is right."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from simulations.bench import device

TINY = {"hidden": 32, "layers": 2, "heads": 4, "kv": 2, "inner": 48, "vocabulary": 1000}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return device.make_base(TINY, tmp_path_factory.mktemp("tiny-llama"))


def test_a_base_with_random_weights_is_opened_and_trained_over(base):
    row = device.measure(base, "int8", steps=1)
    assert row["seconds_per_step"] > 0
    assert 0 < row["python"] <= row["imported"] <= row["load_peak"]
    assert row["loaded"] <= row["step_peak"]
    # Queries and values of two layers, rank 8: A of 8 x 32, B of 32 x 8 and 16 x 8.
    assert row["adapter_values"] == 2 * 8 * (32 + 32 + 32 + 16)
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48)
    assert row["parameters"] == linear + 1000 * 32 + 5 * 32


def test_a_grant_plans_the_passes(base):
    assert device.measure(base, "float32", steps=1, megabytes=1e9)["pass_tokens"] == 512


def test_a_process_and_its_children_are_found_with_their_memory_and_time():
    code = "print(flush=True); input()"
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()  # it has memory when it has begun
        assert child.pid in device._family(os.getpid())
        assert device._memory("VmRSS", child.pid) > 1
        assert device._ticks(child.pid) is not None
    finally:
        child.communicate(b"\n")
    assert device._ticks(child.pid) is None


def test_a_home_without_a_device_is_said(tmp_path):
    with pytest.raises(SystemExit, match="no device is up"):
        device.idle(tmp_path, 0.0)
