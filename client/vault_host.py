"""The resident vault: holds the socket, the outbox and the owner's limits; has a child train, and puts it away again.

Idle it holds no model and no torch. A child that dies, is killed, takes too much memory or too much of the day costs
one refusal; the next request starts another. What was released before a crash is found again in the ledger and in the
store of what was sent, so the same round gives the same bytes under the same debit.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.budget_keeper import sent_bytes
from client.device_home import DeviceHome
from client.joined_sums import JoinedSums
from client.membership import Membership, UsageMeter
from client.vault_child import Message, receive, send, shape_of
from common.errors import Refusal
from common.sum_wire import SumLetters
from common.supervision import bound
from common.wire import Assignment, Release, ReleaseSpec, from_raw_bytes, raw_bytes

__all__ = ["ChildVault"]

START_SECONDS = 600.0
WATCH_SECONDS = 0.25
MEGABYTE = 1e6
PAUSED = "paused"

_RUN_CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from client.vault_child import main; main()"


class ChildVault:
    """A vault that is served while another process does its work."""

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
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
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
                facts = {"do": "train", "spec": spec.to_text(), "round": assignment.round, "users": assignment.users}
                reply = self._ask(Message(facts, raw_bytes(assignment.vector)))
                total = from_raw_bytes(reply.content, str(reply.facts["dtype"]))
                self._meter.add(megabytes=(assignment.vector.nbytes + total.nbytes) / MEGABYTE)
                return Release(total, int(reply.facts["users"]), str(reply.facts["receipt"]))
        except Refusal as refusal:
            self._note_refusal(refusal.code, str(refusal))
            raise

    def join(self, assignment: Assignment) -> SumLetters:
        """Have the child train, and begin a secure sum; its secrets stay here, in memory, until it is over.

        Raises:
            Refusal: As for `train`; or the round was begun before, or the roster of its devices cannot be checked.
        """
        try:
            with self._lock:
                self._check_owner(assignment.spec)
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
                if self._process is not None and time.monotonic() - self._used > self._idle_seconds:
                    self._end_child()
            finally:
                self._lock.release()

    def close(self) -> None:
        """Put the child away."""
        with self._lock:
            self._end_child()

    @property
    def is_loaded(self) -> bool:
        """Whether a child holds a model now."""
        return self._process is not None

    def _check_owner(self, spec: ReleaseSpec) -> None:
        if self._membership.data is None or self._membership.user is None:
            raise Refusal("not-now", "this device was given no data to learn from")
        if Membership.load(self._home).status == PAUSED:
            raise Refusal("not-now", "paused by the owner")
        if spec.model != self._membership.invite.base.digest:
            raise Refusal("model-mismatch", "the run is for another base model than the one that was joined")
        shape_of(spec, self._membership.model)
        self._check_time()

    def _check_time(self) -> None:
        self._home.policy().check_usage(self._meter.today())

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
        policy = self._home.policy()
        connection = self._child(policy.threads)
        minutes = policy.minutes_per_day - self._meter.today().minutes_today
        began = time.monotonic()
        try:
            send(connection, message)
            reply = self._wait(connection, began + 60.0 * minutes, policy.memory_megabytes)
        except (EOFError, OSError):
            self._end_child()
            raise Refusal("failed", "the process that trains ended in the middle of its work") from None
        finally:
            self._used = time.monotonic()
            self._meter.add(minutes=(self._used - began) / 60.0)
        if "refusal" in reply.facts:
            raise Refusal(str(reply.facts["refusal"]), str(reply.facts["reason"]))
        return reply

    def _wait(self, connection: Connection, deadline: float, megabytes: float) -> Message:
        while not connection.poll(WATCH_SECONDS):
            if time.monotonic() > deadline:
                self._end_child()
                raise Refusal("not-now", "today's minutes were used up in the middle of the work")
            if self._process is not None and resident_megabytes(self._process.pid) > megabytes:
                self._end_child()
                raise Refusal("not-now", f"the work took more than the {megabytes:.0f} MB that the policy grants")
        return receive(connection)

    def _child(self, threads: int) -> Connection:
        if self._connection is not None and self._process is not None and self._process.poll() is None:
            return self._connection
        self._end_child()
        mine, theirs = socket.socketpair()
        folder = str(Path(__file__).resolve().parent.parent)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                bound([sys.executable, "-c", _RUN_CHILD, folder, str(theirs.fileno())]),
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self._connection = Connection(mine.detach())
        begin = {
            "home": str(self._home.folder),
            "model": str(self._membership.model),
            "data": str(self._membership.data),
            "user": self._membership.user,
            "threads": threads,
        }
        try:
            send(self._connection, Message(begin))
            if not self._connection.poll(START_SECONDS):
                raise EOFError
            receive(self._connection)
        except (EOFError, OSError):
            self._end_child()
            raise Refusal("failed", "the process that trains did not start; its log says why") from None
        return self._connection

    def _end_child(self) -> None:
        connection, process = self._connection, self._process
        self._connection = self._process = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.wait()


def resident_megabytes(pid: int) -> float:
    """Memory that a process holds; 0 where the platform does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE
