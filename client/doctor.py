"""Whether this machine can do what is asked of it: every check says what it found, and what to do where it fails.

Nothing is changed, and nothing is sent but one request for the time to a coordinator that was joined.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import ssl
import stat
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from client.device_home import KEY, LEDGER, DeviceHome
from client.membership import Membership
from common.errors import DataError, HomespunError
from common.model_files import base_folder, model_digest
from common.places import cache_home, runtime_home, state_home

__all__ = ["Check", "checks", "declared", "served_time", "support_files", "within"]

State = Literal["ok", "warning", "failed", "skipped"]

MEMORY_MEGABYTES = 900
"""Resident memory of all processes with the built-in model loaded, at most."""
DISK_MEGABYTES, DISK_LOW = 200, 1000
SKEW_SECONDS, SKEW_LOW = 300.0, 60.0
"""Flower refuses messages of a clock that is further off than the first."""
EXPIRY_DAYS = 30
SECONDS = 5.0
MEGABYTE = 1e6


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: What.
        state: ok, warning, failed, or skipped where there is nothing to look at.
        said: What was found.
        remedy: What to do about it; empty where nothing is to be done.
    """

    name: str
    state: State
    said: str
    remedy: str = ""


def checks(
    *,
    offline: bool = False,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ask_passphrase: Callable[[], str] | None = None,
) -> list[Check]:
    """Look at everything; a check that breaks is one that fails.

    Args:
        offline: Ask no coordinator for the time.
        now: The clock.
        ask_passphrase: Asks the owner, where the device has a passphrase.
    """
    folder = state_home() / "device"
    home, opened = _home(folder, ask_passphrase)
    joined = _joined(home)
    found = [
        *_versions(),
        _memory(),
        _disk(),
        opened,
        *_ledger(home),
        _sockets(folder),
        _isolation(joined),
        _base(home, joined),
        *_authority(joined, now()),
        *_server_certificates(now()),
        *_server_port(),
    ]
    if offline or joined is None:
        found.append(Check("clock", "skipped", "no coordinator was asked for the time"))
    else:
        found += _coordinator(joined, now)
    return found


def declared() -> dict[str, tuple[str, bool]]:
    """Packages and the ranges that were tested, and whether one is in every installation or in some extra only."""
    project = Path(__file__).resolve().parent.parent / "pyproject.toml"
    lines: list[tuple[str, bool]] = []
    if project.is_file():
        values = tomllib.loads(project.read_text(encoding="utf-8"))["project"]
        lines = [(line, True) for line in values["dependencies"]]
        lines += [(line, False) for extra in values["optional-dependencies"].values() for line in extra]
    else:
        for line in metadata.requires("homespun") or ():
            wanted, _, marker = line.partition(";")
            lines.append((wanted, "extra" not in marker))
    found: dict[str, tuple[str, bool]] = {}
    for line, always in lines:
        match = re.fullmatch(r"\s*([A-Za-z0-9._-]+)\s*([<>=!~].*?)\s*", line)
        if match is not None:
            found.setdefault(match[1], (match[2], always))
    return found


def within(version: str, wanted: str) -> bool:
    """Whether `version` is in a range such as `>=1.2,<2`."""
    have = _numbers(version)
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(>=|<=|==|<|>|~=)\s*([0-9][0-9A-Za-z.+-]*)\s*", part)
        if match is None:
            return False
        limit = _numbers(match[2])
        good = {
            ">=": have >= limit,
            "<=": have <= limit,
            "==": have[: len(limit)] == limit,
            "<": have < limit,
            ">": have > limit,
            "~=": have >= limit and have[: len(limit) - 1] == limit[:-1],
        }
        if not good[match[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("+")[0]))


def _versions() -> Iterator[Check]:
    own = sys.version_info[:3]
    state: State = "ok" if own >= (3, 11) else "failed"
    yield Check("python", state, ".".join(map(str, own)), "" if state == "ok" else "install Python 3.11 or newer")
    for name, (wanted, always) in sorted(declared().items()):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if always:
                yield Check(name, "failed", "not installed", f"pip install '{name}{wanted}'")
            continue
        if within(version, wanted):
            yield Check(name, "ok", version)
        else:
            yield Check(name, "failed", f"{version}, tested with {wanted}", f"pip install '{name}{wanted}'")


def _memory() -> Check:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return Check("memory", "skipped", "this platform does not say")
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    free = int(found[1]) / 1000 if found else 0.0
    said = f"{free:,.0f} MB free; the device takes {MEMORY_MEGABYTES} MB with the built-in model loaded"
    if free < MEMORY_MEGABYTES:
        return Check("memory", "failed", said, "end other programs, or use a smaller model")
    return Check("memory", "ok", said)


def _disk() -> Check:
    worst, least = state_home(), float("inf")
    for place in (state_home(), cache_home()):
        there = next((one for one in (place, *place.parents) if one.exists()), Path("/"))
        free = shutil.disk_usage(there).free / MEGABYTE
        if free < least:
            worst, least = place, free
    said = f"{least:,.0f} MB free for {worst}"
    if least < DISK_MEGABYTES:
        return Check("disk", "failed", said, "make room, or move it with HOMESPUN_HOME")
    return Check("disk", "warning" if least < DISK_LOW else "ok", said)


def _home(folder: Path, ask_passphrase: Callable[[], str] | None) -> tuple[DeviceHome | None, Check]:
    if not (folder / KEY).exists() and not (folder / LEDGER).exists():
        return None, Check("key store", "skipped", "no device here yet; `homespun device data add` or `join` makes one")
    try:
        home = DeviceHome.open(folder, ask_passphrase=ask_passphrase)
    except HomespunError as error:
        return None, Check("key store", "failed", str(error), _KEY_REMEDY)
    mode = stat.S_IMODE(folder.stat().st_mode)
    if os.name == "posix" and mode & 0o077:
        return home, Check("key store", "failed", f"{folder} can be read by others", f"chmod 700 {folder}")
    state: State = "warning" if home.master.source == "key-file" else "ok"
    remedy = "a keyring, or systemd's credential, keeps the key apart from the files" if state == "warning" else ""
    return home, Check("key store", state, f"master key from {home.master.source} ({home.master.place})", remedy)


_KEY_REMEDY = (
    "bring back the key or keyring that the device was made with, or `homespun device restore` a copy; a passphrase is "
    "asked at a terminal"
)


def _joined(home: DeviceHome | None) -> Membership | None:
    if home is None:
        return None
    try:
        joined = Membership.load(home)
    except HomespunError:
        return None
    return None if joined.status == "left" else joined


def _ledger(home: DeviceHome | None) -> Iterator[Check]:
    if home is None:
        return
    try:
        count = len(home.read_ledger().entries)
        yield Check("ledger", "ok", f"{count} entries check out")
    except HomespunError as error:
        yield Check("ledger", "failed", str(error), "put the ledger back from a copy; what was spent stays spent")
        return
    try:
        yield Check("policy", "ok", f"signed, serial {home.policy().serial}")
    except HomespunError as error:
        yield Check("policy", "failed", str(error), "`homespun device policy set` signs one; nothing leaves until then")


def _sockets(folder: Path) -> Check:
    from client.agent import socket_path

    if not hasattr(socket, "AF_UNIX"):
        return Check("sockets", "skipped", "this platform has no Unix sockets")
    path = socket_path(folder, runtime_home())
    if not path.exists():
        return Check("sockets", "skipped", "the vault is down, so its socket is not there")
    for place in (path, path.parent):
        if stat.S_IMODE(place.stat().st_mode) & 0o007 or place.stat().st_uid != os.getuid():
            remedy = f"`homespun device down`, chmod o= {place}, `homespun device up`"
            return Check("sockets", "failed", f"{place} can be reached by other users", remedy)
    return Check("sockets", "ok", f"{path} is its owner's")


def _isolation(joined: Membership | None) -> Check:
    if joined is None:
        return Check("isolation", "skipped", "no bundle of a coordinator runs here")
    return Check(
        "isolation",
        "warning",
        "the coordinator's bundle runs as the same OS user as the vault",
        "run the SuperNode as another user (docs/devices.md)",
    )


def _base(home: DeviceHome | None, joined: Membership | None) -> Check:
    if home is None or joined is None:
        folder = base_folder("built-in")
        return Check("base model", "ok", f"built-in, {model_digest(folder)[:16]}")
    wanted = joined.invite.base.digest
    if not joined.model.is_dir():
        return Check("base model", "warning", f"{wanted[:16]} is not here yet", "`homespun device up` fetches it")
    found = model_digest(joined.model)
    if found != wanted:
        said = f"{joined.model} is {found[:16]}, the invite names {wanted[:16]}"
        return Check("base model", "failed", said, "delete that folder; `homespun device up` fetches the right one")
    return Check("base model", "ok", f"{wanted[:16]}, as the invite names it")


def _authority(joined: Membership | None, now: datetime) -> Iterator[Check]:
    if joined is not None:
        yield _certificate("authority", joined.invite.authority.encode(), now, "ask the operator for another invite")


def _server_certificates(now: datetime) -> Iterator[Check]:
    for name, remedy in (("leaf", "`homespun server renew`"), ("ca", "devices have to join anew; plan for it")):
        path = state_home() / "server" / "tls" / f"{name}.pem"
        if path.is_file():
            yield _certificate(f"coordinator's {name}", path.read_bytes(), now, remedy)


def _certificate(name: str, content: bytes, now: datetime, remedy: str) -> Check:
    from cryptography import x509

    try:
        left = (x509.load_pem_x509_certificate(content).not_valid_after_utc - now).days
    except ValueError:
        return Check(name, "failed", "not a certificate", remedy)
    if left < 0:
        return Check(name, "failed", f"expired {-left} days ago", remedy)
    if left < EXPIRY_DAYS:
        return Check(name, "warning", f"good for {left} days", remedy)
    return Check(name, "ok", f"good for {left} days")


def _server_port() -> Iterator[Check]:
    """Whether the coordinator of this machine listens, or could."""
    import json

    path = state_home() / "server" / "settings.json"
    try:
        host, _, port = str(json.loads(path.read_text(encoding="utf-8"))["listen"]).rpartition(":")
        number = int(port)
    except (OSError, ValueError, KeyError, TypeError):
        return
    running = (state_home() / "server" / "coordinator.json").exists()
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, number))
            taken = False
        except OSError:
            taken = True
    if taken and not running:
        yield Check(
            "port", "failed", f"another program has {host}:{number}", "end it, or `homespun server up --listen`"
        )
    elif running and not taken:
        yield Check("port", "failed", f"nothing listens on {host}:{number}", "`homespun server up`")
    else:
        yield Check("port", "ok", f"{host}:{number} is {'answered' if taken else 'free'}")


def _coordinator(joined: Membership, now: Callable[[], datetime]) -> Iterator[Check]:
    address = joined.invite.address
    try:
        served = served_time(address, joined.invite.authority)
    except ssl.SSLError:
        remedy = "the address leads to somebody else, or the coordinator has a new authority: ask the operator"
        yield Check("coordinator", "failed", f"{address} shows a certificate of another authority", remedy)
        yield Check("clock", "skipped", "no coordinator told the time")
        return
    except OSError:
        remedy = "look at the network, or ask the operator whether it is up"
        yield Check("coordinator", "failed", f"{address} does not answer", remedy)
        yield Check("clock", "skipped", "no coordinator told the time")
        return
    except DataError as error:
        yield Check(
            "coordinator", "warning", f"{address} answers, but {error}", "compare `homespun version` on both sides"
        )
        yield Check("clock", "skipped", "no coordinator told the time")
        return
    yield Check("coordinator", "ok", f"{address} answers under the authority of the invite")
    skew = (now() - served).total_seconds()
    said = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the coordinator"
    if abs(skew) > SKEW_SECONDS:
        yield Check("clock", "failed", f"{said}; more than {SKEW_SECONDS:.0f} s is refused", "set the clock, as by NTP")
    elif abs(skew) > SKEW_LOW:
        yield Check("clock", "warning", said, "set the clock, as by NTP")
    else:
        yield Check("clock", "ok", said)


def served_time(address: str, authority: str) -> datetime:
    """Ask a coordinator for the time, by the date that every answer carries.

    Raises:
        ssl.SSLError: It is not under `authority`.
        OSError: It does not answer.
        DataError: It answers without a date.
    """
    import http.client

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_verify_locations(cadata=authority)
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPSConnection(host, int(port), timeout=SECONDS, context=context)
    try:
        connection.request("GET", "/health")
        date = connection.getresponse().getheader("date")
    except http.client.HTTPException:
        raise DataError("with nonsense") from None
    finally:
        connection.close()
    try:
        return parsedate_to_datetime(date or "")
    except (ValueError, TypeError):
        raise DataError("does not say what time it is") from None


def support_files(found: list[Check]) -> dict[str, Any]:
    """What may be shown to a stranger: versions, states, counts and codes; no text of the owner's, no key, no path."""
    folder = state_home() / "device"
    facts: dict[str, Any] = {
        "checks": [{"name": one.name, "state": one.state, "said": _plain(one)} for one in found],
        "platform": {"system": sys.platform, "machine": os.uname().machine, "release": os.uname().release},
    }
    sizes = {name: (folder / name).stat().st_size for name in _SHOWN_FILES if (folder / name).is_file()}
    facts["files"] = {"sizes": sizes, "all": sum(path.is_file() for path in folder.rglob("*"))}
    try:
        home = DeviceHome.open(folder)
        entries = home.read_ledger().entries
        facts["ledger"] = dict(Counter(one.kind for one in entries))
        policy = home.policy().model_dump(mode="json")
        facts["policy"] = {key: value for key, value in policy.items() if isinstance(value, bool | int | float)}
    except HomespunError as error:
        facts["device"] = type(error).__name__
    return facts


_SHOWN_FILES = (
    *("adapters.sqlite", "feedback.sqlite", "kept.sqlite", "ledger.jsonl", "levels.sqlite", "policy.toml"),
    *("records.sqlite", "refusals.json", "sent.sqlite", "standing.json", "usage.json"),
)
_SHOWN_WHOLE = ("memory", "clock", "ledger", "isolation", "python")
"""Checks whose words hold numbers of ours alone; of others a support file says the state, of a package the version."""


def _plain(one: Check) -> str:
    if one.name in _SHOWN_WHOLE and one.state != "failed":
        return one.said
    version = re.match(r"\d+(\.\d+)+\S*", one.said)
    return version[0].rstrip(",") if version is not None and one.name in declared() else ""
