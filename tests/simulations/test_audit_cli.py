"""`homespun audit`: exit codes, JSON, and what is not needed to run it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import homespun
from common.ledger_format import verify

ROOT = Path(__file__).parents[2]


def audit(capsys, *words):
    code = homespun.main(["audit", *map(str, words)])
    return code, capsys.readouterr().out


def test_an_honest_run_verifies_and_recomputes(run, capsys):
    code, out = audit(capsys, "verify", run)
    assert (code, "verified" in out, "5 of 5 things that it binds" in out) == (0, True, True)
    code, out = audit(capsys, "recompute", run)
    assert code == 0
    assert "verdict: holds" in out
    assert "of 1,000 people who took part" in out
    assert "as a Gaussian mechanism: mu" in out


def test_recomputing_gives_json_with_everything(run, forge, capsys):
    code, out = audit(capsys, "recompute", run, forge(run).parent, "--budget", "8", "--json")
    report = json.loads(out)
    assert (code, report["verdict"]) == (4, "contradicted")
    assert [one["verdict"] for one in report["ledgers"]] == ["holds", "holds"]
    assert report["totals"]["organization"]["verdict"] == "contradicted"
    assert len(report["ledgers"][0]["findings"]) == 12
    assert "secret-name" not in out


def test_a_tampered_ledger_does_not_check_out_anywhere(run, capsys):
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:3] + lines[4:]))  # an event is missing
    for words in (["verify", run], ["recompute", run]):
        code, out = audit(capsys, *words)
        assert (code, "check out" in out.lower()) == (4, True)


def test_a_ledger_by_another_key_is_refused_when_the_key_is_known(run, forge, capsys):
    key = verify((run / "ledger.jsonl").read_bytes()).head.writer
    assert audit(capsys, "verify", run, "--key", key)[0] == 0
    code, out = audit(capsys, "verify", forge(run).parent, "--key", key)
    assert (code, "not among the public keys" in out) == (4, True)


def test_a_rollback_is_found_by_whoever_kept_a_head(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "another machine"))
    head = verify((run / "ledger.jsonl").read_bytes()).head
    (tmp_path / "heads").write_text(json.dumps(head.to_json()) + "\n")
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-2]))
    code, out = audit(capsys, "verify", run)
    assert (code, "an entry that the ledger lacks" in out) == (4, True)  # its checkpoint was released under it
    (tmp_path / "bare.jsonl").write_bytes((run / "ledger.jsonl").read_bytes())
    assert audit(capsys, "verify", tmp_path / "bare.jsonl")[0] == 0
    code, out = audit(capsys, "verify", tmp_path / "bare.jsonl", "--head", tmp_path / "heads")
    assert (code, "old copy" in out) == (4, True)


def test_a_contradiction_in_the_folder_is_the_verdict_and_the_exit_code(run, capsys):
    statement = json.loads((run / "statement.json").read_text())
    (run / "statement.json").write_text(json.dumps(statement | {"epsilon": 0.5}))
    code, out = audit(capsys, "recompute", run)
    assert (code, "contradicted: the published statement" in out) == (4, True)


def test_a_folder_without_a_ledger_is_one_line(tmp_path, capsys):
    for command in ("verify", "recompute", "attack"):
        assert homespun.main(["audit", command, str(tmp_path)]) == 1
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "absent"),
    [("verify", ("torch", "flwr", "scipy", "dp_accounting")), ("recompute", ("torch", "flwr", "safetensors"))],
)
def test_what_an_auditor_does_not_have_is_not_imported(run, command, absent):
    code = (
        "import sys, homespun\n"
        f"code = homespun.main(['audit', {command!r}, {str(run)!r}])\n"
        f"print([name for name in {absent!r} if name in sys.modules], code)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[] 0"


def test_verifying_starts_at_once(run, slower):
    # Processor time, not wall time: other tests may have the machine.
    code = f"import time, homespun\nhomespun.main(['audit', 'verify', {str(run)!r}])\nprint(time.process_time())"
    command = [sys.executable, "-c", code]
    done = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(one.stdout.splitlines()[-1]) for one in done) < 0.5 * slower
