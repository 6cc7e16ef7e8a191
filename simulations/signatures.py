"""Detached signatures over reports: who stands behind a file, checked with nothing but the file and the key.

`FILE.sig` is canonical JSON: the file's name and SHA-256, the signer's public key, name and time, and an Ed25519
signature over all of that. The file itself is not touched, so that it opens everywhere.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.canonical import canonical, canonical_digest, read_canonical
from common.errors import DataError, VerificationError
from common.keys import SigningKey, VerifyKey
from common.places import state_home

__all__ = ["Signature", "auditor_key", "check_beside", "check_signature", "sign_file"]

FORMAT = "homespun-signature-1"
SUFFIX = ".sig"
DATA = "audit.json"
"""What lies beside the page of an audit; the page names its digest, so that a signature of the page covers it."""

LONGEST_NAME = 200


@dataclass(frozen=True)
class Signature:
    """Who signed which file, and when by their clock.

    Attributes:
        file: The file's name, without its folder.
        sha256: Of its content.
        signer: Public key, hex.
        name: Who the signer says to be; empty where nothing was said.
        time: What the signer's clock said.
    """

    file: str
    sha256: str
    signer: str
    name: str
    time: str

    def to_json(self) -> dict[str, str]:
        """Return it as a JSON object."""
        return asdict(self)

    def message(self) -> bytes:
        """Return the bytes that are signed."""
        return f"{FORMAT}\n{canonical_digest(self.to_json())}\n".encode()


def auditor_key(path: Path | None = None) -> SigningKey:
    """Open the key that this installation signs reports with; made on first use, readable by its owner alone."""
    path = state_home() / "keys" / "auditor.key" if path is None else path
    if path.exists():
        return SigningKey.load(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = SigningKey.generate()
    key.save(path)
    return key


def sign_file(path: Path, key: SigningKey, *, name: str, time: str) -> Path:
    """Write the detached signature of `path` beside it, and return where.

    Raises:
        DataError: There is no such file, or the name is too long to print.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file to sign")
    if len(name) > LONGEST_NAME or not (name.isprintable() or not name):
        raise DataError(f"name: at most {LONGEST_NAME} printable characters")
    signed = Signature(path.name, _digest(path), key.verify_key.hex, name, time)
    content = {"format": FORMAT, **signed.to_json(), "signature": key.sign(signed.message()).hex()}
    target = path.with_name(path.name + SUFFIX)
    target.write_bytes(canonical(content) + b"\n")
    return target


def check_signature(path: Path) -> Signature:
    """Return who signed `path`, from the signature beside it.

    Raises:
        VerificationError: The file was changed since, was signed under another name, or the signature is not the key's.
    """
    try:
        content = path.with_name(path.name + SUFFIX).read_bytes()
        fields: Any = read_canonical(content.removesuffix(b"\n"))
        if fields["format"] != FORMAT or fields.keys() != {"format", "signature", *Signature.__annotations__}:
            raise ValueError("not of this format")
        signed = Signature(**{name: str(fields[name]) for name in Signature.__annotations__})
        key, signature = VerifyKey.from_hex(signed.signer), bytes.fromhex(fields["signature"])
        if (key.hex, signature.hex()) != (signed.signer, fields["signature"]):
            raise ValueError("hex digits are lower case")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        raise VerificationError(f"{path.name}{SUFFIX}: no signature of a file") from None
    key.verify(signature, signed.message())
    if signed.file != path.name:
        raise VerificationError(f"{path.name}: the signature beside it is of a file named {signed.file[:60]}")
    if signed.sha256 != _digest(path):
        raise VerificationError(f"{path.name}: was changed after it was signed")
    return signed


def check_beside(path: Path) -> None:
    """Return if the data beside a signed page are those whose digest the page names, or are not there.

    Raises:
        VerificationError: They were changed since.
    """
    data = path.with_name(DATA)
    if path.suffix != ".html" or not data.is_file():
        return
    named = re.search(rf"<dt>Digest of {re.escape(DATA)}</dt><dd[^>]*>([0-9a-f]{{64}})</dd>", path.read_text("utf-8"))
    if named is not None and named[1] != _digest(data):
        raise VerificationError(f"{DATA}: is not what the signed page {path.name} names: it was changed since")


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
