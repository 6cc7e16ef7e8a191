"""Keys: what is signed and sealed comes back unchanged or not at all, and keys stay where they belong."""

from __future__ import annotations

import pickle
import stat
import sys
import types
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import keys
from common.errors import ConfigError, StoreError, VerificationError
from common.keys import MasterKey, SigningKey, VerifyKey, derive_key, open_sealed, seal


@pytest.fixture(autouse=True)
def no_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    """A desktop's real keyring is never touched by a test."""
    monkeypatch.setitem(sys.modules, "keyring", None)


@pytest.fixture
def cheap_scrypt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys, "SCRYPT_COST", 2**4)


def test_a_signature_is_the_published_one() -> None:
    # RFC 8032, section 7.1, test 2.
    key = SigningKey(bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb"))
    assert key.verify_key.hex == "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
    signature = key.sign(b"\x72")
    assert signature.hex() == (
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    key.verify_key.verify(signature, b"\x72")


def test_sealing_is_aes_256_gcm_as_published() -> None:
    # The GCM specification (McGrew and Viega), test case 16: AES-256 with a 96-bit nonce.
    key = bytes.fromhex("feffe9928665731c6d6a8f9467308308feffe9928665731c6d6a8f9467308308")
    nonce = bytes.fromhex("cafebabefacedbaddecaf888")
    context = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    ciphertext = bytes.fromhex(
        "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
        "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662"
    )
    tag = bytes.fromhex("76fc6ece0f4e1768cddf8853bb2d551b")
    plaintext = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39"
    )
    assert open_sealed(key, b"\x01" + nonce + ciphertext + tag, context) == plaintext


def test_derivation_is_hkdf_sha256() -> None:
    import hashlib
    import hmac

    key = bytes(range(32))
    pseudorandom = hmac.digest(bytes(32), key, hashlib.sha256)
    expected = hmac.digest(pseudorandom, b"homespun-key-1:store\x01", hashlib.sha256)
    assert derive_key(key, "store") == expected
    assert derive_key(key, "other") != expected


@given(st.binary(max_size=300), st.binary(max_size=40), st.data())
@settings(max_examples=60, deadline=None)
def test_sealed_data_come_back_or_are_refused(plaintext: bytes, context: bytes, data: st.DataObject) -> None:
    key = bytes(range(32))
    sealed = seal(key, plaintext, context)
    assert open_sealed(key, sealed, context) == plaintext
    assert len(sealed) == len(plaintext) + 29
    bit = data.draw(st.integers(0, 8 * len(sealed) - 1))
    with pytest.raises(StoreError):
        open_sealed(key, _flipped(sealed, bit), context)
    with pytest.raises(StoreError):
        open_sealed(key, sealed, context + b"\0")
    with pytest.raises(StoreError):
        open_sealed(key, sealed[: data.draw(st.integers(0, len(sealed) - 1))], context)


def test_every_single_bit_of_a_sealed_message_counts() -> None:
    key = bytes(32)
    sealed = seal(key, b"private", b"place")
    for bit in range(8 * len(sealed)):
        with pytest.raises(StoreError):
            open_sealed(key, _flipped(sealed, bit), b"place")
    for bit in range(256):
        with pytest.raises(StoreError):
            open_sealed(_flipped(key, bit), sealed, b"place")


def test_sealing_twice_never_gives_the_same_bytes() -> None:
    assert len({seal(bytes(32), b"same", b"") for _ in range(100)}) == 100


def test_every_single_bit_of_signature_and_message_counts() -> None:
    key = SigningKey.generate()
    signature = key.sign(b"message")
    for bit in range(8 * len(signature)):
        with pytest.raises(VerificationError):
            key.verify_key.verify(_flipped(signature, bit), b"message")
    for bit in range(56):
        with pytest.raises(VerificationError):
            key.verify_key.verify(signature, _flipped(b"message", bit))
    with pytest.raises(VerificationError):
        SigningKey.generate().verify_key.verify(signature, b"message")


@pytest.mark.parametrize("raw", [b"", bytes(31), bytes(33), b"\xff" * 32])
def test_an_impossible_verify_key_raises_nothing_unexpected(raw: bytes) -> None:
    if len(raw) != 32:
        with pytest.raises(ValueError, match="32 bytes"):
            VerifyKey(raw)
    else:
        with pytest.raises(VerificationError):
            VerifyKey(raw).verify(bytes(64), b"")


@pytest.mark.parametrize("sealing_key", [None, bytes(range(32))])
def test_a_signing_key_survives_its_file(tmp_path: Path, sealing_key: bytes | None) -> None:
    key = SigningKey.generate()
    path = tmp_path / "writer.key"
    key.save(path, sealing_key=sealing_key)
    assert SigningKey.load(path, sealing_key=sealing_key).verify_key == key.verify_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["writer.key"]


@pytest.mark.parametrize("sealing_key", [None, bytes(range(32))])
def test_a_changed_key_file_never_loads_as_that_key(tmp_path: Path, sealing_key: bytes | None) -> None:
    key = SigningKey(bytes(range(32)))
    path = tmp_path / "writer.key"
    key.save(path, sealing_key=sealing_key)
    content = path.read_bytes()
    for bit in range(0, 8 * len(content), 5):
        path.write_bytes(_flipped(content, bit))
        try:
            loaded = SigningKey.load(path, sealing_key=sealing_key)
        except StoreError:
            continue
        # A plain file has no checksum: a changed digit is another key, whose entries nobody accepts.
        assert sealing_key is None
        assert loaded.verify_key != key.verify_key


def test_a_sealed_signing_key_shows_nothing_and_needs_its_key(tmp_path: Path) -> None:
    key = SigningKey(b"k" * 32)
    path = tmp_path / "writer.key"
    key.save(path, sealing_key=bytes(32))
    assert b"k" * 32 not in path.read_bytes()
    assert (b"k" * 32).hex().encode() not in path.read_bytes()
    with pytest.raises(StoreError, match="sealed"):
        SigningKey.load(path)
    with pytest.raises(StoreError):
        SigningKey.load(path, sealing_key=bytes([1]) * 32)


def test_a_key_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "writer.key"
    key = SigningKey.generate()
    key.save(path)
    with pytest.raises(FileExistsError):
        SigningKey.generate().save(path)
    assert SigningKey.load(path).verify_key == key.verify_key
    assert [entry.name for entry in tmp_path.iterdir()] == ["writer.key"]


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "writer.key"
    SigningKey.generate().save(path)
    path.chmod(0o640)
    with pytest.raises(StoreError, match="chmod 600"):
        SigningKey.load(path)


def test_a_missing_key_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such key file"):
        SigningKey.load(tmp_path / "absent.key")


def test_secrets_do_not_show_or_travel(tmp_path: Path) -> None:
    signing = SigningKey(b"s" * 32)
    master = MasterKey(b"m" * 32, "key-file", "somewhere")
    for secret, key in ((b"s" * 32, signing), (b"m" * 32, master)):
        for text in (repr(key), str(key)):
            assert secret.hex() not in text
            assert secret.decode() not in text
        with pytest.raises(TypeError):
            pickle.dumps(key)


def test_headless_gets_a_key_file_outside_the_data_folder(tmp_path: Path) -> None:
    data, config = tmp_path / "not" / "yet" / "there", tmp_path / "config"
    environment = {"XDG_CONFIG_HOME": str(config)}
    first = MasterKey.open(data, environment=environment)
    assert first.source == "key-file"
    assert Path(first.place).is_relative_to(config)
    assert stat.S_IMODE(Path(first.place).stat().st_mode) == 0o600
    assert MasterKey.open(data, environment=environment).secret == first.secret
    for file in data.rglob("*"):
        assert first.secret not in file.read_bytes()
        assert first.secret.hex().encode() not in file.read_bytes()
    assert "lost for good" in first.notice
    Path(first.place).unlink()
    with pytest.raises(StoreError, match="no such key file"):
        MasterKey.open(data, environment=environment)


def test_two_folders_have_two_master_keys(tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    secrets = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        secrets.add(MasterKey.open(tmp_path / name, environment=environment).secret)
    assert len(secrets) == 2


@pytest.mark.parametrize("inside", ["master.key", "deeper/master.key", "../data/master.key"])
def test_a_key_file_inside_the_data_folder_is_refused(tmp_path: Path, inside: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    with pytest.raises(ConfigError, match="outside"):
        MasterKey.open(data, key_file=data / inside, environment={})
    assert list(data.iterdir()) == []


def test_a_systemd_credential_comes_first_and_is_read_in_both_forms(tmp_path: Path) -> None:
    data, credentials = tmp_path / "data", tmp_path / "credentials"
    data.mkdir()
    credentials.mkdir()
    environment = {"CREDENTIALS_DIRECTORY": str(credentials), "XDG_CONFIG_HOME": str(tmp_path)}
    (credentials / "homespun-master-key").write_text((b"c" * 32).hex() + "\n")
    key = MasterKey.open(data, environment=environment, ask_passphrase=lambda: pytest.fail("asked"))
    assert (key.source, key.secret) == ("credential", b"c" * 32)
    (credentials / "homespun-master-key").write_bytes(b"c" * 32)
    assert MasterKey.open(data, environment=environment).secret == b"c" * 32
    (credentials / "homespun-master-key").write_bytes(b"d" * 32)
    with pytest.raises(StoreError, match="not the key"):
        MasterKey.open(data, environment=environment)
    with pytest.raises(StoreError, match="no credential"):
        MasterKey.open(data, environment={})


@pytest.mark.usefixtures("cheap_scrypt")
def test_a_passphrase_opens_what_it_made_and_its_loss_is_explained(tmp_path: Path) -> None:
    key = MasterKey.open(tmp_path, ask_passphrase=lambda: "correct horse battery", environment={})
    assert key.source == "passphrase"
    assert "Nobody can reset" in key.notice
    again = MasterKey.open(tmp_path, ask_passphrase=lambda: "correct horse battery", environment={})
    assert again.secret == key.secret
    with pytest.raises(StoreError, match="wrong passphrase"):
        MasterKey.open(tmp_path, ask_passphrase=lambda: "correct horse batterz", environment={})
    with pytest.raises(StoreError, match="needs its passphrase"):
        MasterKey.open(tmp_path, environment={})


@pytest.mark.usefixtures("cheap_scrypt")
def test_one_passphrase_typed_on_two_keyboards_is_one_key(tmp_path: Path) -> None:
    composed = MasterKey.open(tmp_path, ask_passphrase=lambda: "caf\u00e9 at noon", environment={})
    decomposed = MasterKey.open(tmp_path, ask_passphrase=lambda: "cafe\u0301 at noon", environment={})
    assert composed.secret == decomposed.secret


def test_a_passphrase_is_stretched_with_the_stated_cost() -> None:
    import hashlib

    expected = hashlib.scrypt(b"correct horse", salt=bytes(16), n=2**17, r=8, p=1, maxmem=2**28, dklen=32)
    assert keys._stretch("correct horse", bytes(16)) == expected  # pyright: ignore[reportPrivateUsage]


def test_a_short_passphrase_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 8"):
        MasterKey.open(tmp_path, ask_passphrase=lambda: "short", environment={})
    assert list(tmp_path.iterdir()) == []


class _Ring:
    """A keyring backend like those of the `keyring` package."""

    def __init__(self, priority: float) -> None:
        self.priority = priority
        self.entries: dict[tuple[str, str], str] = {}

    def get_password(self, service: str, name: str) -> str | None:
        return self.entries.get((service, name))

    def set_password(self, service: str, name: str, password: str) -> None:
        self.entries[service, name] = password


def _install_keyring(monkeypatch: pytest.MonkeyPatch, ring: object) -> None:
    module = types.ModuleType("keyring")
    module.errors = types.ModuleType("keyring.errors")  # pyright: ignore[reportAttributeAccessIssue]
    module.errors.KeyringError = type("KeyringError", (Exception,), {})  # pyright: ignore[reportAttributeAccessIssue]
    module.get_keyring = lambda: ring  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "keyring", module)
    monkeypatch.setitem(sys.modules, "keyring.errors", module.errors)


def test_a_real_keyring_holds_the_key_and_keeps_holding_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ring = _Ring(priority=5)
    _install_keyring(monkeypatch, ring)
    key = MasterKey.open(tmp_path, environment={}, ask_passphrase=lambda: pytest.fail("asked"))
    assert key.source == "keyring"
    assert list(ring.entries.values()) == [key.secret.hex()]
    assert MasterKey.open(tmp_path, environment={}).secret == key.secret
    # A keyring that went away must not turn into another key.
    monkeypatch.setitem(sys.modules, "keyring", None)
    with pytest.raises(StoreError, match="keyring"):
        MasterKey.open(tmp_path, environment={}, ask_passphrase=lambda: "another key entirely")


@pytest.mark.parametrize("priority", [0, 0.5])
@pytest.mark.usefixtures("cheap_scrypt")
def test_a_keyring_that_is_a_plain_file_or_nothing_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, priority: float
) -> None:
    ring = _Ring(priority)
    _install_keyring(monkeypatch, ring)
    assert MasterKey.open(tmp_path, environment={}, ask_passphrase=lambda: "correct horse").source == "passphrase"
    chain = _Ring(10)
    chain.backends = [_Ring(5), ring]  # pyright: ignore[reportAttributeAccessIssue]
    _install_keyring(monkeypatch, chain)
    assert keys._keyring() is None  # pyright: ignore[reportPrivateUsage]


def test_the_source_that_was_written_down_cannot_be_changed_by_argument(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    MasterKey.open(data, environment=environment)
    with pytest.raises(ConfigError, match="key-file, not passphrase"):
        MasterKey.open(data, source="passphrase", environment=environment)


def test_a_damaged_record_opens_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    environment = {"XDG_CONFIG_HOME": str(tmp_path)}
    key = MasterKey.open(data, environment=environment)
    record = data / "master-key.json"
    content = record.read_bytes()
    for bit in range(0, 8 * len(content), 11):
        record.write_bytes(_flipped(content, bit))
        try:
            # A changed salt means nothing to a key file; whatever else opens must open the same key.
            assert MasterKey.open(data, environment=environment).secret == key.secret
        except (StoreError, ConfigError):
            continue
    record.write_bytes(b"[]")
    with pytest.raises(StoreError, match="damaged"):
        MasterKey.open(data, environment=environment)


def test_subkeys_are_independent(tmp_path: Path) -> None:
    key = MasterKey(bytes(range(32)), "key-file", "somewhere")
    assert len({key.subkey("a"), key.subkey("b"), key.secret}) == 3
    assert key.subkey("a") == key.subkey("a")


def _flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
