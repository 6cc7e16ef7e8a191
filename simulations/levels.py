"""Every system side by side for every user of a sample, and the one that each would use.

The systems are those of the model level (base, global, private, both), what the input and objective levels make of
them (retrieval, profile, preferences), and controls. Each is scored on the user's validation and test records; the
choice looks at validation records only. On a device the same code runs for one user, and the scores stay there.

====================  ==============================================================================================
`retrieval`           base, with the user's own past records before the question
`global+retrieval`    global, likewise
`profile`             global, with lines about the user before the question
`both+retrieval`      both, trained further with what retrieval shows, and asked with it
`preference`          both, tuned on the user's preference pairs
`another`             a control: another user's private adapter, which tells style from mere adaptation
`pooled`              a control: an adapter trained on users' pooled records, without privacy
`chosen`              what the user would use: the reference, unless something is surely better on validation records
====================  ==============================================================================================

Without a shared adapter the names lose their `global` part: `private+retrieval` continues `private`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.base_model import BaseModel
from client.personalization.choice import choose
from client.personalization.context import ContextEncoder
from client.personalization.memory import Memory
from client.personalization.preference import guarded, tune
from client.trainer import Example, Recipe, Scores, Trainer
from client.user_data import HELD_OUT, Encoded, Encoder, Record
from common.adapters import Layout, Vector
from common.errors import Refusal
from simulations.population import CACHED_USERS, Population

if TYPE_CHECKING:
    from simulations.hosts import Host

__all__ = ["InContext", "Personal", "context_encoder", "score_levels"]

PARTS = ("train", "validation", "test")
STRENGTHS = (0.5, 1.5)
"""Factors on the private adapter over the global one that a user may choose beside 1."""
SMALLEST_CONTEXT = 16
"""Tokens; where the base leaves less room beside a question, nothing is put before it."""

Under = tuple[Vector, Layout, float] | None
Kind = Literal["plain", "retrieval", "profile"]


@dataclass(frozen=True)
class Personal:
    """The model-level adapters of some users, as a method left them.

    Attributes:
        under: The shared adapter; None where nothing is shared.
        alone: Private adapters over the base, shape (users, size); None where the method keeps none.
        over: Private adapters over the shared one, likewise.
        alone_trainer: Of `alone`.
        over_trainer: Of `over`.
        pooled: A control that is no system: an adapter trained on users' pooled records, of the shared one's layout.
    """

    under: Under
    alone: NDArray[np.float32] | None
    over: NDArray[np.float32] | None
    alone_trainer: Trainer
    over_trainer: Trainer
    pooled: Vector | None = None


@dataclass(frozen=True)
class _System:
    name: str
    trainer: Trainer
    adapters: NDArray[np.float32] | None = None
    under: Under = None
    kind: Kind = "plain"
    competes: bool = True
    reported: bool = True


@dataclass(frozen=True)
class _Part:
    """One part of all users' records, one after the other: records, and what is asked in each kind of prompt."""

    records: Sequence[Record]
    owner: NDArray[np.intp]
    asked: dict[Kind, list[Encoded]]


def score_levels(
    host: Host, users: Sequence[str], personal: Personal
) -> tuple[dict[str, list[dict[str, Any]]], NDArray[np.float32] | None]:
    """Score every system on the validation and test records of `users`, and choose one for each.

    Returns:
        For each system one row per user and part; and the private adapters that were trained with retrieval, shape
        (users, size), where there are any.
    """
    levels = frozenset[str](host.config.levels)
    parts = _parts(host, users, levels)
    with_retrieval = None
    if "retrieval" in levels and "retrieval" in parts["train"].asked:
        with_retrieval = _train_with_retrieval(host, users, parts["train"], personal)
    systems = _systems(host, users, parts, personal, with_retrieval)
    scores = {system.name: {part: _score(system, parts[part]) for part in PARTS[1:]} for system in systems}
    competing = tuple(system.name for system in systems if system.competes)
    reference = "global" if personal.under is not None else "base"
    rows: dict[str, list[dict[str, Any]]] = {}
    for system in systems:
        if system.reported:
            rows[system.name] = _rows(users, {part: (parts[part], scores[system.name][part]) for part in PARTS[1:]})
    if levels or len(competing) > 1:
        validation = parts["validation"]
        chosen: list[str] = []
        for index in range(len(users)):
            own = validation.owner == index
            nats = np.stack([scores[name]["validation"].plain.nats[own] for name in competing])
            tokens = scores[reference]["validation"].plain.tokens[own]
            choice = choose(competing, nats, tokens, reference=reference, confidence=host.config.choice_confidence)
            chosen.append(choice.system)
        rows["chosen"] = _chosen_rows(users, parts, scores, chosen)
    return rows, with_retrieval


def context_encoder(base: BaseModel, encoder: Encoder, budget: int) -> ContextEncoder | None:
    """What puts context before questions, with as much of `budget` as the base can read beside a record.

    None where less than `SMALLEST_CONTEXT` is left.
    """
    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None:
        budget = min(budget, int(longest) - encoder.max_tokens)
    return ContextEncoder(base.tokenizer, encoder, budget) if budget >= SMALLEST_CONTEXT else None


class InContext:
    """Training records of simulated users with input levels before them, for the shared steps of a run."""

    def __init__(self, population: Population, base: BaseModel, budget: int) -> None:
        """Remember where users come from; nobody is opened yet."""
        self._population = population
        self._base = base
        self._budget = budget
        self._known: OrderedDict[tuple[str, tuple[str, ...]], Sequence[Example]] = OrderedDict()

    def __call__(self, name: str, levels: tuple[str, ...]) -> Sequence[Example]:
        """Open one user's training records with `levels` before them.

        Raises:
            Refusal: The base reads too little for anything to stand before a record.
        """
        key = (name, levels)
        if key not in self._known:
            encoder = self._population.encoder
            context = context_encoder(self._base, encoder, self._budget)
            if context is None:
                raise Refusal("bad-request", "the base model reads too few tokens for a context")
            records = self._population.split(name).train or self._population.user(name).records
            pairs = _encoded(encoder.encode_batch(records), records)
            memory = Memory([record for record, _ in pairs], context)
            self._known[key] = [
                memory.with_levels(record, example, levels, own=position)
                for position, (record, example) in enumerate(pairs)
            ]
            if len(self._known) > CACHED_USERS:
                self._known.popitem(last=False)
        return self._known[key]


@dataclass(frozen=True)
class _Scored:
    """Scores of the records, and of the other answers of those that are pairs."""

    plain: Scores
    pairs: NDArray[np.intp]
    right: NDArray[np.bool_]


def _parts(host: Host, users: Sequence[str], levels: frozenset[str]) -> dict[str, _Part]:
    encoder = host.population.encoder
    context = None
    if levels & {"retrieval", "profile"}:
        context = context_encoder(host.base, encoder, host.config.context_tokens)
    kinds: list[Kind] = ["plain"]
    if context is not None:
        if "retrieval" in levels:
            kinds.append("retrieval")
        if "profile" in levels:
            kinds.append("profile")
    records: dict[str, list[Record]] = {part: [] for part in PARTS}
    owner: dict[str, list[int]] = {part: [] for part in PARTS}
    asked: dict[str, dict[Kind, list[Encoded]]] = {part: {kind: [] for kind in kinds} for part in PARTS}
    for index, name in enumerate(users):
        split = host.population.split(name)
        pairs = {part: _encoded(encoder.encode_batch(getattr(split, part)), getattr(split, part)) for part in PARTS}
        memory = Memory([record for record, _ in pairs["train"]], context) if context is not None else None
        for part in PARTS:
            for position, (record, example) in enumerate(pairs[part]):
                records[part].append(record)
                owner[part].append(index)
                asked[part]["plain"].append(example)
                if memory is None:
                    continue
                if "retrieval" in asked[part]:
                    own = position if part == "train" else None
                    asked[part]["retrieval"].append(memory.with_retrieval(record, example, own=own))
                if "profile" in asked[part] and part != "train":
                    asked[part]["profile"].append(memory.with_profile(record, example))
    return {part: _Part(records[part], np.array(owner[part], dtype=np.intp), asked[part]) for part in PARTS}


def _encoded(examples: Sequence[Encoded | None], records: Sequence[Record]) -> list[tuple[Record, Encoded]]:
    return [(record, example) for record, example in zip(records, examples, strict=True) if example is not None]


def _by_user(part: _Part, examples: Sequence[Encoded], users: int) -> list[list[Encoded]]:
    people: list[list[Encoded]] = [[] for _ in range(users)]
    for index, example in zip(part.owner.tolist(), examples, strict=True):
        people[index].append(example)
    return people


def _train_with_retrieval(
    host: Host, users: Sequence[str], train: _Part, personal: Personal
) -> NDArray[np.float32] | None:
    """Train each private adapter further with what retrieval shows, for half the steps: as asked, so trained."""
    start, trainer = (personal.over, personal.over_trainer)
    if personal.under is None:
        start, trainer = (personal.alone, personal.alone_trainer)
    if start is None or host.recipe.steps == 0:
        return None
    recipe = replace(host.recipe, steps=max(1, host.recipe.steps // 2))
    people = _by_user(train, train.asked["retrieval"], len(users))
    return trainer.fit(start, people, recipe, _orders(host, users, 0xC0), under=personal.under)


def _orders(host: Host, users: Sequence[str], purpose: int) -> list[np.random.Generator]:
    return [np.random.default_rng([host.config.seed, purpose, int(name)]) for name in users]


def _systems(
    host: Host,
    users: Sequence[str],
    parts: dict[str, _Part],
    personal: Personal,
    with_retrieval: NDArray[np.float32] | None,
) -> list[_System]:
    """List what is scored, in the order in which it is told."""
    shared = personal.under is not None
    kinds = parts["test"].asked
    found = [_System("base", host.trainer)]
    if shared:
        found.append(_System("global", host.trainer, under=personal.under))
    if personal.alone is not None:
        found.append(_System("private", personal.alone_trainer, personal.alone))
    own, trainer, name = personal.over, personal.over_trainer, "both"
    if not shared:
        own, trainer, name = personal.alone, personal.alone_trainer, "private"
    elif own is not None:
        found.append(_System("both", trainer, own, personal.under))
    if "profile" in kinds:
        found.append(_System("profile", host.trainer, None, personal.under, "profile"))
    if "retrieval" in kinds:
        found.append(_System("retrieval", host.trainer, None, None, "retrieval"))
        if shared:
            found.append(_System("global+retrieval", host.trainer, None, personal.under, "retrieval"))
        if with_retrieval is not None:
            found.append(_System(f"{name}+retrieval", trainer, with_retrieval, personal.under, "retrieval"))
    if personal.pooled is not None:
        pooled = (personal.pooled, host.trainer.layout, host.trainer.scaling)
        found.append(_System("pooled", host.trainer, None, pooled, competes=False))
    if own is None:
        return found
    if "preference" in host.config.levels:
        found.extend(_preference(host, users, parts, own, trainer, personal.under))
    if host.config.levels:
        for strength in STRENGTHS:
            adapters = _strengthened(own, trainer.layout, strength)
            found.append(_System(f"{name}@{strength:g}", trainer, adapters, personal.under, reported=False))
    if len(users) > 1:
        another = np.roll(own, 1, axis=0)
        found.append(_System("another", trainer, another, personal.under, competes=False))
    return found


def _preference(
    host: Host, users: Sequence[str], parts: dict[str, _Part], own: NDArray[np.float32], trainer: Trainer, under: Under
) -> list[_System]:
    train, validation = parts["train"], parts["validation"]
    pairs = _by_user(train, train.asked["plain"], len(users))
    pairs = [[example for example in mine if example.rejected is not None] for mine in pairs]
    if not any(pairs):
        return []
    recipe = Recipe(max(1, host.recipe.steps // 2), min(4, host.recipe.batch), host.recipe.learning_rate / 2, "adam")
    tuned = tune(trainer, own, pairs, recipe, _orders(host, users, 0xD0), under=under)
    kept = guarded(trainer, own, tuned, _by_user(validation, validation.asked["plain"], len(users)), under=under)
    return [_System("preference", trainer, kept, under)]


def _strengthened(adapters: NDArray[np.float32], layout: Layout, strength: float) -> NDArray[np.float32]:
    """Multiply what each adapter adds to the base by `strength`: its up projections, whose product counts once."""
    scaled = adapters.copy()
    for tensor in layout.tensors:
        if ".lora_B." in tensor.name:
            scaled[:, layout.offsets[tensor.name]] *= np.float32(strength)
    return scaled


def _score(system: _System, part: _Part) -> _Scored:
    asked = part.asked[system.kind]
    pairs = np.array([index for index, example in enumerate(asked) if example.rejected is not None], dtype=np.intp)
    others = [other for other in (asked[index].rejected for index in pairs.tolist()) if other is not None]
    rows: list[Example] = [*asked, *others]
    owner = np.concatenate([part.owner, part.owner[pairs]])
    scores = system.trainer.score(
        rows, adapters=system.adapters, owner=owner if system.adapters is not None else None, under=system.under
    )
    count = len(asked)
    plain = Scores(scores.nats[:count], scores.tokens[:count], scores.correct[:count])
    per_token = scores.nats / np.maximum(scores.tokens, 1)
    return _Scored(plain, pairs, per_token[pairs] < per_token[count:])


def _chosen_rows(
    users: Sequence[str], parts: dict[str, _Part], scores: dict[str, dict[str, _Scored]], chosen: Sequence[str]
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in dict.fromkeys(chosen):
        whose = [index for index, own in enumerate(chosen) if own == name]
        of_system = _rows(users, {part: (parts[part], scores[name][part]) for part in PARTS[1:]}, only=whose)
        rows += [{**row, "choice": name} for row in of_system]
    return rows


def _rows(
    users: Sequence[str], scored: dict[str, tuple[_Part, _Scored]], only: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for part, (records, scores) in scored.items():
        for index in range(len(users)) if only is None else only:
            rows.append({"user": users[index], "split": part, **_row(records, scores, index)})
    return rows


def _row(part: _Part, scored: _Scored, index: int) -> dict[str, Any]:
    own = part.owner == index
    scores = scored.plain
    tokens = int(scores.tokens[own].sum())
    pairs = part.owner[scored.pairs] == index
    row: dict[str, Any] = {
        "nats_per_token": float(scores.nats[own].sum() / max(tokens, 1)),
        "accuracy": float(scores.correct[own].sum() / max(tokens, 1)),
        "exact": float(scores.exact[own].mean()) if own.any() else 0.0,
        "tokens": tokens,
        "records": int(own.sum()),
        "preference_accuracy": float(scored.right[pairs].mean()) if pairs.any() else np.nan,
        "choice": "",
    }
    kinds = np.array([part.records[position].kind or "" for position in np.flatnonzero(own).tolist()])
    for kind in sorted({kind for kind in kinds.tolist() if kind.isidentifier() and kind != HELD_OUT}):
        of_kind = np.flatnonzero(own)[kinds == kind]
        row[f"nats_{kind}"] = float(scores.nats[of_kind].sum() / max(int(scores.tokens[of_kind].sum()), 1))
    return row
