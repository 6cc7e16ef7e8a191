"""One run end to end on a tiny base: what it writes, how it resumes, and what it says when something is wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import homespun
from client.vault import Vault
from common.config import RunConfig, load_config, read_config_file
from common.errors import BudgetSpent, ClaimRefused, ConfigError, DataError, HomespunError, Refusal
from common.ledger_format import verify
from common.methods import METHODS
from server.checkpoint import Checkpoint
from simulations import hosts
from simulations import run as run_module
from simulations.personal import export_user
from simulations.run import Progress, resume, start

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def notes(tmp_path_factory) -> Path:
    """Twenty users of a file, each with words of their own."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    with path.open("w") as file:
        for user in range(20):
            own = generator.integers(3, 128, size=6)
            texts = [" ".join(f"w{w}" for w in generator.choice(own, size=8)) for _ in range(9)]
            file.write(json.dumps({"user": f"secret-name-{user}", "texts": texts}) + "\n")
    return path


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))


@pytest.fixture
def config(tiny_base_folder, notes):
    return RunConfig(
        model=str(tiny_base_folder),
        data=str(notes),
        cohort=8,
        rounds=3,
        local_batch=2,
        personal_steps=3,
        personal_batch=2,
        evaluation_users=6,
        evaluate_every=2,
        workers=0,
        rehearsal=True,
        learning_rate=0.5,
        max_tokens=32,
        levels=(),
    )


def test_a_run_writes_everything_that_people_look_at(config, tmp_path):
    seen = []
    with_levels = config.model_copy(update={"levels": RunConfig().levels})
    result = start(with_levels, tmp_path / "run", Progress(round=seen.append))
    assert result.finished
    path = result.path
    frame = pd.read_parquet(path / "users.parquet")
    levels = {"profile", "retrieval", "global+retrieval", "both+retrieval"}
    assert set(frame.system) == {"base", "global", "private", "both", "another", "chosen"} | levels
    assert frame.groupby(["system", "split"]).user.nunique().eq(6).all()
    assert np.isfinite(frame.nats_per_token).all()
    assert [line["round"] for line in seen] == [1, 2, 3]
    assert load_config(read_config_file(path / "config.toml")).users == 20
    statement = json.loads((path / "statement.json").read_text())
    assert 0 < statement["epsilon"] <= 8
    assert "not claimed" in statement["sentence"]
    page = (path / "report.html").read_text()
    assert "<script" not in page
    verified = verify((path / "ledger.jsonl").read_bytes())
    assert [entry.kind for entry in verified.entries] == ["open", "reserve"] + ["debit", "release"] * 3
    written = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    assert b"secret-name" not in written


def test_a_run_that_was_stopped_goes_on_to_the_same_result(config, tmp_path, monkeypatch):
    whole = start(config, tmp_path / "whole", Progress()).path
    asked = []

    def stop_after_one(line):
        if not asked:
            asked.append(line)
            signal.raise_signal(signal.SIGINT)

    stopped = start(config, tmp_path / "stopped", Progress(round=stop_after_one))
    assert not stopped.finished
    assert Checkpoint.load(stopped.path / "checkpoint.safetensors").round == 1
    assert resume(stopped.path, Progress()).finished
    for run in (whole, stopped.path):
        assert len((run / "rounds.jsonl").read_text().splitlines()) == 3
    one, other = (Checkpoint.load(run / "checkpoint.safetensors").vector for run in (whole, stopped.path))
    assert (one == other).all()
    pd.testing.assert_frame_equal(
        pd.read_parquet(whole / "users.parquet"), pd.read_parquet(stopped.path / "users.parquet")
    )


def test_a_crash_after_a_debit_uses_a_spare_round_and_says_so(config, tmp_path, monkeypatch):
    saves = []
    real = Checkpoint.save

    def crash_once(self, path):
        saves.append(self.round)
        if saves.count(2) == 1 and self.round == 2:
            raise OSError("power cut")
        real(self, path)

    monkeypatch.setattr(Checkpoint, "save", crash_once)
    with pytest.raises(OSError, match="power cut"):
        start(config, tmp_path / "run", Progress())
    said = []
    assert resume(tmp_path / "run", Progress(say=said.append)).finished
    assert "spare" in said[0]
    entries = verify((tmp_path / "run" / "ledger.jsonl").read_bytes()).entries
    assert sum(entry.kind == "debit" for entry in entries) == 4
    assert json.loads((tmp_path / "run" / "statement.json").read_text())["epsilon"] <= 8


def test_crashes_beyond_the_spare_rounds_stop_the_run_before_the_budget_is_exceeded(config, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoint, "save", _fails_after_start(Checkpoint.save))
    path = tmp_path / "run"
    with pytest.raises(OSError, match="power cut"):
        start(config, path, Progress())
    for _ in range(config.rounds + config.spare_rounds - 1):
        with pytest.raises(OSError, match="power cut"):
            resume(path, Progress())
    with pytest.raises(BudgetSpent):
        resume(path, Progress())


def _fails_after_start(real):
    def save(self, path):
        if self.round > 0:
            raise OSError("power cut")
        real(self, path)

    return save


def test_workers_and_chunks_do_not_change_the_result(config, tmp_path):
    alone = start(config, tmp_path / "alone", Progress()).path
    spread = start(config.model_copy(update={"workers": 2, "chunk": 3}), tmp_path / "spread", Progress()).path
    one, other = (Checkpoint.load(run / "checkpoint.safetensors").vector for run in (alone, spread))
    np.testing.assert_allclose(one, other, atol=1e-6)


def test_training_that_fails_ends_a_study_and_does_not_pass_for_noise(config, tmp_path, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("dear diary")

    with monkeypatch.context() as patch:
        patch.setattr(Vault, "train", broken)
        # Without a promise there is no preflight, which would have met the mistake first.
        with pytest.raises(HomespunError, match="round 1: training failed for") as failed:
            start(config.model_copy(update={"epsilon": float("inf")}), tmp_path / "run", Progress())
    assert "dear diary" not in str(failed.value)
    assert resume(tmp_path / "run", Progress()).finished


def test_noise_of_a_run_that_is_no_rehearsal_is_never_the_same_twice(config, tmp_path):
    real = config.model_copy(update={"rehearsal": False, "rounds": 1})
    one, other = (start(real, tmp_path / name, Progress()).path for name in ("one", "other"))
    vectors = [Checkpoint.load(run / "checkpoint.safetensors").vector for run in (one, other)]
    assert (vectors[0] != vectors[1]).mean() > 0.9


def _interrupts(line):
    raise KeyboardInterrupt


def test_a_resumed_run_tries_out_first_what_its_promise_rests_on(config, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        start(config, path, Progress(round=_interrupts))
    before = (path / "ledger.jsonl").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "add_central_noise", lambda total, spec, randomness: total)
        with pytest.raises(Refusal, match="noise"):
            resume(path, Progress())
    assert (path / "ledger.jsonl").read_bytes() == before
    assert resume(path, Progress()).finished


def test_without_a_budget_nothing_is_claimed(config, tmp_path):
    path = start(config.model_copy(update={"epsilon": float("inf"), "rounds": 1}), tmp_path / "run", Progress()).path
    assert "no privacy claim" in json.loads((path / "statement.json").read_text())["sentence"]


def test_local_shares_nothing_and_spends_nothing(config, tmp_path):
    path = start(config.model_copy(update={"method": "local"}), tmp_path / "run", Progress()).path
    assert set(pd.read_parquet(path / "users.parquet").system) == {"base", "private", "another", "chosen"}
    assert all(entry.kind != "debit" for entry in verify((path / "ledger.jsonl").read_bytes()).entries)
    assert json.loads((path / "statement.json").read_text())["epsilon"] == 0


def test_fedavg_keeps_nothing_private(config, tmp_path):
    path = start(config.model_copy(update={"method": "fedavg"}), tmp_path / "run", Progress()).path
    assert set(pd.read_parquet(path / "users.parquet").system) == {"base", "global", "chosen"}


@pytest.mark.parametrize("chunk", [1, 2])
def test_every_system_is_scored_on_the_same_users_whoever_has_pairs_and_however_they_are_stacked(
    config, tmp_path, chunk
):
    """Five users of whom one has preference pairs, in pieces that do not divide them."""
    lines = [
        {"user": f"u{user}", "texts": [f"w{3 + user} w{4 + text} w9 w8" for text in range(6)]} for user in range(5)
    ]
    lines[0]["pairs"] = [{"prompt": f"w{one}", "chosen": "w5 w6 w7", "rejected": "w8 w9 w10"} for one in range(20, 26)]
    del lines[0]["texts"]
    data = tmp_path / "mixed.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    changed = {"data": str(data), "cohort": 2, "rounds": 1, "evaluation_users": 5, "chunk": chunk}
    path = start(config.model_copy(update={**changed, "levels": ("preference",)}), tmp_path / "run", Progress()).path
    frame = pd.read_parquet(path / "users.parquet")
    tested = frame[frame.split == "test"]
    assert {"preference", "another", "both"} <= set(tested.system)
    assert {system: sorted(own.user) for system, own in tested.groupby("system")} == {
        system: list("01234") for system in set(tested.system)
    }
    summary = json.loads((path / "summary.json").read_text())["metrics"][0]
    assert (summary["users"], summary["excluded"]) == (5, 0)
    queries = pd.read_parquet(path / "queries.parquet")
    assert queries.groupby("system").size().nunique() == 1
    other = tested[tested.user != "0"].set_index("user")
    same = other[other.system == "both"].nats_per_token
    assert np.allclose(other[other.system == "preference"].nats_per_token, same, atol=1e-5)


def test_exported_adapters_are_stock_peft_and_say_what_we_say(config, tmp_path):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from simulations import hosts
    from simulations.personal import export_user

    path = start(config, tmp_path / "run", Progress()).path
    user = sorted(pd.read_parquet(path / "users.parquet").user.unique())[0]
    folders = export_user(path, user, tmp_path / "adapters")
    assert set(folders) == {"global", "private", "both"}
    host = hosts.host_of(load_config(read_config_file(path / "config.toml")))
    records = [*host.population.encoded(user).train]
    for name, system in (("global", "global"), ("both", "both")):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), folders[name]).eval()
        ids = torch.from_numpy(records[0].ids.astype(np.int64))[None]
        with torch.no_grad():
            theirs = model(input_ids=ids).logits[0]
            adapter = _adapter_of(host, path, user, system)
            with host.trainer.over_base(adapter):
                ours = host.base.logits(host.base.hidden(ids)[0])
        assert torch.abs(ours - theirs).max() < 1e-4
        assert (
            torch.abs(theirs - AutoModelForCausalLM.from_pretrained(config.model)(input_ids=ids).logits[0]).max() > 1e-4
        )


def _adapter_of(host, path, user, system):
    from common.adapters import concatenate
    from simulations.personal import OVER_GLOBAL, open_store, unpack_vectors

    shared = (Checkpoint.load(path / "checkpoint.safetensors").vector, host.trainer.layout, host.config.scaling)
    if system == "global":
        return shared
    with open_store(path) as store:
        own = unpack_vectors(store.get(user, OVER_GLOBAL))["vector"]
    joined, layout = concatenate([shared, (own, host.personal.layout, host.config.scaling)])
    return joined, layout, 1.0


def test_a_folder_that_holds_something_is_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="already holds"):
        start(config, tmp_path / "run", Progress())
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.txt"]
    assert not list(tmp_path.glob(".run.*"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cohort": 21}, ConfigError, "cohort"),
        ({"method": "layers", "shared_layers": 2}, ConfigError, "stays private"),
        ({"method": "flexlora", "ranks": (1, 5)}, ConfigError, "ranks"),
        ({"method": "fedsa", "unit": "example"}, ClaimRefused, "private part"),
        ({"method": "nonsense"}, ConfigError, "unknown"),
        ({"model": "/no/such/model"}, DataError, "no model folder"),
        ({"data": "/no/such/file.jsonl"}, DataError, "file.jsonl"),
        ({"targets": ("q_proj", "no_proj")}, ConfigError, "no_proj"),
        ({"delta": 0.01}, ClaimRefused, "delta"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_written(config, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        start(config.model_copy(update=change), tmp_path / "run", Progress())
    assert not (tmp_path / "run").exists()
    assert not list(tmp_path.glob(".run.*"))


def test_a_population_in_which_nobody_can_be_scored_is_refused_before_anything_is_written(config, tmp_path):
    data = tmp_path / "one.jsonl"
    data.write_text('{"user": "a", "texts": ["only this"]}\n')
    with pytest.raises(DataError, match="no user has enough records"):
        start(config.model_copy(update={"data": str(data), "users": 1, "cohort": 1}), tmp_path / "run", Progress())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["sim", "run", "--epsilon", "0"], 2, "epsilon"),
        (["sim", "run", "--users", "10", "--cohort", "11", "--rank", "x"], 2, "rank"),
        (["sim", "run", "no-such.toml"], 2, "no-such.toml"),
        (["sim", "run", "--nonsense", "1"], 2, "nonsense"),
        (["sim", "show", "no-such-run"], 1, "no-such-run"),
        (["sim", "resume", "no-such-run"], 1, "no-such-run"),
        (["sim", "export", "no-such-run", "--user", "1"], 1, "no-such-run"),
    ],
)
def test_mistakes_are_one_line_and_an_exit_code(arguments, code, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert homespun.main(arguments) == code
    captured = capsys.readouterr()
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_every_key_of_the_file_is_checked_and_all_errors_come_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text('rounds = 0\nnonsense = 1\nlearning-rate = "fast"\n')
    assert homespun.main(["sim", "run", "run.toml"]) == 2
    message = capsys.readouterr().err
    assert all(word in message for word in ("rounds", "nonsense", "learning_rate"))


def test_killing_a_run_at_any_instant_never_loses_a_debit(config, tmp_path):
    """`kill -9` of the whole command, then resume: the debits never go down and the run ends."""
    path = tmp_path / "run"
    toml = tmp_path / "run.toml"
    toml.write_text(config.model_copy(update={"rounds": 30, "spare_rounds": 5, "workers": 0}).to_toml())
    command = [sys.executable, str(ROOT / "homespun.py"), "sim"]
    process = subprocess.Popen(
        [*command, "run", str(toml), "--out", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    ledger = path / "ledger.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (ledger.exists() and ledger.read_bytes().count(b'"kind":"debit"') > 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = ledger.read_bytes().count(b'"kind":"debit"')
    assert before > 3
    finished = subprocess.run([*command, "resume", str(path)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    verified = verify(ledger.read_bytes())
    debits = sum(entry.kind == "debit" for entry in verified.entries)
    assert max(before, 30) <= debits <= 35


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("local", "dual")])
def test_every_method_runs_to_a_table_and_to_adapters_that_stock_peft_loads(config, tmp_path, method):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    row = METHODS[method]
    path = start(config.model_copy(update={"method": method, "rounds": 2}), tmp_path / "run", Progress()).path
    frame = pd.read_parquet(path / "users.parquet")
    assert set(frame.system) == {"base", "global", "chosen"} | (
        {"private", "both", "another"} if row.private else set()
    )
    assert np.isfinite(frame.nats_per_token).all()
    verified = verify((path / "ledger.jsonl").read_bytes())
    assert [entry.kind for entry in verified.entries] == ["open", "reserve"] + ["debit", "release"] * 2
    table = frame[(frame.split == "test")].set_index(["system", "user"]).nats_per_token
    user = str(frame.user.iloc[0])
    system = "both" if row.private else "global"
    folders = export_user(path, user, tmp_path / "taken")
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model), folders[system])
    population = hosts.host_of(load_config(read_config_file(path / "config.toml"))).population
    nats, tokens = 0.0, 0
    for record in population.encoded(user).test:
        ids = torch.from_numpy(record.ids.astype(np.int64))[None]
        first = max(record.first_label, 1)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        nats += torch.nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:], reduction="sum").item()
        tokens += len(record.ids) - first
    assert nats / tokens == pytest.approx(table[system, user], abs=1e-4)


@pytest.mark.parametrize("method", ["fedsa", "ditto"])
def test_what_simulated_devices_keep_survives_an_interruption_and_goes_with_the_run(config, tmp_path, method):
    changed = config.model_copy(update={"method": method, "cohort": 20})
    whole = start(changed, tmp_path / "whole", Progress()).path
    asked = []

    def stop_after_one(line):
        if not asked:
            asked.append(line)
            signal.raise_signal(signal.SIGINT)

    stopped = start(changed, tmp_path / "stopped", Progress(round=stop_after_one))
    hosts.open_host.cache_clear()
    assert resume(stopped.path, Progress()).finished
    frames = [pd.read_parquet(run / "users.parquet") for run in (whole, stopped.path)]
    pd.testing.assert_frame_equal(*frames)
    kept = tmp_path / "home" / "simulated-devices"
    assert len(list(kept.iterdir())) == 2
    shutil.rmtree(stopped.path)
    start(changed.model_copy(update={"rounds": 1}), tmp_path / "next", Progress())
    assert len(list(kept.iterdir())) == 2


def test_a_disk_that_is_full_is_named_and_with_more_room_the_run_goes_on(config, tmp_path):
    """A limit on the size of a file stands for the disk: the operating system refuses the write in the same place."""
    path, toml = tmp_path / "run", tmp_path / "run.toml"
    toml.write_text(config.model_copy(update={"workers": 0}).to_toml())
    command = [sys.executable, str(ROOT / "homespun.py"), "sim"]
    limited = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2); "
        "runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    )
    begun = subprocess.run(
        [
            sys.executable,
            "-c",
            limited,
            "20000",
            str(ROOT / "homespun.py"),
            "sim",
            "run",
            str(toml),
            "--out",
            str(path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert begun.returncode == 1
    assert str(path) in begun.stderr
    assert begun.stderr.count("\n") == 1
    finished = subprocess.run([*command, "resume", str(path)], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    assert (path / "report.html").exists()
