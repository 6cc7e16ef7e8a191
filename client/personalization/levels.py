"""Every level built for some users at once: the systems that they could use, and the one that each should.

A device is one user; a simulation has many side by side. What is trained on the way (adapters with retrieval, soft
prompts, preferences) is trained on each user's own training records, and the choice looks at validation records only.

====================  ==============================================================================================
`retrieval`           base, with the user's own past records before the question
`global+retrieval`    global, likewise
`profile`             global, with lines about the user before the question
`soft-prompt`         global, with a few private vectors before the question
`steering`            global, with the direction of the user's style added inside
`both+retrieval`      both, trained further with what retrieval shows, and asked with it
`preference`          both, tuned on the user's preference pairs
====================  ==============================================================================================

Without a shared adapter the names lose their `global` part: `private+retrieval` continues `private`. What ends in two
strengths, as `both@0.5/1`, is `both` with the shared and the private adapter acting that strongly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from client.base_model import BaseModel
from client.personalization.choice import CONFIDENCE, Choice, choose
from client.personalization.context import ContextEncoder
from client.personalization.memory import Memory
from client.personalization.mixing import MIXES, strengthened
from client.personalization.preference import guarded, tune
from client.personalization.soft_prompt import fit_soft_prompts, start_from_own_tokens
from client.personalization.steering import style_vectors
from client.personalization.systems import Kind, Part, Score, Scored, System, Under
from client.trainer import Recipe, Trainer
from client.user_data import Encoded, Encoder, Record, Split

__all__ = ["Personal", "Setting", "choices", "context_encoder", "parts_of", "systems_of"]

PARTS = ("train", "validation", "test")
SMALLEST_CONTEXT = 16
"""Tokens; where the base leaves less room beside a question, nothing is put before it."""
SOFT_PROMPT_TOKENS = 8
SOFT_PROMPT_RATE = 0.05
"""Adam's learning rate of a soft prompt; embeddings are much larger than an adapter's factors."""

Orders = Callable[[int], list[np.random.Generator]]
"""One generator per user for what a number stands for: orders of records, a matter of reproduction alone."""
Remember = Callable[[Sequence[Record], ContextEncoder], Memory]


@dataclass(frozen=True)
class Setting:
    """How personal models are built.

    Attributes:
        trainer: Of the shared adapter.
        encoder: Turns records into tokens.
        recipe: Of private adapters.
        levels: Input and objective levels that are on.
        context_tokens: Most tokens before a question.
        confidence: How sure validation records must be before the reference is left.
        metric: Another score of each user.
    """

    trainer: Trainer
    encoder: Encoder
    recipe: Recipe
    levels: frozenset[str]
    context_tokens: int
    confidence: float = CONFIDENCE
    metric: Score | None = None

    @property
    def base(self) -> BaseModel:
        """The frozen base."""
        return self.trainer.base


@dataclass(frozen=True)
class Personal:
    """The model-level adapters of some users, as a method left them.

    Attributes:
        under: The shared adapter; None where nothing is shared.
        alone: Private adapters over the base, shape (users, size); None where the method keeps none.
        over: Private adapters over the shared one, likewise.
        alone_trainer: Of `alone`.
        over_trainer: Of `over`.
    """

    under: Under
    alone: NDArray[np.float32] | None
    over: NDArray[np.float32] | None
    alone_trainer: Trainer
    over_trainer: Trainer

    @property
    def reference(self) -> str:
        """The system that stays where nothing is surely better."""
        return "base" if self.under is None else "global"

    @property
    def last(self) -> tuple[str, Trainer, NDArray[np.float32] | None]:
        """Name, trainer and adapters of what the model level ends in: both, or private where nothing is shared."""
        if self.under is None:
            return "private", self.alone_trainer, self.alone
        return "both", self.over_trainer, self.over


def context_encoder(base: BaseModel, encoder: Encoder, budget: int) -> ContextEncoder | None:
    """What puts context before questions, with as much of `budget` as the base can read beside a record.

    None where less than `SMALLEST_CONTEXT` is left.
    """
    longest = _longest(base)
    if longest is not None:
        budget = min(budget, longest - encoder.max_tokens)
    return ContextEncoder(base.tokenizer, encoder, budget) if budget >= SMALLEST_CONTEXT else None


def parts_of(setting: Setting, people: Sequence[Split], remember: Remember = Memory) -> dict[str, Part]:
    """Encode everybody's records, in every kind of prompt that the levels ask for.

    Args:
        setting: How personal models are built.
        people: Each user's records in three parts.
        remember: Makes a user's memory of the training records, of which everything before a question is taken.
    """
    context = None
    if setting.levels & {"retrieval", "profile"}:
        context = context_encoder(setting.base, setting.encoder, setting.context_tokens)
    kinds: list[Kind] = ["plain"]
    if context is not None:
        if "retrieval" in setting.levels:
            kinds.append("retrieval")
        if "profile" in setting.levels:
            kinds.append("profile")
    records: dict[str, list[Record]] = {part: [] for part in PARTS}
    owner: dict[str, list[int]] = {part: [] for part in PARTS}
    asked: dict[str, dict[Kind, list[Encoded]]] = {part: {kind: [] for kind in kinds} for part in PARTS}
    for index, split in enumerate(people):
        pairs = {part: encoded_pairs(setting.encoder, getattr(split, part)) for part in PARTS}
        memory = remember([record for record, _ in pairs["train"]], context) if context is not None else None
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
    return {
        part: Part(records[part], np.array(owner[part], dtype=np.intp), asked[part], setting.metric) for part in PARTS
    }


def encoded_pairs(encoder: Encoder, records: Sequence[Record]) -> list[tuple[Record, Encoded]]:
    """Records with what the model sees of them; what has nothing to learn is left out."""
    examples = encoder.encode_batch(records)
    return [(record, example) for record, example in zip(records, examples, strict=True) if example is not None]


def systems_of(
    setting: Setting, users: int, parts: dict[str, Part], personal: Personal, orders: Orders
) -> list[System]:
    """List what each of `users` could use, in the order in which it is told; trains what is not trained yet."""
    shared, trainer = personal.under is not None, setting.trainer
    kinds = parts["validation"].asked
    found = [System("base", trainer)]
    if shared:
        found.append(System("global", trainer, under=personal.under))
    if personal.alone is not None:
        found.append(System("private", personal.alone_trainer, personal.alone))
    name, own_trainer, own = personal.last
    if shared and own is not None:
        found.append(System("both", own_trainer, own, personal.under))
    if "profile" in kinds:
        found.append(System("profile", trainer, None, personal.under, "profile"))
    found.extend(_inside(setting, users, parts["train"], personal.under, orders))
    with_retrieval = None
    if "retrieval" in kinds:
        found.append(System("retrieval", trainer, None, None, "retrieval"))
        if shared:
            found.append(System("global+retrieval", trainer, None, personal.under, "retrieval"))
        with_retrieval = _train_with_retrieval(setting, users, parts["train"], personal, orders)
        if with_retrieval is not None:
            found.append(System(f"{name}+retrieval", own_trainer, with_retrieval, personal.under, "retrieval"))
    if own is None:
        return found
    if "preference" in setting.levels:
        found.extend(_preference(setting, users, parts, personal, orders))
    if setting.levels:
        found.extend(_mixed(name, own_trainer, own, personal.under, "plain"))
        if with_retrieval is not None:
            found.extend(_mixed(f"{name}+retrieval", own_trainer, with_retrieval, personal.under, "retrieval"))
    return found


def choices(
    users: int, validation: Part, scores: dict[str, Scored], *, reference: str, confidence: float = CONFIDENCE
) -> list[Choice]:
    """What each user should use, by the user's own validation records.

    Args:
        users: How many users.
        validation: Their validation records.
        scores: Of those records under each system that competes, the reference among them.
        reference: What stays where nothing is surely better.
        confidence: Of all of a user's lower bounds together.
    """
    names = tuple(scores)
    chosen: list[Choice] = []
    for index in range(users):
        own = validation.owner == index
        nats = np.stack([scores[name].plain.nats[own] for name in names])
        tokens = scores[reference].plain.tokens[own]
        chosen.append(choose(names, nats, tokens, reference=reference, confidence=confidence))
    return chosen


def _longest(base: BaseModel) -> int | None:
    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    return None if longest is None else int(longest)


def _by_user(part: Part, examples: Sequence[Encoded], users: int) -> list[list[Encoded]]:
    people: list[list[Encoded]] = [[] for _ in range(users)]
    for index, example in zip(part.owner.tolist(), examples, strict=True):
        people[index].append(example)
    return people


def _train_with_retrieval(
    setting: Setting, users: int, train: Part, personal: Personal, orders: Orders
) -> NDArray[np.float32] | None:
    """Train each private adapter further with what retrieval shows, for half the steps: as asked, so trained."""
    _, trainer, start = personal.last
    if start is None or setting.recipe.steps == 0:
        return None
    recipe = replace(setting.recipe, steps=max(1, setting.recipe.steps // 2))
    people = _by_user(train, train.asked["retrieval"], users)
    return trainer.fit(start, people, recipe, orders(0xC0), under=personal.under)


def _preference(
    setting: Setting, users: int, parts: dict[str, Part], personal: Personal, orders: Orders
) -> Iterator[System]:
    train, validation = parts["train"], parts["validation"]
    _, trainer, own = personal.last
    pairs = _by_user(train, train.asked["plain"], users)
    pairs = [[example for example in mine if example.rejected is not None] for mine in pairs]
    if own is None or not any(pairs):
        return
    given = setting.recipe
    recipe = Recipe(max(1, given.steps // 2), min(4, given.batch), given.learning_rate / 2, "adam")
    tuned = tune(trainer, own, pairs, recipe, orders(0xD0), under=personal.under)
    plain = _by_user(validation, validation.asked["plain"], users)
    yield System("preference", trainer, guarded(trainer, own, tuned, plain, under=personal.under), personal.under)


def _mixed(name: str, trainer: Trainer, own: NDArray[np.float32], under: Under, kind: Kind) -> Iterator[System]:
    """The same system with its adapters acting more or less strongly; without a shared one, only the private one."""
    for mix in MIXES:
        below = under
        if under is None and mix.shared != 1.0:
            continue
        if under is not None:
            below = (strengthened(under[0], under[1], mix.shared), *under[1:])
        adapters = strengthened(own, trainer.layout, mix.private)
        yield System(name + mix.suffix, trainer, adapters, below, kind, reported=False)


def _inside(setting: Setting, users: int, train: Part, under: Under, orders: Orders) -> Iterator[System]:
    """What is neither an adapter nor text: a soft prompt and a style vector, over the shared adapter."""
    if not setting.levels & {"soft-prompt", "steering"}:
        return
    base, trainer = setting.base, setting.trainer
    people = _by_user(train, train.asked["plain"], users)
    longest = _longest(base)
    room = longest is None or longest >= setting.encoder.max_tokens + SOFT_PROMPT_TOKENS
    if "soft-prompt" in setting.levels and room and setting.recipe.steps and all(people):
        starts = [
            start_from_own_tokens(base, own, SOFT_PROMPT_TOKENS, order)
            for own, order in zip(people, orders(0xE0), strict=True)
        ]
        recipe = replace(setting.recipe, learning_rate=SOFT_PROMPT_RATE)
        with trainer.over_base(under):
            prefixes = fit_soft_prompts(base, np.stack(starts), people, recipe, orders(0xE1))
        yield System("soft-prompt", trainer, under=under, prefixes=prefixes)
    if "steering" in setting.levels:
        yield System("steering", trainer, under=under, directions=style_vectors(trainer, people, under=under))
