"""What a device keeps of its federation, what today cost, and whether it is plugged in."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization

from client.device_home import DeviceHome
from client.membership import FLEET, NODE_KEY, Membership, UsageMeter, node_key, on_mains_power
from common.errors import DataError, StoreError
from common.fleet import Invite


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return DeviceHome.open(tmp_path / "device", create=True)


@pytest.fixture
def joined(home, quiet_coordinator):
    invite = Invite.load(quiet_coordinator.invite())
    return Membership(home, invite, Path("/data.jsonl"), "ada", quiet_coordinator.model, "approved")


def test_a_membership_comes_back_from_its_file_without_the_token(joined, home):
    joined.save()
    found = Membership.load(home)
    assert (found.data, found.user, found.model, found.status) == (joined.data, "ada", joined.model, "approved")
    assert found.invite.authority == joined.invite.authority
    assert joined.invite.token not in (home.folder / FLEET).read_text()
    assert found.save(status="paused").status == Membership.load(home).status == "paused"


def test_a_device_that_joined_nothing_and_a_damaged_file_are_told_apart(joined, home):
    with pytest.raises(DataError, match="device join"):
        Membership.load(home)
    for content in ("{", "[]", '{"format": 9}', '{"format": 1}', '{"format": 1, "invite": {}}'):
        (home.folder / FLEET).write_text(content)
        with pytest.raises(StoreError):
            Membership.load(home)


def test_the_key_is_in_flowers_form_kept_and_renewed_when_asked(home):
    key = node_key(home)
    path = home.folder / NODE_KEY
    assert path.read_bytes().startswith(b"-----BEGIN OPENSSH PRIVATE KEY-----")
    assert path.stat().st_mode & 0o777 == 0o600
    assert serialization.load_ssh_private_key(path.read_bytes(), None).curve.name == "secp384r1"
    same = node_key(home)
    assert same.private_numbers() == key.private_numbers()
    assert node_key(home, renew=True).private_numbers() != key.private_numbers()


def test_standing_is_added_to(joined):
    joined.save()
    assert joined.standing() == {}
    joined.note_standing(called="now", runs=[])
    joined.note_standing(called="later")
    assert joined.standing() == {"called": "later", "runs": []}


def test_usage_is_counted_by_day_and_survives_a_restart(tmp_path):
    now = datetime(2026, 11, 22, 23, 59)
    meter = UsageMeter(tmp_path, now=lambda: now)
    meter.add(minutes=2.0)
    meter.add(minutes=1.0, megabytes=5.0)
    again = UsageMeter(tmp_path, now=lambda: now)
    assert (again.today().minutes_today, again.today().megabytes_today) == (3.0, 5.0)
    assert again.today().local_time == now
    now += timedelta(minutes=2)
    assert (again.today().minutes_today, again.today().megabytes_today) == (0.0, 0.0)
    (tmp_path / "usage.json").write_text("{")
    assert again.today().minutes_today == 0.0


@pytest.mark.parametrize(
    ("supplies", "plugged_in"),
    [
        ({}, True),
        ({"BAT0": {"type": "Battery"}}, False),
        ({"BAT0": {"type": "Battery"}, "AC": {"type": "Mains", "online": "1"}}, True),
        ({"BAT0": {"type": "Battery"}, "AC": {"type": "Mains", "online": "0"}}, False),
        (
            {"BAT0": {"type": "Battery"}, "AC": {"type": "Mains", "online": "0"}, "U": {"type": "USB", "online": "1"}},
            True,
        ),
        ({"mouse": {"type": "Battery", "scope": "Device"}}, True),
    ],
)
def test_mains_power_is_read_from_the_kernel(tmp_path, supplies, plugged_in):
    for name, words in supplies.items():
        (tmp_path / name).mkdir()
        for word, text in words.items():
            (tmp_path / name / word).write_text(text + "\n")
    assert on_mains_power(tmp_path) is plugged_in
