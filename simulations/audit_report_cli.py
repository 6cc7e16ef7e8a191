"""`homespun audit reconcile`, `report` and `sign`: from both sides' evidence to a page that somebody signs."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import DataError

__all__ = ["add_to"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
CONTRADICTED = 4


def add_to(app: typer.Typer) -> None:
    """Put these commands into `homespun audit`."""
    app.command("reconcile")(reconcile)
    app.command("report")(report)
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


def report(
    paths: Annotated[list[Path], typer.Argument(help="evidence of either side: zips, run folders, ledgers")],
    out: Annotated[Path, typer.Option(help="folder to write")] = Path("audit-report"),
    key: Annotated[list[str] | None, typer.Option(help="public key, hex, that may have signed; repeatable")] = None,
    budget: Annotated[
        float | None, typer.Option(help="epsilon granted for everything together", show_default=False, min=0)
    ] = None,
    since: Annotated[
        Path | None, typer.Option(help="audit.json of an earlier audit: open with what changed", show_default=False)
    ] = None,
    curator: Annotated[str | None, typer.Option(help="for the registry's record: who publishes")] = None,
    name: Annotated[str | None, typer.Option(help="for the registry's record: what is published")] = None,
    as_json: Json = False,
) -> int:
    """Verify, recompute and reconcile, and write the page that a privacy officer reads; exit code 4 on contradiction.

    Example: homespun audit report server.zip device-*.zip --key 03a1... --out audit-report
    """
    from simulations.audit import audit
    from simulations.audit_page import write_audit

    earlier = _earlier(since)
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    done = audit(paths, time=now, keys=key or (), budget=budget, since=earlier)
    told = {word: value for word, value in (("curator", curator), ("name", name)) if value}
    page = write_audit(done, out, told)
    if as_json:
        print((out / "audit.json").read_text(encoding="utf-8"), end="")
    else:
        for one in done.claims:
            print(f"{one.verdict:<13} {one.text} ({one.why})")
        print(f"verdict: {done.verdict}; {page}")
    return CONTRADICTED if done.verdict == "contradicted" else 0


def _earlier(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = [found["ledgers"], found.get("claims", [])]
        if not all(isinstance(part, list) and all(isinstance(one, dict) for one in part) for part in parts):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path}: not the audit.json of an earlier audit") from None
    return found


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
