"""A roster that the coordinator makes up does not pass, whatever it makes up."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Refusal, VerificationError
from common.keys import SigningKey
from common.vouched_roster import (
    Grant,
    Vouched,
    VouchedRoster,
    check_enrolment,
    enrolment,
    federation_of,
    invite_key,
)

FEDERATION = federation_of("-----BEGIN CERTIFICATE-----\nabc\n-----END CERTIFICATE-----\n")
TOKEN = "a-token-of-thirty-two-characters-or-more"
ENROLLER = SigningKey(bytes(range(32)))
KEYS = [SigningKey(bytes([number]) * 32) for number in range(1, 6)]


def grant(token=TOKEN, uses=5, enroller=ENROLLER, federation=FEDERATION):
    return Grant.sign(enroller, federation, invite_key(token).verify_key.hex, uses)


def roster(keys=KEYS, token=TOKEN, **changes):
    devices = [Vouched.sign(token, FEDERATION, key) for key in keys]
    return VouchedRoster.of({(one := grant(token, **changes)).invite: one}, {device.key: device for device in devices})


def check(found, **changes):
    own = {
        "enroller": ENROLLER.verify_key.hex,
        "federation": FEDERATION,
        "own": KEYS[0].verify_key.hex,
        "population": len(KEYS),
    }
    found.check(**(own | changes))


def refused(found, **changes):
    with pytest.raises(Refusal) as refusal:
        check(found, **changes)
    assert refusal.value.code == "unknown-key"
    return str(refusal.value)


def test_a_roster_of_vouched_devices_passes_and_comes_back_byte_for_byte():
    found = roster()
    check(found)
    again = VouchedRoster.from_bytes(found.to_bytes())
    assert again == found
    assert again.digest == found.digest
    assert again.keys == {key.verify_key.hex for key in KEYS}


def test_a_device_that_the_coordinator_made_up_is_not_vouched_for():
    made_up = SigningKey(bytes([9]) * 32)
    # Without the token it can sign with any key but the invite's.
    false = Vouched.sign("some-token-that-the-coordinator-made-up", FEDERATION, made_up)
    honest = roster(KEYS[:4])
    both = VouchedRoster(honest.grants, tuple(sorted((*honest.devices, false), key=lambda one: one.key)))
    assert "vouches" in refused(both)
    posing = replace(false, invite=honest.grants[0].invite)
    assert "vouches" in refused(
        replace(both, devices=tuple(sorted((*honest.devices, posing), key=lambda one: one.key)))
    )


def test_an_invite_that_the_coordinator_made_up_was_not_signed_by_the_enroller():
    assert "vouches" in refused(roster(enroller=SigningKey(bytes([7]) * 32)))


def test_an_invite_lets_in_no_more_devices_than_the_enroller_allowed():
    assert "more devices" in refused(roster(uses=4))
    raised = roster(uses=4)
    (one,) = raised.grants
    assert "vouches" in refused(replace(raised, grants=(replace(one, uses=5),)))


def test_a_roster_is_for_this_device_this_federation_and_this_population():
    assert "this device" in refused(roster(), own=SigningKey(bytes([8]) * 32).verify_key.hex)
    assert "vouches" in refused(roster(), federation=federation_of("another"))
    assert "calibrated for 6" in refused(roster(), population=6)
    found = roster()
    assert "twice" in refused(replace(found, devices=(*found.devices[:4], found.devices[3])))
    assert "order" in refused(replace(found, devices=found.devices[::-1]))


def test_a_device_that_holds_a_voucher_for_another_key_is_not_let_in():
    found = roster()
    swapped = replace(found.devices[1], voucher=found.devices[0].voucher)
    assert "vouches" in refused(replace(found, devices=(found.devices[0], swapped, *found.devices[2:])))


@given(st.data())
def test_every_changed_digit_of_a_roster_is_noticed(data):
    plain = json.loads(roster().to_bytes())
    place = data.draw(st.sampled_from(["grants", "devices"]))
    one = plain[place][data.draw(st.integers(0, len(plain[place]) - 1))]
    name = data.draw(st.sampled_from([key for key, value in one.items() if isinstance(value, str)]))
    at = data.draw(st.integers(0, len(one[name]) - 1))
    digit = data.draw(st.sampled_from([digit for digit in "0123456789abcdef" if digit != one[name][at]]))
    one[name] = one[name][:at] + digit + one[name][at + 1 :]
    changed = VouchedRoster.from_bytes(json.dumps(plain).encode())
    assert changed.digest != roster().digest
    refused(changed)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 100_000,
        b'{"format": 2, "grants": [], "devices": []}',
        b'{"format": 1, "grants": [{}], "devices": []}',
        b'{"format": 1, "grants": [], "devices": [{"key": 1}]}',
        b'{"format": 1, "grants": 7, "devices": []}',
        b" " * (5 << 20),
    ],
)
def test_what_is_no_roster_is_said_so(content):
    with pytest.raises(VerificationError):
        VouchedRoster.from_bytes(content)


def test_a_device_of_another_form_is_none():
    good = asdict(roster().devices[0])
    for change in ({"key": "ab"}, {"voucher": "z" * 128}, {"joined": None}, {"more": "x"}):
        with pytest.raises(VerificationError):
            Vouched.from_plain(good | change)


def test_a_device_enrols_without_telling_the_token_and_nobody_enrols_with_what_a_roster_shows():
    proof = enrolment(TOKEN, FEDERATION, KEYS[0], "device-1")
    assert TOKEN not in json.dumps(proof)
    vouched = check_enrolment(proof, FEDERATION, "device-1")
    assert vouched in roster().devices
    assert vouched.key == KEYS[0].verify_key.hex
    seen = {"vouched": asdict(vouched), "by_invite": vouched.voucher, "by_key": vouched.joined}
    other = enrolment(TOKEN, FEDERATION, KEYS[1], "device-2")
    for false, device in (
        (proof, "device-2"),  # a recorded one, with another device's key
        (seen, "device-2"),
        (proof | {"by_key": other["by_key"]}, "device-1"),
        (proof | {"by_invite": other["by_invite"]}, "device-1"),
        (proof | {"vouched": other["vouched"]}, "device-1"),
        ({}, "device-1"),
        (None, "device-1"),
        (proof | {"by_key": "zz"}, "device-1"),
    ):
        with pytest.raises(VerificationError):
            check_enrolment(false, FEDERATION, device)
    with pytest.raises(VerificationError):
        check_enrolment(proof, federation_of("another"), "device-1")
