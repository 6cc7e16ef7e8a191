"""The rounds of a run: invite, receive, debit, sum, noise, step, checkpoint.

Order is what keeps the promise. The debit is durable before the noise is drawn: by the server, after it has the sum; by
the devices, as soon as they are asked. The checkpoint is durable before the next round broadcasts it. A crash between
the two wastes one release, which the calibrated spare rounds pay for; it never hides one.

Flower delivers a message at most once. Whoever is away, refuses, answers nonsense or not at all is missing from the
sum and from nothing else: the divisor, the noise and the promise do not know who answered.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from numpy.typing import NDArray

from common.accounting import epsilon_of
from common.adapters import Layout, Vector
from common.config import RunConfig
from common.errors import BudgetSpent, ConfigError, DataError, Refusal
from common.evidence import RECEIPTS, commitment
from common.files import write_private_file
from common.ledger import Ledger
from common.privacy import Randomness
from common.promise import check_noise, promise_of
from common.secagg_messages import Leg
from common.split import cut_to_rank
from common.sum_wire import SUM_LEGS, SumLetters, read_roster
from common.wire import Assignment, Release, ReleaseSpec
from server.aggregation import ModularSum, RunningSum, ServerStep
from server.checkpoint import Checkpoint
from server.cohort import Roster
from server.exchange import POLL_SECONDS, Errand, exchange
from server.released_counts import ReleasedCounts, digest_of
from server.secure_sums import CalledOff, MaskedSum, Participation, modular_sum, published, simulated_keys

WITNESSES = "witnesses.jsonl"

__all__ = ["Round", "Rounds", "add_central_noise", "round_randomness"]

LEG_SECONDS = 120.0
"""How long a leg of a secure sum after the first waits for answers; whoever is later has dropped out of the round."""

ENROL_SECONDS = 180.0
"""How long the first round waits for the users that the run was calibrated for."""

HELLO_SECONDS = 45.0
"""How long a node that is new may take to say who lives there."""

MOST_RESIDENTS = 64
"""Subjects that one device may host."""

ENROLLED = "enrolled.json"
DEVICES = "devices.json"
"""Enrolment keys of the devices that may take part in the run's secure sums, a JSON list of hex."""

HOMES = "homes.json"
"""Written by a coordinator that knows its devices: which node each subject's device is now."""


@dataclass(frozen=True)
class Round:
    """What may be said of a finished round in public: nothing shows who was in it.

    Attributes:
        number: From 1.
        vector: The shared vector after it.
        spent: Releases debited so far, this one included.
        seconds: How long it took.
        counts: What was released beside the adapter, noised; empty where nothing was.
        rejected: Users asked who are not in it, by reason, for a study's log; of devices it must not be published.
        answered: Users in it; as `rejected`.
    """

    number: int
    vector: Vector
    spent: int
    seconds: float
    rejected: dict[str, int]
    answered: int = 0
    counts: Mapping[str, float | None] = field(default_factory=dict[str, float | None])


@dataclass(frozen=True)
class Collected:
    """What came of asking a cohort.

    Attributes:
        values: Sum of what they sent, shape `(dim,)`; with distributed noise, at the level that is published.
        rejected: Users who were asked and are not in it, by reason.
        receipts: Of the devices that are.
        answered: Users who are in it.
    """

    values: NDArray[np.float64]
    rejected: dict[str, int]
    receipts: Sequence[str]
    answered: int


class Hook(Protocol):
    """Called after every durable round; returning True asks to stop here."""

    def __call__(self, finished: Round) -> bool | None:
        """Look at a finished round."""
        ...


Waits = Callable[[int, int], bool]
"""Told how many of how many devices are connected while a round waits for them; returning True asks to stop instead."""


class _StoppedError(Exception):
    """The run is not wanted any more, and nothing of the next round was asked or spent."""


class Rounds:
    """Runs the rounds of one run from wherever its checkpoint stands."""

    def __init__(
        self,
        config: RunConfig,
        spec: ReleaseSpec,
        layout: Layout,
        start: Vector,
        folder: Path,
        ledger: Ledger,
    ) -> None:
        """Prepare a run.

        Args:
            config: The resolved configuration.
            spec: What devices are asked for; its noise multiplier is the calibrated one.
            layout: The shared layout.
            start: The shared vector before round 1.
            folder: Where the checkpoint lies.
            ledger: Open, with its reservation written.
        """
        self._config = config
        self._spec = spec
        self._promise = promise_of(spec)
        self._layout = layout
        self._start = start
        self._path = folder / "checkpoint.safetensors"
        self._enrolled = folder / ENROLLED
        self._homes = folder / HOMES
        self._ledger = ledger
        self._participation = Participation.open(folder, spec)
        self._step = ServerStep.of(config)
        self._counts = ReleasedCounts(folder, spec)
        self._clip_scale = 1.0
        self._waits: Waits = lambda here, enrolled: False  # noqa: ARG005

    def resume_point(self) -> Checkpoint:
        """The last durable state; the start where there is none.

        Raises:
            ConfigError: The checkpoint is of another layout, or its ledger head is not in this ledger.
        """
        if not self._path.exists():
            return Checkpoint(0, self._start, self._step.start(self._start.size), "", self._layout.digest)
        checkpoint = Checkpoint.load(self._path)
        if checkpoint.layout != self._layout.digest:
            raise ConfigError(f"{self._path}: the checkpoint is of another adapter layout")
        if checkpoint.round and all(entry.hash != checkpoint.head for entry in self._ledger.entries()):
            raise ConfigError(
                f"{self._path}: the ledger does not hold the entry that this checkpoint was released under"
            )
        return checkpoint

    def debited(self) -> int:
        """Releases that the ledger says were debited, lost ones included."""
        return sum(1 for entry in self._ledger.entries() if entry.kind == "debit")

    def run(
        self,
        grid: Grid,
        on_round: Hook,
        on_called_off: Callable[[int], None] = lambda spent: None,  # noqa: ARG005
        waits: Waits | None = None,
    ) -> Checkpoint:
        """Run the rounds that are left and return the final state.

        Args:
            grid: Of Flower.
            on_round: Sees every durable round, and may end the run there.
            on_called_off: Is told of every secure sum of too few or too many devices, with the releases debited so far.
            waits: Is told of devices that a round waits for, and may end the run there.

        Raises:
            BudgetSpent: The debits that the reservation holds are used up before the rounds are.
            ConfigError: Other users are here than the run was calibrated for.
        """
        state = self.resume_point()
        self._waits = waits or self._waits
        with suppress(_StoppedError):
            roster = self._roster(grid)
            while state.round < self._config.rounds:
                roster = self._followed(grid, roster)
                state, finished = self._round(grid, roster, state)
                if finished is None:
                    on_called_off(self.debited())
                elif on_round(finished):
                    break
        return state

    def _round(self, grid: Grid, roster: Roster, state: Checkpoint) -> tuple[Checkpoint, Round | None]:
        began = time.monotonic()
        number = state.round + 1
        self._clip_scale = state.clip_scale
        spent = self.debited()
        if self._spec.epsilon != "inf" and spent >= self._spec.rounds:
            raise BudgetSpent(
                f"round {number} would be release {spent + 1} of {self._spec.rounds} that were reserved; "
                "start a new run, or resume with a larger budget"
            )
        # Secure sums are numbered by debit: a round that was called off, or lost in a crash, is not asked for again.
        attempt = spent + 1 if self._promise.noise == "distributed" else number
        randomness = round_randomness(self._config, attempt)
        cohort = roster.cohort(self._spec.sampling_rate, randomness.child("cohort"))
        # Devices that noise their own updates release them when they answer; a server releases when it adds the noise.
        early = self._promise.noise != "central"
        debit = self._ledger.append("debit", self._debit(attempt)) if early else None
        try:
            collected = self._noised_sum(grid, roster, cohort, state.vector, attempt, randomness)
        except CalledOff:
            return state, None
        debit = debit or self._ledger.append("debit", self._debit(attempt))
        noised = collected.values
        if self._promise.noise != "distributed":
            noised = add_central_noise(noised, self._spec, randomness.child("noise"))
        mean = noised[: self._spec.model_dim] / (self._spec.sampling_rate * self._spec.population) * state.clip_scale
        vector, velocity = self._step.apply(state.vector, state.velocity, mean)
        vector = cut_to_rank(vector, self._layout, int(self._spec.recipe.get("rank", 1)))
        witnesses = noised[self._spec.row_dim :]
        released = self._released(debit.index, number, vector)
        counts, scale = self._counts.read(number, noised, state.clip_scale)
        if counts:
            released["counts"] = digest_of(counts)
        if not roster.takes_anyone:  # a study has no devices that keep ledgers of their own
            released["cohort_commitment"] = self._keep_receipts(number, collected.receipts)
        head = self._ledger.append("release", released)
        after = Checkpoint(number, vector, velocity, head.hash, self._layout.digest, scale)
        after.save(self._path)
        self._counts.keep(counts)
        self._keep_witnesses(number, witnesses)
        seconds = time.monotonic() - began
        return after, Round(number, vector, spent + 1, seconds, collected.rejected, collected.answered, counts)

    def _noised_sum(
        self,
        grid: Grid,
        roster: Roster,
        cohort: Sequence[str],
        vector: Vector,
        attempt: int,
        randomness: Randomness,
    ) -> Collected:
        """Collect the sum of a round, shape `(dim,)`; with distributed noise, noised to the level that is published.

        Raises:
            CalledOff: With distributed noise: too few devices, or too many.
        """
        if self._promise.noise != "distributed":
            total = RunningSum(self._spec, attempt)
            self._collect(grid, roster, cohort, vector, total)
            return Collected(total.total, dict(total.rejected), total.receipts, total.users)
        noise_of_server = randomness.child("noise")
        if roster.takes_anyone:
            cohort, turned_away = self._participation.admit(cohort)
            if self._config.secagg == "full":
                found = self._masked_sum(grid, roster, cohort, vector, attempt, noise_of_server)
                return replace(
                    found, rejected={**found.rejected, **({"turned-away": turned_away} if turned_away else {})}
                )
            total = modular_sum(self._spec, attempt, len(cohort))
            total.reject("turned-away", turned_away)
            self._collect(grid, roster, cohort, vector, total, devices=len(cohort))
            return Collected(published(total, noise_of_server), dict(total.rejected), [], total.users)
        return self._masked_sum(grid, roster, cohort, vector, attempt, noise_of_server)

    def _collect(
        self,
        grid: Grid,
        roster: Roster,
        cohort: Sequence[str],
        vector: Vector,
        total: RunningSum | ModularSum,
        devices: int = 0,
    ) -> None:
        """Ask the cohort and add up what comes back before the time is over."""
        self._exchange(
            grid,
            roster,
            self._assignments(roster, cohort, vector, total.number, devices, total.reject),
            "train",
            total.number,
            lambda errand, reply: self._add(reply, len(errand.users), total),
            total.reject,
        )

    def _assignments(
        self,
        roster: Roster,
        cohort: Sequence[str],
        vector: Vector,
        number: int,
        devices: int,
        lost: Callable[[str, int], None],
    ) -> list[Errand]:
        placed = roster.place(cohort, self._config.chunk)
        lost("unavailable", len(cohort) - sum(len(users) for _, users in placed))

        def content(users: tuple[str, ...]) -> Callable[[], RecordDict]:
            return lambda: Assignment(self._spec, number, users, vector, devices, self._clip_scale).to_records()

        return [Errand(node, users, content(users)) for node, users in placed]

    def _exchange(
        self,
        grid: Grid,
        roster: Roster,
        errands: Sequence[Errand],
        kind: str,
        number: int,
        answered: Callable[[Errand, Message], None],
        lost: Callable[[str, int], None],
    ) -> None:
        seconds = self._config.round_timeout if kind == "train" else min(LEG_SECONDS, self._config.round_timeout)
        alone = not roster.takes_anyone
        exchange(grid, errands, kind, str(number), seconds=seconds, one_by_one=alone, answered=answered, lost=lost)

    def _masked_sum(
        self,
        grid: Grid,
        roster: Roster,
        cohort: Sequence[str],
        vector: Vector,
        attempt: int,
        randomness: Randomness,
    ) -> Collected:
        """Play the five legs of a secure sum; the first is the training.

        Whoever has not answered when a leg is over has dropped out of the round.

        Raises:
            CalledOff: Too few devices are left at some leg; nothing was learned.
        """
        masked = MaskedSum(self._spec, attempt, self._keys_enrolled(roster))

        def answered(leg: Leg) -> Callable[[Errand, Message], None]:
            def take(errand: Errand, reply: Message) -> None:
                if not reply.has_content():
                    masked.reject("unavailable", len(errand.users))
                    return
                try:
                    masked.take(errand.node, SumLetters.from_records(reply.content), errand.users, leg)
                except Refusal as refusal:
                    masked.reject(refusal.code, len(errand.users))

            return take

        errands = self._assignments(roster, cohort, vector, attempt, 0, masked.reject)
        self._exchange(grid, roster, errands, "train", attempt, answered(Leg.KEYS), masked.reject)
        for leg in SUM_LEGS[1:]:
            errands = [self._letters(node, letters, attempt, leg) for node, letters in masked.letters().items()]
            self._exchange(grid, roster, errands, "train.sum", attempt, answered(leg), masked.reject)
        return Collected(masked.published(randomness), dict(masked.rejected), masked.receipts, len(masked.receipts))

    def _letters(self, node: int, letters: dict[str, bytes], attempt: int, leg: Leg) -> Errand:
        return Errand(node, tuple(letters), SumLetters(self._spec.run, attempt, leg, letters, {}).to_records)

    def _keys_enrolled(self, roster: Roster) -> Container[str]:
        """Whose keys may be in a secure sum: the roster file of the run; in a simulation, whoever is simulated."""
        if roster.takes_anyone:
            return simulated_keys(self._spec.run, roster.subjects)
        return read_roster(self._enrolled.with_name(DEVICES))

    def _add(self, reply: Message, users: int, total: RunningSum | ModularSum) -> None:
        if not reply.has_content():  # Flower answers for a node that is away, or whose app did not run
            total.reject("unavailable", users)
            return
        try:
            total.add(Release.from_records(reply.content), users)
        except Refusal as refusal:
            total.reject(refusal.code, users)

    def _roster(self, grid: Grid) -> Roster:
        """Find who is enrolled: at first whoever is here, afterwards whoever was here at first."""
        if self._homes.exists():
            return self._known(grid)
        deadline = time.monotonic() + min(ENROL_SECONDS, self._config.round_timeout)
        hellos: dict[int, Sequence[str]] = {}
        while True:
            hellos |= self._hellos(grid, [node for node in grid.get_node_ids() if node not in hellos])
            here = sum(len(subjects) for subjects in hellos.values())
            if hellos and (here == 0 or here >= self._spec.population or self._enrolled.exists()):
                break
            if time.monotonic() >= deadline:
                break
            time.sleep(POLL_SECONDS[1])
        roster = Roster.of_hellos(hellos, self._spec.population)
        if roster.takes_anyone:
            return roster
        if self._enrolled.exists():
            return roster.of(self._read_enrolled())
        if len(roster.subjects) != self._spec.population:
            raise ConfigError(
                f"the run was calibrated for {self._spec.population} enrolled users, {len(roster.subjects)} are here"
            )
        write_private_file(self._enrolled, json.dumps(list(roster.subjects)).encode() + b"\n")
        return roster

    def _known(self, grid: Grid) -> Roster:
        """The roster of a coordinator that let its devices in one by one: nothing that a node says moves a subject."""
        enrolled, deadline = self._read_enrolled(), time.monotonic() + self._config.round_timeout
        while True:
            roster = Roster.of_homes(self._homes, enrolled, set(grid.get_node_ids()))
            here = len(roster.homes)
            # Who is connected has nothing to do with who will be drawn. A round that nobody can answer costs as much
            # budget as one that all do, so it waits.
            if 2 * here >= len(enrolled) or (here and time.monotonic() >= deadline):
                return roster
            if time.monotonic() >= deadline:
                raise ConfigError("no enrolled device is connected; the run goes on when some are")
            if self._waits(here, len(enrolled)):
                raise _StoppedError
            time.sleep(POLL_SECONDS[1])

    def _read_enrolled(self) -> list[str]:
        try:
            subjects: list[str] = json.loads(self._enrolled.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise DataError(
                f"{self._enrolled}: not the list of who was enrolled; the run cannot be continued"
            ) from None
        return subjects

    def _followed(self, grid: Grid, roster: Roster) -> Roster:
        """Notice devices that left, came back, or came back under another name of Flower's."""
        if roster.takes_anyone:
            return roster
        if self._homes.exists():
            return self._known(grid)
        online = set(grid.get_node_ids())
        if online == set(roster.nodes):
            return roster
        return roster.followed(self._hellos(grid, sorted(online - set(roster.nodes))), online)

    def _hellos(self, grid: Grid, nodes: Sequence[int]) -> dict[int, Sequence[str]]:
        """Ask nodes who lives there; a node that does not answer as it should is left out."""
        hellos: dict[int, Sequence[str]] = {}
        messages = [grid.create_message(RecordDict(), "query.hello", node, "0") for node in nodes]
        if not messages:
            return hellos
        for reply in grid.send_and_receive(messages, timeout=min(HELLO_SECONDS, self._config.round_timeout)):
            if not reply.has_content() or "hello" not in reply.content.config_records:
                continue
            subjects = reply.content.config_records["hello"].get("subjects")
            if isinstance(subjects, list) and len(subjects) <= MOST_RESIDENTS:
                hellos[reply.metadata.src_node_id] = [str(subject) for subject in subjects]
        return hellos

    def _debit(self, number: int) -> dict[str, Any]:
        event = self._promise.event(self._spec.noise_multiplier)
        reserved = next(entry.index for entry in self._ledger.entries() if entry.kind == "reserve")
        return {
            "event": event.to_json(),
            "reservation": reserved,
            "run": self._spec.run,
            "round": number,
            "spec": self._spec.digest,
        }

    def _keep_witnesses(self, number: int, witnesses: NDArray[np.float64]) -> None:
        """Publish what was released where every device sent zeros: nothing but noise, so that anyone can test it."""
        if witnesses.size:
            with (self._path.parent / WITNESSES).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"round": number, "values": [float(value) for value in witnesses]}) + "\n")

    def _keep_receipts(self, number: int, receipts: Sequence[str]) -> str:
        """Keep the round's receipts to this server and return the commitment to them that the ledger takes.

        An auditor who is given them, and devices' ledgers, can match release by release; nobody else learns anything.
        """
        salt = secrets.token_hex(32)
        opening = {"round": number, "salt": salt, "receipts": sorted(receipts)}
        descriptor = os.open(self._path.parent / RECEIPTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(json.dumps(opening) + "\n")
        return commitment(salt, sorted(receipts))

    def _released(self, debit: int, number: int, vector: Vector) -> dict[str, Any]:
        return {
            "debit": debit,
            "sha256": hashlib.sha256(vector.tobytes()).hexdigest(),
            "bytes": vector.nbytes,
            "run": self._spec.run,
            "round": number,
        }


def round_randomness(config: RunConfig, number: int) -> Randomness:
    """What privacy rests on comes from the operating system; a rehearsal repeats it, and claims nothing."""
    if config.rehearsal:
        return Randomness.rehearsal(config.seed, "round", number)
    return Randomness.system()


def spent_epsilon(spec: ReleaseSpec, releases: int) -> float:
    """Epsilon of `releases` rounds under the run's spec, at its delta; inf where nothing is promised."""
    if spec.epsilon == "inf":
        return float("inf")
    if releases == 0:
        return 0.0
    promise = promise_of(spec)
    return epsilon_of([promise.schedule(spec.noise_multiplier, releases)], spec.delta, adjacency=promise.adjacency)


def add_central_noise(total: NDArray[np.float64], spec: ReleaseSpec, randomness: Randomness) -> NDArray[np.float64]:
    """Add the server's noise to a sum of clipped updates, shape `(dim,)`; where devices add theirs, nothing.

    Guarantee: in central mode each number gets independent Gaussian noise of standard deviation multiplier x clip,
        times the spec's extrapolation, below 1 of which nothing is claimed.

    Raises:
        ClaimRefused: What was drawn is not such noise; nothing is released.
    """
    if spec.noise_multiplier == 0 or spec.noise != "central" or spec.unit != "user":
        return total
    scale = spec.noise_multiplier * spec.extrapolation * spec.clip
    noised = total + scale * randomness.normal(spec.dim)
    check_noise(noised - total, scale)
    return noised
