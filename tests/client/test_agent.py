"""What a device refuses, its owner sees in `status`: the list of the reviewer, one test each, up to another OS user.

The vault here is the resident one, behind its socket, as `homespun device up` serves it; what needs a child that
trains is in tests/client/test_vault_host.py.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import pytest

import homespun
from client import vault_pb2 as messages
from client.coordinator_calls import MOST_REFUSALS, Calls
from client.device_home import DeviceHome
from client.membership import Membership
from client.vault_host import ChildVault
from client.vault_pb2_grpc import FleetStub
from client.vault_service import FleetService, Outbox, serving
from common.errors import Refusal
from common.wire import WIRE_FORMAT, Assignment, raw_bytes
from server.certificates import Authority

NOBODY = 65534


class Device:
    """A joined device whose vault answers on its socket."""

    def __init__(self, coordinator, tmp_path, monkeypatch, capsys):
        self.coordinator, self.capsys, self.monkeypatch, self.root = coordinator, capsys, monkeypatch, tmp_path
        invite = coordinator.invite()
        self.at_home()
        data = ("--data", str(tmp_path / "people.jsonl"), "--user", "ada", "--policy", str(tmp_path / "policy.toml"))
        assert homespun.main(["device", "join", str(invite), *data, "--yes"]) == 0
        self.joined = Membership.load(DeviceHome.open())
        self.subject = str(self.joined.home.read_ledger().header["subject"])
        monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "operator"))
        self.run = coordinator.run("run-1", [self.subject, "cd" * 16])
        self.calls = Calls(self.joined)
        self.path = tmp_path / "vault.sock"

    def at_home(self):
        self.monkeypatch.setenv("HOMESPUN_HOME", str(self.root / "home"))

    @contextmanager
    def up(self, path=None):
        vault = ChildVault(
            self.joined, idle_seconds=600.0, note_refusal=self.calls.note_refusal, fetch_roster=self.calls.fetch_roster
        )
        service = FleetService(
            vault,
            Outbox(self.joined.home.folder / "outbox", self.joined.home.master.subkey("outbox")),
            model=self.joined.invite.base.digest,
            note_refusal=self.calls.note_refusal,
        )
        with serving(service, path or self.path, dim=1 << 20):
            yield
        vault.close()

    @contextmanager
    def bundle(self):
        """The generated stub: whatever a bundle wants to ask."""
        with self.up(), grpc.insecure_channel(f"unix:{self.path}") as channel:
            yield FleetStub(channel)

    def request(self, spec=None, **changes):
        spec = spec or self.run.spec
        fields = {
            "format": WIRE_FORMAT,
            "spec": spec.to_text(),
            "round": 1,
            "subjects": [self.subject],
            "vector": raw_bytes(np.zeros(spec.model_dim, np.float32)),
        }
        return messages.TrainRequest(**(fields | changes))

    def asked(self, stub, request):
        """The code that a bundle gets for a request."""
        accepted = stub.Train(request)
        if accepted.refusal:
            return accepted.refusal
        while (reply := stub.Collect(messages.CollectRequest(ticket=accepted.ticket, wait_seconds=5))).pending:
            pass
        return reply.refusal

    def status(self):
        self.at_home()
        self.capsys.readouterr()
        assert homespun.main(["device", "status", "--json"]) == 0
        return json.loads(self.capsys.readouterr().out)

    def codes(self):
        return [one["code"] for one in self.status()["refusals"]]


@pytest.fixture
def device(coordinator, tmp_path, monkeypatch, capsys):
    return Device(coordinator, tmp_path, monkeypatch, capsys)


def test_an_old_bundle_is_refused_and_the_owner_sees_it(device):
    with device.bundle() as stub:
        assert device.asked(stub, device.request(format=WIRE_FORMAT - 1)) == "format"
        assert stub.Sum(messages.SumRequest(format=WIRE_FORMAT - 1, leg=2)).refusal == "format"
    assert "format" in device.codes()


def test_a_bundle_that_asks_for_private_tensors_is_refused_and_the_owner_sees_it(device):
    spec = device.run.spec
    with device.bundle() as stub:
        for names in (
            tuple(name.replace("q_proj", "embed_tokens") for name in spec.names),
            tuple(name.replace("lora_", "weight_") for name in spec.names),
        ):
            assert device.asked(stub, device.request(replace(spec, names=names))) == "layout-mismatch"
    assert "layout-mismatch" in device.codes()
    assert "release" not in [entry.kind for entry in device.joined.home.read_ledger().entries]


def test_a_bundle_for_another_base_is_refused_and_the_owner_sees_it(device):
    with device.bundle() as stub:
        assert device.asked(stub, device.request(replace(device.run.spec, model="00" * 32))) == "model-mismatch"
    assert device.codes() == ["model-mismatch"]


def test_a_request_that_is_none_is_refused_and_the_owner_sees_it(device):
    with device.bundle() as stub:
        assert device.asked(stub, device.request(spec=None, round=0)) == "bad-request"
        assert stub.Sum(messages.SumRequest(format=WIRE_FORMAT, leg=99)).refusal == "bad-message"
    assert device.codes() == ["bad-request", "bad-message"]


def test_a_replayed_letter_of_a_secure_sum_is_refused_and_the_owner_sees_it(device):
    with device.bundle() as stub:
        letter = messages.SumRequest(
            format=WIRE_FORMAT, run=device.run.spec.run, round=1, leg=3, subject=device.subject, message=b"recorded"
        )
        assert stub.Sum(letter).refusal == "closed"
        assert stub.Sum(letter).refusal == "closed"
    (seen,) = device.status()["refusals"]
    assert (seen["code"], seen["times"]) == ("closed", 2)


def test_a_server_that_asks_for_more_than_the_policy_is_seen_before_it_asks(device):
    device.joined.home.grant(device.joined.home.policy().model_copy(update={"clip": 0.5}))
    device.calls.keep_up(None)
    (run,) = device.status()["runs"]
    assert run["refusal"]["code"] == "policy-clip"
    device.calls.keep_up(None)  # what was heard in one call is answered in the next
    (seen,) = device.coordinator.enrolment.devices()
    assert seen.verdict == "policy-clip"  # the operator sees the code, and no reason


@pytest.mark.slow
def test_a_server_that_asks_for_more_than_the_policy_is_refused_when_it_asks(device):
    device.joined.home.grant(device.joined.home.policy().model_copy(update={"clip": 0.5}))
    with device.bundle() as stub:
        assert device.asked(stub, device.request()) == "policy-clip"
    assert "policy-clip" in device.codes()


def test_a_device_that_is_revoked_or_was_never_enrolled_is_told_and_its_owner_sees_it(device):
    device.coordinator.enrolment.set_state(device.joined.device, "revoked")
    device.calls.keep_up(None)
    seen = device.status()
    assert (seen["state"], [one["code"] for one in seen["refusals"]]) == ("revoked", ["revoked"])
    stranger = Device.__new__(Device)
    stranger.__dict__ |= device.__dict__
    (device.joined.home.folder / "node.key").unlink()  # another key: nobody whom the coordinator knows
    device.calls.keep_up(None)
    assert device.codes() == ["revoked", "not-enrolled"]


def test_a_coordinator_of_another_authority_is_not_spoken_to_and_the_owner_sees_it(
    quiet_coordinator, tmp_path, monkeypatch, capsys
):
    with quiet_coordinator.listening():
        device = Device(quiet_coordinator, tmp_path, monkeypatch, capsys)
    other = Authority.open(tmp_path / "other-tls", now=datetime.now(UTC))
    other.issue("leaf", ["localhost"], now=datetime.now(UTC))
    quiet_coordinator.authority = other
    with quiet_coordinator.listening():
        before = len(quiet_coordinator.enrolment.refused())
        device.calls.keep_up(None)
    assert device.codes() == ["wrong-authority"]
    assert len(quiet_coordinator.enrolment.refused()) == before  # nothing of the device came to it


def test_a_bundle_that_asks_a_thousand_times_does_not_hide_what_was_refused_before(device):
    device.calls.note_refusal("policy-clip", "what the owner should see")
    for _ in range(5 * MOST_REFUSALS):
        device.calls.note_refusal("format", "this vault speaks another format")
    seen = device.status()["refusals"]
    assert [(one["code"], one["times"]) for one in seen] == [("policy-clip", 1), ("format", 5 * MOST_REFUSALS)]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="becoming another user takes root")
def test_a_bundle_under_another_user_reaches_the_socket_and_is_kept_from_the_files_by_the_kernel(device):
    """As set up for two users: the socket's folder is for a group, everything else for the vault's user alone."""
    place = Path(tempfile.mkdtemp(prefix="hs-"))
    try:
        place.chmod(0o711)
        shutil.copytree(device.joined.home.folder, place / "device", copy_function=shutil.copy2)
        home = place / "device"
        shutil.copystat(device.joined.home.folder, home)
        with device.up(place / "run" / "vault.sock"):
            for path in (place / "run", place / "run" / "vault.sock"):
                os.chown(path, -1, NOBODY)
            assert (place / "run").stat().st_mode & 0o777 == 0o710
            files = [path for path in home.rglob("*") if path.is_file()]
            assert {"device.key", "ledger.jsonl", "policy.toml", "node.key"} <= {path.name for path in files}
            theirs = {"user": NOBODY, "group": NOBODY, "extra_groups": [], "capture_output": True, "cwd": "/"}
            for path in files:
                assert subprocess.run(["cat", str(path)], **theirs, check=False).returncode != 0, path.name
                tampered = ["sh", "-c", f"echo x >> '{path}'"]
                assert subprocess.run(tampered, **theirs, check=False).returncode != 0, path.name
            assert subprocess.run(["ls", str(home)], **theirs, check=False).returncode != 0
            # It is no trick of the place: the same user may use the socket.
            ask = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('{place / 'run' / 'vault.sock'}')"
            python = next((one for one in (sys.executable, "/usr/bin/python3") if _may_run(one, theirs)), None)
            if python is not None:
                assert subprocess.run([python, "-I", "-S", "-c", ask], **theirs, check=False).returncode == 0
            with socket.socket(socket.AF_UNIX) as own:
                own.connect(str(place / "run" / "vault.sock"))
    finally:
        shutil.rmtree(place)


def _may_run(python, theirs):
    try:
        return subprocess.run([python, "-I", "-S", "-c", ""], **theirs, check=False).returncode == 0
    except OSError:
        return False


def test_what_was_refused_leaves_no_trace_of_data(device):
    with device.bundle() as stub:
        device.asked(stub, device.request(format=0))
    with pytest.raises(Refusal):
        ChildVault(
            replace(device.joined, status="paused").save(),
            idle_seconds=1.0,
            note_refusal=device.calls.note_refusal,
            fetch_roster=device.calls.fetch_roster,
        ).train(Assignment(device.run.spec, 1, (device.subject,), device.run.start))
    said = json.dumps(device.status()["refusals"])
    assert not any(word in said for word in ("w1 w2", "people.jsonl", "ada"))
