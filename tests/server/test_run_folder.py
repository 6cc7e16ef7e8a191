"""The folder of a run: whole or absent, opened by one process, and what it reserves is what it will run."""

from __future__ import annotations

import json
import os
import stat
from dataclasses import replace

import numpy as np
import pytest

from common.accounting import epsilon_of, event_from_json
from common.config import load_config, read_config_file
from common.errors import ClaimRefused, ConfigError, DataError, Refusal, StoreError, VerificationError
from common.ledger import verify
from common.promise import promise_of
from server import run_folder
from server.checkpoint import Checkpoint

PROMISE = {"epsilon": 8.0, "rounds": 3, "spare_rounds": 2}


def reopened(path):
    opened = run_folder.reopen(path)
    opened.ledger.close()
    return opened


def test_a_new_run_holds_its_configuration_its_spec_a_start_and_a_reservation(prepare):
    run = prepare(**PROMISE)
    assert sorted(path.name for path in run.path.iterdir()) == [
        "checkpoint.safetensors",
        "config.toml",
        "ledger.jsonl",
        "ledger.jsonl.lock",
        "rounds.jsonl",
        "spec.json",
    ]
    opened = reopened(run.path)
    assert (opened.spec.rounds, opened.spec.population, opened.spec.sampling_rate) == (5, 12, 0.5)
    assert opened.spec.recipe["scaling"] == opened.config.scaling
    assert opened.start.shape == (opened.spec.model_dim,)
    assert opened.start.any()
    assert load_config(read_config_file(run.path / run_folder.CONFIG)) == opened.config


def test_the_reservation_is_the_whole_schedule_priced_as_one(prepare):
    run = prepare(**PROMISE)
    spec = run.spec
    entries = verify((run.path / run_folder.LEDGER).read_bytes()).entries
    (reserve,) = (entry for entry in entries if entry.kind == "reserve")
    event = event_from_json(reserve.body["event"])
    assert event == promise_of(spec).schedule(spec.noise_multiplier, 5)
    assert 7.9 <= epsilon_of([event], spec.delta) <= 8.0
    assert reserve.body["spec"] == spec.digest


def test_the_ledger_is_bound_to_this_run(prepare):
    run = prepare()
    header = verify((run.path / run_folder.LEDGER).read_bytes()).entries[0].body
    assert (header["run"], header["model"], header["data"]) == (run.spec.run, "cd" * 32, "ef" * 32)
    assert header["rehearsal"] is True


def test_two_runs_of_one_configuration_start_alike_under_names_of_their_own(prepare):
    first, second = (reopened(prepare(name).path) for name in ("a", "b"))
    assert first.start.tobytes() == second.start.tobytes()
    assert first.spec.run != second.spec.run
    assert reopened(prepare("c", seed=5).path).start.tobytes() != first.start.tobytes()


def test_a_folder_that_holds_something_is_left_alone(prepare, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds something"):
        prepare()
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="already holds something"):
        prepare("file")


def test_an_empty_folder_is_taken(prepare, tmp_path):
    (tmp_path / "run").mkdir()
    assert prepare().spec.population == 12


@pytest.mark.parametrize("call", ["save", "append"])
def test_nothing_half_written_is_left_when_the_disk_is_full(prepare, tmp_path, monkeypatch, call):
    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    owner = {"save": Checkpoint, "append": run_folder.Ledger}[call]
    monkeypatch.setattr(owner, call, fails)
    with pytest.raises(OSError, match="No space left"):
        prepare()
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


def test_a_cohort_above_the_population_is_refused_before_anything_is_written(prepare, tmp_path, paper_base):
    config = load_config({"cohort": 13, "rounds": 1, "epsilon": float("inf")})
    with pytest.raises(ConfigError, match="13 users per round is more than the population of 12"):
        run_folder.prepare_spec(config, population=12, model=paper_base)


def test_a_target_that_the_base_does_not_have_is_named(prepare):
    with pytest.raises(ConfigError, match="k_proj"):
        prepare(targets=("k_proj",))


def test_a_promise_that_would_not_be_true_does_not_start(prepare, tmp_path):
    with pytest.raises(ClaimRefused):
        prepare(**PROMISE, delta=0.5)
    assert not (tmp_path / "run").exists()


def test_one_process_at_a_time_writes_to_a_run(prepare):
    run = prepare()
    opened = run_folder.reopen(run.path)
    with pytest.raises(Refusal) as refused:
        run_folder.reopen(run.path)
    assert refused.value.code == "ledger-locked"
    opened.ledger.close()
    reopened(run.path)


def test_another_installation_does_not_write_to_this_ledger(prepare, tmp_path, monkeypatch):
    run = prepare()
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "other"))
    with pytest.raises(StoreError, match="may not write"):
        run_folder.reopen(run.path)


def test_the_key_of_an_installation_is_made_once_and_for_its_owner_only(prepare, tmp_path):
    prepare("a")
    path = tmp_path / "home" / "keys" / "writer.key"
    first = path.read_bytes()
    prepare("b")
    assert path.read_bytes() == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", [run_folder.CONFIG, run_folder.SPEC, run_folder.CHECKPOINT])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\xff\xfe\x00"])
def test_a_run_with_a_damaged_file_names_it(prepare, name, content):
    run = prepare()
    path = run.path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    with pytest.raises((DataError, ConfigError, VerificationError)) as wrong:
        run_folder.reopen(run.path)
    assert str(run.path) in str(wrong.value)


def test_a_run_goes_on_under_the_spec_that_was_reserved_and_as_what_it_began(prepare):
    run = prepare(**PROMISE)
    spec, config = run.path / run_folder.SPEC, run.path / run_folder.CONFIG
    for path, changed in (
        (spec, replace(run.spec, noise_multiplier=0.0).to_text()),
        (spec, replace(run.spec, rounds=500).to_text()),
        (config, config.read_text().replace("rehearsal = true", "rehearsal = false")),
    ):
        before = path.read_text()
        assert changed != before
        path.write_text(changed)
        with pytest.raises(VerificationError, match="that the run's ledger"):
            run_folder.reopen(run.path)
        path.write_text(before)
    reopened(run.path)


def test_a_folder_without_a_run_says_so(tmp_path):
    with pytest.raises(DataError, match="no run in this folder"):
        run_folder.reopen(tmp_path)


def test_the_folder_is_as_readable_as_the_owner_wants(prepare):
    before = os.umask(0o027)
    try:
        path = prepare().path
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_an_extrapolated_run_says_so_in_its_spec_and_needs_a_larger_population(prepare):
    spec = prepare(**PROMISE, as_if_population=24).spec
    assert spec.extrapolation == 0.5
    with pytest.raises(ConfigError, match="as_if_population"):
        prepare("small", **PROMISE, as_if_population=6)


def test_a_spec_reads_back_with_the_digest_that_the_ledger_holds(prepare):
    run = prepare(**PROMISE)
    text = (run.path / run_folder.SPEC).read_text()
    assert json.loads(text)["population"] == 12
    assert run_folder.ReleaseSpec.from_text(text).digest == run.spec.digest
    assert np.isfinite(run.spec.noise_multiplier)
