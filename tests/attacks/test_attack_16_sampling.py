"""Attacks 16, 17 and 26: cohorts and batches are what the events say; empty ones and dropouts cost as much."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from flwr.app import Error, Message
from scipy import stats

from common.events import event_from_json
from common.ledger import verify
from common.privacy import Randomness
from common.wire import Assignment, Release
from server.checkpoint import Checkpoint
from server.cohort import Roster
from server.rounds import WITNESSES
from server.run_folder import reopen
from simulations.run import Progress

USERS = 20


def cohorts(tap):
    """Who was really asked, by round."""
    found = {}
    for message in tap.asked:
        if message.metadata.message_type == "train":
            assignment = Assignment.from_records(message.content)
            found.setdefault(assignment.round, []).extend(int(user) for user in assignment.users)
    return found


def debited(path):
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    return [event_from_json(entry.body["event"]) for entry in entries if entry.kind == "debit"]


def test_attack_16_the_users_that_are_asked_are_a_poisson_sample_at_the_rate_that_is_debited(study):
    rounds = 40
    path = study.start(rounds=rounds, cohort=8, local_steps=1, chunk=20, rounds_only=True, evaluate_every=100)
    asked = cohorts(study.tap)
    (event,) = set(debited(path))
    assert event.sampling_rate == 8 / USERS
    assert all(len(set(users)) == len(users) for users in asked.values())
    sizes = [len(asked.get(number, ())) for number in range(1, rounds + 1)]
    # Were cohorts of a fixed size, the variance would be 0; of a Poisson sample it is n q (1 - q) = 4.8.
    assert stats.chi2.sf(sum((np.array(sizes) - 8.0) ** 2) / 4.8, rounds) > 1e-6
    assert stats.chi2.cdf(sum((np.array(sizes) - 8.0) ** 2) / 4.8, rounds) > 1e-6
    taken = Counter(user for users in asked.values() for user in users)
    counts = np.array([taken[user] for user in range(USERS)])
    square = float(np.sum((counts - rounds * 0.4) ** 2 / (rounds * 0.4 * 0.6)))
    assert 1e-6 < stats.chi2.sf(square, USERS) < 1 - 1e-6


@pytest.mark.parametrize(("population", "rate"), [(20, 0.4), (50, 0.02), (6, 0.9)])
def test_attack_16_the_roster_draws_binomial_sizes_and_independent_members(population, rate):
    roster = Roster([str(n) for n in range(population)], (1,), {}, takes_anyone=True)
    draws, randomness = 4000, Randomness.system()
    drawn = np.zeros((draws, population))
    for row in drawn:
        row[[int(user) for user in roster.cohort(rate, randomness)]] = 1
    sizes = np.bincount(drawn.sum(axis=1).astype(int), minlength=population + 1)
    expected = draws * stats.binom.pmf(np.arange(population + 1), population, rate)
    rare = expected < 10
    observed = np.append(sizes[~rare], sizes[rare].sum())
    wanted = np.append(expected[~rare], expected[rare].sum())
    keep = wanted > 0
    square = float(np.sum((observed[keep] - wanted[keep]) ** 2 / wanted[keep]))
    assert stats.chi2.sf(square, keep.sum() - 1) > 1e-6
    # Exact, because where members are rare their correlation is far from normal.
    together = (drawn.T @ drawn)[np.triu_indices(population, 1)]
    for tail in (stats.binom.cdf(together, draws, rate**2), stats.binom.sf(together - 1, draws, rate**2)):
        assert tail.min() > 1e-9
    # A member of this round is in the next one as often as anybody.
    again = np.mean(drawn[1:][drawn[:-1] == 1])
    assert abs(again - rate) < 6 * np.sqrt(rate * (1 - rate) / drawn[:-1].sum())


def test_attack_16_a_silos_batches_are_poisson_at_the_public_rate_whatever_it_holds(study, monkeypatch):
    """The rate is batch over the public number of records, not over those that are there."""
    host = study.host(unit="example")
    sizes = []
    real = type(host.trainer).clipped_gradient_sum

    def count(self, vector, examples, *args, **kwargs):
        sizes.append(len(examples))
        return real(self, vector, examples, *args, **kwargs)

    monkeypatch.setattr(type(host.trainer), "clipped_gradient_sum", count)
    spec = study.spec(host, unit="example")
    spec = study.spec(
        host, unit="example", recipe={**spec.recipe, "local_steps": 150, "local_batch": 4, "example_records": 40}
    )
    held = len(host.population.encoded("4").train)
    assert held != 40
    host.vault.train(study.assignment(spec, users=("4",)))
    assert len(sizes) == 150
    assert 0 in sizes
    expected = 150 * stats.binom.pmf(np.arange(held + 1), held, 0.1)
    observed = np.bincount(sizes, minlength=held + 1)
    low = np.array([observed[0], observed[1], observed[2:].sum()])
    wanted = np.array([expected[0], expected[1], expected[2:].sum()])
    assert stats.chi2.sf(float(np.sum((low - wanted) ** 2 / wanted)), 2) > 1e-6


def test_attack_17_an_empty_cohort_is_a_round_of_noise_alone_and_is_charged(study, monkeypatch):
    monkeypatch.setattr(Randomness, "poisson_sample", lambda *_: np.zeros(0, np.int64))
    path = study.start(rounds=2, rank=16, rounds_only=True)
    assert cohorts(study.tap) == {}
    opened = reopen(path)
    opened.ledger.close()
    assert len(debited(path)) == 2
    after = Checkpoint.load(path / "checkpoint.safetensors")
    start = study.start("start", rounds=1, epsilon=float("inf"), rank=16, rounds_only=True)
    moved = after.vector - Checkpoint.load(start / "checkpoint.safetensors").vector
    spec = opened.spec
    promised = spec.noise_multiplier * spec.clip / (spec.sampling_rate * spec.population)
    assert np.std(moved) == pytest.approx(promised * np.sqrt(2), rel=0.1)


def test_attack_17_an_empty_batch_of_a_silo_is_a_step_of_noise_alone(study):
    host = study.host(unit="example", rank=16)
    spec = study.spec(host, unit="example", cohort=8)
    recipe = {**spec.recipe, "optimizer": "sgd", "local_steps": 1, "learning_rate": 1e-3, "example_records": 10**7}
    spec = study.spec(host, unit="example", recipe=recipe, noise_multiplier=1.0)
    # At this rate a batch holds a record once in a million steps.
    moved = host.vault.train(study.assignment(spec)).total.astype(np.float64)
    promised = spec.clip * recipe["learning_rate"] / recipe["local_batch"]
    assert np.std(moved) == pytest.approx(promised, rel=0.1)
    assert stats.kstest(moved / promised, "norm").pvalue > 1e-6


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_attack_26_dropout_changes_neither_the_divisor_nor_the_noise_nor_the_debit(study, share):
    """A divisor of who answered would make one user count for more, and the noise for less."""
    generator = np.random.default_rng(0)
    arrived = []

    def drop(reply, question):
        if generator.random() < share:
            return [Message(Error(code=0, reason=""), reply_to=question)]
        arrived.append(Release.from_records(reply.content).total.astype(np.float64))
        return [reply]

    study.tap.forge = drop
    lines = []
    path = study.start(rounds=1, cohort=20, chunk=1, rank=16, rounds_only=True, progress=Progress(round=lines.append))
    lost = lines[0]["rejected"]["unavailable"]
    assert 2 <= lost <= 16
    opened = reopen(path)
    opened.ledger.close()
    spec = opened.spec
    assignment, _ = next(iter(study.tap.train()))
    moved = 20.0 * (Checkpoint.load(path / "checkpoint.safetensors").vector.astype(float) - assignment.vector)
    scale = spec.noise_multiplier * spec.clip
    # Twenty times the step, less the sum of those who answered, is the promised noise. Had they been the divisor, it
    # would be at least a quarter more.
    noise = moved - sum(arrived)[: spec.model_dim]
    assert len(arrived) == 20 - lost
    assert np.std(noise) == pytest.approx(scale, rel=0.1)
    assert stats.kstest(noise / scale, "norm").pvalue > 1e-6
    values = np.array(json.loads((path / WITNESSES).read_text().splitlines()[0])["values"])
    assert np.std(values) == pytest.approx(scale, rel=0.25)
    assert len(debited(path)) == 1


def test_attack_26_a_round_in_which_nobody_answers_still_releases_noise_and_is_charged(study):
    study.tap.forge = lambda reply, question: [Message(Error(code=0, reason=""), reply_to=question)]
    path = study.start(rounds=1, rank=16, rounds_only=True)
    assert len(debited(path)) == 1
    values = np.array(json.loads((path / WITNESSES).read_text().splitlines()[0])["values"])
    assert np.std(values) > 0
