"""What simulated devices keep from round to round, for a whole population: one file of sealed rows per run.

One file per user costs a file's creation, rename and directory entry for every user and round, and a folder of a
hundred thousand names. Here the users of a chunk are read in one query and written in one commit, opening takes the
same time however many users there are, and nothing of a user stays in memory. Worker processes share the file: SQLite
lets one of them write at a time, and a commit of a chunk is short (docs/decisions/0005 has the measurements).

What SQLite sees is keyed hashes, round numbers and sealed bytes. A row that is missing or was changed counts as
nothing kept: a simulated device starts anew.
"""

from __future__ import annotations

import hashlib
import hmac
import sqlite3
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from common.adapters import Vector
from common.errors import StoreError
from common.files import make_private_folder
from common.keys import derive_key, open_sealed, seal

__all__ = ["PopulationStates"]

SCHEMA = """
CREATE TABLE IF NOT EXISTS kept (user BLOB NOT NULL, number INTEGER NOT NULL, sealed BLOB NOT NULL,
    PRIMARY KEY (user, number))
"""
SECONDS_TO_WAIT = 60.0
USERS_PER_QUERY = 500
FILE = "kept.sqlite"


class PopulationStates:
    """`client.round_states.RoundStates` over one SQLite file per run.

    Guarantee: without the key the file shows how many rows there are, of which rounds and how large; a row moved to
        another user, round or run is not opened.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        """Keep runs' files in `folder`, sealed under `key`, 32 bytes."""
        self._folder = folder
        self._sealing_key = derive_key(key, "population states: rows")
        self._index_key = derive_key(key, "population states: index")
        self._open: dict[str, sqlite3.Connection] = {}
        self._lock = threading.Lock()

    def before(self, run: str, number: int, users: Sequence[str]) -> list[Vector | None]:
        """What each user kept before round `number`; None where there is nothing."""
        tags = {self._tag(run, user): user for user in users}
        found: dict[str, Vector] = {}
        with self._lock:
            database = self._database(run)
            for start in range(0, len(users), USERS_PER_QUERY):
                piece = list(tags)[start : start + USERS_PER_QUERY]
                marks = ",".join("?" * len(piece))
                query = (  # SQLite takes `sealed` from the row of the greatest number
                    f"SELECT user, max(number), sealed FROM kept WHERE user IN ({marks}) AND number < ? GROUP BY user"  # noqa: S608 - question marks only
                )
                for tag, one, sealed in database.execute(query, (*piece, number)):
                    user = tags[tag]
                    try:
                        opened = open_sealed(self._sealing_key, sealed, _context(run, user, one))
                    except StoreError:
                        continue
                    found[user] = np.frombuffer(opened, dtype="<f4").astype(np.float32)
        return [found.get(user) for user in users]

    def keep(self, run: str, number: int, users: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Keep what each user has after round `number`, shape `(users, size)`, in one commit.

        Of what was kept before, the newest row stays, for a round that is answered again.
        """
        rows = [
            (self._tag(run, user), number, seal(self._sealing_key, row.tobytes(), _context(run, user, number)))
            for user, row in zip(users, np.asarray(vectors, dtype="<f4"), strict=True)
        ]
        with self._lock:
            database = self._database(run)
            database.execute("BEGIN IMMEDIATE")
            try:
                database.executemany("INSERT OR REPLACE INTO kept VALUES (?, ?, ?)", rows)
                database.executemany(
                    "DELETE FROM kept WHERE user = ?1 AND (number > ?2 OR number <"
                    " (SELECT max(number) FROM kept WHERE user = ?1 AND number < ?2))",
                    [(tag, number) for tag, _, _ in rows],
                )
                database.execute("COMMIT")
            except BaseException:
                database.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close every run's file."""
        with self._lock:
            for database in self._open.values():
                database.close()
            self._open.clear()

    def _database(self, run: str) -> sqlite3.Connection:
        known = self._open.get(run)
        if known is not None:
            return known
        make_private_folder(self._folder / run)
        path = self._folder / run / FILE
        path.touch(mode=0o600)
        database = sqlite3.connect(path, timeout=SECONDS_TO_WAIT, isolation_level=None, check_same_thread=False)
        # A power cut may lose the last commits, never tear one: the rounds they are of are then trained again.
        for pragma in (
            "page_size = 32768",
            "journal_mode = WAL",
            "synchronous = NORMAL",
            "temp_store = MEMORY",
            "cache_size = -4096",
        ):
            database.execute(f"PRAGMA {pragma}").fetchall()
        database.execute(SCHEMA)
        self._open[run] = database
        return database

    def _tag(self, run: str, user: str) -> bytes:
        return hmac.digest(self._index_key, f"{run}/{user}".encode(), hashlib.sha256)[:16]


def _context(run: str, user: str, number: int) -> bytes:
    return f"homespun population state 1 {run} {user} {number}".encode()
