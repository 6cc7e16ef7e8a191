"""`homespun doctor`: what is wrong with this machine, and what to do about it."""

from __future__ import annotations

import io
import json
import sys
import zipfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from common.errors import DataError
from common.files import write_private_file

__all__ = ["doctor"]

MARKS = {"ok": "ok", "warning": "note", "failed": "FAILED", "skipped": "-"}


def doctor(
    bundle: Annotated[
        Path | None,
        typer.Option(help="write a file for whoever helps you: no data of yours, no key, no path", show_default=False),
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="do not ask the coordinator for the time")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of text")] = False,
) -> int:
    """Look at versions, memory, disk, keys, sockets, certificates, the base model and the clock; say what to do.

    Ends with 1 where something fails.

    Example: homespun doctor --bundle support.zip
    """
    from client.doctor import checks, declared, support_files

    ask = None
    if sys.stdin.isatty():
        ask = lambda: str(typer.prompt("Passphrase of this device", hide_input=True))  # noqa: E731
    found = checks(offline=offline, ask_passphrase=ask)
    failed = [one for one in found if one.state == "failed"]
    if bundle is not None:
        if bundle.exists():
            raise DataError(f"{bundle}: exists already; name another file")
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("doctor.json", json.dumps(support_files(found), indent=1, sort_keys=True))
        write_private_file(bundle, content.getvalue())
    if as_json:
        print(json.dumps({"checks": [asdict(one) for one in found], "failed": len(failed)}))
        return int(bool(failed))
    packages = [one for one in found if one.name in declared() and one.state == "ok"]
    print(f"{'ok':<7} {'packages':<20} {len(packages)} in the versions that were tested")
    for one in found:
        if one in packages:
            continue
        print(f"{MARKS[one.state]:<7} {one.name:<20} {one.said}")
        if one.remedy:
            print(f"{'':<7} {'':<20} -> {one.remedy}")
    print(f"{len(failed)} of {len(found)} checks failed" if failed else "nothing failed")
    if bundle is not None:
        print(f"{bundle}: versions, states and counts; look into it before you hand it over")
    return int(bool(failed))
