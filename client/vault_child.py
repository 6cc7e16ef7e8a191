"""The part of the vault that trains: a child of the resident vault, started for work and gone when there is none.

Opening torch and a model takes hundreds of megabytes that an idle device should have back, and training should not
make the resident part slow. So the model lives here. The door does too: what goes back to the parent has been checked,
debited and written down as if it left the device. In a secure sum alone the door is the parent's, because the round's
secrets outlive this process (`client.joined_sums`): the clipped update goes there, and the debit is written here.

Parent and child speak over an inherited socket, in messages of a JSON line and bytes; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.learned_store import ADAPTERS
from client.record_store import RecordStore
from client.refit import training_seed
from common.adapters import Layout, initial_vector, lora_layout
from common.config import RunConfig
from common.errors import ConfigError, HomespunError, Refusal
from common.model_files import linear_modules, model_digest, precision_of
from common.wire import Assignment, ReleaseSpec, canonical, from_raw_bytes, raw_bytes

if TYPE_CHECKING:
    from client.base_model import SharedBase
    from client.budget_keeper import BudgetKeeper
    from client.device_home import DeviceHome
    from client.personal_model import PersonalModel
    from client.preflight import Preflight
    from client.round_progress import RoundProgress
    from client.round_states import StoredStates
    from client.trainer import Trainer
    from client.user_data import User
    from client.vault import EncodedUser, Vault

__all__ = ["ADAPTERS", "Message", "main", "receive", "send", "shape_of"]

LARGEST_RANK = 256
MOST_TOKENS = 4096
DEFAULT_TOKENS = 64
NICE = 10
MEGABYTES_TO_ANSWER = 64.0
"""What has to be granted beyond training for the half that answers to open before it is asked something."""

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

    def __init__(
        self,
        home: DeviceHome,
        keeper: BudgetKeeper,
        shared: SharedBase,
        opened: Callable[[], None] = lambda: None,
    ) -> None:
        """Work for the owner of `home`; `opened` hears that the base is open and memory is left."""
        self._home = home
        self._tell_opened = opened
        self._keeper = keeper
        self._shared = shared
        self._records = RecordStore(home)
        self._opened: tuple[tuple[AdapterShape, str], Trainer, Preflight] | None = None
        self._until = 0.0
        self._megabytes = 0.0
        self._unchanged: Callable[[], None] = lambda: None
        self._held: tuple[str, int, Callable[[], None], Callable[[], None]] | None = None
        """Run, round, what keeps what stays, and the check that no record was removed since."""

    def answer(self, asked: Message) -> Message:
        """Do one thing."""
        spec, number = ReleaseSpec.from_text(str(asked.facts["spec"])), int(asked.facts["round"])
        task = asked.facts["do"]
        self._until = time.monotonic() + 60.0 * float(asked.facts["minutes"])
        self._megabytes = float(asked.facts["memory"])
        if task == "personalize":
            return self._personalize(spec, number, from_raw_bytes(asked.content, "float32"))
        if task == "join":
            self._keeper.note_join(spec.run, number)
            return Message({})
        if task == "record":
            return self._record(spec, number, asked)
        self._keeper.check(spec, number)  # before a model is opened for nothing
        vault, progress = self._vault(spec)
        vector = np.zeros(spec.model_dim, np.float32)
        if task != "check":
            vector = from_raw_bytes(asked.content, "float32")
        scale = float(asked.facts.get("clip_scale", 1.0))
        assignment = Assignment(spec, number, tuple(asked.facts["users"]), vector, clip_scale=scale)
        if task == "check":
            vault.check(assignment)
            return Message({})
        if task == "hold":
            clipped, keep = vault.hold(assignment)
            self._held = spec.run, number, keep, self._unchanged
            return Message({}, raw_bytes(clipped.reshape(-1)))
        release = vault.train(assignment)
        facts: dict[str, Any] = {
            "dtype": str(release.total.dtype),
            "users": release.users,
            "receipt": release.receipt,
            "cut": list(progress.cut or ()),
        }
        return Message(facts, raw_bytes(release.total))

    def _record(self, spec: ReleaseSpec, number: int, asked: Message) -> Message:
        """Keep and debit what the parent's door is about to let out; on disk when this returns."""
        receipt = dict(asked.facts["receipt"])
        held, self._held = self._held, None
        of_this = held is not None and held[:2] == (spec.run, number)
        if held is not None and of_this:
            held[3]()  # before the debit: what was trained on a record that is gone does not leave
        self._keeper.keep(receipt, from_raw_bytes(asked.content, str(receipt["dtype"])))
        self._keeper.record(spec, receipt)
        if held is not None and of_this:
            held[2]()
        return Message({})

    def _open(self, spec: ReleaseSpec) -> tuple[AdapterShape, Trainer, Preflight]:
        shape, _ = shape_of(spec, self._shared.folder)
        precision = precision_of(spec.model, model_digest(self._shared.folder))
        if precision is None:
            raise Refusal("model-mismatch", "the run is for another base model than the one that lies here")
        if self._opened is None or self._opened[0] != (shape, precision):
            from client.memory_plan import MemoryPlan
            from client.preflight import Preflight
            from client.trainer import Trainer

            self._opened = None
            plan = MemoryPlan.of(self._shared.folder, precision, self._megabytes)
            try:
                base = self._shared.model(shape.targets, precision)
            except ConfigError:
                raise Refusal("layout-mismatch", "the spec names layers that can carry no adapter") from None
            trainer = Trainer(base, rank=shape.rank, scaling=shape.scaling, pass_tokens=plan.pass_tokens)
            plan.apply(base)
            self._opened = (shape, precision), trainer, Preflight(trainer)
            if self._megabytes >= plan.megabytes + MEGABYTES_TO_ANSWER:
                self._tell_opened()
        _, trainer, preflight = self._opened
        return shape, trainer, preflight

    def _encoded(self, user: User, trainer: Trainer, tokens: int) -> EncodedUser:
        from client.user_data import Encoder
        from client.vault import encode_user

        return encode_user(user, Encoder(trainer.base.tokenizer, tokens), by_record=self._is_silo)

    @property
    def _is_silo(self) -> bool:
        """Whether this is a party, whose records are split one by one."""
        return self._home.policy().units == ("example",)

    def _owner(self) -> tuple[User, Callable[[], None]]:
        """The owner's records as they are now, and a check that none of them was removed since.

        Raises:
            Refusal: There are none.
        """
        removals, user = self._records.removals, self._records.user()
        if not user.records:
            raise Refusal("not-now", "this device was given no data to learn from")

        def check() -> None:
            if self._records.removals != removals:
                raise Refusal("not-now", "a record was removed while it was trained on")

        return user, check

    def _vault(self, spec: ReleaseSpec) -> tuple[Vault, RoundProgress]:
        from client.gate import Gate
        from client.round_progress import RoundProgress
        from client.round_states import StoredStates
        from client.vault import Vault

        shape, trainer, preflight = self._open(spec)
        owner, unchanged = self._owner()
        self._unchanged = unchanged

        def grants(asked: ReleaseSpec, round_number: int) -> None:
            self._keeper.check(asked, round_number)
            preflight.check(asked)

        def record(asked: ReleaseSpec, receipt: dict[str, Any]) -> None:
            unchanged()  # before the debit: what was trained on a record that is gone does not leave
            self._keeper.record(asked, receipt)

        digest, subject = trainer.base.digest, self._keeper.subject
        save = float(os.environ.get("HOMESPUN_CHECKPOINT_SECONDS", SAVE_SECONDS))
        left = self._until - time.monotonic()
        progress = RoundProgress(self._home.open_kept, subject, digest, seconds=left, save_seconds=save)
        vault = Vault(
            trainer,
            {subject: self._encoded(owner, trainer, shape.max_tokens)}.__getitem__,
            seed=training_seed(self._home),
            residents=[subject],
            gate=Gate(record, keep=self._keeper.keep),
            grants=grants,
            states=_Unstale(StoredStates(self._home.open_kept, digest), unchanged),
            progress=progress,
        )
        return vault, progress

    def _personalize(self, spec: ReleaseSpec, number: int, vector: NDArray[np.float32]) -> Message:
        """Train the private adapter over the newest global one, and say what each is worth on the owner's own records.

        Nothing of this leaves the device, and it costs no budget.
        """
        from client.learned_store import LearnedStore
        from client.level_store import LevelStore
        from client.refit import TAKEN_BACK, Fitted, judged, own_parts
        from client.round_states import StoredStates
        from client.trainer import Recipe
        from client.user_data import Encoder
        from client.vault import Vault
        from common.methods import METHODS
        from common.split import split_of

        if spec.method not in METHODS:
            raise Refusal("bad-request", "the spec names a method that is not known here")
        shape, trainer, _ = self._open(spec)
        try:
            split = split_of(METHODS[spec.method], trainer.layout, spec.recipe)
            rank = int(spec.recipe.get("personal_rank", shape.rank))
        except (ConfigError, ValueError, TypeError, KeyError, OverflowError):
            raise Refusal("bad-request", "the recipe does not say what its method needs") from None
        if spec.names != tuple(tensor.name for tensor in split.sent.tensors) or vector.shape != (split.sent.size,):
            raise Refusal("layout-mismatch", "the global adapter is of another layout")
        if not np.isfinite(vector).all() or not 1 <= rank <= LARGEST_RANK:
            raise Refusal("bad-request", "the global adapter is not finite, or the private one too large")
        removals, (owner, _) = self._records.removals, self._owner()
        own, subject = self._encoded(owner, trainer, shape.max_tokens), self._keeper.subject
        seed = training_seed(self._home)
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
        over = personal if split.over_rank is None else trainer.at_rank(split.over_rank)
        fitted = Fitted(trainer, split.adapter(vector), None, personal, None, over)
        if "adapter" not in LevelStore(self._home).off():
            found = vault.personalize([subject], vector, start, recipe, personal, spec=spec)
            fitted = replace(fitted, alone=found.alone[0], over=found.over_global[0])
        parts = own_parts(owner, by_record=self._is_silo)
        encoder = Encoder(trainer.base.tokenizer, shape.max_tokens)
        before = LearnedStore(self._home).load(trainer.base.digest)
        learned = judged(self._home, parts, fitted, recipe, encoder, removals, before)
        if TAKEN_BACK not in learned.report:
            learned = replace(learned, run=spec.run, round=number)
        LearnedStore(self._home).keep(learned)
        told = {"losses": learned.losses, "test_losses": learned.test_losses, "chosen": learned.chosen}
        back = {TAKEN_BACK: learned.report[TAKEN_BACK]} if TAKEN_BACK in learned.report else {}
        return Message({"round": number, "run": spec.run, **told, **back})


class _Unstale:
    """What methods keep from round to round, unless a record was removed since the round's training began."""

    def __init__(self, states: StoredStates, check: Callable[[], None]) -> None:
        self._states = states
        self._check = check

    def before(self, run: str, number: int, users: Sequence[str]) -> list[NDArray[np.float32] | None]:
        """As `RoundStates.before`."""
        return self._states.before(run, number, users)

    def keep(self, run: str, number: int, users: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """As `RoundStates.keep`."""
        self._check()
        self._states.keep(run, number, users, vectors)


def _precision(home: DeviceHome, folder: Path) -> str:
    """How the base is held where no run says: as what was learned over it wants, or else the owner."""
    from client.learned_store import LearnedStore

    learned = LearnedStore(home).load()
    found = None if learned is None else precision_of(learned.base, model_digest(folder))
    return found or home.policy().precision()


def main() -> None:
    """Serve the parent on the two lines that it names, until it closes the first: work, and the owner's questions."""
    from client.base_model import SharedBase
    from client.budget_keeper import BudgetKeeper
    from client.device_home import DeviceHome
    from client.speaker import SMALL_WIDTH, Speaker

    connection, questions = (Connection(int(number)) for number in sys.argv[1:3])
    begin = receive(connection).facts
    import torch

    threads = int(begin["threads"])
    torch.set_num_threads(threads)
    home = DeviceHome.open(Path(begin["home"]))
    shared = SharedBase(folder := Path(begin["model"]), lambda: _precision(home, folder))

    def personal() -> PersonalModel:
        from client.personal_model import PersonalModel

        return PersonalModel(home, shared)

    speaker = Speaker(personal, questions, threads if shared.width >= SMALL_WIDTH else 1)
    threading.Thread(target=speaker.serve, name="speaker", daemon=True).start()
    with ExitStack() as stack:
        work: _Work | None = None
        send(connection, Message({"ready": True}))
        os.nice(_niceness())  # from here on, and of this thread alone; a busy machine would not let it begin otherwise
        while True:
            try:
                asked = receive(connection)
            except EOFError:
                return
            try:
                if work is None:
                    keeper = BudgetKeeper(home, stack.enter_context(home.open_ledger()))
                    # Once the base is there, the half that answers gets ready too: it shares the weights.
                    work = _Work(home, keeper, shared, speaker.get_ready)
                answer = work.answer(asked)
            except Refusal as refusal:
                answer = Message({"refusal": refusal.code, "reason": str(refusal)})
            except Exception as error:  # whatever it is, its text may hold records
                answer = Message({"refusal": "failed", "reason": f"{type(error).__name__} at {_place_of(error)}"})
            send(connection, answer)


def _niceness() -> int:
    """How far other work on this device goes first; tests on a busy machine ask for less."""
    try:
        return max(0, int(os.environ.get("HOMESPUN_NICE", NICE)))
    except ValueError:
        return NICE


def _place_of(error: Exception) -> str:
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    return f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "nowhere"
