"""The resident vault: holds the socket, the outbox and the owner's limits; has a child train, and puts it away again.

Idle it holds no model and no torch. A child that dies or is killed is started again, and goes on from its checkpoint;
one that takes too much memory or too much of the day costs a refusal, as does one that dies again and again. What was
released before a crash is found again in the ledger and in the store of what was sent, so the same round gives the
same bytes under the same debit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.budget_keeper import sent_bytes
from client.device_home import DeviceHome
from client.joined_sums import JoinedSums
from client.membership import Membership, UsageMeter
from client.model_process import ModelProcess, resident_megabytes
from client.record_store import RecordStore
from client.vault_child import Message, receive, send, shape_of
from common.errors import Refusal
from common.model_files import precision_of
from common.sum_wire import SumLetters
from common.traffic import traffic_of
from common.wire import Assignment, Release, ReleaseSpec, from_raw_bytes, raw_bytes

__all__ = ["ChildVault"]

WATCH_SECONDS = 0.25
CHECK_SECONDS, COUNT_SECONDS = 1.0, 15.0
"""While work goes on: how often the owner's grant is looked at, and how often its minutes are counted."""

LONGEST_MINUTES = 1e6
MOST_STARTS = 3
"""How often a child is started for one round that keeps ending in the middle of it."""

MEGABYTE = 1e6
PAUSED = "paused"
ENDED = "the process that trains ended in the middle of its work"


class _ChildGoneError(Exception):
    """The process that trains ended without an answer."""


class ChildVault:
    """A vault that is served while another process does its work.

    Attributes:
        process: That process; it answers its owner too.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        idle_seconds: float,
        note_refusal: Callable[[str, str], None],
        fetch_roster: Callable[[ReleaseSpec], None],
    ) -> None:
        """Own the device of `membership`.

        Args:
            membership: Whose data and model.
            idle_seconds: How long a child without work keeps its memory.
            note_refusal: Told the code of every refusal, and why, for the owner.
            fetch_roster: Fetches the roster of a run with secure sums, or raises `Refusal`.
        """
        self._membership = membership
        self._home: DeviceHome = membership.home
        self._meter = UsageMeter(self._home.folder)
        self._idle_seconds = idle_seconds
        self._note_refusal = note_refusal
        self._subject = str(self._home.read_ledger().header["subject"])
        self._lock = threading.RLock()
        self.process = ModelProcess(self._begin)
        self._used = 0.0
        self._sums = JoinedSums(self._home, self._subject, self._ask, fetch_roster)

    def subjects(self) -> Sequence[str]:
        """Who lives here."""
        return [self._subject]

    def train(self, assignment: Assignment) -> Release:
        """Have the child train and gate; what was released already comes back as it was.

        Raises:
            Refusal: The owner does not grant it, or not now, or the child did not get through.
        """
        spec = assignment.spec
        try:
            with self._lock:
                self._check_owner(spec)
                released = self._released(spec, assignment.round)
                if released is not None:
                    return released
                self._check_traffic(assignment)
                return self._trained(assignment)
        except Refusal as refusal:
            self._note_refusal(refusal.code, str(refusal))
            raise

    def _trained(self, assignment: Assignment) -> Release:
        spec = assignment.spec
        facts = {
            "do": "train",
            "spec": spec.to_text(),
            "round": assignment.round,
            "users": assignment.users,
            "clip_scale": assignment.clip_scale,
        }
        reply = None
        for _ in range(MOST_STARTS):
            try:
                reply = self._ask_once(Message(facts, raw_bytes(assignment.vector)))
                break
            except _ChildGoneError:  # the next one goes on from its checkpoint, or finds what was released
                released = self._released(spec, assignment.round)
                if released is not None:
                    return released
        if reply is None:
            raise Refusal("failed", f"{ENDED}, again and again; logs/vault.log says why")
        total = from_raw_bytes(reply.content, str(reply.facts["dtype"]))
        self._meter.add(megabytes=(assignment.vector.nbytes + total.nbytes) / MEGABYTE)
        cut = reply.facts.get("cut")
        if cut:
            self._meter.note_cut(f"round {assignment.round} was cut to {cut[0]} of {cut[1]} steps to fit the time")
        return Release(total, int(reply.facts["users"]), str(reply.facts["receipt"]))

    def join(self, assignment: Assignment) -> SumLetters:
        """Have the child train, and begin a secure sum; its secrets stay here, in memory, until it is over.

        Raises:
            Refusal: As for `train`; or the round was begun before, or the roster of its devices cannot be checked.
        """
        try:
            with self._lock:
                self._check_owner(assignment.spec)
                self._check_traffic(assignment)
                letters = self._sums.join(assignment)
                self._meter.add(megabytes=assignment.vector.nbytes / MEGABYTE)
                return letters
        except Refusal as refusal:
            self._note_refusal(refusal.code, str(refusal))
            raise

    def answer(self, asked: SumLetters) -> SumLetters:
        """Answer a letter of a secure sum that was begun."""
        with self._lock:
            answers, refusals = self._sums.answer(asked)
            self._meter.add(megabytes=sum(map(len, [*asked.letters.values(), *answers.letters.values()])) / MEGABYTE)
        for refusal in refusals:
            self._note_refusal(refusal.code, str(refusal))
        return answers

    def personalize(self, spec: ReleaseSpec, number: int, vector: NDArray[np.float32]) -> dict[str, Any]:
        """Have the child refit the private adapter over a newer global one, for the owner alone.

        Raises:
            Refusal: Not now, or it did not work.
        """
        with self._lock:
            if self._sums.is_under_way:
                raise Refusal("not-now", "a round that this device takes part in waits for its answers")
            self._check_time()
            facts = {"do": "personalize", "spec": spec.to_text(), "round": number}
            return self._ask(Message(facts, raw_bytes(vector))).facts

    def rest(self) -> None:
        """Put the child away if it was idle for long."""
        if self._lock.acquire(blocking=False):
            try:
                if time.monotonic() - self._used > self._idle_seconds:
                    self.process.rest(self._idle_seconds)
            finally:
                self._lock.release()

    def close(self) -> None:
        """Put the child away."""
        with self._lock:
            self._end_child()

    @property
    def is_loaded(self) -> bool:
        """Whether a child holds a model now."""
        return self.process.pid is not None

    def _check_owner(self, spec: ReleaseSpec) -> None:
        if not len(RecordStore(self._home)):
            raise Refusal("not-now", "this device was given no data to learn from")
        if Membership.load(self._home).status == PAUSED:
            raise Refusal("not-now", "paused by the owner")
        precision = precision_of(spec.model, self._membership.invite.base.digest)
        if precision is None:
            raise Refusal("model-mismatch", "the run is for another base model than the one that was joined")
        self._home.policy().precision(precision)
        shape_of(spec, self._membership.model)
        self._check_time()

    def _check_time(self, minutes: float = 0.0) -> None:
        """Return if work may go on, `minutes` of which are not counted yet.

        Raises:
            Refusal: Not now.
        """
        used = self._meter.today()
        self._home.policy().check_usage(replace(used, minutes_today=used.minutes_today + minutes))

    def _check_traffic(self, assignment: Assignment) -> None:
        """Return if what this round sends and receives is within what is left of today's traffic.

        Raises:
            Refusal: Not now.
        """
        moved = traffic_of(assignment.spec)
        needed = (moved.down + moved.up) / MEGABYTE
        left = self._home.policy().megabytes_per_day - self._meter.today().megabytes_today
        if needed > left:
            raise Refusal("not-now", f"the round moves {needed:.2f} MB, and {max(0.0, left):.2f} MB of today are left")

    def _released(self, spec: ReleaseSpec, number: int) -> Release | None:
        """Find what this round released before a crash; the very same bytes, under the same debit."""
        for entry in self._home.read_ledger().entries:
            body = entry.body
            if entry.kind != "release" or (body.get("run"), body.get("round")) != (spec.run, number):
                continue
            if body.get("spec") != spec.digest:
                continue
            content = sent_bytes(self._home, body["sha256"])
            if content is not None:
                return Release(from_raw_bytes(content, body["dtype"]), 1, body["sha256"])
        return None

    def _ask(self, message: Message) -> Message:
        """Ask the child; what only computes is asked again of the next one where it ends in the middle.

        Raises:
            Refusal: The child refused, or the owner does not grant it any more, or no child gets through.
        """
        starts = MOST_STARTS if message.facts["do"] in ("check", "hold") else 1
        for _ in range(starts):
            with suppress(_ChildGoneError):
                return self._ask_once(message)
        raise Refusal("failed", f"{ENDED}; logs/vault.log says why")

    def _ask_once(self, message: Message) -> Message:
        policy = self._home.policy()
        self._used = time.monotonic()
        try:
            connection = self.process.work()
            minutes = policy.minutes_left(self._meter.today())
            facts = {**message.facts, "minutes": min(minutes, LONGEST_MINUTES), "memory": policy.memory_megabytes}
            send(connection, Message(facts, message.content))
            reply = self._wait(connection, policy.memory_megabytes)
        except (EOFError, OSError):
            self._end_child()
            raise _ChildGoneError from None
        finally:
            self._count()
        if "refusal" in reply.facts:
            raise Refusal(str(reply.facts["refusal"]), str(reply.facts["reason"]))
        return reply

    def _wait(self, connection: Connection, megabytes: float) -> Message:
        """Wait for the child, and end it as soon as the owner's grant does; its checkpoint stays.

        Raises:
            Refusal: Not any more.
        """
        checked = 0.0
        while not connection.poll(WATCH_SECONDS):
            now = time.monotonic()
            try:
                pid = self.process.pid
                if pid is not None and resident_megabytes(pid) > megabytes:
                    raise Refusal("not-now", f"the work took more than the {megabytes:.0f} MB that the policy grants")
                if now - checked >= CHECK_SECONDS:
                    checked = now
                    self._check_time((now - self._used) / 60.0)
                    if Membership.load(self._home).status == PAUSED:
                        raise Refusal("not-now", "paused by the owner in the middle of the work")
                if now - self._used > COUNT_SECONDS:
                    self._count()
            except Refusal:
                self._end_child()
                raise
        return receive(connection)

    def _count(self) -> None:
        """Count the minutes since they were counted last; a crash must not give them back."""
        now = time.monotonic()
        self._meter.add(minutes=(now - self._used) / 60.0)
        self._used = now

    def _begin(self) -> dict[str, Any]:
        return {
            "home": str(self._home.folder),
            "model": str(self._membership.model),
            "threads": self._home.policy().threads,
        }

    def _end_child(self) -> None:
        self.process.end()
