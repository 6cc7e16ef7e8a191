"""The folder of one device: whose it is, what it may send, what it sent.

====================  ==============================================================================================
`device.key`          signs the ledger and the policy; sealed under the master key, which lies elsewhere
`policy.toml`, .sig   what the owner grants
`ledger.jsonl`        what was reserved, debited and released, in the name of one random subject
`ledger.head`         the last entry of that ledger that this device knows of
`sent.sqlite`         the bytes that left, sealed, for the owner to look at
`kept.sqlite`         what methods keep here from round to round, sealed, and never send
`records.sqlite`      the owner's records, sealed, each under a key of its own
`levels.sqlite`       the profile, and which levels are off, sealed
`adapters.sqlite`     the private adapter and the newest global one, sealed
`restored.json`       only after `restore`: nothing leaves until a coordinator has said what was released since the copy
====================  ==============================================================================================

The subject and its ledger are made once and never begun anew: with a device key but without its ledger, or with one
that does not hold `ledger.head`, nothing opens, because what was spent would be forgotten. Whoever puts an old copy of
the whole folder back by hand is not found by this; heads that servers keep find it, and `restore` takes care of it.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from client.adapter_store import AdapterStore
from client.policy import Policy
from common.errors import DataError, Refusal, StoreError
from common.files import make_private_folder, read_private_file, write_private_file
from common.keys import MasterKey, SigningKey
from common.ledger import Head, Ledger, Verified, verify
from common.places import state_home

__all__ = ["DeviceHome"]

KEY, POLICY, LEDGER, HEAD = "device.key", "policy.toml", "ledger.jsonl", "ledger.head"
SENT, KEPT = "sent.sqlite", "kept.sqlite"

RESTORED = "restored.json"
"""There while this device was put back from a copy and no coordinator has said yet what was released since."""

KEPT_RELEASES = 64
"""Releases whose bytes are kept for the owner; of older ones the ledger keeps name, shape, size and digest."""

SECONDS_TO_WAIT = 5.0
"""How long another process may hold the store of what was sent, which it does for the time of one release."""


@dataclass(frozen=True)
class DeviceHome:
    """An opened device folder; what it holds is read when it is asked for.

    Attributes:
        folder: Where it lies.
        master: Opens everything that is sealed.
        key: Signs for this device and its owner.
    """

    folder: Path
    master: MasterKey
    key: SigningKey

    @classmethod
    def open(
        cls,
        folder: Path | None = None,
        *,
        create: bool = False,
        ask_passphrase: Callable[[], str] | None = None,
        say: Callable[[str], None] = lambda text: None,  # noqa: ARG005
    ) -> DeviceHome:
        """Open the device of this installation.

        Args:
            folder: Where it lies; `device` in the folder of what must survive when absent.
            create: Make one where there is none.
            ask_passphrase: Asks the owner.
            say: Is told where the master key lies, and what losing it costs, when a device is made.

        Raises:
            DataError: There is none, and none was asked for.
            StoreError: The master key is not the one it was made with, or the ledger is gone.
        """
        folder = state_home() / "device" if folder is None else folder
        if not (folder / KEY).exists():
            if not create:
                raise DataError(
                    f"{folder}: no device here yet; `homespun device up`, `data add PATH` or `join INVITE` makes one"
                )
            make_private_folder(folder)
        master = MasterKey.open(folder, ask_passphrase=ask_passphrase)
        sealing_key = master.subkey("device-key")
        if not (folder / KEY).exists():
            if (folder / LEDGER).exists():
                # The ledger is made before its key is saved, so a crash in between leaves one that holds nothing.
                if len(verify((folder / LEDGER).read_bytes()).entries) > 1:
                    raise StoreError(f"{folder / KEY}: the device's key is gone; what was spent stays spent")
                (folder / LEDGER).unlink()
            key = SigningKey.generate()
            Ledger.create(folder / LEDGER, key, {"role": "device", "subject": secrets.token_hex(16)}).close()
            key.save(folder / KEY, sealing_key=sealing_key)
            say(master.notice)
        return cls(folder, master, SigningKey.load(folder / KEY, sealing_key=sealing_key))

    def open_ledger(self, *, clock: Callable[[], float] = time.time) -> Ledger:
        """Open the ledger for writing; one process at a time.

        Raises:
            StoreError: It is gone; a new one would forget what was spent.
            VerificationError: It does not check out, or entries that this device knows of are missing.
            Refusal: The vault is running, or another command is.
        """
        path = self.folder / LEDGER
        if not path.exists():
            raise StoreError(f"{path}: the ledger is gone; put it back, because what was spent stays spent")
        ledger = Ledger.open(path, self.key, known_heads=self._known_heads(), clock=clock)
        self.keep_head(ledger.head)
        return ledger

    def read_ledger(self) -> Verified:
        """Read the ledger beside a vault that is running; an entry that is being written is not there yet.

        Raises:
            StoreError, VerificationError: As for `open_ledger`.
        """
        path = self.folder / LEDGER
        heads = self._known_heads()  # before the ledger, which may grow in between
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise StoreError(f"{path}: the ledger is gone; put it back, because what was spent stays spent") from None
        return verify(content[: content.rfind(b"\n") + 1], known_heads=heads)

    def keep_head(self, head: Head) -> None:
        """Note how far the ledger got, in a file of its own: an old copy of the ledger alone is found by it."""
        content = json.dumps(head.to_json(), sort_keys=True).encode() + b"\n"
        write_private_file(self.folder / HEAD, content, replace=True)

    def policy(self, *, least_serial: int = 1) -> Policy:
        """Read what the owner grants; on a new device, and only there, the default is signed.

        Raises:
            Refusal: The file is not signed, was changed, or is older than `least_serial`.
        """
        path = self.folder / POLICY
        if not path.exists() and len(self.read_ledger().entries) == 1:
            Policy.model_validate({}).save(path, self.key)
        return Policy.load(path, self.key.verify_key, least_serial=least_serial)

    def grant(self, policy: Policy) -> Policy:
        """Sign `policy` and put it in force, with the next serial number; what is in force already is left alone."""
        try:
            current = self.policy()
        except Refusal:
            serial = policy.serial
        else:
            if policy.model_copy(update={"serial": current.serial}) == current:
                return current
            serial = max(policy.serial, current.serial + 1)
        granted = policy.model_copy(update={"serial": serial})
        granted.save(self.folder / POLICY, self.key)
        return granted

    def open_sent(self) -> AdapterStore:
        """Open the store of what was sent, for a moment.

        Raises:
            Refusal: Another process keeps it open.
        """
        return self._open_store(SENT, self.master.subkey("sent releases"), KEPT_RELEASES)

    def open_kept(self) -> AdapterStore:
        """Open the store of what methods keep from round to round, for a moment.

        Raises:
            Refusal: Another process keeps it open.
        """
        return self._open_store(KEPT, self.master.subkey("kept between rounds"), 2)

    def open_store(self, name: str, label: str, *, versions: int = 1) -> AdapterStore:
        """Open a sealed store of this device for a moment, under the subkey `label`; waits while another has it.

        Raises:
            Refusal: Another process keeps it open.
        """
        return self._open_store(name, self.master.subkey(label), versions)

    def _open_store(self, name: str, key: bytes, versions: int) -> AdapterStore:
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while True:
            try:
                return AdapterStore(self.folder / name, key, keep_versions=versions)
            except Refusal:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    def _known_heads(self) -> list[Head]:
        path = self.folder / HEAD
        if not path.exists():
            return []
        try:
            return [Head.from_json(json.loads(read_private_file(path)))]
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{path}: damaged; it must name the last entry of the ledger beside it") from None
