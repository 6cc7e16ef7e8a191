"""Stacked equals one by one: however users are cut into chunks and passes, for every method, mode, optimizer and type.

Between our own paths float64 agrees to 1e-9, because the pass by hand computes norm and rotation in the base's own
type. Against transformers it does where its RMSNorm, rotary angles and loss, which it computes in float32 whatever the
type, are replaced (tests/client/test_trainer.py). Worker processes: tests/simulations/test_run.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.round_states import ShortMemory
from client.trainer import Recipe, Trainer
from client.vault import EncodedUser, Vault
from common.methods import METHODS
from common.split import public_start, split_of
from common.wire import Assignment
from server.aggregation import RunningSum, ServerStep
from server.rounds import cut_to_rank

TARGETS = ("q_proj", "v_proj")
RANK, SCALING, ROUNDS, CLIP = 2, 2.0, 3, 0.2
USERS = tuple("abcde")
RATES = {"sgd": 0.2, "momentum": 0.05, "adam": 0.01}


@pytest.fixture(scope="module")
def people(random_examples):
    generator = np.random.default_rng(8)
    return {name: random_examples(generator, count) for name, count in zip(USERS, (6, 1, 9, 4, 6), strict=True)}


def trainer_of(folder, dtype=torch.float32, pass_tokens=None):
    return Trainer(load_base(folder, TARGETS, dtype=dtype), rank=RANK, scaling=SCALING, pass_tokens=pass_tokens)


def rounds(trainer, people, optimizer, chunks):
    """Three rounds of clipped sums in float64, with users cut into `chunks`."""
    vector = np.random.default_rng(1).normal(0, 0.1, trainer.layout.size).astype(np.float32).astype(np.float64)
    recipe = Recipe(3, 4, RATES[optimizer], optimizer)
    start = vector
    for number in range(ROUNDS):
        total = np.zeros_like(vector)
        for chunk in chunks:
            orders = [np.random.default_rng([number, USERS.index(name)]) for name in chunk]
            trained = trainer.fit(vector, [people[name] for name in chunk], recipe, orders)
            updates = trained.astype(np.float64) - vector
            norms = np.linalg.norm(updates, axis=1, keepdims=True)
            total += (updates * np.minimum(1.0, CLIP / norms)).sum(axis=0)
        vector = vector + total / len(USERS)
    assert np.abs(vector - start).max() > 1e-3
    return vector


ONE_BY_ONE = [(name,) for name in USERS]
CUTS = [[USERS], [USERS[:2], USERS[2:]]]


@pytest.mark.parametrize("pass_tokens", [30, 4096])
@pytest.mark.parametrize("optimizer", RATES)
def test_float64_to_nine_digits(tiny_base_folder, people, optimizer, pass_tokens):
    alone = rounds(trainer_of(tiny_base_folder, torch.float64), people, optimizer, ONE_BY_ONE)
    for chunks in CUTS:
        trainer = trainer_of(tiny_base_folder, torch.float64, pass_tokens)
        assert np.abs(rounds(trainer, people, optimizer, chunks) - alone).max() < 1e-9


@pytest.mark.parametrize("pass_tokens", [60, 4096])
@pytest.mark.parametrize("optimizer", RATES)
def test_float32(tiny_base_folder, people, optimizer, pass_tokens):
    alone = rounds(trainer_of(tiny_base_folder), people, optimizer, ONE_BY_ONE)
    for chunks in CUTS:
        difference = rounds(trainer_of(tiny_base_folder, pass_tokens=pass_tokens), people, optimizer, chunks) - alone
        if optimizer == "adam":  # a gradient near zero is a full step in either direction
            assert np.linalg.norm(difference) < 1e-3 * np.linalg.norm(alone)
        else:
            assert np.abs(difference).max() < 1e-5


@pytest.mark.parametrize("optimizer", RATES)
def test_bfloat16_by_loss(tiny_base_folder, people, optimizer):
    records = [record for own in people.values() for record in own]

    def loss(dtype, chunks):
        trainer = trainer_of(tiny_base_folder, dtype)
        vector = rounds(trainer, people, optimizer, chunks).astype(np.float32)
        scores = trainer_of(tiny_base_folder).score(records, under=(vector, trainer.layout, SCALING))
        return scores.nats.sum() / scores.tokens.sum()

    exact = loss(torch.float32, ONE_BY_ONE)
    assert loss(torch.bfloat16, [USERS]) == pytest.approx(exact, rel=0.02)
    assert loss(torch.bfloat16, ONE_BY_ONE) == pytest.approx(exact, rel=0.02)


def released(release_spec, trainer, people, name, mode, chunks):
    """Three rounds through vault, gate and the server's sum, with users cut into `chunks`; noise is left out."""
    recipe = {
        "local_steps": 2, "local_batch": 2, "learning_rate": 0.1, "optimizer": "sgd", "scaling": SCALING,
        "example_records": 4, "rank": RANK, "personal_rank": RANK, "shared_layers": 1, "proximal_weight": 0.5,
        "start_seed": 4, "ranks": "1,2", "private_noise": 0,
    }  # fmt: skip
    split = split_of(METHODS[name], trainer.layout, recipe)
    spec = release_spec(
        method=name,
        names=tuple(tensor.name for tensor in split.sent.tensors),
        shapes=tuple(tensor.shape for tensor in split.sent.tensors),
        model=trainer.base.digest,
        recipe=recipe,
        clip=CLIP,
        noise_multiplier=0.0,
        epsilon="inf",
        unit="example" if mode == "silo" else "user",
    )
    vault = Vault(
        trainer,
        {user: EncodedUser(own, (), (), by_record=True) for user, own in people.items()}.__getitem__,
        seed=4,
        states=ShortMemory(),
        rehearsal=True,
    )
    if mode == "silo":  # a rehearsal's coins go by chunk; the comparison is of the same coins
        vault._randomness = lambda assignment: _ByName(assignment.round)
    vector, velocity = split.vector_of(public_start(trainer.layout, 4)), np.zeros(split.sent.size, np.float32)
    start = vector
    for number in range(1, ROUNDS + 1):
        total = RunningSum(spec, number)
        for chunk in chunks:
            assert total.add(vault.train(Assignment(spec, number, chunk, vector)), len(chunk))
        vector, velocity = ServerStep(1.0, 0.0).apply(vector, velocity, total.total / len(USERS))
        vector = cut_to_rank(vector, split.sent, RANK)
    assert np.abs(vector - start).max() > 1e-4
    return vector


class _ByName:
    """Randomness whose children depend on the user and the round, not on who else is in the chunk."""

    def __init__(self, number):
        self._number = number

    def child(self, name):
        from common.privacy import Randomness

        return Randomness.rehearsal(5, self._number, name)


@pytest.mark.parametrize("mode", ["crowd", "silo"])
@pytest.mark.parametrize("name", [name for name, row in METHODS.items() if row.shared])
def test_every_method_in_both_modes(release_spec, tiny_base_folder, people, name, mode):
    alone = released(release_spec, trainer_of(tiny_base_folder), people, name, mode, ONE_BY_ONE)
    for chunks, pass_tokens in ((CUTS[0], 4096), (CUTS[1], 50)):
        trainer = trainer_of(tiny_base_folder, pass_tokens=pass_tokens)
        together = released(release_spec, trainer, people, name, mode, chunks)
        np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


def test_users_with_few_steps_leave_the_stack_and_the_others_go_on(tiny_base_folder, people):
    trainer = trainer_of(tiny_base_folder, torch.float64)
    start = np.zeros(trainer.layout.size, np.float32) + 0.05
    steps = [1, 7, 3, 7, 2]
    recipe = Recipe(1, 2, 0.02, "adam")
    seen = []
    real = trainer._gradient
    trainer._gradient = lambda rows, owner, theta: seen.append(len(theta)) or real(rows, owner, theta)
    together = trainer.fit(start, list(people.values()), recipe, _orders(), steps=steps)
    assert seen == [5, 4, 3, 2, 2, 2, 2]
    for user, own in enumerate(people.values()):
        alone = trainer.fit(start, [own], Recipe(steps[user], 2, 0.02, "adam"), [_orders()[user]])
        assert np.abs(together[user] - alone[0]).max() < 1e-9


def _orders():
    return [np.random.default_rng(user) for user in range(5)]
