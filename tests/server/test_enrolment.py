"""Invites and devices: each token as often as it says, each device once, nobody back who was sent away."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from common.errors import ConfigError, DataError, Refusal, StoreError
from common.fleet import device_id
from common.keys import SigningKey
from common.vouched_roster import Grant, Vouched, federation_of
from server.enrolment import Enrolment

NOW = datetime(2026, 11, 22, tzinfo=UTC)


@pytest.fixture
def enrolment(tmp_path):
    return Enrolment(tmp_path / "devices.sqlite")


def invited(enrolment, *, uses=1, approves=True, days=7):
    return enrolment.invite(uses=uses, now=NOW, expires=NOW + timedelta(days=days), approves=approves)


def key(number):
    return b"key of device %d" % number


def subject(number):
    return f"{number:032x}"


def enrol(enrolment, token, number, *, now=NOW):
    return enrolment.enrol(token, key(number), "0.1.0", subject(number), now=now)


def test_an_invite_lets_as_many_in_as_it_says_and_each_once(enrolment):
    token = invited(enrolment, uses=3)
    for _ in range(2):
        assert [enrol(enrolment, token, number).state for number in range(3)] == ["approved"] * 3
    with pytest.raises(Refusal) as refused:
        enrol(enrolment, token, 3)
    assert refused.value.code == "used-up"
    (kept,) = enrolment.invites()
    assert (kept.uses, kept.used) == (3, 3)


@pytest.mark.parametrize(("token", "days", "code"), [("wrong" * 9, 0, "unknown-token"), (None, 8, "expired")])
def test_a_wrong_or_an_old_token_lets_nobody_in(enrolment, token, days, code):
    token = token or invited(enrolment)
    with pytest.raises(Refusal) as refused:
        enrol(enrolment, token, 1, now=NOW + timedelta(days=days))
    assert refused.value.code == code
    assert enrolment.devices() == ()


def test_the_token_itself_is_not_kept(enrolment, tmp_path):
    token = invited(enrolment)
    enrol(enrolment, token, 1)
    assert all(token.encode() not in path.read_bytes() for path in tmp_path.iterdir())


def test_a_device_waits_where_each_is_approved(enrolment):
    device = enrol(enrolment, invited(enrolment, approves=False), 1)
    assert device.state == "pending"
    assert enrolment.set_state(device.id[:5], "approved").state == "approved"


@pytest.mark.parametrize("state", ["revoked", "left"])
def test_who_is_gone_does_not_come_back_under_the_same_key(enrolment, state):
    token = invited(enrolment, uses=5)
    device = enrol(enrolment, token, 1)
    enrolment.set_state(device.id, state)
    with pytest.raises(Refusal):
        enrol(enrolment, token, 1)
    with pytest.raises(Refusal):
        enrolment.set_state(device.id, "approved")
    again = enrolment.enrol(token, b"a new key", "0.1.0", subject(1), now=NOW)
    assert again.state == "approved"


def test_one_device_per_subject(enrolment):
    token = invited(enrolment, uses=5)
    enrol(enrolment, token, 1)
    with pytest.raises(Refusal) as refused:
        enrolment.enrol(token, key(2), "0.1.0", subject(1), now=NOW)
    assert refused.value.code == "subject-taken"


def test_a_name_that_none_or_two_answer_to_is_refused(enrolment):
    with pytest.raises(DataError, match="0 devices"):
        enrolment.set_state("ab", "revoked")
    token = invited(enrolment, uses=17)
    names = [enrol(enrolment, token, number).id for number in range(17)]
    shared = next(name[0] for name in names if sum(other[0] == name[0] for other in names) > 1)  # 17 names, 16 digits
    with pytest.raises(DataError, match=r"^([2-9]|1\d) devices"):
        enrolment.set_state(shared, "revoked")


def test_a_name_that_is_empty_is_not_the_only_device_that_there_is(enrolment):
    enrol(enrolment, invited(enrolment), 1)
    with pytest.raises(DataError, match="name a device"):
        enrolment.set_state("", "revoked")
    assert [device.state for device in enrolment.devices()] == ["approved"]


def head(index, *, ledger="aa" * 32, digest="bb" * 32):
    return {"ledger": ledger, "index": index, "hash": digest}


def test_what_a_device_says_is_noted_to_the_minute(enrolment):
    device = enrol(enrolment, invited(enrolment), 1)
    enrolment.note_call(device.id, "0.2.0", "policy-trust", head(3), now=NOW + timedelta(seconds=59))
    found = enrolment.device(device.id)
    assert (found.seen, found.version, found.verdict) == (NOW.isoformat(timespec="minutes"), "0.2.0", "policy-trust")
    assert not found.rolled_back


@pytest.mark.parametrize(
    "later", [head(2), head(3, digest="cc" * 32), head(9, ledger="dd" * 32)], ids=["older", "other", "begun anew"]
)
def test_a_device_that_shows_an_older_ledger_is_noticed(enrolment, later):
    device = enrol(enrolment, invited(enrolment), 1)
    enrolment.note_call(device.id, "0.1.0", "", head(3), now=NOW)
    enrolment.note_call(device.id, "0.1.0", "", head(3), now=NOW)
    assert not enrolment.device(device.id).rolled_back
    enrolment.note_call(device.id, "0.1.0", "", later, now=NOW)
    enrolment.note_call(device.id, "0.1.0", "", head(4), now=NOW)
    assert enrolment.device(device.id).rolled_back


def test_who_was_turned_away_is_counted_by_reason(enrolment):
    for code in ("expired", "revoked", "expired"):
        enrolment.note_refused(code, now=NOW)
    assert enrolment.refused() == {"expired": 2, "revoked": 1}
    assert device_id(key(1)) not in {device.id for device in enrolment.devices()}


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "devices.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(StoreError):
        Enrolment(tmp_path / "devices.sqlite")


FEDERATION, ENROLLER = federation_of("an authority"), SigningKey(bytes([7]) * 32)


def granted(enrolment, *, uses):
    """An invite whose public key the enroller signed."""
    return enrolment.invite(
        uses=uses,
        now=NOW,
        expires=NOW + timedelta(days=7),
        approves=True,
        grant=lambda invite, times: Grant.sign(ENROLLER, FEDERATION, invite, times),
    )


def vouched_for(enrolment, token, number, own):
    vouched = Vouched.sign(token, FEDERATION, SigningKey(bytes([own]) * 32))
    return enrolment.enrol("", key(number), "0.1.0", subject(number), now=NOW, vouched=vouched)


def test_devices_enrol_by_the_key_of_an_invite_and_are_in_a_roster_that_others_can_check(enrolment):
    one, other = granted(enrolment, uses=2), granted(enrolment, uses=1)
    for number, token in ((1, one), (2, one), (3, other)):
        assert vouched_for(enrolment, token, number, number).state == "approved"
    with pytest.raises(Refusal) as refused:
        vouched_for(enrolment, other, 4, 4)
    assert refused.value.code == "used-up"
    with pytest.raises(Refusal) as refused:
        vouched_for(enrolment, "a token that nobody made, of thirty characters", 5, 5)
    assert refused.value.code == "unknown-token"
    roster = enrolment.roster([subject(number) for number in (1, 2, 3)])
    assert len(roster.grants) == 2
    own = SigningKey(bytes([1]) * 32).verify_key.hex
    roster.check(enroller=ENROLLER.verify_key.hex, federation=FEDERATION, own=own, population=3)
    assert len(enrolment.roster([subject(1)]).devices) == 1
    enrolment.set_state(device_id(key(2)), "revoked")
    assert len(enrolment.roster([subject(number) for number in (1, 2, 3)]).devices) == 2


def test_no_roster_is_made_over_a_device_that_nobody_vouches_for_or_over_one_key_twice(enrolment):
    token = granted(enrolment, uses=3)
    vouched_for(enrolment, token, 1, 1)
    enrol(enrolment, invited(enrolment), 2)  # as an older version did
    with pytest.raises(ConfigError, match="join again"):
        enrolment.roster([subject(1), subject(2)])
    vouched_for(enrolment, token, 3, 1)
    with pytest.raises(ConfigError, match="one enrolment key"):
        enrolment.roster([subject(1), subject(3)])
