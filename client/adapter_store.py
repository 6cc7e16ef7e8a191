"""Private state at rest: adapters and profiles, sealed, versioned, erasable.

One SQLite file holds everything. What SQLite sees is random numbers, sizes and counts:

- a subject, and a name within it, are looked up by a keyed hash, so neither stands in the file;
- every subject has a key of its own, drawn at random and sealed under the store's key; erasing a subject destroys
  that key;
- a payload is sealed under its subject's key for one place only: this store, subject, name, base model and version.

The write-ahead log holds sealed rows only, there are no temporary files, and deleted pages are overwritten.

What this does not give: whoever can write to the file can put a whole old file back, or drop rows; and a backup made
before an erasure still holds the erased subject's sealed key. Flash storage may keep overwritten blocks for a while.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sqlite3
import threading
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from common.canonical import canonical
from common.errors import Refusal, StoreError
from common.files import make_private_folder, take_lock
from common.keys import KEY_BYTES, derive_key, open_sealed, seal

__all__ = ["AdapterStore", "NewVersion", "Version", "pack_vectors", "unpack_vectors"]

FORMAT = "homespun-adapter-store-1"
TAG_BYTES = 16
MAX_CACHED_KEYS = 4096

SCHEMA = """
CREATE TABLE store (id BLOB NOT NULL, format TEXT NOT NULL, sealed_check BLOB NOT NULL);
CREATE TABLE subjects (subject BLOB PRIMARY KEY, sealed_key BLOB NOT NULL, sealed_name BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (
    subject BLOB NOT NULL, name BLOB NOT NULL, version INTEGER NOT NULL, is_current INTEGER NOT NULL,
    sealed_facts BLOB NOT NULL, sealed_payload BLOB NOT NULL,
    PRIMARY KEY (subject, name, version)
);
"""


@dataclass(frozen=True)
class NewVersion:
    """Something to store: `payload` of `subject` under `name`, made for the base model with `base_digest`."""

    subject: str
    name: str
    payload: bytes
    base_digest: str
    version_note: str = ""


@dataclass(frozen=True)
class Version:
    """What is known of a stored version without opening its payload; `size` in bytes."""

    name: str
    version: int
    base_digest: str
    version_note: str
    size: int
    is_current: bool


class AdapterStore:
    """Private state of the subjects that live on one installation; one process at a time.

    Guarantee: without the key the file shows how many subjects, names and versions there are and how large they
    are, and nothing else. A payload that was changed, or moved to another subject, name, base or version, is
    refused, never returned.
    """

    def __init__(self, path: Path, key: bytes, *, keep_versions: int = 4) -> None:
        """Open the store at `path`, or make it; takes the same time however much it holds.

        Args:
            path: The SQLite file.
            key: 32 bytes, such as `MasterKey.subkey("adapter-store")`.
            keep_versions: Older versions of a name are deleted when a new one is put; the current one stays.

        Raises:
            StoreError: The file is no store, damaged, or sealed under another key.
            Refusal: Another process has it open.
        """
        if keep_versions < 1:
            raise ValueError("at least one version is kept")
        self.path = path
        self._keep = keep_versions
        self._wrapping_key = derive_key(key, "adapter store: keys of subjects")
        self._index_key = derive_key(key, "adapter store: index")
        self._keys: dict[bytes, bytes] = {}
        self._lock = threading.RLock()
        make_private_folder(path.parent)
        self._file_lock = take_lock(path, "store-locked")
        try:
            # SQLite gives its write-ahead log the mode of the file, which therefore has to exist before. Once SQLite
            # has it open, closing another descriptor of it would drop SQLite's own locks.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
            try:
                with _translated(path):
                    self._id = self._prepare()
            except BaseException:
                self._database.close()
                raise
        except BaseException:
            os.close(self._file_lock)
            raise

    def put(self, subject: str, name: str, payload: bytes, *, base_digest: str, version_note: str = "") -> int:
        """Store a new version, make it current, and return its number when it is on disk."""
        return self.put_many([NewVersion(subject, name, payload, base_digest, version_note)])[0]

    def put_many(self, items: Sequence[NewVersion]) -> tuple[int, ...]:
        """Store several versions at once: after a crash either all of them are there or none is."""
        with self._transaction():
            return tuple(self._put(item) for item in items)

    def get(self, subject: str, name: str, *, base_digest: str | None = None, version: int | None = None) -> bytes:
        """Return a payload: the current version, or the one asked for.

        Raises:
            StoreError: There is none, it was changed, or it was made for another base than `base_digest`.
        """
        found = self._find(subject, name, base_digest, version)
        if found is None:
            raise StoreError("the store has nothing under this subject and name")
        return found

    def get_many(
        self, wanted: Iterable[tuple[str, str]], *, base_digest: str | None = None
    ) -> tuple[bytes | None, ...]:
        """Return the current payload of each (subject, name) in order, None where there is none.

        Raises:
            StoreError: As for `get`.
        """
        with self._lock:
            return tuple(self._find(subject, name, base_digest, None) for subject, name in wanted)

    def versions(self, subject: str, name: str) -> tuple[Version, ...]:
        """List the stored versions of `name`, oldest first; empty where there is none."""
        return tuple(entry for entry in self._facts(subject) if entry.name == name)

    def names(self, subject: str) -> tuple[str, ...]:
        """List what is stored for `subject`."""
        return tuple(sorted({entry.name for entry in self._facts(subject)}))

    def subjects(self) -> tuple[str, ...]:
        """List who has state here."""
        with self._lock, _translated(self.path):
            rows = self._database.execute("SELECT subject, sealed_name FROM subjects").fetchall()
            return tuple(
                sorted(
                    open_sealed(self._subject_key(tag), name, self._context("name", tag.hex())).decode()
                    for tag, name in rows
                )
            )

    def rollback(self, subject: str, name: str, version: int | None = None) -> int:
        """Make an older version current, the one before the current one when `version` is absent; return it.

        Newer versions stay, and the next `put` gets a number above all of them.

        Raises:
            StoreError: There is no such version.
        """
        with self._transaction():
            place = (self._subject_tag(subject), self._name_tag(subject, name))
            if version is None:
                query = (
                    "SELECT max(version) FROM versions WHERE subject = ?1 AND name = ?2 AND version <"
                    " (SELECT version FROM versions WHERE subject = ?1 AND name = ?2 AND is_current)"
                )
                version = self._database.execute(query, place).fetchone()[0]
            changed = self._database.execute(
                "UPDATE versions SET is_current = 1 WHERE subject = ? AND name = ? AND version = ?", (*place, version)
            ).rowcount
            if version is None or changed != 1:
                raise StoreError("the store has no such version to go back to")
            self._database.execute(
                "UPDATE versions SET is_current = 0 WHERE subject = ? AND name = ? AND version != ?", (*place, version)
            )
            return version

    def erase(self, subject: str) -> bool:
        """Destroy the subject's key and rows; return whether there was anything.

        Guarantee: when this returns, neither the file nor its log holds the subject's sealed key or any of its
        payloads; copies made before do.
        """
        return self.erase_many([subject]) == 1

    def erase_many(self, subjects: Iterable[str]) -> int:
        """Destroy keys and rows of several subjects at once, all of them or none; return how many there were.

        Guarantee: as for `erase`.
        """
        tags = [self._subject_tag(subject) for subject in subjects]
        erased = 0
        with self._transaction():
            for tag in tags:
                erased += self._database.execute("DELETE FROM subjects WHERE subject = ?", (tag,)).rowcount
                self._database.execute("DELETE FROM versions WHERE subject = ?", (tag,))
        with self._lock, _translated(self.path):
            for tag in tags:
                self._keys.pop(tag, None)
            # As a script, because `execute` takes one step, and one step frees one page.
            self._database.executescript("PRAGMA incremental_vacuum")
            self._database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return erased

    def close(self) -> None:
        """Write the log back into the file and give the lock up."""
        with self._lock:
            self._keys.clear()
            self._database.close()
            if self._file_lock >= 0:
                os.close(self._file_lock)
                self._file_lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self) -> bytes:
        is_new = self.path.stat().st_size == 0
        for pragma in (
            "locking_mode = EXCLUSIVE",
            *(("auto_vacuum = INCREMENTAL",) if is_new else ()),  # it writes, also where nothing changes
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = ON",
            "temp_store = MEMORY",
            "trusted_schema = OFF",
        ):
            self._database.execute(f"PRAGMA {pragma}").fetchall()
        self._database.execute("BEGIN EXCLUSIVE")
        try:
            if not self._database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                identity = secrets.token_bytes(16)
                for statement in SCHEMA.split(";"):
                    self._database.execute(statement)
                check = seal(self._wrapping_key, b"", canonical([FORMAT, identity.hex(), "check"]))
                self._database.execute("INSERT INTO store VALUES (?, ?, ?)", (identity, FORMAT, check))
            identity, format_name, check = self._database.execute(
                "SELECT id, format, sealed_check FROM store"
            ).fetchone()
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:
                self._database.execute("ROLLBACK")
            raise
        if format_name != FORMAT:
            raise StoreError(f"{self.path}: a store of an unknown format")
        open_sealed(self._wrapping_key, check, canonical([FORMAT, identity.hex(), "check"]))
        return identity

    @contextmanager
    def _transaction(self) -> Generator[None]:
        with self._lock, _translated(self.path):
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                if self._database.in_transaction:
                    self._database.execute("ROLLBACK")
                self._keys.clear()  # a key drawn in a transaction that failed was never stored
                raise

    def _put(self, item: NewVersion) -> int:
        tag, name = self._subject_tag(item.subject), self._name_tag(item.subject, item.name)
        key = self._subject_key(tag, create_for=item.subject)
        place = (tag, name)
        query = "SELECT coalesce(max(version), 0) FROM versions WHERE subject = ? AND name = ?"
        version = self._database.execute(query, place).fetchone()[0] + 1
        facts = {
            "base_digest": item.base_digest,
            "name": item.name,
            "size": len(item.payload),
            "version_note": item.version_note,
        }
        sealed_facts = seal(key, canonical(facts), self._context("facts", item.subject, name.hex(), version))
        sealed = seal(key, item.payload, self._context("payload", item.subject, item.name, item.base_digest, version))
        self._database.execute("UPDATE versions SET is_current = 0 WHERE subject = ? AND name = ?", place)
        self._database.execute(
            "INSERT INTO versions VALUES (?, ?, ?, 1, ?, ?)", (tag, name, version, sealed_facts, sealed)
        )
        self._database.execute(
            "DELETE FROM versions WHERE subject = ? AND name = ? AND version <= ?", (*place, version - self._keep)
        )
        return version

    def _find(self, subject: str, name: str, base_digest: str | None, version: int | None) -> bytes | None:
        tag, name_tag = self._subject_tag(subject), self._name_tag(subject, name)
        query = (
            "SELECT version, sealed_facts, sealed_payload FROM versions"
            " WHERE subject = ?1 AND name = ?2 AND iif(?3 IS NULL, is_current, version = ?3)"
        )
        with self._lock, _translated(self.path):
            row = self._database.execute(query, (tag, name_tag, version)).fetchone()
            if row is None:
                return None
            key = self._subject_key(tag)
        number, sealed_facts, sealed_payload = row
        facts = json.loads(open_sealed(key, sealed_facts, self._context("facts", subject, name_tag.hex(), number)))
        if base_digest is not None and facts["base_digest"] != base_digest:
            raise StoreError("what is stored here was made for another base model")
        return open_sealed(key, sealed_payload, self._context("payload", subject, name, facts["base_digest"], number))

    def _facts(self, subject: str) -> list[Version]:
        tag = self._subject_tag(subject)
        query = "SELECT name, version, is_current, sealed_facts FROM versions WHERE subject = ? ORDER BY name, version"
        with self._lock, _translated(self.path):
            rows = self._database.execute(query, (tag,)).fetchall()
            if not rows:
                return []
            key = self._subject_key(tag)
        found: list[Version] = []
        for name_tag, number, is_current, sealed in rows:
            facts = json.loads(open_sealed(key, sealed, self._context("facts", subject, name_tag.hex(), number)))
            found.append(Version(version=number, is_current=bool(is_current), **facts))
        return found

    def _subject_key(self, tag: bytes, *, create_for: str | None = None) -> bytes:
        """Return the key of a subject, drawing one for the subject `create_for` where it has none."""
        key = self._keys.get(tag)
        if key is not None:
            return key
        row = self._database.execute("SELECT sealed_key FROM subjects WHERE subject = ?", (tag,)).fetchone()
        if row is not None:
            key = open_sealed(self._wrapping_key, row[0], self._context("key", tag.hex()))
        elif create_for is None:
            raise StoreError("the key of this subject is gone")
        else:
            key = secrets.token_bytes(KEY_BYTES)
            sealed_key = seal(self._wrapping_key, key, self._context("key", tag.hex()))
            sealed_name = seal(key, create_for.encode(), self._context("name", tag.hex()))
            self._database.execute("INSERT INTO subjects VALUES (?, ?, ?)", (tag, sealed_key, sealed_name))
        if len(self._keys) >= MAX_CACHED_KEYS:
            self._keys.clear()
        self._keys[tag] = key
        return key

    def _context(self, *place: str | int) -> bytes:
        return canonical([FORMAT, self._id.hex(), *place])

    def _subject_tag(self, subject: str) -> bytes:
        return self._tag("subject", subject)

    def _name_tag(self, subject: str, name: str) -> bytes:
        return self._tag("name", subject, name)

    def _tag(self, *parts: str) -> bytes:
        return hmac.digest(self._index_key, canonical(list(parts)), hashlib.sha256)[:TAG_BYTES]


def pack_vectors(vectors: Mapping[str, NDArray[Any]]) -> bytes:
    """Return named float32 arrays as the bytes of a safetensors file.

    Raises:
        ValueError: An array is not float32.
    """
    from safetensors.numpy import save

    for name, vector in vectors.items():
        if vector.dtype != np.float32:
            raise ValueError(f"{name}: expected float32, found {vector.dtype}")
    return save({name: np.ascontiguousarray(vector) for name, vector in vectors.items()})


def unpack_vectors(payload: bytes) -> dict[str, NDArray[np.float32]]:
    """Read what `pack_vectors` wrote; nothing in it is executed.

    Raises:
        StoreError: It is no safetensors file, or holds other than float32 arrays.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        vectors = load(payload)
    except (SafetensorError, ValueError, TypeError, KeyError):
        raise StoreError("not the bytes of a safetensors file") from None
    if any(vector.dtype != np.float32 for vector in vectors.values()):
        raise StoreError("expected float32 arrays")
    return vectors


@contextmanager
def _translated(path: Path) -> Generator[None]:
    """Turn SQLite's errors into ours; theirs may show values."""
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}:
            raise Refusal("store-locked", f"{path}: another process has this store open") from None
        if error.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise StoreError(f"{path}: no space left on the disk") from None
        raise StoreError(f"{path}: cannot be read or written ({error.sqlite_errorname})") from None
    except sqlite3.DatabaseError as error:
        name = getattr(error, "sqlite_errorname", "unknown error")
        raise StoreError(f"{path}: damaged, or not an adapter store ({name})") from None
