"""Who may take part: invites and devices, in one SQLite file that the coordinator and the operator's commands share.

Of a token only its hash is kept. A device is known by its public key; what is noted of it is what it says of itself to
everybody's face at every call (version, whether it would take part in what is open, and why not), chosen or not. So
nothing here tells who was in which cohort.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError, Refusal, StoreError
from common.fleet import device_id
from common.vouched_roster import Grant, Vouched, VouchedRoster, invite_key

__all__ = ["Device", "Enrolment", "InviteState"]

FORMAT = 1
SCHEMA = """
CREATE TABLE format (number INTEGER NOT NULL) STRICT;
CREATE TABLE invites (
    id TEXT PRIMARY KEY, token TEXT NOT NULL UNIQUE, uses INTEGER NOT NULL, used INTEGER NOT NULL, made TEXT NOT NULL,
    expires TEXT NOT NULL, approves INTEGER NOT NULL
) STRICT;
CREATE TABLE devices (
    id TEXT PRIMARY KEY, public_key BLOB NOT NULL UNIQUE, subject TEXT NOT NULL, invite TEXT NOT NULL,
    state TEXT NOT NULL, joined TEXT NOT NULL, seen TEXT, version TEXT NOT NULL, verdict TEXT NOT NULL, head TEXT,
    rolled_back INTEGER NOT NULL
) STRICT;
CREATE TABLE attempts (what TEXT PRIMARY KEY, count INTEGER NOT NULL, last TEXT NOT NULL) STRICT;
"""
LATER = """
CREATE TABLE IF NOT EXISTS grants (
    key TEXT PRIMARY KEY, invite TEXT NOT NULL, uses INTEGER NOT NULL, signature TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS vouchers (
    device TEXT PRIMARY KEY, key TEXT NOT NULL, invite TEXT NOT NULL, voucher TEXT NOT NULL, joined TEXT NOT NULL
) STRICT;
"""
"""What came after the format was settled; a version that does not know these tables leaves them alone."""


@dataclass(frozen=True)
class InviteState:
    """An invite as the coordinator knows it."""

    id: str
    uses: int
    used: int
    made: str
    expires: str
    approves: bool


@dataclass(frozen=True)
class Device:
    """A device as the coordinator knows it.

    Attributes:
        id: Name made from its key.
        public_key: Its key, PEM.
        subject: Random name of the person it belongs to, which outlives keys.
        state: pending, approved, revoked or left.
        joined: When it enrolled.
        seen: When it last called.
        version: Of Homespun on it.
        verdict: Why it would refuse what is open now, a code; empty where it would take part.
        rolled_back: Whether it showed an older ledger than before: somebody put an old copy back.
    """

    id: str
    public_key: bytes
    subject: str
    state: str
    joined: str
    seen: str | None
    version: str
    verdict: str
    rolled_back: bool


_FIELDS = "id, public_key, subject, state, joined, seen, version, verdict, rolled_back"


def _device(row: tuple[Any, ...]) -> Device:
    return Device(row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], bool(row[8]))


class Enrolment:
    """Invites and devices. Each call opens the file, so that several processes may use it."""

    def __init__(self, path: Path) -> None:
        """Use the file at `path`, and make it where it is missing."""
        self._path = path
        if not path.exists():
            path.touch(mode=0o600)
        with self._open() as database:
            if not database.execute("SELECT 1 FROM sqlite_master LIMIT 1").fetchone():
                for statement in SCHEMA.strip().split(";\n"):
                    database.execute(statement)
                database.execute("INSERT INTO format VALUES (?)", (FORMAT,))
            for statement in LATER.strip().split(";\n"):
                database.execute(statement)
            (number,) = database.execute("SELECT number FROM format").fetchone()
        if number != FORMAT:
            raise StoreError(f"{path}: of format {number}; this version reads {FORMAT}")

    def invite(
        self,
        *,
        uses: int,
        now: datetime,
        expires: datetime,
        approves: bool,
        grant: Callable[[str, int], Grant] | None = None,
    ) -> str:
        """Make an invite that lets `uses` devices in; `approves` lets them in at once. Returns its token.

        `grant` signs, with the enroller's key, for the invite's public key and its uses.
        """
        token = secrets.token_urlsafe(32)
        row = (secrets.token_hex(4), _hash(token), uses, 0, now.isoformat(), expires.isoformat(), int(approves))
        with self._open() as database:
            database.execute("INSERT INTO invites VALUES (?, ?, ?, ?, ?, ?, ?)", row)
            if grant is not None:
                made = grant(invite_key(token).verify_key.hex, uses)
                database.execute("INSERT INTO grants VALUES (?, ?, ?, ?)", (made.invite, row[0], uses, made.signature))
        return token

    def invites(self) -> tuple[InviteState, ...]:
        """All invites, oldest first."""
        with self._open() as database:
            rows = database.execute("SELECT id, uses, used, made, expires, approves FROM invites ORDER BY made")
            return tuple(InviteState(row[0], row[1], row[2], row[3], row[4], bool(row[5])) for row in rows)

    def enrol(
        self,
        token: str,
        public_key: bytes,
        version: str,
        subject: str,
        *,
        now: datetime,
        vouched: Vouched | None = None,
    ) -> Device:
        """Let a device in. The same device may ask again; it uses the invite once.

        Args:
            token: Of the invite; empty where `vouched` stands for it, whose signatures were checked.
            public_key: The device's, PEM.
            version: Of Homespun on it.
            subject: Random name of the person it belongs to.
            now: The time.
            vouched: What others need to check the device in secure sums.

        Raises:
            Refusal: The token is unknown, used up or expired, the device was revoked, or another device has the
                subject: one device per subject.
        """
        name = device_id(public_key)
        with self._open() as database:
            known = self._find(database, name)
            if known is not None and known.state in ("approved", "pending"):
                return known
            if known is not None:
                raise Refusal("revoked", "this key is not let in any more; enrol with a new one")
            wanted = "SELECT id, uses, used, expires, approves FROM invites WHERE "
            if vouched is not None:
                by_key = "id = (SELECT invite FROM grants WHERE key = ?)"
                row = database.execute(wanted + by_key, (vouched.invite,)).fetchone()
            else:
                row = database.execute(wanted + "token = ?", (_hash(token),)).fetchone()
            if row is None:
                raise Refusal("unknown-token", "the invite is unknown here")
            invite, uses, used, expires, approves = row
            if now >= datetime.fromisoformat(expires):
                raise Refusal("expired", "the invite has expired")
            if used >= uses:
                raise Refusal("used-up", f"the invite was used {used} of {uses} times")
            taken = "SELECT 1 FROM devices WHERE subject = ? AND state IN ('approved', 'pending')"
            if database.execute(taken, (subject,)).fetchone():
                raise Refusal("subject-taken", "another device is enrolled for this subject; revoke it first")
            state = "approved" if approves else "pending"
            database.execute("UPDATE invites SET used = used + 1 WHERE id = ?", (invite,))
            database.execute(
                "INSERT INTO devices VALUES (?, ?, ?, ?, ?, ?, NULL, ?, '', NULL, 0)",
                (name, public_key, subject, invite, state, now.isoformat(), version[:64]),
            )
            if vouched is not None:
                row = (name, vouched.key, vouched.invite, vouched.voucher, vouched.joined)
                database.execute("INSERT OR REPLACE INTO vouchers VALUES (?, ?, ?, ?, ?)", row)
            found = self._find(database, name)
        if found is None:
            raise StoreError(f"{self._path}: the device that was just let in is not there")
        return found

    def roster(self, subjects: Collection[str]) -> VouchedRoster:
        """The approved devices of `subjects`, as each of them can check the others.

        Raises:
            ConfigError: One of them joined without a voucher, or two have one enrolment key.
        """
        with self._open() as database:
            grants = {
                row[0]: Grant(*row) for row in database.execute("SELECT key, uses, signature FROM grants").fetchall()
            }
            joined = (
                "SELECT devices.id, devices.subject, vouchers.key, vouchers.invite, voucher, vouchers.joined "
                "FROM devices LEFT JOIN vouchers ON devices.id = vouchers.device WHERE state = 'approved'"
            )
            rows = [row for row in database.execute(joined).fetchall() if row[1] in subjects]
        without = [row[0] for row in rows if row[2] is None or row[3] not in grants]
        if without:
            raise ConfigError(
                f"noise: {len(without)} device(s), {without[0]} among them, joined by an invite without an enroller; "
                "for distributed noise they leave and join again by a new one"
            )
        devices = {row[2]: Vouched(*row[2:]) for row in rows}
        if len(devices) != len(rows):
            raise ConfigError("noise: two devices have one enrolment key; revoke one of them")
        return VouchedRoster.of(grants, devices)

    def devices(self) -> tuple[Device, ...]:
        """All devices, oldest first."""
        with self._open() as database:
            rows = database.execute(f"SELECT {_FIELDS} FROM devices ORDER BY joined").fetchall()  # noqa: S608
            return tuple(_device(row) for row in rows)

    def device(self, name: str) -> Device | None:
        """One device; None where it is not known."""
        with self._open() as database:
            return self._find(database, name)

    def set_state(self, name: str, state: str) -> Device:
        """Approve, revoke or let go a device; its name may be shortened.

        Raises:
            DataError: No device, or more than one, answers to it.
            Refusal: A device that was revoked or left does not come back under its old key.
        """
        if not name:  # an empty variable of a script must not name the only device that there is
            raise DataError("name a device; `homespun server devices` lists them")
        with self._open() as database:
            names = [row[0] for row in database.execute("SELECT id FROM devices") if row[0].startswith(name)]
            if len(names) != 1:
                raise DataError(f"{len(names)} devices answer to that name; `homespun server devices` lists them")
            before = self._find(database, names[0])
            if before is not None and before.state in ("revoked", "left") and state != before.state:
                raise Refusal("revoked", f"{names[0]} was {before.state}; it enrols again with a new key")
            database.execute("UPDATE devices SET state = ? WHERE id = ?", (state, names[0]))
            found = self._find(database, names[0])
        if found is None:
            raise StoreError(f"{self._path}: the device vanished")
        return found

    def note_call(self, name: str, version: str, verdict: str, head: dict[str, Any] | None, *, now: datetime) -> None:
        """Note what a device says of itself; the newest head of its ledger is kept, an older one is noticed."""
        with self._open() as database:
            row = database.execute("SELECT head, rolled_back FROM devices WHERE id = ?", (name,)).fetchone()
            if row is None:
                return
            kept, rolled_back = json.loads(row[0]) if row[0] else None, int(row[1])
            if head is not None and kept is not None and _is_older(head, kept):
                rolled_back, head = 1, kept
            text = json.dumps(head or kept) if head or kept else None
            database.execute(
                "UPDATE devices SET seen = ?, version = ?, verdict = ?, head = ?, rolled_back = ? WHERE id = ?",
                (now.isoformat(timespec="minutes"), version[:64], verdict[:64], text, rolled_back, name),
            )

    def heads(self, subjects: Collection[str]) -> list[dict[str, Any]]:
        """The furthest signed heads that these subjects' devices showed, also where one showed an older one since."""
        with self._open() as database:
            rows = database.execute("SELECT subject, head FROM devices WHERE head IS NOT NULL ORDER BY id").fetchall()
        return [json.loads(head) for subject, head in rows if subject in subjects]

    def note_refused(self, what: str, *, now: datetime) -> None:
        """Count somebody who was not let in, by reason."""
        with self._open() as database:
            database.execute(
                "INSERT INTO attempts VALUES (?, 1, ?) ON CONFLICT (what) DO UPDATE SET count = count + 1,"
                " last = excluded.last",
                (what[:64], now.isoformat(timespec="minutes")),
            )

    def refused(self) -> dict[str, int]:
        """How often somebody was not let in, by reason."""
        with self._open() as database:
            return dict(database.execute("SELECT what, count FROM attempts ORDER BY what").fetchall())

    def _find(self, database: sqlite3.Connection, name: str) -> Device | None:
        row = database.execute(f"SELECT {_FIELDS} FROM devices WHERE id = ?", (name,)).fetchone()  # noqa: S608
        return None if row is None else _device(row)

    @contextmanager
    def _open(self) -> Generator[sqlite3.Connection]:
        try:
            database = sqlite3.connect(self._path, timeout=10.0, isolation_level=None)
            try:
                database.execute("PRAGMA synchronous = FULL")
                database.execute("BEGIN IMMEDIATE")
                try:
                    yield database
                    database.execute("COMMIT")
                except BaseException:
                    database.execute("ROLLBACK")
                    raise
            finally:
                database.close()
        except sqlite3.Error as error:
            raise StoreError(f"{self._path}: cannot be used ({type(error).__name__})") from None


def _hash(token: str) -> str:
    return hashlib.sha256(b"homespun invite 1\n" + token.encode()).hexdigest()


def _is_older(head: dict[str, Any], kept: dict[str, Any]) -> bool:
    if head.get("ledger") != kept.get("ledger"):
        return True
    return head["index"] < kept["index"] or (head["index"] == kept["index"] and head["hash"] != kept["hash"])
