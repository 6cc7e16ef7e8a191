"""Sign and verify, seal and open, and where the master key comes from.

There is nothing to choose: Ed25519 signs (RFC 8032), AES-256-GCM seals (NIST SP 800-38D) under a random 96-bit
nonce with the context as associated data, HKDF-SHA256 derives (RFC 5869), scrypt stretches a passphrase
(RFC 7914). A second algorithm would be a new format with a new first byte, not an option.

Three kinds of key:

- the *signing key* of a ledger's writer or of an owner; its public half is their name;
- the *master key* of an installation, which never lies in the folder it protects;
- *sealing keys*, 32 bytes each, derived from the master key by label or drawn at random and sealed under one.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import secrets
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from common.errors import ConfigError, StoreError, VerificationError
from common.files import make_private_folder, read_private_file, write_private_file

__all__ = [
    "KEY_BYTES",
    "MASTER_KEY_RECORD",
    "MasterKey",
    "SigningKey",
    "VerifyKey",
    "derive_key",
    "open_sealed",
    "seal",
]

KEY_BYTES = 32
SIGNATURE_BYTES = 64
NONCE_BYTES = 12
TAG_BYTES = 16
SEALED_VERSION = b"\x01"
SIGNING_KEY_HEADER = b"homespun-signing-key-1\n"
SEALED_SIGNING_KEY_HEADER = b"homespun-sealed-signing-key-1\n"

MASTER_KEY_FORMAT = "homespun-master-key-1"
MASTER_KEY_RECORD = "master-key.json"
CREDENTIAL_NAME = "homespun-master-key"
KEYRING_SERVICE = "homespun"
MASTER_KEY_HEADER = b"homespun-master-key-1\n"
SMALLEST_PASSPHRASE = 8
SCRYPT_COST = 2**17  # 128 MiB and about half a second; OWASP's first choice (Password Storage Cheat Sheet)

Source = Literal["credential", "keyring", "passphrase", "key-file"]

LOSS = {
    "credential": "The systemd credential is the only copy of the master key.",
    "keyring": "The keyring entry is the only copy of the master key.",
    "passphrase": "Nobody can reset this passphrase.",
    "key-file": "The key file is the only copy of the master key; whoever reads it and the data folder reads both.",
}
LOSS_ENDING = (
    " Without it, everything sealed in the data folder is lost for good: private adapters, profile, stored records"
    " and the ledger's signing key. Budget that was spent stays spent. Keep a copy elsewhere."
)


@dataclass(frozen=True)
class VerifyKey:
    """The public half of a signing key: 32 raw bytes, written as 64 lower-case hex digits."""

    raw: bytes

    def __post_init__(self) -> None:
        """Refuse anything but 32 bytes."""
        if len(self.raw) != KEY_BYTES:
            raise ValueError(f"a verify key has {KEY_BYTES} bytes, found {len(self.raw)}")

    @cached_property
    def hex(self) -> str:
        """The key as text; the name of its holder in ledgers."""
        return self.raw.hex()

    @cached_property
    def _key(self) -> Ed25519PublicKey:
        return Ed25519PublicKey.from_public_bytes(self.raw)

    @classmethod
    def from_hex(cls, text: str) -> VerifyKey:
        """Read what `hex` wrote.

        Raises:
            ValueError: The text is not 64 hex digits.
        """
        return cls(bytes.fromhex(text))

    def verify(self, signature: bytes, message: bytes) -> None:
        """Return if `signature`, 64 bytes, is this key's over `message`.

        Raises:
            VerificationError: It is not.
        """
        try:
            self._key.verify(signature, message)
        except (InvalidSignature, ValueError):
            raise VerificationError(f"not a signature by {self.hex[:16]}") from None


class SigningKey:
    """An Ed25519 private key. Its text form shows only the public half, and it cannot be pickled."""

    def __init__(self, raw: bytes) -> None:
        """Take the 32 bytes of an RFC 8032 seed."""
        if len(raw) != KEY_BYTES:
            raise ValueError(f"a signing key has {KEY_BYTES} bytes, found {len(raw)}")
        self._raw = bytes(raw)
        self._key = Ed25519PrivateKey.from_private_bytes(self._raw)
        self.verify_key = VerifyKey(self._key.public_key().public_bytes_raw())

    def __repr__(self) -> str:
        return f"SigningKey(verify_key={self.verify_key.hex})"

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the key in the process that loaded it."""
        raise TypeError("a signing key is not pickled; save it, or pass its verify key")

    @classmethod
    def generate(cls) -> SigningKey:
        """Draw a new key from the operating system's generator."""
        return cls(secrets.token_bytes(KEY_BYTES))

    def sign(self, message: bytes) -> bytes:
        """Return the 64-byte signature over `message`; every caller's messages begin with a format of their own."""
        return self._key.sign(message)

    def save(self, path: Path, *, sealing_key: bytes | None = None) -> None:
        """Write the key to a new file that only its owner may read, sealed under `sealing_key` where given.

        Raises:
            FileExistsError: The file exists; a key is never overwritten.
        """
        if sealing_key is None:
            content = SIGNING_KEY_HEADER + self._raw.hex().encode() + b"\n"
        else:
            content = SEALED_SIGNING_KEY_HEADER + seal(sealing_key, self._raw, SEALED_SIGNING_KEY_HEADER)
        write_private_file(path, content)

    @classmethod
    def load(cls, path: Path, *, sealing_key: bytes | None = None) -> SigningKey:
        """Read what `save` wrote.

        Raises:
            StoreError: The file is missing, damaged, readable by others, or sealed under another key.
        """
        content = read_private_file(path)
        if content.startswith(SEALED_SIGNING_KEY_HEADER):
            if sealing_key is None:
                raise StoreError(f"{path}: this signing key is sealed; the master key is needed to open it")
            raw = open_sealed(sealing_key, content[len(SEALED_SIGNING_KEY_HEADER) :], SEALED_SIGNING_KEY_HEADER)
            return cls(raw)
        body = content.removeprefix(SIGNING_KEY_HEADER)
        if body == content or len(body) != 2 * KEY_BYTES + 1:
            raise StoreError(f"{path}: not a signing key")
        try:
            raw = bytes.fromhex(body[:-1].decode("ascii"))
        except ValueError:
            raise StoreError(f"{path}: not a signing key") from None
        if SIGNING_KEY_HEADER + raw.hex().encode() + b"\n" != content:
            raise StoreError(f"{path}: not a signing key")
        return cls(raw)


def seal(key: bytes, plaintext: bytes, context: bytes) -> bytes:
    """Encrypt and authenticate `plaintext` under a 32-byte `key`, bound to `context`.

    Returns:
        One version byte, the 12-byte nonce, then ciphertext and 16-byte tag: 29 bytes more than the plaintext.

    Guarantee: whoever lacks the key learns the length of the plaintext and nothing else, and cannot make
    `open_sealed` return anything that was not sealed under this key with this context. Nonces are random, so a
    key seals at most 2**32 messages (NIST SP 800-38D, section 8.3); stores here use a key per subject.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    return SEALED_VERSION + nonce + AESGCM(_sealing_key(key)).encrypt(nonce, plaintext, context)


def open_sealed(key: bytes, sealed: bytes, context: bytes) -> bytes:
    """Return the plaintext that `seal` sealed under the same key and context.

    Raises:
        StoreError: It was changed, or sealed under another key or context.
    """
    if sealed[:1] != SEALED_VERSION or len(sealed) < 1 + NONCE_BYTES + TAG_BYTES:
        raise StoreError("sealed data is damaged or of an unknown format")
    nonce, ciphertext = sealed[1 : 1 + NONCE_BYTES], sealed[1 + NONCE_BYTES :]
    try:
        return AESGCM(_sealing_key(key)).decrypt(nonce, ciphertext, context)
    except InvalidTag:
        raise StoreError("sealed data is damaged, or was sealed under another key or for another place") from None


def derive_key(key: bytes, label: str) -> bytes:
    """Derive a 32-byte key from a 32-byte `key` by HKDF-SHA256; keys of different labels are independent."""
    info = b"homespun-key-1:" + label.encode()
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=info).derive(_sealing_key(key))


def _sealing_key(key: bytes) -> bytes:
    if len(key) != KEY_BYTES:
        raise ValueError(f"a sealing key has {KEY_BYTES} bytes, found {len(key)}")
    return key


@dataclass(frozen=True)
class MasterKey:
    """The key that everything at rest hangs on, and where it came from.

    Attributes:
        source: Where the key is kept.
        place: What the owner must not lose: a path, a credential's or a keyring entry's name.
    """

    secret: bytes = field(repr=False)
    source: Source
    place: str

    def __post_init__(self) -> None:
        """Refuse anything but 32 bytes."""
        _sealing_key(self.secret)

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the key in the process that loaded it."""
        raise TypeError("a master key is not pickled; pass a subkey")

    @property
    def notice(self) -> str:
        """What the owner is told when the key is made: where it is, and what losing it costs."""
        return f"Master key: {self.source} ({self.place}). {LOSS[self.source]}{LOSS_ENDING}"

    def subkey(self, label: str) -> bytes:
        """Return the 32-byte key for one purpose, such as `adapter-store`."""
        return derive_key(self.secret, label)

    @classmethod
    def open(
        cls,
        folder: Path,
        *,
        source: Source | None = None,
        ask_passphrase: Callable[[], str] | None = None,
        key_file: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> MasterKey:
        """Return the master key of data folder `folder`; the first call makes one and writes down where it is.

        The first call takes the first source that is there: systemd's credential `homespun-master-key` (32 bytes,
        or 64 hex digits) in `$CREDENTIALS_DIRECTORY`; the operating system's keyring; `ask_passphrase`; else a
        new key file outside `folder`, which is what a headless installation gets. `source` insists on one, and
        naming a `key_file` insists on that.
        Later calls use the source that was written down and no other, so that a keyring which appears or
        disappears never means another key.

        Args:
            folder: The data folder; the record `master-key.json` in it holds no secret.
            source: Take this source, or fail.
            ask_passphrase: Asks the owner; called at most once.
            key_file: Where the key file lies; `homespun/<id>.key` in the user's configuration folder when absent.
            environment: Environment variables; those of the process when absent.

        Raises:
            StoreError: The source is not available any more, or the key is not the one the folder was made with.
            ConfigError: The source that was asked for is not there, or cannot be used.
        """
        environment = os.environ if environment is None else environment
        opener = _MasterKeyOpener(folder, ask_passphrase, key_file, environment)
        record_path = folder / MASTER_KEY_RECORD
        if not record_path.exists():
            record, key = opener.create(source)
            content = json.dumps(record | {"check": _check(key.secret)}, indent=1, sort_keys=True).encode() + b"\n"
            make_private_folder(folder)
            with contextlib.suppress(FileExistsError):  # another process was first: its key is the key
                write_private_file(record_path, content)
                return key
        record = _read_record(record_path)
        if source is not None and source != record["source"]:
            raise ConfigError(f"{folder} was made with master key source {record['source']}, not {source}")
        key = opener.reopen(record)
        if not hmac.compare_digest(_check(key.secret), record["check"]):
            wrong = "wrong passphrase" if key.source == "passphrase" else "not the key this folder was made with"
            raise StoreError(f"master key from {key.source}: {wrong}")
        return key

    @staticmethod
    def put_back(folder: Path, secret: bytes, *, environment: Mapping[str, str] | None = None) -> None:
        """Write `secret` into the key file of data folder `folder`, which came from another machine.

        Raises:
            StoreError: Another key lies there.
        """
        record = _read_record(folder / MASTER_KEY_RECORD)
        opener = _MasterKeyOpener(folder, None, None, os.environ if environment is None else environment)
        path = opener.key_file_of(record)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        content = MASTER_KEY_HEADER + secret.hex().encode() + b"\n"
        try:
            write_private_file(path, content)
        except FileExistsError:
            if read_private_file(path) != content:
                raise StoreError(f"{path}: another key lies where this device's would be") from None


@dataclass(frozen=True)
class _MasterKeyOpener:
    folder: Path
    ask_passphrase: Callable[[], str] | None
    key_file: Path | None
    environment: Mapping[str, str]

    def create(self, source: Source | None) -> tuple[dict[str, str], MasterKey]:
        record = {"format": MASTER_KEY_FORMAT, "id": secrets.token_hex(8), "salt": secrets.token_hex(16)}
        if source is None:
            source = "key-file" if self.key_file is not None else self._first_source()
        record["source"] = source
        if source == "keyring":
            ring = _keyring()
            if ring is None:
                raise ConfigError("master key: no keyring of the operating system is available")
            ring.set_password(KEYRING_SERVICE, record["id"], secrets.token_hex(KEY_BYTES))
        if source == "key-file":
            path = self.key_file_of(record)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):  # a key file that the owner brought
                write_private_file(path, MASTER_KEY_HEADER + secrets.token_hex(KEY_BYTES).encode() + b"\n")
        return record, self.reopen(record)

    def reopen(self, record: Mapping[str, str]) -> MasterKey:
        source = record["source"]
        if source == "credential":
            path = self._credential()
            if path is None:
                raise StoreError(f"master key: systemd passed no credential {CREDENTIAL_NAME}")
            return MasterKey(_key_from_text(path.read_bytes(), str(path)), "credential", CREDENTIAL_NAME)
        if source == "keyring":
            ring = _keyring()
            text = None if ring is None else ring.get_password(KEYRING_SERVICE, record["id"])
            if text is None:
                raise StoreError("master key: the keyring is locked, gone, or has no entry for this folder")
            return MasterKey(_key_from_text(text.encode(), "keyring"), "keyring", f"{KEYRING_SERVICE}/{record['id']}")
        if source == "passphrase":
            if self.ask_passphrase is None:
                raise StoreError("master key: this folder needs its passphrase, which is asked for at a terminal")
            return MasterKey(
                _stretch(self.ask_passphrase(), bytes.fromhex(record["salt"])), "passphrase", "your memory"
            )
        path = self.key_file_of(record)
        content = read_private_file(path)
        if not content.startswith(MASTER_KEY_HEADER):
            raise StoreError(f"{path}: not a master key file")
        return MasterKey(_key_from_text(content[len(MASTER_KEY_HEADER) :], str(path)), "key-file", str(path))

    def _first_source(self) -> Source:
        if self._credential() is not None:
            return "credential"
        if _keyring() is not None:
            return "keyring"
        return "key-file" if self.ask_passphrase is None else "passphrase"

    def _credential(self) -> Path | None:
        folder = self.environment.get("CREDENTIALS_DIRECTORY")
        path = Path(folder) / CREDENTIAL_NAME if folder else None
        return path if path is not None and path.is_file() else None

    def key_file_of(self, record: Mapping[str, str]) -> Path:
        path = self.key_file
        if path is None:
            home = self.environment.get("XDG_CONFIG_HOME") or str(Path("~/.config").expanduser())
            path = Path(home) / "homespun" / f"{record['id']}.key"
        if path.resolve().is_relative_to(self.folder.resolve()):
            raise ConfigError(f"{path}: the key file must lie outside the data folder that it opens")
        return path


def _keyring() -> Any:
    """Return the operating system's keyring, or None: also where the package only offers a file or nothing."""
    try:
        import keyring
        import keyring.errors
    except ImportError:
        return None
    try:
        ring = keyring.get_keyring()
        # A chain uses its first backend; each of them must be one that the package itself would recommend.
        real = all(float(part.priority) >= 1 for part in getattr(ring, "backends", [ring]))
        if not real or float(ring.priority) < 1:
            return None
        ring.get_password(KEYRING_SERVICE, "available")
    except (keyring.errors.KeyringError, RuntimeError, OSError):
        return None
    return ring


def _read_record(path: Path) -> dict[str, str]:
    try:
        record = json.loads(read_private_file(path))
        wanted = {"format", "id", "salt", "source", "check"}
        if record.keys() != wanted or not all(isinstance(value, str) for value in record.values()):
            raise ValueError
        if record["format"] != MASTER_KEY_FORMAT or record["source"] not in get_args(Source):
            raise ValueError
        bytes.fromhex(record["salt"] + record["id"])
    except (ValueError, AttributeError):
        raise StoreError(f"{path}: damaged, or of a newer format") from None
    return record


def _key_from_text(content: bytes, place: str) -> bytes:
    """Read 32 raw bytes or 64 hex digits with or without a line end."""
    if len(content) == KEY_BYTES:
        return content
    try:
        key = bytes.fromhex(content.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise StoreError(f"{place}: expected a key of {KEY_BYTES} bytes or {2 * KEY_BYTES} hex digits")
    return key


def _stretch(passphrase: str, salt: bytes) -> bytes:
    text = unicodedata.normalize("NFC", passphrase).encode()
    if len(text) < SMALLEST_PASSPHRASE:
        raise ConfigError(f"passphrase: at least {SMALLEST_PASSPHRASE} characters")
    memory = 2 * 128 * 8 * SCRYPT_COST
    return hashlib.scrypt(text, salt=salt, n=SCRYPT_COST, r=8, p=1, maxmem=memory, dklen=KEY_BYTES)


def _check(secret: bytes) -> str:
    """Return what tells a wrong key from a right one, and nothing more about it."""
    return derive_key(secret, "master key check").hex()
