"""The folder of one coordinator: its keys, its devices, its runs; who holds it, and where it answers.

====================  ==============================================================================================
`settings.json`       where the coordinator answers, and what its invites offer
`tls/`                its own certificate authority, and the leaf that devices see
`devices.sqlite`      invites, devices, and what each may do
`runs/NAME/`          one folder per run, as `homespun sim run` makes them
`flower/`             what Flower keeps: a database that is wiped of updates after each run, keys, logs
`coordinator.json`    process and ports of the coordinator that runs now
====================  ==============================================================================================
"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError, StoreError
from common.files import make_private_folder, write_private_file
from common.places import state_home
from common.supervision import process_start

__all__ = ["Running", "ServerHome", "bound", "check_address"]

SETTINGS_FORMAT = 1
MOST_PORT = 65535
_ADDRESS = re.compile(r"[^\s/:]+:[0-9]{1,5}")


@dataclass(frozen=True)
class Running:
    """A coordinator that runs.

    Attributes:
        pid: Its process.
        started: When the process began, in clock ticks since boot; tells it from another one with the same number.
        address: Where devices reach it, `host:port`.
        superlink: Where Flower's own APIs listen, on loopback only.
        metrics: Where measurements are served; empty where they are not.
    """

    pid: int
    started: str
    address: str
    superlink: str
    metrics: str = ""


@dataclass(frozen=True)
class ServerHome:
    """The folder of a coordinator; what it holds is read when it is asked for."""

    folder: Path

    @classmethod
    def open(cls, folder: Path | None = None, *, create: bool = False) -> ServerHome:
        """Open the coordinator of this installation: `server` in the folder of what must survive when absent.

        Raises:
            DataError: There is none, and none was asked for.
        """
        home = cls(state_home() / "server" if folder is None else folder)
        if not home.folder.is_dir():
            if not create:
                raise DataError(f"{home.folder}: no coordinator here yet; `homespun server up` makes one")
            make_private_folder(home.folder)
        return home

    @property
    def runs(self) -> Path:
        """Folder of the runs."""
        return self.folder / "runs"

    def run_folders(self) -> list[Path]:
        """The folders of all runs, the oldest first."""
        found = [path for path in self.runs.glob("[!.]*") if (path / "config.toml").is_file()]
        return sorted(found, key=lambda path: (path / "config.toml").stat().st_mtime_ns)

    @property
    def flower(self) -> Path:
        """Folder of what Flower keeps."""
        return self.folder / "flower"

    @property
    def tls(self) -> Path:
        """Folder of the certificates."""
        return self.folder / "tls"

    @property
    def devices(self) -> Path:
        """File of invites and devices."""
        return self.folder / "devices.sqlite"

    def settings(self) -> dict[str, Any]:
        """Read the settings; empty before the first `up`.

        Raises:
            StoreError: They are damaged, or of a later version.
        """
        return _read(self.folder / "settings.json") or {}

    def change_settings(self, **changes: Any) -> dict[str, Any]:
        """Change some settings; None takes one out."""
        kept = {name: value for name, value in {**self.settings(), **changes}.items() if value is not None}
        kept["format"] = SETTINGS_FORMAT
        write_private_file(self.folder / "settings.json", _text(kept), replace=True)
        return kept

    def running(self) -> Running | None:
        """The coordinator that runs now; None where none does, also where one died."""
        values = _read(self.folder / "coordinator.json")
        if values is None:
            return None
        try:
            found = Running(**{name: value for name, value in values.items() if name != "format"})
        except TypeError:
            raise StoreError(f"{self.folder / 'coordinator.json'}: damaged; remove it") from None
        return found if process_start(found.pid) == found.started else None

    def note_running(self, address: str, superlink: str, metrics: str = "") -> None:
        """Say that this process is the coordinator."""
        mine = Running(os.getpid(), process_start(os.getpid()), address, superlink, metrics)
        values = {**asdict(mine), "format": SETTINGS_FORMAT}
        write_private_file(self.folder / "coordinator.json", _text(values), replace=True)

    def note_stopped(self) -> None:
        """Say that none runs any more."""
        (self.folder / "coordinator.json").unlink(missing_ok=True)

    def stop_running(self) -> bool:
        """Ask the coordinator to stop; whether there was one."""
        running = self.running()
        if running is None:
            return False
        os.kill(running.pid, signal.SIGTERM)
        return True


def check_address(text: str) -> str:
    """Return `text` where it is `host:port`.

    Raises:
        ConfigError: It is not.
    """
    if not _ADDRESS.fullmatch(text):
        raise ConfigError(f"{text}: an address is host:port")
    if not 0 < int(text.rpartition(":")[2]) <= MOST_PORT:
        raise ConfigError(f"{text}: a port is a number from 1 to {MOST_PORT}")
    return text


def bound(address: str) -> list[socket.socket]:
    """Take `address`, `host:port`, at every address that its host has here; nothing listens yet.

    Raises:
        ConfigError: It cannot be had: another program listens there, or the host is not this machine.
    """
    host, _, port = address.rpartition(":")
    found: list[socket.socket] = []
    try:
        for family, kind, _, _, place in socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM):
            one = socket.socket(family, kind)
            try:
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(place)
            except OSError as error:
                one.close()
                if found and error.errno == errno.EADDRNOTAVAIL:  # a name that has an address which is not set up
                    continue
                raise
            found.append(one)
    except (OSError, OverflowError, ValueError) as error:
        for one in found:
            one.close()
        reason = getattr(error, "strerror", None) or "not an address"
        raise ConfigError(f"{address}: cannot be listened on: {reason}") from None
    return found


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise StoreError(f"{path}: damaged") from None
    if not isinstance(values, dict) or values.get("format") != SETTINGS_FORMAT:
        raise StoreError(f"{path}: not of a format that this version reads")
    return values


def _text(values: dict[str, Any]) -> bytes:
    return json.dumps(values, indent=1, sort_keys=True).encode() + b"\n"
