"""A copy of a whole device under a passphrase, and the device put back from it, without a budget that is new again.

The copy holds everything that `DeviceHome` holds, the master key too, so that it opens on another machine. It is one
sealed file: AES-GCM under scrypt of the passphrase.

What was released after the copy was made is not in it, and is spent all the same:

- where the device that it is a copy of is still here, its ledger stays as it is; only the rest is put back;
- where it is not, nothing leaves until the coordinator has said which rounds of which runs were debited, signed by its
  ledger; all of them that the owner's policy grants are then debited here, whether this device took part or not.

What no coordinator tells, because the copy does not know the federation that it was released to, nobody finds.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import shutil
import tarfile
import unicodedata
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.device_home import HEAD, KEY, LEDGER, POLICY, RESTORED, SENT, DeviceHome
from client.membership import FLEET, NODE_KEY, STANDING
from client.policy import SIGNATURE_SUFFIX
from common.errors import ConfigError, DataError, HomespunError, Refusal, StoreError
from common.files import make_private_folder, sync_folder, take_lock, write_private_file
from common.keys import MASTER_KEY_RECORD, MasterKey, open_sealed, seal
from common.ledger import Verified, verify
from common.source import installed_version
from common.wire import ReleaseSpec

__all__ = ["Copied", "read_backup", "restore", "settle_restored", "write_backup"]

HEADER = b"homespun-device-backup-1\n"
SALT_BYTES = 16
SMALLEST_PASSPHRASE = 8
SCRYPT_COST = 2**17  # OWASP's first choice, as for a master key

MANIFEST, SECRET = "manifest.json", "master.key"
LEFT_OUT = ("agent.json", "authority.pem")
LEFT_OUT_FOLDERS = ("logs", "flower", "outbox")
"""What is made again, and what Flower keeps; an answer that was not fetched is trained again under its debit."""

NEWER_HERE = (
    *(KEY, LEDGER, HEAD, MASTER_KEY_RECORD, POLICY, POLICY + SIGNATURE_SUFFIX),
    *(SENT, f"{SENT}-wal", FLEET, NODE_KEY, STANDING),
)
"""Whose device it is, what it spent and sent, what its owner granted last and what it is part of: not the copy's, where
the device itself is still here."""

GOES_WITH = (POLICY + SIGNATURE_SUFFIX, f"{SENT}-wal")
"""Parts of one of these: where there is none here, the copy's is of something else."""


@dataclass(frozen=True)
class Copied:
    """An opened copy: its files by their paths in the device's folder, its master key, and its ledger."""

    files: dict[str, bytes]
    secret: bytes
    ledger: Verified
    made: str


def write_backup(home: DeviceHome, path: Path, passphrase: str, *, time: str) -> int:
    """Seal a copy of the device into `path`, and return how many files it holds.

    Raises:
        Refusal: The vault or another command has something open; `homespun device down` first.
        DataError: `path` exists.
    """
    salt = secrets.token_bytes(SALT_BYTES)
    key = _stretch(passphrase, salt)
    if path.exists():
        raise DataError(f"{path}: exists already; name another file")
    with ExitStack() as stack:
        stack.enter_context(home.open_ledger())
        for store in sorted(home.folder.rglob("*.sqlite")):
            stack.callback(os.close, take_lock(store, "store-locked"))
        files = {name: file.read_bytes() for name, file in _copied(home.folder)}
    manifest = {"format": 1, "made": time, "version": installed_version(), "files": sorted(files)}
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, data in {MANIFEST: json.dumps(manifest).encode(), SECRET: home.master.secret, **files}.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(data), 0o600
            archive.addfile(member, io.BytesIO(data))
    write_private_file(path, HEADER + salt + seal(key, content.getvalue(), HEADER + salt))
    return len(files)


def read_backup(path: Path, passphrase: str) -> Copied:
    """Open a copy.

    Raises:
        DataError: It is none.
        StoreError: The passphrase is another one, or the file was changed.
        VerificationError: Its ledger does not check out.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if not content.startswith(HEADER):
        raise DataError(f"{path}: not a copy of a device")
    salt = content[len(HEADER) : len(HEADER) + SALT_BYTES]
    try:
        plain = open_sealed(_stretch(passphrase, salt), content[len(HEADER) + SALT_BYTES :], HEADER + salt)
    except StoreError:
        raise StoreError(f"{path}: another passphrase, or the file was changed") from None
    files: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:gz") as archive:
            for member in archive:
                stream = archive.extractfile(member)
                if stream is None or member.name.startswith("/") or ".." in Path(member.name).parts:
                    raise ValueError
                files[member.name] = stream.read()
        manifest: dict[str, Any] = json.loads(files.pop(MANIFEST))
        secret, made = files.pop(SECRET), str(manifest["made"])
        ledger = files[LEDGER]
        if manifest["format"] != 1 or set(manifest["files"]) != set(files):
            raise ValueError
    except (tarfile.TarError, ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not a copy that this version reads") from None
    return Copied(files, secret, verify(ledger), made)


def restore(folder: Path, copied: Copied) -> str:
    """Put a device back, and say in one sentence what became of its budget.

    Guarantee: no entry of a ledger that is here is lost, and where none is here that holds everything the copy's does,
        nothing leaves until `settle_restored` has been told what was released since.

    Raises:
        Refusal: Another device is here, or the two ledgers contradict each other; or the device is up.
        StoreError: Something here is damaged in a way that would hide what was spent.
    """
    here = _here(folder)
    keep_ledger = False
    if here is not None:
        if here.header["subject"] != copied.ledger.header["subject"]:
            raise Refusal("other-device", "another device is here; its budget is not this copy's. Move its folder away")
        keep_ledger = _extends(here, copied.ledger)
        if not keep_ledger and not _extends(copied.ledger, here):
            raise Refusal("other-history", "the ledger here and the copy's contradict each other; one device ran twice")
    make_private_folder(folder.parent)
    new = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.new")
    new.mkdir(mode=0o700)
    try:
        for name, content in copied.files.items():
            place = new / name
            place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_private_file(place, content)
        with ExitStack() as stack:
            if here is not None:
                for lock in (folder / LEDGER, *sorted(folder.rglob("*.sqlite"))):
                    stack.callback(os.close, take_lock(lock, "store-locked"))
            if keep_ledger:
                for name in NEWER_HERE:
                    if (folder / name).exists():
                        write_private_file(new / name, (folder / name).read_bytes(), replace=True)
                    elif name in GOES_WITH:  # of the copy's, it would be applied to what is from here
                        (new / name).unlink(missing_ok=True)
            waits = not keep_ledger or (folder / RESTORED).exists()
            if waits:
                head = copied.ledger.entries[-1].head.to_json()
                writers = {*_writers(folder), *(() if keep_ledger else _writer_of(copied))}
                marker = {"format": 1, "made": copied.made, "head": head, "writers": sorted(writers)}
                write_private_file(new / RESTORED, json.dumps(marker).encode())
            _give_key(new, copied)
            _exchange(folder, new)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if waits:
        return (
            "what was released after the copy was made is not in it and is spent all the same: nothing leaves until "
            "the coordinator has said which rounds it debited. All of them count here, also those that this device was "
            "not in or that were over before it joined; `homespun device budget refill` can raise the limit"
        )
    return "the ledger that was here stays, with everything that was spent"


def settle_restored(home: DeviceHome, runs: Sequence[tuple[ReleaseSpec, int]], *, writer: str) -> int:
    """Take as spent what a coordinator says was debited, where this device was put back from a copy.

    The waiting ends when the coordinator that the copy knows has answered; another federation's, which the device
    joined since, knows nothing of what was released to that one.

    Args:
        home: The device.
        runs: Specs, and how many rounds of each the coordinator's ledger has debited, signed by it; all of its runs.
        writer: Key of that coordinator's ledgers, hex.

    Returns:
        Rounds that were debited here.

    Raises:
        Refusal: The ledger is open elsewhere; it is tried again at the next call.
    """
    from client.budget_keeper import BudgetKeeper

    if not (home.folder / RESTORED).exists():
        return 0
    with home.open_ledger() as ledger:
        keeper = BudgetKeeper(home, ledger)
        count = sum(keeper.take_as_spent(spec, rounds) for spec, rounds in runs)
    others = [one for one in _writers(home.folder) if one != writer]
    if others:
        marker = {**json.loads((home.folder / RESTORED).read_bytes()), "writers": others}
        write_private_file(home.folder / RESTORED, json.dumps(marker).encode(), replace=True)
    else:
        (home.folder / RESTORED).unlink()
        sync_folder(home.folder)
    return count


def _writer_of(copied: Copied) -> tuple[str, ...]:
    """Whose ledgers tell of the federation that the copy is part of; empty where it is part of none."""
    try:
        return (str(json.loads(copied.files[FLEET])["invite"]["writer"]),)
    except (KeyError, ValueError, TypeError):
        return ()


def _writers(folder: Path) -> list[str]:
    """Whose answers are waited for here."""
    try:
        return [str(one) for one in json.loads((folder / RESTORED).read_bytes()).get("writers", [])]
    except (OSError, ValueError, AttributeError):
        return []


def _here(folder: Path) -> Verified | None:
    """The ledger that is here; None where no device is."""
    if not (folder / KEY).exists() and not (folder / LEDGER).exists():
        return None
    try:
        return verify((folder / LEDGER).read_bytes())
    except (OSError, HomespunError):
        raise StoreError(
            f"{folder}: a device is here whose ledger cannot be read; move the folder away to put the copy in its place"
        ) from None


def _extends(longer: Verified, shorter: Verified) -> bool:
    """Whether `longer` holds everything that `shorter` does."""
    last = shorter.entries[-1]
    return len(longer.entries) > last.index and longer.entries[last.index].hash == last.hash


def _give_key(new: Path, copied: Copied) -> None:
    """Let the master key be found where the record says; on another machine, put it into a key file of its own."""
    with suppress(HomespunError):
        if MasterKey.open(new).secret == copied.secret:
            return
    record: dict[str, str] = json.loads((new / MASTER_KEY_RECORD).read_bytes())
    if record["source"] == "passphrase":
        return  # the owner knows it
    record["source"] = "key-file"
    write_private_file(new / MASTER_KEY_RECORD, json.dumps(record, indent=1, sort_keys=True).encode(), replace=True)
    MasterKey.put_back(new, copied.secret)


def _exchange(folder: Path, new: Path) -> None:
    old = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    sync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _copied(folder: Path) -> list[tuple[str, Path]]:
    found: list[tuple[str, Path]] = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        skipped = path.suffix in (".lock", ".new") or name.parts[0] in LEFT_OUT_FOLDERS or str(name) in LEFT_OUT
        if path.is_file() and not path.is_symlink() and not skipped and name.name != RESTORED:
            found.append((name.as_posix(), path))
    return found


def _stretch(passphrase: str, salt: bytes) -> bytes:
    text = unicodedata.normalize("NFC", passphrase).encode()
    if len(text) < SMALLEST_PASSPHRASE:
        raise ConfigError(f"passphrase: at least {SMALLEST_PASSPHRASE} characters")
    return hashlib.scrypt(text, salt=salt, n=SCRYPT_COST, r=8, p=1, maxmem=2 * 128 * 8 * SCRYPT_COST, dklen=32)
