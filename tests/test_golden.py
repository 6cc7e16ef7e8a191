"""What a release wrote must open in every later one: the state of a device and of a coordinator, as they lay on disk.

`tests/golden/VERSION` was left by a run of two rounds over five devices; its keys were made for it and are nobody's. A
new release adds a folder and never changes one.
"""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

import homespun
from client.adapter_store import AdapterStore, unpack_vectors
from client.budget_keeper import account_of, sent_bytes
from client.device_home import DeviceHome
from client.membership import Membership, node_key
from client.vault_child import ADAPTERS
from common.fleet import Invite, device_id, public_bytes
from common.wire import from_raw_bytes, receipt_of_bytes
from server import fleet_runs, run_folder
from server.certificates import Authority
from server.enrolment import Enrolment
from server.server_home import ServerHome

GOLDEN = Path(__file__).parent / "golden"
VERSIONS = sorted(path.name for path in GOLDEN.iterdir())


@pytest.fixture(params=VERSIONS)
def home(request, tmp_path, monkeypatch):
    """A copy of the state, with the modes that a checkout does not keep."""
    for part in ("home", "config"):
        shutil.copytree(GOLDEN / request.param / part, tmp_path / part)
    for path in tmp_path.rglob("*"):
        path.chmod(0o700 if path.is_dir() else 0o600)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_this_version_left_a_state():
    assert homespun.__version__ in VERSIONS


def test_a_device_opens_with_its_budget_its_membership_and_what_it_sent(home, capsys):
    device = DeviceHome.open()
    account = account_of(device.read_ledger().entries, device.policy())
    assert account.limit == 20.0
    assert 0 < account.released <= account.reserved < account.limit
    releases = [entry for entry in device.read_ledger().entries if entry.kind == "release"]
    assert releases
    for entry in releases:
        content = sent_bytes(device, entry.body["sha256"])
        assert receipt_of_bytes(content, entry.body["spec"], entry.body["round"], 1, "float32") == entry.body["sha256"]
        assert np.isfinite(from_raw_bytes(content, "float32")).all()
    joined = Membership.load(device)
    assert joined.device == device_id(public_bytes(node_key(device).public_key()))
    assert joined.standing()["personal"]["losses"]["both"] < joined.standing()["personal"]["losses"]["global"]
    with device.open_ledger() as ledger:
        assert ledger.head.index == len(device.read_ledger().entries) - 1
    assert homespun.main(["device", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["joined"] == joined.invite.name


def test_private_adapters_open(home):
    device = DeviceHome.open()
    subject = str(device.read_ledger().header["subject"])
    with AdapterStore(device.folder / ADAPTERS, device.master.subkey("adapters")) as store:
        assert set(store.names(subject)) == {"global", "private"}
        assert np.isfinite(unpack_vectors(store.get(subject, "private"))["over_global"]).all()


def test_a_coordinator_opens_with_its_devices_its_authority_and_its_runs(home, capsys):
    server = ServerHome.open()
    assert server.settings()["address"]
    devices = Enrolment(server.devices).devices()
    assert len(devices) == 5
    assert Authority.open(server.tls, now=datetime.now(UTC)).root.exists()
    path = server.runs / "run-1"
    seen = fleet_runs.overview(path)
    assert (seen.state, seen.round, seen.spent) == ("finished", 2, 2)
    run_folder.reopen(path).ledger.close()
    for words in ("status", "devices", "runs"):
        assert homespun.main(["server", words, "--json"]) == 0


@pytest.mark.parametrize("version", VERSIONS)
def test_an_invite_opens(version):
    assert Invite.load(GOLDEN / version / "invite.json").base.name == "built-in"
