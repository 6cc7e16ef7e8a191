"""A simulated user's own models after a run: taken away as PEFT folders, and talked to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from client.adapter_store import AdapterStore, NewVersion, pack_vectors, unpack_vectors
from common.adapters import Layout, Vector, concatenate, write_peft
from common.config import load_config, read_config_file
from common.errors import DataError
from common.keys import MasterKey
from common.places import state_home
from server import run_folder
from server.checkpoint import Checkpoint
from simulations import hosts
from simulations.hosts import ALONE, OVER_GLOBAL

__all__ = ["ChatSession", "export_user", "keep_adapters", "open_chat", "open_store"]

STORE = "private.sqlite"


def open_store(run: Path) -> AdapterStore:
    """Open the encrypted file of the run's private adapters; its key lies outside the run's folder."""
    return AdapterStore(run / STORE, MasterKey.open(state_home() / "keys").subkey("simulation adapters"))


def keep_adapters(
    store: AdapterStore,
    users: Sequence[str],
    name: str,
    vectors: np.ndarray[tuple[int, int], np.dtype[np.float32]],
    base: str,
) -> None:
    """Seal the private adapters of `users`, shape `(users, size)`, in one commit."""
    store.put_many(
        [
            NewVersion(user, name, pack_vectors({"vector": vector}), base)
            for user, vector in zip(users, vectors, strict=True)
        ]
    )


@dataclass(frozen=True)
class _Loaded:
    host: hosts.Host
    user: str
    shared: Vector | None
    private: dict[str, Vector]


def _load(run: Path, identifier: str) -> _Loaded:
    config = load_config(read_config_file(run / run_folder.CONFIG))
    if not (run / STORE).is_file():
        raise DataError(f"{run}: the run has kept no adapters; `homespun sim resume {run}` finishes it")
    host = hosts.host_of(config)
    user = host.population.number_of(identifier)
    with open_store(run) as store:
        names = set(store.names(user))
        private = {
            name: unpack_vectors(store.get(user, name, base_digest=host.base.digest))["vector"]
            for name in (ALONE, OVER_GLOBAL)
            if name in names
        }
    if not private and (run / "users.parquet").is_file() and host.split.method.private:
        raise DataError(
            f"user {user} is not in the evaluation sample of this run, whose adapters are kept; "
            f"--evaluation-users sets its size ({config.evaluation_users})"
        )
    shared = None
    if host.split.method.shared:
        shared = host.split.adapter(Checkpoint.load(run / run_folder.CHECKPOINT).vector)
    return _Loaded(host, user, shared, private)


def export_user(run: Path, identifier: str, target: Path) -> dict[str, Path]:
    """Write what a user has as PEFT folders under `target`.

    Each is the system of its name in the run's table: `private` was trained over the base alone, and `both` is the
    global adapter and the private one that was trained over it, in one: what the user uses.

    Raises:
        DataError: The run kept no adapter of this user, or `target` already holds something.
    """
    loaded = _load(run, identifier)
    host = loaded.host
    if target.exists() and any(target.iterdir()):
        raise DataError(f"{target}: already holds something; --out chooses another folder")
    base = str(host.base.folder)
    scaling = host.config.scaling
    folders: dict[str, Path] = {}

    def write(name: str, vector: Vector, layout: Layout, factor: float) -> None:
        folders[name] = target / name
        write_peft(folders[name], vector, layout, factor, base)

    if loaded.shared is not None:
        write("global", loaded.shared, host.trainer.layout, scaling)
    if ALONE in loaded.private:
        write("private", loaded.private[ALONE], host.personal.layout, scaling)
    if OVER_GLOBAL in loaded.private and loaded.shared is not None:
        own = (loaded.private[OVER_GLOBAL], host.over.layout, scaling)
        joined, layout = concatenate([(loaded.shared, host.trainer.layout, scaling), own])
        write("both", joined, layout, 1.0)
    return folders


class ChatSession:
    """Answers a prompt with every model that a user has.

    Attributes:
        systems: Their names.
    """

    def __init__(self, loaded: _Loaded) -> None:
        """Lay the user's adapters out, one per system."""
        host, scaling = loaded.host, loaded.host.config.scaling
        self._host, self._user = host, loaded.user
        self._adapters: dict[str, tuple[Vector, Layout, float] | None] = {"base": None}
        if loaded.shared is not None:
            self._adapters["global"] = (loaded.shared, host.trainer.layout, scaling)
        if ALONE in loaded.private:
            self._adapters["private"] = (loaded.private[ALONE], host.personal.layout, scaling)
        if OVER_GLOBAL in loaded.private and loaded.shared is not None:
            own = (loaded.private[OVER_GLOBAL], host.over.layout, scaling)
            joined, layout = concatenate([(loaded.shared, host.trainer.layout, scaling), own])
            self._adapters["both"] = (joined, layout, 1.0)
        self.systems = tuple(self._adapters)

    def examples(self, count: int) -> list[str]:
        """Prompts that this user's own test records begin with."""
        return [record.prompt for record in self._host.population.split(self._user).test if record.prompt][:count]

    def answer(self, prompt: str, tokens: int, temperature: float = 0.0) -> dict[str, str]:
        """Answer with every system, in at most `tokens` tokens each."""
        return {system: self._generate(prompt, system, tokens, temperature) for system in self.systems}

    @torch.no_grad()
    def _generate(self, prompt: str, system: str, tokens: int, temperature: float) -> str:
        encoder, tokenizer = self._host.population.encoder, self._host.base.tokenizer
        base = self._host.base
        ids = torch.from_numpy(encoder.encode_prompt(prompt).astype(np.int64))[None].to(base.device)
        ends = set(_end_tokens(base.model, tokenizer))
        with self._host.trainer.over_base(self._adapters[system]):
            made: list[int] = []
            for _ in range(tokens):
                logits = base.logits(base.hidden(ids)[:, -1])[0]
                if temperature > 0:
                    chosen = int(torch.multinomial(torch.softmax(logits / temperature, 0), 1))
                else:
                    chosen = int(logits.argmax())
                if chosen in ends:
                    break
                made.append(chosen)
                ids = torch.cat([ids, ids.new_tensor([[chosen]])], dim=1)
        return tokenizer.decode(made, skip_special_tokens=True).strip()


def open_chat(run: Path, identifier: str) -> ChatSession:
    """Open a chat with the models of one simulated user.

    Raises:
        DataError: The run kept no adapter of this user.
    """
    return ChatSession(_load(run, identifier))


def _end_tokens(model: object, tokenizer: object) -> list[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = getattr(tokenizer, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return [int(token) for token in (*listed, own) if token is not None]
