"""`homespun audit reconcile`, `report` and `sign`: from both sides' evidence to a page that somebody signs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["add_to"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
CONTRADICTED = 4


def add_to(app: typer.Typer) -> None:
    """Put these commands into `homespun audit`."""
    app.command("reconcile")(reconcile)
    app.command("sign")(sign)


def reconcile(
    server: Annotated[Path, typer.Argument(help="the server's evidence: a zip, or a run's folder")],
    devices: Annotated[list[Path], typer.Argument(help="devices' evidence: zips, or ledger files")],
    as_json: Json = False,
) -> int:
    """Match what a server says happened with what devices say, release by release; exit code 4 when they differ.

    Example: homespun audit reconcile server.zip device-*.zip
    """
    from common.evidence import read_evidence
    from simulations.reconciliation import OUTSIDE
    from simulations.reconciliation import reconcile as match

    found = match(read_evidence(server), [read_evidence(path) for path in devices])
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        print(f"run {found.run[:16]}: {found.devices} devices, {found.releases} releases, {found.matched} matched")
        for one in found.findings:
            print(f"  {one.verdict}: {one.claim} ({one.why})")
        for text in found.missing:
            print(f"  missing: {text}")
        print(f"  {OUTSIDE}")
        print(f"verdict: {found.verdict}")
    return CONTRADICTED if found.verdict == "contradicted" else 0


def sign(
    files: Annotated[list[Path], typer.Argument(help="what to sign, as audit.html")],
    name: Annotated[str, typer.Option(help="who signs, as it shall be read")] = "",
    key_file: Annotated[
        Path | None, typer.Option(help="private key; this installation's own when absent", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Sign files: FILE.sig is written beside each, and `homespun audit verify FILE` checks it.

    Example: homespun audit sign audit-report/audit.html --name "Jane Doe, data protection officer"
    """
    from simulations.signatures import auditor_key, check_signature, sign_file

    key = auditor_key(key_file)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    targets = [sign_file(path, key, name=name, time=now) for path in files]
    if as_json:
        print(json.dumps([check_signature(path).to_json() for path in files]))
        return 0
    for target in targets:
        print(target)
    print(f"public key {key.verify_key.hex}; whoever has it can check with `homespun audit verify`")
    return 0
