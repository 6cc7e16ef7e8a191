"""Worker processes: one per core with one thread each, or none.

Two one-thread processes finish a round in three quarters of the time of one two-thread process at the sizes we train
(docs/performance.md). With a GPU, or when asked for none, the work is done in the driver.

What a worker imports takes longer than what it then opens. On Linux without a GPU, workers are therefore forked from
one process that has imported it and does nothing else: `expect_workers` lets that process begin while the driver still
does work of its own. Elsewhere each worker is a new process (`spawn`): macOS' frameworks and CUDA survive no fork.
A worker ends with its driver, whatever ended that.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

__all__ = ["Workers", "expect_workers"]

P = ParamSpec("P")
T = TypeVar("T")

HOW = "HOMESPUN_WORKERS"
"""`spawn` starts every worker as a new process on Linux too."""

GPUS = (Path("/dev/nvidiactl"), Path("/dev/kfd"))
PRELOADED = [
    "simulations.hosts",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
]
"""What a worker needs to open a base; imported once, in a process with a single thread."""

_starting = threading.Lock()


class Workers:
    """Runs functions in worker processes that have opened one simulation, or here.

    Attributes:
        count: Worker processes; 0 where the driver does the work.
    """

    def __init__(self, text: str, count: int | None) -> None:
        """Start workers for the configuration `text`; one per core when `count` is absent."""
        if count is None:
            import torch

            count = 0 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        if count:
            expect_workers(count)
            told = (text, dict(os.environ))
            self._pool = ProcessPoolExecutor(count, _context(), initializer=_begin, initargs=told)
            # In a thread, because a worker is forked only when the process that it is forked from is ready for it.
            threading.Thread(target=_start_all, args=(self._pool, count), name="worker-start", daemon=True).start()
        else:
            from simulations.hosts import open_host

            open_host(text)

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run a function somewhere; without workers it has run when this returns."""
        if self._pool is not None:
            return self._pool.submit(function, *args, **kwargs)
        future: Future[T] = Future()
        try:
            future.set_result(function(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future

    def __enter__(self) -> Self:
        """Give the workers."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the workers; after an error, without waiting for what they had in hand."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)


def _start_all(pool: ProcessPoolExecutor, count: int) -> None:
    """Begin every worker of a pool, beside whatever the driver does; what goes wrong the first piece of work says."""
    with suppress(OSError, EOFError, RuntimeError):
        for _ in range(count):
            pool.submit(os.getpid)


def expect_workers(count: int | None) -> None:
    """Let the process begin from which `count` workers will be forked; returns at once.

    Calling it early saves time and changes nothing else; where workers are not forked it does nothing. The process ends
    with this one.
    """
    if count == 0 or not _can_fork():
        return
    with _starting, _told_where_code_is():
        resource_tracker.ensure_running()
        # An interrupt is the driver's to hear; the process keeps this mask, and ends with the driver.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            multiprocessing.forkserver.set_forkserver_preload(PRELOADED)
            multiprocessing.forkserver.ensure_running()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _can_fork() -> bool:
    """Whether workers may be forked here, and their parent can be told where our code is."""
    return (
        sys.platform == "linux"
        and os.environ.get(HOW) != "spawn"
        and not any(path.exists() for path in GPUS)
        and not sys.flags.ignore_environment
        and not any(os.pathsep in path for path in sys.path)
    )


def _context() -> BaseContext:
    return multiprocessing.get_context("forkserver" if _can_fork() else "spawn")


@contextmanager
def _told_where_code_is() -> Generator[None]:
    """Have a process that is started in the block import from where this one does, and never from the working folder.

    Its matrix products get one thread, as a worker's do, so that there is no other thread to fork beside.
    """
    paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
    told = {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _begin(text: str, environment: Mapping[str, str]) -> None:
    """Prepare a worker: settled, one thread, and the host opened ahead of the first message."""
    _settle(environment)
    import torch

    from simulations.hosts import open_host

    torch.set_num_threads(1)
    open_host(text)


def _settle(environment: Mapping[str, str]) -> None:
    """Make this process a worker: no say in Ctrl-C, an end with its driver, and the driver's variables of now."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_driver()
    if dict(os.environ) != environment:  # the process that it was forked from may have begun under others
        os.environ.clear()
        os.environ.update(environment)


def _end_with_driver() -> None:
    """End this process as soon as its driver is gone: nobody would ever ask it for anything again, or stop it."""
    driver = multiprocessing.parent_process()
    if driver is None:
        return
    sentinel = driver.sentinel

    def watch() -> None:
        connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="driver-watch", daemon=True).start()
