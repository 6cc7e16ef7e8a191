"""One file is the whole state between rounds: all of it or none of it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from common.errors import DataError
from server.checkpoint import Checkpoint


@pytest.fixture
def checkpoint():
    generator = np.random.default_rng(0)
    vector, velocity = generator.normal(size=(2, 50)).astype(np.float32)
    return Checkpoint(7, vector, velocity, "ab" * 32, "cd" * 32)


def test_a_checkpoint_reads_back_to_the_last_bit(checkpoint, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path)
    read = Checkpoint.load(path)
    assert (read.round, read.head, read.layout) == (7, "ab" * 32, "cd" * 32)
    assert read.vector.tobytes() == checkpoint.vector.tobytes()
    assert read.velocity.tobytes() == checkpoint.velocity.tobytes()


def test_a_write_that_fails_leaves_the_checkpoint_before_it(checkpoint, tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path)
    later = Checkpoint(8, checkpoint.velocity, checkpoint.vector, "00" * 32, "cd" * 32)
    for call in ("fsync", "fdopen"):
        with monkeypatch.context() as patch:

            def fails(*_, **__):
                raise OSError(28, "No space left on device")

            patch.setattr(os, call, fails)
            with pytest.raises(OSError, match="No space left"):
                later.save(path)
        assert Checkpoint.load(path).round == 7
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_a_torn_file_is_no_checkpoint(checkpoint, tmp_path, keep):
    path = tmp_path / "checkpoint.safetensors"
    checkpoint.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match="not a checkpoint"):
        Checkpoint.load(path)


def test_what_is_not_there_is_no_checkpoint(tmp_path):
    with pytest.raises(DataError):
        Checkpoint.load(tmp_path / "absent.safetensors")


def test_a_file_of_other_tensors_is_no_checkpoint(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "checkpoint.safetensors"
    save_file({"vector": np.zeros(3, np.float32)}, path, metadata={"round": "1", "head": "", "layout": ""})
    with pytest.raises(DataError):
        Checkpoint.load(path)
    save_file({"vector": np.zeros(3, np.float32), "velocity": np.zeros(3, np.float32)}, path)
    with pytest.raises(DataError):
        Checkpoint.load(path)
