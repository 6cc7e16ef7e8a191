"""Attack 15: set every seed there is, fork, run twice: the noise is never the same, and a seeded run claims nothing."""

from __future__ import annotations

import json
import os
import random

import numpy as np
import pytest

from common.privacy import Randomness
from server.rounds import WITNESSES
from server.run_folder import reopen


def noise_of(path):
    return [json.loads(line)["values"] for line in (path / WITNESSES).read_text().splitlines()]


@pytest.mark.parametrize("mode", [{}, {"noise": "local"}], ids=["central", "local"])
def test_attack_15_two_runs_with_every_seed_set_alike_share_no_noise(study, mode):
    import torch

    drawn = []
    for name in ("one", "other"):
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002 - what an attacker would do
        torch.manual_seed(0)
        drawn += noise_of(study.start(name, rounds=2, seed=7, rounds_only=True, cohort=16, **mode))
    values = np.array(drawn)
    assert values.shape == (4, 256)
    assert len(np.unique(values)) == values.size
    assert np.abs(np.corrcoef(values) - np.eye(4)).max() < 0.35


def test_attack_15_silo_updates_of_two_runs_with_one_seed_differ_in_every_number(study):
    host = study.host(unit="example")
    spec = study.spec(host, unit="example")
    one, other = (host.vault.train(study.assignment(spec)).total for _ in range(2))
    assert (one != other).mean() > 0.99


def test_attack_15_forked_workers_do_not_share_noise():
    parent = Randomness.system()
    parent.normal(3)
    seen = []
    for _ in range(2):
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            os.write(writing, parent.normal(4).tobytes())
            os._exit(0)
        os.waitpid(process, 0)
        seen.append(os.read(reading, 32))
        os.close(reading)
        os.close(writing)
    seen.append(parent.normal(4).tobytes())
    assert len(set(seen)) == 3


def test_attack_15_no_key_of_the_noise_is_written_anywhere(study, monkeypatch):
    keys = []
    real = os.urandom

    def keep(count):
        drawn = real(count)
        if count == 32:
            keys.append(drawn)
        return drawn

    monkeypatch.setattr("common.privacy.os.urandom", keep)
    path = study.start(rounds=2, rounds_only=True)
    assert len(keys) >= 4
    written = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    sent = b"".join(study.tap.wire(study.tap.asked + study.tap.answered))
    for key in keys:
        assert key not in written + sent
        assert key.hex().encode() not in written + sent


def test_attack_15_a_seeded_run_repeats_itself_and_says_that_nothing_is_claimed(study):
    paths = [study.start(name, rounds=1, seed=7, rehearsal=True, noise="local") for name in ("one", "other")]
    assert noise_of(paths[0]) == noise_of(paths[1])
    for path in paths:
        opened = reopen(path)
        assert opened.ledger.header["rehearsal"] is True
        opened.ledger.close()
        assert "rehearsal, not claimed" in json.loads((path / "statement.json").read_text())["sentence"]
        assert "not claimed" in (path / "report.html").read_text()
