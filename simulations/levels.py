"""Every system side by side for every user of a sample, and the one that each would use.

The systems are those of the model level (base, global, private, both), what the input and objective levels make of
them (retrieval, profile, preferences), and controls. Each is scored on the user's validation and test records; the
choice looks at validation records only. On a device the same code runs for one user, and the scores stay there.

====================  ==============================================================================================
`retrieval`           base, with the user's own past records before the question
`global+retrieval`    global, likewise
`profile`             global, with lines about the user before the question
`soft-prompt`         global, with a few private vectors before the question
`steering`            global, with the direction of the user's style added inside
`both+retrieval`      both, trained further with what retrieval shows, and asked with it
`preference`          both, tuned on the user's preference pairs
`another`             a control: another user's private adapter, which tells style from mere adaptation
`pooled`              a control: an adapter trained on users' pooled records, without privacy
`chosen`              what the user would use: the reference, unless something is surely better on validation records
====================  ==============================================================================================

Without a shared adapter the names lose their `global` part: `private+retrieval` continues `private`. What ends in two
strengths, as `both@0.5/1`, is `both` with the shared and the private adapter acting that strongly; such mixtures can be
chosen and have no rows of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.base_model import BaseModel
from client.personalization.choice import choose
from client.personalization.context import ContextEncoder
from client.personalization.memory import Memory
from client.personalization.mixing import MIXES, strengthened
from client.personalization.preference import guarded, tune
from client.personalization.soft_prompt import fit_soft_prompts, start_from_own_tokens
from client.personalization.steering import style_vectors
from client.trainer import Example, Recipe, Trainer
from client.user_data import Encoded, Encoder, Record
from common.adapters import Vector
from common.errors import Refusal
from simulations.outside import metric_of
from simulations.population import CACHED_USERS, Population
from simulations.systems import Kind, Part, Scored, System, Under, rows_of, score

if TYPE_CHECKING:
    from simulations.hosts import Host

__all__ = ["InContext", "Personal", "context_encoder", "score_levels"]

PARTS = ("train", "validation", "test")
SMALLEST_CONTEXT = 16
"""Tokens; where the base leaves less room beside a question, nothing is put before it."""
SOFT_PROMPT_TOKENS = 8
SOFT_PROMPT_RATE = 0.05
"""Adam's learning rate of a soft prompt; embeddings are much larger than an adapter's factors."""


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
    validation, test = parts["validation"], parts["test"]
    scores = {system.name: score(system, validation) for system in systems}
    rows: dict[str, list[dict[str, Any]]] = {}
    tested: dict[str, Scored] = {}
    for system in systems:
        if system.reported:
            tested[system.name] = score(system, test)
            rows[system.name] = rows_of(users, "validation", validation, scores[system.name])
            rows[system.name] += rows_of(users, "test", test, tested[system.name])
    competing = tuple(system.name for system in systems if system.competes)
    if levels or len(competing) > 1:
        chosen = _choices(host, len(users), validation, {name: scores[name] for name in competing}, personal)
        rows["chosen"] = []
        for system in systems:
            whose = [index for index, name in enumerate(chosen) if name == system.name]
            if not whose:
                continue
            found = rows_of(users, "validation", validation, scores[system.name], only=whose)
            if system.name in tested:
                found += rows_of(users, "test", test, tested[system.name], only=whose)
            else:
                some = test.only(whose)
                found += rows_of(users, "test", some, score(system, some), only=whose)
            rows["chosen"] += [{**row, "choice": system.name} for row in found]
    return rows, with_retrieval


def _choices(host: Host, users: int, validation: Part, scores: dict[str, Scored], personal: Personal) -> list[str]:
    """What each user uses, by the user's validation records."""
    names = tuple(scores)
    reference = "global" if personal.under is not None else "base"
    chosen: list[str] = []
    for index in range(users):
        own = validation.owner == index
        nats = np.stack([scores[name].plain.nats[own] for name in names])
        tokens = scores[reference].plain.tokens[own]
        choice = choose(names, nats, tokens, reference=reference, confidence=host.config.choice_confidence)
        chosen.append(choice.system)
    return chosen


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


def _parts(host: Host, users: Sequence[str], levels: frozenset[str]) -> dict[str, Part]:
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
    metric = metric_of(host.config)
    return {part: Part(records[part], np.array(owner[part], dtype=np.intp), asked[part], metric) for part in PARTS}


def _encoded(examples: Sequence[Encoded | None], records: Sequence[Record]) -> list[tuple[Record, Encoded]]:
    return [(record, example) for record, example in zip(records, examples, strict=True) if example is not None]


def _by_user(part: Part, examples: Sequence[Encoded], users: int) -> list[list[Encoded]]:
    people: list[list[Encoded]] = [[] for _ in range(users)]
    for index, example in zip(part.owner.tolist(), examples, strict=True):
        people[index].append(example)
    return people


def _train_with_retrieval(
    host: Host, users: Sequence[str], train: Part, personal: Personal
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
    parts: dict[str, Part],
    personal: Personal,
    with_retrieval: NDArray[np.float32] | None,
) -> list[System]:
    """List what is scored, in the order in which it is told."""
    shared = personal.under is not None
    kinds = parts["test"].asked
    found = [System("base", host.trainer)]
    if shared:
        found.append(System("global", host.trainer, under=personal.under))
    if personal.alone is not None:
        found.append(System("private", personal.alone_trainer, personal.alone))
    own, trainer, name = personal.over, personal.over_trainer, "both"
    if not shared:
        own, trainer, name = personal.alone, personal.alone_trainer, "private"
    elif own is not None:
        found.append(System("both", trainer, own, personal.under))
    if "profile" in kinds:
        found.append(System("profile", host.trainer, None, personal.under, "profile"))
    found.extend(_inside(host, users, parts, personal.under))
    if "retrieval" in kinds:
        found.append(System("retrieval", host.trainer, None, None, "retrieval"))
        if shared:
            found.append(System("global+retrieval", host.trainer, None, personal.under, "retrieval"))
        if with_retrieval is not None:
            found.append(System(f"{name}+retrieval", trainer, with_retrieval, personal.under, "retrieval"))
    if personal.pooled is not None:
        pooled = (personal.pooled, host.trainer.layout, host.trainer.scaling)
        found.append(System("pooled", host.trainer, None, pooled, competes=False))
    if own is None:
        return found
    if "preference" in host.config.levels:
        found.extend(_preference(host, users, parts, own, trainer, personal.under))
    if host.config.levels:
        found.extend(_mixed(name, trainer, own, personal.under, "plain"))
        if with_retrieval is not None:
            found.extend(_mixed(f"{name}+retrieval", trainer, with_retrieval, personal.under, "retrieval"))
    if len(users) > 1:
        another = np.roll(own, 1, axis=0)
        found.append(System("another", trainer, another, personal.under, competes=False))
    return found


def _preference(
    host: Host, users: Sequence[str], parts: dict[str, Part], own: NDArray[np.float32], trainer: Trainer, under: Under
) -> list[System]:
    train, validation = parts["train"], parts["validation"]
    pairs = _by_user(train, train.asked["plain"], len(users))
    pairs = [[example for example in mine if example.rejected is not None] for mine in pairs]
    if not any(pairs):
        return []
    recipe = Recipe(max(1, host.recipe.steps // 2), min(4, host.recipe.batch), host.recipe.learning_rate / 2, "adam")
    tuned = tune(trainer, own, pairs, recipe, _orders(host, users, 0xD0), under=under)
    kept = guarded(trainer, own, tuned, _by_user(validation, validation.asked["plain"], len(users)), under=under)
    return [System("preference", trainer, kept, under)]


def _mixed(name: str, trainer: Trainer, own: NDArray[np.float32], under: Under, kind: Kind) -> Iterator[System]:
    """The same system with its adapters acting more or less strongly; without a shared one, only the private one."""
    for mix in MIXES if under is not None else [mix for mix in MIXES if mix.shared == 1.0]:
        below = under
        if under is not None:
            below = (strengthened(under[0], under[1], mix.shared), *under[1:])
        adapters = strengthened(own, trainer.layout, mix.private)
        yield System(name + mix.suffix, trainer, adapters, below, kind, reported=False)


def _inside(host: Host, users: Sequence[str], parts: dict[str, Part], under: Under) -> Iterator[System]:
    """What is neither an adapter nor text: a soft prompt and a style vector, over the shared adapter."""
    base, levels = host.base, host.config.levels
    train = parts["train"]
    people = _by_user(train, train.asked["plain"], len(users))
    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    room = longest is None or longest >= host.config.max_tokens + SOFT_PROMPT_TOKENS
    if "soft-prompt" in levels and room and host.recipe.steps:
        starts = [
            start_from_own_tokens(base, own, SOFT_PROMPT_TOKENS, order)
            for own, order in zip(people, _orders(host, users, 0xE0), strict=True)
        ]
        recipe = replace(host.recipe, learning_rate=SOFT_PROMPT_RATE)
        with host.trainer.over_base(under):
            prefixes = fit_soft_prompts(base, np.stack(starts), people, recipe, _orders(host, users, 0xE1))
        yield System("soft-prompt", host.trainer, under=under, prefixes=prefixes)
    if "steering" in levels:
        yield System("steering", host.trainer, under=under, directions=style_vectors(host.trainer, people, under=under))
