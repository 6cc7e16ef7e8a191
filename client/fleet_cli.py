"""`homespun device join|up|down|status|pause|resume|leave`: this device in a federation."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.owner_cli import open_home, policy_from, refuse_passphrase
from common.errors import ConfigError, DataError, HomespunError, Refusal
from common.source import installed_version

if TYPE_CHECKING:
    from client.device_home import DeviceHome
    from client.policy import Policy
    from common.fleet import Invite

__all__ = ["add_to", "up_here"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
START_SECONDS = 60.0
STOP_SECONDS = 60.0


def add_to(app: typer.Typer) -> None:
    """Put the federation's commands into `homespun device`."""
    for command in (join, down, status, pause, resume, leave):
        app.command(command.__name__)(command)


def join(
    invite: Annotated[Path, typer.Argument(help="enrolment file of the coordinator")],
    data: Annotated[
        Path | None,
        typer.Option(help="records to learn from, as by `device data add`", show_default=False),
    ] = None,
    user: Annotated[
        str | None, typer.Option(help="... which of several users is the owner", show_default=False)
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="folder of the base model, where it is here already", show_default=False)
    ] = None,
    policy: Annotated[
        Path | None, typer.Option(help="TOML of what the owner grants; signed by joining", show_default=False)
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="do not ask; for fleets, with --policy")] = False,
) -> int:
    """Enrol this device: makes its key here, says what is asked beside what is granted, and waits for a yes.

    Example: homespun device join invite.json --data me.jsonl
    """
    from client.base_fetch import fetch_base
    from client.coordinator_link import CoordinatorLink
    from client.data_cli import learn_from, preview
    from client.membership import Membership, UsageMeter, node_key
    from client.owner_files import read_paths
    from client.record_store import RecordStore
    from common.fleet import Invite, device_id, public_bytes
    from common.model_files import model_digest
    from common.places import cache_home
    from common.vouched_roster import enrolment, federation_of

    asked = Invite.load(invite)
    if asked.has_expired(datetime.now(UTC)):
        raise Refusal("expired", f"the invite was good until {asked.expires:%Y-%m-%d %H:%M} UTC; ask for another")
    if data is None and user is not None:
        raise ConfigError("join: --user names a user in --data")
    reading = None if data is None else read_paths([data], user=user)
    home = open_home(create=True)
    before = _membership(home)
    if before is not None and before.status not in ("left", "revoked"):
        raise Refusal("joined", f"this device is in {before.invite.name} already; `homespun device leave` first")
    if model is not None and model_digest(model) != asked.base.digest:
        raise Refusal("model-mismatch", f"{model}: another model than the invite names ({asked.base.digest[:16]})")
    wanted = policy_from(policy) if policy is not None else home.policy()
    for line in words(asked, wanted):
        typer.echo(line)
    if reading is not None:
        new, counts = RecordStore(home).compared(reading.records)
        for line in preview(reading, list(new.values()), counts):
            typer.echo(line)
    if not yes:
        if not sys.stdin.isatty():
            raise Refusal("not-asked", "nobody is here to say yes; for a device without an owner at hand, --yes")
        typer.confirm("Join?", abort=True)
    if policy is not None:
        home.grant(wanted)
    if reading is not None:
        learn_from(home, reading.records)
    key = node_key(home, renew=before is not None)
    meter = UsageMeter(home.folder)

    def count(size: int) -> None:
        meter.add(megabytes=size / 1e6)

    with CoordinatorLink(asked, key, count=count) as link:
        subject = str(home.read_ledger().header["subject"])
        facts = {"version": installed_version(), "subject": subject}
        if asked.enroller:
            # The token stays here: it is the key that vouches for this device, and the coordinator is not to have it.
            device = device_id(public_bytes(key.public_key()))
            proof = enrolment(asked.token, federation_of(asked.authority), home.key, device)
            reply = link.ask("enrol", enrolment=proof, **facts)
        else:
            reply = link.ask("enrol", token=asked.token, **facts)
        joined = Membership(
            home,
            asked,
            None,
            None,
            model.absolute() if model is not None else cache_home() / "models" / asked.base.digest[:16],
            str(reply["status"]),
        ).save()
        if joined.status == "approved" and model is None:
            allowed = wanted.megabytes_per_day - meter.today().megabytes_today
            models = cache_home() / "models"
            try:
                found = fetch_base(asked.base, models, link, allowed_megabytes=allowed, say=typer.echo, count=count)
                Membership(home, asked, None, None, found, joined.status).save()
            except Refusal as refusal:
                if refusal.code != "megabytes":
                    raise
                typer.echo(str(refusal))
    tail = "the operator has to approve it first" if joined.status == "pending" else "`homespun device up` starts it"
    typer.echo(f"joined {asked.name} as {joined.device}: {joined.status}; {tail}")
    return 0


def words(asked: Invite, granted: Policy) -> Iterator[str]:
    """Say in plain words what is asked, beside what the owner grants."""
    from client.policy import ReleaseRequest

    wish, cohort = asked.asks, round(asked.asks.sampling_rate * asked.asks.population)
    seen = "your device adds the noise; nobody sees an update without it"
    if wish.noise == "central" and wish.unit == "user":
        seen = "the coordinator sees each of your updates before it adds noise to their sum"
    own, multiplier = wish.epsilon, wish.noise_multiplier
    if wish.noise == "distributed":
        seen = "your device adds a share of the noise and a mask; the coordinator sees the sum over a round's devices"
        own, multiplier = wish.coordinator_epsilon or "inf", wish.coordinator_noise_multiplier
    yield f"{asked.name} at {asked.address} asks this device to train together on base model {asked.base.name}."
    yield "What would leave: numbers of an adapter, clipped; no text, no loss, no count of records."
    yield f"  {'':<22}{'asked':<28}granted"
    rows = [
        ("whose privacy", wish.unit, " or ".join(granted.units)),
        ("who adds noise", f"{wish.noise}", "coordinator trusted" if granted.trust_coordinator else "only this device"),
        ("epsilon, whole run", wish.epsilon, f"{granted.epsilon:g} for ever"),
        *([("against coordinator", f"{float(own):.3g}", "the same")] if wish.noise == "distributed" else []),
        ("delta", f"{wish.delta:.3g}", f"{granted.delta:.3g}"),
        ("clip", f"{wish.clip:g}", f"at most {granted.clip:g}"),
        ("noise multiplier", f"{multiplier:.3f}", f"at least {granted.smallest_noise_multiplier:g}"),
        ("people per round", f"{cohort} of {wish.population}", f"at least {granted.smallest_cohort}"),
        ("rounds", str(wish.rounds), f"at most {granted.largest_rounds}"),
        ("MB per round", f"{wish.megabytes_per_round:.2f}", f"{granted.megabytes_per_day:g} a day"),
        ("base model to fetch", f"{asked.base.megabytes:.0f} MB", f"{granted.megabytes_per_day:g} a day"),
    ]
    for name, ask, grant in rows:
        yield f"  {name:<22}{ask:<28}{grant}"
    yield f"That means: {seen}."
    try:
        granted.check(
            ReleaseRequest(
                run_id="",
                round=1,
                unit=wish.unit,
                noise=wish.noise,
                clip=wish.clip,
                noise_multiplier=multiplier,
                sampling_rate=wish.sampling_rate,
                rounds=wish.rounds,
                cohort=cohort,
                population=wish.population,
                epsilon=max(float(wish.epsilon), float(own)),
                delta=wish.delta,
            )
        )
    except Refusal as refusal:
        yield f"As things stand this device would refuse, {refusal.code}: {refusal}."
        yield "It may join all the same, and gets the global adapter; `homespun device policy set` changes the grant."
    else:
        yield "The policy grants it."


def up_here(detach: bool) -> int:
    """Run this device until it is told to stop, or leave it running in the background."""
    from client.agent import agent_pid, only_serves, show_link, socket_path, supervisor_command
    from common.files import make_private_folder
    from common.places import runtime_home

    home = open_home(create=True)
    refuse_passphrase(home)
    if only_serves(home.folder):
        raise Refusal(
            "vault-running", "`homespun device serve` runs, which `up` does too; `homespun device down` ends it"
        )
    if agent_pid(home.folder) is not None:
        raise Refusal("vault-running", "this device is up already; `homespun device status` says how it is")
    socket = socket_path(home.folder, runtime_home())
    if not socket.parent.exists():
        make_private_folder(socket.parent)
    command = supervisor_command(home.folder, socket)
    if not detach:
        os.execv(command[0], command)  # noqa: S606 - the supervisor needs nothing of what was imported here
    (home.folder / "logs").mkdir(mode=0o700, exist_ok=True)
    with (home.folder / "logs" / "agent.log").open("ab") as log:
        process = subprocess.Popen(  # noqa: S603
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    deadline = time.monotonic() + START_SECONDS
    while agent_pid(home.folder) is None:
        if process.poll() is not None or time.monotonic() > deadline:
            raise DataError(f"the device did not come up; {home.folder / 'logs' / 'agent.log'} says why")
        time.sleep(0.1)
    print(f"up, as process {process.pid}; `homespun device status` says how it is", flush=True)
    if sys.stdout.isatty():
        show_link(str(home.folder))
    else:
        print("`homespun device open --print` makes a link to your page")
    return 0


def down() -> int:
    """Stop everything of this device; it keeps what it has, and the coordinator sees it as away.

    Example: homespun device down
    """
    from client.agent import agent_pid

    folder = open_home().folder
    pid = agent_pid(folder)
    if pid is None:
        print("this device is not up")
        return 0
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    while agent_pid(folder) == pid:
        if time.monotonic() > deadline:
            raise DataError("the device was told to stop and still runs")
        time.sleep(0.1)
    print("down")
    return 0


def status(as_json: Json = False) -> int:
    """Say what this device is part of, what it would refuse, what it refused, and what today cost.

    Example: homespun device status
    """
    facts = _status_facts(open_home())
    if as_json:
        print(json.dumps(facts))
        return 0
    for line in _status_lines(facts):
        print(line)
    return 0


def _status_facts(home: DeviceHome) -> dict[str, Any]:
    from client.agent import agent_pid, only_serves
    from client.budget_keeper import account_of
    from client.coordinator_calls import REFUSALS, verdict_on
    from client.device_home import RESTORED
    from client.learn_cli import own_facts
    from client.membership import UsageMeter
    from common.traffic import traffic_of
    from common.wire import ReleaseSpec

    joined, pid = _membership(home), agent_pid(home.folder)
    used, granted = UsageMeter(home.folder).today(), home.policy()
    facts: dict[str, Any] = {
        **{"up": pid is not None, "only_serves": only_serves(home.folder), "process": pid},
        "isolated": False,
        "budget": account_of(home.read_ledger().entries, granted).sentence(),
        "today": {
            "minutes": round(used.minutes_today, 2),
            "minutes_granted": granted.minutes_per_day,
            "megabytes": round(used.megabytes_today, 3),
            "megabytes_granted": granted.megabytes_per_day,
            "on_mains_power": used.on_mains_power,
            "cut_to_fit": UsageMeter(home.folder).cut() or None,
        },
        "restored": (home.folder / RESTORED).exists(),
        **own_facts(home),
        "refusals": _kept_refusals(home.folder / REFUSALS),
    }
    if joined is None:
        return {**facts, "joined": None}
    kept = joined.standing()
    runs: list[dict[str, Any]] = []
    for run in kept.get("runs", []):
        refusal = verdict_on(home, ReleaseSpec.from_text(run["spec"]))
        round_number = kept.get("adapters", {}).get(run["run"], {}).get("round", 0)
        would = {"code": refusal.code, "reason": str(refusal)} if refusal is not None else None
        runs.append(
            {
                "name": run["name"],
                "open": run["open"],
                "global_adapter_of_round": round_number,
                "refusal": would,
                "traffic": asdict(traffic_of(ReleaseSpec.from_text(run["spec"]))),
            }
        )
    return {
        **facts,
        "joined": joined.invite.name,
        "coordinator": joined.invite.address,
        "device": joined.device,
        "state": joined.status,
        "called": kept.get("called"),
        "away": kept.get("away") or None,
        "runs": runs,
        "personal": kept.get("personal"),
        "refit": kept.get("refit") or None,
        "rolled_back": kept.get("rolled_back") or None,
    }


def _status_lines(facts: dict[str, Any]) -> Iterator[str]:
    from common.traffic import Traffic

    if facts["only_serves"]:
        yield f"serves its owner, as process {facts['process']}, and trains nothing; `homespun device up` does both"
    else:
        yield f"up, as process {facts['process']}" if facts["up"] else "down; `homespun device up` starts it"
    yield "not isolated: the bundle that the coordinator sends runs as the same OS user as the vault (docs/devices.md)"
    if facts["joined"] is None:
        yield "part of no federation; `homespun device join INVITE` joins one"
    else:
        yield f"part of {facts['joined']} at {facts['coordinator']} as {facts['device']}: {facts['state']}"
        yield f"called last: {facts['called'] or 'never'}" + (f"; {facts['away']}" if facts["away"] else "")
        for run in facts["runs"]:
            would = run["refusal"]
            tail = f"would refuse, {would['code']}: {would['reason']}" if would else "would take part"
            said = f"global adapter of round {run['global_adapter_of_round']}"
            yield f"run {run['name']}: open, {said}; {tail}" if run["open"] else f"run {run['name']}: over, {said}"
            if run["open"]:
                yield f"  {Traffic(**run['traffic']).sentence()}"
        if facts["personal"] and facts["personal"]["losses"]:
            losses = facts["personal"]["losses"]
            shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
            yield f"validation loss on the owner's own records, nats per token: {shown}"
        if facts["refit"]:
            yield f"the private adapter was not refitted: {facts['refit']}"
        if facts["rolled_back"]:
            yield f"on {facts['rolled_back']} the coordinator's ledger was older than what it had signed before"
    if facts["records"] is not None:
        used = facts["learned"]["chosen"] if facts["learned"] else "base"
        off = f"; off: {', '.join(facts['off'])}, and with them what needs them" if facts["off"] else ""
        yield f"{facts['records']} records of yours; in use: {used}{off}"
    today = facts["today"]
    yield (
        f"today: {today['minutes']:.1f} of {today['minutes_granted']:g} minutes, "
        f"{today['megabytes']:.1f} of {today['megabytes_granted']:g} MB"
    )
    if today["cut_to_fit"]:
        yield today["cut_to_fit"]
    yield facts["budget"]
    if facts["restored"]:
        yield "put back from a copy: nothing leaves until the coordinator has said what was released since"
    for refusal in facts["refusals"][-5:]:
        times = int(refusal.get("times", 1))
        often = f" ({times} times)" if times > 1 else ""
        yield f"refused at {refusal['time']}, {refusal['code']}: {refusal['reason']}{often}"


def pause() -> int:
    """Train no more until `resume`; the device stays connected, so that nobody learns when its owner is away.

    Example: homespun device pause
    """
    return _set("paused", "paused: the vault refuses to train; what runs stays up")


def resume() -> int:
    """Train again after `pause`.

    Example: homespun device resume
    """
    return _set("approved", "goes on")


def leave(
    yes: Annotated[bool, typer.Option("--yes", help="do not ask")] = False,
) -> int:
    """Leave the federation: its coordinator lets this device's key in no more. Data, adapters and ledger stay.

    Example: homespun device leave --yes
    """
    from client.agent import agent_pid
    from client.coordinator_link import CoordinatorLink
    from client.data_cli import ask
    from client.membership import Membership

    home = open_home()
    joined = Membership.load(home)
    if joined.status == "left":
        raise Refusal("not-now", f"this device left {joined.invite.name} already")
    ask(f"Leave {joined.invite.name}? What was sent before stays in what was released.", yes)
    try:
        with CoordinatorLink(joined.invite, joined.key(), count=lambda size: None) as link:  # noqa: ARG005
            link.ask("leave")
    except HomespunError as error:
        print(f"the coordinator was not told: {error}")
    if agent_pid(home.folder) is not None:
        down()
    joined.save(status="left")
    (home.folder / "node.key").unlink(missing_ok=True)
    print("left; `homespun device forget` erases what was learned, the budget that was spent stays spent")
    return 0


def _set(status_word: str, said: str) -> int:
    from client.membership import Membership

    joined = Membership.load(open_home())
    if joined.status not in ("approved", "paused"):
        how = "left" if joined.status == "left" else f"is {joined.status}"
        raise Refusal("not-now", f"this device {how}; there is nothing to pause or go on with")
    joined.save(status=status_word)
    print(said)
    return 0


def _membership(home: DeviceHome) -> Any:
    from client.membership import Membership

    try:
        return Membership.load(home)
    except DataError:
        return None


def _kept_refusals(path: Path) -> list[dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["refusals"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
