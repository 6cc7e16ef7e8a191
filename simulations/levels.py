"""Every system side by side for every user of a sample, and the one that each would use.

The systems are those of `client.personalization.levels`, which a device builds for its one user, and controls that only
a simulation can have: `another`, another user's private adapter, which tells style from mere adaptation, and `pooled`,
an adapter trained on users' pooled records, without privacy. `chosen` is what each user would use: the reference,
unless something is surely better on validation records. Mixtures can be chosen and have no rows of their own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.base_model import BaseModel
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
from client.personalization.systems import Scored, System, rows_of, score
from client.trainer import Example
from common.adapters import Vector
from common.errors import Refusal
from simulations.outside import metric_of
from simulations.population import CACHED_USERS, Population

if TYPE_CHECKING:
    from simulations.hosts import Host

__all__ = ["InContext", "score_levels"]


def score_levels(
    host: Host, users: Sequence[str], personal: Personal, pooled: Vector | None = None
) -> tuple[dict[str, list[dict[str, Any]]], NDArray[np.float32] | None]:
    """Score every system on the validation and test records of `users`, and choose one for each.

    Args:
        host: The simulation.
        users: Whom.
        personal: What the method left them.
        pooled: A control: an adapter trained on users' pooled records, of the shared one's layout.

    Returns:
        For each system one row per user and part; and the private adapters that were trained with retrieval, shape
        (users, size), where there are any.
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
    tested: dict[str, Scored] = {}
    for system in systems:
        if system.reported:
            tested[system.name] = score(system, test)
            rows[system.name] = rows_of(users, "validation", validation, scores[system.name])
            rows[system.name] += rows_of(users, "test", test, tested[system.name])
    competing = {system.name: scores[system.name] for system in systems if system.competes}
    if setting.levels or len(competing) > 1:
        found = choices(len(users), validation, competing, reference=personal.reference, confidence=setting.confidence)
        rows["chosen"] = []
        for system in systems:
            whose = [index for index, choice in enumerate(found) if choice.system == system.name]
            if not whose:
                continue
            own = rows_of(users, "validation", validation, scores[system.name], only=whose)
            if system.name in tested:
                own += rows_of(users, "test", test, tested[system.name], only=whose)
            else:
                some = test.only(whose)
                own += rows_of(users, "test", some, score(system, some), only=whose)
            rows["chosen"] += [{**row, "choice": system.name} for row in own]
    last = f"{personal.last[0]}+retrieval"
    return rows, next((system.adapters for system in systems if system.name == last), None)


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
