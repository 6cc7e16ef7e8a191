"""A private adapter trained on the owner's own records, judged on others of them, and kept with what it is worth.

`homespun device learn` and the vault of a device in a federation both end here. The newest records are set aside by
time: some to choose by, some that nothing is chosen by. What is used is what the former are surely better under
(`client.personalization.choice`); without evidence the model that nobody trained for this owner stays.

Nothing of this leaves the device, and it costs no budget.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.device_home import DeviceHome
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.personalization.lifelong import Belonging, keep_refit, refit_reason
from client.record_store import RecordStore
from client.user_data import Encoder, Record, Split, User, split
from common.adapters import initial_vector
from common.config import RunConfig
from common.errors import DataError

if TYPE_CHECKING:
    from client.optimizers import Recipe
    from client.personalization.systems import Part, System
    from client.trainer import Scores, Trainer

__all__ = ["TAKEN_BACK", "Fitted", "Wish", "judged", "learn", "own_parts", "training_seed"]

Vector = NDArray[np.float32]

JUDGED = frozenset({"profile", "retrieval", "soft-prompt", "steering", "preference"})
"""Levels that are built and judged beside the adapters, as far as the owner has them on."""

TAKEN_BACK = "taken_back"
"""Of a report: why what was there before stays."""

FEWEST_JUDGED_PAIRS = 5
"""Preference pairs of an owner from which on some are set aside."""

PASSES = 3
FEWEST_STEPS, MOST_STEPS = 12, 400
"""Of a private adapter: so many passes over its records, within these bounds."""


@dataclass(frozen=True)
class Fitted:
    """Adapters of one owner, before they are judged.

    Attributes:
        trainer: Of the global adapter, and of the base where there is none.
        shared: The global adapter, whole; None where there is none.
        alone: The private adapter over the base; None where the owner has the level off.
        alone_trainer: Its trainer.
        over: The private adapter over the global one.
        over_trainer: Its trainer.
    """

    trainer: Trainer
    shared: Vector | None = field(repr=False)
    alone: Vector | None = field(repr=False)
    alone_trainer: Trainer
    over: Vector | None = field(repr=False)
    over_trainer: Trainer


@dataclass(frozen=True)
class Wish:
    """How the owner wants a private adapter trained; what is absent is what runs do."""

    rank: int = RunConfig.model_fields["rank"].default
    steps: int | None = None
    max_tokens: int = RunConfig.model_fields["max_tokens"].default
    targets: tuple[str, ...] = RunConfig.model_fields["targets"].default


def training_seed(home: DeviceHome) -> int:
    """Seed of the order in which this device sees its records: a matter of reproduction, not of privacy."""
    return int.from_bytes(home.master.subkey("training-order")[:8]) >> 1


def own_parts(user: User, *, by_record: bool = False) -> Split:
    """Split the owner's records; who has too few for three parts trains on all and is not judged.

    Preference pairs are split among themselves: an owner's corrections are the newest records, and would all be set
    aside to judge by, never to learn from. A few of them are all learned from.
    """
    pairs = tuple(one for one in user.records if one.rejected is not None and not one.empty)
    if by_record or not pairs:
        return _parts_of(user, by_record=by_record)
    rest = _parts_of(User(user.id, tuple(one for one in user.records if one.rejected is None)))
    own = Split(train=pairs) if len(pairs) < FEWEST_JUDGED_PAIRS else _parts_of(User(user.id, pairs))
    return Split(
        rest.train + own.train,
        rest.validation + own.validation,
        rest.test + own.test,
        dropped=rest.dropped + own.dropped,
    )


def _parts_of(user: User, *, by_record: bool = False) -> Split:
    parts = split(user, by_record=by_record)
    return parts if parts.reason is None else Split(train=tuple(one for one in user.records if not one.empty))


def learn(home: DeviceHome, folder: Path, wish: Wish, say: Callable[[str], None]) -> Learned:
    """Train private adapters on this device's records, over the base and over the global adapter that it keeps, if any.

    Args:
        home: The device.
        folder: Its base model.
        wish: How.
        say: Is told what happens.

    Raises:
        DataError: There is nothing to learn from, or the model cannot be opened.
        Refusal: A record was removed meanwhile.
    """
    from client.base_model import load_base
    from client.optimizers import Recipe
    from client.trainer import Trainer
    from common.model_files import model_digest, precise_digest

    records, precision = RecordStore(home), home.policy().precision()
    removals, user = records.removals, records.user()
    parts = own_parts(user, by_record=home.policy().units == ("example",))
    if not parts.train:
        raise DataError("there is nothing to learn from; `homespun device data add PATH` brings records")
    before = LearnedStore(home).load(precise_digest(model_digest(folder), precision))
    joined = before is not None and before.shared is not None
    targets = before.targets if before is not None and joined else wish.targets
    scaling = before.scaling if before is not None and joined else 2.0
    max_tokens = before.max_tokens if before is not None and joined else wish.max_tokens
    base = load_base(folder, targets, precision=precision)
    own = Trainer(base, rank=wish.rank, scaling=scaling)
    encoder = Encoder(base.tokenizer, max_tokens)
    examples = [one for one in encoder.encode_batch(parts.train) if one is not None]
    if not examples:
        raise DataError("no record has anything to learn; `homespun device data list` shows them")
    fields = RunConfig.model_fields
    batch = fields["personal_batch"].default
    steps = min(max(FEWEST_STEPS, math.ceil(PASSES * len(examples) / batch)), MOST_STEPS)
    steps = steps if wish.steps is None else wish.steps
    recipe = Recipe(steps, batch, fields["personal_learning_rate"].default, "adam")
    trainer, shared, alone, over = own, None, None, None
    if before is not None and before.shared is not None:
        trainer, shared = own.at_rank(before.rank), before.shared
    if "adapter" not in LevelStore(home).off():
        if before is not None and before.trained:
            belongs = Belonging.over(before.base, before.shared, records=len(before.trained))
            due = refit_reason(belongs, base=base.digest, shared=shared, records=len(parts.train))
            say(f"fitted again: {due}" if due else "fitted again, though little is new since the last time")
        say(f"training on {len(examples)} records, {recipe.steps} steps of {recipe.batch}")
        start = initial_vector(own.layout, np.random.default_rng([training_seed(home), 0x5EED]))
        alone = own.fit(start, [examples], recipe, _orders(home)(0))[0]
        if shared is not None:
            under = (shared, trainer.layout, scaling)
            over = own.fit(start, [examples], recipe, _orders(home)(0), under=under)[0]
    fitted = Fitted(trainer, shared, alone, own, over, own)
    found = judged(home, parts, fitted, recipe, encoder, removals, before)
    if before is not None and joined:
        found = replace(found, run=before.run, round=before.round)
    if TAKEN_BACK in found.report:
        say(f"taken back, because it was worse: {found.report[TAKEN_BACK]}")
    LearnedStore(home).keep(found)
    return found


def judged(
    home: DeviceHome,
    parts: Split,
    fitted: Fitted,
    recipe: Recipe,
    encoder: Encoder,
    removals: int,
    before: Learned | None = None,
) -> Learned:
    """Score what this owner could use on the owner's own held-out records, and choose; nothing is kept yet.

    What was there before is returned instead, with `taken_back` in its report, where the new adapters are worse than
    the old pair on validation records that neither was trained on.

    Args:
        home: The device, which says which levels are off.
        parts: The owner's records.
        fitted: What was trained.
        recipe: How; what is trained further is trained alike.
        encoder: Of the records.
        removals: How often records had been removed when `parts` were read.
        before: What was learned before, if anything.
    """
    from client.personalization.levels import Personal, Setting, choices, parts_of, systems_of
    from client.personalization.systems import score

    trainer, levels = fitted.trainer, LevelStore(home)
    context_tokens = RunConfig.model_fields["context_tokens"].default
    setting = Setting(trainer, encoder, recipe, JUDGED - levels.off(), context_tokens)
    under = None if fitted.shared is None else (fitted.shared, trainer.layout, trainer.scaling)
    alone, over = (None if one is None else one[None] for one in (fitted.alone, fitted.over))
    personal = Personal(under, alone, over, fitted.alone_trainer, fitted.over_trainer)
    learned = Learned(
        trainer.base.digest,
        tuple(sorted({module.name.rpartition(".")[2] for module in trainer.base.modules})),
        trainer.scaling,
        rank=0 if fitted.shared is None else _rank(trainer),
        rank_alone=_rank(fitted.alone_trainer),
        rank_over_global=0 if fitted.over is None else _rank(fitted.over_trainer),
        shared=fitted.shared,
        alone=fitted.alone,
        over_global=fitted.over,
        max_tokens=encoder.max_tokens,
        chosen=personal.reference,
        removals=removals,
        trained=tuple(map(_mark, parts.train)),
    )
    encoded = parts_of(setting, [parts], lambda records, context: levels.memory(records, context))
    if not encoded["validation"].records:
        return learned
    systems = systems_of(setting, 1, encoded, personal, _orders(home))
    scores = {one.name: score(one, encoded["validation"]) for one in systems if one.competes}
    if before is not None and (old := _pair_before(before, fitted, parts)) is not None:
        validation = encoded["validation"]
        was, now = score(old, validation).plain, scores[personal.last[0]].plain
        if not keep_refit(was.nats, now.nats, was.tokens):
            said = f"{_nats_per_token(now):.3f} nats per token on validation records, {_nats_per_token(was):.3f} before"
            return replace(before, report={**before.report, TAKEN_BACK: said})
    (choice,) = choices(1, encoded["validation"], scores, reference=personal.reference)
    told = [one for one in systems if one.reported or one.name == choice.system]
    adapters = {one.name: one.adapters for one in systems if one.adapters is not None}
    in_context, preference = adapters.get(f"{personal.last[0]}+retrieval"), adapters.get("preference")
    others = {} if preference is None else {"preference": preference[0]}
    others |= {one.name: one.prefixes[0] for one in systems if one.prefixes is not None}
    others |= {one.name: one.directions[0] for one in systems if one.directions is not None}
    bounds = dict(zip(scores, choice.lower_bounds.tolist(), strict=True))
    return replace(
        learned,
        chosen=choice.system,
        in_context=None if in_context is None else in_context[0],
        others=others,
        losses={one.name: _nats_per_token(scores[one.name].plain) for one in told},
        test_losses={one.name: _nats_per_token(score(one, encoded["test"]).plain) for one in told},
        report={
            "records": choice.records,
            "test_records": len(encoded["test"].records),
            "train_records": len(encoded["train"].records),
            "lower_bounds": {one.name: _finite(bounds[one.name]) for one in told},
            **_preferences(systems, encoded, personal.last[0]),
        },
    )


def _preferences(systems: Sequence[System], parts: Mapping[str, Part], before: str) -> dict[str, Any]:
    """How often the preferred answer of a pair is the likelier one, before the adapter was tuned on pairs and after.

    On pairs that were set aside, where there are any; else on those that it was tuned on, and then the report says so.
    """
    from client.personalization.systems import score

    found = {one.name: one for one in systems if one.name in (before, "preference")}
    if len(found) < 2:
        return {}

    def right(name: str, *where: str) -> list[bool]:
        return [bool(one) for part in where for one in score(found[name], parts[part]).right.tolist()]

    apart = right(before, "validation", "test")
    where = ("validation", "test") if apart else ("train",)
    was, now = right(before, *where), right("preference", *where)
    if not was:
        return {}
    facts = {"pairs": len(was), "set_aside": bool(apart), "before": sum(was) / len(was), "after": sum(now) / len(now)}
    return {"preferences": facts}


def _pair_before(before: Learned, fitted: Fitted, parts: Split) -> System | None:
    """The shared and private adapter that were there, as a system; None where today's validation cannot judge them."""
    from client.personalization.systems import System

    own = before.over_global if before.shared is not None else before.alone
    now = fitted.over if fitted.shared is not None else fitted.alone
    trainer = fitted.trainer
    if own is None or now is None or before.base != trainer.base.digest or before.scaling != trainer.scaling:
        return None
    if not before.trained or set(before.trained) & set(map(_mark, parts.validation)):
        return None
    if before.shared is None:
        return System("before", trainer.at_rank(before.rank_alone), own[None])
    under = (before.shared, trainer.at_rank(before.rank).layout, trainer.scaling)
    return System("before", trainer.at_rank(before.rank_over_global), own[None], under)


def _mark(record: Record) -> str:
    """Tell a record from others without keeping its text."""
    text = repr((record.prompt, record.response, record.rejected, record.time, record.task))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _orders(home: DeviceHome) -> Callable[[int], list[np.random.Generator]]:
    def orders(number: int) -> list[np.random.Generator]:
        digest = hashlib.sha256(f"{training_seed(home)}/owner/{number}".encode()).digest()
        return [np.random.default_rng(int.from_bytes(digest[:16]))]

    return orders


def _nats_per_token(scores: Scores) -> float:
    return float(scores.nats.sum() / max(1, scores.tokens.sum()))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _rank(trainer: Trainer) -> int:
    return trainer.layout.tensors[0].shape[0]
