"""The Flower ServerApp: configuration -> rounds -> checkpoint.

The same app runs on the in-process grid, on Flower's simulation engine and on a SuperLink. `build` makes it over a
prepared run; `app`, which the bundle names, prepares the run from what `flwr run` was given.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import ConfigError
from server import run_folder
from server.rounds import Hook, Round, Rounds

__all__ = ["app", "build"]


def build(opened: Callable[[Context], run_folder.RunFolder], on_round: Hook) -> ServerApp:
    """Make the app over a way to open the run; `on_round` sees every durable round and may end the run there."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        folder = opened(context)
        try:
            Rounds(folder.config, folder.spec, folder.layout, folder.start, folder.path, folder.ledger).run(
                grid, on_round
            )
        finally:
            folder.ledger.close()

    return server_app


def _from_run_config(context: Context) -> run_folder.RunFolder:
    """Open the run folder that `flwr run -c 'folder="..."'` names; `homespun server run` makes it."""
    folder = str(context.run_config.get("folder", ""))
    if not folder:
        raise ConfigError("folder: flwr run needs -c 'folder=\"RUN\"', a folder that homespun server run prepared")
    return run_folder.reopen(Path(folder))


def _log(finished: Round) -> None:
    print(json.dumps({"round": finished.number, "seconds": round(finished.seconds, 3)}), flush=True)  # noqa: T201


app = build(_from_run_config, _log)
