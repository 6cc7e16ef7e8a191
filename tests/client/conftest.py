"""A coordinator's door on loopback, with TLS, without Flower behind it; and the machine of one device."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import httpx
import pytest
import uvicorn

import homespun
from client.membership import UsageMeter
from common.config import RunConfig
from common.keys import SigningKey
from common.vouched_roster import Vouched, federation_of
from server import device_calls, fleet_runs
from server.certificates import Authority
from server.device_calls import DeviceCalls
from server.enrolment import Enrolment
from server.forwarder import Door
from server.operator import make_invite, settle_address
from server.run_folder import signing_key
from server.server_home import ServerHome

POLICY = "trust_coordinator = true\nsmallest_cohort = 2\nepsilon = 20.0\nmains_power_only = false\n"


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """What the coordinator answered a moment ago is not answered again: tests are quicker than operators."""
    monkeypatch.setattr(device_calls, "CACHE_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def always_noon(monkeypatch):
    """The day that minutes and megabytes are counted by does not end in the middle of a test."""
    noon = datetime.now().replace(hour=12, minute=0, second=0)
    monkeypatch.setitem(UsageMeter.__init__.__kwdefaults__, "now", lambda: noon)


class Coordinator:
    """What an operator would have: a home, an invite, and a door that answers."""

    def __init__(self, root, model, port):
        self.root, self.model = root, model
        self.home = ServerHome.open(root / "server", create=True)
        settle_address(self.home, f"localhost:{port}", None)
        self.authority = Authority.open(self.home.tls, now=datetime.now(UTC))
        self.authority.issue("leaf", ["localhost"], now=datetime.now(UTC))
        self.enrolment = Enrolment(self.home.devices)
        self.calls = DeviceCalls(self.home, signing_key(), version="0.1.0", clock=lambda: datetime.now(UTC))

    def invite(self, name="invite.json", **options):
        config = RunConfig(
            model=str(self.model), users=4, cohort=2, rounds=3, epsilon=8.0, max_tokens=16, local_batch=2
        )
        fields = {"uses": 4, "lasts": timedelta(days=1), "approves": True, "sources": ("coordinator",)}
        made = make_invite(self.home, config, version="0.1.0", now=datetime.now(UTC), **(fields | options))
        path = self.root / name
        path.write_text(made.to_text())
        return path

    def run(self, name, subjects, **options):
        config = RunConfig(
            **{
                "model": str(self.model),
                "cohort": 2,
                "rounds": 3,
                "epsilon": 8.0,
                "max_tokens": 16,
                "local_batch": 2,
            }
            | options
        )
        roster = self.enrolment.roster(subjects) if config.noise == "distributed" else None
        opened = fleet_runs.prepare(self.home.runs / name, config, subjects, roster)
        opened.ledger.close()
        return opened

    def peer(self, token, number):
        """Another device that joined by the same invite, of which there is nothing but its key: key and subject."""
        key, subject = SigningKey(bytes([number]) * 32), f"{number:032x}"
        vouched = Vouched.sign(token, federation_of(self.authority.root.read_text()), key)
        self.enrolment.enrol("", b"peer %d" % number, "0.1.0", subject, now=datetime.now(UTC), vouched=vouched)
        return key, subject

    @contextmanager
    def listening(self):
        """Answer on the port that devices know."""
        port = int(self.home.settings()["address"].rpartition(":")[2])
        certificate, key = self.authority.pair("leaf")
        door = Door(httpx.AsyncClient(), self.calls, clock=lambda: datetime.now(UTC))
        config = uvicorn.Config(
            door, host="127.0.0.1", port=port, ssl_certfile=certificate, ssl_keyfile=key, log_config=None, ws="none"
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        try:
            yield self
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture
def quiet_coordinator(tmp_path, monkeypatch, tiny_base_folder):
    """A coordinator that does not answer yet."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "operator"))
    (tmp_path / "policy.toml").write_text(POLICY)
    lines = [{"user": name, "texts": [f"w{n} w{n + 1} w{n + 2} w9" for n in range(8)]} for name in ("ada", "bela")]
    (tmp_path / "people.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with socket.socket() as kept:
        # Held, and not listened on: nobody is given the port before this coordinator, or between two that answer.
        kept.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        kept.bind(("127.0.0.1", 0))
        yield Coordinator(tmp_path, tiny_base_folder, kept.getsockname()[1])


@pytest.fixture
def coordinator(quiet_coordinator):
    """A coordinator that answers."""
    with quiet_coordinator.listening():
        yield quiet_coordinator


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A machine of its own, on which `homespun` has kept nothing yet."""
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def run(capsys):
    """A function that runs `homespun device ...` and returns what it printed, or with another exit code the error."""

    def call(*words, code=0):
        found = homespun.main(["device", *map(str, words)])
        captured = capsys.readouterr()
        assert found == code, captured.err
        return captured.out if code == 0 else captured.err

    return call
