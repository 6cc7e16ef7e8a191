"""`homespun device export|import|forget|backup|restore`: the owner takes away, brings back and erases what was learned.

=======  =========================================  ============================================================
command  what stops                                 what is kept
=======  =========================================  ============================================================
pause    training; what runs stays up               everything
down     everything that runs on this device        everything
leave    everything; the coordinator is told        everything but the key that it was let in by
forget   everything that runs on this device        who this device is, its policy, the ledger and what was spent
=======  =========================================  ============================================================
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.data_cli import ask
from client.learn_cli import base_of
from client.owner_cli import open_home
from common.errors import ConfigError, DataError, Refusal

if TYPE_CHECKING:
    from client.device_home import DeviceHome

__all__ = ["WHAT_IS_KEPT", "add_to"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Yes = Annotated[bool, typer.Option("--yes", help="do not ask")]

WHAT_IS_KEPT = """\
pause   trains no more; what runs stays up.        Kept: everything.
down    nothing of this device runs.               Kept: everything.
leave   the coordinator lets this key in no more.  Kept: records, profile, adapters, ledger, budget.
forget  nothing runs; what was learned is erased.  Kept: this device's name and key, policy, ledger, spent budget."""
"""One table of what the four commands that end something keep."""


def add_to(app: typer.Typer) -> None:
    """Put these commands into `homespun device`."""
    app.command("export")(export)
    app.command("import")(import_)
    app.command("forget")(forget)
    app.command("backup")(backup)
    app.command("restore")(restore)


def export(
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("homespun-export"),
    merged: Annotated[
        bool, typer.Option("--merged", help="also the base with the adapter in its weights, a Hugging Face folder")
    ] = False,
    system: Annotated[
        str | None, typer.Option(help="... of this system; the one in use when absent", show_default=False)
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="the base model, where it lies elsewhere now", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Write what this device learned and holds of you: adapters as PEFT, profile and records as text.

    The folder is in the clear. GGUF is not written: llama.cpp's convert_hf_to_gguf.py makes it of the merged folder.

    Example: homespun device export --out my-model --merged
    """
    from client.export import write_export

    home = open_home()
    chosen = _system_to_merge(home, system) if merged else None
    manifest = write_export(home, out, base_of(home, model), merged=chosen)
    if as_json:
        print(json.dumps({"path": str(out), **manifest}))
        return 0
    systems = ", ".join(manifest["systems"]) or "none"
    print(f"{out}: {manifest['records']} records, the profile, and PEFT adapters: {systems}")
    if "learned" in manifest:
        print(f"in use on this device: {manifest['learned']['chosen']}")
    if chosen is not None:
        print(f"{out / 'merged'}: the base with {chosen} in its weights")
    print("it is in the clear: whoever has this folder has read your records")
    return 0


def import_(
    folder: Annotated[Path, typer.Argument(help="what `homespun device export` wrote")],
    model: Annotated[
        str | None, typer.Option(help="base model of its adapters, where it is not this device's", show_default=False)
    ] = None,
    without_adapters: Annotated[
        bool, typer.Option("--without-adapters", help="take in records and profile alone")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Take in an export: records, the profile's own words, and adapters where the base model is the same.

    Example: homespun device import my-model
    """
    from client.exported import Exported, take_in

    exported = Exported.read(folder)
    home = open_home(create=True)
    with_adapters = exported.base is not None and not without_adapters
    adapters = ", ".join(exported.manifest["systems"]) if with_adapters else "none"
    if not as_json:
        print(f"{len(exported.records)} records, {len(exported.profile.lines)} profile lines, adapters: {adapters}")
    ask("Take them in? Private adapters of this device are replaced.", yes)
    taken = take_in(home, exported, base_of(home, model) if with_adapters else None)
    if with_adapters and model is not None:
        from client.learn_cli import remember_base

        remember_base(home, str(exported.base), base_of(home, model))
    if as_json:
        said = {"records": len(taken.records.ids), "duplicates": taken.records.duplicates}
        print(json.dumps({**said, "own_words": taken.own_words, "adapters": taken.adapters}))
        return 0
    print(
        f"took in {len(taken.records.ids)} records ({taken.records.duplicates} were here), {taken.own_words} lines of "
        f"profile in your words, adapters: {adapters if taken.adapters else 'none'}"
    )
    return 0


def forget(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would go, and erase nothing")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Erase what this device learned and holds of you: adapters, profile, records, feedback, copies of what was sent.

    What was spent stays spent. It says first what cannot be undone, and waits for a yes.

    Example: homespun device forget --dry-run
    """
    from client.agent import agent_pid
    from client.fleet_cli import down
    from client.forgetting import forget as erase
    from client.forgetting import plan

    home = open_home()
    planned = plan(home)
    if not as_json:
        size = sum(planned.files.values())
        print(
            f"erased: {planned.records} records, {planned.profile_lines} lines of profile, "
            f"{'private adapters' if planned.adapters else 'no adapter'}, feedback, copies of what was sent;"
        )
        print(f"        {len(planned.files)} files of {size:,} bytes are overwritten, with their keys")
        print("kept: this device's name and key, its policy, the ledger with what was spent, its federation")
        print("not reached: your own files, exports and backups; base models in the cache hold nothing of yours")
        for sentence in planned.cannot:
            print(f"cannot be undone: {sentence}")
    if dry_run:
        print(json.dumps(planned.to_json()) if as_json else "nothing was erased: --dry-run")
        return 0
    ask("Erase? It cannot be brought back.", yes)
    if agent_pid(home.folder) is not None:
        down()
    erase(home)
    print(json.dumps({**planned.to_json(), "erased": True}) if as_json else "erased; the ledger holds a tombstone")
    return 0


PassphraseFile = Annotated[
    Path | None, typer.Option(help="read the passphrase from this file; asked when absent", show_default=False)
]


def backup(
    file: Annotated[Path, typer.Argument(help="file to write; it must not exist")],
    passphrase_file: PassphraseFile = None,
    as_json: Json = False,
) -> int:
    """Seal a copy of the whole device, its master key too, under a passphrase. The device is down meanwhile.

    Example: homespun device backup my-device.backup
    """
    from datetime import UTC, datetime

    from client.device_backup import write_backup

    home = open_home()
    _check_down(home.folder)
    words = _passphrase(passphrase_file, confirm=True)
    count = write_backup(home, file, words, time=datetime.now(UTC).isoformat(timespec="seconds"))
    size = file.stat().st_size
    if as_json:
        print(json.dumps({"path": str(file), "files": count, "bytes": size}))
    else:
        print(f"{file}: {count} files, {size:,} bytes; whoever has it and the passphrase is this device")
    return 0


def restore(
    file: Annotated[Path, typer.Argument(help="what `homespun device backup` wrote")],
    passphrase_file: PassphraseFile = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Put the device back from a copy. Its budget is not new again: what was spent since the copy stays spent.

    Example: homespun device restore my-device.backup
    """
    from client.device_backup import read_backup
    from client.device_backup import restore as put_back
    from common.places import state_home

    folder = state_home() / "device"
    _check_down(folder)
    copied = read_backup(file, _passphrase(passphrase_file, confirm=False))
    if not as_json:
        print(f"a copy of {copied.made}, {len(copied.files)} files")
    ask("Put it back? Records, profile and adapters of this device become those of the copy.", yes)
    said = put_back(folder, copied)
    print(
        json.dumps({"made": copied.made, "files": len(copied.files), "budget": said})
        if as_json
        else f"put back; {said}"
    )
    return 0


def _check_down(folder: Path) -> None:
    from client.agent import agent_pid

    if agent_pid(folder) is not None:
        raise Refusal("up", "this device is up, or served; `homespun device down` first")


def _passphrase(file: Path | None, *, confirm: bool) -> str:
    import sys

    if file is not None:
        try:
            return file.read_text(encoding="utf-8").rstrip("\n")
        except (OSError, UnicodeDecodeError):
            raise ConfigError(f"{file}: no passphrase can be read from it") from None
    if not sys.stdin.isatty():
        raise ConfigError("nobody is here to be asked for a passphrase; --passphrase-file names one")
    return str(typer.prompt("Passphrase of the copy", hide_input=True, confirmation_prompt=confirm))


def _system_to_merge(home: DeviceHome, system: str | None) -> str:
    from client.learned_store import LearnedStore

    if system is not None:
        return system
    learned = LearnedStore(home).load()
    if learned is None:
        raise ConfigError("export: nothing was learned yet, so there is nothing to merge; `homespun device learn`")
    if learned.shared is None and learned.chosen.partition("@")[0] in ("base", "retrieval", "profile"):
        raise DataError(
            f"in use is {learned.chosen}, which puts nothing into the base's weights; --system private merges that"
        )
    return learned.chosen
