"""Every check finds its fault and says what to do; the support file tells a stranger nothing of the owner."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import zipfile
from datetime import UTC, datetime, timedelta

import pytest

import homespun
from client import doctor
from client.device_home import KEY, LEDGER, DeviceHome
from client.doctor import Check, checks, declared, support_files, within
from client.level_store import LevelStore
from client.membership import Membership, node_key
from client.personalization.profile import Line, Profile
from client.record_store import NewRecord, RecordStore
from client.user_data import Record
from common.errors import DataError
from common.fleet import Invite
from server.certificates import Authority

SECRET = "zebediah-quince-wrote-this"


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(doctor, "MEMORY_MEGABYTES", 1)  # other tests may have the rest of it
    monkeypatch.setattr(doctor, "DISK_MEGABYTES", 1)
    return tmp_path


@pytest.fixture
def home():
    return DeviceHome.open(create=True)


@pytest.fixture
def joined(quiet_coordinator, monkeypatch, place):
    invite = Invite.load(quiet_coordinator.invite())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(place / "config"))
    monkeypatch.setenv("HOMESPUN_HOME", str(place / "home"))
    home = DeviceHome.open(create=True)
    node_key(home)
    return Membership(home, invite, None, None, quiet_coordinator.model, "approved").save()


def look(**options):
    return {one.name: one for one in checks(**({"offline": True} | options))}


def test_a_machine_without_a_device_has_nothing_wrong(place):
    found = look()
    assert [one for one in found.values() if one.state == "failed"] == []
    assert found["key store"].state == "skipped"
    assert found["torch"].state == "ok"
    assert found["base model"].state == "ok"
    assert not (place / "home").exists()  # looking makes nothing


def test_every_fault_has_a_remedy(home):
    (home.folder / LEDGER).write_bytes(b"{}\n")
    home.folder.chmod(0o755)
    found = look()
    assert {"key store", "ledger"} <= {one.name for one in found.values() if one.state == "failed"}
    assert all(one.remedy for one in found.values() if one.state in ("failed", "warning") and one.name != "disk")


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.14.0", ">=2.13,<2.14", False),
        ("2.12.9", ">=2.13,<2.14", False),
        ("1.41.0", "==1.41.0", True),
        ("1.41.1", "==1.41.0", False),
        ("1.81.5", "~=1.81.1", True),
        ("1.82.0", "~=1.81.1", False),
        ("6.33.5", ">=6.33.5,<7", True),
        ("1.0", "nonsense", False),
    ],
)
def test_a_version_is_in_its_range_or_not(version, wanted, fits):
    packaging = pytest.importorskip("packaging.specifiers")
    assert within(version, wanted) is fits
    if wanted != "nonsense":
        assert packaging.SpecifierSet(wanted).contains(version) is fits  # the same as pip says


def test_a_package_outside_of_what_was_tested_fails_and_one_of_an_extra_may_be_absent(monkeypatch):
    assert {"torch", "flwr", "peft", "cryptography"} <= declared().keys()
    assert (declared()["cryptography"][1], declared()["torch"][1]) == (True, False)
    real = doctor.metadata.version

    def version(name):
        if name in ("peft", "cryptography"):
            raise doctor.metadata.PackageNotFoundError(name)
        return "9.9" if name == "torch" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = look()
    assert found["torch"].state == "failed"
    assert "9.9, tested with >=2.13" in found["torch"].said
    assert found["cryptography"].state == "failed"
    assert "peft" not in found


def test_little_memory_and_a_full_disk_are_said(monkeypatch):
    monkeypatch.setattr(doctor, "MEMORY_MEGABYTES", 1e9)
    monkeypatch.setattr(doctor, "DISK_MEGABYTES", 1e12)
    found = look()
    assert (found["disk"].state, bool(found["disk"].remedy)) == ("failed", True)
    assert found["memory"].state in ("failed", "skipped")


def test_a_lost_key_is_named(home, place):
    for path in (place / "config").rglob("*.key"):
        path.unlink()
    assert look()["key store"].state == "failed"
    (home.folder / KEY).unlink()
    assert look()["key store"].state == "failed"  # a ledger without its key


def test_another_base_model_than_the_invite_names_fails(joined, place):
    assert look()["base model"].state == "ok"
    other = place / "other-base"
    other.mkdir()
    Membership(joined.home, joined.invite, None, None, other, "approved").save()
    assert look()["base model"].state == "failed"
    Membership(joined.home, joined.invite, None, None, place / "absent", "approved").save()
    assert look()["base model"].state == "warning"


def test_certificates_that_end_are_said_beforehand_and_afterwards(joined):
    assert look()["authority"].state == "ok"
    assert look(now=lambda: datetime.now(UTC) + timedelta(days=3640))["authority"].state == "warning"
    assert look(now=lambda: datetime.now(UTC) + timedelta(days=3660))["authority"].state == "failed"


def test_a_coordinators_own_certificate_and_port_are_looked_at(quiet_coordinator, place, monkeypatch):
    (place / "home").mkdir(exist_ok=True)
    monkeypatch.setenv("HOMESPUN_HOME", str(place))  # its home is in the folder `server`
    found = look()
    assert found["coordinator's leaf"].state == "ok"
    assert found["port"].state == "ok"
    host, _, port = quiet_coordinator.home.settings()["listen"].rpartition(":")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the fixture's, which keeps the port
        other.bind((host, int(port)))
        other.listen()
        assert look()["port"].state == "failed"
    later = look(now=lambda: datetime.now(UTC) + timedelta(days=400))["coordinator's leaf"]
    assert (later.state, later.remedy) == ("failed", "`homespun server renew`")


@pytest.mark.parametrize(("off", "state"), [(0, "ok"), (-90, "warning"), (400, "failed"), (-400, "failed")])
def test_a_clock_that_is_off_is_found_before_flower_refuses_it(joined, quiet_coordinator, off, state):
    with quiet_coordinator.listening():
        found = look(offline=False, now=lambda: datetime.now(UTC) + timedelta(seconds=off))
    assert found["coordinator"].state == "ok"
    assert found["clock"].state == state
    assert ("NTP" in found["clock"].remedy) is (state != "ok")


def test_a_coordinator_that_is_away_or_somebody_else_is_told_apart(joined, quiet_coordinator, place):
    away = look(offline=False)
    assert (away["coordinator"].state, away["clock"].state) == ("failed", "skipped")
    from server.certificates import Authority

    other = Authority.open(place / "other", now=datetime.now(UTC)).root.read_text()
    invite = joined.invite.model_copy(update={"authority": other})
    Membership(joined.home, invite, None, None, joined.model, "approved").save()
    with quiet_coordinator.listening():
        assert "another authority" in look(offline=False)["coordinator"].said


def test_a_socket_that_others_can_reach_fails(joined, monkeypatch, place):
    path = place / "run" / "vault.sock"
    path.parent.mkdir(mode=0o700)
    monkeypatch.setattr("client.agent.socket_path", lambda folder, runtime: path)
    path.touch(mode=0o600)
    assert look()["sockets"].state == "ok"
    path.chmod(0o666)
    assert look()["sockets"].state == "failed"


@pytest.fixture
def planted(joined, place):
    """The secret in everything that an owner or a program may have put it into."""
    home = joined.home
    RecordStore(home).add([NewRecord(Record(SECRET, SECRET), SECRET)])
    LevelStore(home).keep_profile(Profile((Line(SECRET, "own words"),)))
    model = place / SECRET / "model"
    model.mkdir(parents=True)
    Membership(home, joined.invite, place / SECRET, SECRET, model, "approved").save()
    joined.note_standing(refit=SECRET, away=SECRET, runs=[], personal={"losses": {SECRET: 1.0}})
    (home.folder / "refusals.json").write_text(json.dumps({"format": 1, "refusals": [{"reason": SECRET}]}))
    (home.folder / SECRET).write_text(SECRET)
    (home.folder / "logs").mkdir()
    (home.folder / "logs" / "vault.log").write_text(SECRET)
    return home


def test_a_support_file_holds_no_text_no_name_no_path_and_no_key(planted, place, capsys):
    path = place / "support.zip"
    assert homespun.main(["doctor", "--offline", "--bundle", str(path)]) == 1  # the base model is another
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["doctor.json"]
        content = path.read_bytes() + archive.read("doctor.json")
    said = json.loads(zipfile.ZipFile(path).read("doctor.json"))
    secrets = [SECRET.encode(), str(place).encode(), b"localhost", planted.master.secret, planted.key._raw]
    secrets += [secret.hex().encode() for secret in secrets[3:]]
    pem = (planted.folder / "node.key").read_bytes()
    secrets += [line for line in pem.splitlines() if len(line) > 30 and b"-----" not in line]
    number = node_key(planted).private_numbers().private_value
    secrets += [number.to_bytes(48), f"{number:x}".encode(), str(planted.read_ledger().header["subject"]).encode()]
    secrets += [planted.key.verify_key.hex.encode(), Membership.load(planted).device.encode()]
    for secret in secrets:
        assert secret not in content, secret
    assert said["checks"]
    assert {one["state"] for one in said["checks"]} >= {"ok", "failed"}
    assert said["files"]["sizes"]["records.sqlite"] > 0
    assert said["ledger"] == {"open": 1}
    assert re.fullmatch(r"2\.13\.\S+", next(one["said"] for one in said["checks"] if one["name"] == "torch"))
    capsys.readouterr()
    assert homespun.main(["doctor", "--offline", "--bundle", str(path)]) == 1
    assert "exists already" in capsys.readouterr().err


def test_the_command_ends_with_1_where_something_fails_and_says_all_as_json(home, capsys, monkeypatch):
    assert homespun.main(["doctor", "--offline"]) == 0
    assert "nothing failed" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "_memory", lambda: Check("memory", "failed", "none", "buy some"))
    assert homespun.main(["doctor", "--offline"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "-> buy some" in out
    assert homespun.main(["doctor", "--offline", "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert said["failed"] == 1
    assert {"name", "state", "said", "remedy"} == set(said["checks"][0])


def test_a_support_file_is_made_where_there_is_no_device():
    assert support_files([])["checks"] == []


def test_the_door_of_a_real_coordinator_tells_the_time(tmp_path):
    from server.coordinator import _served
    from server.server_home import bound

    authority = Authority.open(tmp_path / "tls", now=datetime.now(UTC))
    authority.issue("leaf", ["127.0.0.1"], now=datetime.now(UTC))

    async def nothing(scope, receive, send):
        await send({"type": "http.response.start", "status": 403, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    server, sockets = _served(nothing, authority.pair("leaf")), bound("127.0.0.1:0")
    sockets[0].listen()  # so that who comes early waits
    port = sockets[0].getsockname()[1]
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets)), daemon=True)
    thread.start()
    try:
        told = doctor.served_time(f"127.0.0.1:{port}", authority.root.read_text())
        assert abs(datetime.now(UTC) - told) < timedelta(days=1)
    finally:
        server.should_exit = True
        thread.join(30.0)


def test_a_coordinator_that_tells_no_time_is_there_all_the_same(joined, monkeypatch):
    def silent(address, authority):
        raise DataError("does not say what time it is")

    monkeypatch.setattr(doctor, "served_time", silent)
    found = look(offline=False)
    assert (found["coordinator"].state, found["clock"].state) == ("warning", "skipped")
    assert "answers, but does not say" in found["coordinator"].said
