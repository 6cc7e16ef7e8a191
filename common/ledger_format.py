"""What a ledger is, as bytes: entries, heads, the closed list of kinds, and `verify`.

This is the pure half of `common.ledger`: no files, no clock, no randomness. `docs/ledger.md` is the specification
and `docs/verify_ledger.py` a second implementation that shares no code with this one.

The rules, which both `verify` and the writer apply:

1. A ledger is UTF-8 text, one entry per line; every line is RFC 8785 canonical JSON and ends with a newline.
2. An entry has exactly nine fields: body, format, index, kind, ledger, previous, signature, time, writer.
3. Its hash is SHA-256 over the canonical entry without the signature; `previous` is the hash before it.
4. Its signature is the writer's Ed25519 signature over (ledger, index, hash), so that it is a *head* as well.
5. Entry 0 is `open`. The ledger's id is SHA-256 over its body and its writer, and every entry carries the id.
6. Kinds are a closed list, each with the fields it must and may have; there is no field for free text.
7. Indices count up by one. Only the opener, and writers that entry 0 lists, may write.
8. A debit may name the index of a reservation, which must be open; a release names an earlier debit, and two
   releases of one debit have the same payload.
9. A `compact` entry states what the entries before it add up to. Where they are there, it is checked against them;
   at the front of a file it stands for them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from common.canonical import canonical, canonical_digest, read_canonical
from common.errors import VerificationError
from common.keys import VerifyKey
from common.ledger_kinds import ENTRY_CHECKS, HEAD_FORMAT, KEPT_BY_COMPACTION, Json, check_body, is_head

__all__ = ["Debit", "Entry", "Head", "Verified", "debits", "verify"]

FORMAT = "homespun-ledger-1"
NO_HASH = "0" * 64
_PAYLOAD_FIELDS = ("body", "index", "kind", "ledger", "previous", "time", "writer")
_SIGNATURE_END = 128 + 1  # hex digits and a quote
NO_ROLLBACK_EVIDENCE = "none: no head of this ledger that someone else kept was given"


@dataclass(frozen=True, slots=True)
class Head:
    """A signed statement that a ledger's entry `index` has hash `hash`; whoever keeps one can find a rollback."""

    ledger: str
    index: int
    hash: str
    writer: str
    signature: str

    def message(self) -> bytes:
        """Return the bytes that are signed."""
        return f"{HEAD_FORMAT}\n{self.ledger}\n{self.index}\n{self.hash}\n".encode()

    def verify(self) -> None:
        """Return if the signature is the writer's.

        Raises:
            VerificationError: It is not.
        """
        VerifyKey.from_hex(self.writer).verify(bytes.fromhex(self.signature), self.message())

    def to_json(self) -> Json:
        """Return the head as a JSON object."""
        fields = ("ledger", "index", "hash", "writer", "signature")
        return {"format": HEAD_FORMAT} | {name: getattr(self, name) for name in fields}

    @classmethod
    def from_json(cls, value: object) -> Head:
        """Read what `to_json` wrote; the signature is not checked.

        Raises:
            VerificationError: It is no head.
        """
        if not is_head(value):
            raise VerificationError("not a signed head")
        fields = cast(Json, value)
        return cls(**{name: fields[name] for name in fields if name != "format"})


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of a ledger. `time` is what the writer's clock said (UTC); nothing relies on it."""

    ledger: str
    index: int
    kind: str
    body: Json
    previous: str
    time: str
    writer: str
    hash: str
    signature: str

    @property
    def head(self) -> Head:
        """The head that this entry's signature signs."""
        return Head(self.ledger, self.index, self.hash, self.writer, self.signature)


@dataclass(frozen=True, slots=True)
class Debit:
    """Something that was charged `count` times: a whole reservation, or an event outside of one.

    Attributes:
        index: The entry that charged it; of several that compaction summed up, the first.
        event: What `common.accounting` reads; a number may be an int or a float, infinity is the string `inf`.
    """

    index: int
    kind: str
    event: Json
    count: int
    subject: str | None
    run: str | None


@dataclass(frozen=True, slots=True)
class Verified:
    """A ledger whose every entry checked out.

    Attributes:
        entries: In order; the first is `open`, or `compact` where older ones were summed up.
        header: The body of entry 0, also where entry 0 was summed up.
        rollback_evidence: In words, what the kept heads rule out; begins with `none` where none was given.
    """

    entries: tuple[Entry, ...]
    head: Head
    header: Json
    rollback_evidence: str


def verify(
    data: bytes, *, known_heads: Iterable[Head] = (), public_keys: Iterable[VerifyKey | str] | None = None
) -> Verified:
    """Check a whole ledger.

    Args:
        data: The file's bytes.
        known_heads: Heads of this ledger that someone other than its writer kept.
        public_keys: The keys whose entries are accepted. When absent the ledger's own word is taken: its
            opener, and the writers that its first entry lists.

    Guarantee: a changed bit, a deleted, inserted or reordered entry, an entry of another ledger, of an unknown kind
    or by a writer without leave is found without any kept head. A missing end, a restored old copy and a second
    history signed with the same key are found if a kept head lies in the part that differs, and only then.

    Raises:
        VerificationError: Something does not check out; names the first bad entry. Nothing else is raised.
    """
    rules = check(data, public_keys=public_keys)
    evidence = check_known_heads(rules, known_heads)
    return Verified(tuple(rules.entries), rules.entries[-1].head, rules.header, evidence)


def debits(entries: Iterable[Entry]) -> Iterator[Debit]:
    """Return what was charged, over all entries of one ledger.

    A reservation is charged as a whole when it is made, so debits under it are not charged again. A cancelled
    reservation is charged for the debits that were made under it. Debits without a reservation are charged singly.
    The order is that of first mention; entries that were compacted come summed up.
    """
    parts = list(_accounted(tuple(entries)))
    cancelled = {body["reservation"] for _, kind, body, _ in parts if kind == "cancel"}
    for index, kind, body, count in parts:
        if kind == "reserve":
            charged = index not in cancelled
        else:
            reservation = body.get("reservation")
            charged = kind == "debit" and (reservation is None or reservation in cancelled)
        if charged:
            yield Debit(index, kind, body["event"], count, body.get("subject"), body.get("run"))


class Rules:
    """The state that the next entry of a ledger has to fit; `admit` moves it on."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.hashes: list[str] = []
        self.ledger = ""
        self.header: Json = {}
        self.opened_by = ""
        self._writers: set[str] = set()
        self._reservations: dict[int, bool] = {}
        self._released: dict[int, str | None] = {}

    @property
    def next_index(self) -> int:
        """Index of the entry that comes next."""
        return len(self.hashes)

    @property
    def previous(self) -> str:
        """Hash of the last entry."""
        return self.hashes[-1] if self.hashes else NO_HASH

    def admit(self, entry: Entry) -> None:
        """Take `entry` in.

        Raises:
            ValueError: It does not fit; the state is as it was.
        """
        check_body(entry.kind, entry.body)
        if not self.entries:
            self._begin(entry)
        elif entry.kind == "open":
            raise ValueError("a second open entry")
        if entry.ledger != self.ledger:
            raise ValueError("belongs to another ledger")
        if entry.index != self.next_index:
            raise ValueError(f"expected index {self.next_index}, found {entry.index}")
        if entry.previous != self.previous:
            raise ValueError("does not follow the entry before it")
        if entry.writer not in self._writers:
            raise ValueError(f"written by {entry.writer[:16]}, which entry 0 does not allow")
        if self.entries:
            self._check_meaning(entry)
        self._note(entry)
        self.entries.append(entry)
        self.hashes.append(entry.hash)

    def summary(self) -> Json:
        """Return the body of a `compact` entry for everything so far."""
        return {
            "hashes": "".join(self.hashes),
            "header": self.header,
            "opened_by": self.opened_by,
            "totals": _totals(self.entries),
            "unreleased": sorted(index for index, payload in self._released.items() if payload is None),
        }

    def _begin(self, entry: Entry) -> None:
        body = entry.body
        if entry.kind == "open":
            header, opened_by = body, entry.writer
        elif entry.kind == "compact":
            header, opened_by = body["header"], body["opened_by"]
        else:
            raise ValueError("a ledger begins with an open entry, or with a compact one")
        if entry.ledger != ledger_id(header, opened_by):
            raise ValueError("the ledger's id is not that of its header and opener")
        self.ledger, self.header, self.opened_by = entry.ledger, header, opened_by
        self._writers = {opened_by, *header.get("writers", ())}
        if entry.kind == "compact":
            text = body["hashes"]
            self.hashes = [text[start : start + 64] for start in range(0, len(text), 64)]
            self._released = dict.fromkeys(body["unreleased"])
            for total in body["totals"]:
                self._note_reservation(total["index"], total["kind"], total["body"])

    def _check_meaning(self, entry: Entry) -> None:
        kind, body = entry.kind, entry.body
        if self.entries[-1].kind == "end":
            raise ValueError("follows the end of the ledger")
        reservation = body.get("reservation")
        if reservation is not None and not self._reservations.get(reservation):
            raise ValueError("names a reservation that is not open")
        if kind == "release":
            if body["debit"] not in self._released:
                raise ValueError("releases without an earlier debit")
            if self._released[body["debit"]] not in {None, body["sha256"]}:
                raise ValueError("releases another payload under a debit that was used")
        if kind == "compact" and body != self.summary():
            raise ValueError("does not state what the entries before it add up to")

    def _note(self, entry: Entry) -> None:
        kind, body = entry.kind, entry.body
        self._note_reservation(entry.index, kind, body)
        if kind == "debit":
            self._released[entry.index] = None
        elif kind == "release":
            self._released[body["debit"]] = body["sha256"]

    def _note_reservation(self, index: int, kind: str, body: Json) -> None:
        if kind == "reserve":
            self._reservations[index] = True
        elif kind == "cancel":
            self._reservations[body["reservation"]] = False


def check(data: bytes, *, public_keys: Iterable[VerifyKey | str] | None = None) -> Rules:
    """Check everything but the kept heads; return the state that the next entry has to fit.

    Raises:
        VerificationError: As for `verify`.
    """
    keys = None if public_keys is None else {key if isinstance(key, str) else key.hex for key in public_keys}
    rules = Rules()
    fault: VerificationError | None = None
    for number, line in enumerate(data.split(b"\n")[:-1]):
        index = rules.next_index if rules.entries else number
        try:
            entry = parse_entry(line)
            if keys is not None and entry.writer not in keys:
                raise ValueError(f"written by {entry.writer[:16]}, which is not among the public keys")
            rules.admit(entry)
            if keys is not None and rules.opened_by not in keys:
                raise ValueError(f"opened by {rules.opened_by[:16]}, which is not among the public keys")
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            fault = VerificationError(reason, index)
            break
    forged = _first_forged(rules.entries)
    if forged is not None:
        raise VerificationError("the signature is not the writer's", forged)
    if fault is not None:
        raise fault
    if not rules.entries:
        raise VerificationError("the ledger is empty", 0)
    if not data.endswith(b"\n"):
        reason = "the last line is torn: it was never acted on, and opening the ledger recovers it"
        raise VerificationError(reason, rules.next_index)
    return rules


# --- bytes -----------------------------------------------------------------------------------------------------


def ledger_id(header: Json, opened_by: str) -> str:
    """Return the id of the ledger with this first body and first writer: 64 hex digits."""
    return canonical_digest({"header": header, "writer": opened_by})


def payload_bytes(entry: Entry) -> bytes:
    """Return the canonical bytes of an entry without its signature: what its hash is over."""
    return canonical({name: getattr(entry, name) for name in _PAYLOAD_FIELDS} | {"format": FORMAT})


def signed_line(payload: bytes, signature: str) -> bytes:
    """Return the line that `payload` becomes; `signature` sorts between `previous` and `time`."""
    front, time, back = payload.rpartition(b',"time":')
    return front + b',"signature":"' + signature.encode() + b'"' + time + back + b"\n"


def payload_of(line: bytes) -> bytes:
    """Undo `signed_line`, given a canonical line without its newline whose last four fields have their form."""
    front, _, back = line.rpartition(b',"signature":"')
    return front + back[_SIGNATURE_END:]


def parse_entry(line: bytes) -> Entry:
    """Read one line without its newline; hash and canonical form are checked, signature and place are not.

    Raises:
        ValueError: It is no entry.
    """
    fields: Any = read_canonical(line)
    if not isinstance(fields, dict) or cast(Json, fields).keys() != ENTRY_CHECKS.keys() | {"format"}:
        raise ValueError("not the fields of an entry")
    entry = cast(Json, fields)
    if entry["format"] != FORMAT:
        raise ValueError("unknown format")
    for name, check in ENTRY_CHECKS.items():
        if not check(entry[name]):
            raise ValueError(f"{name} is malformed")
    return Entry(
        ledger=entry["ledger"],
        index=entry["index"],
        kind=entry["kind"],
        body=entry["body"],
        previous=entry["previous"],
        time=entry["time"],
        writer=entry["writer"],
        hash=hashlib.sha256(payload_of(line)).hexdigest(),
        signature=entry["signature"],
    )


def _first_forged(entries: Sequence[Entry]) -> int | None:
    """Return the index of the first entry whose signature is wrong."""
    keys = {entry.writer: VerifyKey.from_hex(entry.writer) for entry in entries}

    def forged(part: Sequence[Entry]) -> int | None:
        for entry in part:
            try:
                keys[entry.writer].verify(bytes.fromhex(entry.signature), entry.head.message())
            except VerificationError:
                return entry.index
        return None

    size = 512  # the library checks signatures outside the interpreter's lock: threads do help
    parts = [entries[start : start + size] for start in range(0, len(entries), size)]
    if len(parts) < 2:
        return forged(entries)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return next((index for index in pool.map(forged, parts) if index is not None), None)


def check_known_heads(rules: Rules, known_heads: Iterable[Head]) -> str:
    """Compare heads that someone else kept; return in words what they rule out.

    Raises:
        VerificationError: A head shows an entry that is missing or another.
    """
    heads = tuple(known_heads)
    if not heads:
        return NO_ROLLBACK_EVIDENCE
    for head in sorted(heads, key=lambda head: head.index):
        if head.ledger != rules.ledger:
            raise VerificationError("a kept head is of another ledger: this one was begun anew", 0)
        try:
            head.verify()
        except (VerificationError, ValueError):
            raise VerificationError("a kept head is not signed by its writer") from None
        if head.index >= rules.next_index:
            reason = f"a kept head shows entry {head.index}, which is missing: cut off, or an old copy was restored"
            raise VerificationError(reason, rules.next_index)
        if head.hash != rules.hashes[head.index]:
            raise VerificationError("a kept head shows another entry here: history was rewritten", head.index)
    last = max(head.index for head in heads)
    return (
        f"{len(heads)} kept heads agree, the last at entry {last} of 0 to {rules.next_index - 1}: nothing up to there"
        " was rolled back; what follows rests on the writer's word"
    )


def _accounted(entries: Sequence[Entry]) -> Iterator[tuple[int, str, Json, int]]:
    """Return (index, kind, body, count) of all that was said about budgets, summed-up entries included."""
    for place, entry in enumerate(entries):
        if entry.kind == "compact" and place == 0:
            # Further on, a compact entry restates what came before it, which is there to be counted itself.
            for total in entry.body["totals"]:
                yield total["index"], total["kind"], total["body"], total["count"]
        elif entry.kind in KEPT_BY_COMPACTION:
            yield entry.index, entry.kind, entry.body, 1


def _totals(entries: Sequence[Entry]) -> list[Json]:
    totals: dict[bytes, Json] = {}
    for index, kind, body, count in _accounted(entries):
        kept = {name: value for name, value in body.items() if name in KEPT_BY_COMPACTION[kind]}
        alike = [kind, kept] if kind == "debit" else [index]
        total = totals.setdefault(canonical(alike), {"body": kept, "count": 0, "index": index, "kind": kind})
        total["count"] += count
    return list(totals.values())
