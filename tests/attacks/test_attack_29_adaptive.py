"""Attack 29: a clip, a stop or a next run that was chosen by looking: charged, and held by a filter."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest

from common.accounting import Budget, Filter, Gaussian, PoissonGaussian, Repeated, epsilon_of, event_from_json
from common.config import RunConfig
from common.errors import BudgetSpent, Refusal
from common.events import PoissonComposed
from common.ledger import debits, verify
from common.noised_counts import NoisedCounts
from common.privacy import Adjacency
from common.promise import promise_of
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


MODES = pytest.mark.parametrize("noise", ["central", "local", "distributed"])


def counts_of(path):
    return [json.loads(line) for line in (path / "counts.jsonl").read_text().splitlines()]


@MODES
def test_attack_29_the_clip_moves_and_no_price_does(study, noise):
    """A run whose clip follows what it sees: every round is charged the same, bit and update as one event."""
    path = study.start(rounds=3, rounds_only=True, noise=noise, clip=0.05, clip_quantile=0.5, cohort=16)
    released = counts_of(path)
    assert [line["round"] for line in released] == [1, 2, 3]
    # It moves every round, up or down by the whole step where the noised share was cut to 0 or 1.
    assert all(before["clip"] != after["clip"] for before, after in itertools.pairwise(released))
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    events = [event_from_json(entry.body["event"]) for entry in entries if entry.kind == "debit"]
    assert len(set(events)) == 1
    (event,) = set(events)
    assert isinstance(event, PoissonComposed)
    assert len(event.parts) == 2
    assert event.sampling_rate == (1.0 if noise == "local" else 16 / 20)
    spec = study.opened_spec(path)
    assert event.parts[0].noise_multiplier > spec.noise_multiplier  # the bit took its part
    assert event.noise_multiplier == pytest.approx(spec.noise_multiplier)
    promise = promise_of(spec)
    whole = epsilon_of([promise.schedule(spec.noise_multiplier, spec.rounds)], spec.delta, adjacency=promise.adjacency)
    assert 7.8 < whole <= 8.0
    # Each release entry binds what was published beside the adapter.
    bound = [entry.body["counts"] for entry in entries if entry.kind == "release"]
    lines = (path / "counts.jsonl").read_bytes().splitlines()
    assert bound == [hashlib.sha256(line).hexdigest() for line in lines]


def test_attack_29_the_next_clip_is_a_function_of_the_noised_count_alone(study):
    """Two runs of the same users under the same seed: only the noise differs, and with it the clip."""
    clips = set()
    for name in ("first", *map(str, range(15))):  # a noised share is cut to 0 to 1, so two runs may well agree
        path = study.start(name, rounds=2, rounds_only=True, clip=0.05, clip_quantile=0.5, cohort=20)
        clips.add(counts_of(path)[1]["clip"])
        if len(clips) == 2:
            break
    assert len(clips) == 2
    lines = counts_of(study.folder / "first")
    own = NoisedCounts((), 0.5)
    scale = own.next_scale(1.0, lines[0]["within"])
    assert lines[1]["clip"] == pytest.approx(0.05 * own.update_share * scale)


def test_attack_29_a_resumed_run_goes_on_with_the_clip_it_had(study):
    config = {"rounds": 4, "rounds_only": True, "clip": 0.05, "clip_quantile": 0.5, "cohort": 16}
    path = study.start(progress=Progress(round=lambda line: signal.raise_signal(signal.SIGINT)), **config)
    stopped = len(counts_of(path))
    assert stopped < 4
    study.resume(path)
    lines = counts_of(path)
    assert [line["round"] for line in lines] == [1, 2, 3, 4]
    own = NoisedCounts((), 0.5)
    for before, after in itertools.pairwise(lines):
        moved = own.next_scale(before["clip"], before["within"])
        assert after["clip"] == pytest.approx(moved)


def test_attack_29_the_update_and_its_bit_together_move_what_is_noised_by_at_most_the_clip(study):
    """The sensitivity that the noise was calibrated to, on what really leaves, whatever the clip of the round is."""
    host = study.host()
    spec = study.spec(host, counts=NoisedCounts(("loss", "gain"), 0.5).to_plain())
    for scale in (1e-3, 1.0, 50.0):
        asked = study.assignment(spec, users=("3", "4", "5"))
        fewer = study.assignment(spec, users=("4", "5"))
        sums = [host.vault.train(replace(one, clip_scale=scale)).total for one in (asked, fewer)]
        moved = float(np.linalg.norm(sums[0].astype(np.float64) - sums[1].astype(np.float64)))
        assert 0.5 * spec.clip < moved <= spec.clip * (1 + 1e-6) or scale == 50.0
        assert moved <= spec.clip * (1 + 1e-6)


def test_attack_29_a_server_that_moves_a_clip_without_saying_so_is_refused(study):
    spec = study.spec(study.host())
    with pytest.raises(Refusal, match="does not say so"):
        replace(study.assignment(spec), clip_scale=2.0)
    moving = study.spec(study.host(), counts=NoisedCounts((), 0.5).to_plain())
    for scale in (0.0, -1.0, math.nan, math.inf, 1e30):
        with pytest.raises(Refusal):
            replace(study.assignment(moving), clip_scale=scale)


def test_attack_29_a_device_is_held_by_a_filter_when_a_server_picks_its_next_run_by_looking(study):
    """The second run's numbers may depend on what the first released, so the two are no fixed schedule any more."""
    host = study.host(epsilon=2.0)
    device = study.device(host, epsilon=4.0, trust_coordinator=True)
    first = study.spec(host, epsilon=2.0)
    device.ask(study.assignment(first))
    # As one fixed schedule both would be within the budget; a Renyi filter, which holds for chosen ones, says no.
    second = replace(study.spec(host, epsilon=3.2), run="cd" * 16)
    both = [promise_of(one).schedule(one.noise_multiplier, one.rounds) for one in (first, second)]
    assert epsilon_of(both, 1e-5) <= 4.0
    assert Filter(4.0, 1e-5).would_exceed(both)
    with pytest.raises(Refusal) as refusal:
        device.ask(study.assignment(second))
    assert refusal.value.code == "budget-spent"
    small = replace(study.spec(host, epsilon=0.5), run="ef" * 16)
    device.ask(study.assignment(small))
    device.close()


def test_attack_29_no_run_chooses_its_stop_from_what_it_sees(study):
    """There is no such key; whoever writes one is told so before anything starts."""
    keys = set(RunConfig.model_fields)
    assert not {key for key in keys if "patience" in key or "early" in key}
    path = study.start(rounds=3, rounds_only=True)
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    assert len({str(entry.body["event"]) for entry in entries if entry.kind == "debit"}) == 1
    assert Adjacency.ZERO_OUT in {entry.body["adjacency"] for entry in entries if entry.kind == "reserve"}
