"""Worker processes: one per core with one thread each, or none.

Two one-thread processes finish a round in three quarters of the time of one two-thread process at the sizes we train
(docs/performance.md). With a GPU, or when asked for none, the work is done in the driver.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from simulations.hosts import open_host, start_worker

__all__ = ["Workers"]

P = ParamSpec("P")
T = TypeVar("T")


class Workers:
    """Runs functions in worker processes that have opened one simulation, or here.

    Attributes:
        count: Worker processes; 0 where the driver does the work.
    """

    def __init__(self, text: str, count: int | None) -> None:
        """Start workers for the configuration `text`; one per core when `count` is absent."""
        import torch

        if count is None:
            count = 0 if torch.cuda.is_available() else len(os.sched_getaffinity(0))
        self.count = count
        self._pool: ProcessPoolExecutor | None = None
        if count:
            self._pool = ProcessPoolExecutor(
                count, multiprocessing.get_context("spawn"), initializer=start_worker, initargs=(text, 1)
            )
        else:
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
