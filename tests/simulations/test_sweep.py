"""A grid of runs: what it holds, how it goes on, what it says, and where sharing stops helping."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from common.config import RunConfig
from common.errors import ClaimRefused, ConfigError
from common.evaluation import NATS, Interval, compare
from simulations.sweep import cells_of, collect, run_cells, turn_of
from simulations.worlds.loaders import load_users

BASE = 2.0
"""Nats per token of every user's base."""
PEOPLE = 400


def write_people(path, count):
    path.write_text("".join(json.dumps({"user": f"u{n}", "texts": ["a", "b", "c"]}) + "\n" for n in range(count)))


def begin(config, path, digest=None):
    """What a run that was begun leaves: its configuration, resolved, and the digest of its data."""
    path.mkdir(parents=True)
    (path / "config.toml").write_text(config.model_copy(update={"users": config.users or PEOPLE}).to_toml())
    digest = digest or load_users(config.data).source_digest
    (path / "data.json").write_text(json.dumps({"digest": digest}))


def finish(config, path, gains, spent=None):
    """What a finished run leaves, with the given gain over the base for each system and user."""
    begin(config, path)
    rows = [
        {"system": system, "user": str(user), "split": "test", "tokens": 5, "records": 2, NATS.name: BASE - gain}
        for system, own in {"base": [0.0] * len(next(iter(gains.values()))), **gains}.items()
        for user, gain in enumerate(own)
    ]
    pd.DataFrame(rows).to_parquet(path / "users.parquet")
    (path / "statement.json").write_text(json.dumps({"epsilon": config.epsilon - 0.5 if spent is None else spent}))
    (path / "summary.json").write_text("{}")


def grid(tmp_path, methods=("local", "dual"), epsilons=(8.0, 1.0, math.inf), seeds=(0, 1), **changes):
    write_people(tmp_path / "notes.jsonl", PEOPLE)
    return cells_of(
        RunConfig(rehearsal=True, data=str(tmp_path / "notes.jsonl"), **changes), methods, epsilons, seeds, tmp_path
    )


def test_a_method_that_shares_nothing_is_run_once_per_seed_and_others_at_every_epsilon(tmp_path):
    cells = grid(tmp_path)
    assert [(cell.method, cell.epsilon) for cell in cells[:4]] == [
        ("local", None),
        ("dual", 1.0),
        ("dual", 8.0),
        ("dual", math.inf),
    ]
    assert len(cells) == 8
    assert all(cell.config.epsilon == (cell.epsilon or math.inf) for cell in cells)
    assert {cell.config.seed for cell in cells} == {0, 1}
    assert len({cell.folder for cell in cells}) == 8


@pytest.mark.parametrize(("key", "values"), [("methods", ()), ("seeds", (1, 1)), ("methods", ("magic",))])
def test_an_empty_or_wrong_list_is_refused(tmp_path, key, values):
    with pytest.raises(ConfigError):
        grid(tmp_path, **{key: values})


def test_an_interrupted_sweep_goes_on_where_it_stood(tmp_path):
    cells, began, resumed = grid(tmp_path, seeds=(0,)), [], []

    def start(config, path):
        began.append(path.name)
        if len(began) == 2:  # stopped by the owner: a folder, and no results yet
            begin(config, path)
            return False
        finish(config, path, {"private": [0.1, 0.2]})
        return True

    def resume(path):
        resumed.append(path.name)
        (path / "summary.json").write_text("{}")
        return True

    assert run_cells(cells, start, resume, lambda _: None) is None
    assert run_cells(cells, start, resume, lambda _: None) == {}
    assert resumed == [cells[1].folder.name]
    assert began == [cells[0].folder.name, cells[1].folder.name, cells[2].folder.name, cells[3].folder.name]
    assert run_cells(cells, start, resume, lambda _: None) == {}
    assert len(began) == 4


def test_a_folder_with_another_run_in_it_is_not_taken_for_a_cell(tmp_path):
    cells = grid(tmp_path, methods=("local",), seeds=(0,))
    finish(cells[0].config.model_copy(update={"rounds": 3}), cells[0].folder, {"private": [0.1]})
    with pytest.raises(ConfigError, match="another rounds"):
        run_cells(cells, lambda *_: True, lambda _: True, lambda _: None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"users": 300}, "another users"),
        ({"model": "/elsewhere/model"}, "another model"),
        ({"data": "/elsewhere/notes.jsonl"}, "another data"),
    ],
)
def test_a_cell_of_other_users_another_model_or_other_data_is_not_taken_for_one_of_this_sweep(tmp_path, change, words):
    cells = grid(tmp_path, methods=("local",), seeds=(0,))
    begin(cells[0].config.model_copy(update=change), cells[0].folder, digest="other")
    with pytest.raises(ConfigError, match=words):
        run_cells(cells, lambda *_: True, lambda _: True, lambda _: None)


def test_cells_from_before_the_data_changed_are_not_put_beside_new_ones(tmp_path):
    cells = grid(tmp_path, methods=("local", "dual"), epsilons=(8.0,), seeds=(0,))
    finish(cells[0].config, cells[0].folder, {"private": [0.1]})
    path = tmp_path / "notes.jsonl"
    path.write_text(path.read_text().replace('"a"', '"another text"'))
    with pytest.raises(ConfigError, match="before its content changed"):
        run_cells(cells, lambda *_: True, lambda _: True, lambda _: None)


def test_a_cell_whose_promise_would_not_be_true_is_refused_and_the_others_run(tmp_path):
    cells = grid(tmp_path, methods=("fedsa", "dual"), epsilons=(2.0,), seeds=(0,))

    def start(config, path):
        if config.method == "fedsa":
            raise ClaimRefused("private state in the pass")
        finish(config, path, {"global": [0.1] * 4, "private": [0.0] * 4, "both": [0.2] * 4})
        return True

    refused = run_cells(cells, start, lambda _: True, lambda _: None)
    found = collect(cells, refused)
    assert found.refused == ((cells[0].folder.name, "private state in the pass"),)
    assert {point.method for point in found.points} == {"dual"}
    assert found.to_json()["refused"][0]["reason"] == "private state in the pass"


def test_points_are_paired_gains_over_all_seeds_and_a_person_of_a_file_counts_once(tmp_path):
    generator = np.random.default_rng(0)
    gains = {}
    cells = grid(tmp_path, methods=("dual",), epsilons=(8.0,), seeds=(0, 1))
    for cell in cells:
        gains[cell.seed] = {system: generator.normal(0.2, 0.3, 30) for system in ("global", "private", "both")}
        finish(cell.config, cell.folder, gains[cell.seed])
    found = collect(cells, {})
    (both,) = (point for point in found.points if point.system == "both")
    mean = (gains[0]["both"] + gains[1]["both"]) / 2
    expected = compare(BASE - mean, np.full(30, BASE), NATS, np.random.default_rng(0))
    assert both.gain.estimate == pytest.approx(expected.gain.estimate)
    assert both.gain.low == pytest.approx(expected.gain.low, abs=0.02)
    assert both.worst_decile_gain.estimate == pytest.approx(np.sort(mean)[:3].mean())
    assert (both.users, both.seeds, both.spent) == (30, 2, 7.5)
    assert both.nats == pytest.approx(BASE - mean.mean())
    strangers = [replace(cell, config=cell.config.model_copy(update={"data": "built-in"})) for cell in cells]
    assert {point.users for point in collect(strangers, {}).points} == {60}


def interval(low, middle, high):
    return Interval(middle, low, high)


@pytest.mark.parametrize(
    ("lows", "stops", "words"),
    [
        ({1.0: 0.1, 8.0: 0.2, math.inf: 0.3}, None, "at every epsilon"),
        ({1.0: -0.1, 8.0: 0.2, math.inf: 0.3}, 1.0, "from epsilon 8 on, and no longer at 1"),
        ({1.0: -0.3, 8.0: -0.2, math.inf: 0.3}, 8.0, "from epsilon inf on, and no longer at 8"),
        ({1.0: -0.3, 8.0: -0.2, math.inf: -0.1}, math.inf, "not help over private alone at any"),
    ],
)
def test_sharing_stops_helping_at_the_largest_epsilon_below_all_where_it_helps(lows, stops, words):
    turn = turn_of(
        "dual", "private alone", [(epsilon, interval(low, low + 1, low + 2)) for epsilon, low in lows.items()]
    )
    assert turn.stops_at == stops
    assert words in turn.sentence()


def test_the_turn_compares_with_what_users_would_have_without_sharing(tmp_path):
    cells = grid(tmp_path, methods=("dual", "fedavg"), epsilons=(1.0, 8.0), seeds=(0,))
    for cell in cells:
        helps = cell.epsilon == 8.0
        noise = np.random.default_rng(1).normal(0, 0.01, 40)
        if cell.method == "dual":
            own = {"global": noise, "private": 0.3 + noise, "both": (0.5 if helps else 0.2) + noise}
        else:
            own = {"global": (0.1 if helps else -0.1) + noise}
        finish(cell.config, cell.folder, own)
    dual, fedavg = collect(cells, {}).turns
    assert (dual.against, fedavg.against) == ("private alone", "base")
    assert dual.stops_at == fedavg.stops_at == 1.0
    assert [round(gain.estimate, 2) for _, gain in dual.gains] == [-0.1, 0.2]


def test_what_is_written_is_one_table_twice_and_plain_json(tmp_path):
    cells = grid(tmp_path, methods=("dual",), epsilons=(8.0, math.inf), seeds=(0,))
    for cell in cells:
        finish(cell.config, cell.folder, {"global": [0.1] * 5, "private": [0.2] * 5, "both": [0.3] * 5}, spent=7.0)
    found = collect(cells, {})
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(rows) == len(plain["points"]) == 6
    assert "not claimed" in plain["epsilon"]
    for row, point in zip(rows, plain["points"], strict=True):
        assert row["epsilon"] == str(point["epsilon"])
        assert float(row["gain"]) == pytest.approx(point["gain"])
    assert {point["spent"] for point in plain["points"]} == {7.0, "inf"}
