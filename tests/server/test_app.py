"""The ServerApp: opens the run that it is told of, runs it, and gives it back."""

from __future__ import annotations

import json

import pytest
from flwr.app import Context, RecordDict

from common.errors import ConfigError, DataError
from server import fleet_runs, run_folder
from server.app import app, build


def context(**run_config):
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


def test_the_app_of_the_bundle_runs_the_folder_that_it_is_told(prepare, simulated, capsys):
    run = prepare(rounds=2)
    app(simulated(), context(folder=str(run.path)))
    assert run.debits() == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    # Nothing that is published says who was in a round, or how many.
    rounds = [line for line in lines if line["event"] == "round"]
    assert [set(line) for line in rounds] == [{"time", "event", "round", "seconds", "spent"}] * 2
    assert [line["round"] for line in rounds] == [1, 2]
    assert [line["event"] for line in lines] == ["begun", "round", "round", "finished"]
    assert lines[-1].items() >= {"round": 2, "of": 2, "spent": 2}.items()
    kept = [json.loads(line) for line in (run.path / fleet_runs.EVENTS).read_text().splitlines()]
    assert [one | {"time": ""} for one in kept] == [one | {"time": ""} for one in lines]


def test_without_a_folder_it_says_how_to_name_one(simulated):
    with pytest.raises(ConfigError, match="folder"):
        app(simulated(), context())


def test_a_folder_that_holds_no_run_is_an_error(simulated, tmp_path):
    with pytest.raises(DataError, match="no run"):
        app(simulated(), context(folder=str(tmp_path)))


def test_the_run_is_given_back_also_when_a_round_fails(prepare, simulated):
    run = prepare()

    def fails(_):
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        build(lambda _: run_folder.reopen(run.path), fails)(simulated(), context())
    assert run.debits() == 1  # reopened by nobody else in between
