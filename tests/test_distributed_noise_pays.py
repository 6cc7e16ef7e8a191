"""Distributed noise costs little: at equal epsilon the global adapter gains nearly what it does under central noise."""

from __future__ import annotations

import numpy as np
import pytest

from common.config import RunConfig

SEEDS = range(5)
LARGEST_LOSS = 0.03
"""Of what the global adapter gains over the base, in nats per response token, on records that nobody trained on."""


def gain(folder, monkeypatch, **changes) -> float:
    """Run the rounds alone, a rehearsal, and return what the global adapter gains on 200 users' test records."""
    from server.checkpoint import Checkpoint
    from simulations import hosts, run

    with monkeypatch.context() as patch:
        patch.setattr(run, "_finish", lambda *_: None)  # private adapters do not depend on who adds the noise
        patch.setattr(run, "_preflight", lambda *_: None)
        config = RunConfig(rehearsal=True, rounds=10, evaluate_every=1000, **changes)
        path = run.start(config, folder, run.Progress()).path
    opened = run.run_folder.reopen(path)
    opened.ledger.close()
    host = hosts.host_of(opened.config)
    vector = Checkpoint.load(path / "checkpoint.safetensors").vector
    users = host.population.sample(200, opened.config.seed)
    records = [record for name in users for record in host.population.encoded(name).test]
    under = (vector, host.trainer.layout, host.trainer.scaling)
    before, after = host.trainer.score(records), host.trainer.score(records, under=under)
    return float(before.nats.sum() / before.tokens.sum() - after.nats.sum() / after.tokens.sum())


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_at_equal_epsilon_and_a_cohort_of_200_distributed_noise_keeps_97_percent_of_the_gain(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    gains = {
        noise: np.array([gain(tmp_path / f"{noise}-{seed}", monkeypatch, noise=noise, seed=seed) for seed in SEEDS])
        for noise in ("central", "distributed")
    }
    print({noise: values.round(4).tolist() for noise, values in gains.items()})
    assert gains["central"].mean() > 0.05  # there is something to lose
    assert gains["distributed"].mean() >= (1 - LARGEST_LOSS) * gains["central"].mean()
