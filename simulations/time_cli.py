"""`homespun sim newcomers` and `homespun sim lifelong`: people who just came, and records that keep coming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from common.errors import ConfigError

__all__ = ["add_to"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Users = Annotated[int, typer.Option(min=2, help="how many at most")]
Run = Annotated[Path | None, typer.Argument(help="folder or name of a finished run; the newest when absent")]


def add_to(app: typer.Typer, find: Callable[[Path | None], Path]) -> None:
    """Add the commands to `homespun sim`; `find` finds a run."""

    @app.command("newcomers")
    def newcomers(
        run: Run = None,
        records: Annotated[str, typer.Option(help="how many records they have")] = "0,1,5,20",
        users: Users = 64,
        as_json: Json = False,
    ) -> int:
        """Cold start: what people who took no part in a run have with few records of their own, as a curve.

        Example: homespun sim newcomers runs/latest --records 0,1,5,20
        """
        from simulations.newcomers import curve_of, write_curve
        from simulations.report import write_report

        try:
            counts = [int(word) for word in records.split(",")]
        except ValueError:
            raise ConfigError(f"records: {records!r} is not a comma-separated list of numbers") from None
        path, console = find(run), Console(stderr=as_json)
        curve = curve_of(path, counts, users, lambda text: console.print(text, highlight=False))
        write_curve(path, curve)
        page = write_report(path)
        if as_json:
            print(json.dumps(curve.to_json()))
        else:
            console.print(curve.table())
            console.print(f"report: {page}", highlight=False)
        return 0

    @app.command("lifelong")
    def lifelong(
        run: Run = None,
        periods: Annotated[int, typer.Option(min=3, help="periods in which the records arrive")] = 4,
        users: Users = 32,
        drift: Annotated[bool, typer.Option("--drift", help="let everybody become another person half-way")] = False,
        as_json: Json = False,
    ) -> int:
        """Records that arrive over time: refitting with and without rehearsal, drift, and refits that are taken back.

        Example: homespun sim lifelong runs/latest --periods 4
        """
        from simulations.lifelong import lifelong_of, write_lifelong
        from simulations.report import write_report

        path, console = find(run), Console(stderr=as_json)
        found = lifelong_of(path, periods, users, drift=drift, say=lambda text: console.print(text, highlight=False))
        write_lifelong(path, found)
        page = write_report(path)
        if as_json:
            print(json.dumps(found.to_json()))
        else:
            console.print(found.table())
            console.print(f"report: {page}", highlight=False)
        return 0
