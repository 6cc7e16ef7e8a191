"""What a ledger binds of the files beside it: held on honest evidence, and every exchange of a file is found."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import homespun
from common.evidence import read_evidence
from common.ledger_format import verify
from common.wire import ReleaseSpec
from simulations.bindings import bindings

ROOT = Path(__file__).resolve().parents[2]


def bound(path):
    evidence = read_evidence(path)
    return bindings(evidence, verify(evidence.ledger))


def verdicts(path):
    return {one.verdict for one in bound(path)}


def test_everything_that_is_bound_agrees_on_an_honest_run_and_on_both_sides_zips(run, fleet_zips):
    server, devices = fleet_zips("local")
    assert verdicts(run) == verdicts(server) == verdicts(devices[0]) == {"holds"}


@pytest.mark.parametrize("name", ["config.toml", "spec.json", "checkpoint.safetensors"])
def test_a_file_of_another_run_is_not_the_one_that_is_bound(run, make_fleet, name):
    shutil.copy(make_fleet("local").run / name, run / name)
    assert "contradicted" in verdicts(run)


def test_a_ledger_of_another_run_binds_other_files(run, make_fleet, capsys):
    shutil.copy(make_fleet("local").run / "ledger.jsonl", run / "ledger.jsonl")
    assert homespun.main(["audit", "verify", str(run)]) == 4
    assert "config.toml is not what entry 0 binds" in capsys.readouterr().out


def test_a_round_without_a_debit_is_a_gap(run):
    with (run / "rounds.jsonl").open("a") as file:
        file.write(json.dumps({"round": 99}) + "\n")
    assert any("round 99" in one.why for one in bound(run) if one.verdict == "contradicted")


def test_a_policy_of_another_device_is_not_signed_with_the_key_of_the_ledger(make_fleet, tmp_path):
    one, other = make_fleet("local").devices[:2]
    (tmp_path / "ledger.jsonl").write_bytes((one / "ledger.jsonl").read_bytes())
    for name in ("policy.toml", "policy.toml.sig"):
        shutil.copy(one / name, tmp_path / name)
    assert verdicts(tmp_path) == {"holds"}
    (tmp_path / "policy.toml.sig").write_bytes((other / "policy.toml.sig").read_bytes())
    assert verdicts(tmp_path) == {"contradicted"}


def test_the_digest_of_a_request_is_the_one_that_devices_name(run):
    for changes in ({}, {"counts": {"clip_quantile": 0.5}}, {"noise": "local", "witnesses": 0}):
        spec = replace(ReleaseSpec.from_text((run / "spec.json").read_text()), **changes)
        (run / "spec.json").write_text(spec.to_text() + "\n")
        agrees = [one.verdict for one in bound(run) if one.claim == "devices were asked for what was reserved"]
        entries = verify((run / "ledger.jsonl").read_bytes()).entries
        named = {entry.body["spec"] for entry in entries if entry.kind == "debit"}
        assert (agrees == ["holds"]) == (named == {spec.digest})


def test_what_is_missing_is_not_shown(run):
    for name in ("config.toml", "spec.json", "rounds.jsonl", "checkpoint.safetensors"):
        (run / name).unlink()
    assert verdicts(run) == {"not shown"}


def test_nothing_that_prices_is_imported():
    heavy = ("torch", "flwr", "scipy", "dp_accounting", "numpy", "pydantic")
    code = f"import sys, simulations.bindings; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
