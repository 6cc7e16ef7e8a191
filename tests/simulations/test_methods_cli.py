"""`sim methods` and `sim sweep`: what they print and write, and that a second call goes on."""

from __future__ import annotations

import json

import pytest

import homespun
from common.methods import METHODS

SMALL = [
    "--cohort=4",
    "--rounds=1",
    "--local-steps=2",
    "--local-batch=2",
    "--personal-steps=2",
    "--personal-batch=2",
    "--evaluation-users=4",
    "--workers=0",
    "--max-tokens=24",
]


def test_methods_lists_what_each_shares_keeps_and_is_called(capsys):
    assert homespun.main(["sim", "methods", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows.keys() == METHODS.keys()
    assert rows["fedsa"]["shares"] == "A"
    assert rows["fedsa"]["keeps"] == "B"
    assert rows["dual-joint"]["aliases"] == ["feddpa-t"]
    assert rows["layers"]["silo"] == "refused without --private-noise"
    assert homespun.main(["sim", "methods"]) == 0
    assert "mean, cut to the rank by SVD" in capsys.readouterr().out


@pytest.fixture
def notes(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    texts = [[f"w{3 + user * 7 + word} w{4 + user} w{5 + word}" for word in range(8)] for user in range(10)]
    (tmp_path / "notes.jsonl").write_text(
        "".join(json.dumps({"user": f"u{user}", "texts": own}) + "\n" for user, own in enumerate(texts))
    )
    return tmp_path / "notes.jsonl"


def test_a_sweep_writes_its_table_and_figure_and_the_same_command_runs_nothing_twice(notes, tiny_base_folder, capsys):
    command = ["sim", "sweep", "--data", str(notes), "--model", str(tiny_base_folder), *SMALL]
    command += ["--methods", "local,feddpa-f", "--epsilons", "8,inf", "--out", "grid", "--json"]
    assert homespun.main(command) == 0
    first = json.loads(capsys.readouterr().out)
    systems = {(point["method"], point["system"]) for point in first["points"]}
    assert {("local", "private"), ("dual", "global"), ("dual", "private"), ("dual", "both")} <= systems
    assert ("local", "global") not in systems
    assert {("local", "another"), ("dual", "another"), ("local", "pooled")} <= systems
    assert {own["method"] for own in first["own_over_another"]} == {"local", "dual"}
    assert [len(own["gains"]) for own in first["own_over_another"]] == [1, 2]
    assert "not claimed" in first["epsilon"]
    folder = notes.parent / "grid"
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/users.parquet")}
    assert len(before) == 3
    assert homespun.main(command) == 0
    captured = capsys.readouterr()
    assert captured.err.count("finished before") == 3
    assert json.loads(captured.out) == first
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert (folder / "sweep.csv").read_text().count("\n") == 1 + len(first["points"])
    assert "<svg" in (folder / "sweep.html").read_text()


def test_a_sweep_in_silo_mode_refuses_the_cells_whose_promise_would_be_false(notes, tiny_base_folder, capsys):
    command = ["sim", "sweep", "--data", str(notes), "--model", str(tiny_base_folder), *SMALL, "--unit", "example"]
    assert homespun.main([*command, "--methods", "fedsa,local", "--epsilons", "8", "--out", "grid", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (refused,) = found["refused"]
    assert "private part" in refused["reason"]
    assert {point["method"] for point in found["points"]} == {"local"}


def test_a_list_that_is_none_is_refused_by_name(notes, capsys):
    assert homespun.main(["sim", "sweep", "--data", str(notes), "--epsilons", "one"]) == 2
    assert "epsilons" in capsys.readouterr().err
    assert homespun.main(["sim", "sweep", "--data", str(notes), "--epsilons", "0"]) == 2


def test_a_cohort_that_nobody_named_fits_the_data(notes, tiny_base_folder, capsys):
    command = ["sim", "sweep", "--data", str(notes), "--model", str(tiny_base_folder), *SMALL[1:]]
    assert homespun.main([*command, "--methods", "local", "--out", "grid", "--json"]) == 0
    captured = capsys.readouterr()
    assert "cohort 5" in captured.err
    assert "rounds" not in captured.err  # that was named
    assert "of about 5 users" in json.loads(captured.out)["setting"]
