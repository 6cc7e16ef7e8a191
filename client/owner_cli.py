"""What the owner asks of a device: what was sent, what may still be sent, and who decides.

`homespun device sent`, `homespun device budget ...` and `homespun device policy ...`. Looking works beside a vault
that is running; a refill needs the ledger for itself, so the vault is stopped first.
"""

from __future__ import annotations

import json
import math
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import ConfigError, DataError, Refusal

if TYPE_CHECKING:
    from client.device_home import DeviceHome
    from client.policy import Policy
    from common.ledger import Entry

__all__ = ["add_to", "open_home", "policy_from", "read_policy", "refuse_passphrase"]

Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]

SHOWN_NUMBERS = 8

budget = typer.Typer(no_args_is_help=True, help="What may still leave this device.", rich_markup_mode=None)
policy = typer.Typer(no_args_is_help=True, help="What the owner grants.", rich_markup_mode=None)


def add_to(app: typer.Typer) -> None:
    """Put the owner's commands into `homespun device`."""
    app.command("sent")(sent)
    app.command("evidence")(evidence)
    app.add_typer(budget, name="budget")
    app.add_typer(policy, name="policy")


def read_policy(path: Path) -> bytes:
    """Read a file that the owner names.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def policy_from(path: Path) -> Policy:
    """Read a policy that the owner names, without asking who signed it.

    Raises:
        ConfigError: Every problem that it has, after the file's name.
    """
    from client.policy import Policy

    content = read_policy(path)
    try:
        return Policy.parse(content)
    except ConfigError as error:
        raise ConfigError([f"{path}: {problem}" for problem in error.problems]) from None


def sent(
    release: Annotated[
        str | None, typer.Argument(help="number or digest of a release; all are listed when absent", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="write the very bytes that left to this file", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """List what left this device, or show exactly what one release held.

    Example: homespun device sent 12
    """
    home = open_home()
    releases = [entry for entry in home.read_ledger().entries if entry.kind == "release"]
    if release is None:
        rows = [_facts(entry) for entry in releases]
        if as_json:
            print(json.dumps(rows))
            return 0
        if not rows:
            print("nothing ever left this device")
        for row in rows:
            print(
                f"{row['id']:>6}  {row['time']}  run {row['run'][:16]} round {row['round']:<5} {row['bytes']:>10,} "
                f"bytes  sha256 {row['sha256'][:16]}"
            )
        return 0
    return _show(home, _chosen(releases, release), out, as_json)


def evidence(
    out: Annotated[Path, typer.Option(help="the zip to write")] = Path("device-evidence.zip"), as_json: Json = False
) -> int:
    """Write what an auditor needs about this device into one signed zip: what left and when; no data, no tensor.

    Example: homespun device evidence --out my-device.zip
    """
    from datetime import UTC, datetime

    from client.device_evidence import write_device_evidence

    manifest = write_device_evidence(open_home(), out, time=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
    if as_json:
        print(json.dumps({"path": str(out), **manifest}))
        return 0
    print(f"{out}: {', '.join(manifest['files'])}")
    print(f"signed by {manifest['public_key']}; whoever has it knows in which rounds this device took part")
    return 0


@budget.command("show")
def show_budget(as_json: Json = False) -> int:
    """Show what was spent, by which run, and what is left.

    Example: homespun device budget show
    """
    from client.budget_keeper import account_of
    from client.outlook import outlook_of

    home = open_home()
    entries = home.read_ledger().entries
    account = account_of(entries, home.policy())
    outlook = outlook_of(entries, account)
    if as_json:
        left = None if outlook is None else asdict(outlook)
        print(json.dumps({**_plain(asdict(account)), "sentence": account.sentence(), "left": left}))
        return 0
    print(account.sentence())
    for run in account.runs:
        print(
            f"run {run.run[:16]}: {run.debited} of {run.rounds} releases used; all of them, if alone: epsilon "
            f"{run.reserved_epsilon:.2f} at delta {account.delta:.3g}"
        )
    if outlook is not None:
        print(outlook.sentence())
    return 0


@budget.command("refill")
def refill(
    epsilon: Annotated[float, typer.Option(help="the new limit, over everything ever released")],
    delta: Annotated[float | None, typer.Option(help="a smaller failure probability", show_default=False)] = None,
    as_json: Json = False,
) -> int:
    """Raise the limit; what was released before still counts. The ledger keeps this for good.

    Example: homespun device budget refill --epsilon 12
    """
    from client.budget_keeper import BudgetKeeper

    home = open_home()
    with home.open_ledger() as ledger:
        try:
            account = BudgetKeeper(home, ledger).refill(epsilon, delta)
        except ValueError as error:
            raise ConfigError(f"refill: {error}") from None
    print(json.dumps(_plain(asdict(account))) if as_json else account.sentence())
    return 0


@policy.command("show")
def show_policy(as_json: Json = False) -> int:
    """Show what the owner grants, after checking the signature.

    Example: homespun device policy show
    """
    granted = open_home().policy()
    print(json.dumps(_plain(granted.model_dump())) if as_json else granted.to_toml(), end="\n" if as_json else "")
    return 0


@policy.command("set")
def set_policy(
    changes: Annotated[list[str] | None, typer.Argument(help="key=value, as in the file")] = None,
    file: Annotated[Path | None, typer.Option(help="take a whole policy from this TOML file")] = None,
) -> int:
    """Change what is granted, and sign it.

    Example: homespun device policy set epsilon=4 trust_coordinator=false
    """
    from client.budget_keeper import account_of
    from client.policy import Policy

    if not changes and file is None:
        raise ConfigError("policy set: name at least one key=value, or --file")
    home = open_home()
    text = policy_from(file).to_toml() if file is not None else home.policy().to_toml()
    granted = home.grant(Policy.parse(_with(text, changes or []).encode()))
    print(f"signed, serial {granted.serial}, in force from the next request on")
    limit = account_of(home.read_ledger().entries, granted).limit
    if granted.epsilon > limit:
        print(f"the budget stays at epsilon {limit:g} until `homespun device budget refill --epsilon ...` raises it")
    return 0


@policy.command("check")
def check_policy(
    spec: Annotated[
        Path | None, typer.Argument(help="spec.json of a run, to ask whether it would be granted", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Check the signature; with a run's spec, say whether policy and budget would grant its first round.

    Example: homespun device policy check spec.json
    """
    from client.budget_keeper import BudgetKeeper
    from common.wire import ReleaseSpec

    home = open_home()
    granted = home.policy()
    facts: dict[str, Any] = {"serial": granted.serial, "signed": True}
    if not as_json:
        print(f"the owner's signature is in order, serial {granted.serial}")
    if spec is None:
        if as_json:
            print(json.dumps(facts))
        return 0
    try:
        asked = ReleaseSpec.from_text(read_policy(spec).decode(errors="replace").strip())
    except Refusal as refusal:
        raise ConfigError(f"{spec}: {refusal}") from None
    with home.open_ledger() as ledger:
        try:
            BudgetKeeper(home, ledger).check(asked, 1)
        except Refusal as refusal:
            facts |= {"granted": False, "code": refusal.code, "reason": str(refusal)}
            print(json.dumps(facts) if as_json else f"refused, {refusal.code}: {refusal}")
            return 3
    print(json.dumps({**facts, "granted": True}) if as_json else "granted")
    return 0


def open_home(*, create: bool = False) -> DeviceHome:
    """Open the device of this installation; at a terminal, ask for its passphrase where it has one.

    Args:
        create: Make one where there is none; it gets no passphrase, because `up` and `serve` could not ask for it.
    """
    from client.device_home import KEY, DeviceHome
    from common.places import state_home

    ask = None
    if sys.stdin.isatty() and (state_home() / "device" / KEY).exists():
        ask = lambda: typer.prompt("Passphrase of this device", hide_input=True)  # noqa: E731
    return DeviceHome.open(create=create, ask_passphrase=ask, say=lambda text: typer.echo(text, err=True))


def refuse_passphrase(home: DeviceHome) -> None:
    """Return where processes in the background can open the device, too.

    Raises:
        Refusal: It hangs on a passphrase, which only a person at a terminal can give.
    """
    if home.master.source == "passphrase":
        raise Refusal(
            "passphrase",
            "this device has a passphrase, for which nobody can be asked in the background: `up`, `serve` and the page "
            "need a device whose key lies in a keyring, in systemd's credential or in a key file. `chat`, `data`, "
            "`learn`, `export` and the others ask for it at a terminal",
        )


def _facts(entry: Entry) -> dict[str, Any]:
    body = entry.body
    return {"id": entry.index, "time": entry.time, **{name: body[name] for name in sorted(body)}}


def _chosen(releases: list[Entry], wanted: str) -> Entry:
    # a short number may also begin a hash: as a number it is exact, so it comes first
    found = [entry for entry in releases if str(entry.index) == wanted]
    found = found or [entry for entry in releases if entry.body["sha256"].startswith(wanted)]
    if len(found) != 1:
        raise DataError(f"{len(found)} releases of this device answer to that number or digest; name one of them")
    return found[0]


def _show(home: DeviceHome, entry: Entry, out: Path | None, as_json: bool) -> int:
    from client.budget_keeper import sent_bytes

    facts = _facts(entry)
    content = sent_bytes(home, facts["sha256"])
    if out is not None:
        if content is None:
            raise DataError("the bytes of this release are not kept any more; the ledger keeps their digest")
        out.write_bytes(content)
    numbers = _numbers(facts, content)
    if content is not None and _digest(facts, content) != facts["sha256"]:
        raise DataError("the bytes that are kept are not those that the ledger has the digest of")
    if as_json:
        print(json.dumps({**facts, "kept": content is not None, "first_numbers": numbers}))
        return 0
    print(f"release {facts['id']}: run {facts['run']}, round {facts['round']}, {facts['time']}")
    print(f"{facts['bytes']:,} bytes, {facts['dtype']}, under debit {facts['debit']}")
    print(f"sha256 over run, round, spec and bytes: {facts['sha256']}")
    for name, shape in zip(facts["names"], facts["shapes"], strict=True):
        print(f"  {name}  {' x '.join(map(str, shape))}")
    if content is None:
        print("its bytes are not kept any more; the ledger keeps their digest")
    else:
        print(f"  first numbers: {', '.join(f'{number:.6g}' for number in numbers)}")
    return 0


def _numbers(facts: dict[str, Any], content: bytes | None) -> list[float]:
    from common.wire import from_raw_bytes

    if content is None:
        return []
    return [float(number) for number in from_raw_bytes(content, facts["dtype"])[:SHOWN_NUMBERS]]


def _digest(facts: dict[str, Any], content: bytes) -> str:
    from common.wire import receipt_of_bytes

    return receipt_of_bytes(content, facts["spec"], facts["round"], 1, facts["dtype"])


def _with(text: str, changes: list[str]) -> str:
    """Return a policy's TOML with `key=value` lines replaced; values are TOML, or plain words."""
    lines = {line.partition("=")[0].strip(): line for line in text.splitlines() if "=" in line}
    for change in changes:
        key, found, value = (part.strip() for part in change.partition("="))
        if not found or not key.isidentifier():
            raise ConfigError(f"policy set: {key or 'a change'} is not key=value")
        try:
            tomllib.loads(f"{key} = {value}")
        except tomllib.TOMLDecodeError:
            value = json.dumps(value)
        lines[key] = f"{key} = {value}"
    return "\n".join(lines.values()) + "\n"


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: "inf" if isinstance(value, float) and math.isinf(value) else value for name, value in values.items()}
