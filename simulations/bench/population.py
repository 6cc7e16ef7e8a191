"""What a large population costs that a small one does not: seconds, bytes and memory of the same cohort's round."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from simulations.bench.suite import Comparison, compared

__all__ = ["growth", "memory_of_all", "traffic_of_all"]

SMALL, LARGE, COHORT, ROUNDS = 10_000, 100_000, 1000, 10


def growth(quick: bool) -> Comparison:
    """Rounds of one cohort size from a small and a large population, taking turns."""
    small, large, cohort, rounds = (400, 4000, 32, 2) if quick else (SMALL, LARGE, COHORT, ROUNDS)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        os.environ.setdefault("HOMESPUN_HOME", folder)
        ways: dict[str, Callable[[], float]] = {}
        moved: dict[str, list[int]] = {}
        for name, users in (("small", small), ("large", large)):
            moved[name] = []
            turn = _round_of(stack, Path(folder) / name, users, cohort, rounds + 1)
            ways[f"{users} users"] = _watched(turn, moved[name])
        found = compared(
            "a round from a large population", "user of the cohort, wall", ways, rounds, cohort, f"{small} users"
        )
        traffic = {name: float(np.median(values[1:])) for name, values in moved.items()}
        notes: dict[str, Any] = {
            "cohort": cohort,
            "bytes_per_round": traffic,
            "bytes_large_over_small": traffic["large"] / max(traffic["small"], 1.0),
            "peak_bytes_of_all_processes": memory_of_all(),
        }
    return Comparison(found.name, found.unit, found.medians, found.spread, found.ratios, notes)


def _round_of(stack: ExitStack, folder: Path, users: int, cohort: int, rounds: int) -> Callable[[], None]:
    """Prepare a run; each call is one more round."""
    from client.base_model import model_digest
    from common.config import RunConfig
    from server import app as server_app
    from server import run_folder
    from simulations import hosts
    from simulations.grid import InProcessGrid
    from simulations.run import empty_context
    from simulations.workers import Workers

    crew = len(os.sched_getaffinity(0))
    config = RunConfig(
        users=users, cohort=cohort, rounds=rounds, epsilon=float("inf"), method="fedavg", workers=crew, local_steps=1
    )
    base = hosts.base_of(config)
    opened = run_folder.create(folder, config, population=users, model=base, digest=model_digest(base), data="d" * 64)
    opened.ledger.close()
    text = config.to_toml()
    workers = stack.enter_context(Workers(text, crew))

    def run() -> None:
        grid = InProcessGrid(lambda message: workers.submit(hosts.answer_message, text, message, crew), crew)
        app = server_app.build(lambda _: run_folder.reopen(folder), lambda finished: True)  # noqa: ARG005
        app(grid, empty_context())

    return run


def _watched(run: Callable[[], None], moved: list[int]) -> Callable[[], float]:
    def timed() -> float:
        before, began = traffic_of_all(), time.perf_counter()
        run()
        spent = time.perf_counter() - began
        moved.append(traffic_of_all() - before)
        return spent

    return timed


def _family() -> list[Path]:
    """Folders under /proc of this process and everything that it started."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(folder.name)] = int(fields[1])
    family = {os.getpid()}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    return [Path(f"/proc/{number}") for number in sorted(family)]


def memory_of_all() -> int:
    """Peak resident bytes of this process and its children together (Linux).

    What each holds now, where a page that several share counts once among them, and in full how far it once was above.
    """
    return sum(
        1024
        * (
            _field(folder / "smaps_rollup", "Pss:")
            + _field(folder / "status", "VmHWM:")
            - _field(folder / "status", "VmRSS:")
        )
        for folder in _family()
    )


def traffic_of_all() -> int:
    """Bytes that this process and its children have read and written by system calls so far (Linux)."""
    return sum(_field(folder / "io", "rchar:") + _field(folder / "io", "wchar:") for folder in _family())


def _field(path: Path, name: str) -> int:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0)
