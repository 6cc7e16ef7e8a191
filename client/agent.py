"""The resident part of a device: serves its owner, and in a federation the vault; calls the coordinator, keeps up.

`supervise` is the smallest process that can be: it starts the vault and the SuperNode and starts them again. `reside`
is the vault's: the owner's page and endpoint, and in a federation the socket that the bundle asks, and a call to the
coordinator now and then, which is the same for every device, chosen or not.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.supervision import Supervised, process_start, program

if TYPE_CHECKING:
    from client.device_home import DeviceHome
    from client.model_process import ModelProcess

__all__ = [
    "agent_pid",
    "noted_as_up",
    "only_serves",
    "reside",
    "show_link",
    "socket_path",
    "supervise",
    "supervisor_command",
]

AGENT, LOGS = "agent.json", "logs"
TEND_SECONDS = 1.0
NODE_DELAY = 20.0
"""Flower refuses a node until the heartbeat of the one before it has run out, some 60 s after a crash."""

TASK_POLL_SECONDS = "3"
"""How often Flower's executor asks its SuperNode for work; once a second is a third of what an idle device takes."""

STANDING_SECONDS = 60.0
IDLE_SECONDS = 300.0
MOST_NUMBERS = 1 << 24
"""Of the largest shared vector that is taken over the socket."""

LONGEST_SOCKET = 96

_RUN = "import sys; sys.path.insert(0, sys.argv.pop(1)); from client.agent import {0}; {0}(*sys.argv[1:])"
_RUN_NODE = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); from client.supernode import run_node; run_node(*sys.argv[1:])"
)


def supervisor_command(folder: Path, socket: Path) -> list[str]:
    """How the supervisor of the device in `folder` is started, without anything that it does not need."""
    return [sys.executable, "-c", _RUN.format("supervise"), _code(), str(folder), str(socket)]


def socket_path(folder: Path, runtime: Path) -> Path:
    """Where the vault of the device in `folder` is asked; a path that fits into a socket's address."""
    path = runtime / "device" / "vault.sock"
    if len(os.fsencode(path)) <= LONGEST_SOCKET:
        return path
    import hashlib

    return Path(f"/tmp/homespun-{os.getuid()}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]}/vault.sock")  # noqa: S108


def agent_pid(folder: Path) -> int | None:
    """The supervisor that runs now, or a `serve` alone; None where neither does."""
    values = _noted(folder)
    return int(values["pid"]) if values is not None else None


def only_serves(folder: Path) -> bool:
    """Whether what runs now is a `serve` alone: it answers its owner and takes part in nothing."""
    values = _noted(folder)
    return values is not None and bool(values.get("serves"))


@contextmanager
def noted_as_up(folder: Path, *, serves: bool = False) -> Generator[None]:
    """Say inside the block that the device in `folder` is this process, for who ends it or wants it down."""
    mine = {"pid": os.getpid(), "started": process_start(os.getpid()), "serves": serves}
    (folder / AGENT).write_text(json.dumps(mine), encoding="utf-8")
    try:
        yield
    finally:
        (folder / AGENT).unlink(missing_ok=True)


def _noted(folder: Path) -> dict[str, Any] | None:
    try:
        values: dict[str, Any] = json.loads((folder / AGENT).read_text(encoding="utf-8"))
        return values if process_start(int(values["pid"])) == values["started"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def supervise(folder: str, socket: str) -> None:
    """Run the vault and the SuperNode of the device in `folder` until SIGTERM or SIGINT."""
    home, stop = Path(folder), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with noted_as_up(home):
        _supervise(home, socket, stop)


def _supervise(home: Path, socket: str, stop: threading.Event) -> None:
    folder = str(home)
    (home / LOGS).mkdir(mode=0o700, exist_ok=True)
    vault = Supervised(
        [sys.executable, "-c", _RUN.format("reside"), _code(), folder, socket], home / LOGS / "vault.log"
    )
    if sys.stdout.isatty():  # to nobody's log, although a link is good once only
        subprocess.Popen([sys.executable, "-c", _RUN.format("show_link"), _code(), folder])  # noqa: S603
    node: Supervised | None = None
    seen, status = 0, ""
    try:
        while not stop.wait(TEND_SECONDS):
            vault.tend()
            if (now := _written(home / "fleet.json")) != seen:
                seen, status = now, _status(home)
            if node is None and Path(socket).exists() and status == "approved":
                node = _node(home, socket)
            if node is not None:
                if status in ("revoked", "left"):
                    node.stop()
                else:
                    node.tend()
    finally:
        # The node first: it says goodbye, so that it can come back at once.
        for process in (node, vault):
            if process is not None:
                process.stop(20.0)


def reside(folder: str, socket: str) -> None:
    """Serve the owner of the device in `folder`; and once it joined a federation its vault too, until SIGTERM."""
    from client.device_home import DeviceHome
    from client.model_process import ModelProcess
    from client.owner_host import begin_alone, owners_side

    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    home = DeviceHome.open(Path(folder))
    alone = ModelProcess(lambda: begin_alone(home))
    here = _Here(alone)
    with owners_side(home, lambda: here.process):
        try:
            while not (home.folder / "fleet.json").exists():
                if stop.wait(1.0):
                    return
                _rest(alone)
            _reside_joined(home, Path(socket), stop, here)
        finally:
            here.process.end()


class _Here:
    """Where the model of the device is: in a process of its own, or in the vault's."""

    def __init__(self, process: ModelProcess) -> None:
        self.process = process


def _reside_joined(home: DeviceHome, socket: Path, stop: threading.Event, here: _Here) -> None:
    from client.coordinator_calls import Calls
    from client.membership import Membership
    from client.owner_files import adopted
    from client.vault_host import ChildVault
    from client.vault_service import FleetService, Outbox, serving

    membership = adopted(Membership.load(home))
    pause = _seconds("HOMESPUN_STANDING_SECONDS", STANDING_SECONDS)
    calls = Calls(membership)
    next_call = 0.0
    while True:
        if time.monotonic() >= next_call:
            membership = calls.until_ready(membership)
            next_call = time.monotonic() + pause
            if membership.model.is_dir():
                break
        if stop.wait(min(1.0, pause)):
            return
        _rest(here.process)
    vault = ChildVault(
        membership,
        idle_seconds=_idle_seconds(),
        note_refusal=calls.note_refusal,
        fetch_roster=calls.fetch_roster,
    )
    alone, here.process = here.process, vault.process
    alone.end()
    service = FleetService(
        vault,
        Outbox(home.folder / "outbox", home.master.subkey("outbox")),
        model=membership.invite.base.digest,
        note_refusal=calls.note_refusal,
    )
    with serving(service, socket, dim=MOST_NUMBERS):
        next_call = 0.0
        while not stop.wait(1.0):
            if time.monotonic() >= next_call:
                calls.keep_up(vault)
                next_call = time.monotonic() + pause
            vault.rest()
    vault.close()


def _rest(process: ModelProcess) -> None:
    """Put a process away that was idle for long."""
    process.rest(_idle_seconds())


def _idle_seconds() -> float:
    return _seconds("HOMESPUN_IDLE_SECONDS", IDLE_SECONDS)


def show_link(folder: str) -> None:
    """Print the link to the owner's page once the device in `folder` answers; for who started it at a terminal."""
    from client.device_home import DeviceHome
    from client.owner_host import page_link
    from common.errors import HomespunError

    home = DeviceHome.open(Path(folder))
    for _ in range(240):
        try:
            link = page_link(home)
        except HomespunError:
            time.sleep(0.25)
            continue
        sys.stdout.write(f"your page, for ten minutes and once: {link}\n")
        return


def _node(home: Path, socket: str) -> Supervised:
    values = json.loads((home / "fleet.json").read_text(encoding="utf-8"))["invite"]
    authority, flower = home / "authority.pem", home / "flower"
    authority.write_text(values["authority"], encoding="ascii")
    flower.mkdir(mode=0o700, exist_ok=True)
    import socket as sockets

    with sockets.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [
        *(sys.executable, "-P", "-c", _RUN_NODE, _code()),
        *(program("flower-supernode"), "--superlink", values["address"], "--root-certificates", str(authority)),
        *("--auth-supernode-private-key", str(home / "node.key"), "--host", "127.0.0.1", "--port", str(port)),
        *("--node-config", f'vault="{socket}"'),
    ]
    environment = {
        **os.environ,
        "FLWR_HOME": str(flower),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": os.environ.get("FLWR_SUPEREXEC_TASK_POLL_INTERVAL", TASK_POLL_SECONDS),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    return Supervised(
        command,
        home / LOGS / "node.log",
        environment=environment,
        folder=flower,
        delay=NODE_DELAY,
        slowest_delay=NODE_DELAY,
    )


def _written(file: Path) -> int:
    """When it was written last, in nanoseconds; 0 where it is not there."""
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return 0


def _status(home: Path) -> str:
    try:
        return str(json.loads((home / "fleet.json").read_text(encoding="utf-8"))["status"]).replace(
            "paused", "approved"
        )
    except (OSError, ValueError, KeyError):
        return ""


def _seconds(name: str, otherwise: float) -> float:
    """A time that tests and demonstrations make shorter."""
    try:
        return float(os.environ.get(name, otherwise))
    except ValueError:
        return otherwise


def _code() -> str:
    return str(Path(__file__).resolve().parent.parent)
