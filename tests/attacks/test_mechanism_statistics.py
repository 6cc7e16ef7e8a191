"""Statistics of the mechanism that ships, on the very vector that leaves: spread, shape, what an attacker proves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from client.gate import Gate
from common.accounting import epsilon_of
from common.privacy import Randomness, clip_rows
from common.promise import promise_of
from server import rounds
from server.aggregation import RunningSum
from server.checkpoint import Checkpoint
from server.run_folder import reopen

TRIALS = 20_000


def test_the_noise_in_the_model_after_a_central_round_has_the_promised_spread_and_is_normal(study):
    path = study.start(rounds=1, cohort=20, rank=16, rounds_only=True)
    opened = reopen(path)
    opened.ledger.close()
    pairs = list(study.tap.train())
    spec = pairs[0][0].spec
    moved = Checkpoint.load(path / "checkpoint.safetensors").vector.astype(float) - pairs[0][0].vector
    clipped = sum(release.total.astype(float) for _, release in pairs)[: spec.model_dim]
    check_normal(20.0 * moved - clipped, spec.noise_multiplier * spec.clip)


def test_the_noise_in_what_leaves_a_device_has_the_promised_spread_and_is_normal(study):
    host = study.host(rank=16)
    spec = study.spec(host, noise="local")
    silent = study.spec(host)
    for users in (("3",), ("4", "5", "6")):
        left = host.vault.train(study.assignment(spec, users=users)).total.astype(float)
        bare = host.vault.train(study.assignment(silent, users=users)).total.astype(float)
        check_normal(left - bare, 2.0 * spec.noise_multiplier * spec.clip * np.sqrt(len(users)))


def test_the_noise_in_a_silos_update_has_the_spread_of_its_steps(study):
    host = study.host(unit="example", rank=16)
    spec = study.spec(host, unit="example")
    recipe = {**spec.recipe, "optimizer": "sgd", "local_steps": 4, "learning_rate": 1e-4}
    spec = study.spec(host, unit="example", recipe=recipe, noise_multiplier=30.0)
    moved = host.vault.train(study.assignment(spec, users=("3",))).total.astype(float)
    # Four steps of plain descent; at thirty clips of noise the gradients of a few records do not show.
    check_normal(moved, 30.0 * spec.clip * 1e-4 / recipe["local_batch"] * np.sqrt(4))


def check_normal(noise, scale):
    square = float(np.sum((noise / scale) ** 2))
    assert noise.size > 3000
    assert stats.chi2.sf(square, noise.size) > 1e-6
    assert stats.chi2.cdf(square, noise.size) > 1e-6
    assert stats.kstest(noise / scale, "norm").pvalue > 1e-6
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < 6 / np.sqrt(noise.size)


def small_spec(study, **changes):
    spec = replace(study.spec(study.host()), names=("a",), shapes=((2, 2),), witnesses=0, sampling_rate=1.0, clip=0.5)
    spec = replace(spec, **changes)
    promise = promise_of(spec)
    return replace(spec, noise_multiplier=promise.calibrate(4.0, 1e-5, 1)), promise


def central_scores(spec, present, trials=TRIALS):
    """Clip, gate, sum, noise: with the worst canary or with zeros in its place."""
    others = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    canary = np.array([[1e6, 0.0, 0.0, 0.0]], np.float32)
    gate, randomness = Gate(), Randomness.system()
    scores = np.empty(trials)
    for trial in range(trials):
        rows = clip_rows(np.concatenate([others, canary if present else 0 * canary]), spec.clip)
        total = RunningSum(spec, 1)
        assert total.add(gate.release(rows, spec, 1), 4)
        scores[trial] = rounds.add_central_noise(total.total, spec, randomness)[0]
    return scores


def local_scores(spec, present, trials=TRIALS):
    """One device, at the gate: the worst update, or the worst other one in its place."""
    rows = clip_rows(np.array([[1e6 if present else -1e6, 0.0, 0.0, 0.0]], np.float32), spec.clip)
    gate, randomness = Gate(), Randomness.system()
    return np.array([float(gate.release(rows, spec, 1, randomness).total[0]) for _ in range(trials)])


@pytest.mark.slow
@pytest.mark.parametrize(("noise", "scores"), [("central", central_scores), ("local", local_scores)])
def test_twenty_thousand_trials_prove_no_more_than_was_claimed_and_catch_half_the_noise(
    study, monkeypatch, proven_epsilon, noise, scores
):
    spec, promise = small_spec(study, noise=noise)
    claimed = epsilon_of([promise.event(spec.noise_multiplier)], 1e-5, adjacency=promise.adjacency)
    assert 3.99 < claimed <= 4.0
    proven = proven_epsilon(scores(spec, False), scores(spec, True), delta=1e-5)
    assert 3.4 < proven <= claimed
    real = Randomness.normal
    monkeypatch.setattr(Randomness, "normal", lambda self, size: 0.5 * real(self, size))
    halved = proven_epsilon(scores(spec, False), scores(spec, True), delta=1e-5)
    assert halved > claimed


def test_two_thousand_trials_catch_half_the_noise_already(study, monkeypatch, proven_epsilon):
    """The quick form of the test above, at the gate."""
    spec, promise = small_spec(study, noise="local")
    claimed = epsilon_of([promise.event(spec.noise_multiplier)], 1e-5, adjacency=promise.adjacency)
    assert proven_epsilon(local_scores(spec, False, 2000), local_scores(spec, True, 2000), delta=1e-5) <= claimed
    real = Randomness.normal
    monkeypatch.setattr(Randomness, "normal", lambda self, size: 0.5 * real(self, size))
    assert proven_epsilon(local_scores(spec, False, 2000), local_scores(spec, True, 2000), delta=1e-5) > claimed
