"""Attacks 20 and 21: what leaves beside the update; and what a statement must say before its number means anything."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import optimize, stats

from common.accounting import epsilon_of
from common.claims import Statement
from common.errors import Refusal
from common.ledger import verify
from common.noised_counts import NoisedCounts
from common.privacy import Adjacency
from common.promise import promise_of
from common.wire import Release, receipt_digest
from server.aggregation import RunningSum
from server.run_folder import reopen

MODES = pytest.mark.parametrize("mode", [{}, {"noise": "local"}, {"unit": "example"}], ids=["central", "local", "silo"])


@MODES
def test_attack_20_a_reply_has_no_loss_no_norm_no_count_no_time_and_no_clip_bit(study, mode):
    study.start(rounds=1, chunk=1, rounds_only=True, cohort=16, **mode)
    replies = [message for message in study.tap.answered if message.metadata.message_type == "train"]
    assert replies
    for reply in replies:
        assert set(reply.content) == {"release", "receipt"}
        assert set(reply.content["receipt"]) == {"format", "users", "sha256"}
        assert set(reply.content["release"]) == {"total"}
        assert reply.content["receipt"]["users"] == 1
        assert not reply.content.metric_records


def test_attack_20_replies_of_unlike_users_have_one_size_whatever_they_hold(study):
    """Nor does the length of a reply, or its form, tell how much somebody wrote."""
    host = study.host()
    people = {
        "none": (),
        "one": host.population.encoded("4").train[:1],
        "many": host.population.encoded("4").train * 30,
    }
    vault = type(host.vault)(
        host.trainer,
        {name: type(host.population.encoded("4"))(own, (), ()) for name, own in people.items()}.__getitem__,
        seed=0,
    )
    spec = study.spec(host, noise="local")
    sizes = {
        len(vault.train(study.assignment(spec, users=(name,))).to_records()["release"]["total"].data) for name in people
    }
    assert len(sizes) == 1


@pytest.mark.parametrize("noise", ["central", "local", "distributed"])
def test_attack_20_metrics_that_are_asked_for_leave_noised_and_charged_or_not_at_all(study, noise):
    path = study.start(rounds=2, noise=noise, cohort=16, noised_metrics=("loss", "gain"), epsilon=1e4)
    lines = [json.loads(line) for line in (path / "counts.jsonl").read_text().splitlines()]
    assert [set(line) - {"round", "clip"} for line in lines] == [
        {"measured", "loss", "gain", "loss_noise", "gain_noise"}
    ] * 2
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    (event,) = {str(entry.body["event"]) for entry in entries if entry.kind == "debit"}
    assert event.count("noise_multiplier") == 1 + 3  # the update, how many were measured, loss and gain
    statement = json.loads((path / "statement.json").read_text())
    assert "loss" in " ".join(statement["covered"])
    assert "charged as one event" in statement["mechanism"] or noise == "distributed"
    # Nothing but one vector, of one length for everybody, went over the wire.
    for reply in study.tap.answered:
        if reply.metadata.message_type == "train":
            assert set(reply.content) == {"release", "receipt"}
            assert not reply.content.metric_records


def test_attack_20_what_is_released_of_the_metrics_is_near_the_truth_and_off_by_its_stated_noise(study):
    """With hardly any noise the released loss is the cohort's; so it is really measured, and not made up."""
    config = {"rounds": 1, "rounds_only": True, "cohort": 20, "noised_metrics": ("loss", "gain"), "epsilon": 1e6}
    path = study.start(**config)
    line = json.loads((path / "counts.jsonl").read_text())
    host = study.host(**{key: value for key, value in config.items() if key not in ("rounds_only",)})
    losses = []
    for user in map(str, range(20)):
        scores = host.trainer.score(host.population.encoded(user).validation)
        losses.append(scores.nats.sum() / scores.tokens.sum())
    assert line["measured"] == pytest.approx(20, abs=0.5)
    assert line["loss"] == pytest.approx(np.mean(np.minimum(losses, 8.0)), abs=0.1)
    assert line["gain"] == pytest.approx(0.0, abs=0.05)  # the shared adapter starts as nothing


def test_attack_20_a_device_measures_nothing_that_its_owner_did_not_grant(study):
    host = study.host(noise="local")
    spec = study.spec(host, noise="local", counts=NoisedCounts(("gain",)).to_plain())
    device = study.device(host)
    with pytest.raises(Refusal) as refusal:
        device.ask(study.assignment(spec))
    assert refusal.value.code == "policy-metrics"
    assert device.count("release") == 0
    device.close()
    granted = study.device(host, name="granted", metrics=("gain",))
    release = granted.ask(study.assignment(spec))
    assert release.total.shape == (spec.model_dim + 2 + spec.witnesses,)
    (entry,) = [entry for entry in granted.ledger.entries() if entry.kind == "release"]
    assert entry.body["names"][-2:] == ["noised_counts", "noise_witness"]
    (debit,) = [entry for entry in granted.ledger.entries() if entry.kind == "debit"]
    assert len(debit.body["event"]["parts"]) == 3
    granted.close()


def test_attack_20_one_user_counts_once_whatever_room_the_rest_of_the_row_leaves(study):
    """A hostile device that shares nothing and puts its whole clip into one count is not in the sum."""
    host = study.host()
    own = NoisedCounts((), 0.5)
    spec = study.spec(host, counts=own.to_plain())
    honest = host.vault.train(study.assignment(spec))
    total = RunningSum(spec, 1)
    assert total.add(honest, 1)
    loud = np.zeros_like(honest.total)
    loud[spec.model_dim] = 0.99 * spec.clip
    assert not total.add(Release(loud, 1, receipt_digest(loud, spec, 1, 1)), 1)
    assert total.rejected == {"too-long": 1}


@MODES
def test_attack_20_what_a_study_keeps_beside_the_adapter_is_listed_as_not_covered(study, mode):
    path = study.start(rounds=1, **mode)
    line = json.loads((path / "rounds.jsonl").read_text().splitlines()[0])
    assert {"evaluation", "seconds", "rejected"} <= line.keys()  # they are there, so they must be listed
    statement = Statement.from_json(
        {k: v for k, v in json.loads((path / "statement.json").read_text()).items() if k != "sentence"}
    )
    listed = " ".join(statement.not_covered)
    for words in ("scores", "counts", "timings", "learning curves", "the private adapter", "computes"):
        assert words in listed
        assert words in statement.sentence()
    assert statement.covered == ("the shared adapter after every round",)
    page = (path / "report.html").read_text()
    assert "learning curves" in page
    assert "scores on this page" in page


@MODES
def test_attack_21_a_statement_has_everything_and_its_number_is_the_ledgers(study, mode):
    path = study.start(rounds=2, **mode)
    value = json.loads((path / "statement.json").read_text())
    for name in ("unit", "adjacency", "delta", "mechanism", "sampling", "trust", "accountant", "population"):
        assert value[name], name
    assert value["accountant"].startswith("pld (dp-accounting")
    assert value["second_opinion"][0].startswith("rdp (dp-accounting")
    assert value["epsilon"] <= value["second_opinion"][1]
    sentence = value["sentence"]
    for words in (
        "epsilon",
        "delta",
        "Mechanism",
        "Sampling",
        "Trust",
        "Accountant",
        "Covers",
        "Does not cover",
        "Assumes",
    ):
        assert words in sentence
    assert "Mironov" in sentence
    opened = reopen(path)
    opened.ledger.close()
    promise = promise_of(opened.spec)
    assert (value["unit"], value["adjacency"]) == (promise.unit.value, promise.adjacency.value)
    by_hand = BY_HAND[mode.get("noise", mode.get("unit", "central"))](opened.spec)
    assert value["epsilon"] == pytest.approx(by_hand, rel=0.01)
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    reserved = next(entry.body for entry in entries if entry.kind == "reserve")
    assert reserved["adjacency"] == value["adjacency"]


def gaussian_epsilon(mu, delta):
    """Balle and Wang (2018), Theorem 8, solved without our code."""

    def excess(epsilon):
        return (
            stats.norm.cdf(mu / 2 - epsilon / mu) - math.exp(epsilon) * stats.norm.cdf(-mu / 2 - epsilon / mu) - delta
        )

    return optimize.brentq(excess, 0.0, 60.0)


def poisson_epsilon(rate, multiplier, count, delta):
    """A Poisson-sampled Gaussian, composed by Fourier transform on a grid: Koskela et al. (2020), arXiv:1906.03049."""
    step, size = 2e-4, 1 << 19
    grid = (np.arange(size) - size // 2) * step
    best = 0.0
    for remove in (True, False):
        x = np.linspace(-14 * multiplier, 14 * multiplier + 1, 400_001)
        base, moved = stats.norm.pdf(x, 0, multiplier), stats.norm.pdf(x, 1, multiplier)
        mixed = (1 - rate) * base + rate * moved
        upper, lower = (mixed, base) if remove else (base, mixed)
        loss = np.log(upper) - np.log(lower)
        mass, _ = np.histogram(loss, bins=np.append(grid, grid[-1] + step) - step / 2, weights=upper * (x[1] - x[0]))
        composed = np.fft.fftshift(np.fft.irfft(np.fft.rfft(np.fft.ifftshift(mass)) ** count, size))

        def delta_at(epsilon, composed=composed):
            over = grid > epsilon
            return float(np.sum(composed[over] * -np.expm1(epsilon - grid[over])))

        best = max(best, optimize.brentq(lambda e: delta_at(e) - delta, 0.0, 40.0))
    return best


def _central(spec):
    return poisson_epsilon(spec.sampling_rate, spec.noise_multiplier, 2, spec.delta)


def _local(spec):
    # Sensitivity 2C against noise of standard deviation z 2C, twice.
    return gaussian_epsilon(math.sqrt(2) / spec.noise_multiplier, spec.delta)


def _silo(spec):
    steps = 2 * int(spec.recipe["local_steps"])
    rate = spec.recipe["local_batch"] / spec.recipe["example_records"]
    return poisson_epsilon(rate, spec.noise_multiplier, steps, spec.delta)


BY_HAND = {"central": _central, "local": _local, "example": _silo}


def test_attack_21_three_accountants_agree_on_the_schedules_of_all_three_columns(study):
    host = study.host()
    for mode in ({}, {"noise": "local"}, {"unit": "example"}):
        spec = study.spec(host, **mode)
        promise = promise_of(spec)
        schedule = [promise.schedule(spec.noise_multiplier, spec.rounds)]
        pld = epsilon_of(schedule, spec.delta, "pld", promise.adjacency)
        assert pld <= 8.0
        assert pld > 7.9
        assert pld <= epsilon_of(schedule, spec.delta, "rdp", promise.adjacency)
        if promise.adjacency is not Adjacency.REPLACE_ONE:
            assert epsilon_of(schedule, spec.delta, "prv", promise.adjacency) == pytest.approx(pld, rel=0.02)
