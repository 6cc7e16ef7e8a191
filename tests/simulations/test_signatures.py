"""A detached signature: who signed, what was signed, and every way to tamper with it."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import homespun
from common.errors import DataError, VerificationError
from common.keys import SigningKey
from simulations.signatures import auditor_key, check_beside, check_signature, sign_file

TIME = "2026-01-31T12:00:00Z"


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "audit.html"
    path.write_text("<p>holds</p>")
    return path


def test_a_signature_says_who_signed_what_and_when(page):
    key = SigningKey.generate()
    sign_file(page, key, name="Jane Doe, data protection officer", time=TIME)
    signed = check_signature(page)
    assert (signed.signer, signed.name, signed.time) == (key.verify_key.hex, "Jane Doe, data protection officer", TIME)


def test_a_file_that_was_changed_afterwards_is_not_what_was_signed(page):
    sign_file(page, SigningKey.generate(), name="", time=TIME)
    page.write_text("<p>holds!</p>")
    with pytest.raises(VerificationError, match="changed after it was signed"):
        check_signature(page)


def test_a_signature_of_another_file_does_not_fit(page):
    other = page.with_name("other.html")
    other.write_bytes(page.read_bytes())
    sign_file(page, SigningKey.generate(), name="", time=TIME).rename(other.with_name("other.html.sig"))
    with pytest.raises(VerificationError, match=r"a file named audit\.html"):
        check_signature(other)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_a_changed_bit_of_the_signature_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("signed")
    page = folder / "audit.html"
    page.write_text("<p>holds</p>")
    target = sign_file(page, SigningKey(bytes(range(32))), name="Jane", time=TIME)
    content = bytearray(target.read_bytes().removesuffix(b"\n"))
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    target.write_bytes(content)
    with pytest.raises(VerificationError):
        check_signature(page)


def test_the_auditors_key_is_made_once_and_is_theirs_alone(tmp_path):
    path = tmp_path / "keys" / "me.key"
    first = auditor_key(path)
    assert auditor_key(path).verify_key == first.verify_key
    assert path.stat().st_mode & 0o077 == 0


def test_data_beside_a_signed_page_that_were_changed_are_found(run, tmp_path, capsys):
    out = tmp_path / "report"
    assert homespun.main(["audit", "report", str(run), "--out", str(out)]) == 0
    assert homespun.main(["audit", "sign", str(out / "audit.html")]) == 0
    assert homespun.main(["audit", "verify", str(out / "audit.html")]) == 0
    data = out / "audit.json"
    data.write_text(data.read_text().replace("holds", "not shown", 1))
    capsys.readouterr()
    assert homespun.main(["audit", "verify", str(out / "audit.html")]) == 4
    assert "audit.json: is not what the signed page audit.html names" in capsys.readouterr().out
    data.unlink()
    check_beside(out / "audit.html")


def test_what_cannot_be_signed_is_said(page, tmp_path):
    with pytest.raises(DataError, match="no such file"):
        sign_file(tmp_path / "absent", SigningKey.generate(), name="", time=TIME)
    with pytest.raises(DataError, match="printable"):
        sign_file(page, SigningKey.generate(), name="a\nb", time=TIME)


def test_verify_checks_what_sign_wrote(page, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    assert homespun.main(["audit", "sign", str(page), "--name", "Jane", "--json"]) == 0
    signer = json.loads(capsys.readouterr().out)[0]["signer"]
    assert homespun.main(["audit", "verify", str(page)]) == 0
    assert f"signed by Jane, key {signer}" in capsys.readouterr().out
    assert homespun.main(["audit", "verify", str(page), "--key", signer]) == 0
    assert homespun.main(["audit", "verify", str(page), "--key", "ab" * 32]) == 4
    page.write_text("<p>contradicted</p>")
    assert homespun.main(["audit", "verify", str(page)]) == 4
