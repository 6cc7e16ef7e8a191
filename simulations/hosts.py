"""What one process of a simulation holds: the base, the trainers, the population and the vault.

A host is opened once per process from the run's configuration; the driver and every worker open the same. Functions
here are what the driver submits to workers, so they take and return plain values.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client.app import build
from client.base_model import BaseModel, load_base
from client.trainer import Recipe, Trainer
from client.user_data import Encoder
from client.vault import Vault
from common.adapters import Vector, initial_vector
from common.config import BUILT_IN, RunConfig
from common.methods import method_named
from simulations import grid
from simulations.levels import Personal, score_levels
from simulations.planning import base_of
from simulations.population import Population, open_population

__all__ = ["Host", "client_app", "fit_pooled", "host_of", "open_host", "score_systems", "start_worker"]

ALONE, OVER_GLOBAL, WITH_RETRIEVAL = "alone", "over-global", "with-retrieval"
"""Names under which a user's private adapters are kept."""

POOLED_STEPS, POOLED_BATCH, POOLED_USERS = 60, 64, 1_000


@dataclass(frozen=True)
class Host:
    """An opened simulation in one process.

    Attributes:
        config: The run's configuration.
        base: The frozen base.
        trainer: Trains the shared adapter.
        personal: Trains private adapters, which may have another rank.
        population: The users.
        vault: The door to all of them.
    """

    config: RunConfig
    base: BaseModel
    trainer: Trainer
    personal: Trainer
    population: Population
    vault: Vault

    @property
    def recipe(self) -> Recipe:
        """How private adapters are trained."""
        return Recipe(
            steps=self.config.personal_steps,
            batch=self.config.personal_batch,
            learning_rate=self.config.personal_learning_rate,
            optimizer="adam",
        )

    @property
    def personal_start(self) -> Vector:
        """Where every private adapter starts."""
        return initial_vector(self.personal.layout, np.random.default_rng([self.config.seed, 0x9E50]))


@lru_cache(maxsize=4)
def open_host(text: str) -> Host:
    """Open the simulation of a configuration, given as TOML text so that processes agree on it; once per process."""
    import tomllib

    return host_of(RunConfig.model_validate(tomllib.loads(text)))


def host_of(config: RunConfig, population: Population | None = None) -> Host:
    """Open the base, the trainers and the population of `config`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    base = load_base(base_of(config), config.targets, device=device)
    trainer = Trainer(base, rank=config.rank, scaling=config.scaling)
    personal = Trainer(base, rank=config.personal_rank or config.rank, scaling=config.scaling)
    users = population or open_population(config, Encoder(base.tokenizer, config.max_tokens))
    vault = Vault(trainer, users.encoded, seed=config.seed, rehearsal=config.rehearsal)
    return Host(config, base, trainer, personal, users, vault)


def start_worker(text: str, threads: int) -> None:
    """Prepare a worker process: its own threads, no say in Ctrl-C, and the host opened ahead of the first message."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    open_host(text)


def client_app(text: str) -> ClientApp:
    """The app of every simulated node; it can be pickled, and opens the host where it is called."""
    return build(_Connect(text))


def answer_message(text: str, message: Message, nodes: int) -> Message:
    """Answer one Flower message as a simulated node."""
    return grid.answer(client_app(text), message, nodes)


class _Connect:
    """Reaches the vault of a simulation in whatever process it is called."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __call__(self, context: Context) -> Vault:  # noqa: ARG002 - one vault serves every node
        return open_host(self._text).vault


def score_systems(
    text: str, users: Sequence[str], vector: Vector | None, pooled: Vector | None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, NDArray[np.float32]]]:
    """Personalize `users` over the shared `vector` and score every system on their validation and test records.

    Args:
        text: The run's configuration.
        users: Some users.
        vector: The shared adapter, where there is one.
        pooled: An adapter that was trained on users' pooled records, where there is one.

    Returns:
        For each system one row per user and part; and the private adapters by the names they are kept under, each of
        shape `(users, size)`.
    """
    host = open_host(text)
    method = method_named(host.config.method)
    zero = np.zeros(host.trainer.layout.size, np.float32)
    shared = zero if vector is None else vector
    under = None if vector is None else (shared, host.trainer.layout, host.trainer.scaling)
    personal = Personal(under, None, None, host.personal, host.personal, pooled)
    if method.private:
        own = host.vault.personalize(users, shared, host.personal_start, host.recipe, host.personal)
        over = None if vector is None else own.over_global
        personal = Personal(under, own.alone, over, host.personal, host.personal, pooled)
    rows, with_retrieval = score_levels(host, users, personal)
    adapters = {ALONE: personal.alone, OVER_GLOBAL: personal.over, WITH_RETRIEVAL: with_retrieval}
    return rows, {name: vectors for name, vectors in adapters.items() if vectors is not None}


def fit_pooled(text: str) -> Vector | None:
    """Train one adapter on the records of many users together, without privacy: what pooling them would allow.

    None where the configuration wants none.
    """
    host = open_host(text)
    steps = host.config.pooled_steps
    if steps is None:
        steps = POOLED_STEPS if host.config.data == BUILT_IN else 0
    if steps == 0:
        return None
    names = [str(number) for number in range(min(len(host.population), POOLED_USERS))]
    records = [record for name in names for record in host.population.encoded(name).train]
    recipe = Recipe(steps=steps, batch=min(POOLED_BATCH, len(records)), learning_rate=5e-3, optimizer="adam")
    start = initial_vector(host.trainer.layout, np.random.default_rng([host.config.seed, 0x5EED]))
    return host.trainer.fit(start, [records], recipe, [np.random.default_rng([host.config.seed, 0x9001])])[0]


def score_shared(text: str, users: Sequence[str], vector: Vector) -> NDArray[np.float64]:
    """Score base and global on the validation records of `users`; returns nats of both and the tokens, shape `(3,)`."""
    host = open_host(text)
    records = [record for name in users for record in host.population.encoded(name).validation]
    under = (vector, host.trainer.layout, host.trainer.scaling)
    with_global = host.trainer.score(records, under=under)
    return np.array([_base_nats(text, tuple(users)), with_global.nats.sum(), with_global.tokens.sum()])


@lru_cache(maxsize=64)
def _base_nats(text: str, users: tuple[str, ...]) -> float:
    """The base does not move: it is scored once per process and sample."""
    host = open_host(text)
    records = [record for name in users for record in host.population.encoded(name).validation]
    return float(host.trainer.score(records).nats.sum())
