"""Attack 28: is the clip over everything that is sent, or per tensor? Is the mean of products the product of means?"""

from __future__ import annotations

import numpy as np
import pytest

from client.gate import Gate
from client.trainer import Trainer
from common.errors import GateRefused
from common.methods import METHODS


def test_attack_28_the_clip_is_one_norm_over_all_tensors_that_leave(study, monkeypatch):
    """Eight tensors, each at the clip: clipped by themselves they would be 2.8 clips together."""
    host = study.host()
    spec = study.spec(host)
    layout = host.trainer.layout
    each = np.zeros(layout.size, np.float32)
    for tensor in layout.tensors:
        each[layout.offsets[tensor.name].start] = spec.clip
    assert np.linalg.norm(each) == pytest.approx(np.sqrt(len(layout.tensors)) * spec.clip)
    assignment = study.assignment(spec)
    monkeypatch.setattr(Trainer, "fit", lambda *_, **__: (assignment.vector + each)[None])
    sent = host.vault.train(assignment).total[: spec.model_dim].astype(np.float64)
    assert np.linalg.norm(sent) <= spec.clip
    assert np.linalg.norm(sent) == pytest.approx(spec.clip, rel=1e-6)
    # In proportion: no tensor is favoured by a clip of its own.
    np.testing.assert_allclose(sent, each * (spec.clip / np.linalg.norm(each)), atol=1e-6)
    with pytest.raises(GateRefused, match="longer than the clip"):
        Gate().release(each[None], spec, 1)


def test_attack_28_a_silos_record_is_clipped_over_all_tensors(study, monkeypatch):
    host = study.host(unit="example")
    trainer = host.trainer
    large = np.full((1, trainer.layout.size), 7.0)
    monkeypatch.setattr(Trainer, "example_gradients", lambda *_: large)
    record = host.population.encoded("4").train[:1]
    total = trainer.clipped_gradient_sum(np.zeros(trainer.layout.size, np.float32), record, 0.5)
    assert np.linalg.norm(total) == pytest.approx(0.5)
    assert np.linalg.norm(total) <= 0.5


@pytest.mark.parametrize("method", [row for row in METHODS.values() if row.shared])
def test_attack_28_methods_that_average_both_factors_say_what_that_does_to_noise(method):
    """Mean of B times mean of A is not the mean of BA; a method that shares both says that noise enters squared."""
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 2, 8)), generator.normal(size=(2, 8, 2))
    apart = np.mean([two @ one for one, two in zip(a, b, strict=True)], axis=0)
    assert np.abs(b.mean(axis=0) @ a.mean(axis=0) - apart).max() > 0.1
    assert ("quadratic" in method.noise) == (method.sends in ("A and B", "lower layers"))


def test_attack_28_what_is_averaged_is_exactly_the_vector_that_was_clipped(study):
    """The server averages factors as one vector, and never a product that nobody clipped."""
    from server.checkpoint import Checkpoint

    path = study.start(rounds=1, cohort=20, chunk=1, epsilon=float("inf"), rounds_only=True)
    pairs = list(study.tap.train())
    moved = Checkpoint.load(path / "checkpoint.safetensors").vector - pairs[0][0].vector
    mean = sum(release.total.astype(np.float64) for _, release in pairs) / 20
    np.testing.assert_allclose(moved, mean, atol=1e-7)
