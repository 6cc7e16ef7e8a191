"""The owner's own model, used: the base, the newest global adapter, the private one, and the levels that are on.

Three systems have a name that everybody knows: `base`; `global`, the base with the newest global adapter; and
`personal`, which is what the owner's own validation records were surely best under when the private adapter was last
trained, and the global model, or the base, where nothing was. What the owner wrote into the profile in own words stands
before a question to `personal` in any case: it was said, not guessed. Beside them every system of a run can be asked
for by its name there (`private`, `both`, `retrieval`, `both+retrieval`, `preference`, ...).

Adapters are laid over a model object of its own (see `client.base_model.SharedBase`), around each pass, so that
training goes on beside it and several answers take turns. What was learned, records and levels are read again when
they changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.base_model import BaseModel, SharedBase
from client.conversation import Prompt, PromptWriter, Turn
from client.device_home import DeviceHome
from client.generation import Piece, Sampling, default_sampling, generate
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.lora import StackedLora
from client.personalization.memory import Memory
from client.personalization.mixing import MIXES
from client.personalization.steering import middle_layer, steered
from client.record_store import KeptRecord, RecordStore
from common.errors import DataError

__all__ = ["Answer", "PersonalModel", "ShownRecord", "System"]

DEFAULT_TARGETS = ("q_proj", "v_proj")
INSIDE = ("soft-prompt", "steering")
"""Levels that are neither text nor adapter."""
CHANGING = ("adapters.sqlite", "records.sqlite", "levels.sqlite")
"""Stores that are read again when their files changed."""

Factors = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class System:
    """One way to answer.

    Attributes:
        name: What it is asked for by.
        vectors: Which of the learned vectors are laid over the base, each with its strength; they add up.
        levels: Which levels stand before a question.
        inside: The level that acts inside the model, soft-prompt or steering; empty for none.
        reason: Why `personal` is this one.
    """

    name: str
    vectors: tuple[tuple[str, float], ...] = ()
    levels: frozenset[str] = frozenset()
    inside: str = ""
    reason: str = ""
    inside: str = ""


@dataclass(frozen=True)
class ShownRecord:
    """A past record that stood before a question, and what brought it up: words, meaning, or that it is recent."""

    id: str
    prompt: str = field(repr=False)
    response: str = field(repr=False)
    reason: str
    score: float


@dataclass(frozen=True)
class Answer:
    """An answer on its way.

    Attributes:
        system: What answers.
        prompt: What the model was given.
        records: Which past records stand in it, the best first.
        pieces: The answer as it comes.
    """

    system: System
    prompt: Prompt
    records: tuple[ShownRecord, ...]
    pieces: Iterator[Piece] = field(repr=False)


@dataclass(frozen=True)
class _State:
    """What was read from the device at one moment."""

    base: BaseModel
    lora: StackedLora
    writer: PromptWriter
    learned: Learned | None
    records: tuple[KeptRecord, ...]
    off: frozenset[str]
    use: str
    own_words: tuple[str, ...]


class PersonalModel:
    """Answers with the models of one device."""

    def __init__(self, home: DeviceHome, shared: SharedBase, *, context_tokens: int | None = None) -> None:
        """Answer for the owner of `home`; the base is opened at the first question.

        Args:
            home: The device.
            shared: The base, which a trainer may use as well.
            context_tokens: Most tokens of profile and records before a question; a quarter of what the base reads
                when absent.
        """
        self._home = home
        self._shared = shared
        self._context_tokens = context_tokens
        self._learned = LearnedStore(home)
        self._records = RecordStore(home)
        self._levels = LevelStore(home)
        self._passes = threading.Lock()
        self._reading = threading.RLock()
        self._seen: tuple[object, ...] | None = None
        self._state: _State | None = None
        self._memory: Memory | None = None
        self._factors: dict[tuple[tuple[str, float], ...], Factors] = {}

    def systems(self) -> dict[str, System]:
        """List every system that this device can answer with now, `base`, `global` and `personal` first."""
        with self._reading:
            return _systems(self._current())

    def sampling(self) -> Sampling:
        """How the base's own settings want tokens drawn."""
        with self._reading:
            return default_sampling(self._current().base)

    def answer(
        self,
        system: str,
        turns: Sequence[Turn],
        sampling: Sampling,
        *,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer a conversation with one system; the pieces come as they are asked for.

        Raises:
            DataError: There is no such system on this device.
            ValueError: The conversation does not end with what the user says.
        """
        with self._reading:
            state = self._current()
            known = _systems(state)
            if system not in known:
                raise DataError(f"{system[:40]}: not a model of this device; it has {', '.join(known)}")
            chosen = known[system]
            lines = state.own_words if system == "personal" else ()
            room = min(sampling.max_tokens, state.writer.window // 2)
            memory = self._memory_of(state) if chosen.levels else None
            prompt = state.writer.write(turns, room=room, memory=memory, levels=chosen.levels, lines=lines)
            factors = self._factors_of(state, chosen)
            inside = state.learned.others.get(chosen.inside) if state.learned is not None else None
        base, lora = state.base, state.lora
        prefix, shift = None, nullcontext
        if inside is not None and chosen.inside == "soft-prompt":
            prefix = inside.reshape(-1, base.model.config.get_text_config().hidden_size)
        elif inside is not None:
            shift = partial(steered, base, middle_layer(base), inside, 1.0)

        @contextmanager
        def laid_over() -> Generator[None]:
            with self._passes, shift():
                lora.lay_over(*([] if factors is None else [factors]))
                try:
                    yield
                finally:
                    lora.lay_over()

        room = state.writer.window - len(prompt.ids) - (0 if prefix is None else len(prefix))
        bounded = Sampling(
            max(1, min(sampling.max_tokens, room)), sampling.temperature, sampling.top_p, sampling.seed, sampling.stop
        )
        pieces = generate(base, prompt.ids, bounded, laid_over=laid_over, prefix=prefix, cancelled=cancelled)
        shown = tuple(_shown(state.records[one.position], one.reason, one.score) for one in prompt.found)
        return Answer(chosen, prompt, shown, pieces)

    def _current(self) -> _State:
        """Read what changed since the last question."""
        seen = tuple(_stamp(self._home.folder / name) for name in CHANGING)
        if self._state is not None and seen == self._seen:
            return self._state
        before = self._state
        base = before.base if before is not None else self._shared.model(DEFAULT_TARGETS)
        learned = self._learned.load(base.digest)
        targets = learned.targets if learned is not None else DEFAULT_TARGETS
        if before is None or {_leaf(module.name) for module in base.modules} != set(targets):
            base = self._shared.model(targets)
            lora = StackedLora(base.model, [module.name for module in base.modules])
        else:
            lora = before.lora
        writer = before.writer if before is not None else self._writer(base)
        off = self._levels.off()
        profile = self._levels.profile() if "profile" not in off else None
        own = () if profile is None else tuple(line.text for line in profile.lines if line.kind == "own words")
        records = self._records.records()
        self._state = _State(base, lora, writer, learned, records, off, self._levels.use(), own)
        self._memory = None
        self._factors.clear()
        self._seen = seen
        return self._state

    def _writer(self, base: BaseModel) -> PromptWriter:
        longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
        return PromptWriter(
            base.tokenizer, None if longest is None else int(longest), context_tokens=self._context_tokens
        )

    def _memory_of(self, state: _State) -> Memory | None:
        if state.writer.context is None:
            return None
        if self._memory is None:
            self._memory = self._levels.memory([one.record for one in state.records], state.writer.context)
        return self._memory

    def _factors_of(self, state: _State, system: System) -> Factors | None:
        """Lay the system's vectors out as one adapter: ranks side by side add up."""
        key, learned = system.vectors, state.learned
        if not key or learned is None:
            return None
        if key not in self._factors:
            weights = next(state.base.model.parameters())
            parts: list[Factors] = []
            for name, strength in key:
                vector = _vector(learned, name)
                if vector is None:
                    raise DataError(f"{system.name}: not learned on this device")
                stacked = torch.as_tensor(np.array(vector)[None], device=state.base.device, dtype=weights.dtype)
                layout = learned.layout(state.base.modules, name)
                parts.append(state.lora.factors(stacked, layout, learned.scaling * strength))
            self._factors[key] = [
                (torch.cat([part[layer][0] for part in parts], 1), torch.cat([part[layer][1] for part in parts], 2))
                for layer in range(len(state.lora.layers))
            ]
        return self._factors[key]


def _vector(learned: Learned, name: str) -> NDArray[np.float32] | None:
    known = {
        "shared": learned.shared,
        "alone": learned.alone,
        "over_global": learned.over_global,
        "in_context": learned.in_context,
    }
    return known[name] if name in known else learned.others.get(name)


def _systems(state: _State) -> dict[str, System]:
    """Name what can be answered with: what was learned, under the levels that are on."""
    learned, off = state.learned, state.off
    has_shared = learned is not None and learned.shared is not None
    under = (("shared", 1.0),) if has_shared else ()
    retrieval = frozenset(("retrieval",))
    found = {"base": System("base"), "global": System("global", under)}
    others: dict[str, System] = {}

    def add(name: str, vectors: tuple[tuple[str, float], ...], levels: frozenset[str] = frozenset()) -> None:
        if not levels & off and all(_vector(learned, vector) is not None for vector, _ in vectors if learned):
            others[name] = System(name, vectors, levels)

    if learned is not None and "adapter" not in off:
        own, vector = ("both", "over_global") if has_shared else ("private", "alone")
        add("private", (("alone", 1.0),))
        add(own, (*under, (vector, 1.0)))
        add(f"{own}+retrieval", (*under, ("in_context", 1.0)), retrieval)
        for mix in MIXES:
            shared = (("shared", mix.shared),) if has_shared else ()
            add(f"{own}{mix.suffix}", (*shared, (vector, mix.private)))
            add(f"{own}+retrieval{mix.suffix}", (*shared, ("in_context", mix.private)), retrieval)
        if "preference" not in off:
            add("preference", (*under, ("preference", 1.0)))
    for name in ("soft-prompt", "steering"):
        if learned is not None and name in learned.others and name not in off:
            others[name] = System(name, under, inside=name)
    add("profile", under, frozenset(("profile",)))
    if state.records:
        add("retrieval", (), retrieval)
        if has_shared:
            add("global+retrieval", under, retrieval)
        add("profile+retrieval", under, frozenset(("profile", "retrieval")))
    personal = _personal(state, {**found, **others}, "global" if has_shared else "base")
    return {**found, "personal": personal, **others}


def _personal(state: _State, known: dict[str, System], reference: str) -> System:
    """What `personal` stands for, and why."""
    chosen = "" if state.learned is None else state.learned.chosen
    if state.use and state.use in known:
        name, reason = state.use, "you asked for it"
    elif chosen in known and chosen != reference:
        name, reason = chosen, "your own validation records are surely better under it"
    elif chosen and chosen not in known:
        name, reason = (
            _next_best(state, known, reference),
            f"{chosen} is better, but what it needs is off or was removed",
        )
    elif chosen:
        name, reason = reference, "nothing else is surely better on your own validation records"
    else:
        name, reason = reference, "nothing was learned from your records yet"
    one = known[name]
    return replace(one, reason=reason)


def _next_best(state: _State, known: dict[str, System], reference: str) -> str:
    """What would have been chosen without what cannot be used now: all bounds hold together, so no new doubt."""
    bounds = {} if state.learned is None else state.learned.report.get("lower_bounds", {})
    sure = {name: bound for name, bound in bounds.items() if name in known and (bound or 0.0) > 0}
    return max(sure, key=lambda name: sure[name], default=reference)


def _shown(kept: KeptRecord, reason: str, score: float) -> ShownRecord:
    return ShownRecord(kept.id, kept.record.prompt, kept.record.response, reason, round(score, 3))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _stamp(path: Path) -> tuple[int, int]:
    """What changes when a store is written and closed."""
    try:
        facts = path.stat()
    except OSError:
        return 0, 0
    return facts.st_mtime_ns, facts.st_size
