"""What a device keeps of the federation it joined: whom it trusts there, its key, its model, how things stand.

=====================  =============================================================================================
`fleet.json`           the invite without its token, where the owner's data and the base model are, what was decided
`node.key`             the key that names this device to the coordinator and to Flower; made here, never sent
`standing.json`        what the coordinator said last, what would be refused of it, and the statements it signed
`usage.json`           minutes and megabytes of today
=====================  =============================================================================================
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.device_home import DeviceHome
from client.policy import Usage
from common.errors import DataError, StoreError
from common.files import read_private_file, write_private_file
from common.fleet import Invite, device_id, public_bytes
from common.formats import readable, said

__all__ = ["Membership", "UsageMeter", "on_mains_power"]

FORMAT = 1
FLEET, NODE_KEY, STANDING, USAGE = "fleet.json", "node.key", "standing.json", "usage.json"
_COUNTING = threading.Lock()
"""Training and calls are counted by threads of one process."""

POWER_FOLDER = Path("/sys/class/power_supply")


@dataclass(frozen=True)
class Membership:
    """A federation that this device joined.

    Attributes:
        home: The device's folder.
        invite: What was joined, its token taken out.
        data: A file of the owner's records that an earlier version was told of; None since they are kept sealed here.
        user: Which of the people in it.
        model: Folder of the base model.
        status: pending, approved, paused, left; revoked where the coordinator said so.
    """

    home: DeviceHome
    invite: Invite
    data: Path | None
    user: str | None
    model: Path
    status: str

    @classmethod
    def load(cls, home: DeviceHome) -> Membership:
        """Read what this device joined.

        Raises:
            DataError: It joined nothing.
            StoreError: What it joined is damaged, or of another format.
        """
        values = _read(home.folder / FLEET)
        if values is None:
            raise DataError("this device joined no federation; `homespun device join INVITE` does")
        try:
            data = values["data"]
            return cls(
                home,
                Invite.model_validate(values["invite"]),
                Path(data) if data is not None else None,
                values["user"],
                Path(values["model"]),
                str(values["status"]),
            )
        except (KeyError, ValueError, TypeError):
            raise StoreError(f"{home.folder / FLEET}: damaged; leave, and join again") from None

    def save(self, *, status: str | None = None) -> Membership:
        """Write it, with another status where one is given."""
        status = self.status if status is None else status
        values = {
            "invite": json.loads(self.invite.model_copy(update={"token": "0" * 32}).model_dump_json()),
            "data": str(self.data) if self.data is not None else None,
            "user": self.user,
            "model": str(self.model),
            "status": status,
        }
        _write(self.home.folder / FLEET, values)
        return Membership(self.home, self.invite, self.data, self.user, self.model, status)

    def key(self) -> ec.EllipticCurvePrivateKey:
        """The key that names this device."""
        return node_key(self.home)

    @property
    def device(self) -> str:
        """Name of this device at the coordinator."""
        return device_id(public_bytes(self.key().public_key()))

    def standing(self) -> dict[str, Any]:
        """What the coordinator said last; empty before its first word."""
        return _read(self.home.folder / STANDING) or {}

    def note_standing(self, **changes: Any) -> None:
        """Keep what the coordinator said."""
        self.replace_standing({**self.standing(), **changes})

    def replace_standing(self, values: Mapping[str, Any]) -> None:
        """Keep this, and nothing else, of what the coordinator said."""
        _write(self.home.folder / STANDING, values)


def node_key(home: DeviceHome, *, renew: bool = False) -> ec.EllipticCurvePrivateKey:
    """The device's key in the form that Flower reads; made where there is none, or where a new one is asked for."""
    path = home.folder / NODE_KEY
    if renew or not path.exists():
        key = ec.generate_private_key(ec.SECP384R1())
        pem, openssh = serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH
        write_private_file(path, key.private_bytes(pem, openssh, serialization.NoEncryption()), replace=True)
        return key
    key = serialization.load_ssh_private_key(read_private_file(path), None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise StoreError(f"{path}: not a device's key")
    return key


class UsageMeter:
    """Minutes and megabytes of today, on disk."""

    def __init__(self, folder: Path, *, now: Callable[[], datetime] = datetime.now) -> None:
        """Count in `folder`; `now` is local time."""
        self._path = folder / USAGE
        self._now = now

    def add(self, *, minutes: float = 0.0, megabytes: float = 0.0) -> None:
        """Count."""
        with _COUNTING:
            used = self.today()
            values = {
                "day": self._now().date().isoformat(),
                "minutes": used.minutes_today + minutes,
                "megabytes": used.megabytes_today + megabytes,
                "cut": self.cut(),
            }
            _write(self._path, values)

    def note_cut(self, text: str) -> None:
        """Keep, for the owner to see today, how work was cut to fit."""
        self.add()
        with _COUNTING:
            _write(self._path, {**self._values(), "cut": text})

    def cut(self) -> str:
        """How work was cut to fit today; empty where it was not."""
        values = self._values()
        return str(values.get("cut", "")) if values.get("day") == self._now().date().isoformat() else ""

    def today(self) -> Usage:
        """How the device stands now."""
        values, now = self._values(), self._now()
        same_day = values.get("day") == now.date().isoformat()
        minutes, megabytes = (float(values.get(name, 0.0)) if same_day else 0.0 for name in ("minutes", "megabytes"))
        return Usage(local_time=now, on_mains_power=on_mains_power(), minutes_today=minutes, megabytes_today=megabytes)

    def _values(self) -> dict[str, Any]:
        try:
            return _read(self._path) or {}
        except StoreError:
            return {}  # a count of one day, which a crash may cost


def on_mains_power(folder: Path = POWER_FOLDER) -> bool:
    """Whether the device is plugged in; a machine without a battery always is."""
    batteries, mains = 0, []
    for supply in sorted(folder.glob("*")) if folder.is_dir() else ():
        kind = _word(supply / "type")
        if kind == "Battery" and _word(supply / "scope") != "Device":
            batteries += 1
        elif kind in ("Mains", "USB") and _word(supply / "online"):
            mains.append(_word(supply / "online") == "1")
    return batteries == 0 or any(mains)


def _word(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _read(path: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise StoreError(f"{path}: damaged") from None
    if not isinstance(values, dict):
        raise StoreError(f"{path}: damaged")
    found = values.pop("format", None)
    if not readable(found, FORMAT):
        raise StoreError(f"{path}: {said(found, FORMAT, 'the file')}")
    return values


def _write(path: Path, values: Mapping[str, Any]) -> None:
    write_private_file(path, json.dumps({"format": FORMAT, **values}, sort_keys=True).encode() + b"\n", replace=True)
