"""What stands beside a run's first table: kinds of question, measures, and systems compared question by question."""

from __future__ import annotations

import io
import json
import runpy
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import DataError
from common.evaluation import DEGENERATION, NATS, PREFERENCE, summarize
from simulations.report import write_report
from simulations.report_tables import kind_metrics, measures_table, query_tests, tables_of

write_fake_run = runpy.run_path(str(Path(__file__).with_name("fake_run.py")))["write_fake_run"]
USERS = 12


def frame_of():
    """Two systems; everybody was asked a fact, half of them a choice; only one system answered in words."""
    generator = np.random.default_rng(0)
    users = [str(user) for user in range(USERS)] * 2
    choice = np.where(np.arange(2 * USERS) % 2 == 0, generator.gamma(2.0, size=2 * USERS), np.nan)
    return {
        "user": np.array(users),
        "system": np.array(["base"] * USERS + ["both"] * USERS),
        "nats_per_token": generator.gamma(2.0, size=2 * USERS),
        "nats_extraction": generator.gamma(2.0, size=2 * USERS),
        "nats_generalization": choice,
        "preference_accuracy": generator.uniform(size=2 * USERS),
        "degeneration": np.array([np.nan] * USERS + [0.25] * USERS),
    }


@pytest.fixture
def summary():
    frame = frame_of()
    metrics = (NATS, PREFERENCE, DEGENERATION, *kind_metrics(list(frame)))
    return summarize(frame, np.random.default_rng(0), metrics=metrics)


def test_each_kind_is_a_column_of_the_users_who_were_asked_it(summary, tmp_path):
    (table,) = tables_of(tmp_path, summary)
    assert table.head == ("System", "extraction, 12 users", "generalization, 6 users")
    assert [row[0][0] for row in table.rows] == ["base", "both"]
    value, interval = table.rows[1][2]
    own = frame_of()["nats_generalization"][USERS:]
    assert float(value) == pytest.approx(np.nanmean(own), abs=1e-3)
    assert " to " in interval


def test_the_terminal_shows_every_measure_and_leaves_open_what_was_not_measured(summary):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(measures_table(summary))
    text = console.export_text()
    assert "preference" in text
    assert "25%" in text  # of the one system that answered in words
    assert "extraction" in text


def write_queries(folder, systems, users=6, each=4):
    generator = np.random.default_rng(1)
    rows = [
        {"user": str(user), "system": system, "query": query, "nats": float(generator.gamma(2.0) + 5 - at), "tokens": 3}
        for at, system in enumerate(systems)
        for user in range(users)
        for query in range(each)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "queries.parquet")


def test_systems_are_compared_question_by_question_on_the_page_and_in_the_summary(tmp_path):
    run = write_fake_run(tmp_path / "run")
    write_queries(run, ["base", "global", "private", "both", "another"])
    found = query_tests(run)
    pairs = {(one.system, one.reference) for one in found}
    assert {("both", "global"), ("private", "global"), ("both", "another")} <= pairs
    assert all(one.queries == 24 and one.users == 6 for one in found)
    assert all(one.p_adjusted >= one.p_by_user for one in found)
    page = write_report(run).read_text()
    assert "Question by question" in page
    kept = json.loads((run / "summary.json").read_text())["queries"]
    assert {(one["system"], one["reference"]) for one in kept} == pairs


def test_a_run_without_questions_has_no_such_table_and_a_broken_file_is_named(tmp_path):
    run = write_fake_run(tmp_path / "run")
    assert query_tests(run) == []
    (run / "queries.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match=r"queries\.parquet"):
        query_tests(run)
    (run / "newcomers.json").write_text("{}")
    with pytest.raises(DataError, match=r"newcomers\.json"):
        tables_of(run, None)
