"""The ledger of releases: an append-only, hash-chained, signed file, written ahead of what it accounts for.

`append` returns when the entry is on disk, so whoever appends a debit first and releases after can crash at any
instant: budget may be wasted, a release is never hidden. What a ledger is as bytes, and `verify`, are in
`common.ledger_format`; `docs/ledger.md` is the specification.

The ledger stores events (what ran), never epsilons. Time is what this machine's clock said; nothing relies on it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from common.canonical import canonical, read_canonical
from common.errors import Refusal, StoreError
from common.files import make_private_folder, sync_folder, take_lock, write_private_file
from common.keys import SigningKey
from common.ledger_format import (
    Debit,
    Entry,
    Head,
    Rules,
    Verified,
    check,
    check_known_heads,
    debits,
    ledger_id,
    payload_bytes,
    signed_line,
    verify,
)

__all__ = ["Debit", "Entry", "Head", "Ledger", "Verified", "debits", "verify"]


class Ledger:
    """One ledger file, open for writing by this process and no other.

    Beside `ledger.jsonl` lie `ledger.jsonl.lock`, an empty file that carries the lock, and after a crash
    `ledger.jsonl.torn-<index>`, the bytes that were cut off.
    """

    def __init__(self, path: Path, key: SigningKey, lock: int, rules: Rules, clock: Callable[[], float]) -> None:
        """Use `create` or `open`."""
        self.path = path
        self._key = key
        self._lock = lock
        self._rules = rules
        self._clock = clock
        self._process = os.getpid()
        self._thread_lock = threading.RLock()
        self._broken = False
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        self._identity = _identity(os.fstat(self._file))

    @classmethod
    def create(
        cls, path: Path, writer_key: SigningKey, header: Mapping[str, Any], *, clock: Callable[[], float] = time.time
    ) -> Self:
        """Begin a new ledger whose entry 0 binds it to `header`.

        Args:
            path: The file; its folder is made where missing.
            writer_key: Signs every entry.
            header: `role` (device, server, study or registry) and what that role must be bound to, see
                `common.ledger_kinds.ROLES`; a random `salt` is added, so that no two ledgers have one id.
            clock: Seconds since 1970.

        Raises:
            StoreError: A ledger is already there.
            Refusal: Another process has this ledger open.
            ValueError: The header is malformed.
        """
        make_private_folder(path.parent)
        lock = take_lock(path, "ledger-locked")
        try:
            rules = Rules()
            body = {"salt": secrets.token_hex(16)} | dict(header)
            line = _next_line(rules, writer_key, "open", body, clock)
            try:
                write_private_file(path, line)
            except FileExistsError:
                raise StoreError(f"{path}: a ledger is already there; it is continued, never begun anew") from None
            return cls(path, writer_key, lock, rules, clock)
        except BaseException:
            os.close(lock)
            raise

    @classmethod
    def open(
        cls,
        path: Path,
        writer_key: SigningKey,
        *,
        known_heads: Iterable[Head] = (),
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Continue a ledger, after verifying all of it.

        A torn last line is what a crash in the middle of `append` leaves. Nothing was released on it, because
        `append` had not returned; it is moved to `<path>.torn-<index>` and a `recovered` entry says so. Nothing
        else is ever repaired.

        Raises:
            VerificationError: The ledger does not check out, or not with `known_heads`; it is left as it is.
            Refusal: Another process has this ledger open.
            StoreError: There is no ledger, or `writer_key` may not write to it.
        """
        if not path.is_file():
            raise StoreError(f"{path}: no such ledger")
        lock = take_lock(path, "ledger-locked")
        try:
            data = path.read_bytes()
            sound = data[: data.rfind(b"\n") + 1]
            rules = check(sound)
            check_known_heads(rules, known_heads)
            writers = {rules.opened_by, *rules.header.get("writers", ())}
            if writer_key.verify_key.hex not in writers:
                raise StoreError(f"{path}: this key may not write to this ledger")
            ledger = cls(path, writer_key, lock, rules, clock)
            try:
                ledger._recover(sound, data[len(sound) :])
            except BaseException:
                os.close(ledger._file)
                raise
            return ledger
        except BaseException:
            os.close(lock)
            raise

    @property
    def head(self) -> Head:
        """The head of the last entry; hand it to someone else, and they can find a rollback."""
        return self._rules.entries[-1].head

    @property
    def header(self) -> dict[str, Any]:
        """The body of entry 0."""
        return self._rules.header

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries that the file holds, in order."""
        return tuple(self._rules.entries)

    def append(self, kind: str, body: Mapping[str, Any]) -> Head:
        """Write one entry and return its head when it is on disk.

        Guarantee: when this returns, the entry survives a crash and a power cut. When it raises, the entry may
        or may not be there; the caller releases nothing.

        Raises:
            ValueError: The kind is unknown, the body is malformed, or the entry does not fit what came before;
                nothing was written.
            StoreError: The disk failed or the file was changed by someone else; open the ledger again.
        """
        return self.append_many([(kind, body)])[0]

    def append_many(self, items: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[Head, ...]:
        """Write several entries with one flush to disk; all are checked before any is written.

        Raises:
            ValueError, StoreError: As for `append`.
        """
        with self._thread_lock:
            self._check_ours()
            count = len(self._rules.entries)
            try:
                lines = [_next_line(self._rules, self._key, kind, body, self._clock) for kind, body in items]
            except BaseException:
                self._rules = _rules_of(self._rules.entries[:count])
                raise
            self._write(b"".join(lines))
            return tuple(entry.head for entry in self._rules.entries[count:])

    def compact(self, *, keep_archive: bool = True) -> Head:
        """Replace all entries by one signed summary: what they add up to, and the hash of each.

        Every kept head can still be compared. That the totals are right is shown by the archive, the old file
        with the summary as its last line; without it they rest on the writer's word.

        Args:
            keep_archive: Leave the old file as `<path>.archive-<index>`; delete it when retention says so.

        Returns:
            The head of the summary, which is the head of the archive too.
        """
        with self._thread_lock:
            head = self.append("compact", self._rules.summary())
            summary = self._rules.entries[-1]
            if keep_archive:
                archive = self.path.with_name(f"{self.path.name}.archive-{head.index}")
                archive.hardlink_to(self.path)
            # A crash before this line leaves the full file with the summary at its end, which is a ledger too.
            write_private_file(self.path, signed_line(payload_bytes(summary), summary.signature), replace=True)
            os.close(self._file)
            self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
            self._identity = _identity(os.fstat(self._file))
            self._rules = _rules_of([summary])
            return head

    def close(self) -> None:
        """Give the lock back; the ledger can be opened again."""
        with self._thread_lock:
            if self._file >= 0:
                os.close(self._file)
                os.close(self._lock)
                self._file = self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _check_ours(self) -> None:
        if self._file < 0:
            raise ValueError("the ledger is closed")
        if os.getpid() != self._process:
            raise Refusal("ledger-locked", f"{self.path}: open in the process that this one was forked from")
        if self._broken:
            raise StoreError(f"{self.path}: an earlier write failed; open the ledger again")
        try:
            identity = _identity(self.path.stat())
        except FileNotFoundError:
            identity = None
        if identity != self._identity:
            raise StoreError(f"{self.path}: the file was changed by someone else; nothing was written")

    def _write(self, content: bytes) -> None:
        # After a failed write or flush nobody knows what is on disk (fsyncgate); only opening again finds out.
        self._broken = True
        try:
            rest = memoryview(content)
            while rest:
                rest = rest[os.write(self._file, rest) :]
            os.fsync(self._file)
        except OSError as error:
            raise StoreError(f"{self.path}: could not be written: {error.strerror}") from error
        self._identity = _identity(os.fstat(self._file))
        self._broken = False

    def _recover(self, sound: bytes, torn: bytes) -> None:
        """Cut `torn` off the end and say so.

        The steps are: save the torn bytes, cut them, append `recovered`, give the saved bytes their final name. A
        crash between any two is continued from the saved file, so no cut goes unsaid.
        """
        pending = self.path.with_name(f"{self.path.name}.torn")
        if torn:
            saved = pending.read_bytes() if pending.exists() else b""
            if not saved.endswith(torn):  # it may be a torn `recovered` entry, after an earlier cut
                write_private_file(pending, saved + torn, replace=True)
            os.truncate(self.path, len(sound))
            self._identity = _identity(os.fstat(self._file))
        elif not pending.exists():
            return
        cut = pending.read_bytes()
        body = {"cut_bytes": len(cut), "cut_digest": hashlib.sha256(cut).hexdigest()}
        last = self._rules.entries[-1]
        if last.kind != "recovered" or last.body != body:
            self.append("recovered", body)
        pending.replace(self.path.with_name(f"{self.path.name}.torn-{self.head.index}"))
        sync_folder(self.path.parent)


def _next_line(rules: Rules, key: SigningKey, kind: str, body: Mapping[str, Any], clock: Callable[[], float]) -> bytes:
    """Make the next entry's line and take the entry in."""
    writer = key.verify_key.hex
    # Round trip first: the entry that is kept in memory is the one that a reader will see.
    plain = read_canonical(canonical(body))
    unsigned = Entry(
        ledger=rules.ledger or ledger_id(plain, writer),
        index=rules.next_index,
        kind=kind,
        body=plain,
        previous=rules.previous,
        time=datetime.fromtimestamp(clock(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        writer=writer,
        hash="",
        signature="",
    )
    payload = payload_bytes(unsigned)
    hashed = replace(unsigned, hash=hashlib.sha256(payload).hexdigest())
    entry = replace(hashed, signature=key.sign(hashed.head.message()).hex())
    rules.admit(entry)
    return signed_line(payload, entry.signature)


def _rules_of(entries: Iterable[Entry]) -> Rules:
    rules = Rules()
    for entry in entries:
        rules.admit(entry)
    return rules


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_dev, status.st_ino, status.st_size
