"""Users from wherever their records are: files, folders, the Hugging Face hub, or memory.

===================================  ================================================================================
source                               read as
===================================  ================================================================================
``.jsonl`` ``.ndjson``               a user per line: ``{"user", "texts"}``, ``{"user", "examples": [{"prompt",
                                     "response"}]}``, ``{"user", "pairs": [{"prompt", "chosen", "rejected"}]}``; with
                                     `profile` and times where there are any. Streamed. With a column named, a record
                                     per line
``.json``                            LaMP's questions, its outputs found beside them; or an array of users as above
``.csv`` ``.tsv``                    a record per row, by column
``.parquet``                         a record or a user per row, by column
folder                               LaMP's files; a saved Hugging Face dataset; or data files of one kind above
``owner/name``                       a data set of the hub, or ``owner/name:config@split``
DataFrame, Dataset                   a record or a user per row, by column
dict, sequence of `User`             user id -> list of texts, examples, pairs or `Record`s; users as they are
===================================  ================================================================================

Files may be gzipped (``.gz``), Parquet excepted. One user is one line or entry: the same user on two lines is refused,
because merging would mean holding everything, and because two people under one id would share one privacy budget. In
tables, the rows of a user are gathered.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, cast

from client.record_shapes import name_from, record_from, user_from
from client.user_data import User
from common.errors import DataError
from simulations.worlds import hub, lamp
from simulations.worlds.files import digest_of, is_array, read_entries, read_lines
from simulations.worlds.tables import Columns, read_csv, read_parquet, users_of_rows

__all__ = ["UserSource", "load_users", "subject_key"]

Found = tuple[str, User]
Read = Callable[[Counter[str]], Iterator[Found]]

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


class UserSource:
    """Users of one source, in its order; read anew each time they are iterated over, never all held at once.

    Attributes:
        name: The source as the caller named it.
    """

    def __init__(self, name: str, read: Read, digest: Callable[[], str] | None, limit: int | None = None) -> None:
        """Wrap a reader; without a `digest` of files, the content is what is digested."""
        self.name = name
        self._read = read
        self._digest = digest
        self._limit = limit
        self._known_digest: str | None = None
        self._notes: Counter[str] = Counter()

    def __iter__(self) -> Iterator[User]:
        """Yield users.

        Raises:
            DataError: The source is not what it claims to be, has no users, or names one twice.
        """
        notes: Counter[str] = Counter()
        seen: set[bytes] = set()
        self._notes = notes
        if self._limit == 0:
            return
        for where, user in self._read(notes):
            mark = hashlib.blake2b(user.id.encode(), digest_size=16).digest()
            if mark in seen:
                raise DataError(f"{where}: this user was there before; one user's records belong in one place")
            seen.add(mark)
            yield user
            if len(seen) == self._limit:
                return
        if not seen:
            raise DataError(f"{self.name}: is empty, no users there")

    @property
    def notes(self) -> dict[str, int]:
        """What the last pass left out, counted by reason."""
        return {reason: count for reason, count in self._notes.items() if count}

    @property
    def source_digest(self) -> str:
        """SHA-256 in hex of the files, as `files.digest_of` says; of the content, where there are no files.

        Raises:
            DataError: A file cannot be read.
        """
        if self._known_digest is None:
            self._known_digest = self._digest() if self._digest else _content_digest(self)
        return self._known_digest


def load_users(
    source: Any,
    *,
    user_column: str | None = None,
    text_column: str | None = None,
    time_column: str | None = None,
    limit: int | None = None,
    name: str = "data in memory",
) -> UserSource:
    """Open `source`, anything the table above lists; contents are read when the result is iterated over.

    Args:
        source: A path, the name of a data set on the hub, or data in memory.
        user_column: Tables: the column with the user's id; "user" when absent.
        text_column: Tables: the column with the text; when absent `text`, or `prompt` with `response`, or `prompt` with
            `chosen` and `rejected`.
        time_column: Tables: the column with the time; "time" when absent, if there is one.
        limit: Stop after this many users.
        name: What to call data in memory; anything else has its own name.

    Raises:
        DataError: There is no such source, or it is of no known kind.
    """
    columns = Columns(user_column, text_column, time_column)
    if isinstance(source, UserSource):
        return source if limit is None else UserSource(source.name, _again(source), lambda: source.source_digest, limit)
    if isinstance(source, str | Path):
        name, read, digest = _open_path(source, columns)
    else:
        read, digest = _in_memory(source, columns), None
    return UserSource(name, read, digest, limit)


def subject_key(user_id: str, salt: bytes) -> str:
    """Name a user without naming them: 32 hex digits that only the holder of `salt` can link to the id.

    Raises:
        ValueError: The salt is shorter than 16 bytes, and could be guessed along with the id.
    """
    if len(salt) < 16:
        raise ValueError("a salt has at least 16 bytes")
    return hmac.new(salt, user_id.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()[:32]


def _open_path(source: str | Path, columns: Columns) -> tuple[str, Read, Callable[[], str] | None]:
    path = Path(source).expanduser()
    if not path.exists():
        if isinstance(source, str) and hub.is_name(source) and _kind(path) is None and not path.parent.is_dir():
            return source, lambda _: _of_dataset(hub.load(source), columns, source), None
        raise DataError(f"{source}: no such file or folder")
    if path.is_dir():
        if hub.is_saved(path):
            return str(path), lambda _: _of_dataset(hub.load_saved(path), columns, str(path)), None
        files = lamp.lamp_files(path) or _data_files(path)
    else:
        files = [path]
    kind = _kind(files[0])
    if kind is None:
        raise DataError(f"{path}: of no known kind; known are {', '.join(SUFFIXES)}, and .gz of each but the last")
    if kind != ".json":
        return str(path), _reader(files, kind, columns), lambda: digest_of(files)
    answers = [beside for file in files if (beside := lamp.outputs_beside(file))]
    return str(path), _reader(files, kind, columns), lambda: digest_of([*files, *answers])


def _reader(files: Sequence[Path], kind: str, columns: Columns) -> Read:
    def users(notes: Counter[str]) -> Iterator[Found]:
        if kind == ".parquet":
            there, rows = read_parquet(files, columns)
            yield from users_of_rows(rows, there, columns, str(files[0]))
        elif kind in {".csv", ".tsv"}:
            yield from _of_csv(files, columns)
        elif kind == ".json":
            yield from _of_json(files, notes)
        elif columns.named:
            yield from _of_record_lines(files, columns)
        else:
            for where, entry in _json_lines(files):
                yield where, user_from(entry, where)

    return users


def _of_csv(files: Sequence[Path], columns: Columns) -> Iterator[Found]:
    tables = [read_csv(file) for file in files]
    there = tables[0][0]
    for file, (header, _) in zip(files, tables, strict=True):
        if header != there:
            raise DataError(f"{file}: other columns than {files[0].name}")
    yield from users_of_rows((row for _, rows in tables for row in rows), there, columns, str(files[0]))


def _of_json(files: Sequence[Path], notes: Counter[str]) -> Iterator[Found]:
    if not all(is_array(file) for file in files):  # lines of JSON are often called .json
        for where, entry in _json_lines(files):
            yield where, user_from(entry, where)
        return
    first = next((entry for _, entry in read_entries(files[0])), None)
    if lamp.looks_like_lamp(first):
        yield from lamp.read_lamp(files, notes)
        return
    if isinstance(first, Mapping) and "output" in first and "user" not in first:
        raise DataError(f"{files[0]}: LaMP's answers; give the file of questions beside it")
    for file in files:
        for number, entry in read_entries(file):
            where = f"{file}: entry {number}"
            yield where, user_from(entry, where)


def _of_record_lines(files: Sequence[Path], columns: Columns) -> Iterator[Found]:
    lines = _json_lines(files)
    first = next(lines, None)
    if first is None:
        return
    there = list(cast("Mapping[str, Any]", first[1])) if isinstance(first[1], Mapping) else []

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        for where, entry in chain([first], lines):
            if not isinstance(entry, Mapping):
                raise DataError(f"{where}: not a JSON object")
            fields = cast("Mapping[str, Any]", entry)
            yield where, {key: fields.get(key) for key in there}

    yield from users_of_rows(rows(), there, columns, str(files[0]))


def _json_lines(files: Sequence[Path]) -> Iterator[tuple[str, Any]]:
    for file in files:
        for number, line in read_lines(file):
            if not line.strip():
                continue
            where = f"{file}: line {number}"
            try:
                entry: Any = json.loads(line.strip())
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON (column {error.colno})") from None
            except RecursionError:
                raise DataError(f"{where}: nested too deeply") from None
            except ValueError:  # what Python says to a whole number of thousands of digits
                raise DataError(f"{where}: a number with too many digits") from None
            yield where, entry


def _of_dataset(dataset: Any, columns: Columns, name: str) -> Iterator[Found]:
    there = list(dataset.column_names)
    needed: Any = dataset.select_columns(columns.needed(there))
    rows = ((f"{name}: row {number}", row) for number, row in enumerate(needed, start=1))
    yield from users_of_rows(rows, there, columns, name)


def _of_frame(frame: Any, columns: Columns) -> Iterator[Found]:
    there = [str(column) for column in frame.columns]
    needed = columns.needed(there)
    cells = [frame.iloc[:, there.index(column)].tolist() for column in needed]
    rows = (
        (f"row {number}", dict(zip(needed, row, strict=True)))
        for number, row in enumerate(zip(*cells, strict=True), start=1)
    )
    yield from users_of_rows(rows, there, columns, "the frame")


def _of_mapping(people: Mapping[Any, Any]) -> Iterator[Found]:
    for number, (user_id, items) in enumerate(people.items(), start=1):
        where = f"user {number}"
        if not isinstance(items, list | tuple) or not items:
            raise DataError(f"{where}: not a list with records")
        records = tuple(
            record_from(item, f"{where}: record {index}")
            for index, item in enumerate(cast("list[Any]", items), start=1)
        )
        yield where, User(name_from(user_id, where), records)


def _of_sequence(people: Sequence[Any]) -> Iterator[Found]:
    for number, person in enumerate(people, start=1):
        where = f"user {number}"
        if isinstance(person, User) and not person.records:
            raise DataError(f"{where}: a user without records")
        yield where, person if isinstance(person, User) else user_from(person, where)


def _in_memory(source: Any, columns: Columns) -> Read:
    """Choose the reader by what the data can do, so that neither pandas nor datasets is imported."""
    if type(source).__module__.split(".")[0] == "datasets":
        return lambda _: _of_dataset(hub.one_split(source, "the data set"), columns, "the data set")
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        return lambda _: _of_frame(source, columns)
    if isinstance(source, Mapping):
        return lambda _: _of_mapping(cast("Mapping[Any, Any]", source))
    if isinstance(source, Sequence) and not isinstance(source, bytes | bytearray):
        return lambda _: _of_sequence(cast("Sequence[Any]", source))
    raise DataError(f"users cannot be read from a {type(source).__name__}")


def _again(source: UserSource) -> Read:
    return lambda _: ((source.name, user) for user in source)


def _data_files(folder: Path) -> list[Path]:
    """The data files of a folder and its folders, without hidden ones and what Hugging Face keeps beside data."""
    found = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and _kind(file) and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    files = [file for file in found if file.name not in {"dataset_infos.json", "dataset_info.json", "state.json"}]
    kinds = sorted({_kind(file) or "" for file in files})
    if not files:
        raise DataError(f"{folder}: no data files there; known are {', '.join(SUFFIXES)}")
    if len(kinds) > 1:
        raise DataError(f"{folder}: data files of several kinds there ({', '.join(kinds)}); name one file")
    return files


def _kind(path: Path) -> str | None:
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def _content_digest(users: Iterator[User] | UserSource) -> str:
    digest = hashlib.sha256()
    for user in users:
        records = [[old.prompt, old.response, old.time, old.task, old.rejected, old.kind] for old in user.records]
        digest.update(json.dumps([user.id, user.profile, records]).encode())
        digest.update(b"\n")
    return digest.hexdigest()
