"""What one process of a simulation holds: the base, the trainers, the population and the vault.

A host is opened once per process from the run's configuration; the driver and every worker open the same. Functions
here are what the driver submits to workers, so they take and return plain values.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client.app import build
from client.base_model import BaseModel, load_base
from client.secure_sums import share_randomness, sums_of_simulation
from client.trainer import Example, Recipe, Trainer
from client.user_data import Encoder
from client.vault import Vault
from common.adapters import Layout, Vector, initial_vector
from common.config import RunConfig
from common.keys import MasterKey
from common.methods import method_named
from common.places import state_home
from common.split import Split, split_of
from common.wire import ReleaseSpec
from server.run_folder import recipe_of
from simulations import grid
from simulations.planning import base_of
from simulations.population import Population, open_population
from simulations.population_states import PopulationStates

__all__ = ["Host", "client_app", "host_of", "open_host", "score_systems", "start_worker"]

STATES, RUN_FOLDER = "simulated-devices", "run-folder"
SYSTEMS = ("base", "global", "private", "both")


@dataclass(frozen=True)
class Host:
    """An opened simulation in one process.

    Attributes:
        config: The run's configuration.
        base: The frozen base.
        trainer: Trains the shared adapter.
        personal: Trains private adapters, which may have another rank.
        over: Trains, or at least scores, what methods keep over the shared adapter, which may have yet another.
        population: The users.
        vault: The door to all of them.
        split: What the method means for the tensors of this base.
    """

    config: RunConfig
    base: BaseModel
    trainer: Trainer
    personal: Trainer
    over: Trainer
    population: Population
    vault: Vault
    split: Split

    @property
    def recipe(self) -> Recipe:
        """How private adapters are trained."""
        return Recipe(
            steps=self.config.personal_steps,
            batch=self.config.personal_batch,
            learning_rate=self.config.personal_learning_rate,
            optimizer="adam",
        )

    def shared_adapter(self, vector: Vector) -> tuple[Vector, Layout, float]:
        """What the server sent, as an adapter that can be laid over the base: vector, layout, scaling."""
        return self.split.adapter(vector), self.trainer.layout, self.trainer.scaling

    @property
    def personal_start(self) -> Vector:
        """Where every private adapter starts."""
        return initial_vector(self.personal.layout, np.random.default_rng([self.config.seed, 0x9E50]))


def note_run(run: str, path: Path) -> None:
    """Write down which run folder the simulated devices of `run` belong to."""
    folder = state_home() / STATES / run
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / RUN_FOLDER).write_text(str(path.resolve()), encoding="utf-8")


def forget_removed_runs() -> None:
    """Remove what simulated devices keep for runs whose folder was removed."""
    for note in (state_home() / STATES).glob(f"*/{RUN_FOLDER}"):
        if not Path(note.read_text(encoding="utf-8")).exists():
            shutil.rmtree(note.parent, ignore_errors=True)


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
    split = split_of(method_named(config.method), trainer.layout, recipe_of(config))
    over = personal if split.over_rank is None else trainer.at_rank(split.over_rank)
    sums = None
    if config.secagg == "full":
        everybody = [str(number) for number in range(len(users))]
        sums = sums_of_simulation(everybody, share_randomness(config.seed if config.rehearsal else None))
    vault = Vault(
        trainer, users.encoded, seed=config.seed, rehearsal=config.rehearsal, sums=sums, states=simulated_states()
    )
    return Host(config, base, trainer, personal, over, users, vault, split)


def simulated_states() -> PopulationStates:
    """Where simulated devices keep what methods keep from round to round: sealed, beside the keys of this machine."""
    return PopulationStates(state_home() / STATES, MasterKey.open(state_home() / "keys").subkey("simulated devices"))


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
    text: str, users: Sequence[str], vector: Vector | None, systems: Sequence[str], spec: str | None = None
) -> tuple[dict[str, list[dict[str, Any]]], NDArray[np.float32], NDArray[np.float32]]:
    """Personalize `users` over the shared `vector` and score the asked systems on their validation and test records.

    Args:
        text: The run's configuration as TOML.
        users: Whom.
        vector: What the server sent last; None where nothing is shared.
        systems: Which of `SYSTEMS`.
        spec: The run's release spec as text, where its method keeps something from round to round.

    Returns:
        For each system one row per user and part, and the private adapters, alone and over the shared one; each of
        shape `(users, size)`.
    """
    host = open_host(text)
    people = [host.population.encoded(name) for name in users]
    nothing = (np.zeros(host.trainer.layout.size, np.float32), host.trainer.layout, host.trainer.scaling)
    shared = nothing if vector is None else host.shared_adapter(vector)
    remembering = vector is not None and spec is not None and host.split.method.remembers
    personal = host.vault.personalize(
        users,
        vector if vector is not None and remembering else shared[0],
        host.personal_start,
        host.recipe,
        host.personal,
        spec=ReleaseSpec.from_text(spec) if spec is not None and remembering else None,
    )
    rows: dict[str, list[dict[str, Any]]] = {}
    for system in systems:
        under = shared if system in ("global", "both") else None
        adapters = {"private": personal.alone, "both": personal.over_global}.get(system)
        trainer = {"private": host.personal, "both": host.over}.get(system, host.trainer)
        rows[system] = []
        for part in ("validation", "test"):
            records = [getattr(own, part) for own in people]
            rows[system] += _score_part(trainer, users, records, part, adapters, under)
    return rows, personal.alone, personal.over_global


def score_shared(text: str, users: Sequence[str], vector: Vector) -> NDArray[np.float64]:
    """Score base and global on the validation records of `users`; returns nats of both and the tokens, shape `(3,)`."""
    host = open_host(text)
    records = [record for name in users for record in host.population.encoded(name).validation]
    with_global = host.trainer.score(records, under=host.shared_adapter(vector))
    return np.array([_base_nats(text, tuple(users)), with_global.nats.sum(), with_global.tokens.sum()])


@lru_cache(maxsize=64)
def _base_nats(text: str, users: tuple[str, ...]) -> float:
    """The base does not move: it is scored once per process and sample."""
    host = open_host(text)
    records = [record for name in users for record in host.population.encoded(name).validation]
    return float(host.trainer.score(records).nats.sum())


def _score_part(
    trainer: Trainer,
    users: Sequence[str],
    records: Sequence[Sequence[Example]],
    part: str,
    adapters: NDArray[np.float32] | None,
    under: tuple[Vector, Layout, float] | None,
) -> list[dict[str, Any]]:
    flat = [record for own in records for record in own]
    owner = np.repeat(np.arange(len(users)), [len(own) for own in records])
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
