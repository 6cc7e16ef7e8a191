"""Invites, runs and copies of a coordinator, as the operator's commands make them."""

from __future__ import annotations

import json
import stat
import tarfile
from datetime import UTC, datetime, timedelta

import pytest

import homespun
from common.config import RunConfig
from common.errors import ConfigError, DataError, Refusal
from common.fleet import Invite
from common.model_files import model_digest
from server import fleet_runs, operator
from server.certificates import Authority
from server.enrolment import Enrolment
from server.operator import make_invite, new_run, read_duration, settle_address
from server.server_home import ServerHome

NOW = datetime(2026, 11, 22, tzinfo=UTC)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "here"))
    return ServerHome.open(create=True)


@pytest.fixture
def config_file(tmp_path, tiny_base_folder):
    path = tmp_path / "run.toml"
    path.write_text(f'model = "{tiny_base_folder}"\ncohort = 2\nrounds = 3\nmax_tokens = 16\n')
    return path


def enrol(home, count):
    enrolment = Enrolment(home.devices)
    token = enrolment.invite(uses=count, now=NOW, expires=NOW + timedelta(days=1), approves=True)
    return [enrolment.enrol(token, b"key %d" % n, "0.1.0", f"{n:032x}", now=NOW) for n in range(count)]


def invite(home, config, **options):
    fields = {
        "uses": 5,
        "lasts": timedelta(days=7),
        "approves": True,
        "sources": ("coordinator",),
        "version": "0.1.0",
        "now": NOW,
    }
    return make_invite(home, config, **(fields | options))


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("2m", 120), ("12h", 43200), ("7d", 604800), ("4w", 2419200)]
)
def test_times_are_read(text, seconds):
    assert read_duration(text).total_seconds() == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "0d", "-1d", "7 d", "7y", "1.5h"])
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ConfigError):
        read_duration(text)


def test_an_address_is_kept_and_not_changed_under_devices(home):
    settle_address(home, None, None)
    assert home.settings()["listen"] == "127.0.0.1:9443"
    settle_address(home, "fleet.example.org:9443", None)
    settle_address(home, None, "10.0.0.1:443")
    assert (home.settings()["address"], home.settings()["listen"]) == ("fleet.example.org:9443", "10.0.0.1:443")
    settle_address(home, "fleet.example.org:9444", None)
    assert home.settings()["listen"] == "10.0.0.1:443"  # it was chosen
    settle_address(home, "fleet.example.org:9443", None)
    enrol(home, 1)
    with pytest.raises(Refusal):
        settle_address(home, "elsewhere.example.org:9443", None)
    for wrong in ("no-port", "fleet.example.org:99999"):
        with pytest.raises(ConfigError):
            settle_address(home, wrong, None)


def test_where_nobody_chose_where_to_listen_it_follows_the_address(home):
    for address, listens in [
        ("127.0.0.1:9443", "127.0.0.1:9443"),
        ("127.0.0.1:9444", "127.0.0.1:9444"),
        ("fleet.example.org:9445", "0.0.0.0:9445"),
    ]:
        settle_address(home, address, None)
        assert home.settings()["listen"] == listens


def test_an_invite_says_what_the_planned_runs_will_ask(home, tiny_base_folder):
    settle_address(home, "fleet.example.org:9443", None)
    config = RunConfig(model=str(tiny_base_folder), cohort=2, rounds=3, users=5, noise="local", epsilon=4.0)
    made = invite(home, config)
    assert (made.asks.noise, made.asks.population, made.asks.epsilon) == ("local", 5, "4.0")
    assert made.asks.noise_multiplier > 0
    assert made.base.digest == model_digest(tiny_base_folder)
    assert made.authority == Authority(home.tls).root.read_text()
    again = invite(home, None)  # the next one asks for the same
    assert (again.asks, again.base, again.token != made.token) == (made.asks, made.base, True)


def test_an_invite_needs_an_address_and_a_plan(home, tiny_base_folder):
    with pytest.raises(DataError, match="server up"):
        invite(home, RunConfig(model=str(tiny_base_folder)))
    settle_address(home, None, None)
    with pytest.raises(ConfigError, match="--config"):
        invite(home, None)


def test_a_run_is_over_everybody_who_is_approved(home, config_file):
    devices = enrol(home, 3)
    Enrolment(home.devices).set_state(devices[0].id, "revoked")
    path = new_run(home, config_file, None)
    assert path.name == "run-1"
    assert json.loads((path / "enrolled.json").read_text()) == sorted(device.subject for device in devices[1:])
    assert new_run(home, config_file, None).name == "run-2"
    with pytest.raises(ConfigError):
        new_run(home, config_file, "../elsewhere")
    with pytest.raises(ConfigError):
        new_run(home, config_file, "run-1")


def test_a_copy_is_put_back_elsewhere_and_its_runs_wait(home, config_file, tmp_path, monkeypatch, capsys):
    settle_address(home, "fleet.example.org:9443", None)
    Authority.open(home.tls, now=NOW)
    devices = enrol(home, 2)
    path = new_run(home, config_file, None)
    home.flower.mkdir()
    (home.flower / "superlink.sqlite").write_bytes(b"numbers of an update")
    copy = tmp_path / "copy.tar.gz"
    operator.backup(home, copy, now=NOW)
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with tarfile.open(copy) as archive:
        assert not [name for name in archive.getnames() if "flower" in name]
    with pytest.raises(DataError, match="already"):
        operator.backup(home, copy, now=NOW)
    with pytest.raises(DataError, match="already"):
        operator.restore(copy, home.folder)

    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "there"))
    assert homespun.main(["server", "restore", str(copy)]) == 0
    there = ServerHome.open()
    assert [device.id for device in Enrolment(there.devices).devices()] == [device.id for device in devices]
    assert (there.tls / "ca.pem").read_bytes() == (home.tls / "ca.pem").read_bytes()
    seen = fleet_runs.overview(there.runs / path.name)
    assert (seen.state, seen.run) == ("stopped", fleet_runs.overview(path).run)
    assert homespun.main(["server", "resume", path.name]) == 3  # no device has called since
    assert "--alone" in capsys.readouterr().err
    Enrolment(there.devices).note_call(devices[0].id, "0.1.0", "", None, now=datetime.now(UTC) + timedelta(minutes=1))
    assert homespun.main(["server", "resume", path.name]) == 0
    assert fleet_runs.overview(there.runs / path.name).state == "waiting"


@pytest.mark.parametrize("name", ["server/../../evil", "/etc/passwd", "elsewhere/x", "server/"])
def test_a_copy_that_reaches_outside_is_refused(tmp_path, home, name):
    import io

    path = tmp_path / "evil.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for member, content in (("backup.json", b'{"format": 1}'), (name, b"x")):
            info = tarfile.TarInfo(member)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    with pytest.raises(DataError):
        operator.restore(path, tmp_path / "fresh")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", [b"", b"no archive"])
def test_what_is_no_copy_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(DataError, match="not a backup"):
        operator.restore(tmp_path / "x", tmp_path / "fresh")


def test_the_commands_say_who_is_there_and_what_runs(home, config_file, capsys):
    settle_address(home, None, None)
    Authority.open(home.tls, now=NOW).issue("leaf", ["localhost"], now=NOW)
    (device,) = enrol(home, 1)
    out = config_file.with_name("invite.json")
    assert homespun.main(["server", "invite", "--config", str(config_file), "--uses", "2", "--out", str(out)]) == 0
    assert Invite.load(out).asks.population == 2
    assert homespun.main(["server", "devices", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])[0]["id"] == device.id
    config_file.write_text(config_file.read_text().replace("cohort = 2", "cohort = 1"))
    assert homespun.main(["server", "run", str(config_file)]) == 0
    assert homespun.main(["server", "stop"]) == 0
    capsys.readouterr()
    assert homespun.main(["server", "runs", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["name"], row["state"], row["rounds"]) == ("run-1", "stopped", 3)
    assert homespun.main(["server", "runs"]) == 0
    assert "run-1: stopped, round 0 of 3" in capsys.readouterr().out
    before = (home.tls / "leaf.pem").read_bytes()
    assert homespun.main(["server", "renew"]) == 0
    assert (home.tls / "leaf.pem").read_bytes() != before
    assert homespun.main(["server", "revoke", ""]) == 1  # an empty variable of a script is not the only device
    assert homespun.main(["server", "evidence", "--out", str(out.with_name("newest.zip"))]) == 0
    assert out.with_name("newest.zip").exists()
    assert homespun.main(["server", "revoke", device.id[:6]]) == 0
    assert homespun.main(["server", "approve", device.id]) == 3
    assert homespun.main(["server", "resume", "no-such-run"]) == 2
    capsys.readouterr()
    assert homespun.main(["server", "status", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["running"], facts["devices"]) == (False, {"revoked": 1})


def test_every_invite_is_signed_by_one_enroller_which_may_lie_elsewhere(home, tiny_base_folder, tmp_path):
    settle_address(home, "fleet.example.org:9443", None)
    config = RunConfig(model=str(tiny_base_folder), cohort=2, rounds=3, users=5)
    elsewhere = tmp_path / "stick" / "enroller.key"
    elsewhere.parent.mkdir()
    first = invite(home, config, enroller=elsewhere)
    assert not (home.folder / "enroller.key").exists()
    assert invite(home, None, enroller=elsewhere).enroller == first.enroller != ""
    with pytest.raises(Refusal) as refused:
        invite(home, None)  # with a key that devices do not know
    assert refused.value.code == "enroller"


def test_an_invite_to_secure_sums_says_what_holds_against_the_coordinator(home, tiny_base_folder):
    settle_address(home, "fleet.example.org:9443", None)
    config = RunConfig(
        model=str(tiny_base_folder), cohort=5, rounds=3, users=5, noise="distributed", coordinator_epsilon=6.0
    )
    asks = invite(home, config).asks
    assert (asks.noise, asks.coordinator_epsilon) == ("distributed", "6.0")
    assert 0 < asks.coordinator_noise_multiplier <= asks.noise_multiplier
