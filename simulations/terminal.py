"""How a run tells what it does: a live display in a terminal, plain lines elsewhere, JSON lines for a program."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from common.config import RunConfig
from simulations.run import Progress

__all__ = ["drawn", "emit", "streamed"]


@contextmanager
def drawn(console: Console, config: RunConfig) -> Generator[Progress]:
    """Draw a run's progress while the block runs; quiet lines where nobody watches."""
    if not console.is_terminal:
        yield _plain(console, config)
        return
    bars = Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )
    rounds = bars.add_task("rounds", total=config.rounds, note="", start=False)
    personal = bars.add_task("personal models", total=None, note="", visible=False, start=False)
    began: list[float] = []

    def on_round(line: dict[str, Any]) -> None:
        if not began:  # a resumed run begins in the middle: speed counts from its first finished round
            bars.start_task(rounds)
            began.append(time.monotonic())
            began.append(line["round"])
        seconds = time.monotonic() - began[0]
        speed = f"{(line['round'] - began[1]) * config.cohort / seconds:.0f} users/s, " if seconds > 0 else ""
        bars.update(rounds, completed=line["round"], note=f"{speed}epsilon {_short(line['epsilon_spent'])}")

    def on_personal(done: int, total: int) -> None:
        bars.start_task(personal)
        bars.update(personal, completed=done, total=total, visible=True, note=f"{done}/{total} users")

    def say(text: str) -> None:
        console.print(text, highlight=False)

    with bars:
        yield Progress(say=say, round=on_round, personal=on_personal)


def streamed() -> Progress:
    """Tell what happens as lines of JSON, for a program that started this one."""
    return Progress(
        say=lambda text: emit("note", text=text),
        round=lambda line: emit("round", **line),
        personal=lambda done, total: emit("personal", done=done, total=total),
    )


def emit(kind: str, **fields: Any) -> None:
    """Write one event as a line of JSON."""
    print(json.dumps({"event": kind, **fields}), flush=True)  # noqa: T201 - this is the stream that was asked for


def _plain(console: Console, config: RunConfig) -> Progress:
    def on_round(line: dict[str, Any]) -> None:
        if "evaluation" in line:
            point = line["evaluation"]
            console.print(
                f"round {line['round']}/{config.rounds}: global {point['global']:.4f} nats per token, "
                f"base {point['base']:.4f}; epsilon spent {_short(line['epsilon_spent'])}",
                highlight=False,
            )

    def on_personal(done: int, total: int) -> None:
        if done == total:
            console.print(f"personal models of {total} users trained and scored", highlight=False)

    return Progress(say=lambda text: console.print(text, highlight=False), round=on_round, personal=on_personal)


def _short(epsilon: float | str) -> str:
    return epsilon if isinstance(epsilon, str) else f"{epsilon:.2f}"
