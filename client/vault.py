"""The vault: owns data, adapters, budget, ledger, and the door.

On a device it is a resident process that its owner started; in a simulation the same object is called in-process for
many users. Its fleet side (`subjects`, `train`) is all that a server's bundle can ask. Its owner side (`personalize`,
`score`) is never reachable from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.gate import DTYPES, Gate, Shares
from client.measures import measure
from client.optimizers import OPTIMIZERS
from client.round_progress import RoundProgress
from client.round_states import RoundStates, ShortMemory
from client.secure_sums import SecureSums, after, share_randomness
from client.trainer import Example, ExamplePromise, Recipe, Trainer
from client.user_data import Encoder, Record, User, split
from common.adapters import Vector
from common.errors import ConfigError, Refusal
from common.methods import METHODS
from common.noised_counts import NoisedCounts
from common.privacy import Randomness, clip_rows
from common.secagg_messages import Leg
from common.secure_sum import SecureSum
from common.shared_levels import shared_levels_of
from common.split import Split, split_of
from common.sum_wire import SumLetters
from common.wire import Assignment, Release, ReleaseSpec

__all__ = ["EncodedUser", "PrivateAdapters", "Vault", "encode_user"]

InContext = Callable[[str, tuple[str, ...]], Sequence[Example]]

MOST_SPLITS = 8
"""Specs whose arrangement of tensors is remembered."""

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


@dataclass(frozen=True)
class _Trained:
    """What training made.

    Attributes:
        clipped: Updates in the order of the users, shape `(users, row_dim)`; what may leave through the gate.
        keep: Keeps what stays; called when the updates left.
    """

    clipped: NDArray[Any]
    keep: Callable[[], None]


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
        states: RoundStates | None = None,
        sums: SecureSums | None = None,
        in_context: InContext | None = None,
        progress: RoundProgress | None = None,
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
            states: Where what stays between rounds is kept; in memory when absent.
            sums: Takes part in secure sums; without it distributed noise is for simulations that skip the masks.
            in_context: Opens one user's training records with input levels put before them, by name of user and
                levels; without it a run that asks for such levels is refused.
            progress: Goes on where the training of a round was interrupted.
        """
        self._trainer = trainer
        self._user = user
        self._seed = seed
        self._residents = tuple(residents)
        self._gate = gate or Gate()
        self._rehearsal = rehearsal
        self._grants = grants
        self._states = states or ShortMemory()
        self._sums = sums
        self._in_context = in_context
        self._progress = progress
        self._trainers = {trainer.layout.size: trainer}
        self._splits: dict[str, Split] = {}

    def subjects(self) -> Sequence[str]:
        """Who lives here."""
        return self._residents

    def train(self, assignment: Assignment) -> Release:
        """Train the assigned users' shared adapters from the given vector and release the clipped sum of their updates.

        Raises:
            Refusal: The assignment names somebody else, another base, or more than the owner grants; or its noise is
                distributed, and this is no simulation that may skip the masks.
        """
        spec, number = assignment.spec, assignment.round
        if (spec.noise == "distributed") != (assignment.devices > 0) or (assignment.devices and self._residents):
            raise Refusal("bad-request", "an update with a share of the noise leaves a device under a mask only")
        trained = self._trained(assignment)
        if spec.noise == "distributed":
            shares = self._shares(assignment, assignment.devices)
            release = self._gate.release(trained.clipped, spec, number, shares=shares)
        else:
            release = self._gate.release(trained.clipped, spec, number, self._randomness(assignment))
        trained.keep()
        return release

    def join(self, assignment: Assignment) -> SumLetters:
        """Train the assigned users and take part in a secure sum with what comes out; answer with keys of the round.

        The updates stay here until `answer` lets them leave, masked, in the third leg.

        Raises:
            Refusal: As for `train`; or the round was begun before, or nobody here takes part in secure sums.
        """
        spec, number, sums = assignment.spec, assignment.round, self._sums
        if spec.noise != "distributed" or assignment.devices or sums is None:
            raise Refusal("bad-request", "nobody here takes part in that secure sum")
        self.check(assignment)
        for name in assignment.users:
            sums.begin(spec, number, name)
        trained = self._trained(assignment)
        left = after(len(assignment.users), trained.keep)
        letters: dict[str, bytes] = {}
        for index, name in enumerate(assignment.users):
            row = trained.clipped[index : index + 1]

            def leave(shares: Shares, row: NDArray[Any] = row) -> Release:
                release = self._gate.release(row, spec, number, shares=shares)
                left()
                return release

            letters[name] = sums.keys(spec, number, name, leave)
        return SumLetters(spec.run, number, Leg.KEYS, letters, {})

    def check(self, assignment: Assignment) -> None:
        """Return if the assignment may be trained here; raise `Refusal` as `train` does."""
        self._check(assignment)
        if self._grants is not None:
            self._grants(assignment.spec, assignment.round)

    def hold(self, assignment: Assignment) -> tuple[NDArray[Any], Callable[[], None]]:
        """Train for a secure sum that another process of this device takes part in; nothing leaves.

        Returns:
            Clipped updates, shape `(users, row_dim)`, for a gate; and what is called once they left.
        """
        trained = self._trained(assignment)
        return trained.clipped, trained.keep

    def answer(self, asked: SumLetters) -> SumLetters:
        """Answer the letters of one later leg, each with a letter or a code."""
        letters: dict[str, bytes] = {}
        refused: dict[str, str] = {}
        for name, message in asked.letters.items():
            try:
                if self._sums is None or (self._residents and name not in self._residents):
                    raise Refusal("not-here", "the letter is to a subject that takes part in no sum here")
                letters[name] = self._sums.answer(asked.run, asked.round, name, asked.leg, message)
            except Refusal as refusal:
                refused[name] = refusal.code
        return SumLetters(asked.run, asked.round, asked.leg, letters, refused)

    def _shares(self, assignment: Assignment, devices: int) -> Shares:
        """What the assigned users need to take part in a sum of `devices`."""
        spec, sums = assignment.spec, SecureSum.of(assignment.spec)
        try:
            noise = sums.noise(spec, devices)
        except ValueError:
            raise Refusal("small-cohort", "the round has more or fewer devices than the run allows") from None
        draw = share_randomness(self._seed if self._rehearsal else None)
        own = [draw(assignment.round, name) for name in assignment.users]
        return Shares(noise, sums.terms(spec, assignment.round).digest, own)

    def _trained(self, assignment: Assignment) -> _Trained:
        """Check an assignment and train; nothing leaves."""
        spec = assignment.spec
        split = self._check(assignment)
        recipe = _recipe_of(spec)
        if self._grants is not None:
            self._grants(spec, assignment.round)
        users = [self._user(name) for name in assignment.users]
        if spec.unit == "example" and not all(user.by_record for user in users):
            raise Refusal("claim-refused", "one record more or less would move others in or out of the training part")
        people = self._people(assignment, users)
        present = [(name, own) for name, own in zip(assignment.users, people, strict=True) if own]
        dtype = DTYPES[spec.dtype]
        if spec.unit == "example":
            present = list(zip(assignment.users, people, strict=True))  # how many records there are is private
        elif not present:
            return _Trained(np.zeros((len(people), spec.row_dim), dtype), lambda: None)
        names = [name for name, _ in present]
        kept = self._kept(assignment, split, names)
        starts = split.starts(assignment.vector, names, kept)
        if self._progress is not None:
            self._progress.begin(assignment, self._trainer.pass_tokens, starts, people)
        if spec.unit == "example":
            trained = self._by_example(assignment, split, starts, people, recipe, self._randomness(assignment))
        else:
            trained = self._by_user(assignment, split, starts, present, recipe)
        bound = spec.update_norm if spec.unit == "example" else spec.clip
        counts = NoisedCounts.of(spec)
        if counts is None and split.method.transform is None:
            clipped = clip_rows(split.learned(trained), bound, dtype, origin=assignment.vector)
        else:
            updates = split.updates(trained, assignment.vector)
            if split.method.transform is not None:  # nobody sees others
                updates = np.concatenate([split.method.transformed(row) for row in updates])
            if counts is None:
                clipped = clip_rows(updates, bound, dtype)
            else:
                own = [user.validation for user, records in zip(users, people, strict=True) if records]
                measured = measure(self._trainer, split.adapter(assignment.vector), own, counts.metrics)
                clipped = counts.rows(updates, spec.clip, assignment.clip_scale, measured, dtype)
        whole = clipped
        if len(clipped) < len(people):  # a user without training records still answers, with a zero update
            whole = np.zeros((len(people), spec.row_dim), dtype)
            whole[[index for index, own in enumerate(people) if own]] = clipped

        def keep() -> None:
            if self._progress is not None:
                self._progress.finish()
            if split.method.keeps == "copy":
                stays = self._copies(assignment, present, kept, recipe)
            else:
                stays = trained[:, split.kept]
            if split.method.remembers:
                self._states.keep(spec.run, assignment.round, names, stays)

        return _Trained(whole, keep)

    def _people(self, assignment: Assignment, users: Sequence[EncodedUser]) -> list[Sequence[Example]]:
        """Each user's training records as the run wants them before the model."""
        asked = shared_levels_of(assignment.spec.recipe, assignment.spec.unit, assignment.spec.epsilon)
        if not asked:
            return [user.train for user in users]
        if self._in_context is None:
            raise Refusal("bad-request", "this device puts nothing before the records of the shared steps")
        return [self._in_context(name, asked) for name in assignment.users]

    def _by_user(
        self,
        assignment: Assignment,
        split: Split,
        starts: NDArray[np.float32],
        present: Sequence[tuple[str, Sequence[Example]]],
        recipe: Recipe,
    ) -> NDArray[np.float32]:
        """Train each user's vector, shape `(users, trained.size)`; the clip of the whole update covers all of it."""
        trainer, trained = self._trainer_of(split), starts
        orders = [self._order(name, assignment.round) for name, _ in present]
        people = [own for _, own in present]
        turns = [split.moved | split.own]
        if split.method.by_turns:
            turns = [split.own, split.moved]
        for index, mask in enumerate(turns):
            moving = None if mask.all() else mask
            part = self._progress.part(index, len(turns), may_be_cut=True) if self._progress else None
            trained = trainer.fit(trained, people, recipe, orders, trainable=moving, progress=part)
        return trained

    def _by_example(
        self,
        assignment: Assignment,
        split: Split,
        starts: NDArray[np.float32],
        people: Sequence[Sequence[Example]],
        recipe: Recipe,
        randomness: Randomness,
    ) -> NDArray[np.float32]:
        """Train each party by DP-SGD over its own records, shape `(users, trained.size)`.

        No state that was fitted without noise is in the forward pass: what stays is either outside of it, or trained
        here, in the same steps, under the same clip and noise, and then it is an output of the same mechanism.
        """
        spec, trainer = assignment.spec, self._trainer_of(split)
        promise = ExamplePromise(spec.clip, spec.noise_multiplier * spec.extrapolation, spec.example_rate)
        trained: list[NDArray[np.float32]] = []
        for name, start, own in zip(assignment.users, starts, people, strict=True):
            mask = split.moved | split.own
            if split.method.sends == "products":
                mask = mask & split.at_rank(split.rank_of(name))
            # Fewer steps are another mechanism than the one that was priced, and a rehearsal's noise is a fixed stream.
            part = self._progress.part(0, 1, may_be_cut=False) if self._progress and randomness.is_secure else None
            drawn = randomness.child(name)
            found = trainer.fit_example_dp(start, own, recipe, promise, drawn, trainable=mask, progress=part)
            trained.append(found)
        return np.stack(trained)

    def _copies(
        self,
        assignment: Assignment,
        present: Sequence[tuple[str, Sequence[Example]]],
        kept: Sequence[Vector | None],
        recipe: Recipe,
    ) -> NDArray[np.float32]:
        """Train each user's own copy near the shared vector that was sent; nothing of it enters what leaves."""
        copies = np.stack([assignment.vector if own is None else own for own in kept])
        trained = copies.copy()
        some = [index for index, (_, own) in enumerate(present) if own]
        if some:
            trained[some] = self._trainer.fit(
                copies[some],
                [present[index][1] for index in some],
                recipe,
                [self._order(f"{present[index][0]}/copy", assignment.round) for index in some],
                anchor=(assignment.vector, float(assignment.spec.recipe.get("proximal_weight", 0.0))),
            )
        return trained

    def _kept(self, assignment: Assignment, split: Split, names: Sequence[str]) -> Sequence[Vector | None]:
        """What each user kept before this round; what does not fit any more counts as nothing."""
        if not split.method.remembers:
            return [None] * len(names)
        found = self._states.before(assignment.spec.run, assignment.round, names)
        return [own if own is not None and own.shape == (split.kept_size,) else None for own in found]

    def _trainer_of(self, split: Split) -> Trainer:
        size = split.trained.size
        if size not in self._trainers:
            self._trainers[size] = self._trainer.at_rank(split.trained.tensors[0].shape[0])
        return self._trainers[size]

    def _randomness(self, assignment: Assignment) -> Randomness:
        """What privacy rests on comes from the operating system; a rehearsal repeats it, and claims nothing."""
        if self._rehearsal:
            return Randomness.rehearsal(self._seed, "device", assignment.round, *assignment.users)
        return Randomness.system()

    def personalize(
        self,
        names: Sequence[str],
        shared: Vector,
        start: Vector,
        recipe: Recipe,
        trainer: Trainer,
        *,
        spec: ReleaseSpec | None = None,
    ) -> PrivateAdapters:
        """Train private adapters of these users over the base alone and over the frozen shared adapter.

        Each starts at `start`; nothing of it leaves. Where a method keeps something from round to round, that goes on
        training from where the rounds left it, with the shared part frozen; who was in no round starts as all did.

        Args:
            names: The users.
            shared: What the server sent, shape `(sent.size,)`; of a whole adapter where there is no spec.
            start: Where a private adapter over the base, or over the shared one, starts.
            recipe: Private steps.
            trainer: Of private adapters' rank.
            spec: Of the run; an adapter afterwards, as `dual` has it, where absent.
        """
        people: list[Sequence[Example]] = [self._user(name).train for name in names]

        def orders() -> list[np.random.Generator]:
            return [self._order(name, 0) for name in names]

        alone = trainer.fit(start, people, recipe, orders())
        split = None if spec is None else self._split(spec)
        if spec is None or split is None or not split.method.remembers:
            adapter = shared if split is None else split.adapter(shared)
            under = (adapter, self._trainer.layout, self._trainer.scaling)
            return PrivateAdapters(alone, trainer.fit(start, people, recipe, orders(), under=under))
        kept = self._states.before(spec.run, spec.rounds + 1, names)
        if split.method.keeps == "copy":
            near = (shared, float(spec.recipe.get("proximal_weight", 0.0)))
            copies = np.stack([shared if own is None else own for own in kept])
            trained = self._trainer.fit(copies, people, recipe, orders(), anchor=near)
        else:
            starts = split.starts(shared, names, kept)
            trained = self._trainer_of(split).fit(starts, people, recipe, orders(), trainable=split.own)
        return PrivateAdapters(alone, split.over(trained, shared))

    def _check(self, assignment: Assignment) -> Split:
        spec = assignment.spec
        if spec.model != self._trainer.base.digest:
            raise Refusal("model-mismatch", "the run is for another base model")
        if self._residents and not set(assignment.users) <= set(self._residents):
            raise Refusal("not-here", "the assignment names a subject that does not live here")
        if len(set(assignment.users)) != len(assignment.users):
            raise Refusal("bad-request", "the assignment names a subject twice")
        if spec.method not in METHODS or spec.dtype not in DTYPES:
            raise Refusal("bad-request", "the spec names a method or a type of numbers that is not known here")
        if spec.noise not in ("central", "local", "distributed") or spec.unit not in ("user", "example"):
            raise Refusal("bad-request", "the spec names a unit or a kind of noise that is not known here")
        if spec.noise == "distributed":
            SecureSum.of(spec)
        records = spec.recipe.get("example_records")
        if spec.unit == "example" and not (isinstance(records, int) and records >= 1):
            raise Refusal("bad-request", "the spec names no public number of records, which the rate depends on")
        if not self._rehearsal and spec.extrapolation != 1.0 and self._residents:
            raise Refusal("claim-refused", "noise that is scaled down promises nothing, so nothing leaves under it")
        if spec.recipe.get("scaling") != self._trainer.scaling:
            raise Refusal("layout-mismatch", "the run scales its adapter in another way")
        if spec.epsilon != "inf":
            METHODS[spec.method].check_claim(spec.unit, private_noise=spec.recipe.get("private_noise") == 1)
        shared_levels_of(spec.recipe, spec.unit, spec.epsilon)
        NoisedCounts.of(spec)
        split = self._split(spec)
        if spec.names != tuple(tensor.name for tensor in split.sent.tensors) or spec.shapes != tuple(
            tensor.shape for tensor in split.sent.tensors
        ):
            raise Refusal("layout-mismatch", "the spec asks for other tensors than the method shares")
        return split

    def _split(self, spec: ReleaseSpec) -> Split:
        """Lay the spec's method over this trainer's adapters, once per spec.

        Raises:
            Refusal: The recipe lacks what the method needs, or asks for what this base has not.
        """
        if spec.digest not in self._splits:
            if len(self._splits) >= MOST_SPLITS:
                self._splits.clear()
            try:
                self._splits[spec.digest] = split_of(METHODS[spec.method], self._trainer.layout, spec.recipe)
            except (ConfigError, ValueError, TypeError, OverflowError):
                raise Refusal("bad-request", "the recipe does not say what its method needs") from None
        return self._splits[spec.digest]

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
        or optimizer not in OPTIMIZERS
    ):
        raise Refusal("bad-request", "the spec's recipe is not one that this device trains by")
    return Recipe(steps=steps, batch=batch, learning_rate=float(rate), optimizer=str(optimizer))
