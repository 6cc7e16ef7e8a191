"""The owner's side of a device, put together: what answers, where it listens, and how the owner finds it.

The resident process of a device has one; `homespun device serve` runs one alone where nothing is up.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from client.device_home import DeviceHome
from client.membership import Membership
from client.model_process import ModelProcess
from client.owner_access import Access
from client.owner_desk import OwnersDesk
from client.owner_line import OwnerLine, owner_socket
from client.owner_server import LOOPBACK, listening, owner_app
from common.config import BUILT_IN
from common.errors import ConfigError, DataError
from common.files import write_private_file
from common.model_files import base_folder

__all__ = ["OwnersSide", "begin_alone", "owners_side", "page_link"]

PORT = 8642
PORT_FILE = "owner-port.json"


class OwnersSide:
    """Where the owner's side of a device is.

    Attributes:
        port: That it listens on.
        key: What programs show.
    """

    def __init__(self, host: str, port: int, access: Access) -> None:
        """Say where."""
        self.port = port
        self.key = access.key
        self._host = f"[{host}]" if ":" in host else host

    @property
    def address(self) -> str:
        """Of the endpoint, as OpenAI's clients want it."""
        return f"http://{self._host}:{self.port}/v1"


@contextmanager
def owners_side(
    home: DeviceHome, process: Callable[[], ModelProcess], *, host: str = LOOPBACK, port: int | None = None
) -> Generator[OwnersSide]:
    """Serve the owner of `home` inside the block.

    Args:
        home: The device.
        process: Where its model is at the moment.
        host: Address to listen on.
        port: That and no other; when absent the one of last time, or any that is free.

    Raises:
        ConfigError: It cannot be listened on.
    """
    access = Access(home)
    desk = OwnersDesk(home, process, base=lambda: _base_name(home))
    app, path = owner_app(desk, access), owner_socket(home)
    for one in [port] if port is not None else [_port_before(home), 0]:
        try:
            with listening(app, host=host, port=one, path=path) as found:
                if port is None and found != _port_before(home):
                    content = json.dumps({"port": found}).encode()
                    write_private_file(home.folder / PORT_FILE, content, replace=True)
                desk.port = found
                desk.begin_counting()
                yield OwnersSide(host, found, access)
            return
        except ConfigError:
            if one == 0 or port is not None or desk.port:
                raise


def begin_alone(home: DeviceHome) -> dict[str, Any]:
    """What a model's process is told on a device that takes part in nothing."""
    from client.learn_cli import base_of

    return {"home": str(home.folder), "model": str(base_of(home)), "threads": home.policy().threads}


def page_link(home: DeviceHome) -> str:
    """Make a link to the owner's page, good once and for ten minutes.

    Raises:
        Refusal: The device is not up.
    """
    found = OwnerLine(home).ask("ticket", {})
    return f"http://{LOOPBACK}:{found['port']}/#{found['ticket']}"


def _base_name(home: DeviceHome) -> str:
    try:
        joined = Membership.load(home)
    except DataError:
        joined = None
    if joined is not None and joined.model.is_dir():
        return joined.invite.base.name
    from client.learn_cli import base_of

    try:
        folder = base_of(home)
    except DataError:
        return "not here yet"
    return BUILT_IN if folder == base_folder(BUILT_IN) else folder.name


def _port_before(home: DeviceHome) -> int:
    try:
        return int(json.loads((home.folder / PORT_FILE).read_bytes())["port"])
    except (OSError, ValueError, KeyError, TypeError):
        return PORT
