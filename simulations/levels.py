"""Every system side by side for every user of a sample, and the one that each would use.

The systems are those of `client.personalization.levels`, which a device builds for its one user, and controls that only
a simulation can have: `another`, another user's private adapter, which tells style from mere adaptation, and `pooled`,
an adapter trained on users' pooled records, without privacy. `chosen` is what each user would use: the reference,
unless something is surely better on validation records. Mixtures can be chosen and have no rows of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.base_model import BaseModel
from client.greedy_answers import greedy_answers
from client.personalization.levels import (
    Personal,
    Setting,
    choices,
    context_encoder,
    encoded_pairs,
    parts_of,
    systems_of,
)
from client.personalization.memory import Memory
from client.personalization.systems import Part, Scored, System, rows_of, score
from client.trainer import Example
from common.adapters import Vector
from common.errors import Refusal
from simulations.outside import metric_of
from simulations.population import CACHED_USERS, Population
from simulations.text_scores import degenerates

if TYPE_CHECKING:
    from simulations.hosts import Host

__all__ = ["InContext", "LevelScores", "score_levels"]


ANSWERED = ("base", "global", "private", "both")
"""Systems that answer questions in words, beside whatever is chosen; the rest would take as long again."""
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class LevelScores:
    """What every system is worth to some users.

    Attributes:
        rows: For each system one row per user and part.
        queries: One row per system and test record: user, place among the user's test records, nats, tokens, hits.
        with_retrieval: The private adapters that were trained with retrieval, shape (users, size), if any.
    """

    rows: dict[str, list[dict[str, Any]]]
    queries: list[dict[str, Any]]
    with_retrieval: NDArray[np.float32] | None


def score_levels(host: Host, users: Sequence[str], personal: Personal, pooled: Vector | None = None) -> LevelScores:
    """Score every system on the validation and test records of `users`, and choose one for each.

    Args:
        host: The simulation.
        users: Whom.
        personal: What the method left them.
        pooled: A control: an adapter trained on users' pooled records, of the shared one's layout.
    """
    config = host.config
    setting = Setting(
        host.trainer,
        host.population.encoder,
        host.recipe,
        frozenset(config.levels),
        config.context_tokens,
        config.choice_confidence,
        metric_of(config),
    )
    parts = parts_of(setting, [host.population.split(name) for name in users])

    def orders(purpose: int) -> list[np.random.Generator]:
        return [np.random.default_rng([config.seed, purpose, int(name)]) for name in users]

    systems = systems_of(setting, len(users), parts, personal, orders)
    systems += _controls(host, len(users), personal, pooled)
    validation, test = parts["validation"], parts["test"]
    scores = {system.name: score(system, validation) for system in systems}
    rows: dict[str, list[dict[str, Any]]] = {}
    queries: list[dict[str, Any]] = []
    tested: dict[str, Scored] = {}
    for system in systems:
        if system.reported:
            tested[system.name] = score(system, test)
            own = rows_of(users, "validation", validation, scores[system.name])
            own += _tested_rows(host, users, system, test, tested[system.name], list(range(len(users))))
            rows[system.name] = own
            queries += _queries(users, system.name, test, tested[system.name])
    competing = {system.name: scores[system.name] for system in systems if system.competes}
    if setting.levels or len(competing) > 1:
        taken = choices(len(users), validation, competing, reference=personal.reference, confidence=setting.confidence)
        rows["chosen"] = []
        for system in systems:
            whose = [index for index, choice in enumerate(taken) if choice.system == system.name]
            if not whose:
                continue
            some = test.only(whose)
            on_test = score(system, some)
            own = rows_of(users, "validation", validation, scores[system.name], only=whose)
            own += _tested_rows(host, users, system, some, on_test, whose)
            rows["chosen"] += [{**row, "choice": system.name} for row in own]
            queries += _queries(users, "chosen", some, on_test)
    last = f"{personal.last[0]}+retrieval"
    with_retrieval = next((system.adapters for system in systems if system.name == last), None)
    return LevelScores(rows, queries, with_retrieval)


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
            pairs = encoded_pairs(encoder, self._population.split(name).train or self._population.user(name).records)
            memory = Memory([record for record, _ in pairs], context)
            self._known[key] = [
                memory.with_levels(record, example, levels, own=position)
                for position, (record, example) in enumerate(pairs)
            ]
            if len(self._known) > CACHED_USERS:
                self._known.popitem(last=False)
        return self._known[key]


def _tested_rows(
    host: Host, users: Sequence[str], system: System, test: Part, scored: Scored, whose: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of the test part, with the share of answers that loop or are empty where the system answered in words."""
    rows = rows_of(users, "test", test, scored, only=whose)
    asked = host.config.answered
    answers = system.name.partition("@")[0] in ANSWERED or not system.reported or system.name == "both+retrieval"
    if not asked or not answers or system.prefixes is not None or system.directions is not None:
        return [{**row, "degeneration": np.nan} for row in rows]
    places = [place for index in whose for place in np.flatnonzero(test.owner == index)[:asked].tolist()]
    prompts = [example.ids[: max(example.first_label, 1)] for example in (test.asked[system.kind][at] for at in places)]
    owner = test.owner[places] if system.adapters is not None else None
    said = greedy_answers(
        system.trainer, prompts, ANSWER_TOKENS, adapters=system.adapters, owner=owner, under=system.under
    )
    loops = np.array([degenerates(host.base.tokenizer.decode(ids, skip_special_tokens=True)) for ids in said])
    of = test.owner[places]
    return [
        {**row, "degeneration": float(loops[of == index].mean()) if (of == index).any() else np.nan}
        for index, row in zip(whose, rows, strict=True)
    ]


def _queries(users: Sequence[str], name: str, test: Part, scored: Scored) -> list[dict[str, Any]]:
    counts: dict[int, int] = {}
    rows: list[dict[str, Any]] = []
    plain = scored.plain
    for place, owner in enumerate(test.owner.tolist()):
        number = counts[owner] = counts.get(owner, -1) + 1
        rows.append(
            {
                "user": users[owner],
                "system": name,
                "query": number,
                "nats": float(plain.nats[place]),
                "tokens": int(plain.tokens[place]),
                "correct": int(plain.correct[place]),
            }
        )
    return rows


def _controls(host: Host, users: int, personal: Personal, pooled: Vector | None) -> list[System]:
    found: list[System] = []
    _, trainer, own = personal.last
    if pooled is not None:
        under = (pooled, host.trainer.layout, host.trainer.scaling)
        found.append(System("pooled", host.trainer, None, under, competes=False))
    if own is not None and users > 1:
        another = np.roll(own, 1, axis=0)
        found.append(System("another", trainer, another, personal.under, competes=False))
    return found
