"""Preflight on a tiny base: sound code passes, and every sabotage that would make epsilon untrue is refused."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from client import vault as vault_module
from client.base_model import load_base
from client.gate import Gate
from client.packing import pack
from client.preflight import Preflight
from client.trainer import Trainer
from common.config import RunConfig
from common.errors import Refusal
from common.methods import METHODS
from common.privacy import Randomness
from server import rounds
from server.rounds import add_central_noise
from server.run_folder import prepare_spec
from simulations import run

MODES = {
    "central": {},
    "local": {"noise": "local"},
    "silo": {"unit": "example", "example_records": 400, "local_batch": 4},
}


@pytest.fixture
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)


@pytest.fixture
def spec_of(tiny_base_folder, trainer):
    """A function `mode -> release spec` for the tiny base."""

    def make(mode, method="dual", **changes):
        config = RunConfig(model=str(tiny_base_folder), method=method, cohort=20, rounds=3, **MODES[mode])
        spec, _ = prepare_spec(config, population=40, model=tiny_base_folder, digest=trainer.base.digest)
        return replace(spec, **changes)

    return make


def preflight(trainer):
    # looked up when it is called, so that a test can sabotage it
    return Preflight(trainer, central_noise=lambda *given: rounds.add_central_noise(*given))


@pytest.mark.parametrize("mode", MODES)
def test_sound_code_passes_and_says_what_was_tried(trainer, spec_of, mode):
    before = {name: value.clone() for name, value in trainer.base.model.state_dict().items()}
    report = preflight(trainer).check(spec_of(mode))
    names = [name for name, _ in report.checks]
    assert {"layers", "gradients", "per example", "clip", "empty batch", "save and load", "noise"} <= set(names)
    after = trainer.base.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in trainer.base.model.parameters())


@pytest.mark.parametrize("method", sorted(name for name, row in METHODS.items() if row.shared and name != "dual"))
def test_every_method_that_sends_anything_passes(trainer, spec_of, method):
    names = [name for name, _ in preflight(trainer).check(spec_of("central", method)).checks]
    assert {"clip", "whole update", "noise"} <= set(names)


def test_opacus_agrees_where_records_are_the_unit(trainer, spec_of):
    pytest.importorskip("opacus")
    assert "computes the same per-record gradients" in preflight(trainer).check(spec_of("silo")).second_opinion
    assert "not asked" in preflight(trainer).check(spec_of("central")).second_opinion


def test_a_missing_opacus_is_said(trainer, spec_of, monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus", None)
    assert "not installed" in preflight(trainer).check(spec_of("silo")).second_opinion


def test_a_device_says_that_it_cannot_see_the_servers_noise(trainer, spec_of):
    assert "out of this device's sight" in dict(Preflight(trainer).check(spec_of("central")).checks)["noise"]


def test_the_same_question_is_not_tried_twice(trainer, spec_of, monkeypatch):
    tried = preflight(trainer)
    first = tried.check(spec_of("central"))
    monkeypatch.setattr(trainer, "fit", None)
    assert tried.check(spec_of("central", run="f" * 16)) is first


def refused(trainer, spec, check):
    with pytest.raises(Refusal, match=f"preflight, {check}") as caught:
        preflight(trainer).check(spec)
    assert caught.value.code == "preflight"


def weighted(monkeypatch, change):
    """Let every pass count its labels otherwise."""

    def packed(rows, *given):
        own = pack(rows, *given)
        return dataclasses.replace(own, weights=change(own))

    monkeypatch.setattr("client.trainer.pack", packed)


def test_a_batch_mean_loss_is_refused(trainer, spec_of, monkeypatch):
    weighted(monkeypatch, lambda own: own.weights / len(own.counts))
    refused(trainer, spec_of("silo"), "gradients")


def test_a_loss_per_token_of_the_batch_is_refused(trainer, spec_of, monkeypatch):
    weighted(monkeypatch, lambda own: torch.full_like(own.weights, 1 / own.counts.mean()))
    refused(trainer, spec_of("silo"), "gradients")


def test_gradients_that_leak_between_the_rows_of_a_batch_are_refused(trainer, spec_of, monkeypatch):
    def mixed(self, rows, theta):
        apart = real(self, rows, theta)
        return apart + 0.05 * apart.mean(dim=0)

    real = Trainer._apart
    monkeypatch.setattr(Trainer, "_apart", mixed)
    refused(trainer, spec_of("silo"), "gradients")


def test_users_who_share_a_gradient_are_refused(trainer, spec_of, monkeypatch):
    real = Trainer._gradient
    monkeypatch.setattr(Trainer, "_gradient", lambda self, *given: real(self, *given) + real(self, *given).mean(dim=0))
    refused(trainer, spec_of("central"), "per example")


def test_a_dropped_record_clip_is_refused(trainer, spec_of, monkeypatch):
    def unclipped(self, vector, examples, clip_norm, *, trainable=None):
        mask = np.ones(self.layout.size, bool) if trainable is None else trainable
        return (self.example_gradients(vector, examples) * mask).sum(axis=0)

    monkeypatch.setattr(Trainer, "clipped_gradient_sum", unclipped)
    refused(trainer, spec_of("silo"), "clip")


def test_a_clip_per_tensor_is_refused(trainer, spec_of, monkeypatch):
    def per_tensor(self, vector, examples, clip_norm, *, trainable=None):
        total = np.zeros(self.layout.size)
        for part in self.layout.offsets.values():
            gradients = self.example_gradients(vector, examples)[:, part]
            norms = np.linalg.norm(gradients, axis=1)
            total[part] = np.minimum(1.0, clip_norm / np.maximum(norms, 1e-30)) @ gradients
        return total

    monkeypatch.setattr(Trainer, "clipped_gradient_sum", per_tensor)
    refused(trainer, spec_of("silo"), "clip")


def test_a_dropped_update_clip_is_refused(trainer, spec_of, monkeypatch):
    monkeypatch.setattr(vault_module, "clip_rows", lambda rows, _, dtype, origin=0.0: (rows - origin).astype(dtype))
    refused(trainer, spec_of("central"), "whole update")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("factor", [0.5, 0.9, 1.1])
def test_noise_of_another_size_is_refused(trainer, spec_of, monkeypatch, mode, factor):
    real = Randomness.normal
    monkeypatch.setattr(Randomness, "normal", lambda self, size: factor * real(self, size))
    refused(trainer, spec_of(mode), "noise")


def test_noise_that_repeats_is_refused(trainer, spec_of, monkeypatch):
    monkeypatch.setattr(Randomness, "system", classmethod(lambda cls: cls.rehearsal(7)))
    refused(trainer, spec_of("central"), "noise")


def test_noise_with_a_mean_is_refused(trainer, spec_of, monkeypatch):
    def shifted(total, spec, randomness):
        return add_central_noise(total, replace(spec, noise_multiplier=0.99 * spec.noise_multiplier), randomness) + (
            0.12 * spec.noise_multiplier * spec.clip
        )

    monkeypatch.setattr(rounds, "add_central_noise", shifted)
    refused(trainer, spec_of("central"), "noise")


def test_local_noise_that_the_gate_leaves_out_is_refused(trainer, spec_of, monkeypatch):
    real = Gate.release
    monkeypatch.setattr(
        Gate, "release", lambda self, updates, spec, *given: real(self, updates, replace(spec, noise="central"), *given)
    )
    refused(trainer, spec_of("local"), "noise")


def test_random_dropout_is_refused(trainer, spec_of):
    trainer.base.model.train()
    refused(trainer, spec_of("central"), "layers")


def test_a_saved_adapter_that_is_another_is_refused(trainer, spec_of, monkeypatch):
    from client import preflight as module

    real = module.read_peft
    monkeypatch.setattr(module, "read_peft", lambda *given: real(*given) * np.float32(1.01))
    refused(trainer, spec_of("central"), "save and load")


def test_a_run_that_fails_preflight_writes_nothing_and_spends_nothing(tiny_base_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(run, "add_central_noise", lambda *given: given[0])
    config = RunConfig(model=str(tiny_base_folder), users=30, cohort=10, rounds=1, workers=0)
    with pytest.raises(Refusal, match="no budget was spent"):
        run.start(config, tmp_path / "run", run.Progress())
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "home" / "registry").exists()
