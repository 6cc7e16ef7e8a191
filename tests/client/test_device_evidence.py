"""What a device's owner hands to an auditor."""

from __future__ import annotations

import json
import zipfile

import homespun
from client.device_evidence import write_device_evidence
from client.device_home import DeviceHome
from common.evidence import read_evidence
from common.ledger import verify

TIME = "2026-01-31T12:00:00Z"


def test_it_is_the_ledger_the_policy_and_heads_signed_by_the_device(make_fleet, tmp_path):
    home = DeviceHome.open(make_fleet().devices[0])
    manifest = write_device_evidence(home, tmp_path / "device.zip", time=TIME)
    found = read_evidence(tmp_path / "device.zip")
    assert set(found.files) == {"ledger.jsonl", "policy.toml", "policy.toml.sig", "heads.jsonl"}
    assert found.manifest == manifest
    assert verify(found.ledger).entries == home.read_ledger().entries
    assert manifest["public_key"] == home.key.verify_key.hex
    assert verify(found.ledger).head.to_json() == found.lines("heads.jsonl")[-1]


def test_heads_that_a_coordinator_signed_are_in_it_also_those_that_it_went_back_on(make_fleet, tmp_path):
    home = DeviceHome.open(make_fleet().devices[0])
    entries = verify((make_fleet().run / "ledger.jsonl").read_bytes()).entries
    heads = [entry.head.to_json() for entry in entries[1:3]]
    proofs = [{"head": heads[0], "debits": 1, "signature": "00", "lost": True}, {"head": heads[1]}, {"head": {"x": 1}}]
    standing = home.folder / "standing.json"
    standing.write_text(json.dumps({"format": 1, "proofs": proofs}))
    try:
        write_device_evidence(home, tmp_path / "device.zip", time=TIME)
    finally:
        standing.unlink()
    assert read_evidence(tmp_path / "device.zip").lines("heads.jsonl")[:2] == heads


def test_no_tensor_leaves_with_it(make_fleet, tmp_path):
    home = DeviceHome.open(make_fleet().devices[0])
    write_device_evidence(home, tmp_path / "device.zip", time=TIME)
    with home.open_sent() as store:
        sent = [store.get(*key) for key in _kept(home, store)]
    with zipfile.ZipFile(tmp_path / "device.zip") as archive:
        whole = b"".join(archive.read(name) for name in archive.namelist())
    assert sent
    assert not any(content[:16] in whole for content in sent)


def _kept(home, store):
    subject = str(home.read_ledger().header["subject"])
    return [(subject, "sent")] if store.versions(subject, "sent") else []


def test_the_command_works_beside_a_vault_that_has_the_ledger_open(make_fleet, tmp_path, monkeypatch, capsys):
    folder = make_fleet().devices[0]
    monkeypatch.setattr(DeviceHome, "open", classmethod(lambda cls, **_: REAL_OPEN(folder)))
    with REAL_OPEN(folder).open_ledger():
        assert homespun.main(["device", "evidence", "--out", str(tmp_path / "d.zip"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["role"] == "device"


REAL_OPEN = DeviceHome.open
