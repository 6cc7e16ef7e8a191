"""What the owner sees and decides of personalization: `homespun device profile ...` and `homespun device level ...`.

Everything is read from and written to this device alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.owner_cli import open_home
from common.config import BUILT_IN
from common.errors import ConfigError, DataError

if TYPE_CHECKING:
    from client.level_store import LevelStore
    from client.personalization.profile import Profile
    from client.user_data import Record

__all__ = ["add_to"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Data = Annotated[
    Path | None, typer.Option(help="JSON lines of users, instead of the records of this device", show_default=False)
]
User = Annotated[str | None, typer.Option(help="... which of them is you", show_default=False)]

profile = typer.Typer(no_args_is_help=True, help="What the model is told about you.", rich_markup_mode=None)
level = typer.Typer(no_args_is_help=True, help="What may stand between you and the base model.", rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    """Put these commands into `homespun device`."""
    app.add_typer(profile, name="profile")
    app.add_typer(level, name="level")


@profile.command("show")
def show_profile(data: Data = None, user: User = None, as_json: Json = False) -> int:
    """Show what the model is told about you, made from the records of this device, or of --data.

    Lines in your own words stay, and lines that you deleted do not come back.

    Example: homespun device profile show
    """
    from client.personalization.profile import Profile

    store = _store()
    off = "profile" in store.off()
    kept = store.profile()
    if data is not None and not off:
        kept = (kept or Profile()).renewed(_records(data, user))
        store.keep_profile(kept)
    elif kept is None and not off:
        kept = _current(store)
    _print(kept or Profile(), off, as_json)
    return 0


@profile.command("edit")
def edit_profile(
    number: Annotated[int, typer.Argument(min=1, help="which line; one more than the last adds a line")],
    text: Annotated[str, typer.Argument(help="what it shall say")],
    as_json: Json = False,
) -> int:
    """Put one line into your own words, or add one.

    Example: homespun device profile edit 2 "My dog is called Rufus."
    """
    store = _store()
    try:
        changed = _current(store).edited(number, text)
    except ValueError as error:
        raise ConfigError(f"profile edit: {error}") from None
    store.keep_profile(changed)
    _print(changed, "profile" in store.off(), as_json)
    return 0


@profile.command("delete")
def delete_profile(
    number: Annotated[
        int | None, typer.Argument(min=1, help="which line; all of it when absent", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Delete one line, which does not come back, or the whole profile, whose level is then off.

    Example: homespun device profile delete 2
    """
    store = _store()
    if number is None:
        gone = store.delete_profile()
        said = {"deleted": gone, "level": "off"}
        what = "deleted" if gone else "there was none"
        print(json.dumps(said) if as_json else f"{what}; `homespun device level on profile` lets it be made again")
        return 0
    kept = _current(store)
    if not kept.lines:
        raise DataError("this device has no profile")
    try:
        changed = kept.without(number)
    except ValueError as error:
        raise ConfigError(f"profile delete: {error}") from None
    store.keep_profile(changed)
    _print(changed, "profile" in store.off(), as_json)
    return 0


@level.command("list")
def list_levels(as_json: Json = False) -> int:
    """List every level, what it does, and whether it is on.

    Example: homespun device level list
    """
    from client.level_store import LEVELS

    off = _store().off()
    if as_json:
        print(json.dumps({name: name not in off for name in LEVELS}))
        return 0
    for name, words in LEVELS.items():
        print(f"{name:<12} {'off' if name in off else 'on ':<4} {words}")
    return 0


@level.command("on")
def turn_on(name: Annotated[str, typer.Argument(help="which level")]) -> int:
    """Turn a level on.

    Example: homespun device level on retrieval
    """
    return _switch(name, on=True)


@level.command("off")
def turn_off(name: Annotated[str, typer.Argument(help="which level")]) -> int:
    """Turn a level off: it is not built, not put into a prompt, and not chosen.

    Example: homespun device level off retrieval
    """
    return _switch(name, on=False)


@level.command("used")
def used(
    question: Annotated[str, typer.Argument(help="what you would ask")],
    model: Annotated[str, typer.Option(help="base model: a Hugging Face folder or a hub name")] = BUILT_IN,
    data: Data = None,
    user: User = None,
    context_tokens: Annotated[int, typer.Option(min=1, help="most tokens put before the question")] = 96,
    max_tokens: Annotated[int, typer.Option(min=8, help="a record is cut to this many tokens")] = 64,
    as_json: Json = False,
) -> int:
    """List what would be put before a question: the records that retrieval finds, why, and the profile's lines.

    Example: homespun device level used "What is my dog called?"
    """
    from transformers import AutoTokenizer

    from client.personalization.context import ContextEncoder
    from client.user_data import Encoder, Record
    from common.model_files import base_folder

    store = _store()
    tokenizer = AutoTokenizer.from_pretrained(base_folder(model), local_files_only=True, trust_remote_code=False)
    encoder = Encoder(tokenizer, max_tokens)
    records = _records(data, user)
    memory = store.memory(records, ContextEncoder(tokenizer, encoder, context_tokens))
    shown = memory.retrieve(Record(question, "?"))
    found = [
        {"record": one.position + 1, "why": one.reason, "score": round(one.score, 3), **_texts(records[one.position])}
        for one in shown.found
    ]
    if as_json:
        print(json.dumps({"records": found, "tokens": len(shown.context.ids), "profile": memory.profile.texts}))
        return 0
    off = store.off()
    for name in ("retrieval", "profile"):
        if name in off:
            print(f"{name} is off")
    for row in found:
        print(f"record {row['record']} ({row['why']}, {row['score']:g}): {row['prompt']} -> {row['response']}")
    for line in memory.profile.texts:
        print(f"profile: {line}")
    print(f"{len(shown.context.ids)} of at most {context_tokens} tokens of records")
    return 0


def _switch(name: str, *, on: bool) -> int:
    _store().switch(name, on=on)
    print(f"{name} is {'on' if on else 'off'}, from the next question on")
    return 0


def _store() -> LevelStore:
    from client.level_store import LevelStore

    return LevelStore(open_home())


def _current(store: LevelStore) -> Profile:
    """The profile, made and kept now where there is none yet, so that a line's number means the same tomorrow."""
    kept = store.profile()
    if kept is None and "profile" not in store.off():
        kept = store.profile_of(_records(None, None))
        if kept.lines:
            store.keep_profile(kept)
    return kept or store.profile_of(())


def _records(data: Path | None, user: str | None) -> list[Record]:
    from client.cli import read_user
    from client.record_store import RecordStore

    if data is None:
        return [one.record for one in RecordStore(open_home()).records()]
    if user is None:
        raise ConfigError("--user: names which of the users in --data is you")
    return [record for record in read_user(data, user).records if not record.empty]


def _texts(record: Record) -> dict[str, str]:
    return {"prompt": record.prompt, "response": record.response}


def _print(shown: Profile, off: bool, as_json: bool) -> None:
    if as_json:
        lines: list[dict[str, Any]] = [
            {"line": number, "text": line.text, "kind": line.kind, "records": line.records}
            for number, line in enumerate(shown.lines, 1)
        ]
        print(json.dumps({"on": not off, "lines": lines}))
        return
    if off:
        print("the profile is off: the model is told nothing of it")
    if not shown.lines:
        print("no line yet; `homespun device data add PATH` brings records that lines are made from")
    for number, line in enumerate(shown.lines, 1):
        said = f"{line.kind}, {line.records} records" if line.records else line.kind
        print(f"{number:>3}  {line.text}  ({said})")
