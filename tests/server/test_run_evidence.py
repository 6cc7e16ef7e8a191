"""What a server hands to an auditor: all that binds a run, and nothing of anybody who was in it."""

from __future__ import annotations

import json
import re
import shutil
import zipfile

import pytest

import homespun
from common.errors import DataError, VerificationError
from common.evidence import commitment, read_evidence
from common.keys import SigningKey
from common.ledger import verify
from server.run_evidence import collect, write_run_evidence


@pytest.fixture
def run(make_fleet, tmp_path, monkeypatch):
    fleet = make_fleet("central")
    monkeypatch.setenv("HOMESPUN_HOME", str(fleet.home))
    shutil.copytree(fleet.run, tmp_path / "run")
    return tmp_path / "run"


def test_the_command_writes_one_signed_zip(run, tmp_path, capsys):
    out = tmp_path / "out.zip"
    assert homespun.main(["server", "evidence", str(run), "--out", str(out)]) == 0
    assert "signed by" in capsys.readouterr().out
    found = read_evidence(out)
    assert {"ledger.jsonl", "config.toml", "spec.json", "witnesses.jsonl", "checkpoint.json", "rounds.jsonl"} == set(
        found.files
    )
    assert found.manifest["head"] == verify(found.ledger).head.to_json()


def test_nobody_who_was_enrolled_is_in_it_and_no_weight(run, tmp_path):
    (run / "users.parquet").write_bytes(b"secret-text")
    homespun.main(["server", "evidence", str(run), "--out", str(tmp_path / "out.zip"), "--json"])
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        whole = b"".join(archive.read(name) for name in archive.namelist())
    assert b"secret-text" not in whole
    for subject in json.loads((run / "enrolled.json").read_text()):
        assert subject.encode() not in whole
    receipts = re.findall(r'"([0-9a-f]{64})"', (run / "receipts.jsonl").read_text())
    assert receipts
    assert not any(receipt.encode() in whole for receipt in receipts)


def test_a_log_is_cut_to_what_says_nothing_about_anyone_and_says_what_was_cut(run):
    line = {"round": 1, "seconds": 2.0, "rejected": {"busy": 1}, "evaluation": {"global": 1.25}}
    (run / "rounds.jsonl").write_text(json.dumps(line) + '\n{"torn')
    rows = [json.loads(row) for row in collect(run)["rounds.jsonl"].splitlines()]
    assert rows == [{"left_out": ["evaluation", "rejected"], "round": 1, "seconds": 2}]


def test_receipts_are_given_only_when_they_are_asked_for_and_open_what_the_ledger_commits_to(run):
    assert "receipts.jsonl" not in collect(run)
    rows = [json.loads(row) for row in collect(run, receipts=True)["receipts.jsonl"].splitlines()]
    bound = {
        entry.body["round"]: entry.body["cohort_commitment"]
        for entry in verify((run / "ledger.jsonl").read_bytes()).entries
        if entry.kind == "release"
    }
    assert {row["round"]: commitment(row["salt"], row["receipts"]) for row in rows} == bound
    assert (run / "receipts.jsonl").stat().st_mode & 0o077 == 0


def test_a_study_has_no_devices_and_commits_to_nobody(prepare, simulated):
    prepared = prepare()
    prepared.run(simulated())
    assert not (prepared.path / "receipts.jsonl").exists()
    entries = verify((prepared.path / "ledger.jsonl").read_bytes()).entries
    assert all("cohort_commitment" not in entry.body for entry in entries)


def test_what_cannot_be_vouched_for_is_not_written(run, tmp_path):
    out = tmp_path / "out.zip"
    with pytest.raises(VerificationError, match="another key"):
        write_run_evidence(run, out, SigningKey.generate(), time="2026-01-31T12:00:00Z")
    with pytest.raises(DataError, match="no run"):
        collect(tmp_path)
    (run / "checkpoint.safetensors").write_bytes(b"nonsense")
    with pytest.raises(VerificationError, match="no checkpoint"):
        collect(run)
    assert not out.exists()


def test_heads_of_devices_go_with_the_receipts_because_they_show_who_took_part_how_often(run):
    (run / "heads.jsonl").write_text("{}\n")
    assert "heads.jsonl" not in collect(run)
    assert collect(run, receipts=True)["heads.jsonl"] == b"{}\n"
