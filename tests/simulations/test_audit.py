"""The whole audit: verdicts on honest evidence of either side, and what an earlier audit remembers."""

from __future__ import annotations

import json

import pytest

from common.errors import DataError, VerificationError
from common.evidence import read_evidence
from common.ledger_format import verify
from simulations.audit import audit

TIME = "2026-01-31T12:00:00Z"


def verdicts(done):
    return {one.text: one.verdict for one in done.claims}


def test_an_honest_study_holds_and_what_nobody_showed_is_not_shown(run):
    done = audit([run], time=TIME)
    assert done.verdict == "holds"
    found = verdicts(done)
    assert found["No more was spent than promised"] == found["Nothing was changed afterwards"] == "holds"
    assert found["Server and devices agree"] == found["Signed with known keys"] == "not shown"
    assert "contradicted" not in found.values()


@pytest.mark.parametrize("noise", ["local", "central"])
def test_an_honest_federation_holds_on_both_sides_and_counts_what_two_sides_tell_once(fleet_zips, noise):
    server, devices = fleet_zips(noise)
    keys = [read_evidence(path).manifest["public_key"] for path in (server, *devices)]
    done = audit([server, *devices], time=TIME, keys=keys, budget=16.0)
    assert done.verdict == "holds"
    assert verdicts(done)["Signed with known keys"] == verdicts(done)["Server and devices agree"] == "holds"
    alone = audit([server], time=TIME).summed["organization"]["spent"]["epsilon"]
    assert done.summed["organization"]["spent"]["epsilon"] == alone
    assert verdicts(done)["All runs stay within the budget"] == "holds"


def test_devices_alone_can_be_audited_and_only_the_one_that_sent_most_counts(fleet_zips):
    _, devices = fleet_zips("local")
    done = audit(devices, time=TIME)
    assert done.verdict == "holds"
    each = [audit([path], time=TIME).summed["organization"]["reserved_epsilon"] for path in devices]
    assert done.summed["organization"]["reserved_epsilon"] == max(each)


def test_a_key_that_was_not_named_is_a_contradiction(fleet_zips):
    server, devices = fleet_zips("local")
    own = read_evidence(server).manifest["public_key"]
    assert verdicts(audit([server], time=TIME, keys=[own]))["Signed with known keys"] == "holds"
    done = audit([server, devices[0]], time=TIME, keys=[own])
    assert (verdicts(done)["Signed with known keys"], done.verdict) == ("contradicted", "contradicted")


def test_an_earlier_audit_finds_a_ledger_that_was_rolled_back_since(run):
    before = json.loads(json.dumps(audit([run], time=TIME).to_json()))
    again = audit([run], time=TIME, since=before)
    assert verdicts(again)["No ledger was rolled back"] == "holds"
    assert [text for text in again.changes if "rolled back" not in text] == []
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-2]))
    rolled = audit([run], time=TIME, since=before)
    assert rolled.verdict == "contradicted"
    assert any("old copy" in one.why for one in rolled.claims)


def test_what_changed_is_said_ledger_by_ledger(run, fleet_zips):
    server, devices = fleet_zips("local")
    before = json.loads(json.dumps(audit([run, server], time=TIME).to_json()))
    done = audit([server, devices[0]], time=TIME, since=before)
    assert any(text.startswith("new: ") for text in done.changes)
    assert any(text.startswith("not shown any more: ") for text in done.changes)
    with pytest.raises(VerificationError, match="not the JSON of an audit"):
        audit([run], time=TIME, since={"ledgers": [{"head": 1}]})


def test_a_rehearsal_claims_nothing(run, forge):
    path = forge(run, header={"rehearsal": True})
    assert audit([path], time=TIME).verdict == "no claim"


def test_a_zip_with_a_fault_is_a_verdict_and_not_a_crash(fleet_zips, tmp_path):
    server, _ = fleet_zips("local")
    content = bytearray(server.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "broken.zip").write_bytes(content)
    done = audit([tmp_path / "broken.zip", server], time=TIME)
    assert done.verdict == "contradicted"
    assert json.dumps(done.to_json(), allow_nan=False)
    with pytest.raises(DataError):
        audit([tmp_path / "absent"], time=TIME)


def test_the_json_binds_every_file_that_was_read_and_holds_no_user_data(run):
    report = audit([run], time=TIME).to_json()
    (ledger,) = report["ledgers"]
    assert ledger["head"] == verify((run / "ledger.jsonl").read_bytes()).head.to_json()
    assert {"ledger.jsonl", "config.toml", "spec.json", "statement.json"} <= ledger["files"].keys()
    assert "secret-name" not in json.dumps(report)


def test_an_attack_that_contradicts_beside_the_ledger_contradicts_the_audit(run):
    result = {
        "name": "mechanism test",
        "target": "the mechanism",
        "measure": "epsilon of one release, at least",
        "value": 9.0,
        "low": 9.0,
        "high": "inf",
        "chance": 0.0,
        "saturation": "inf",
        "verdict": "contradicted",
        "why": "more is proven than was claimed",
    }
    (run / "attacks.json").write_text(json.dumps({"results": [result]}))
    done = audit([run], time=TIME)
    assert verdicts(done)["The code does what it promises"] == "contradicted"
    (run / "attacks.json").write_text(json.dumps({"results": [result | {"verdict": "holds"}]}))
    assert verdicts(audit([run], time=TIME))["The code does what it promises"] == "holds"
    (run / "attacks.json").write_text("[1]")
    assert audit([run], time=TIME).verdict == "holds"
