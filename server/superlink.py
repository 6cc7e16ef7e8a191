"""The SuperLink, asked over its Control API on loopback: who may connect, which runs there are; and what it is given.

The only file of the coordinator's own process that knows Flower. The bundle is made in memory from the very files
that this installation runs, so a wheel is enough, and its name is `source_digest`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Generator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import httpx
from flwr.cli.build import build_fab_from_files
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.fab_pb2 import Fab
from flwr.proto.transport_pb2 import Scalar
from flwr.supercore.control import ControlHttpClient

from common.errors import StoreError
from common.source import bundle_files

__all__ = ["Node", "SuperLink", "bundle", "wipe_updates"]

MOVED_TABLES = (
    "compacted_context",
    "message",
    "object_",
    "objects",
    "run_object",
    "series_context",
    "task_event",
    "task_log",
    "task_message",
)
"""Beginnings of the names of tables that hold, or point at, what travelled in a run."""

PROJECT = """\
[project]
name = "homespun"
version = "{version}"
license = "Apache-2.0"

[tool.flwr.app]
publisher = "homespun"

[tool.flwr.app.components]
serverapp = "server.app:app"
clientapp = "client.app:app"

[tool.flwr.app.config]
folder = ""
"""


@dataclass(frozen=True)
class Node:
    """A SuperNode that the SuperLink knows.

    Attributes:
        id: Flower's number of it.
        public_key: PEM.
        status: As Flower says it: created, registered, online, offline, unregistered.
    """

    id: int
    public_key: bytes
    status: str


class SuperLink:
    """Asks the SuperLink at `address`, whose certificate comes from `authority` (PEM)."""

    def __init__(self, address: str, authority: bytes) -> None:
        """Ask nothing yet."""
        self._client = ControlHttpClient.from_server_address(
            address, insecure=False, root_certificates=authority, interceptors=[]
        )

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def answers(self) -> bool:
        """Whether it is there."""
        try:
            self.nodes()
        except StoreError:
            return False
        return True

    def nodes(self) -> tuple[Node, ...]:
        """The SuperNodes that it knows, those that were let go too."""
        with _translated():
            found = self._client.ListNodes(ListNodesRequest()).nodes_info
        return tuple(Node(one.node_id, one.public_key, one.status) for one in found)

    def register(self, public_key: bytes) -> int:
        """Let a key in."""
        with _translated():
            return self._client.RegisterNode(RegisterNodeRequest(public_key=public_key)).node_id

    def unregister(self, node: int) -> None:
        """Let a node in no more; what it says from now on is refused."""
        with _translated():
            self._client.UnregisterNode(UnregisterNodeRequest(node_id=node))

    def start(self, fab: bytes, folder: Path) -> int:
        """Start a run whose only argument is the folder that holds it; returns Flower's number of it."""
        request = StartRunRequest(
            fab=Fab(hash_str=sha256(fab).hexdigest(), content=fab),
            override_config={"folder": Scalar(string=str(folder))},
        )
        with _translated():
            return self._client.StartRun(request).run_id

    def stop(self, run: int) -> None:
        """Stop a run."""
        with _translated():
            self._client.StopRun(StopRunRequest(run_id=run))

    def status(self, run: int) -> str:
        """How a run stands, in Flower's words: pending, starting, running or finished; empty where it is unknown.

        Asking also makes Flower drop what it kept of a run that is over.
        """
        with _translated():
            found = self._client.ListRuns(ListRunsRequest(run_id=run)).run_dict
        return found[run].status.status if run in found else ""


def bundle(root: Path | None = None, *, version: str = "0.1.0") -> bytes:
    """Make the Flower bundle from the files that run here.

    Args:
        root: Holds the role folders; that of the running code when absent.
        version: Of Homespun.
    """
    root = Path(__file__).resolve().parent.parent if root is None else root
    files: dict[str, bytes | Path] = {name: root / name for name in bundle_files(root)}
    content, _ = build_fab_from_files({"pyproject.toml": PROJECT.format(version=version).encode(), **files})
    return content


def wipe_updates(database: Path) -> int:
    """Take everything that travelled in a run out of the SuperLink's database, its log included; returns the rows.

    Registrations and the list of runs stay. Called between runs, beside a SuperLink that may be up.

    Guarantee: afterwards neither the file nor its write-ahead log holds a byte of an update, as far as the file system
    overwrites in place; on one that copies on write, put the folder on an encrypted volume.

    Raises:
        StoreError: The database is in use, or is none.
    """
    if not database.exists():
        return 0
    try:
        with closing(sqlite3.connect(database, timeout=20.0, isolation_level=None)) as connection:
            connection.execute("PRAGMA secure_delete = ON").fetchall()
            tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            moved = [name for name in tables if name.startswith(MOVED_TABLES)]
            rows = 0
            connection.execute("BEGIN IMMEDIATE")
            for name in moved:
                rows += connection.execute(f'DELETE FROM "{name}"').rowcount  # noqa: S608
            connection.execute("COMMIT")
            _until_written_back(connection)
            connection.execute("VACUUM")
            _until_written_back(connection)
            return rows
    except sqlite3.Error as error:
        raise StoreError(f"{database}: cannot be wiped now ({type(error).__name__})") from None


def _until_written_back(connection: sqlite3.Connection) -> None:
    """Empty the write-ahead log; a reader may be in the way for a moment."""
    for _ in range(40):
        busy, *_ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if not busy:
            return
        time.sleep(0.25)
    raise sqlite3.OperationalError("the log is in use")


@contextmanager
def _translated() -> Generator[None]:
    try:
        yield
    except (httpx.HTTPError, ValueError, RuntimeError) as error:
        code = getattr(getattr(error, "response", None), "status_code", None)
        raise StoreError(f"the SuperLink does not answer ({code or type(error).__name__})") from None
