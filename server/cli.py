"""`homespun server ...`: what the operator of a coordinator runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from server import oversight_cli
from server.server_home import ServerHome

__all__ = ["Json", "app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The coordinator: who is enrolled, what runs, what it costs.",
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


@app.callback()
def main() -> None:
    """The coordinator: who is enrolled, what runs, what it costs."""


oversight_cli.add_to(app)


@app.command("status")
def status(as_json: Json = False) -> int:
    """Say whether the coordinator runs, and where it answers.

    Example: homespun server status
    """
    running = ServerHome.open().running()
    facts = {
        "running": running is not None,
        "address": running.address if running else None,
        "metrics": (running.metrics or None) if running else None,
    }
    if as_json:
        print(json.dumps(facts))
    elif running is None:
        print("the coordinator does not run; `homespun server up` starts it")
    else:
        print(f"the coordinator runs as process {running.pid} and answers at {running.address}")
    return 0
