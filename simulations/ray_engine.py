"""Flower's own simulation engine, on Ray: the same two apps, on this machine or on a Ray cluster.

Each actor is a process that opens the base once and answers assignments of many users; what travels is a vector and a
sum. Without an address (`--ray-address`, or `$RAY_ADDRESS`) a Ray of our own is started on loopback and taken down
again; with one the cluster there is used, whose machines need Homespun, the base and the data under the same paths.

Flower 1.41 has no field for an address, and takes a Ray that is there: so Ray is joined before Flower's engine starts.
One thread of the driver waits for each actor's message, so as many assignments are in flight as the cluster has actors
(a CPU each, or a GPU each), and each passes through the driver's process: what a chunk trains for has to outlast what
it takes to send a vector and a sum.

Flower's engine and Ray import whatever the working directory holds, before anything else. A folder of the user's may
well hold a `common/` or a `client.py`, so Ray is started from an empty one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.errors import HomespunError

__all__ = ["run_on_ray"]

NODES_PER_ACTOR = 4
"""Flower hands one message to each node every tenth of a second; this keeps actors busy at a fortieth."""

OBJECT_STORE_BYTES = 512 * 1024 * 1024
LONGEST_FOLDER = 40
"""Ray puts Unix sockets some 60 characters below its folder, and a socket's path has at most 107."""

SECONDS_TO_STOP = 30.0

QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_worker_niceness": "0",  # else actors give way to whatever else this machine does; our own workers do not
    "OMP_NUM_THREADS": "1",
}


def run_on_ray(server_app: ServerApp, client_app: ClientApp, actors: int, address: str | None = None) -> None:
    """Run both apps to the end on Flower's engine.

    Args:
        server_app: Runs in a thread of this process.
        client_app: Is pickled to the actors.
        actors: Processes of one CPU each, where Ray is started here; a cluster decides for itself, and where there are
            GPUs every actor has one to itself.
        address: Of the cluster to join, as `host:port`; `$RAY_ADDRESS` when absent, and where that is not set a Ray of
            our own.

    Raises:
        HomespunError: Ray is not installed, cannot be reached, or has no room for a single actor.
    """
    with _ray(actors, address or os.environ.get("RAY_ADDRESS") or None) as resources, _silence("flwr"):
        count = int(resources.get("GPU", 0)) or int(resources.get("CPU", 0))
        if count < 1:
            raise HomespunError("Ray has no CPU to offer; start the cluster's workers, or leave the address out")
        _simulate(server_app, client_app, count, gpus=1.0 if resources.get("GPU") else 0.0)


def _simulate(server_app: ServerApp, client_app: ClientApp, actors: int, gpus: float) -> None:
    """Run Flower's engine in a thread, so that an interrupt of this one does not tear Ray down under its calls."""
    from flwr.simulation import run_simulation

    stop, ended, outcome = threading.Event(), threading.Event(), Future[None]()

    def simulate() -> None:
        try:
            run_simulation(
                _stoppable(server_app, stop, ended),
                client_app,
                num_supernodes=NODES_PER_ACTOR * actors,
                backend_config={"client_resources": {"num_cpus": 1, "num_gpus": gpus}, "init_args": {}},
            )
            outcome.set_result(None)
        except BaseException as error:
            outcome.set_exception(error)

    thread = threading.Thread(target=simulate, name="flower-engine")
    thread.start()
    try:
        outcome.result()
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        # Flower's words; the cause may be an exception of an actor, with what it was working on in its text.
        raise HomespunError(f"Flower's engine on Ray stopped: {type(error.__cause__).__name__}") from None
    finally:
        stop.set()
        thread.join()
        ended.wait(SECONDS_TO_STOP)


def _stoppable(server_app: ServerApp, stop: threading.Event, ended: threading.Event) -> ServerApp:
    """Let `stop` end an app that waits for replies which nobody is there to give any more."""
    outer = ServerApp()

    @outer.main()
    def main(grid: Grid, context: Context) -> None:  # pyright: ignore[reportUnusedFunction]
        ask = grid.pull_messages

        def pull_messages(message_ids: Iterable[str]) -> Iterable[Message]:
            if stop.is_set():
                raise HomespunError("the simulation engine was stopped")
            return ask(message_ids)

        vars(grid)["pull_messages"] = pull_messages
        try:
            server_app(grid, context)
        finally:
            ended.set()

    return outer


@contextlib.contextmanager
def _ray(actors: int, address: str | None) -> Generator[dict[str, float]]:
    """Start or join Ray, give what it has to offer, and leave nothing of it behind."""
    os.environ.update({name: value for name, value in QUIET.items() if name not in os.environ})
    try:
        import ray
    except ModuleNotFoundError:
        raise HomespunError("--engine ray needs Ray: pip install 'homespun[ray]'") from None
    roles = str(Path(__file__).resolve().parent.parent)
    paths = [roles, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    settings: dict[str, Any] = {
        "include_dashboard": False,
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "runtime_env": {"env_vars": {**QUIET, "PYTHONPATH": os.pathsep.join(paths)}},
    }
    folder = _short_folder()
    empty = folder / "empty"
    empty.mkdir()
    if address is not None:
        settings["address"] = address
    else:
        settings |= {
            "address": "local",
            "num_cpus": max(1, actors),
            "object_store_memory": OBJECT_STORE_BYTES,
            "_node_ip_address": "127.0.0.1",
            "_temp_dir": str(folder),
        }
    try:
        with contextlib.chdir(empty):
            try:
                ray.init(**settings)
            except (ConnectionError, OSError, RuntimeError, ValueError) as error:
                raise HomespunError(f"Ray does not start or cannot be reached: {type(error).__name__}") from None
        resources: dict[str, float] = dict(ray.cluster_resources())
        yield resources
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> Path:
    """A folder that only we can read: Ray's logs and whatever it spills lie there."""
    place = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="homespun-", dir=place if len(place) <= LONGEST_FOLDER else "/tmp"))  # noqa: S108


@contextlib.contextmanager
def _silence(name: str) -> Generator[None]:
    """Keep a library from narrating; what went wrong reaches the caller as an exception."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
