"""A round that is interrupted goes on where it was: the same bytes, each step once, and never past the owner's time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.adapter_store import AdapterStore
from client.base_model import load_base
from client.round_progress import NAME, RoundProgress, StepState
from client.trainer import ExamplePromise, Recipe, Trainer
from client.vault import EncodedUser, Vault
from common.errors import Refusal
from common.methods import METHODS
from common.privacy import Randomness
from common.split import split_of
from common.wire import Assignment

STEPS = 6
SUBJECT = "ab" * 16


class PowerCutError(Exception):
    """Somebody pulled the plug."""


@pytest.fixture(scope="module")
def trainer(tiny_base_folder):
    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=3, scaling=2.0)


@pytest.fixture(scope="module")
def records(random_examples):
    return random_examples(np.random.default_rng(0), 9)


@pytest.fixture
def open_store(tmp_path):
    return lambda: AdapterStore(tmp_path / "kept.sqlite", bytes(32), keep_versions=2)


@pytest.fixture
def progress(open_store, trainer):
    """A function that makes the progress of a process that starts now."""

    def make(**options):
        return RoundProgress(
            open_store, SUBJECT, trainer.base.digest, **({"seconds": 1e9, "save_seconds": 0.0} | options)
        )

    return make


def cut_power_after(progress, saves):
    """The process is gone right after its checkpoint number `saves` is on disk."""
    kept, save = [], progress.save

    def save_and_die(part, state):
        save(part, state)
        kept.append(state)
        if len(kept) == saves:
            raise PowerCutError

    progress.save = save_and_die
    return progress


def counting(progress):
    """Keeps nothing, and tells which steps would have been kept."""
    steps = []
    progress.save = lambda part, state: steps.append((part, state.steps))
    return progress, steps


def asked(release_spec, trainer, method="dual", **recipe):
    recipe = {
        "local_steps": STEPS,
        "local_batch": 2,
        "learning_rate": 0.1,
        "optimizer": "adam",
        "scaling": 2.0,
        "example_records": 20,
        "rank": 3,
        "start_seed": 7,
        "shared_layers": 1,
    } | recipe
    sent = split_of(METHODS[method], trainer.layout, recipe).sent
    spec = release_spec(
        method=method,
        names=tuple(tensor.name for tensor in sent.tensors),
        shapes=tuple(tensor.shape for tensor in sent.tensors),
        recipe=recipe,
        model=trainer.base.digest,
        clip=0.5,
    )
    start = np.random.default_rng(1).normal(0, 0.1, sent.size).astype(np.float32)
    return Assignment(spec, 1, (SUBJECT,), start)


def train(trainer, records, assignment, progress):
    own = EncodedUser(records, (), ())
    return Vault(trainer, lambda _: own, seed=5, residents=[SUBJECT], progress=progress).train(assignment).total


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("method", ["dual", "layers-by-turns"])
def test_an_interrupted_round_gives_the_bytes_of_one_that_was_not(
    trainer, records, progress, release_spec, method, optimizer
):
    assignment = asked(release_spec, trainer, method, optimizer=optimizer)
    whole = train(trainer, records, assignment, None)
    parts = 2 if METHODS[method].by_turns else 1
    for saves in (1, STEPS - 1, parts * (STEPS - 1)):
        with pytest.raises(PowerCutError):
            train(trainer, records, assignment, cut_power_after(progress(), saves))
        resumed, steps = counting(progress())
        assert train(trainer, records, assignment, resumed).tobytes() == whole.tobytes()
        assert len(steps) == parts * (STEPS - 1) - saves  # the steps before were not taken again


def test_a_round_that_is_interrupted_again_and_again_ends_all_the_same(trainer, records, progress, release_spec):
    assignment = asked(release_spec, trainer)
    whole = train(trainer, records, assignment, None)
    for _ in range(STEPS - 1):
        with pytest.raises(PowerCutError):
            train(trainer, records, assignment, cut_power_after(progress(), 1))
    assert train(trainer, records, assignment, progress()).tobytes() == whole.tobytes()


@pytest.mark.parametrize("change", ["round", "spec", "start", "records", "label", "steps"])
def test_a_checkpoint_of_anything_else_is_passed_over(trainer, records, progress, release_spec, change):
    assignment = asked(release_spec, trainer)
    with pytest.raises(PowerCutError):
        train(trainer, records, assignment, cut_power_after(progress(), 3))
    if change == "round":
        assignment = replace(assignment, round=2)
    elif change == "spec":
        assignment = replace(assignment, spec=replace(assignment.spec, clip=0.25))
    elif change == "start":
        assignment = replace(assignment, vector=assignment.vector + np.float32(0.01))
    elif change == "records":
        records = records[:-1]
    elif change == "label":
        records = [
            replace(records[0], first_label=records[0].first_label % (len(records[0].ids) - 1) + 1),
            *records[1:],
        ]
    else:
        assignment = asked(release_spec, trainer, local_steps=STEPS - 1)
    expected = train(trainer, records, assignment, None)
    assert train(trainer, records, assignment, progress()).tobytes() == expected.tobytes()


def test_a_checkpoint_that_does_not_open_costs_time_only(trainer, records, progress, release_spec, open_store):
    assignment = asked(release_spec, trainer)
    whole = train(trainer, records, assignment, None)
    with pytest.raises(PowerCutError):
        train(trainer, records, assignment, cut_power_after(progress(), 3))
    with open_store() as store:
        note = store.versions(SUBJECT, NAME)[-1].version_note
        store.put(SUBJECT, NAME, b"no tensors", base_digest=trainer.base.digest, version_note=note)
    assert train(trainer, records, assignment, progress()).tobytes() == whole.tobytes()


def test_a_checkpoint_is_sealed_and_gone_from_the_store_when_the_round_left(
    trainer, records, progress, release_spec, open_store, tmp_path
):
    assignment, kept = asked(release_spec, trainer), []
    first = cut_power_after(progress(), 4)
    save = first.save
    first.save = lambda part, state: (kept.append(state), save(part, state))
    with pytest.raises(PowerCutError):
        train(trainer, records, assignment, first)
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert kept[-1].arrays["theta"].tobytes()[:64] not in written
    train(trainer, records, assignment, progress())
    with open_store() as store:
        assert store.get(SUBJECT, NAME) == b""


def by_example(trainer, records, progress, multiplier, rate=1.0):
    recipe = Recipe(steps=STEPS, batch=4, learning_rate=0.1, optimizer="momentum")
    start = np.random.default_rng(2).normal(0, 0.1, trainer.layout.size).astype(np.float32)
    part = progress.part(0, 1, may_be_cut=False) if progress is not None else None
    promise = ExamplePromise(0.1, multiplier, rate)
    return trainer.fit_example_dp(start, records, recipe, promise, Randomness.system(), progress=part)


def begin(progress, release_spec, trainer, records):
    progress.begin(asked(release_spec, trainer), 512, np.zeros((1, 3), np.float32), [records])
    return progress


def test_an_interrupted_silo_round_takes_each_step_once(trainer, records, progress, release_spec, monkeypatch):
    # Every record in every batch and no noise: then the outcome says which steps were taken.
    whole = by_example(trainer, records, None, 0.0)
    for saves in range(1, STEPS):
        with pytest.raises(PowerCutError):
            by_example(trainer, records, begin(cut_power_after(progress(), saves), release_spec, trainer, records), 0.0)
        resumed = begin(progress(), release_spec, trainer, records)
        assert by_example(trainer, records, resumed, 0.0).tobytes() == whole.tobytes()
        resumed.finish()
    # With noise, the steps that are in the outcome drew as often as was promised: no fresh noise for one that is kept.
    drawn, normal = [], Randomness.normal
    monkeypatch.setattr(Randomness, "normal", lambda self, size: drawn.append(size) or normal(self, size))
    with pytest.raises(PowerCutError):
        by_example(trainer, records, begin(cut_power_after(progress(), 4), release_spec, trainer, records), 1.0, 0.5)
    assert len(drawn) == 4
    by_example(trainer, records, begin(progress(), release_spec, trainer, records), 1.0, 0.5)
    assert len(drawn) == STEPS


def test_no_seed_of_the_noise_is_in_a_checkpoint(trainer, records, progress, release_spec):
    states = []
    one = begin(progress(), release_spec, trainer, records)
    one.save = lambda part, state: states.append(state)
    by_example(trainer, records, one, 1.0, 0.5)
    assert [state.steps for state in states] == list(range(1, STEPS))
    assert {name for state in states for name in state.arrays} == {"theta", "first"}


class Clock:
    """A clock that says that every step takes a minute."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 30.0  # it is asked twice per step at least
        return self.now


def test_a_round_is_cut_to_the_steps_that_fit_and_an_update_leaves(trainer, records, progress, release_spec):
    assignment = asked(release_spec, trainer)
    short = progress(seconds=200.0, save_seconds=1e9, clock=Clock())
    total = train(trainer, records, assignment, short)
    taken, wanted = short.cut
    assert 1 <= taken < wanted == STEPS
    expected = train(trainer, records, asked(release_spec, trainer, local_steps=STEPS), None)
    assert total.tobytes() != expected.tobytes()
    assert np.abs(total).max() > 0
    long = progress(seconds=1e9)
    train(trainer, records, replace(assignment, round=2), long)
    assert long.cut is None


def test_a_silo_round_is_never_cut_and_goes_on_when_there_is_time_again(trainer, records, progress, release_spec):
    whole = by_example(trainer, records, None, 0.0)
    short = begin(progress(seconds=200.0, save_seconds=1e9, clock=Clock()), release_spec, trainer, records)
    with pytest.raises(Refusal, match="steps") as refused:
        by_example(trainer, records, short, 0.0)
    assert refused.value.code == "not-now"
    found = begin(progress(), release_spec, trainer, records).part(0, 1, may_be_cut=False).resume(STEPS)
    assert isinstance(found, StepState)
    assert 1 <= found.steps < STEPS
    assert (
        by_example(trainer, records, begin(progress(), release_spec, trainer, records), 0.0).tobytes()
        == whole.tobytes()
    )
