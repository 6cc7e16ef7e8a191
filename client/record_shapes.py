"""One user from one parsed entry: the shapes that every loader reads.

Errors say where and what is missing, never what stands there. Key names of an entry count as content too: a file
of the wrong shape may well have people's names for keys.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime
from typing import Any, cast

from client.user_data import Record, User
from common.errors import DataError

__all__ = ["is_missing", "name_from", "record_from", "time_from", "user_from"]

_LISTS = {
    "texts": "a text",
    "examples": 'an object with "prompt" and "response"',
    "pairs": '"prompt", "chosen" and "rejected"',
}


def user_from(entry: Any, where: str) -> User:
    """Read ``{"user", "texts" | "examples" | "pairs", "profile"?, "times"?}``.

    Several of the three lists may be there; their records follow each other. `times` runs parallel to the records, in
    the same order; an example may hold its own `time` instead.

    Raises:
        DataError: The entry has another shape, or no records.
    """
    if not isinstance(entry, Mapping):
        raise DataError(f"{where}: not a JSON object")
    fields = cast("Mapping[str, Any]", entry)
    name = name_from(fields.get("user"), where)
    records: list[Record] = []
    for key, shape in _LISTS.items():
        items = fields.get(key)
        if items is None:
            continue
        if not isinstance(items, list | tuple):
            raise DataError(f"{where}: {key!r} is not a list")
        for index, item in enumerate(cast("list[Any]", items)):
            if not _fits(key, item):
                raise DataError(f"{where}: item {index + 1} of {key!r} is not {shape}")
            records.append(record_from(item, f"{where}: item {index + 1} of {key!r}"))
    if not records:
        if not any(key in fields for key in _LISTS):
            raise DataError(f'{where}: none of "texts", "examples" and "pairs" is there')
        raise DataError(f"{where}: a user without records")
    times = fields.get("times")
    if times is not None:
        if not isinstance(times, list | tuple) or len(cast("list[Any]", times)) != len(records):
            raise DataError(f"{where}: 'times' is not a list with one time for each of the {len(records)} records")
        records = [
            Record(old.prompt, old.response, time_from(time, where), old.task, old.rejected, old.kind)
            for old, time in zip(records, cast("list[Any]", times), strict=True)
        ]
    return User(name, tuple(records), _profile_from(fields.get("profile"), where))


def _fits(key: str, item: Any) -> bool:
    if key == "texts":
        return isinstance(item, str) or is_missing(item)
    return isinstance(item, Mapping) and ("chosen" in item) == (key == "pairs")


def record_from(item: Any, where: str) -> Record:
    """Read a text, ``{"prompt", "response"}``, ``{"prompt", "chosen", "rejected"}``, or a `Record`.

    An object may also hold `time`, `task` and `kind`. A missing text, as a table has it, is an empty one: the split
    leaves it out and counts it.

    Raises:
        DataError: It is neither.
    """
    if isinstance(item, Record):
        return item
    if isinstance(item, str) or is_missing(item):
        return Record("", item if isinstance(item, str) else "")
    if not isinstance(item, Mapping):
        raise DataError(f"{where}: neither a text nor an object")
    fields = cast("Mapping[str, Any]", item)
    pair = "chosen" in fields
    prompt = _text_from(fields, "prompt", where)
    response = _text_from(fields, "chosen" if pair else "response", where)
    rejected = _text_from(fields, "rejected", where) if pair else None
    task = fields.get("task") or ("preference" if pair else "reply")
    kind = fields.get("kind")
    if not isinstance(task, str) or not (kind is None or isinstance(kind, str)):
        raise DataError(f"{where}: 'task' and 'kind' must be text")
    return Record(prompt, response, time_from(fields.get("time"), where), task, rejected, kind)


def name_from(value: Any, where: str) -> str:
    """Read a user's id: text, or a whole number.

    Raises:
        DataError: There is none, or it is something else.
    """
    if is_missing(value) or value == "":
        raise DataError(f"{where}: no user is named")
    if isinstance(value, float) and value.is_integer():  # a table's integer column with a gap in it
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: the user's id is neither text nor a whole number")
    name = str(value)
    if any("\ud800" <= letter <= "\udfff" for letter in name):
        raise DataError(f"{where}: the user's id is not valid text")
    return name


def time_from(value: Any, where: str) -> float | None:
    """Read a time: a number as it is, ISO 8601 or a datetime as seconds since 1970 (UTC unless it says otherwise).

    Text that is a number is that number, so that a column of a table is read the same way from end to end.

    Raises:
        DataError: It is something else, or not finite.
    """
    if is_missing(value) or value == "":
        return None
    seconds = math.nan
    if isinstance(value, str):
        try:
            seconds = float(value)
        except ValueError:
            try:
                value = datetime.fromisoformat(value.strip())
            except ValueError:
                raise DataError(f"{where}: the time is neither a number nor ISO 8601") from None
    if isinstance(value, datetime):
        seconds = (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    elif isinstance(value, date):
        seconds = datetime(value.year, value.month, value.day, tzinfo=UTC).timestamp()
    elif isinstance(value, int | float) and not isinstance(value, bool):
        with suppress(OverflowError):  # a whole number that no float holds
            seconds = float(value)
    if not math.isfinite(seconds):
        raise DataError(f"{where}: the time is neither a finite number nor ISO 8601")
    return seconds


def is_missing(value: Any) -> bool:
    """Whether a table's cell is empty: None, NaN, or pandas' NA and NaT, known by name so that pandas is not needed."""
    return (
        value is None or type(value).__name__ in {"NAType", "NaTType"} or (isinstance(value, float) and value != value)
    )


def _text_from(fields: Mapping[str, Any], key: str, where: str) -> str:
    if key not in fields:
        raise DataError(f"{where}: {key!r} is not there")
    value = fields[key]
    if is_missing(value):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {key!r} is not text")
    return value


def _profile_from(value: Any, where: str) -> tuple[str, ...]:
    if is_missing(value):
        return ()
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(line, str) for line in cast("list[Any]", value)):
        raise DataError(f"{where}: 'profile' is neither text nor a list of texts")
    return tuple(cast("list[str]", value))
