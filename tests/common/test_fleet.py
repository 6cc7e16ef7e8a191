"""Invites, and requests that a device signs: each passes once, within five minutes, unchanged."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError, Refusal
from common.fleet import FORMAT, Asks, Base, Invite, RequestGuard, device_id, public_bytes, reply_object, signed_headers
from server.certificates import Authority

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
KEY = ec.generate_private_key(ec.SECP384R1())
PATH, BODY = "/v1/homespun/standing", b'{"format": 1}'


@pytest.fixture(scope="module")
def invite(tmp_path_factory):
    authority = Authority.open(tmp_path_factory.mktemp("tls") / "tls", now=NOW)
    asks = Asks(
        unit="user",
        noise="central",
        clip=1.0,
        noise_multiplier=1.2,
        sampling_rate=0.5,
        rounds=7,
        population=10,
        epsilon="8.0",
        delta=1e-5,
    )
    return Invite(
        format=FORMAT,
        name="a federation",
        address="fleet.example.org:9443",
        authority=authority.root.read_text(),
        writer="ab" * 32,
        token="t" * 43,
        expires=NOW + timedelta(days=7),
        asks=asks,
        base=Base(digest="cd" * 32, name="small"),
    )


def test_an_invite_comes_back_from_its_file_and_expires(invite, tmp_path):
    path = tmp_path / "invite.json"
    path.write_text(invite.to_text())
    assert Invite.load(path) == invite
    assert not invite.has_expired(NOW + timedelta(days=6))
    assert invite.has_expired(NOW + timedelta(days=7))


def test_what_a_later_minor_version_adds_is_left_alone(invite, tmp_path):
    values = json.loads(invite.to_text())
    values["colour"] = "green"
    values["asks"]["hours"] = ["22:00-06:00"]
    path = tmp_path / "invite.json"
    path.write_text(json.dumps(values))
    assert Invite.load(path) == invite


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": 2}, "format 2"),
        ({"authority": "no certificate"}, "authority"),
        ({"address": "fleet.example.org"}, "address"),
        ({"address": "fleet.example.org/x:1"}, "address"),
        ({"token": "short"}, "token"),
        ({"asks": {}}, "asks"),
        ({"base": {"digest": "no", "name": "x"}}, "base"),
    ],
)
def test_what_is_no_invite_is_refused_by_the_name_of_its_field(invite, tmp_path, change, says):
    path = tmp_path / "invite.json"
    path.write_text(json.dumps({**json.loads(invite.to_text()), **change}))
    with pytest.raises(DataError, match=says):
        Invite.load(path)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", "\x00"])
def test_a_file_that_is_something_else_is_refused(tmp_path, content):
    path = tmp_path / "invite.json"
    path.write_text(content)
    with pytest.raises(DataError):
        Invite.load(path)


def test_a_signed_request_says_whose_it_is():
    headers = signed_headers(KEY, PATH, BODY, now=NOW)
    public = RequestGuard().check(headers, PATH, BODY, now=NOW)
    assert public == public_bytes(KEY.public_key())
    assert device_id(public) == device_id(public_bytes(KEY.public_key()))


def test_a_recorded_request_does_not_pass_twice():
    guard, headers = RequestGuard(), signed_headers(KEY, PATH, BODY, now=NOW)
    guard.check(headers, PATH, BODY, now=NOW)
    for later in (0, 1, 299):
        with pytest.raises(Refusal) as refused:
            guard.check(headers, PATH, BODY, now=NOW + timedelta(seconds=later))
        assert refused.value.code == "repeated"
    with pytest.raises(Refusal) as refused:  # and when it is forgotten, its time is over
        guard.check(headers, PATH, BODY, now=NOW + timedelta(seconds=700))
    assert refused.value.code == "clock"


@pytest.mark.parametrize("seconds", [-301, 301, 86400])
def test_a_request_of_another_time_is_refused(seconds):
    headers = signed_headers(KEY, PATH, BODY, now=NOW)
    with pytest.raises(Refusal) as refused:
        RequestGuard().check(headers, PATH, BODY, now=NOW + timedelta(seconds=seconds))
    assert refused.value.code == "clock"


@given(st.sampled_from(["path", "body", "x-homespun-key", "x-homespun-time", "x-homespun-nonce"]), st.data())
def test_a_request_that_was_changed_anywhere_is_refused(part, data):
    headers, path, body = signed_headers(KEY, PATH, BODY, now=NOW), PATH, BODY
    if part == "path":
        path = path + "x"
    elif part == "body":
        place = data.draw(st.integers(0, 8 * len(body) - 1))
        changed = bytearray(body)
        changed[place // 8] ^= 1 << place % 8
        body = bytes(changed)
    else:
        place = data.draw(st.integers(0, len(headers[part]) - 1))
        text = headers[part]
        other = data.draw(st.sampled_from([sign for sign in "0123456789abcdefgh+" if sign != text[place]]))
        headers[part] = text[:place] + other + text[place + 1 :]
    with pytest.raises(Refusal):
        RequestGuard().check(headers, path, body, now=NOW)


def test_a_key_of_any_other_kind_is_refused_and_never_an_error_of_the_library():
    """A sign changed in a key's name of its kind makes a key that the library knows nothing of."""
    headers = signed_headers(KEY, PATH, BODY, now=NOW)
    text = headers["x-homespun-key"]
    for place in range(len(text)):
        for other in {"0", "A", "z", "+", "/"} - {text[place]}:
            changed = text[:place] + other + text[place + 1 :]
            with pytest.raises(Refusal):
                RequestGuard().check(headers | {"x-homespun-key": changed}, PATH, BODY, now=NOW)


def test_another_devices_signature_is_not_mine():
    theirs = ec.generate_private_key(ec.SECP384R1())
    headers = signed_headers(theirs, PATH, BODY, now=NOW)
    headers["x-homespun-key"] = signed_headers(KEY, PATH, BODY, now=NOW)["x-homespun-key"]
    with pytest.raises(Refusal) as refused:
        RequestGuard().check(headers, PATH, BODY, now=NOW)
    assert refused.value.code == "bad-signature"


def test_numbers_are_forgotten_when_their_time_is_over():
    guard = RequestGuard()
    for second in range(0, 3000, 10):
        guard.once(b"key", str(second), NOW + timedelta(seconds=second))
    assert len(guard._seen) <= 62


@pytest.mark.parametrize("content", [b"", b"[]", b'{"format": 2}', b"[" * 100_000, b'"x"', b"{}"])
def test_a_message_of_another_format_is_refused(content):
    with pytest.raises(DataError):
        reply_object(content)
