"""The benchmarks themselves: they run, they compare the same work, and their ratios are what they say."""

from __future__ import annotations

import json
import os

import pytest

from common.errors import ConfigError
from simulations.bench import engines, overhead, population, suite
from simulations.bench.workloads import WORKLOADS, Workload

TINY = Workload("tiny", batch=2, shortest=4, longest=12)


def test_engines_take_turns_and_ratios_are_of_medians():
    seen = []

    def engine(name, seconds):
        def run():
            seen.append(name)
            return next(seconds)

        return run

    found = suite.compared(
        "n", "user", {"ours": engine("a", iter([9, 1, 2, 3])), "theirs": engine("b", iter([9, 2, 6, 4]))}, 3, 10, "ours"
    )
    assert seen == ["a", "b"] * 4
    assert found.medians == {"ours": 200.0, "theirs": 400.0}
    assert found.ratios["theirs / ours"][0] == 2.0


def test_workloads_are_what_the_tables_call_them():
    assert [len(record.ids) for record in WORKLOADS["standard"].users(1)[0]] == [64] * 16
    lengths = [len(record.ids) for own in WORKLOADS["ragged"].users(50) for record in own]
    assert (min(lengths), max(lengths)) == (4, 64)
    again = WORKLOADS["ragged"].users(2)[1][0].ids
    assert (again == WORKLOADS["ragged"].users(2)[1][0].ids).all()


def test_every_way_runs_a_round():
    users = TINY.users(2)
    trainer = engines.bench_trainer()
    for run in (
        engines.ours(trainer, TINY, users),
        engines.one_by_one(TINY, users),
        engines.matrix_products(TINY, 2, pass_tokens=16),
        engines.matrix_products(TINY, 2, pass_tokens=16, laid_out=True),
        engines.silo_steps(trainer, users[0], private=True),
        engines.silo_steps(trainer, users[0], private=False),
    ):
        run()


def test_the_steps_without_privacy_see_the_batches_of_those_with(monkeypatch):
    trainer = engines.bench_trainer()
    records = Workload("silo", 8, 4, 12).users(1)[0]
    seen = []
    real = type(trainer).clipped_gradient_sum

    def noted(self, vector, examples, *given, **named):
        seen.append([id(one) for one in examples])
        return real(self, vector, examples, *given, **named)

    monkeypatch.setattr(type(trainer), "clipped_gradient_sum", noted)
    engines.silo_steps(trainer, records, private=True)()
    assert seen == [[id(one) for one in batch] for batch in engines._batches(records, trainer.layout.size)]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opacus_steps_run():
    engines.opacus_steps(TINY.users(1)[0], engines.bench_trainer().layout.size)()


def test_clients_that_do_nothing_pass_the_whole_way(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "PARAMETERS", 160)
    run = overhead._no_op_round(tmp_path, 6, "central", True, 2)
    run()
    run()
    lines = [json.loads(line) for line in (tmp_path / "chunks.jsonl").read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["open", "reserve", *["debit", "release"] * 6]


def test_memory_and_traffic_count_this_process():
    assert population.memory_of_all() > 10 * 2**20
    before = population.traffic_of_all()
    os.pread(os.open("/dev/zero", os.O_RDONLY), 100_000, 0)
    assert population.traffic_of_all() >= before + 100_000


def test_a_part_becomes_a_table_and_json():
    found = suite.Comparison("n", "user", {"a": 1.0}, {"a": (0.5, 1.5)}, {"b / a": (2.0, 1.9, 2.1)}, {"k": 1})
    assert "b / a" in suite.table_of(found)
    assert json.loads(suite.as_json({"results": [found.name]})) == {"results": ["n"]}


def test_the_parts_for_gpus_run_where_there_is_one_and_say_so_where_there_is_none(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert not [part for part in suite.parts_here() if part.startswith("gpu")]
    with pytest.raises(ConfigError, match="no CUDA device"):
        suite.run_suite(["gpu"], quick=True, compiled=False, say=print)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert suite.parts_here() == suite.PARTS


def test_the_file_says_the_machines_cores_and_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3}, raising=False)
    machine = suite.run_suite([], quick=True, compiled=False, say=print)["machine"]
    assert (machine["cores"], machine["cores_of_this_process"]) == (8, 1)
