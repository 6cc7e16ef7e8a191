"""Keys, tickets and sessions: what is shown in time is admitted, and nothing else."""

from __future__ import annotations

import pytest

from client.device_home import DeviceHome
from client.owner_access import SESSION_SECONDS, TICKET_SECONDS, Access
from common.errors import Refusal


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return DeviceHome.open(create=True)


@pytest.fixture
def clock():
    return [100.0]


@pytest.fixture
def access(home, clock):
    return Access(home, clock=lambda: clock[0])


def test_the_key_outlives_a_restart_and_stands_nowhere_on_disk(home, access):
    assert Access(home).key == access.key
    assert Access(home).admits(access.key)
    files = [path.read_bytes() for path in home.folder.rglob("*") if path.is_file()]
    assert not any(access.key[3:].encode() in content for content in files)


def test_a_renewed_key_ends_the_one_before(home, access):
    before = access.key
    after = access.renew_key()
    assert before != after
    assert not Access(home).admits(before)
    assert Access(home).admits(after)


def test_no_earlier_key_comes_back_when_the_device_forgets(home, access):
    first = access.key
    access.renew_key()
    (home.folder / "owner.json").unlink()
    assert access.key != first
    assert not access.admits(first)


def test_a_ticket_is_good_once_and_for_ten_minutes(access, clock):
    ticket = access.ticket()
    session = access.redeem(ticket)
    assert access.admits(session)
    with pytest.raises(Refusal):
        access.redeem(ticket)
    late = access.ticket()
    clock[0] += TICKET_SECONDS + 1
    with pytest.raises(Refusal):
        access.redeem(late)


@pytest.mark.parametrize("shown", ["", "é", "\ud800"])
def test_a_ticket_of_any_letters_is_refused_and_breaks_nothing(access, shown):
    access.ticket()
    with pytest.raises(Refusal):
        access.redeem(shown)


def test_a_session_ends_when_it_is_not_used_and_with_the_process(home, access, clock):
    session = access.redeem(access.ticket())
    clock[0] += SESSION_SECONDS - 1
    assert access.admits(session)  # and is good for as long again
    clock[0] += SESSION_SECONDS - 1
    assert access.admits(session)
    clock[0] += SESSION_SECONDS + 1
    assert not access.admits(session)
    assert not Access(home).admits(access.redeem(access.ticket()))


@pytest.mark.parametrize("shown", ["", "hs-", "\u2603", "hs-" + "0" * 64])
def test_nothing_else_is_admitted(access, shown):
    assert not access.admits(shown)
    with pytest.raises(Refusal):
        access.redeem(shown)
    assert not access.admits(access.ticket())  # a ticket is no session
