"""The process that holds the model, seen from the resident one: started when there is work, and put away again.

It has two lines: one for training, which takes one piece of work at a time, and one for the owner's questions, which
are answered while training goes on. Opening a second process for those would cost its memory a second time.
"""

from __future__ import annotations

import os
import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from client.vault_child import Message, receive, send
from common.errors import DataError, HomespunError, Refusal
from common.supervision import bound

__all__ = ["ModelProcess", "resident_megabytes"]

START_SECONDS = 600.0
ANSWER_SECONDS = 600.0
"""How long the next piece of an answer may take: a large model on a small computer reads a long question slowly."""

MEGABYTE = 1e6

_RUN_CHILD = "import sys; sys.path.insert(0, sys.argv.pop(1)); from client.vault_child import main; main()"

Waiting = queue.SimpleQueue[dict[str, Any] | None]


class ModelProcess:
    """A child process with a model, or none at the moment."""

    def __init__(self, begin: Callable[[], Mapping[str, Any]]) -> None:
        """Describe it; `begin` says at every start what `client.vault_child.main` is told, `threads` among it."""
        self._begin = begin
        self._began: dict[str, Any] = {}
        # The kernel ends a bound process with the thread that started it, so that has to be one that stays.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="model-process")
        self._lock = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._work: Connection | None = None
        self._talk: Connection | None = None
        self._asked = 0
        self._waiting: dict[int, Waiting] = {}
        self._used = time.monotonic()

    @property
    def pid(self) -> int | None:
        """Its process number; None where there is none."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    @property
    def idle_seconds(self) -> float:
        """How long ago the owner last asked it something; 0 while an answer is on its way."""
        return 0.0 if self._waiting else time.monotonic() - self._used

    def work(self) -> Connection:
        """Return the line for training, after starting the process where there is none that begins like this.

        Raises:
            EOFError: It ended as it began.
            Refusal: It does not get ready.
        """
        with self._lock:
            begin = dict(self._begin())
            if self.pid is None or self._work is None or begin != self._began:
                self._start(begin)
            if self._work is None:
                raise Refusal("failed", "the process that trains did not start; its log says why")
            return self._work

    def get_ready(self) -> None:
        """Start it and have it open what answers before anybody asks; returns at once.

        Most of what the first question would wait for is Python's imports. What goes wrong the first question says.
        """

        def ready() -> None:
            with suppress(HomespunError, OSError, EOFError):
                self.work()
                for _ in self.talk({"do": "systems"}):
                    pass

        threading.Thread(target=ready, name="model-process-ready", daemon=True).start()

    def talk(self, facts: Mapping[str, Any]) -> Generator[dict[str, Any]]:
        """Ask one thing of the owner's, and give what comes until it is done; closing the generator cancels it.

        Raises:
            Refusal: The process did not start, ended, or refused.
            DataError: It has not what was asked for.
        """
        with self._lock:
            try:
                number, inbox, talk = self._begin_talk(facts)
            except (OSError, EOFError):  # it ended a moment ago
                self.end()
                try:
                    number, inbox, talk = self._begin_talk(facts)
                except (OSError, EOFError):
                    raise Refusal("failed", "the process that answers ends as soon as it begins") from None
        try:
            while True:
                try:
                    found = inbox.get(timeout=ANSWER_SECONDS)
                except queue.Empty:
                    raise Refusal("failed", "the process that answers does not go on") from None
                if found is None:
                    raise Refusal("failed", "the process that answers ended in the middle; ask again")
                if "refusal" in found:
                    if found["refusal"] == "unknown":
                        raise DataError(str(found["reason"]))
                    raise Refusal(str(found["refusal"]), str(found["reason"]))
                done = bool(found.pop("done", False))
                yield found
                if done:
                    return
        finally:
            with suppress(OSError):
                self._tell(talk, {"do": "cancel", "id": number})
            self._used = time.monotonic()
            self._waiting.pop(number, None)

    def rest(self, seconds: float) -> None:
        """Put it away where nobody has asked it anything for so long; never while it answers or begins."""
        if self._lock.acquire(blocking=False):
            try:
                if self.pid is not None and self.idle_seconds > seconds:
                    self.end()
            finally:
                self._lock.release()

    def end(self) -> None:
        """Put it away, whatever it does."""
        if (begun := self._process) is not None:
            begun.kill()  # before the lock, which whoever waits for it to get ready holds
        with self._lock:
            process, lines = self._process, (self._work, self._talk)
            self._process = self._work = self._talk = None
            for line in lines:
                if line is not None:
                    with suppress(OSError):
                        line.close()
            if process is not None:
                process.kill()
                process.wait()
            self._leave_all()

    def _start(self, begin: dict[str, Any]) -> None:
        self.end()
        pairs = [socket.socketpair() for _ in range(2)]
        folder = str(Path(__file__).resolve().parent.parent)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(begin["threads"]),
            "HF_HUB_OFFLINE": "1",
            "TQDM_DISABLE": "1",
        }
        theirs = [other.fileno() for _, other in pairs]
        try:
            self._process = self._starter.submit(
                subprocess.Popen,
                bound([sys.executable, "-c", _RUN_CHILD, folder, *map(str, theirs)]),
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                env=environment,
            ).result()
        finally:
            for _, other in pairs:
                other.close()
        self._work, self._talk = (Connection(mine.detach()) for mine, _ in pairs)
        try:
            send(self._work, Message(begin))
            ready = self._work.poll(START_SECONDS)
            if ready:
                receive(self._work)
        except (EOFError, OSError):
            self.end()
            raise EOFError from None
        if not ready:
            self.end()
            raise Refusal("failed", "the process that holds the model did not start; logs/vault.log says why")
        self._began, self._used = begin, time.monotonic()
        threading.Thread(target=self._hear, args=(self._talk,), name="model-process", daemon=True).start()

    def _hear(self, line: Connection) -> None:
        """Hand what the process says to whoever asked, until the line is cut."""
        while True:
            try:
                facts = receive(line).facts
            except (EOFError, OSError, TypeError, ValueError):
                break
            inbox = self._waiting.get(int(facts.pop("id", 0)))
            if inbox is not None:
                inbox.put(facts)
        with self._lock:
            if self._talk is line:
                self.end()  # it is gone; the next question starts another

    def _leave_all(self) -> None:
        for inbox in list(self._waiting.values()):
            inbox.put(None)

    def _begin_talk(self, facts: Mapping[str, Any]) -> tuple[int, Waiting, Connection]:
        """Ask something of the process that runs, or of a new one.

        Raises:
            OSError, EOFError: It is gone.
        """
        if self.pid is None:
            self.work()
        talk = self._talk
        if talk is None:
            raise OSError
        self._asked += 1
        number, inbox = self._asked, Waiting()
        self._waiting[number] = inbox
        try:
            self._tell(talk, {**facts, "id": number})
        except OSError:
            self._waiting.pop(number, None)
            raise
        return number, inbox, talk

    def _tell(self, line: Connection, facts: Mapping[str, Any]) -> None:
        with self._lock:
            send(line, Message(dict(facts)))


def resident_megabytes(pid: int) -> float:
    """Memory that a process holds; 0 where the platform does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / MEGABYTE
