"""What the owner said about answers: thumbs and edits, sealed on the device, and the pairs that they become.

An edit is preferred to what it replaced; a thumb up and a thumb down on two answers to one question make a pair; a
thumb up alone is an answer to learn from. What comes of them stands
among the owner's records, with the source "feedback", where training finds it. Taking feedback back takes back what
came of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from client.adapter_store import AdapterStore
from client.device_home import DeviceHome
from client.record_store import NewRecord, RecordStore
from client.removal import remove_records
from client.user_data import Record, whole_characters
from common.errors import ConfigError, DataError, StoreError

__all__ = ["Feedback", "FeedbackStore", "pairs_of"]

FILE, NAME, NO_BASE = "feedback.sqlite", "feedback", "none"
SOURCE = "feedback"
LONGEST = 20_000
"""Characters of one text."""

Kind = Literal["up", "down", "edit"]


@dataclass(frozen=True)
class Feedback:
    """What a user said about one answer: thumb "up", thumb "down", or an "edit" with what it should have been."""

    prompt: str = field(repr=False)
    answer: str = field(repr=False)
    kind: Kind
    edited: str | None = field(default=None, repr=False)
    time: float | None = None

    def __post_init__(self) -> None:
        """Replace halves of characters, as in a record."""
        for name in ("prompt", "answer", "edited"):
            text: str | None = getattr(self, name)
            if text is not None:
                object.__setattr__(self, name, whole_characters(text))


def pairs_of(feedback: Sequence[Feedback]) -> list[Record]:
    """Make preference records of feedback, in its order; what has no counterpart makes none.

    An edit is preferred to what it replaced. A thumb up and a thumb down on two answers to one prompt make a pair; of
    several, the latest of each. A lone thumb up becomes a plain record, and a lone thumb down nothing: it does not say
    what would have been right.
    """
    records: list[Record] = []
    ups: dict[str, Feedback] = {}
    downs: dict[str, Feedback] = {}
    for one in feedback:
        if one.kind == "edit":
            if one.edited is not None and one.edited.strip() and one.edited != one.answer:
                records.append(Record(one.prompt, one.edited, one.time, "preference", one.answer))
        else:
            (ups if one.kind == "up" else downs)[one.prompt] = one
    for prompt, up in ups.items():
        down = downs.get(prompt)
        if down is None or down.answer == up.answer:
            records.append(Record(prompt, up.answer, up.time, "reply"))
        else:
            records.append(Record(prompt, up.answer, up.time, "preference", down.answer))
    return records


class FeedbackStore:
    """The owner's feedback, opened for a moment at a time."""

    def __init__(self, home: DeviceHome, *, clock: Callable[[], float] = time.time) -> None:
        """Find what this device keeps."""
        self._home = home
        self._clock = clock

    def all(self) -> dict[str, Feedback]:
        """Everything that was said, by id, the oldest first."""
        with self._open() as store:
            names = store.subjects()
            payloads = store.get_many((name, NAME) for name in names)
        found = {name: _read(payload) for name, payload in zip(names, payloads, strict=True) if payload is not None}
        return dict(sorted(found.items(), key=lambda one: one[1].time or 0.0))

    def add(self, prompt: str, answer: str, kind: str, edited: str | None = None) -> str:
        """Keep one thing that was said, and what comes of it; return its id. Said again, it has the same.

        Raises:
            ConfigError: A text is empty or long, an edit changes nothing, or there is no such kind.
        """
        if kind not in ("up", "down", "edit"):
            raise ConfigError("feedback: up, down or edit")
        texts = {"question": prompt, "answer": answer} | ({"edit": edited or ""} if kind == "edit" else {})
        for name, text in texts.items():
            if not text.strip() or len(text) > LONGEST:
                raise ConfigError(f"feedback: the {name} is empty, or longer than {LONGEST} characters")
        if kind == "edit" and (edited or "").strip() == answer.strip():
            raise ConfigError("feedback: the edit changes nothing")
        said = Feedback(prompt, answer, kind, edited.strip() if kind == "edit" and edited else None, self._clock())
        name = self._name(said)
        if name in self.all():
            return name
        content = json.dumps({"format": 1, **asdict(said)}).encode()
        with self._open() as store:
            if kind != "edit":  # the other thumb on this answer is taken back
                store.erase(self._name(replace(said, kind="down" if kind == "up" else "up")))
            store.put(name, NAME, content, base_digest=NO_BASE)
        self._follow()
        return name

    def remove(self, beginning: str) -> None:
        """Take back what was said under the id that begins so, and what came of it.

        Raises:
            DataError: It is the beginning of none, or of several.
        """
        with self._open() as store:
            found = [name for name in store.subjects() if len(beginning) >= 4 and name.startswith(beginning)]
            if len(found) != 1:
                raise DataError(f"{len(found)} of what you said have an id that begins so; feedback list shows them")
            store.erase(found[0])
        self._follow()

    def _follow(self) -> None:
        """Let the owner's records say what feedback says now; what it still says somewhere is not removed."""
        records = RecordStore(self._home)
        after = pairs_of(list(self.all().values()))
        records.add([NewRecord(one, SOURCE) for one in after])
        said = {(one.prompt, one.response) for one in after}
        ours = [one for one in records.records() if one.source == SOURCE]
        gone = [one.id for one in ours if (one.record.prompt, one.record.response) not in said]
        if gone:
            remove_records(self._home, gone)

    def _name(self, said: Feedback) -> str:
        key = self._home.master.subkey("feedback names")
        content = json.dumps([said.prompt, said.answer, said.kind, said.edited]).encode()
        return hmac.digest(key, content, hashlib.sha256)[:8].hex()

    def _open(self) -> AdapterStore:
        return self._home.open_store(FILE, "feedback")


def _read(payload: bytes) -> Feedback:
    try:
        values: dict[str, Any] = json.loads(payload)
        if values.pop("format") != 1:
            raise ValueError
        return Feedback(**values)
    except (ValueError, KeyError, TypeError):
        raise StoreError("not the bytes of feedback") from None
