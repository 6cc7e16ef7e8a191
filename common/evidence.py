"""Evidence that one side hands to an auditor: one zip, and the same read from a folder or a bare ledger.

What goes in is a closed list of small files: the ledger, heads that others signed, what configured the run, digests,
receipts and public keys. No tensor and nothing that a user wrote has a name here. `manifest.json` holds a digest of
each file and is signed with the key that signs the ledger, so a file cannot be changed, added or taken out on its way.

A zip is read as if its sender were hostile: names off the list, files beyond their size and anything that the manifest
does not name are refused before a byte of them is used, and so are bytes of the zip that belong to none of its files.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from common.canonical import canonical, canonical_digest
from common.errors import DataError, VerificationError
from common.files import write_private_file
from common.keys import SigningKey, VerifyKey

__all__ = ["Evidence", "checkpoint_facts", "commitment", "in_reading_order", "read_evidence", "write_evidence"]

FORMAT = "homespun-evidence-1"
MANIFEST, LEDGER, HEADS, RECEIPTS, CHECKPOINT = (
    "manifest.json",
    "ledger.jsonl",
    "heads.jsonl",
    "receipts.jsonl",
    "checkpoint.json",
)
WEIGHTS = "checkpoint.safetensors"

MEGABYTE = 1 << 20
LARGEST: dict[str, int] = {
    MANIFEST: MEGABYTE,
    LEDGER: 512 * MEGABYTE,
    HEADS: 64 * MEGABYTE,
    RECEIPTS: 512 * MEGABYTE,
    CHECKPOINT: MEGABYTE,
    "config.toml": MEGABYTE,
    "spec.json": 2 * MEGABYTE,
    "rounds.jsonl": 64 * MEGABYTE,
    "statement.json": MEGABYTE,
    "witnesses.jsonl": 512 * MEGABYTE,
    "counts.jsonl": 64 * MEGABYTE,
    "attacks.json": 16 * MEGABYTE,
    "policy.toml": MEGABYTE,
    "policy.toml.sig": MEGABYTE,
}
"""The closed list: what evidence may hold, and how many bytes of it are read."""

LARGEST_HEADER = 1 << 24
DATE = (1980, 1, 1, 0, 0, 0)
"""Of every file in a zip: the same evidence is the same bytes; when it was made is in the manifest."""

OWNER_ALONE = 0o600 << 16
"""Permissions of every file in a zip, as zip has them."""


@dataclass(frozen=True)
class Evidence:
    """What one side shows.

    Attributes:
        name: What the caller calls it.
        files: Contents by name.
        manifest: What the side signed about them; None where a folder or a bare ledger was read.
    """

    name: str
    files: Mapping[str, bytes]
    manifest: Mapping[str, Any] | None = field(default=None)

    @property
    def ledger(self) -> bytes:
        """The ledger's bytes; empty where there is none."""
        return self.files.get(LEDGER, b"")

    @property
    def is_bare(self) -> bool:
        """Whether there is a ledger and nothing beside it."""
        return set(self.files) == {LEDGER}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read a file of JSON objects, one per line; empty where it is missing.

        Raises:
            VerificationError: It is something else.
        """
        try:
            rows: list[Any] = [json.loads(line) for line in self.files.get(name, b"").splitlines() if line.strip()]
        except (ValueError, RecursionError):
            raise VerificationError(f"{self.name}: {name} is not one JSON object per line") from None
        if not all(isinstance(row, dict) for row in rows):
            raise VerificationError(f"{self.name}: {name} is not one JSON object per line")
        return cast(list[dict[str, Any]], rows)


def write_evidence(
    path: Path, files: Mapping[str, bytes], *, role: str, head: Mapping[str, Any], key: SigningKey, time: str
) -> dict[str, Any]:
    """Write one zip of `files` with a signed manifest, whole or not at all, and return the manifest.

    Args:
        path: The zip; what is there is replaced.
        files: Contents by name, all from the closed list; the ledger among them.
        role: Who shows it: `server`, `study` or `device`.
        head: The ledger's signed head.
        key: The side's key; the one that signs its ledger.
        time: When, `2026-01-31T23:59:59Z`.

    Raises:
        ValueError: A name is off the list, or there is no ledger.
    """
    if LEDGER not in files or not files.keys() <= LARGEST.keys() - {MANIFEST}:
        raise ValueError("evidence is a ledger and files of the closed list")
    unsigned: dict[str, Any] = {
        "format": FORMAT,
        "role": role,
        "made": time,
        "ledger": head["ledger"],
        "head": dict(head),
        "public_key": key.verify_key.hex,
        "files": {name: hashlib.sha256(content).hexdigest() for name, content in sorted(files.items())},
    }
    manifest = unsigned | {"signature": key.sign(_message(unsigned)).hex()}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in ((MANIFEST, canonical(manifest) + b"\n"), *sorted(files.items())):
            archive.writestr(zipfile.ZipInfo(name, DATE), data, zipfile.ZIP_DEFLATED)
    # The owner's alone: receipts and a device's ledger are as private as whoever holds them treats them.
    write_private_file(path, content.getvalue(), replace=True)
    return manifest


def read_evidence(path: Path) -> Evidence:
    """Read evidence from a zip, a run's folder, a device's folder, or a bare ledger.

    Raises:
        DataError: There is none.
        VerificationError: A zip is not what its manifest says, or not signed by who it says.
    """
    if path.is_dir():
        return _of_folder(path)
    if not path.is_file():
        raise DataError(f"{path}: no evidence here; a zip, a run's folder, or a ledger")
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            begins_as_zip = file.read(2) == b"PK"
        if begins_as_zip or path.suffix == ".zip":
            raise VerificationError(f"{path}: a damaged zip")
        if path.stat().st_size > LARGEST[LEDGER]:
            raise DataError(f"{path}: too large for a ledger")
        return Evidence(str(path), {LEDGER: path.read_bytes()})
    files, entries = _unpacked(path)
    manifest = _manifest(path, files)
    content = path.read_bytes()
    if content != _as_written(content, entries):
        raise VerificationError(
            f"{path}: holds bytes that belong to no file in it, or was packed anew; unpack it, and give the folder"
        )
    return Evidence(str(path), {name: data for name, data in files.items() if name != MANIFEST}, manifest)


def in_reading_order(names: Iterable[str]) -> list[str]:
    """Sort names of files so that a run that goes on is read without a contradiction.

    A round writes its receipts, then its entry in the ledger, then the rest. Read the other way round, no file tells of
    a round that the ledger does not have yet, and the ledger of none whose receipts are missing.
    """
    return sorted(names, key=lambda name: (name == LEDGER) + 2 * (name == RECEIPTS))


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """Say of a checkpoint which round and entry it names, and the digest of its shared vector; no number of it.

    Raises:
        OSError: There is none.
        ValueError, KeyError, TypeError: It is no safetensors file with a vector.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 0 < length <= LARGEST_HEADER:
            raise ValueError("no header of a usual size")
        header: dict[str, Any] = json.loads(file.read(length))
        start, end = header["vector"]["data_offsets"]
        metadata = header["__metadata__"]
        if not 0 <= int(start) <= int(end) <= path.stat().st_size:
            raise ValueError("the vector lies outside the file")
        file.seek(8 + length + start)
        digest, left = hashlib.sha256(), end - start
        while left > 0:
            part = file.read(min(left, MEGABYTE))
            if not part:
                raise ValueError("the file ends within its vector")
            digest.update(part)
            left -= len(part)
    return {"round": int(metadata["round"]), "head": str(metadata["head"]), "sha256": digest.hexdigest()}


def commitment(salt: str, receipts: list[str]) -> str:
    """Commit to the receipts of one round: SHA-256 over a random salt and the sorted receipts, hex.

    Guarantee: without the salt, 64 random hex digits, nothing about the receipts can be tested.
    """
    return canonical_digest({"receipts": sorted(receipts), "salt": salt})


def _message(unsigned: Mapping[str, Any]) -> bytes:
    return f"{FORMAT}\n{canonical_digest(unsigned)}\n".encode()


def _of_folder(folder: Path) -> Evidence:
    files: dict[str, bytes] = {}
    if (folder / WEIGHTS).is_file():
        try:
            files[CHECKPOINT] = canonical(checkpoint_facts(folder / WEIGHTS))
        except (ValueError, KeyError, TypeError):
            files[CHECKPOINT] = b"{}"  # it is there, and is no checkpoint: whoever checks says so
    for name in in_reading_order(LARGEST.keys() - {MANIFEST, *files}):
        if (folder / name).is_file():
            files[name] = (folder / name).read_bytes()
    if LEDGER not in files:
        raise DataError(f"{folder}: no ledger here")
    return Evidence(str(folder), files)


def _unpacked(path: Path) -> tuple[dict[str, bytes], list[zipfile.ZipInfo]]:
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            for entry in entries:
                if entry.filename not in LARGEST or entry.filename in files:
                    raise VerificationError(f"{path}: holds a file that evidence may not hold, or one twice")
                with archive.open(entry) as file:
                    files[entry.filename] = file.read(LARGEST[entry.filename] + 1)
                if len(files[entry.filename]) > LARGEST[entry.filename]:
                    raise VerificationError(f"{path}: {entry.filename} is larger than it can be")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError, EOFError, ValueError):
        raise VerificationError(f"{path}: a damaged zip") from None
    except Exception as error:
        if type(error).__module__ == "zlib":
            raise VerificationError(f"{path}: a damaged zip") from None
        raise
    return files, entries


def _as_written(content: bytes, entries: Sequence[zipfile.ZipInfo]) -> bytes:
    """Return the zip that `write_evidence` makes of the compressed files in `content`: one, and no room beside them."""
    body, directory, offset = [], [], 0
    day = (DATE[0] - 1980) << 9 | DATE[1] << 5 | DATE[2]
    for entry in entries:
        name = entry.filename.encode()
        sizes = entry.CRC, entry.compress_size, entry.file_size
        if max(sizes) >= 1 << 32:
            return b""
        facts = struct.pack("<5H3L2H", 20, 0, zipfile.ZIP_DEFLATED, 0, day, *sizes, len(name), 0)
        start = entry.header_offset + 30 + len(name)
        body.append(b"PK\3\4" + facts + name + content[start : start + entry.compress_size])
        system = bytes([20, entry.create_system if entry.create_system in (0, 3) else 255])  # Windows, and all others
        directory.append(b"PK\1\2" + system + facts + struct.pack("<3H2L", 0, 0, 0, OWNER_ALONE, offset) + name)
        offset += len(body[-1])
    listed = b"".join(directory)
    end = struct.pack("<4H2LH", 0, 0, len(entries), len(entries), len(listed), offset, 0)
    return b"".join(body) + listed + b"PK\5\6" + end


def _manifest(path: Path, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the manifest of a zip, after holding everything in it against it."""
    try:
        manifest: dict[str, Any] = json.loads(files[MANIFEST])
        unsigned = {name: value for name, value in manifest.items() if name != "signature"}
        key, signature = VerifyKey.from_hex(manifest["public_key"]), bytes.fromhex(manifest["signature"])
        listed: dict[str, str] = dict(manifest["files"])
        sound = manifest["format"] == FORMAT and isinstance(manifest["head"], dict)
        message = _message(unsigned)
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise VerificationError(f"{path}: no manifest of evidence") from None
    if not sound:
        raise VerificationError(f"{path}: no manifest of evidence")
    try:
        key.verify(signature, message)
    except VerificationError:
        raise VerificationError(f"{path}: the manifest is not signed by the key that it names") from None
    found = {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != MANIFEST}
    if found != listed or LEDGER not in found:
        wrong = sorted(name for name in found.keys() | listed.keys() if found.get(name) != listed.get(name))
        raise VerificationError(f"{path}: {wrong[0] if wrong else LEDGER} is not what the manifest signs")
    return manifest
