"""What an owner brings to a device: notes, mail and JSON lines, read into records.

=====================  =============================================================================================
``.txt`` ``.md``       plain text; a record per passage: paragraphs, short ones joined to the next, long ones cut at
                       the end of a sentence. Their time is the file's
``.mbox``              mail; a record per message that the owner wrote, with the message that it answers before it
                       where that is in the file too. Quotations and signatures are left out
``.jsonl`` ``.ndjson``  the lines that a run takes, ``{"user", "texts" | "examples" | "pairs"}``, or a record per line:
                       ``{"text"}``, ``{"prompt", "response"}``, ``{"prompt", "chosen", "rejected"}``
folder                 all of these in it and below it; hidden ones and links are passed over
=====================  =============================================================================================

Everything is read before anything is kept: an error names file and line, never what stands there.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from client.mail import read_mailbox
from client.membership import Membership
from client.record_shapes import is_missing, name_from, record_from, time_from, user_from
from client.record_store import NewRecord, RecordStore
from client.user_data import Record
from common.errors import ConfigError, DataError, HomespunError

__all__ = ["Reading", "adopted", "read_paths"]

TEXT, MAIL, LINES = (".txt", ".md", ".markdown"), (".mbox",), (".jsonl", ".ndjson")
KNOWN = (*TEXT, *MAIL, *LINES)
LARGEST_TEXT = 1 << 26
"""Bytes of a text file; a larger one is no note."""

SHORT, LONG = 60, 600
"""Characters: a shorter paragraph is joined to the next, a longer one is cut."""

_LISTS = ("texts", "examples", "pairs")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\s*\n", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")


@dataclass(frozen=True)
class Reading:
    """What was read.

    Attributes:
        records: In the order of the paths, and within a file in its own.
        files: How many files were read.
        left_out: What was passed over, counted by reason.
    """

    records: tuple[NewRecord, ...] = field(repr=False)
    files: int
    left_out: Mapping[str, int]


def read_paths(paths: Sequence[Path], *, user: str | None = None, mine: Sequence[str] = ()) -> Reading:
    """Read files and folders.

    Args:
        paths: What the owner names.
        user: Which user of JSON lines is the owner; not needed where there is one.
        mine: The owner's addresses; not needed where all mail in a file is from one.

    Raises:
        DataError: A path cannot be read as what it claims to be, or there is no file at all; names file and line.
        ConfigError: It does not say which of several people is the owner.
    """
    left_out: Counter[str] = Counter()
    files = [file for path in paths for file in _files(path.expanduser(), left_out)]
    if not files:
        named = ", ".join(map(str, paths))
        raise DataError(
            f"{named}: no file of a known kind in it; known are {', '.join(KNOWN)}, hidden ones and links not"
        )
    found: list[NewRecord] = []
    for file in files:
        source = str(file.absolute())
        for record in _records(file, user, mine, left_out):
            found.append(NewRecord(record, source))
    return Reading(tuple(found), len(files), dict(left_out))


def adopted(membership: Membership) -> Membership:
    """Take records into the store that an earlier version read from a file at every start; the file is not read again.

    Where the file cannot be read any more the owner is told, and nothing changes.
    """
    if membership.data is None:
        return membership
    try:
        RecordStore(membership.home).add(read_paths([membership.data], user=membership.user).records)
    except HomespunError as error:
        membership.note_standing(refit=f"records of an earlier version: {error}")
        return membership
    return replace(membership, data=None, user=None).save()


def passages(text: str) -> list[str]:
    """Cut a text into passages that a small model can read whole."""
    joined: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        part = paragraph.strip()
        if not part:
            continue
        if joined and len(joined[-1]) < SHORT:
            joined[-1] = f"{joined[-1]}\n\n{part}"
        else:
            joined.append(part)
    return [piece for part in joined for piece in _cut(part)]


def _cut(text: str) -> Iterator[str]:
    while len(text) > LONG:
        ends = [match.start() for match in _SENTENCE_END.finditer(text, LONG // 3, LONG)]
        end = ends[-1] if ends else text.rfind(" ", LONG // 3, LONG)
        end = end if end > 0 else LONG
        yield text[:end].strip()
        text = text[end:].strip()
    if text:
        yield text


def _files(path: Path, left_out: Counter[str]) -> Iterator[Path]:
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if any(part.startswith(".") for part in file.relative_to(path).parts) or file.is_symlink():
                left_out["hidden files and links"] += file.is_file()
            elif file.is_file():
                if file.suffix.lower() in KNOWN:
                    yield file
                else:
                    left_out["files of other kinds"] += 1
        return
    if not path.exists():
        raise DataError(f"{path}: no such file or folder")
    if path.suffix.lower() not in KNOWN:
        raise DataError(f"{path}: of no known kind; known are {', '.join(KNOWN)} and folders of these")
    yield path


def _records(file: Path, user: str | None, mine: Sequence[str], left_out: Counter[str]) -> list[Record]:
    suffix = file.suffix.lower()
    if suffix in MAIL:
        return read_mailbox(file, mine, left_out)
    if suffix in LINES:
        return _of_lines(file, user)
    content = _text(file)
    time = file.stat().st_mtime
    if suffix != ".txt":
        content = _FRONT_MATTER.sub("", content)
    return [Record("", passage, time) for passage in passages(content)]


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > LARGEST_TEXT:
            raise DataError(f"{file}: larger than {LARGEST_TEXT >> 20} MB, which no note is")
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    if b"\0" in content:
        raise DataError(f"{file}: line {content[: content.index(0)].count(10) + 1}: not text, it holds a zero byte")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: line {content[: error.start].count(10) + 1}: not UTF-8") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _of_lines(file: Path, user: str | None) -> list[Record]:
    """Read JSON lines: of the owner's among several users, or a record per line."""
    people: dict[str, list[Record]] = {}
    nameless: list[Record] = []
    for where, entry in _entries(file):
        if not isinstance(entry, Mapping):
            raise DataError(f"{where}: not a JSON object")
        fields = cast("Mapping[str, Any]", entry)
        if "user" in fields:
            person = user_from(fields, where) if any(key in fields for key in _LISTS) else None
            own = [_one(fields, where)] if person is None else list(person.records)
            people.setdefault(name_from(fields["user"], where), []).extend(own)
        elif any(key in fields for key in _LISTS):
            nameless += user_from({**fields, "user": "owner"}, where).records
        else:
            nameless.append(_one(fields, where))
    if user is not None and people:
        if user not in people:
            raise DataError(f"{file}: this user is not in the file")
        return [*people[user], *nameless]
    if len(people) > 1:
        raise ConfigError(f"{file}: holds records of {len(people)} users; --user says which of them is you")
    return [*(record for own in people.values() for record in own), *nameless]


def _one(fields: Mapping[str, Any], where: str) -> Record:
    """Read one record on a line of its own."""
    if "text" in fields and "prompt" not in fields:
        text = fields["text"]
        if not (isinstance(text, str) or is_missing(text)):
            raise DataError(f"{where}: 'text' is not text")
        record = Record("", text or "", time_from(fields.get("time"), where))
        kind, task = fields.get("kind"), fields.get("task", "text")
        if not isinstance(task, str) or not (kind is None or isinstance(kind, str)):
            raise DataError(f"{where}: 'task' and 'kind' must be text")
        return replace(record, kind=kind, task=task)
    if "prompt" not in fields:
        raise DataError(f'{where}: none of "text", "prompt", "texts", "examples" and "pairs" is there')
    return record_from(fields, where)


def _entries(file: Path) -> Iterator[tuple[str, Any]]:
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{file}: line {number}"
                try:
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError:
                    raise DataError(f"{where}: not UTF-8") from None
                if not text:
                    continue
                try:
                    yield where, json.loads(text)
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not valid JSON (column {error.colno})") from None
                except RecursionError:
                    raise DataError(f"{where}: nested too deeply") from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}") from None
