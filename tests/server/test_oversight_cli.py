"""`homespun server evidence` as a person meets it; what is in the zip is in test_run_evidence."""

from __future__ import annotations

import json

import homespun


def test_the_evidence_of_a_run_is_written_beside_where_one_stands(make_fleet, tmp_path, monkeypatch, capsys):
    fleet = make_fleet()
    monkeypatch.setenv("HOMESPUN_HOME", str(fleet.home))
    monkeypatch.chdir(tmp_path)
    assert homespun.main(["server", "evidence", str(fleet.run), "--receipts", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (tmp_path / "run-evidence.zip").exists()
    assert "receipts.jsonl" in shown["files"]


def test_where_there_is_no_run_it_is_one_line(tmp_path, capsys):
    assert homespun.main(["server", "evidence", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
