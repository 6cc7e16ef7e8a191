"""Tables as users: CSV, Parquet, pandas and Hugging Face, by the names of their columns.

A row is either one record (a user column, and text columns) or one user (a user column, and columns `texts`, `examples`
or `pairs` that hold lists). Rows of records need not be sorted by user, so they are gathered in memory first.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.record_shapes import is_missing, name_from, time_from, user_from
from client.user_data import Record, User
from common.errors import DataError
from simulations.worlds.files import read_lines

__all__ = ["Columns", "read_csv", "read_parquet", "users_of_rows"]

LISTS = ("texts", "examples", "pairs")
USUAL = (*LISTS, "user", "text", "time", "times", "profile", "prompt", "response", "chosen", "rejected")
LARGEST_CELL = 1 << 27
"""Characters of one CSV cell; Python's own limit of 131,072 is below the length of a long document."""

Row = tuple[str, Mapping[str, Any]]
"""Where a row is, for error messages, and its cells by column."""


@dataclass(frozen=True)
class Columns:
    """Which columns the caller named; None takes the usual name: user, text, time."""

    user: str | None = None
    text: str | None = None
    time: str | None = None

    @property
    def named(self) -> bool:
        """Whether the caller named any."""
        return any((self.user, self.text, self.time))

    def needed(self, there: Sequence[str]) -> list[str]:
        """Those of the columns `there` that can matter: a table may hold images, or vectors, besides."""
        return [column for column in there if column in (*USUAL, self.user, self.text, self.time)]


def users_of_rows(rows: Iterable[Row], there: Sequence[str], columns: Columns, name: str) -> Iterator[tuple[str, User]]:
    """Read users and where each was first seen from rows that all have the columns `there`.

    Without a named text column, the record is `text`, or `prompt` with `response`, or `prompt` with `chosen` and
    `rejected`, whichever is there.

    Raises:
        DataError: A column is missing, or a cell cannot be what its column says.
    """
    user_column = _existing(columns.user or "user", there, name)
    for column in columns.needed(there):
        _existing(column, there, name)  # of two columns with one name, the wrong one may be read
    if columns.text is None and any(key in there for key in LISTS):
        for where, row in rows:
            yield (
                where,
                user_from({**{key: _plain(cell) for key, cell in row.items()}, "user": row[user_column]}, where),
            )
        return
    time_column = _existing(columns.time, there, name) if columns.time else "time" if "time" in there else None
    keys = _record_columns(there, columns, name)
    pairs = "chosen" in keys
    task = "preference" if pairs else "reply" if "prompt" in keys else "text"
    people: dict[str, tuple[str, list[Record]]] = {}
    for where, row in rows:
        person = name_from(row[user_column], where)
        cells = {own: _text(row[column], column, where) for own, column in keys.items()}
        record = Record(
            cells.get("prompt", ""),
            cells.get("chosen", "") if pairs else cells["response"],
            time_from(row[time_column], where) if time_column else None,
            task,
            cells.get("rejected"),
        )
        people.setdefault(person, (where, []))[1].append(record)
    for person, (where, records) in people.items():
        yield where, User(person, tuple(records))


def read_csv(path: Path) -> tuple[list[str], Iterator[Row]]:
    """Read the header and the rows of a CSV file, or of one with tabs (`.tsv`); every cell stays text.

    Raises:
        DataError: The file is empty, not UTF-8, or a row has more or fewer cells than the header.
    """
    csv.field_size_limit(LARGEST_CELL)
    delimiter = "\t" if ".tsv" in path.suffixes else ","
    reader = csv.reader((line for _, line in read_lines(path)), delimiter=delimiter, strict=True)

    def cells() -> Iterator[tuple[int, list[str]]]:
        while True:
            try:
                row = next(reader, None)
            except csv.Error:
                raise DataError(f"{path}: line {reader.line_num}: not valid CSV") from None
            if row is None:
                return
            if row:
                yield reader.line_num, row

    lines = cells()
    _, header = next(lines, (0, []))
    if not header:
        raise DataError(f"{path}: is empty")

    def rows() -> Iterator[Row]:
        for line, row in lines:
            if len(row) != len(header):
                raise DataError(f"{path}: line {line}: {len(row)} cells, the header has {len(header)}")
            yield f"{path}: line {line}", dict(zip(header, row, strict=True))

    return header, rows()


def read_parquet(paths: Sequence[Path], columns: Columns) -> tuple[list[str], Iterator[Row]]:
    """Read the names of the columns that all files have, and the rows with those that can matter.

    Raises:
        DataError: pyarrow is not installed, or a file is not Parquet.
    """
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{paths[0]}: reading Parquet needs the package pyarrow") from None

    def opened(path: Path) -> Any:
        try:
            return parquet.ParquetFile(path)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({type(error).__name__})") from None

    names: list[list[str]] = [list(opened(path).schema_arrow.names) for path in paths]
    there = [column for column in names[0] if all(column in other for other in names)]

    def rows() -> Iterator[Row]:
        for path in paths:
            number = 0
            try:
                for batch in opened(path).iter_batches(batch_size=1024, columns=columns.needed(there)):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{path}: row {number}", row
            except (ArrowException, OSError) as error:
                raise DataError(f"{path}: after row {number}: cannot be read ({type(error).__name__})") from None

    return there, rows()


def _record_columns(there: Sequence[str], columns: Columns, name: str) -> dict[str, str]:
    """Which cell of a record is in which column."""
    if columns.text is not None:
        return {"response": _existing(columns.text, there, name)}
    if "text" in there:
        return {"response": "text"}
    for keys in (("prompt", "chosen", "rejected"), ("prompt", "response")):
        if all(key in there for key in keys):
            return {key: key for key in keys}
    return {"response": _existing("text", there, name)}


def _existing(column: str, there: Sequence[str], name: str) -> str:
    if there.count(column) > 1:
        raise DataError(
            f"{name}: {there.count(column)} columns are called {column!r}; which one is meant cannot be told"
        )
    if column in there:
        return column
    shown = ", ".join(other[:40] for other in there[:30])  # a file without a header has content there; not all of it
    raise DataError(f"{name}: no column {column!r}; columns there: {shown}")


def _text(cell: Any, column: str, where: str) -> str:
    if is_missing(cell):
        return ""
    if not isinstance(cell, str):
        raise DataError(f"{where}: column {column!r} is not text")
    return cell


def _plain(cell: Any) -> Any:
    """Lists of a pandas frame that came from Parquet are numpy arrays."""
    return cell.tolist() if hasattr(cell, "tolist") else cell
