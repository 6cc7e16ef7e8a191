"""`homespun server ...`: what the operator of a coordinator runs."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from common.errors import ConfigError, DataError, HomespunError, Refusal
from common.places import state_home
from common.source import installed_version
from server import oversight_cli
from server.server_home import ServerHome

__all__ = ["Json", "app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="The coordinator: who is enrolled, what runs, what it costs.",
    rich_markup_mode=None,
)

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
RunName = Annotated[str | None, typer.Argument(help="name of a run; the newest when absent", show_default=False)]

START_SECONDS = 90.0

oversight_cli.add_to(app)


@app.command("up")
def up(
    address: Annotated[
        str | None,
        typer.Option(help="host:port by which devices reach it; kept [default: 127.0.0.1:9443]", show_default=False),
    ] = None,
    listen: Annotated[
        str | None, typer.Option(help="host:port to listen on; all interfaces when absent", show_default=False)
    ] = None,
    metrics: Annotated[str, typer.Option(help="host:port for /metrics and /health", show_default=False)] = "",
    capture: Annotated[
        Path | None,
        typer.Option(help="write all that crosses the door to this file, in the clear: an audit", show_default=False),
    ] = None,
    detach: Annotated[bool, typer.Option(help="go on in the background")] = False,
) -> int:
    """Start the coordinator: Flower behind one door, devices, runs.

    Example: homespun server up --address fleet.example.org:9443 --metrics 127.0.0.1:9464
    """
    from server.coordinator import Coordinator
    from server.operator import settle_address
    from server.server_home import check_address

    if metrics:
        check_address(metrics)
    home = ServerHome.open(create=True)
    if home.running() is not None:
        raise Refusal("coordinator-running", "the coordinator runs already; `homespun server status` says where")
    settle_address(home, address, listen)
    if detach:
        return _detach(home, metrics, capture)
    asyncio.run(Coordinator(home, version=installed_version(), metrics=metrics, capture=capture).run())
    return 0


def _detach(home: ServerHome, metrics: str, capture: Path | None) -> int:
    words = ["server", "up", "--metrics", metrics] if metrics else ["server", "up"]
    words += ["--capture", str(capture.absolute())] if capture is not None else []
    log = home.folder / "coordinator.log"
    before = log.stat().st_size if log.exists() else 0
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    process = subprocess.Popen(  # noqa: S603
        [sys.executable, *_front_door(), *words],
        stdin=subprocess.DEVNULL,
        stdout=descriptor,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    os.close(descriptor)
    deadline = time.monotonic() + START_SECONDS
    while home.running() is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise DataError(f"the coordinator did not start{_last_words(log, before)}; it writes to {log}")
        time.sleep(0.2)
    running = home.running()
    print(f"the coordinator runs as process {running.pid if running else process.pid}; it writes to {log}")
    return 0


def _last_words(log: Path, start: int) -> str:
    """Why a process gave up, as it wrote into `log` from byte `start` on; empty where it did not say."""
    with log.open("rb") as file:
        file.seek(start)
        said = [line for line in file.read().decode(errors="replace").splitlines() if line.startswith("homespun: ")]
    return f": {said[-1].removeprefix('homespun: ')}" if said else ""


def _front_door() -> list[str]:
    """How this very installation is called again: the repository's file, or the wheel's package."""
    file = Path(__file__).resolve().parent.parent / "homespun.py"
    return [str(file)] if file.exists() else ["-m", "homespun"]


@app.command("down")
def down() -> int:
    """Stop the coordinator; devices wait, and runs go on when it is up again.

    Example: homespun server down
    """
    home = ServerHome.open()
    if not home.stop_running():
        print("the coordinator does not run")
        return 0
    deadline = time.monotonic() + 60.0
    while home.running() is not None:
        if time.monotonic() > deadline:
            raise DataError("the coordinator was told to stop and still runs")
        time.sleep(0.2)
    print("stopped")
    return 0


@app.command("status")
def status(as_json: Json = False) -> int:
    """Say whether the coordinator runs, who is enrolled, and who was turned away.

    Example: homespun server status
    """
    from server.certificates import Authority
    from server.enrolment import Enrolment

    home, now = ServerHome.open(), datetime.now(UTC)
    running = home.running()
    enrolment = Enrolment(home.devices)
    states = [device.state for device in enrolment.devices()]
    leaf = Authority(home.tls).pair("leaf")[0].exists()
    warning = Authority(home.tls).warning(now=now) if leaf else None
    facts: dict[str, Any] = {
        "running": running is not None,
        "address": running.address if running else home.settings().get("address"),
        "metrics": (running.metrics or None) if running else None,
        "devices": {state: states.count(state) for state in sorted(set(states))},
        "refused": enrolment.refused(),
        "certificate": {"days": Authority(home.tls).days_left("leaf", now=now), "warning": warning} if leaf else None,
    }
    if as_json:
        print(json.dumps(facts))
        return 0
    if running is None:
        print("the coordinator does not run; `homespun server up` starts it")
    else:
        print(f"the coordinator runs as process {running.pid} and answers at {running.address}")
    print("devices: " + (", ".join(f"{count} {state}" for state, count in facts["devices"].items()) or "none"))
    for reason, count in facts["refused"].items():
        print(f"turned away, {reason}: {count}")
    if warning:
        print(warning)
    return 0


@app.command("invite")
def invite(
    uses: Annotated[int, typer.Option(min=1, help="devices that it lets in")] = 1,
    expires: Annotated[str, typer.Option(help="how long it is good for: 12h, 7d, 4w")] = "7d",
    config: Annotated[
        Path | None,
        typer.Option(help="TOML of the runs that are planned: what devices will be asked", show_default=False),
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(help="where the base model may be had: coordinator, hub:NAME, https://..., a folder"),
    ] = None,
    approve_each: Annotated[bool, typer.Option("--approve-each", help="devices wait for `server approve`")] = False,
    enroller: Annotated[
        Path | None,
        typer.Option(
            help="the key that signs invites, where it does not lie with the coordinator; made where it is missing",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="file of the invite")] = Path("invite.json"),
) -> int:
    """Make an enrolment file; whoever has it may join, so hand it over as you would a password.

    Example: homespun server invite --uses 50 --expires 7d --config run.toml
    """
    from common.config import load_config, read_config_file
    from common.files import write_private_file
    from server.operator import make_invite, read_duration

    home = ServerHome.open()
    made = make_invite(
        home,
        load_config(read_config_file(config)) if config is not None else None,
        uses=uses,
        lasts=read_duration(expires),
        approves=not approve_each,
        sources=tuple(source or ("coordinator",)),
        version=installed_version(),
        now=datetime.now(UTC),
        enroller=enroller,
    )
    write_private_file(out, made.to_text().encode(), replace=True)
    print(f"{out}: lets {uses} device(s) in until {made.expires:%Y-%m-%d %H:%M} UTC; homespun device join {out}")
    return 0


@app.command("devices")
def devices(as_json: Json = False) -> int:
    """List devices: pending, approved, revoked; last seen, version, and why one would refuse what is open.

    Example: homespun server devices
    """
    from server.enrolment import Enrolment

    rows = [
        {
            "id": one.id,
            "state": one.state,
            "joined": one.joined,
            "last_seen": one.seen,
            "version": one.version,
            "last_refusal": one.verdict or None,
            "older_ledger": one.rolled_back,
        }
        for one in Enrolment(ServerHome.open().devices).devices()
    ]
    if as_json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print("no device has joined; `homespun server invite` makes an invite")
    for row in rows:
        words = [f"would refuse: {row['last_refusal']}"] if row["last_refusal"] else []
        words += ["showed an older ledger than before: an old copy was put back"] if row["older_ledger"] else []
        seen = row["last_seen"] or "never"
        print(f"{row['id']}  {row['state']:<9} seen {seen:<23} {row['version']:<8} {'; '.join(words)}".rstrip())
    return 0


@app.command("approve")
def approve(device: Annotated[str, typer.Argument(help="a device, or the beginning of its name")]) -> int:
    """Let a device in that waits.

    Example: homespun server approve 3f2a
    """
    return _set_state(device, "approved")


@app.command("revoke")
def revoke(device: Annotated[str, typer.Argument(help="a device, or the beginning of its name")]) -> int:
    """Let a device in no more, from now on; what it sent before stays in what was released.

    Example: homespun server revoke 3f2a
    """
    return _set_state(device, "revoked")


def _set_state(device: str, state: str) -> int:
    from server.enrolment import Enrolment

    found = Enrolment(ServerHome.open().devices).set_state(device, state)
    print(f"{found.id}: {found.state}")
    return 0


@app.command("renew")
def renew() -> int:
    """Make a new certificate under the same authority; devices need nothing, and nothing is interrupted.

    Example: homespun server renew
    """
    from server.certificates import Authority

    home, now = ServerHome.open(), datetime.now(UTC)
    authority = Authority.open(home.tls, now=now)
    host = str(home.settings().get("address", "localhost:0")).rpartition(":")[0]
    authority.issue("leaf", [host, "localhost", "127.0.0.1"], now=now)
    print(f"good for {authority.days_left('leaf', now=now)} days; a coordinator that runs takes it up in seconds")
    return 0


@app.command("run")
def run(
    config: Annotated[Path, typer.Argument(help="TOML with the keys of `homespun sim run`")],
    name: Annotated[str | None, typer.Option(help="name of the run; made from the file's", show_default=False)] = None,
) -> int:
    """Start a federated run over every approved device.

    Example: homespun server run run.toml
    """
    from server.operator import new_run

    home = ServerHome.open()
    path = new_run(home, config, name)
    where = "the coordinator starts it" if home.running() else "it starts when the coordinator is up"
    print(f"{path.name}: prepared in {path}; {where}")
    return 0


@app.command("runs")
def runs(as_json: Json = False) -> int:
    """List federated runs: where each stands, and what it spent of its budget.

    Example: homespun server runs
    """
    from server import fleet_runs

    rows: list[dict[str, Any]] = []
    for path in ServerHome.open().run_folders():
        try:
            seen = fleet_runs.overview(path)
        except HomespunError as error:
            rows.append({"name": path.name, "state": "unreadable", "reason": str(error)})
            continue
        facts = {name: getattr(seen, name) for name in ("name", "run", "state", "reason", "round", "rounds", "spent")}
        rows.append({**facts, "reserved": seen.spec.rounds, "epsilon": seen.spec.epsilon, "delta": seen.spec.delta})
    if as_json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print("no run yet; `homespun server run CONFIG` starts one")
    for row in rows:
        if row["state"] == "unreadable":
            print(f"{row['name']}: unreadable: {row['reason']}")
            continue
        tail = f"; {row['reason']}" if row["reason"] else ""
        print(
            f"{row['name']}: {row['state']}, round {row['round']} of {row['rounds']}, "
            f"{row['spent']} of {row['reserved']} releases of epsilon {row['epsilon']} at delta {row['delta']:.3g}"
            f"{tail}"
        )
    return 0


@app.command("stop")
def stop(run: RunName = None) -> int:
    """Stop a run after the round that is being worked on; it can be resumed.

    Example: homespun server stop run-1
    """
    from server import fleet_runs

    path = _chosen(run)
    fleet_runs.want(path, "stop")
    print(f"{path.name}: stops after its round")
    return 0


@app.command("resume")
def resume(
    run: RunName = None,
    alone: Annotated[
        bool, typer.Option("--alone", help="after a restore: do not wait for what devices can prove")
    ] = False,
) -> int:
    """Go on with a run that was stopped, or that came back from a backup.

    Example: homespun server resume run-1
    """
    from server import fleet_runs
    from server.enrolment import Enrolment

    path, home = _chosen(run), ServerHome.open()
    restored = path / fleet_runs.RESTORED
    if restored.exists() and not alone:
        since = datetime.fromtimestamp(restored.stat().st_mtime, UTC).isoformat(timespec="minutes")
        seen = [one for one in Enrolment(home.devices).devices() if one.seen is not None and one.seen >= since]
        if not seen:
            raise Refusal(
                "restored",
                "this run came from a backup and no device has called since: what was spent after the backup is not "
                "known yet. Bring the coordinator up and wait for devices, or say --alone",
            )
    fleet_runs.clear_outcome(path)
    fleet_runs.want(path, "run")
    print(f"{path.name}: goes on")
    return 0


@app.command("backup")
def backup(target: Annotated[Path, typer.Argument(help="file to write; as secret as the coordinator")]) -> int:
    """Copy everything that a new machine needs into one file.

    Example: homespun server backup coordinator.tar.gz
    """
    from server import operator

    count = operator.backup(ServerHome.open(), target, now=datetime.now(UTC))
    print(f"{target}: {count} files; it holds keys, so keep it as you keep the coordinator")
    return 0


@app.command("restore")
def restore(source: Annotated[Path, typer.Argument(help="file that `server backup` wrote")]) -> int:
    """Put a copy back; what was spent since it was made stays spent, as far as devices can prove it.

    Example: homespun server restore coordinator.tar.gz
    """
    from server import operator

    count = operator.restore(source, state_home() / "server")
    print(f"restored, {count} run(s); they wait: bring the coordinator up, let devices call, then `server resume`")
    return 0


def _chosen(name: str | None) -> Path:
    folders = ServerHome.open().run_folders()
    if name is None:
        if not folders:
            raise DataError("there is no run")
        return folders[-1]
    found = [path for path in folders if path.name == name]
    if not found:
        raise ConfigError(f"{name}: no run of this name; `homespun server runs` lists them")
    return found[0]
