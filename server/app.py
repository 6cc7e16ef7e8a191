"""The Flower ServerApp: configuration -> rounds -> checkpoint.

The same app runs on the in-process grid, on Flower's simulation engine and on a SuperLink. `build` makes it over a
prepared run; `app`, which the bundle names, prepares the run from what the coordinator, or `flwr run`, was given.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import BudgetSpent, ClaimRefused, ConfigError, HomespunError, Refusal, VerificationError
from common.files import take_lock
from server import fleet_runs, run_folder
from server.checkpoint import Checkpoint
from server.measures import Measures
from server.rounds import Hook, Round, Rounds, Waits

__all__ = ["app", "build"]

SECONDS_TO_WAIT = 10.0
"""How long the coordinator's look at whether anybody works on a run may be in the way."""


def build(opened: Callable[[Context], run_folder.RunFolder], on_round: Hook) -> ServerApp:
    """Make the app over a way to open the run; `on_round` sees every durable round and may end the run there."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        _work(opened(context), grid, on_round)

    return server_app


app = ServerApp()


@app.main()
def federated(grid: Grid, context: Context) -> None:
    """Work on the run in the folder that the run's configuration names, until it is done or not wanted any more."""
    folder = str(context.run_config.get("folder", ""))
    if not folder:
        raise ConfigError("folder: flwr run needs -c 'folder=\"RUN\"', a folder that homespun server run prepared")
    path = Path(folder)
    _hold(path)
    try:
        opened = run_folder.reopen(path)
        lost = fleet_runs.heed_proofs(path, opened.ledger)
        if lost:
            _log(path, event="restored", taken_as_spent=lost)
        measures = Measures(path, opened.spec, opened.config.rounds)
        _log(
            path,
            event="begun",
            after_round=Checkpoint.load(path / run_folder.CHECKPOINT).round,
            of=opened.config.rounds,
        )

        def on_round(finished: Round) -> bool:
            measures.note(finished)
            seconds = round(finished.seconds, 3)
            _log(path, event="round", round=finished.number, seconds=seconds, spent=finished.spent)
            fleet_runs.heed_proofs(path, opened.ledger)
            return fleet_runs.wanted(path, unsaid="run") == "stop"  # `flwr run` alone says neither

        def on_called_off(spent: int) -> None:
            _log(path, event="called-off", spent=spent, of=opened.spec.rounds)

        counted: list[int] = []

        def on_waiting(here: int, enrolled: int) -> bool:
            if counted != [here]:
                counted[:] = [here]
                _log(path, event=fleet_runs.WAITING, connected=here, enrolled=enrolled)
            return fleet_runs.wanted(path, unsaid="run") == "stop"

        _work(opened, grid, on_round, on_called_off, on_waiting)
    except HomespunError as error:
        # What cannot get better by trying again is not tried again.
        final = isinstance(error, BudgetSpent | ClaimRefused | VerificationError)
        fleet_runs.note_outcome(path, "refused" if final else "failed", str(error))
        _log(path, event="refused" if isinstance(error, Refusal) else "failed", reason=str(error))
        raise
    fleet_runs.note_outcome(path, "ended")
    seen = fleet_runs.overview(path)
    outcome = "finished" if seen.round >= seen.rounds else "stopped"
    _log(path, event=outcome, round=seen.round, of=seen.rounds, spent=seen.spent, reserved=seen.spec.rounds)


def _work(
    folder: run_folder.RunFolder,
    grid: Grid,
    on_round: Hook,
    on_called_off: Callable[[int], None] = lambda spent: None,  # noqa: ARG005
    waits: Waits | None = None,
) -> None:
    rounds = Rounds(folder.config, folder.spec, folder.layout, folder.start, folder.path, folder.ledger)
    try:
        rounds.run(grid, on_round, on_called_off, waits)
    finally:
        folder.ledger.close()


def _hold(path: Path) -> None:
    """Say, for as long as this process lives, that it works on the run.

    Raises:
        Refusal: Another one does.
    """
    deadline = time.monotonic() + SECONDS_TO_WAIT
    while True:
        try:
            take_lock(path / fleet_runs.RUNNING, "run-locked")
            return
        except Refusal:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _log(path: Path, **facts: object) -> None:
    """Say what happened, in the run's own log and to whoever watches; nothing in it shows who took part."""
    print(json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **facts}), flush=True)  # noqa: T201
    fleet_runs.note_event(path, **facts)
