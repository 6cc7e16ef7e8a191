"""The owner's records on this device: sealed one by one, in order, each with a name that stays.

A record is a text, an answer or a preference pair, with where it came from and when it was added. Every record has a
key of its own in the sealed file, so removing one destroys its key. The name of a record is a keyed digest of what it
says and when: the same record added again is a duplicate, and gets no second place.

What was made from records is told by two numbers: `revision` changes whenever records do, so an index or a profile
that was built at another revision is built again; `removals` counts removals, so that a private adapter which was
trained before one is not used after it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from client.adapter_store import AdapterStore, NewVersion
from client.device_home import DeviceHome
from client.user_data import Record, User
from common.errors import DataError, StoreError

__all__ = ["RECORDS", "Added", "KeptRecord", "NewRecord", "RecordStore"]

RECORDS = "records.sqlite"
RECORD, COUNTS = "record", "counts"
NO_BASE = "none"
"""Records belong to no base model."""

FORMAT = 1
OWNER = "owner"
ID_BYTES = 8
SHORTEST_PREFIX = 4


@dataclass(frozen=True)
class NewRecord:
    """A record that may be added, and where it came from: a file, "chat", or "feedback"."""

    record: Record
    source: str = field(repr=False)


@dataclass(frozen=True)
class KeptRecord:
    """A record that is kept.

    Attributes:
        id: 16 hex digits, the same for as long as the record says the same.
        record: What it says.
        source: Where it came from.
        added: When, in seconds since 1970.
        order: Which place it was added at; grows.
    """

    id: str
    record: Record
    source: str = field(repr=False)
    added: float
    order: int


@dataclass(frozen=True)
class Added:
    """What adding did: ids of what is new, in order; how many were here already, and how many say nothing."""

    ids: tuple[str, ...]
    duplicates: int
    empty: int


@dataclass(frozen=True)
class _Counts:
    revision: int = 0
    removals: int = 0
    next: int = 0


class RecordStore:
    """The owner's records, opened for a moment at a time so that commands work beside a vault.

    Guarantee: without the device's key the file shows how many records there are and how long they are, and nothing
    else; after `remove` returns, no key in the file opens what was removed.
    """

    def __init__(self, home: DeviceHome, *, clock: Callable[[], float] = time.time) -> None:
        """Find what this device keeps."""
        self._home = home
        self._clock = clock
        self._naming_key = home.master.subkey("record names")

    def name_of(self, record: Record) -> str:
        """Return the id that `record` has, or would have, on this device."""
        said = [record.prompt, record.response, record.rejected, record.time, record.task]
        return hmac.digest(self._naming_key, json.dumps(said).encode(), hashlib.sha256)[:ID_BYTES].hex()

    def compared(self, records: Sequence[NewRecord]) -> tuple[dict[str, NewRecord], Added]:
        """Say what adding `records` would do, and add nothing: what is new by id, and the counts."""
        with self._open() as store:
            return self._compared(store, records)

    def add(self, records: Sequence[NewRecord]) -> Added:
        """Add records in their order; after a crash all of them are there or none is."""
        with self._open() as store:
            new, added = self._compared(store, records)
            if not new:
                return added
            counts, now = _counts(store), self._clock()
            items = [
                NewVersion(name, RECORD, _payload(one, now, counts.next + place), NO_BASE)
                for place, (name, one) in enumerate(new.items())
            ]
            after = _Counts(counts.revision + 1, counts.removals, counts.next + len(new))
            store.put_many([*items, _new_counts(after)])
            return added

    def records(self) -> tuple[KeptRecord, ...]:
        """Return all records, the oldest first: by time where every record has one, else as they were added."""
        with self._open() as store:
            names = _names(store)
            payloads = store.get_many((name, RECORD) for name in names)
        found = [_read(name, payload) for name, payload in zip(names, payloads, strict=True) if payload is not None]
        found.sort(key=lambda one: one.order)
        if all(one.record.time is not None for one in found):
            found.sort(key=lambda one: one.record.time or 0.0)
        return tuple(found)

    def find(self, wanted: Iterable[str]) -> tuple[KeptRecord, ...]:
        """Return the records with these ids, or beginnings of ids that no other record shares.

        Raises:
            DataError: A beginning is none, or that of several; nothing is returned then.
        """
        records = self.records()
        found: list[KeptRecord] = []
        for beginning in wanted:
            some = [one for one in records if one.id.startswith(beginning.lower())]
            if len(beginning) < SHORTEST_PREFIX or len(some) != 1:
                raise DataError(
                    f"{len(some)} records have an id that begins so; `homespun device data list` shows ids, "
                    f"of which the first {SHORTEST_PREFIX} digits or more name one"
                )
            found += [one for one in some if one not in found]
        return tuple(found)

    def remove(self, ids: Sequence[str]) -> int:
        """Destroy the keys and contents of these records; return how many there were.

        Guarantee: `removals` grows, on disk, before the first record goes, so that what was trained on it is known to
            be stale whatever happens in between.
        """
        with self._open() as store:
            gone = sorted(set(ids) & set(_names(store)))
            if not gone:
                return 0
            counts = _counts(store)
            after = _Counts(counts.revision + 1, counts.removals + 1, counts.next)
            store.put_many([_new_counts(after)])
            return store.erase_many(gone)

    def user(self) -> User:
        """Return the owner as training, scoring and the profile take a person."""
        return User(OWNER, tuple(one.record for one in self.records()))

    def __len__(self) -> int:
        """How many records there are."""
        with self._open() as store:
            return len(_names(store))

    @property
    def revision(self) -> int:
        """A number that changes whenever records are added or removed."""
        return self._now().revision

    @property
    def removals(self) -> int:
        """How often records were removed."""
        return self._now().removals

    def _now(self) -> _Counts:
        with self._open() as store:
            return _counts(store)

    def _compared(self, store: AdapterStore, records: Sequence[NewRecord]) -> tuple[dict[str, NewRecord], Added]:
        known = set(_names(store))
        new: dict[str, NewRecord] = {}
        duplicates = empty = 0
        for one in records:
            if one.record.empty:
                empty += 1
                continue
            name = self.name_of(one.record)
            if name in known or name in new:
                duplicates += 1
                continue
            new[name] = one
        return new, Added(tuple(new), duplicates, empty)

    def _open(self) -> AdapterStore:
        return self._home.open_store(RECORDS, "records")


def _names(store: AdapterStore) -> list[str]:
    return [name for name in store.subjects() if name != COUNTS]


def _counts(store: AdapterStore) -> _Counts:
    (content,) = store.get_many([(COUNTS, COUNTS)])
    if content is None:
        return _Counts()
    try:
        values: dict[str, int] = json.loads(content)
        return _Counts(int(values["revision"]), int(values["removals"]), int(values["next"]))
    except (ValueError, KeyError, TypeError):
        raise StoreError("not the bytes of a count of records") from None


def _new_counts(counts: _Counts) -> NewVersion:
    values = {"revision": counts.revision, "removals": counts.removals, "next": counts.next}
    return NewVersion(COUNTS, COUNTS, json.dumps(values).encode(), NO_BASE)


def _payload(one: NewRecord, added: float, order: int) -> bytes:
    record = one.record
    values = {
        "format": FORMAT,
        "prompt": record.prompt,
        "response": record.response,
        "rejected": record.rejected,
        "time": record.time,
        "task": record.task,
        "kind": record.kind,
        "source": one.source,
        "added": added,
        "order": order,
    }
    return json.dumps(values).encode()


def _read(name: str, payload: bytes) -> KeptRecord:
    try:
        values: dict[str, Any] = json.loads(payload)
        if values["format"] != FORMAT:
            raise ValueError
        record = Record(
            values["prompt"], values["response"], values["time"], values["task"], values["rejected"], values["kind"]
        )
        return KeptRecord(name, record, values["source"], float(values["added"]), int(values["order"]))
    except (ValueError, KeyError, TypeError):
        raise StoreError("not the bytes of a record") from None
