"""The part of the vault that trains: a child of the resident vault, started for work and gone when there is none.

Opening torch and a model takes hundreds of megabytes that an idle device should have back, and training should not
make the resident part slow. So the model lives here. The door does too: what goes back to the parent has been checked,
debited and written down as if it left the device.

Parent and child speak over an inherited socket, in messages of a JSON line and bytes; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.learned_store import ADAPTERS
from common.adapters import Layout, initial_vector, lora_layout
from common.config import RunConfig
from common.errors import ConfigError, HomespunError, Refusal
from common.model_files import linear_modules, model_digest, precision_of
from common.wire import Assignment, ReleaseSpec, canonical, from_raw_bytes, raw_bytes

if TYPE_CHECKING:
    from client.budget_keeper import BudgetKeeper
    from client.device_home import DeviceHome
    from client.preflight import Preflight
    from client.trainer import Trainer
    from client.user_data import User

__all__ = ["ADAPTERS", "Message", "main", "receive", "send", "shape_of"]

LARGEST_RANK = 256
MOST_TOKENS = 4096
DEFAULT_TOKENS = 64
NICE = 10
SAVE_SECONDS = 5.0
"""How far apart checkpoints of a round's training are; HOMESPUN_CHECKPOINT_SECONDS says otherwise."""


@dataclass(frozen=True)
class Message:
    """One message between parent and child."""

    facts: dict[str, Any]
    content: bytes = b""


def send(connection: Connection, message: Message) -> None:
    """Send a message."""
    connection.send_bytes(canonical(message.facts) + b"\n" + message.content)


def receive(connection: Connection) -> Message:
    """Wait for a message.

    Raises:
        EOFError: The other end is gone.
    """
    head, _, content = connection.recv_bytes().partition(b"\n")
    return Message(json.loads(head), content)


@dataclass(frozen=True)
class AdapterShape:
    """Which adapter a run trains: on which layers, of which rank, scaled how, on records cut where."""

    targets: tuple[str, ...]
    rank: int
    scaling: float
    max_tokens: int


def shape_of(spec: ReleaseSpec, model: Path) -> tuple[AdapterShape, Layout]:
    """Read from a spec which adapter it is about, and lay that adapter out on this device's own base.

    The vault compares the spec's tensors with those that its method shares of this layout: a spec that names another
    tensor, a private one among them, is refused there.

    Raises:
        Refusal: It names no adapter, or one that is larger than any run needs.
    """
    scaling, tokens = spec.recipe.get("scaling"), spec.recipe.get("max_tokens", DEFAULT_TOKENS)
    ranks, targets = set[int](), set[str]()
    for name, shape in zip(spec.names, spec.shapes, strict=True):
        module, found, factor = name.partition(".lora_")
        if not found or len(shape) != 2:
            raise Refusal("layout-mismatch", "the spec names a tensor that is none of an adapter's")
        targets.add(module.rpartition(".")[2])
        if not factor.startswith("product."):
            ranks.add(shape[0] if factor.startswith("A.") else shape[1])
    rank = spec.recipe.get("rank", max(ranks, default=0))
    if not isinstance(rank, int) or ranks - {rank} or not 1 <= rank <= LARGEST_RANK:
        raise Refusal("layout-mismatch", "the spec's tensors have no rank in common, or too large a one")
    if not isinstance(scaling, int | float) or not 0 < scaling < 1e4:
        raise Refusal("layout-mismatch", "the spec scales its adapter in no sensible way")
    if not isinstance(tokens, int) or not 8 <= tokens <= MOST_TOKENS:
        raise Refusal("bad-request", "the spec cuts records at no sensible length")
    shape = AdapterShape(tuple(sorted(targets)), rank, float(scaling), tokens)
    try:
        return shape, lora_layout(linear_modules(model, shape.targets), shape.rank)
    except HomespunError:
        raise Refusal("layout-mismatch", "the spec names layers that the base has not") from None


class _Work:
    """Does what the parent asks, with one model open."""

    def __init__(self, home: DeviceHome, keeper: BudgetKeeper, model: Path, user: User) -> None:
        self._home = home
        self._keeper = keeper
        self._model = model
        self._user = user
        self._opened: tuple[tuple[AdapterShape, str], Trainer, Preflight] | None = None

    def answer(self, asked: Message) -> Message:
        """Do one thing."""
        spec = ReleaseSpec.from_text(str(asked.facts["spec"]))
        vector, megabytes = from_raw_bytes(asked.content, "float32"), float(asked.facts["memory"])
        if asked.facts["do"] == "train":
            users, minutes = tuple(asked.facts["users"]), float(asked.facts["minutes"])
            return self._train(Assignment(spec, int(asked.facts["round"]), users, vector), minutes, megabytes)
        return self._personalize(spec, int(asked.facts["round"]), vector, megabytes)

    def _open(self, spec: ReleaseSpec, megabytes: float) -> tuple[AdapterShape, Trainer, Preflight]:
        shape, _ = shape_of(spec, self._model)
        precision = precision_of(spec.model, model_digest(self._model))
        if precision is None:
            raise Refusal("model-mismatch", "the run is for another base model than the one that lies here")
        if self._opened is None or self._opened[0] != (shape, precision):
            from client.base_model import load_base
            from client.memory_plan import MemoryPlan
            from client.preflight import Preflight
            from client.trainer import Trainer

            self._opened = None
            plan = MemoryPlan.of(self._model, precision, megabytes)
            try:
                base = load_base(self._model, shape.targets, precision=precision)
            except ConfigError:
                raise Refusal("layout-mismatch", "the spec names layers that can carry no adapter") from None
            trainer = Trainer(base, rank=shape.rank, scaling=shape.scaling, pass_tokens=plan.pass_tokens)
            plan.apply(base)
            self._opened = (shape, precision), trainer, Preflight(trainer)
        _, trainer, preflight = self._opened
        return shape, trainer, preflight

    def _encoded(self, trainer: Trainer, tokens: int) -> Any:
        from client.user_data import Encoder
        from client.vault import encode_user

        silo = self._home.policy().units == ("example",)  # a party, whose records are split one by one
        return encode_user(self._user, Encoder(trainer.base.tokenizer, tokens), by_record=silo)

    def _train(self, assignment: Assignment, minutes: float, megabytes: float) -> Message:
        from client.gate import Gate
        from client.round_progress import RoundProgress
        from client.round_states import StoredStates
        from client.vault import Vault

        began = time.monotonic()
        spec, subject = assignment.spec, self._keeper.subject
        self._keeper.check(spec, assignment.round)  # before a model is opened for nothing
        shape, trainer, preflight = self._open(spec, megabytes)

        def grants(asked: ReleaseSpec, round_number: int) -> None:
            self._keeper.check(asked, round_number)
            preflight.check(asked)

        left = 60.0 * minutes - (time.monotonic() - began)
        save = float(os.environ.get("HOMESPUN_CHECKPOINT_SECONDS", SAVE_SECONDS))
        progress = RoundProgress(self._home.open_kept, subject, trainer.base.digest, seconds=left, save_seconds=save)
        vault = Vault(
            trainer,
            {subject: self._encoded(trainer, shape.max_tokens)}.__getitem__,
            seed=int.from_bytes(self._home.master.subkey("training-order")[:8]) >> 1,
            residents=[subject],
            gate=Gate(self._keeper.record, keep=self._keeper.keep),
            grants=grants,
            states=StoredStates(self._home.open_kept, trainer.base.digest),
            progress=progress,
        )
        release = vault.train(assignment)
        facts: dict[str, Any] = {
            "dtype": str(release.total.dtype),
            "users": release.users,
            "receipt": release.receipt,
            "cut": list(progress.cut) if progress.cut is not None else [],
        }
        return Message(facts, raw_bytes(release.total))

    def _personalize(self, spec: ReleaseSpec, number: int, vector: NDArray[np.float32], megabytes: float) -> Message:
        """Train the private adapter over the newest global one, and say what each is worth on the owner's own records.

        Nothing of this leaves the device, and it costs no budget.
        """
        from client.adapter_store import AdapterStore, pack_vectors
        from client.round_states import StoredStates
        from client.trainer import Recipe
        from client.vault import Vault
        from common.methods import METHODS
        from common.split import split_of

        if spec.method not in METHODS:
            raise Refusal("bad-request", "the spec names a method that is not known here")
        shape, trainer, _ = self._open(spec, megabytes)
        try:
            split = split_of(METHODS[spec.method], trainer.layout, spec.recipe)
            rank = int(spec.recipe.get("personal_rank", shape.rank))
        except (ConfigError, ValueError, TypeError, KeyError, OverflowError):
            raise Refusal("bad-request", "the recipe does not say what its method needs") from None
        if spec.names != tuple(tensor.name for tensor in split.sent.tensors) or vector.shape != (split.sent.size,):
            raise Refusal("layout-mismatch", "the global adapter is of another layout")
        if not np.isfinite(vector).all() or not 1 <= rank <= LARGEST_RANK:
            raise Refusal("bad-request", "the global adapter is not finite, or the private one too large")
        own, subject = self._encoded(trainer, shape.max_tokens), self._keeper.subject
        seed = int.from_bytes(self._home.master.subkey("training-order")[:8]) >> 1
        states = StoredStates(self._home.open_kept, trainer.base.digest)
        vault = Vault(trainer, {subject: own}.__getitem__, seed=seed, residents=[subject], states=states)
        fields = RunConfig.model_fields
        recipe = Recipe(
            steps=fields["personal_steps"].default,
            batch=fields["personal_batch"].default,
            learning_rate=fields["personal_learning_rate"].default,
            optimizer="adam",
        )
        personal = trainer if rank == shape.rank else trainer.at_rank(rank)
        start = initial_vector(personal.layout, np.random.default_rng([seed, 0x5EED]))
        found = vault.personalize([subject], vector, start, recipe, personal, spec=spec)
        over = personal if split.over_rank is None else trainer.at_rank(split.over_rank)
        shared = (split.adapter(vector), trainer.layout, trainer.scaling)
        losses = {
            "base": _loss(trainer, own.validation),
            "global": _loss(trainer, own.validation, under=shared),
            "private": _loss(personal, own.validation, adapter=found.alone),
            "both": _loss(over, own.validation, adapter=found.over_global, under=shared),
        }
        with AdapterStore(self._home.folder / ADAPTERS, self._home.master.subkey("adapters")) as store:
            note = json.dumps(
                {
                    "run": spec.run,
                    "round": number,
                    "targets": shape.targets,
                    "rank": shape.rank,
                    "rank_alone": rank,
                    "rank_over_global": over.layout.tensors[0].shape[0],
                    "scaling": shape.scaling,
                }
            )
            base = trainer.base.digest
            store.put(subject, "global", pack_vectors({"vector": shared[0]}), base_digest=base, version_note=note)
            vectors = {"alone": found.alone[0], "over_global": found.over_global[0]}
            store.put(subject, "private", pack_vectors(vectors), base_digest=base, version_note=note)
        return Message({"round": number, "run": spec.run, "losses": losses if own.validation else {}})


def _loss(
    trainer: Trainer,
    records: Any,
    *,
    adapter: NDArray[np.float32] | None = None,
    under: tuple[NDArray[np.float32], Layout, float] | None = None,
) -> float:
    """Loss on the owner's validation records in nats per token; 0 where there are too few to set some aside."""
    if not records:
        return 0.0
    owner = None if adapter is None else np.zeros(len(records), dtype=np.intp)
    scores = trainer.score(records, adapters=adapter, owner=owner, under=under)
    return float(scores.nats.sum() / max(1, scores.tokens.sum()))


def main() -> None:
    """Serve the parent on the descriptor that it names, until it closes it."""
    from client.budget_keeper import BudgetKeeper
    from client.cli import read_user
    from client.device_home import DeviceHome

    connection = Connection(int(sys.argv[1]))
    begin = receive(connection).facts
    import torch

    torch.set_num_threads(int(begin["threads"]))
    home = DeviceHome.open(Path(begin["home"]))
    with home.open_ledger() as ledger:
        work = _Work(
            home, BudgetKeeper(home, ledger), Path(begin["model"]), read_user(Path(begin["data"]), begin["user"])
        )
        send(connection, Message({"ready": True}))
        os.nice(NICE)  # from here on; a busy machine would not let it begin otherwise
        while True:
            try:
                asked = receive(connection)
            except EOFError:
                return
            try:
                answer = work.answer(asked)
            except Refusal as refusal:
                answer = Message({"refusal": refusal.code, "reason": str(refusal)})
            except Exception as error:  # whatever it is, its text may hold records
                answer = Message({"refusal": "failed", "reason": f"{type(error).__name__} at {_place_of(error)}"})
            send(connection, answer)


def _place_of(error: Exception) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "nowhere"
