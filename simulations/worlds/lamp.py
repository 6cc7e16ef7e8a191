"""LaMP's question and output files as users (Salemi et al. 2024, arXiv:2304.11406).

`{train,dev,test}_questions.json` hold queries, each with its user's profile of past items; `{train,dev}_outputs.json`
the answers ("golds") to the queries. Here an item of a profile becomes a record to train on, with the instruction of
the user's own query before it, and a query with its answer becomes the record to test on (`HELD_OUT`):

===========  =====================================  =========================
task         prompt of a profile item               response
===========  =====================================  =========================
1 citation   Write an abstract for this title: ...  abstract
2 movie      the query's instruction, description   tag
2N news      the query's instruction, text          category
3 rating     the query's instruction, text          score
4 headline   the query's instruction, text          title
5 paper      the query's instruction, abstract      title
6 e-mail     the query's instruction, text          title
7 tweet      Complete the following tweet: ...      the rest of the tweet
===========  =====================================  =========================

Which task a file is of is read from the fields of its items: both tasks 2 call themselves LaMP_2. In the user split
there is no `user_id` and one query is one user. In the time split a user has many queries, over several files, with
profiles that overlap: items are taken once, by id; the queries of the user's last file are held out, earlier ones are
records. A profile item that repeats a held-out query is left out. Test answers are not public: such a query gives
its profile only.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

from client.record_shapes import name_from, time_from
from client.user_data import HELD_OUT, Record, User
from common.errors import DataError
from simulations.worlds.files import read_entries

__all__ = ["lamp_files", "looks_like_lamp", "outputs_beside", "read_lamp"]

SPLITS = ("train", "dev", "test")


class _Task(NamedTuple):
    name: str
    source: str
    target: str
    marker: str
    """The end of the instruction in a query; what follows its first occurrence is the query's text."""


_MOVIE = _Task("LaMP_2", "description", "tag", "description:")
_NEWS = _Task("LaMP_2N", "text", "category", "article:")
_RATING = _Task("LaMP_3", "text", "score", "review:")
_HEADLINE = _Task("LaMP_4", "text", "title", "article:")
_PAPER = _Task("LaMP_5", "abstract", "title", "paper:")
_EMAIL = _Task("LaMP_6", "text", "title", "email:")
_CITATION = _Task("LaMP_1", "title", "abstract", "")
_TWEET = _Task("LaMP_7", "text", "text", "")


def lamp_files(folder: Path) -> list[Path]:
    """The question files of a folder: train, dev, test."""
    return [
        path
        for split in SPLITS
        for path in (folder / f"{split}_questions.json", folder / f"{split}_questions.json.gz")
        if path.is_file()
    ]


def outputs_beside(questions: Path) -> Path | None:
    """The file of answers that belongs to a question file, where there is one."""
    if "questions" not in questions.name:
        return None
    stem = questions.name.replace("questions", "outputs").removesuffix(".gz")
    return next(
        (path for path in (questions.with_name(stem), questions.with_name(f"{stem}.gz")) if path.is_file()), None
    )


def looks_like_lamp(entry: Any) -> bool:
    """Whether the entry of a JSON array is a LaMP question."""
    return isinstance(entry, Mapping) and "input" in entry and "profile" in entry


@dataclass
class _Gathered:
    items: dict[str, Record] = field(default_factory=dict[str, Record])
    queries: list[tuple[int, Record]] = field(default_factory=list[tuple[int, Record]])


def read_lamp(questions: Sequence[Path], notes: Counter[str]) -> Iterator[tuple[str, User]]:
    """Read question files, with the outputs beside them, as users and where each was found.

    The user split is streamed. The time split is held in memory, because a user's queries are all over the files.

    Args:
        questions: Question files, in the order of time.
        notes: Counts what was left out, by reason.

    Raises:
        DataError: A file is not of LaMP's format.
    """
    people: dict[str, _Gathered] = {}
    for index, path in enumerate(questions):
        golds = _golds(path)
        for number, entry in read_entries(path):
            where = f"{path}: entry {number}"
            if not looks_like_lamp(entry):
                raise DataError(f'{where}: not a LaMP question, which has "id", "input" and "profile"')
            query, items = _question(cast("Mapping[str, Any]", entry), golds, where, notes)
            if entry.get("user_id") is None:
                own = _Gathered(items, [(index, query)] if query else [])
                name = name_from(entry.get("id"), where)
                yield from _finish(
                    f"{path.name.split('_')[0]}/{name}" if len(questions) > 1 else name, own, where, notes
                )
            else:
                own = people.setdefault(name_from(entry["user_id"], where), _Gathered())
                own.items.update(items)
                own.queries.extend([(index, query)] if query else [])
    for name, own in people.items():
        yield from _finish(name, own, str(questions[0].parent), notes)


def _finish(name: str, own: _Gathered, where: str, notes: Counter[str]) -> Iterator[tuple[str, User]]:
    """Put items in the order of their dates, then earlier queries, then those held out."""
    last = max((index for index, _ in own.queries), default=0)
    held_out = [replace(query, kind=HELD_OUT) for index, query in own.queries if index == last]
    asked = {(query.prompt, query.response) for query in held_out}
    rest = [*own.items.values(), *(query for index, query in own.queries if index < last)]
    kept = [record for record in rest if (record.prompt, record.response) not in asked]
    notes["profile items that repeat a held-out query"] += len(rest) - len(kept)
    if all(record.time is not None for record in kept):
        kept.sort(key=lambda record: record.time or 0.0)
    if kept or held_out:
        yield where, User(name, (*kept, *held_out))
    else:
        notes["users without a record"] += 1


def _question(
    entry: Mapping[str, Any], golds: Mapping[str, str], where: str, notes: Counter[str]
) -> tuple[Record | None, dict[str, Record]]:
    """Read one entry: its query as a record, where there is an answer, and its profile's items by id."""
    query, profile = entry["input"], entry["profile"]
    if not isinstance(query, str) or not isinstance(profile, list):
        raise DataError(f"{where}: 'input' is not text or 'profile' is not a list")
    items: dict[str, Record] = {}
    task = None
    for position, item in enumerate(cast("list[Any]", profile)):
        if not isinstance(item, Mapping):
            raise DataError(f"{where}: item {position + 1} of the profile is not an object")
        fields = cast("Mapping[str, Any]", item)
        task = task or _task_of(fields, query, where)
        # most tasks number all their items; one without an id is itself only
        identity = str(fields["id"]) if fields.get("id") is not None else f"{entry.get('id')}/{position}"
        items[identity] = _item(fields, query, task, f"{where}: item {position + 1} of the profile", notes)
    gold = entry.get("output", golds.get(str(entry.get("id"))))
    if gold is None:
        notes["queries without an answer"] += 1
        return None, items
    name = task.name if task else "LaMP"
    return Record(query, str(gold), _date(entry, where, notes), name), items


def _task_of(fields: Mapping[str, Any], query: str, where: str) -> _Task:
    if "tag" in fields:
        return _MOVIE
    if "category" in fields:
        return _NEWS
    if "score" in fields:
        return _RATING
    if "abstract" in fields:
        return _CITATION if "[2]:" in query else _PAPER
    if "title" in fields:
        return _EMAIL if re.search(r"email:|e-mail:", query) else _HEADLINE
    if "text" in fields:
        return _TWEET
    raise DataError(f"{where}: the profile's items are those of no LaMP task")


def _item(fields: Mapping[str, Any], query: str, task: _Task, where: str, notes: Counter[str]) -> Record:
    """Make a profile item a record of the query's own form."""
    for key in (task.source, task.target):
        if key not in fields:
            raise DataError(f"{where}: {key!r} is not there")
    source, target = (str(fields[key] or "") for key in (task.source, task.target))
    if task is _CITATION:
        prompt = f"Write an abstract for this title: {source}"
    elif task is _TWEET:
        begun, target = _begin(source)
        prompt = f"Complete the following tweet: {begun}"
    else:
        prompt = f"{_instruction(query, task, where)} {source}"
    return Record(prompt, target, _date(fields, where, notes), task.name)


def _begin(tweet: str) -> tuple[str, str]:
    """Cut a tweet after 10 to 25 % of its words, but at least one; where exactly, the tweet decides."""
    words = tweet.split()
    share = 0.10 + 0.15 * hashlib.sha256(tweet.encode("utf-8", "replace")).digest()[0] / 255
    count = min(max(1, int(len(words) * share)), max(len(words) - 1, 0))
    return " ".join(words[:count]), " ".join(words[count:])


def _instruction(query: str, task: _Task, where: str) -> str:
    end = query.find(task.marker)
    if end >= 0:
        return query[: end + len(task.marker)]
    end = query.find(":")  # the tasks' wording has changed over the releases
    if end < 0:
        raise DataError(f"{where}: the query has no instruction that ends with a colon")
    return query[: end + 1]


def _date(fields: Mapping[str, Any], where: str, notes: Counter[str]) -> float | None:
    try:
        return time_from(fields.get("date"), where)
    except DataError:
        notes["dates that could not be read"] += 1
        return None


def _golds(questions: Path) -> dict[str, str]:
    path = outputs_beside(questions)
    golds: dict[str, str] = {}
    if path is None:
        return golds
    for number, entry in read_entries(path):
        if not isinstance(entry, Mapping) or "id" not in entry or "output" not in entry:
            raise DataError(f'{path}: entry {number}: not a LaMP answer, which has "id" and "output"')
        fields = cast("Mapping[str, Any]", entry)
        golds[str(fields["id"])] = str(fields["output"])
    return golds
