"""All attacks on one run: what is written, what is tried on which run, and that a liar's run is contradicted."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil

import numpy as np
import pytest

import homespun
import server.rounds
from common.errors import DataError, VerificationError
from simulations.attacks import Effort, attack_run

SMALL = Effort(
    trials=400,
    cohorts=100,
    rounds=2,
    canary_users=30,
    canary_examples=12,
    real_users=4,
    members=12,
    owners=4,
    repeats=2,
    captured=4,
)


@pytest.fixture
def same_noise(same_run, monkeypatch):
    """What the operating system would draw, the same each time: one of ten bounds of 95 % may be above the truth."""
    drawn = itertools.count()
    monkeypatch.setattr(os, "urandom", lambda size: hashlib.shake_256(b"%d" % next(drawn)).digest(size))


def test_a_run_is_attacked_from_every_side_and_the_result_is_written_down(run, same_noise):
    said = []
    report = attack_run(run, effort=SMALL, seed=1, say=said.append)
    assert json.loads((run / "attacks.json").read_text()) == report
    assert report["verdict"] == "holds"
    assert report["code_is_that_of_the_run"]
    names = [(result["name"], result["target"].split(",")[0].split(":")[0]) for result in report["results"]]
    assert len(said) == len(names) == len(set(names)) == 10
    for result in report["results"]:
        assert {"value", "low", "high", "chance", "saturation", "samples", "verdict", "why"} <= result.keys()
    assert b"secret-name" not in (run / "attacks.json").read_bytes()


@pytest.mark.slow
def test_an_auditors_seed_repeats_the_canaries_and_never_the_noise(run):
    one, other = (attack_run(run, effort=SMALL, seed=7)["results"] for _ in range(2))
    private = [name for name in range(len(one)) if "never leave" in one[name]["target"]]
    assert private
    for index in private:
        assert one[index] == other[index]
    assert one[0]["value"] != other[0]["value"]


def test_code_that_halves_the_noise_is_contradicted(run, monkeypatch):
    real = server.rounds.add_central_noise
    monkeypatch.setattr(
        server.rounds, "add_central_noise", lambda total, spec, noise: (total + real(total, spec, noise)) / 2
    )
    report = attack_run(run, effort=SMALL)
    assert report["verdict"] == "contradicted"
    assert "standard deviation" in report["results"][0]["why"]


def test_another_base_than_the_runs_is_not_attacked(run, tmp_path, tiny_base_folder):
    other = tmp_path / "other-base"
    shutil.copytree(tiny_base_folder, other)
    from safetensors.numpy import load_file, save_file

    weights = load_file(other / "model.safetensors")
    name = sorted(weights)[0]
    weights[name] = weights[name] + np.float32(1)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    text = (run / "config.toml").read_text().replace(str(tiny_base_folder), str(other))
    (run / "config.toml").write_text(text)
    with pytest.raises(VerificationError, match="base model"):
        attack_run(run, effort=SMALL)


def test_without_a_whole_run_there_is_nothing_to_attack(run, tmp_path):
    with pytest.raises(DataError, match="no run"):
        attack_run(tmp_path)
    (run / "spec.json").unlink()
    with pytest.raises(DataError, match="spec"):
        attack_run(run)


def test_the_command_ends_with_its_verdict(run, capsys, monkeypatch, same_noise):
    monkeypatch.setattr("simulations.attacks.Effort", lambda **_: SMALL)
    assert homespun.main(["audit", "attack", str(run), "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "verdict: holds" in out
    assert "at most" in out
    assert json.loads((run / "attacks.json").read_text())["seed"] == 3
