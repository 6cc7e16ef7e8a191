"""`homespun server ...`: what whoever runs the coordinator runs.

Nothing that a command needs is imported before the command is asked for.
"""

from __future__ import annotations

import typer

from server import oversight_cli

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The coordinator: its runs, what they cost, and the evidence for it.",
    rich_markup_mode=None,
)


@app.callback()
def coordinator() -> None:
    """The coordinator: its runs, what they cost, and the evidence for it."""


oversight_cli.add_to(app)
