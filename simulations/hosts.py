"""What one process of a simulation holds: the base, the trainers, the population and the vault.

A host is opened once per process from the run's configuration; the driver and every worker open the same. Functions
here are what the driver submits to workers, so they take and return plain values.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from client.app import build
from client.base_model import BaseModel, load_base
from client.pass_size import known_pass_tokens
from client.personalization.levels import Personal
from client.secure_sums import share_randomness, sums_of_simulation
from client.shared_weights import share_weights
from client.trainer import Recipe, Trainer
from client.user_data import Encoder
from client.vault import Vault
from common.adapters import Layout, Vector, initial_vector
from common.config import BUILT_IN, RunConfig
from common.keys import MasterKey
from common.places import state_home
from common.split import Split, split_of
from common.wire import ReleaseSpec
from server.run_folder import recipe_of
from simulations import grid
from simulations.absence import PatchyVault, is_patchy
from simulations.levels import InContext, LevelScores, score_levels
from simulations.outside import method_of
from simulations.planning import base_of
from simulations.population import Population, open_population
from simulations.population_states import PopulationStates

__all__ = ["Host", "client_app", "fit_pooled", "host_of", "open_host", "personalized", "score_systems"]

STATES, RUN_FOLDER = "simulated-devices", "run-folder"

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
    base = load_base(base_of(config), config.targets, device=device, precision=config.base_precision)
    share_weights(base.model, base.folder)
    trainer = Trainer(base, rank=config.rank, scaling=config.scaling)
    if not config.rehearsal:  # which repeats itself on any machine
        trainer.pass_tokens = known_pass_tokens(trainer) or trainer.pass_tokens
    personal = trainer.at_rank(config.personal_rank or config.rank)
    users = population or open_population(config, Encoder(base.tokenizer, config.max_tokens))
    split = split_of(method_of(config), trainer.layout, recipe_of(config))
    over = personal if split.over_rank is None else trainer.at_rank(split.over_rank)
    sums = None
    if config.secagg == "full":
        everybody = [str(number) for number in range(len(users))]
        sums = sums_of_simulation(everybody, share_randomness(config.seed if config.rehearsal else None))
    vault = Vault(
        trainer,
        users.encoded,
        seed=config.seed,
        rehearsal=config.rehearsal,
        sums=sums,
        states=simulated_states(),
        in_context=InContext(users, base, config.context_tokens),
    )
    return Host(config, base, trainer, personal, over, users, vault, split)


def simulated_states() -> PopulationStates:
    """Where simulated devices keep what methods keep from round to round: sealed, beside the keys of this machine."""
    return PopulationStates(state_home() / STATES, MasterKey.open(state_home() / "keys").subkey("simulated devices"))


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

    def __call__(self, context: Context) -> Vault | PatchyVault:  # noqa: ARG002 - one vault serves every node
        host = open_host(self._text)
        return PatchyVault(host.vault, host.config) if is_patchy(host.config) else host.vault


def score_systems(
    text: str, users: Sequence[str], vector: Vector | None, pooled: Vector | None = None, spec: str | None = None
) -> tuple[LevelScores, dict[str, NDArray[np.float32]]]:
    """Personalize `users` over the shared `vector` and score every system on their validation and test records.

    Args:
        text: The run's configuration as TOML.
        users: Whom.
        vector: What the server sent last; None where nothing is shared.
        pooled: An adapter that was trained on users' pooled records, where there is one.
        spec: The run's release spec as text, where its method keeps something from round to round.

    Returns:
        What every system is worth to them, and the private adapters by the names they are kept under, each of shape
        `(users, size)`.
    """
    return personalized(open_host(text), users, vector, pooled, spec)


def personalized(
    host: Host, users: Sequence[str], vector: Vector | None, pooled: Vector | None = None, spec: str | None = None
) -> tuple[LevelScores, dict[str, NDArray[np.float32]]]:
    """As `score_systems`, for the users of an opened simulation; who has no training record gets no adapter."""
    nothing = (np.zeros(host.trainer.layout.size, np.float32), host.trainer.layout, host.trainer.scaling)
    shared = nothing if vector is None else host.shared_adapter(vector)
    under = None if vector is None else shared
    personal = Personal(under, None, None, host.personal, host.over)
    if host.split.method.private and all(host.population.encoded(name).train for name in users):
        remembering = vector is not None and spec is not None and host.split.method.remembers
        own = host.vault.personalize(
            users,
            vector if vector is not None and remembering else shared[0],
            host.personal_start,
            host.recipe,
            host.personal,
            spec=ReleaseSpec.from_text(spec) if spec is not None and remembering else None,
        )
        over = None if vector is None else own.over_global
        # Who was in no round, a newcomer, has an adapter trained afterwards, whatever the method keeps in rounds.
        personal = Personal(under, own.alone, over, host.personal, host.over if remembering else host.personal)
    found = score_levels(host, users, personal, pooled)
    adapters = {ALONE: personal.alone, OVER_GLOBAL: personal.over, WITH_RETRIEVAL: found.with_retrieval}
    return found, {name: vectors for name, vectors in adapters.items() if vectors is not None}


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
    with_global = host.trainer.score(records, under=host.shared_adapter(vector))
    return np.array([_base_nats(text, tuple(users)), with_global.nats.sum(), with_global.tokens.sum()])


@lru_cache(maxsize=64)
def _base_nats(text: str, users: tuple[str, ...]) -> float:
    """The base does not move: it is scored once per process and sample."""
    host = open_host(text)
    records = [record for name in users for record in host.population.encoded(name).validation]
    return float(host.trainer.score(records).nats.sum())
