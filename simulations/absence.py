"""Devices that are offline, drop out or are too slow: a simulated vault that trains only who is there in time.

An absent user is missing from the sum and from nothing else: divisor, noise and debit do not know who answered, so
absence costs utility and never the promise. Who is absent depends on the seed, the round and the user's number, never
on anybody's data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from client.app import FleetVault
from common.config import RunConfig
from common.errors import Refusal
from common.sum_wire import SumLetters
from common.wire import Assignment, Release

__all__ = ["PatchyVault", "is_patchy"]


def is_patchy(config: RunConfig) -> bool:
    """Whether a configuration asks for absence at all."""
    return config.availability < 1 or config.dropout > 0 or config.stragglers > 0


class PatchyVault:
    """A vault of many users, some of whom are away."""

    def __init__(self, vault: FleetVault, config: RunConfig) -> None:
        """Let `vault` train who is there, by the configuration's availability, dropout and stragglers."""
        self._vault = vault
        self._config = config

    def subjects(self) -> Sequence[str]:
        """Who lives here."""
        return self._vault.subjects()

    def train(self, assignment: Assignment) -> Release:
        """Train the assigned users who are there.

        Raises:
            Refusal: Nobody is, or the vault refuses.
        """
        return self._vault.train(self._there(assignment))

    def join(self, assignment: Assignment) -> SumLetters:
        """Begin a secure sum with those who are there; the others never join it.

        Raises:
            Refusal: As for `train`.
        """
        return self._vault.join(self._there(assignment))

    def answer(self, asked: SumLetters) -> SumLetters:
        """Answer letters of a secure sum: who joined stays."""
        return self._vault.answer(asked)

    def _there(self, assignment: Assignment) -> Assignment:
        there = tuple(user for user in assignment.users if self.answers(user, assignment.round))
        if not there:
            raise Refusal("not-now", "none of the assigned users is there in time")
        return replace(assignment, users=there)

    def answers(self, user: str, number: int) -> bool:
        """Whether a user is online in round `number`, stays to the end of it, and has no device that is too slow."""
        config = self._config
        slow = self._coin("straggler", user)
        online, stays = self._coin("online", user, number), self._coin("stays", user, number)
        return slow >= config.stragglers and online < config.availability and stays >= config.dropout

    def _coin(self, *what: str | int) -> float:
        """A number in [0, 1) that everyone finds again: one for each question."""
        digest = hashlib.sha256("/".join(map(str, (self._config.seed, *what))).encode()).digest()
        return float(np.ldexp(float(int.from_bytes(digest[:6])), -48))
