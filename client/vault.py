"""The vault: owns data, adapters, budget, ledger, and the door.

On a device it is a resident process that its owner started; in a simulation the same object is called in-process for
many users. Its fleet side (`subjects`, `train`) is all that a server's bundle can ask. Its owner side (`personalize`,
`score`) is never reachable from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.gate import DTYPES, Gate
from client.trainer import Example, ExamplePromise, Recipe, Trainer
from client.user_data import Encoder, Record, User, split
from common.adapters import Vector
from common.errors import Refusal
from common.methods import METHODS, Method
from common.privacy import Randomness, clip_rows
from common.wire import Assignment, Release, ReleaseSpec

__all__ = ["EncodedUser", "PrivateAdapters", "Vault", "encode_user"]

MOST_RECORDS_PER_ROUND = 1_000_000
"""Records, counted as often as they are seen, that a server may ask a user to train on in one round."""


@dataclass(frozen=True)
class EncodedUser:
    """One user's records as the trainer sees them, in three parts.

    Attributes:
        by_record: Whether a record's part depends on that record alone, as unit example needs; by time or order else.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    test: Sequence[Example]
    by_record: bool = False


@dataclass(frozen=True)
class PrivateAdapters:
    """Private adapters of some users, shape `(users, size)`: trained alone, and over the global adapter."""

    alone: NDArray[np.float32]
    over_global: NDArray[np.float32]


def encode_user(user: User, encoder: Encoder, *, by_record: bool = False) -> EncodedUser:
    """Split and encode one user's records; whoever has too few for three parts trains on all and is not scored.

    `by_record` splits as unit example needs, see `client.user_data.split`.
    """
    parts = split(user, by_record=by_record)
    if parts.reason is not None:
        return EncodedUser(_encode(encoder, user.records), (), ())
    train, validation, test = (_encode(encoder, part) for part in (parts.train, parts.validation, parts.test))
    return EncodedUser(train, validation, test, by_record)


def _encode(encoder: Encoder, records: Sequence[Record]) -> list[Example]:
    return [one for one in encoder.encode_batch(records) if one is not None]


class Vault:
    """One device, or in a simulation many, behind one door."""

    def __init__(
        self,
        trainer: Trainer,
        user: Callable[[str], EncodedUser],
        *,
        seed: int,
        residents: Sequence[str] = (),
        gate: Gate | None = None,
        rehearsal: bool = False,
        grants: Callable[[ReleaseSpec, int], None] | None = None,
    ) -> None:
        """Own the users that `user` opens.

        Args:
            trainer: The trainer of the shared adapter.
            user: Opens one user's encoded records.
            seed: Fixes training order and initial weights; nothing that privacy rests on.
            residents: Subject ids that live here; empty in a simulation, which takes any.
            gate: The door.
            rehearsal: Draw noise and Poisson batches from the seed, for reproduction; then nothing may be claimed.
            grants: Raises `Refusal` when the owner's policy does not grant a spec in a round.
        """
        self._trainer = trainer
        self._user = user
        self._seed = seed
        self._residents = tuple(residents)
        self._gate = gate or Gate()
        self._rehearsal = rehearsal
        self._grants = grants

    def subjects(self) -> Sequence[str]:
        """Who lives here."""
        return self._residents

    def train(self, assignment: Assignment) -> Release:
        """Train the assigned users' shared adapters from the given vector and release the clipped sum of their updates.

        Raises:
            Refusal: The assignment names somebody else, another base, or more than the owner grants.
        """
        spec = assignment.spec
        self._check(assignment)
        recipe = _recipe_of(spec)
        if self._grants is not None:
            self._grants(spec, assignment.round)
        users = [self._user(name) for name in assignment.users]
        if spec.unit == "example" and not all(user.by_record for user in users):
            raise Refusal("claim-refused", "one record more or less would move others in or out of the training part")
        people = [user.train for user in users]
        present = [(name, own) for name, own in zip(assignment.users, people, strict=True) if own]
        dtype = DTYPES[spec.dtype]
        randomness = self._randomness(assignment)
        if spec.unit == "example":
            updates = self._example_updates(assignment, people, recipe, randomness)
            clipped = clip_rows(updates, spec.update_norm, dtype=dtype)
            return self._gate.release(clipped, spec, assignment.round, randomness)
        if not present:
            empty = np.zeros((len(people), spec.model_dim), dtype)
            return self._gate.release(empty, spec, assignment.round, randomness)
        trained = self._trainer.fit(
            assignment.vector,
            [own for _, own in present],
            recipe,
            [self._order(name, assignment.round) for name, _ in present],
            trainable=self._mask(METHODS[spec.method]),
        )
        updates = trained.astype(np.float64) - assignment.vector
        clipped = clip_rows(updates, spec.clip, dtype=dtype)
        if len(present) < len(people):  # a user without training records still answers, with a zero update
            clipped = np.concatenate([clipped, np.zeros((len(people) - len(present), spec.model_dim), dtype)])
        return self._gate.release(clipped, spec, assignment.round, randomness)

    def _example_updates(
        self, assignment: Assignment, people: Sequence[Sequence[Example]], recipe: Recipe, randomness: Randomness
    ) -> NDArray[np.float64]:
        """Train each party by DP-SGD over its own records, with no private state in the forward pass."""
        spec = assignment.spec
        mask = self._mask(METHODS[spec.method])
        promise = ExamplePromise(spec.clip, spec.noise_multiplier * spec.extrapolation, spec.example_rate)
        trained = [
            self._trainer.fit_example_dp(
                assignment.vector,
                own,
                recipe,
                promise,
                randomness.child(name),
                trainable=mask,
            )
            for name, own in zip(assignment.users, people, strict=True)
        ]
        return np.stack(trained).astype(np.float64) - assignment.vector

    def _randomness(self, assignment: Assignment) -> Randomness:
        """What privacy rests on comes from the operating system; a rehearsal repeats it, and claims nothing."""
        if self._rehearsal:
            return Randomness.rehearsal(self._seed, "device", assignment.round, *assignment.users)
        return Randomness.system()

    def personalize(
        self, names: Sequence[str], shared: Vector, start: Vector, recipe: Recipe, trainer: Trainer
    ) -> PrivateAdapters:
        """Train private adapters of these users over the base alone and over the frozen shared adapter.

        Each starts at `start`; nothing of it leaves.
        """
        people: list[Sequence[Example]] = [self._user(name).train for name in names]
        alone = trainer.fit(start, people, recipe, [self._order(name, 0) for name in names])
        under = (shared, self._trainer.layout, self._trainer.scaling)
        over = trainer.fit(start, people, recipe, [self._order(name, 0) for name in names], under=under)
        return PrivateAdapters(alone, over)

    def _check(self, assignment: Assignment) -> None:
        spec = assignment.spec
        if spec.model != self._trainer.base.digest:
            raise Refusal("model-mismatch", "the run is for another base model")
        if self._residents and not set(assignment.users) <= set(self._residents):
            raise Refusal("not-here", "the assignment names a subject that does not live here")
        if len(set(assignment.users)) != len(assignment.users):
            raise Refusal("bad-request", "the assignment names a subject twice")
        if spec.method not in METHODS or spec.dtype not in DTYPES:
            raise Refusal("bad-request", "the spec names a method or a type of numbers that is not known here")
        if spec.noise not in ("central", "local") or spec.unit not in ("user", "example"):
            raise Refusal("bad-request", "the spec names a unit or a kind of noise that is not known here")
        records = spec.recipe.get("example_records")
        if spec.unit == "example" and not (isinstance(records, int) and records >= 1):
            raise Refusal("bad-request", "the spec names no public number of records, which the rate depends on")
        if not self._rehearsal and spec.extrapolation != 1.0 and self._residents:
            raise Refusal("claim-refused", "noise that is scaled down promises nothing, so nothing leaves under it")
        layout = METHODS[spec.method].shared_layout(self._trainer.layout)
        if spec.recipe.get("scaling") != self._trainer.scaling:
            raise Refusal("layout-mismatch", "the run scales its adapter in another way")
        if spec.names != tuple(tensor.name for tensor in layout.tensors) or spec.shapes != tuple(
            tensor.shape for tensor in layout.tensors
        ):
            raise Refusal("layout-mismatch", "the spec asks for other tensors than the method shares")

    def _mask(self, method: Method) -> NDArray[np.bool_] | None:
        mask = method.shared_mask(self._trainer.layout)
        return None if mask.all() else mask

    def _order(self, name: str, number: int) -> np.random.Generator:
        """The order in which one user's records are seen in one round: a matter of reproduction, not of privacy."""
        digest = hashlib.sha256(f"{self._seed}/{name}/{number}".encode()).digest()
        return np.random.default_rng(int.from_bytes(digest[:16]))


def _recipe_of(spec: ReleaseSpec) -> Recipe:
    """Read how a server wants the shared part trained.

    Raises:
        Refusal: A part of it is missing, or outside what any run needs.
    """
    steps, batch, rate, optimizer = (
        spec.recipe.get(key) for key in ("local_steps", "local_batch", "learning_rate", "optimizer")
    )
    if (
        not (isinstance(steps, int) and steps >= 1)
        or not (isinstance(batch, int) and batch >= 1)
        or steps * batch > MOST_RECORDS_PER_ROUND
        or not (isinstance(rate, int | float) and rate > 0)
        or optimizer not in ("sgd", "adam")
    ):
        raise Refusal("bad-request", "the spec's recipe is not one that this device trains by")
    return Recipe(steps=steps, batch=batch, learning_rate=float(rate), optimizer=str(optimizer))
