"""A run to test with: a base that is only the headers of its files, and nodes whose vaults are a few lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from client.app import build as build_client
from client.gate import Gate
from common.config import RunConfig
from common.privacy import clip_rows
from server import run_folder
from server.rounds import Rounds
from simulations.grid import InProcessGrid, submit_here


def _update(name: str, number: int, vector: np.ndarray) -> np.ndarray:
    """What user `name` would send in a round, before it is clipped: not like anybody else's, and of the vector."""
    generator = np.random.default_rng([int(name, 16) % 2**32, number])
    return 0.3 * generator.normal(size=vector.size) - 0.1 * vector.astype(np.float64)


class PlainVault:
    """The production seam: answers as a vault does, without a model."""

    def __init__(self, residents: tuple[str, ...] = ()) -> None:
        self.residents, self.seen = residents, []

    def subjects(self):
        return list(self.residents)

    def train(self, assignment):
        self.seen.append(assignment)
        updates = np.stack([_update(name, assignment.round, assignment.vector) for name in assignment.users])
        return Gate().release(clip_rows(updates, assignment.spec.clip), assignment.spec, assignment.round)


class Nodes(InProcessGrid):
    """A grid of vaults, by node, that can misbehave as Flower's do.

    Attributes:
        away: Nodes that are offline: not listed, and Flower answers for them with an error.
        drop: Decides by message whether it is lost: nothing ever comes back.
        refuse: Decides by message whether it cannot be pushed at all.
        shuffle: Reorders replies.
    """

    def __init__(self, vaults) -> None:
        vaults = list(vaults)
        self.vaults = {node: vault for node, vault in enumerate(vaults, start=2)}
        super().__init__(
            submit_here(build_client(lambda context: self.vaults[context.node_id]), len(vaults)), len(vaults)
        )
        self.away: set[int] = set()
        self.drop: Callable = lambda _: False
        self.refuse: Callable = lambda _: False
        self.shuffle: Callable = lambda replies: replies
        self._lost: set[str] = set()
        self._errors: dict[str, object] = {}

    def get_node_ids(self):
        return [node for node in super().get_node_ids() if node not in self.away]

    def push_messages(self, messages):
        from flwr.app import Error, Message

        identifiers = []
        for message in messages:
            identifier = message.metadata.message_id
            if self.refuse(message):
                identifiers.append(None)
                continue
            if message.metadata.dst_node_id in self.away:
                self._errors[identifier] = Message(Error(code=5, reason="Node Unavailable"), reply_to=message)
            elif self.drop(message):
                self._lost.add(identifier)
            else:
                super().push_messages([message])
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids):
        wanted = list(message_ids)
        replies = [self._errors.pop(name) for name in wanted if name in self._errors]
        for name in [name for name in wanted if name not in self._lost]:
            replies += super().pull_messages([name])
        return self.shuffle(replies)


@dataclass
class Prepared:
    """A prepared run, which can be opened as often as a server would be started."""

    path: Path
    finished: list = field(default_factory=list)

    def run(self, grid, *, stop_after: int | None = None):
        """Start the server on the run and let it go on; returns its last durable state."""
        opened = run_folder.reopen(self.path)

        def on_round(finished):
            self.finished.append(finished)
            return finished.number == stop_after

        try:
            rounds = Rounds(opened.config, opened.spec, opened.layout, opened.start, opened.path, opened.ledger)
            return rounds.run(grid, on_round)
        finally:
            opened.ledger.close()

    @property
    def spec(self):
        opened = run_folder.reopen(self.path)
        opened.ledger.close()
        return opened.spec

    def kinds(self) -> list[str]:
        opened = run_folder.reopen(self.path)
        opened.ledger.close()
        return [entry.kind for entry in opened.ledger.entries()]

    def debits(self) -> int:
        return self.kinds().count("debit")


@pytest.fixture(scope="session")
def paper_base(tmp_path_factory) -> Path:
    """A base of which a server needs nothing but the headers: one layer, two targets."""
    from safetensors.numpy import save_file

    folder = tmp_path_factory.mktemp("paper-base")
    names = [f"model.layers.0.self_attn.{target}.weight" for target in ("q_proj", "v_proj")]
    save_file({name: np.zeros((4, 6), np.float32) for name in names}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def settings() -> dict:
    """A rehearsal without a promise: twelve users, half of them in a round, no noise."""
    return {"rounds": 3, "cohort": 6, "users": 12, "epsilon": float("inf"), "rehearsal": True, "chunk": 2, "seed": 4}


@pytest.fixture
def prepare(tmp_path, paper_base, settings, monkeypatch):
    """A function `(**changes) -> Prepared`; `population` users."""
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))

    def prepare(name="run", **changes) -> Prepared:
        config = RunConfig(**(settings | {"model": str(paper_base)} | changes))
        opened = run_folder.create(
            tmp_path / name,
            config,
            population=config.users,
            model=paper_base,
            digest="cd" * 32,
            data="ef" * 32,
        )
        opened.ledger.close()
        return Prepared(tmp_path / name)

    return prepare


@pytest.fixture
def simulated():
    """A function `(nodes) -> Nodes` that take anyone."""
    return lambda nodes=2: Nodes(PlainVault() for _ in range(nodes))


@pytest.fixture
def devices():
    """A function `(count) -> Nodes`, one subject on each."""
    return lambda count: Nodes(PlainVault((f"{index:032x}",)) for index in range(1, count + 1))


@pytest.fixture(scope="session")
def update_of():
    """A function `(name, round, vector)`: what a user of these nodes sends before it is clipped."""
    return _update


@pytest.fixture(scope="session")
def plain_vault():
    """The vault of these nodes, to be made worse."""
    return PlainVault


@pytest.fixture(scope="session")
def nodes():
    """A function `(vaults) -> Nodes`."""
    return Nodes
