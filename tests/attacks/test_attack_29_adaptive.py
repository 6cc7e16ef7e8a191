"""Attack 29: a clip, a stop or a next run that was chosen by looking: charged, and held by a filter."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from common.accounting import Budget, Filter, Gaussian, PoissonGaussian, Repeated, epsilon_of, event_from_json
from common.config import RunConfig
from common.errors import BudgetSpent
from common.events import PoissonComposed
from common.ledger import debits, verify
from common.privacy import AdaptiveClip, Adjacency, Randomness, split_noise
from simulations.run import Progress


def test_attack_29_a_run_that_is_stopped_early_is_charged_for_all_that_it_reserved(study):
    """Whoever stops on what was seen has an adaptive schedule; only the whole reservation bounds it."""
    path = study.start(
        rounds=3,
        rounds_only=True,
        progress=Progress(round=lambda line: signal.raise_signal(signal.SIGINT)),
    )
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    assert sum(entry.kind == "debit" for entry in entries) < 3
    (charged,) = debits(entries)
    event = event_from_json(charged.event)
    assert isinstance(event, Repeated)
    assert event.count == 3 + RunConfig().spare_rounds
    assert 7.9 < epsilon_of([event], 1e-5) <= 8.0
    assert not (path / "statement.json").exists()


def test_attack_29_a_budget_gives_nothing_back_to_who_stops_early():
    event = PoissonGaussian(0.1, 1.5)
    price = epsilon_of([Repeated(event, 20)], 1e-5)
    budget = Budget(1.2 * price, 1e-5).reserve(Repeated(event, 20), "first").debit(event, "first").close("first")
    with pytest.raises(BudgetSpent):
        budget.debit(event, "first")
    with pytest.raises(BudgetSpent):
        budget.reserve(Repeated(event, 20), "second")
    assert budget.charged_epsilon == pytest.approx(price)


def test_attack_29_adaptive_releases_are_held_by_a_renyi_filter_and_never_exceed_it():
    """An attacker picks every next multiplier after seeing the ones before."""
    generator = np.random.default_rng(0)
    held, spent = Filter(4.0, 1e-5), []
    for _ in range(500):
        event = Gaussian(float(generator.choice([3.0, 8.0, 30.0])))
        if held.would_exceed(event):
            with pytest.raises(BudgetSpent):
                held.after(event)
            continue
        held = held.after(event)
        spent.append(event)
    assert held.spent_epsilon <= 4.0
    assert epsilon_of(spent, 1e-5) <= 4.0
    assert held.would_exceed(Gaussian(3.0))


def test_attack_29_the_bits_of_an_adaptive_clip_are_one_event_with_the_update_and_leave_it_less():
    """Update and count from one cohort: composed first, then sampled once; each alone would be a lie."""
    promised, count_noise = 1.0, 5.0
    update = split_noise(promised, count_noise)
    assert update > promised
    both = PoissonComposed(0.1, (Gaussian(update), Gaussian(2 * count_noise)))
    assert both.noise_multiplier == pytest.approx(promised)
    honest = epsilon_of([Repeated(both, 10)], 1e-5)
    assert honest == pytest.approx(epsilon_of([Repeated(PoissonGaussian(0.1, promised), 10)], 1e-5), rel=1e-6)
    unpaid = epsilon_of([Repeated(PoissonGaussian(0.1, update), 10)], 1e-5)
    assert unpaid < honest
    clip = AdaptiveClip(1.0, cohort=100, count_noise=count_noise)
    moved = {clip.after(60, 100, Randomness.system()).clip_norm for _ in range(5)}
    assert len(moved) == 5, "the next clip is a noised release, not a function of the data"


def test_attack_29_no_run_chooses_its_clip_or_its_stop_from_what_it_sees(study):
    """There is no such key; whoever writes one is told so before anything starts."""
    keys = set(RunConfig.model_fields)
    assert not {key for key in keys if "adaptive" in key or "patience" in key or "early" in key or "quantile" in key}
    path = study.start(rounds=3, rounds_only=True)
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    assert len({str(entry.body["event"]) for entry in entries if entry.kind == "debit"}) == 1
    assert Adjacency.ZERO_OUT in {entry.body["adjacency"] for entry in entries if entry.kind == "reserve"}
