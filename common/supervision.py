"""Processes that another one starts, watches, starts again, and takes along when it ends.

On Linux a child is told to end by the kernel as soon as its supervisor is gone, also when that one was killed. So
whoever is killed and started again never meets what it left behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["Supervised", "bound", "process_start", "program"]

MOST_LOG_BYTES = 4 << 20

_LAUNCH = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Runs in the child before the command does, instead of code between fork and exec in a process with threads."""


class Supervised:
    """One child process that should run.

    Attributes:
        starts: How often it was started.
        last_exit: What the process that ended last returned; None until one ended.
    """

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        delay: float = 1.0,
        slowest_delay: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Describe the process; nothing is started yet.

        Args:
            command: Program and arguments; the program as an absolute path.
            log: Takes its output; the one before is kept as `<log>.old`.
            environment: Its variables; those of this process when absent.
            folder: Where it runs.
            delay: Seconds before it is started again after it ended; doubled each time it ends soon after.
            slowest_delay: At most so many.
            clock: Seconds.
        """
        self._command = list(command)
        self._log = log
        self._environment = environment
        self._folder = folder
        self._delays = (delay, slowest_delay)
        self._clock = clock
        self._process: subprocess.Popen[bytes] | None = None
        self._began = 0.0
        self._ended: float | None = None
        self._wait = delay
        self.starts = 0
        self.last_exit: int | None = None

    @property
    def pid(self) -> int | None:
        """Its process number; None while it does not run."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def tend(self) -> bool:
        """Start it where it does not run and its time has come; return whether it runs."""
        if self.pid is not None:
            return True
        if self._process is not None:
            self._note_end()
        if self._ended is not None and self._clock() - self._ended < self._wait:
            return False
        self._start()
        return True

    def stop(self, seconds: float = 10.0) -> None:
        """Ask it to end, so that it ends its own children; insist if it does not."""
        process, self._process = self._process, None
        self._ended = None
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self) -> None:
        if self._log.exists() and self._log.stat().st_size > MOST_LOG_BYTES:
            self._log.replace(self._log.with_name(f"{self._log.name}.old"))
        descriptor = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = subprocess.Popen(  # noqa: S603
                bound(self._command),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                env=self._environment,
                cwd=self._folder,
            )
        finally:
            os.close(descriptor)
        self._began = self._clock()
        self.starts += 1

    def _note_end(self) -> None:
        if self._process is None:
            return
        self.last_exit = self._process.returncode
        self._process = None
        now = self._clock()
        shortest, longest = self._delays
        self._wait = shortest if now - self._began > 2 * longest else min(2 * self._wait, longest)
        if self._ended is None:
            self._wait = shortest
        self._ended = now


def bound(command: Sequence[str]) -> list[str]:
    """The same command as a process that ends when the thread that starts it does."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCH, str(os.getpid()), *command]


def process_start(pid: int) -> str:
    """When a process began, as the kernel writes it; empty where there is no such process.

    Together with its number it names a process for good; a number alone is given out again.
    """
    try:
        content = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        if Path("/proc/self/stat").exists():
            return ""
        try:
            os.kill(pid, 0)
        except OSError:
            return ""
        return "alive"
    state, *rest = content.rpartition(")")[2].split()
    return "" if state in "ZX" else rest[18]


def program(name: str) -> str:
    """Path of a command that was installed with this Python.

    Raises:
        FileNotFoundError: It was not.
    """
    path = Path(sys.executable).parent / name
    if not path.exists():
        raise FileNotFoundError(2, "not installed beside this Python", str(path))
    return str(path)
