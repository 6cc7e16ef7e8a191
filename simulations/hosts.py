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
from client.trainer import Example, Recipe, Trainer
from client.user_data import Encoder
from client.vault import Vault
from common.adapters import Layout, Vector, initial_vector
from common.config import RunConfig
from simulations import grid
from simulations.planning import base_of
from simulations.population import Population, open_population

__all__ = ["Host", "client_app", "host_of", "open_host", "score_systems", "start_worker"]

SYSTEMS = ("base", "global", "private", "both")


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
    text: str, users: Sequence[str], vector: Vector | None, systems: Sequence[str]
) -> tuple[dict[str, list[dict[str, Any]]], NDArray[np.float32], NDArray[np.float32]]:
    """Personalize `users` over the shared `vector` and score the asked systems on their validation and test records.

    Returns:
        For each system one row per user and part, and the private adapters, alone and over the shared one; each of
        shape `(users, size)`.
    """
    host = open_host(text)
    people = [host.population.encoded(name) for name in users]
    zero = np.zeros(host.trainer.layout.size, np.float32)
    shared = zero if vector is None else vector
    personal = host.vault.personalize(users, shared, host.personal_start, host.recipe, host.personal)
    rows: dict[str, list[dict[str, Any]]] = {}
    for system in systems:
        under = (shared, host.trainer.layout, host.trainer.scaling) if system in ("global", "both") else None
        adapters = {"private": personal.alone, "both": personal.over_global}.get(system)
        rows[system] = []
        for part in ("validation", "test"):
            rows[system] += _score_part(host, users, [getattr(own, part) for own in people], part, adapters, under)
    return rows, personal.alone, personal.over_global


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


def _score_part(
    host: Host,
    users: Sequence[str],
    records: Sequence[Sequence[Example]],
    part: str,
    adapters: NDArray[np.float32] | None,
    under: tuple[Vector, Layout, float] | None,
) -> list[dict[str, Any]]:
    flat = [record for own in records for record in own]
    owner = np.repeat(np.arange(len(users)), [len(own) for own in records])
    trainer = host.trainer if adapters is None else host.personal
    scores = trainer.score(flat, adapters=adapters, owner=owner if adapters is not None else None, under=under)
    rows: list[dict[str, Any]] = []
    for index, name in enumerate(users):
        own = owner == index
        tokens = int(scores.tokens[own].sum())
        rows.append(
            {
                "user": name,
                "split": part,
                "nats_per_token": float(scores.nats[own].sum() / max(tokens, 1)),
                "accuracy": float(scores.correct[own].sum() / max(tokens, 1)),
                "exact": float(scores.exact[own].mean()) if own.any() else 0.0,
                "tokens": tokens,
                "records": int(own.sum()),
            }
        )
    return rows
