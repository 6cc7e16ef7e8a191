"""Attacks on what models remember, on adapters that certainly do and on adapters that certainly do not."""

from __future__ import annotations

import numpy as np
import pytest

from client.trainer import Recipe
from common.config import load_config, read_config_file
from simulations import hosts
from simulations.hosts import Host
from simulations.memorization import extract_from_private, infer_global_membership, infer_private_membership


@pytest.fixture
def host(run):
    return hosts.host_of(load_config(read_config_file(run / "config.toml")))


@pytest.fixture
def eager(monkeypatch):
    """Private adapters are trained until they know their records by heart."""
    monkeypatch.setattr(Host, "recipe", property(lambda _: Recipe(80, 4, 0.05, "adam")))


@pytest.fixture
def lazy(monkeypatch):
    """Private adapters learn nothing at all."""
    monkeypatch.setattr(Host, "recipe", property(lambda _: Recipe(1, 1, 1e-12, "sgd")))


def test_an_adapter_that_learned_nothing_tells_nothing_about_its_users(host):
    vector = np.zeros(host.trainer.layout.size, np.float32)
    found = infer_global_membership(host, vector, 20, 1e-5, 8.0, np.random.default_rng(0))
    assert found.value == 0.5
    assert found.verdict == "holds"
    assert found.bounds[0].epsilon == 0.0
    assert "held-out" in found.why  # users of a file: there are no others of their kind


def test_a_global_adapter_trained_without_end_on_its_users_gives_them_away(host):
    people = [host.population.encoded(str(name)).train for name in range(20)]
    together = [record for own in people for record in own]
    orders = [np.random.default_rng(0)]
    vector = host.trainer.fit(host.personal_start, [together], Recipe(60, 40, 0.05, "adam"), orders)[0]
    found = infer_global_membership(host, vector, 20, 1e-5, 8.0, np.random.default_rng(0))
    assert found.value > 0.6
    assert found.details["true_positive_rate_at_1_percent"] >= 0.0


def test_private_adapters_that_know_their_records_give_them_away(host, eager):
    found = infer_private_membership(host, 3, np.random.default_rng(0))
    assert found.verdict == "leaks, as expected"
    assert found.low > 0.6
    assert found.claimed_epsilon is None
    assert found.samples == 3 * 12


def test_private_adapters_that_learned_nothing_do_not(host, lazy):
    found = infer_private_membership(host, 6, np.random.default_rng(0))
    assert found.low <= 0.55
    assert found.high >= 0.45


def test_a_secret_comes_out_of_its_owners_adapter_word_for_word_and_of_no_other(host, eager):
    found = extract_from_private(host, 4, 12, np.random.default_rng(1))
    assert found.verdict == "leaks, as expected"
    assert found.details["verbatim"] >= 0.5
    assert found.value > 8.0
    assert found.details["exposure_elsewhere"] < 5.0


def test_no_secret_comes_out_of_adapters_that_learned_nothing(host, lazy):
    found = extract_from_private(host, 6, 2, np.random.default_rng(2))
    assert found.details["verbatim"] == 0.0
    assert found.low < found.chance + 1.5
