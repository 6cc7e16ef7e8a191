"""`homespun device data ...`: what this device may learn from, seen, added and removed by its owner."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.owner_cli import open_home
from common.errors import ConfigError, DataError, Refusal

if TYPE_CHECKING:
    from client.device_home import DeviceHome
    from client.owner_files import Reading
    from client.record_store import Added, KeptRecord, NewRecord

__all__ = ["add_to", "learn_from", "preview"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask")]

PREVIEWED = 3
LONGEST_SHOWN = 72
"""Characters of a text on a line."""

data = typer.Typer(no_args_is_help=True, help="What this device may learn from.", rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    """Put these commands into `homespun device`."""
    app.add_typer(data, name="data")


@data.command("add")
def add(
    paths: Annotated[list[Path], typer.Argument(help="txt, md, mbox or jsonl files, or folders of them")],
    user: Annotated[
        str | None, typer.Option(help="JSON lines of several users: which is you", show_default=False)
    ] = None,
    mine: Annotated[
        list[str] | None, typer.Option(help="mail of several senders: an address of yours", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be added, and add nothing")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Add records to learn from: says how many there are of what, shows the first, and waits for a yes.

    They are sealed on this device and go nowhere. Your files stay as they are.

    Example: homespun device data add ~/notes sent.mbox --mine me@example.org
    """
    from client.owner_files import read_paths
    from client.record_store import RecordStore

    reading = read_paths(paths, user=user, mine=mine or ())
    home = open_home(create=True)
    new, counts = RecordStore(home).compared(reading.records)
    facts = _plan(reading, new, counts)
    if not as_json:
        for line in preview(reading, list(new.values()), counts):
            print(line)
    if dry_run or not new:
        if as_json:
            print(json.dumps({**facts, "added": []}))
        elif dry_run:
            print("nothing was added: --dry-run")
        return 0
    ask(f"Add {len(new)} records?", yes)
    added = learn_from(home, reading.records)
    if as_json:
        print(json.dumps({**facts, "added": added.ids}))
        return 0
    print(f"added {len(added.ids)} records; `homespun device learn` trains the private adapter on them")
    return 0


@data.command("list")
def list_records(as_json: Json = False) -> int:
    """List what this device may learn from: name, time, kind, and how each begins.

    Example: homespun device data list
    """
    records = _store().records()
    if as_json:
        print(json.dumps([_facts(one) for one in records]))
        return 0
    if not records:
        print("no records yet; `homespun device data add PATH` adds some")
    for one in records:
        said = one.record.prompt or one.record.response
        print(f"{one.id}  {_day(one.record.time)}  {one.record.task:<10} {_short(said)}")
    return 0


@data.command("show")
def show(
    record: Annotated[str, typer.Argument(help="id of a record, or the beginning of one")], as_json: Json = False
) -> int:
    """Show one record whole.

    Example: homespun device data show 3f2a
    """
    (one,) = _store().find([record])
    if as_json:
        print(json.dumps({**_facts(one), **_texts(one)}))
        return 0
    print(f"{one.id}  {one.record.task}, {_day(one.record.time)}, from {one.source}")
    for name, text in _texts(one).items():
        if text:
            print(f"{name}: {_printable(text)}")
    return 0


@data.command("remove")
def remove(
    records: Annotated[list[str] | None, typer.Argument(help="ids, or beginnings of ids", show_default=False)] = None,
    source: Annotated[str | None, typer.Option(help="all records that came from this file", show_default=False)] = None,
    as_json: Json = False,
) -> int:
    """Remove records: they leave retrieval and the profile at once, and the private adapter before its next use.

    Example: homespun device data remove 3f2a 90bc
    """
    from client.removal import remove_records

    if not records and source is None:
        raise ConfigError("data remove: name a record, or --source")
    home = open_home()
    from client.record_store import RecordStore

    store = RecordStore(home)
    ids = [one.id for one in store.find(records or ())]
    if source is not None:
        wanted = {source, str(Path(source).expanduser().absolute())}
        of_source = [one.id for one in store.records() if one.source in wanted]
        if not of_source:
            raise DataError(
                "data remove: no record came from that source; `homespun device data list --json` says which"
            )
        ids += of_source
    done = remove_records(home, ids)
    if as_json:
        print(json.dumps({"removed": done.records, "private_adapter_erased": done.private_adapter}))
        return 0
    print(f"removed {done.records} records; retrieval and the profile are without them now")
    if done.private_adapter:
        print("the private adapter had been trained with them and was erased; `homespun device learn` trains it again")
    return 0


def learn_from(home: DeviceHome, records: Sequence[NewRecord]) -> Added:
    """Keep records, and make the profile again where one is kept."""
    from client.level_store import LevelStore
    from client.record_store import RecordStore

    store = RecordStore(home)
    added = store.add(records)
    if added.ids:
        LevelStore(home).renew_profile([one.record for one in store.records()])
    return added


def ask(question: str, yes: bool) -> None:
    """Wait for the owner's yes.

    Raises:
        Refusal: Nobody is here to say it.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise Refusal("not-asked", "nobody is here to say yes; --yes says it")
    typer.confirm(question, abort=True)


def preview(reading: Reading, new: Sequence[NewRecord], counts: Added) -> Iterator[str]:
    """Say what would be learned: how much of what, from when to when, and how the first records look."""
    kinds = Counter(_KINDS.get(one.record.task, one.record.task) for one in new)
    shown = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common()) or "none"
    yield f"read {reading.files} files: {len(reading.records)} records, of which new: {shown}"
    passed = dict(reading.left_out)
    for reason, count in (("records that are here already", counts.duplicates), ("empty records", counts.empty)):
        if count:
            passed[reason] = count
    for reason, count in passed.items():
        if count:
            yield f"left out, {reason}: {count}"
    times = [one.record.time for one in new if one.record.time is not None]
    if times:
        yield f"from {_day(min(times))} to {_day(max(times))}"
    letters = sum(len(one.record.prompt) + len(one.record.response) for one in new)
    if new:
        yield f"{letters:,} characters; for example:"
    for one in new[:PREVIEWED]:
        if one.record.prompt:
            yield f"  asked: {_short(one.record.prompt)}"
        yield f"  {'learned' if one.record.prompt else 'text'}: {_short(one.record.response)}"


_KINDS = {"text": "texts", "reply": "answers", "preference": "preferences"}


def _plan(reading: Reading, new: dict[str, NewRecord], counts: Added) -> dict[str, Any]:
    return {
        "files": reading.files,
        "read": len(reading.records),
        "new": len(new),
        "duplicates": counts.duplicates,
        "empty": counts.empty,
        "left_out": {reason: count for reason, count in reading.left_out.items() if count},
    }


def _facts(one: KeptRecord) -> dict[str, Any]:
    return {
        "id": one.id,
        "time": one.record.time,
        "task": one.record.task,
        "source": one.source,
        "added": one.added,
        "begins": _short(one.record.prompt or one.record.response),
    }


def _texts(one: KeptRecord) -> dict[str, str | None]:
    return {"prompt": one.record.prompt, "response": one.record.response, "rejected": one.record.rejected}


def _printable(text: str) -> str:
    """What a terminal may be shown: a record can hold anything, escape sequences too."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def _short(text: str) -> str:
    line = _printable(" ".join(text.split()))
    return line if len(line) <= LONGEST_SHOWN else f"{line[: LONGEST_SHOWN - 3]}..."


def _day(time: float | None) -> str:
    if time is None:
        return "no time   "
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return f"{time:<10g}"


def _store() -> Any:
    from client.record_store import RecordStore

    return RecordStore(open_home())
