"""`homespun server evidence`, `export` and `dashboard`: a run looked at and taken away, also while it goes on."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from common.errors import DataError

__all__ = ["add_to"]

Run = Annotated[
    Path | None,
    typer.Argument(
        help="a run's folder, or its name under this coordinator's runs; the newest when absent", show_default=False
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


def add_to(app: typer.Typer) -> None:
    """Put these commands into `homespun server`."""
    app.command("evidence")(evidence)
    app.command("export")(export)
    app.command("dashboard")(dashboard)


def evidence(
    run: Run = None,
    out: Annotated[
        Path | None, typer.Option(help="the zip to write; <run>-evidence.zip when absent", show_default=False)
    ] = None,
    receipts: Annotated[
        bool,
        typer.Option(
            "--receipts",
            help="with the receipts of what devices sent: with a device's ledger they show whether it took part",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Write what an auditor needs about a run into one signed zip: ledger, configuration, digests; nobody's data.

    Example: homespun server evidence runs/spring --out spring-evidence.zip
    """
    from server.run_evidence import write_run_evidence
    from server.run_folder import signing_key

    folder = _found(run)
    target = out or Path(f"{folder.resolve().name}-evidence.zip")
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    manifest = write_run_evidence(folder, target, signing_key(), time=now, receipts=receipts)
    if as_json:
        print(json.dumps({"path": str(target), **manifest}))
        return 0
    print(f"{target}: {', '.join(manifest['files'])}")
    print(f"signed by {manifest['public_key']}, ledger head at entry {manifest['head']['index']}")
    if receipts:
        print("it holds receipts: who has it and a device's ledger knows whether that device took part")
    return 0


def export(
    run: Run = None,
    out: Annotated[
        Path | None, typer.Option(help="folder to write; <run>-global when absent", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Write the newest global adapter of a run as a PEFT folder, with what the run promises beside it.

    Example: homespun server export runs/spring --out spring-adapter
    """
    from server.global_export import write_global_adapter

    folder = _found(run)
    written = write_global_adapter(folder, out or Path(f"{folder.resolve().name}-global"))
    if as_json:
        facts = {"round": written.round, "rounds": written.rounds, "base": written.base}
        print(json.dumps({"path": str(written.folder), **facts}))
        return 0
    print(f"{written.folder}: the global adapter after round {written.round}, over base model {written.base[:16]}")
    return 0


def dashboard(
    run: Run = None,
    port: Annotated[int, typer.Option(help="of this machine's loopback; any free one for 0", min=0, max=65535)] = 8471,
) -> int:
    """Serve a live page of a run to this machine's browser, until Ctrl-C; works while the run goes on.

    Example: homespun server dashboard runs/spring
    """
    import signal
    import threading

    from server.dashboard import serving

    told_to_stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: told_to_stop.set())
    with serving(_found(run), port) as address:
        print(f"Ctrl-C ends it; open {address}", flush=True)
        told_to_stop.wait()
    return 0


def _found(run: Path | None) -> Path:
    """Take a folder as it is, and a name as that of a run of this installation's coordinator."""
    from server.server_home import ServerHome

    if run is None:
        folders = ServerHome.open().run_folders()
        if not folders:
            raise DataError("there is no run; `homespun server run CONFIG` starts one")
        return folders[-1]
    if run.exists() or run.name != str(run):
        return run
    own = ServerHome.open().runs / run
    if not own.is_dir():
        raise DataError(
            f"{run}: neither a run of this coordinator nor a folder here; `homespun server runs` lists runs"
        )
    return own
