"""`homespun device join` and its kin, against a coordinator's door: plain words, a yes, and every no."""

from __future__ import annotations

import json
import os
import subprocess
from datetime import UTC, datetime, timedelta

import pytest

import homespun
from client.coordinator_calls import Calls
from client.device_home import DeviceHome
from client.fleet_cli import words
from client.membership import FLEET, NODE_KEY, Membership, UsageMeter
from client.policy import Policy
from common.fleet import Invite
from common.model_files import model_digest
from server.certificates import Authority
from server.server_home import ServerHome


@pytest.fixture
def device(tmp_path, monkeypatch):
    """A function that runs `homespun device ...` in the home of one device."""

    def run(*arguments, home="ada"):
        monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / f"home-{home}"))
        return homespun.main(["device", *map(str, arguments)])

    return run


@pytest.fixture
def join(device, tmp_path):
    def run(invite, *more, home="ada"):
        data = ("--data", tmp_path / "people.jsonl", "--user", home)
        return device("join", invite, *data, "--policy", tmp_path / "policy.toml", "--yes", *more, home=home)

    return run


def membership(tmp_path, home="ada"):
    return Membership.load(DeviceHome.open(tmp_path / f"home-{home}" / "device"))


def test_joining_enrols_a_key_that_was_made_here_and_brings_the_model(coordinator, join, tmp_path, capsys):
    assert join(coordinator.invite()) == 0
    joined = membership(tmp_path)
    (known,) = coordinator.enrolment.devices()
    assert (joined.device, joined.status) == (known.id, "approved")
    assert known.subject == joined.home.read_ledger().header["subject"]
    assert model_digest(joined.model) == joined.invite.base.digest
    assert joined.model != coordinator.model
    key = (joined.home.folder / NODE_KEY).read_bytes()
    assert all(key not in path.read_bytes() for path in coordinator.home.folder.rglob("*") if path.is_file())
    assert set(joined.invite.token) == {"0"}  # a token is not kept where it is of no more use
    out = capsys.readouterr().out
    assert "the coordinator sees each of your updates before it adds noise" in out
    assert "The policy grants it." in out


def test_what_is_asked_stands_beside_what_is_granted(coordinator):
    asked = Invite.load(coordinator.invite())
    text = "\n".join(words(asked, Policy.model_validate({})))
    for part in ("no text", "epsilon, whole run", "8.0", "2 of 4", "at least 20", "central", "only this device"):
        assert part in text
    assert "would refuse, policy-trust" in text
    granting = Policy.model_validate({"trust_coordinator": True, "smallest_cohort": 2})
    assert "would refuse" not in "\n".join(words(asked, granting))
    silo = asked.model_copy(update={"asks": asked.asks.model_copy(update={"noise": "local"})})
    assert "your device adds the noise" in "\n".join(words(silo, granting))


def test_secure_sums_are_asked_for_with_what_holds_against_the_coordinator(coordinator):
    asked = Invite.load(coordinator.invite())
    numbers = {"noise": "distributed", "coordinator_epsilon": "12.5", "coordinator_noise_multiplier": 0.6}
    sums = asked.model_copy(update={"asks": asked.asks.model_copy(update=numbers)})
    text = "\n".join(words(sums, Policy.model_validate({"smallest_cohort": 2})))
    for part in ("12.5", "0.600", "a share of the noise and a mask", "would refuse, policy-epsilon"):
        assert part in text
    granting = Policy.model_validate({"smallest_cohort": 2, "epsilon": 13.0})
    assert "The policy grants it." in "\n".join(words(sums, granting))


def test_nobody_joins_without_a_yes(coordinator, device, tmp_path, capsys):
    assert device("join", coordinator.invite()) == 3
    assert "--yes" in capsys.readouterr().err
    assert coordinator.enrolment.devices() == ()
    assert not (tmp_path / "home-ada" / "device" / FLEET).exists()


def test_an_invite_is_used_up_and_a_device_joins_once(coordinator, join, capsys):
    invite = coordinator.invite(uses=1)
    assert join(invite) == 0
    assert join(invite) == 3
    assert "leave" in capsys.readouterr().err
    assert join(invite, home="bela") == 3
    assert "used-up: the invite let in as many devices" in capsys.readouterr().err


@pytest.mark.parametrize(("lasts", "says"), [(timedelta(seconds=-1), "the invite was good until")])
def test_an_invite_that_is_over_is_refused_before_anything_is_made(coordinator, join, tmp_path, lasts, says, capsys):
    assert join(coordinator.invite(lasts=lasts)) == 3
    assert says in capsys.readouterr().err
    assert not (tmp_path / "home-ada").exists()


def test_a_coordinator_of_another_authority_is_not_spoken_to(coordinator, join, tmp_path, capsys):
    other = Authority.open(tmp_path / "other", now=datetime.now(UTC))
    path = coordinator.invite()
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "authority": other.root.read_text()}))
    assert join(path) == 3
    assert "not the coordinator that the invite names" in capsys.readouterr().err
    assert coordinator.enrolment.devices() == ()
    assert coordinator.enrolment.refused() == {}  # not a byte of the request arrived


def test_a_coordinator_that_is_away_costs_nothing(quiet_coordinator, join, capsys):
    invite = quiet_coordinator.invite()
    assert join(invite) == 1
    assert "does not answer" in capsys.readouterr().err
    with quiet_coordinator.listening():
        assert join(invite) == 0


def test_another_model_than_the_invite_names_is_refused(coordinator, join, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    for path in coordinator.model.iterdir():
        (other / path.name).write_bytes(path.read_bytes() + (b" " if path.name == "config.json" else b""))
    assert join(coordinator.invite(), "--model", other) == 3
    assert "another model" in capsys.readouterr().err
    assert coordinator.enrolment.devices() == ()
    assert join(coordinator.invite(), "--model", coordinator.model) == 0


def test_a_model_beyond_the_days_megabytes_is_fetched_as_far_as_they_go(coordinator, join, device, tmp_path, capsys):
    with (tmp_path / "policy.toml").open("a") as file:
        file.write("megabytes_per_day = 0.03\n")
    assert join(coordinator.invite()) == 0
    assert "megabytes_per_day" in capsys.readouterr().out
    (place,) = (tmp_path / "home-ada" / "cache" / "models").iterdir()
    assert place.name.endswith(".part")  # nobody takes half a model for a model
    assert 0 < sum(path.stat().st_size for path in place.iterdir()) <= 30_000
    assert not list(place.glob("*.safetensors"))
    joined = membership(tmp_path)
    assert UsageMeter(joined.home.folder).today().megabytes_today == pytest.approx(0.03, abs=0.005)
    assert not Calls(joined).until_ready(joined).model.is_dir()  # no more today

    (joined.home.folder / "usage.json").unlink()  # tomorrow, and the owner granted a little more
    joined.home.grant(joined.home.policy().model_copy(update={"megabytes_per_day": 1.0}))
    ready = Calls(joined).until_ready(joined)
    assert model_digest(ready.model) == joined.invite.base.digest
    size = sum(path.stat().st_size for path in ready.model.iterdir()) / 1e6
    assert size - 0.03 < UsageMeter(joined.home.folder).today().megabytes_today < size  # what was here came once


def test_a_device_waits_where_the_operator_approves_each(coordinator, join, device, tmp_path, capsys):
    assert join(coordinator.invite(approves=False)) == 0
    assert "the operator has to approve" in capsys.readouterr().out
    assert membership(tmp_path).status == "pending"
    (known,) = coordinator.enrolment.devices()
    assert known.state == "pending"


def test_status_says_what_this_device_is_part_of(coordinator, join, device, tmp_path, capsys):
    assert device("status") == 1
    assert join(coordinator.invite()) == 0
    capsys.readouterr()
    assert device("status", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["state"], facts["up"], facts["isolated"]) == ("approved", False, False)
    assert facts["today"]["megabytes"] > 0.01  # the base model
    assert device("status") == 0
    out = capsys.readouterr().out
    assert "not isolated" in out
    assert "Nothing was released" in out


def test_pause_resume_and_leave(coordinator, join, device, tmp_path, capsys):
    invite = coordinator.invite()
    assert join(invite) == 0
    assert device("pause") == 0
    assert membership(tmp_path).status == "paused"
    assert device("resume") == 0
    assert membership(tmp_path).status == "approved"
    before = membership(tmp_path).device
    subject = membership(tmp_path).home.read_ledger().header["subject"]
    assert device("leave", "--yes") == 0
    (known,) = coordinator.enrolment.devices()
    assert known.state == "left"
    assert device("pause") == 3
    assert join(invite) == 0  # with another key, for the same subject
    assert membership(tmp_path).device != before
    assert membership(tmp_path).home.read_ledger().header["subject"] == subject
    assert [one.state for one in coordinator.enrolment.devices()] == ["left", "approved"]


def test_leaving_a_coordinator_that_is_gone_is_leaving_all_the_same(quiet_coordinator, join, device, tmp_path, capsys):
    with quiet_coordinator.listening():
        assert join(quiet_coordinator.invite()) == 0
    assert device("leave", "--yes") == 0
    assert "was not told" in capsys.readouterr().out
    assert membership(tmp_path).status == "left"


def test_a_device_that_joined_nothing_comes_up_for_its_owner_alone(device, tmp_path, monkeypatch):
    became = []
    monkeypatch.setattr(os, "execv", lambda path, command: became.append((path, command)))
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: became.append(command) or Ended())
    DeviceHome.open(tmp_path / "home-ada" / "device", create=True)
    assert device("up", "--detach") == 1  # what was started has ended at once, and the log is named
    assert device("down") == 0
    assert device("up", "--user", "ada") == 2
    assert device("up", "--socket", tmp_path / "vault.sock") == 2
    assert "supervise" in became[0][2]


class Ended:
    """A process that is over."""

    pid = 0

    def poll(self):
        return 1


@pytest.mark.slow
def test_fifty_devices_join_unattended_from_one_invite(coordinator, tmp_path, monkeypatch, capsys):
    invite = coordinator.invite(uses=50)
    for number in range(50):
        monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / f"fleet-{number}"))
        policy = ("--policy", str(tmp_path / "policy.toml"), "--model", str(coordinator.model))
        assert homespun.main(["device", "join", str(invite), *policy, "--yes"]) == 0
    assert len({one.subject for one in coordinator.enrolment.devices()}) == 50
    assert {one.state for one in coordinator.enrolment.devices()} == {"approved"}
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "fleet-50"))
    assert homespun.main(["device", "join", str(invite), "--model", str(coordinator.model), "--yes"]) == 3


def test_the_coordinators_home_is_its_own(coordinator):
    assert ServerHome.open(coordinator.home.folder).settings()["address"].startswith("localhost:")


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"epsilon = = 3", "line 1"), (b"\xff", "not UTF-8"), (b"epsilon = 'lots'\nfoo = 1", "foo: unknown key")],
)
def test_a_policy_that_is_none_is_refused_by_the_name_of_its_file(
    quiet_coordinator, device, tmp_path, capsys, content, says
):
    (tmp_path / "mine.toml").write_bytes(content)
    assert device("join", quiet_coordinator.invite(), "--policy", tmp_path / "mine.toml", "--yes") == 2
    err = capsys.readouterr().err
    assert f"{tmp_path / 'mine.toml'}: " in err
    assert says in err


def test_an_invite_that_is_a_list_names_no_field(tmp_path, device, capsys):
    (tmp_path / "list.json").write_text("[]")
    assert device("join", tmp_path / "list.json", "--yes") == 1
    assert capsys.readouterr().err.strip().endswith("list.json: not an invite")
