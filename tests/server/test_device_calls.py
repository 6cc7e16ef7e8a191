"""What devices ask the coordinator itself: the same answer for all, and nothing for who is not let in."""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime, timedelta

import httpx
import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from common.config import RunConfig
from common.fleet import signed_headers
from common.ledger import Head
from common.spent_proof import check_proof
from common.wire import ReleaseSpec
from server import fleet_runs, run_folder
from server.checkpoint import Checkpoint
from server.device_calls import DeviceCalls, base_files
from server.enrolment import Enrolment
from server.forwarder import Door
from server.server_home import ServerHome

NOW = datetime(2026, 11, 22, tzinfo=UTC)
SUBJECT = "ab" * 16


class Coordinator:
    """The coordinator's own paths behind the door, without Flower."""

    def __init__(self, home):
        self.home, self.now = home, NOW
        self.key = run_folder.signing_key()
        calls = DeviceCalls(home, self.key, version="0.1.0", clock=lambda: self.now)
        self.door = Door(httpx.AsyncClient(), calls, clock=lambda: self.now)
        self.enrolment = Enrolment(home.devices)
        self.calls = calls

    def token(self, **options):
        return self.enrolment.invite(
            **({"uses": 9, "now": NOW, "expires": NOW + timedelta(days=1), "approves": True} | options)
        )

    def post(self, path, body, headers):
        async def go():
            transport = httpx.ASGITransport(app=self.door)
            async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
                return await client.post(path, content=body, headers=headers)

        return asyncio.run(go())

    def ask(self, key, what, /, **values):
        path, body = f"/v1/homespun/{what}", json.dumps({"format": 1, **values}).encode()
        return self.post(path, body, signed_headers(key, path, body, now=self.now))


@pytest.fixture
def coordinator(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path))
    return Coordinator(ServerHome.open(create=True))


@pytest.fixture
def key():
    return ec.generate_private_key(ec.SECP384R1())


def enrol(coordinator, key, *, subject=SUBJECT, **options):
    return coordinator.ask(key, "enrol", token=coordinator.token(**options), version="0.1.0", subject=subject)


@pytest.fixture
def run(coordinator, tiny_base_folder):
    config = RunConfig(model=str(tiny_base_folder), cohort=2, rounds=3, epsilon=8.0, max_tokens=16)
    opened = fleet_runs.prepare(coordinator.home.runs / "run-1", config, [SUBJECT, "cd" * 16])
    opened.ledger.close()
    return opened


def test_a_device_enrols_and_asks_how_things_stand(coordinator, key, run):
    joined = enrol(coordinator, key).json()
    assert joined["status"] == "approved"
    standing = coordinator.ask(key, "standing", version="0.2.0", verdict="policy-trust").json()
    (one,) = standing["runs"]
    assert ReleaseSpec.from_text(one["spec"]) == run.spec
    assert one["open"]
    head, debits = check_proof(one["proof"], coordinator.key.verify_key)
    assert (head.index, debits) == (1, 0)
    (device,) = coordinator.enrolment.devices()
    assert (device.version, device.verdict, device.subject) == ("0.2.0", "policy-trust", SUBJECT)


def test_a_run_that_cannot_be_read_is_counted_and_one_that_never_began_is_not(coordinator, key, run):
    enrol(coordinator, key)
    (coordinator.home.runs / "begun").mkdir()
    (coordinator.home.runs / "begun" / run_folder.CONFIG).write_text("")
    standing = coordinator.ask(key, "standing", version="0.2.0", verdict="").json()
    assert (len(standing["runs"]), standing["untold"]) == (1, 0)
    (run.path / run_folder.CHECKPOINT).write_bytes(b"damaged")
    coordinator.calls._runs = (float("-inf"), [])
    standing = coordinator.ask(key, "standing", version="0.2.0", verdict="").json()
    assert (standing["runs"], standing["untold"]) == ([], 1)


def test_every_device_gets_the_newest_adapter_and_the_same_answer(coordinator, run):
    vector = np.arange(run.start.size, dtype=np.float32)
    Checkpoint(2, vector, np.zeros_like(vector), "", run.layout.digest).save(run.path / run_folder.CHECKPOINT)
    answers = []
    for number in range(3):
        key = ec.generate_private_key(ec.SECP384R1())
        enrol(coordinator, key, subject=f"{number:032x}")
        answers.append(coordinator.ask(key, "standing", version="", verdict="").json())
        content = coordinator.ask(key, "adapter", run=run.spec.run).content
        assert int.from_bytes(content[:4], "little") == 2
        np.testing.assert_array_equal(np.frombuffer(content[4:], "<f4"), vector)
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("name", ["standing", "adapter", "base", "base-file", "leave"])
def test_who_is_not_let_in_gets_nothing_and_is_counted(coordinator, key, run, name):
    stranger = coordinator.ask(key, name, run=run.spec.run)
    assert (stranger.status_code, stranger.json()["error"]) == (403, "not-enrolled")
    enrol(coordinator, key, approves=False)
    assert coordinator.ask(key, name).json()["error"] == "pending"
    (device,) = coordinator.enrolment.devices()
    coordinator.enrolment.set_state(device.id, "revoked")
    assert coordinator.ask(key, name).json()["error"] == "revoked"
    assert coordinator.enrolment.refused() == {"not-enrolled": 1, "pending": 1, "revoked": 1}


def test_a_recorded_call_a_late_one_and_an_unsigned_one_are_refused(coordinator, key):
    enrol(coordinator, key)
    path, body = "/v1/homespun/standing", b'{"format": 1}'
    headers = signed_headers(key, path, body, now=NOW)
    assert coordinator.post(path, body, headers).status_code == 200
    assert coordinator.post(path, body, headers).json()["error"] == "repeated"
    coordinator.now = NOW + timedelta(hours=1)
    late = signed_headers(key, path, body, now=NOW)
    assert coordinator.post(path, body, late).json()["error"] == "clock"
    assert coordinator.post(path, body, {}).json()["error"] == "bad-signature"
    assert coordinator.enrolment.refused() == {"bad-signature": 1, "clock": 1, "repeated": 1}


@pytest.mark.parametrize("body", [b"", b"[]", b'{"format": 2}', b'{"format": 1, "proofs": 7}'])
def test_nonsense_is_refused_or_ignored_and_breaks_nothing(coordinator, key, run, body):
    enrol(coordinator, key)
    path = "/v1/homespun/standing"
    reply = coordinator.post(path, body, signed_headers(key, path, body, now=NOW))
    assert reply.status_code in (200, 400)
    nonsense = {"proofs": [1, None, {}, {"head": 3}], "ledger": {"index": "x"}, "version": ["x"], "verdict": {}}
    assert coordinator.ask(key, "standing", **nonsense).status_code == 200


@pytest.mark.parametrize("subject", ["", "short", "../../etc/passwd" * 2, 7, None, "a" * 65])
def test_a_device_without_a_subject_is_not_enrolled(coordinator, key, subject):
    reply = coordinator.ask(key, "enrol", token=coordinator.token(), version="", subject=subject)
    assert reply.json()["error"] == "bad-request"
    assert coordinator.enrolment.devices() == ()


def test_a_device_that_leaves_is_let_in_no_more(coordinator, key):
    enrol(coordinator, key)
    assert coordinator.ask(key, "leave").json()["status"] == "left"
    assert coordinator.ask(key, "standing").status_code == 403


def test_the_base_model_is_handed_over_in_parts_and_nothing_beside_it(coordinator, key, tiny_base_folder):
    enrol(coordinator, key)
    coordinator.home.change_settings(bases={"cd" * 32: str(tiny_base_folder)})
    files = coordinator.ask(key, "base", digest="cd" * 32).json()["files"]
    assert {file["name"] for file in files} == {path.name for path in base_files(tiny_base_folder)}
    whole = (tiny_base_folder / "model.safetensors").read_bytes()
    part = coordinator.ask(key, "base-file", digest="cd" * 32, name="model.safetensors", offset=1000)
    assert part.content == whole[1000:]
    for name, offset in [
        ("../secret", 0),
        ("/etc/passwd", 0),
        ("model.safetensors", -1),
        ("model.safetensors", len(whole) + 1),
        ("model.safetensors", "0"),
    ]:
        assert coordinator.ask(key, "base-file", digest="cd" * 32, name=name, offset=offset).status_code == 400
    assert coordinator.ask(key, "base", digest="00" * 32).status_code == 400


def test_statements_that_devices_kept_reach_their_run(coordinator, key, run):
    enrol(coordinator, key)
    path = run.path / run_folder.LEDGER
    before = path.read_bytes()
    with run_folder.reopen(run.path).ledger as ledger:
        (reserve,) = (entry for entry in ledger.entries() if entry.kind == "reserve")
        for number in (1, 2):
            ledger.append("debit", {"event": reserve.body["event"], "reservation": 1, "round": number})
    proof = coordinator.ask(key, "standing").json()["runs"][0]["proof"]
    assert (Head.from_json(proof["head"]).index, proof["debits"]) == (3, 2)
    coordinator.ask(key, "standing", proofs=[proof])
    assert not (run.path / fleet_runs.PROOFS).exists()  # nothing is missing
    path.write_bytes(before)  # an old copy is put back
    coordinator.ask(key, "standing", proofs=[proof, {**proof, "debits": 900}])
    kept = json.loads((run.path / fleet_runs.PROOFS).read_text())["proofs"]
    assert [one["debits"] for one in kept] == [2]
