"""`homespun sim methods` and `homespun sim sweep`: what there is to compare, and the comparison."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.config import METHOD_ALIASES, RunConfig
from common.errors import ConfigError
from simulations.options import takes_configuration

__all__ = ["add_to"]

LAPTOP = {"rounds": 6, "cohort": 60, "evaluation_users": 40, "answered": 0}
"""What a sweep takes where nobody says otherwise: a grid is many runs, and a laptop should end one before lunch."""


def add_to(app: typer.Typer) -> None:
    """Add the commands to `homespun sim`."""
    app.command("methods")(methods)
    app.command("sweep")(takes_configuration(sweep, without=("method", "epsilon", "seed"), rehearsal=True))


def methods(as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of text")] = False) -> int:
    """List the methods: what each shares, what it keeps, how noise enters, and what papers call it.

    Example: homespun sim methods
    """
    from common.methods import METHODS

    rows = [
        {
            "name": row.name,
            "aliases": [name for name, target in METHOD_ALIASES.items() if target == row.name],
            "shares": row.sends,
            "keeps": row.keeps,
            "leaves": row.leaves,
            "stays": row.stays,
            "server": row.aggregation,
            "noise": row.noise,
            "silo": "refused without --private-noise" if row.private_in_pass else "yes",
            "source": row.source,
        }
        for row in METHODS.values()
    ]
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(f"{row['name']}  (papers: {', '.join(row['aliases']) or 'no other name'})")
        for field in ("leaves", "stays", "server", "noise", "silo", "source"):
            print(f"    {field:<7} {row[field]}")
    return 0


def sweep(
    config: RunConfig,
    methods: Annotated[
        str, typer.Option(help="rows of the method table, or papers' names; what dual shares is what fedavg has")
    ] = "local,dual",
    epsilons: Annotated[str, typer.Option(help="budgets; inf adds no noise")] = "1,2,4,8,inf",
    seeds: Annotated[str, typer.Option(help="one run of everything for each")] = "0",
    out: Annotated[
        Path | None,
        typer.Option(help="folder of the sweep; one by its settings under runs/ when absent", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of text")] = False,
) -> int:
    """Run methods by epsilons by seeds, each a run of its own, and draw what sharing buys at each epsilon.

    The same command goes on where it was interrupted. Runs are rehearsals unless --no-rehearsal says otherwise: their
    epsilons are calibrated, not claimed, and no budget of the data is used. What nobody named is small: 6 rounds of
    60 users, or of half of them where they are fewer, and 40 users scored.

    Example: homespun sim sweep --methods local,fedavg,dual --epsilons 1,8,inf --seeds 0,1 --users 400 --cohort 40
    """
    from simulations.workers import expect_workers

    expect_workers(config.workers)
    from simulations import run as runs
    from simulations import terminal
    from simulations.sweep import cells_of, collect, default_folder, run_cells
    from simulations.sweep_page import sweep_page, sweep_table

    console = Console(stderr=True) if as_json else Console()
    lists = (
        _list(methods, "methods", lambda word: METHOD_ALIASES.get(word.lower(), word)),
        _list(epsilons, "epsilons", float),
        _list(seeds, "seeds", int),
    )
    config = _for_a_laptop(config, console)
    folder = out or Path("runs") / default_folder(config, lists)
    cells = cells_of(config, *lists, folder)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    def start(own: RunConfig, path: Path) -> bool:
        with terminal.drawn(console, own) as progress:
            return runs.start(own, path, progress).finished

    def resume(path: Path) -> bool:
        with terminal.drawn(console, config) as progress:
            return runs.resume(path, progress).finished

    refused = run_cells(cells, start, resume, say)
    if refused is None:
        say(f"stopped after a finished round; the same command, or --out {folder}, goes on")
        return 130
    found = collect(cells, refused)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.json").write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    (folder / "sweep.csv").write_text(found.to_csv(), encoding="utf-8")
    (folder / "sweep.html").write_text(sweep_page(found), encoding="utf-8")
    if as_json:
        print(json.dumps({"folder": str(folder), **found.to_json()}))
        return 0
    console.print(sweep_table(found))
    say(f"table: {folder / 'sweep.csv'}, {folder / 'sweep.json'}; figure: {folder / 'sweep.html'}")
    return 0


def _list(text: str, name: str, read: Callable[[str], Any]) -> list[Any]:
    """Read a comma-separated list.

    Raises:
        ConfigError: An entry is not what the list holds.
    """
    try:
        values = [read(word.strip()) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{name}: {text!r} is not a comma-separated list of them") from None
    if name == "epsilons" and any(math.isnan(value) or value <= 0 for value in values):
        raise ConfigError("epsilons: each is a positive number, or inf")
    return values


def _for_a_laptop(config: RunConfig, console: Console) -> RunConfig:
    """Set what nobody named so that a grid of runs ends in reasonable time, and say so."""
    from simulations.planning import count_users

    changed: dict[str, Any] = {
        name: value for name, value in LAPTOP.items() if name not in config.model_fields_set and name != "cohort"
    }
    if "cohort" not in config.model_fields_set:
        changed["cohort"] = max(1, min(LAPTOP["cohort"], (config.users or count_users(config)) // 2))
    if changed:
        said = ", ".join(f"{name} {value}" for name, value in changed.items())
        console.print(f"not named, so small: {said}", highlight=False)
    return config.model_copy(update=changed)
