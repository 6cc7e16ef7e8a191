"""Evidence in one zip: a round trip, every way to change it on its way, and what may not be in it."""

from __future__ import annotations

import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import DataError, VerificationError
from common.evidence import commitment, in_reading_order, read_evidence, write_evidence
from common.keys import SigningKey
from common.ledger import Ledger

TIME = "2026-01-31T12:00:00Z"


@pytest.fixture
def key():
    return SigningKey.generate()


@pytest.fixture
def files(tmp_path, key):
    with Ledger.create(tmp_path / "ledger.jsonl", key, {"role": "device", "subject": "ab" * 16}) as ledger:
        head = ledger.head.to_json()
    return {"ledger.jsonl": (tmp_path / "ledger.jsonl").read_bytes(), "spec.json": b"{}\n"}, head


@pytest.fixture
def written(tmp_path, files, key):
    contents, head = files
    write_evidence(tmp_path / "evidence.zip", contents, role="device", head=head, key=key, time=TIME)
    return tmp_path / "evidence.zip"


def rewritten(path, change):
    """The same zip with its files changed, by somebody who has not the key."""
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    change(contents)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in contents.items():
            archive.writestr(name, data)
    return path


def test_what_is_read_is_what_was_written_and_who_signed_it_is_known(written, files, key):
    found = read_evidence(written)
    assert dict(found.files) == files[0]
    assert found.ledger == files[0]["ledger.jsonl"]
    assert found.manifest["public_key"] == key.verify_key.hex
    assert found.manifest["made"] == TIME
    assert found.lines("spec.json") == [{}]
    assert written.stat().st_mode & 0o077 == 0


def test_the_same_evidence_is_the_same_bytes(written, files, key, tmp_path):
    write_evidence(tmp_path / "again.zip", files[0], role="device", head=files[1], key=key, time=TIME)
    assert (tmp_path / "again.zip").read_bytes() == written.read_bytes()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c.update({"spec.json": b"{ }\n"}), "spec.json is not what the manifest signs"),
        (lambda c: c.pop("spec.json"), "spec.json is not what the manifest signs"),
        (lambda c: c.update({"statement.json": b"{}"}), "statement.json is not what the manifest signs"),
        (lambda c: c.pop("ledger.jsonl"), "ledger.jsonl is not what the manifest signs"),
        (lambda c: c.update({"notes.txt": b"dear diary"}), "may not hold"),
        (lambda c: c.update({"../ledger.jsonl": b""}), "may not hold"),
        (lambda c: c.pop("manifest.json"), "no manifest"),
        (lambda c: c.update({"manifest.json": b"[]"}), "no manifest"),
        (lambda c: c.update({"manifest.json": c["manifest.json"].replace(b"device", b"server")}), "not signed by"),
    ],
)
def test_a_zip_that_was_changed_on_its_way_is_refused(written, change, why):
    with pytest.raises(VerificationError, match=why):
        read_evidence(rewritten(written, change))


def test_a_manifest_by_a_stranger_says_who_signed_it(written, files, tmp_path):
    stranger = SigningKey.generate()
    write_evidence(tmp_path / "forged.zip", files[0], role="device", head=files[1], key=stranger, time=TIME)
    assert read_evidence(tmp_path / "forged.zip").manifest["public_key"] == stranger.verify_key.hex


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One zip, as bytes that are the same whenever it is made."""
    folder = tmp_path_factory.mktemp("whole")
    key = SigningKey(bytes(range(32)))
    header = {"role": "device", "subject": "ab" * 16, "salt": "cd" * 16}
    with Ledger.create(folder / "ledger.jsonl", key, header, clock=lambda: 0.0) as ledger:
        head = ledger.head.to_json()
    contents = {"ledger.jsonl": (folder / "ledger.jsonl").read_bytes()}
    write_evidence(folder / "evidence.zip", contents, role="device", head=head, key=key, time=TIME)
    return folder, contents, (folder / "evidence.zip").read_bytes()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_byte_is_an_error_or_changes_nothing(whole, data):
    folder, contents, content = whole
    changed = bytearray(content)
    changed[data.draw(st.integers(0, len(changed) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "changed.zip").write_bytes(changed)
    try:
        found = read_evidence(folder / "changed.zip")
    except VerificationError:
        return
    # A compressed file ends with up to seven bits that mean nothing.
    assert dict(found.files) == contents


@pytest.mark.parametrize("left", [0, 1, 2, 40, 200, -1])
def test_a_zip_that_was_cut_off_is_a_damaged_zip_and_never_read_as_a_ledger(written, left):
    written.write_bytes(written.read_bytes()[:left])
    with pytest.raises(VerificationError, match=r"evidence\.zip: a damaged zip"):
        read_evidence(written)


@pytest.mark.parametrize("where", ["before", "after", "comment", "between"])
def test_bytes_that_belong_to_no_file_are_refused_and_so_is_a_zip_that_was_packed_anew(written, where):
    content = written.read_bytes()
    if where == "before":
        written.write_bytes(b"dear diary" + content)
    elif where == "after":
        written.write_bytes(content + b"dear diary")
    elif where == "comment":
        with zipfile.ZipFile(written, "a") as archive:
            archive.comment = b"dear diary"
    else:
        rewritten(written, lambda contents: None)
    with pytest.raises(VerificationError, match="belong to no file"):
        read_evidence(written)


def test_a_zip_that_was_unpacked_is_read_as_a_folder(written, files, tmp_path):
    with zipfile.ZipFile(written) as archive:
        archive.extractall(tmp_path / "unpacked")
    assert dict(read_evidence(tmp_path / "unpacked").files) == files[0]


def test_a_run_that_goes_on_is_read_in_the_order_that_contradicts_nothing():
    names = in_reading_order(["receipts.jsonl", "ledger.jsonl", "rounds.jsonl", "counts.jsonl"])
    assert names == ["rounds.jsonl", "counts.jsonl", "ledger.jsonl", "receipts.jsonl"]


def test_a_name_that_is_not_on_the_list_is_never_written(tmp_path, files, key):
    for extra in ("adapter.safetensors", "users.parquet", "manifest.json"):
        with pytest.raises(ValueError, match="closed list"):
            write_evidence(
                tmp_path / "x.zip", files[0] | {extra: b""}, role="device", head=files[1], key=key, time=TIME
            )


def test_a_file_that_unpacks_to_too_much_is_refused(written):
    def bomb(contents):
        contents["spec.json"] = b" " * (3 << 20)

    with pytest.raises(VerificationError, match="larger"):
        read_evidence(rewritten(written, bomb))


def test_nothing_and_nonsense_are_told_apart(tmp_path):
    with pytest.raises(DataError, match="no evidence here"):
        read_evidence(tmp_path / "absent.zip")
    with pytest.raises(DataError, match="no ledger"):
        read_evidence(tmp_path)
    (tmp_path / "lines").write_bytes(b"[1]\n")
    with pytest.raises(VerificationError, match="JSON object"):
        read_evidence(tmp_path / "lines").lines("ledger.jsonl")


def test_a_commitment_binds_the_receipts_whatever_their_order_and_hides_them_behind_its_salt():
    receipts = ["b" * 64, "a" * 64]
    assert commitment("00" * 32, receipts) == commitment("00" * 32, receipts[::-1])
    others = {commitment("00" * 32, receipts[:1]), commitment("01" * 32, receipts), commitment("00" * 32, [])}
    assert len(others | {commitment("00" * 32, receipts)}) == 4
