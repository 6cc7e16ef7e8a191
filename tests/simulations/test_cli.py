"""The commands of a simulation, as a person types them."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console

import homespun
from common.config import RunConfig
from simulations import terminal


@pytest.fixture(scope="module")
def work(tmp_path_factory, tiny_base_folder):
    """A folder with data, a configuration and one finished run in it."""
    folder = tmp_path_factory.mktemp("work")
    generator = np.random.default_rng(0)
    with (folder / "notes.jsonl").open("w") as file:
        for user in range(12):
            examples = [
                {"prompt": f"w{generator.integers(3, 9)} w4", "response": " ".join(f"w{user + 20}" for _ in range(4))}
                for _ in range(8)
            ]
            file.write(json.dumps({"user": f"person {user}", "examples": examples}) + "\n")
    config = RunConfig(
        model=str(tiny_base_folder),
        data=str(folder / "notes.jsonl"),
        cohort=6,
        rounds=2,
        local_batch=2,
        personal_steps=2,
        evaluation_users=4,
        evaluate_every=1,
        workers=0,
        rehearsal=True,
    )
    (folder / "run.toml").write_text(config.to_toml())
    return folder


@pytest.fixture(scope="module")
def ran(work):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("HOMESPUN_HOME", str(work / "home"))
        assert homespun.main(["sim", "run", "run.toml"]) == 0
    return work


@pytest.fixture
def command(ran, monkeypatch, capsys):
    monkeypatch.chdir(ran)
    monkeypatch.setenv("HOMESPUN_HOME", str(ran / "home"))

    def run(*words, code=0):
        capsys.readouterr()
        assert homespun.main([*words]) == code
        return capsys.readouterr().out

    return run


def test_a_run_gets_a_name_and_latest_points_at_it(ran):
    runs = [path for path in (ran / "runs").iterdir() if not path.is_symlink()]
    assert len(runs) == 1
    assert (ran / "runs" / "latest").resolve() == runs[0].resolve()
    assert (runs[0] / "report.html").is_file()


def test_list_and_show_say_what_there_is(command):
    rows = json.loads(command("sim", "list", "--json"))
    assert [row["state"] for row in rows] == ["finished"]
    assert "not claimed" in command("sim", "list")
    assert {"summary", "statement"} <= json.loads(command("sim", "show", "--json")).keys()
    assert "worst" in command("sim", "show")


def test_every_key_of_a_resolved_configuration_is_valid_input_again(command, ran):
    resolved = next(path for path in (ran / "runs").iterdir() if not path.is_symlink()) / "config.toml"
    assert command("plan", str(resolved)) == command("plan", "run.toml", "--users", "12")


def test_a_method_that_shares_nothing_has_no_budget_to_plan(capsys):
    assert homespun.main(["plan", "--method", "local", "--users", "40", "--cohort", "10"]) == 0
    assert capsys.readouterr().out == "nothing is shared, so nothing is spent\n"
    assert homespun.main(["plan", "--method", "local", "--users", "40", "--cohort", "10", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)) == {"sentence", "text"}


def test_flags_win_over_the_file(command):
    planned = json.loads(command("plan", "run.toml", "--epsilon", "2", "--json"))
    assert planned["epsilon"] == 2


def test_methods_and_their_names_in_papers_are_listed(command):
    rows = json.loads(command("sim", "methods", "--json"))
    assert {"local", "fedavg", "dual"} <= {row["name"] for row in rows}
    assert "fedit" in command("sim", "methods")


def test_data_are_counted_and_one_record_is_shown_with_its_loss_mask(command, ran, tiny_base_folder):
    text = command("sim", "data", "notes.jsonl", "--model", str(tiny_base_folder))
    assert "12" in text
    assert "loss" in text
    counts = json.loads(command("sim", "data", "notes.jsonl", "--model", str(tiny_base_folder), "--json"))
    assert counts["users"] == 12


def test_export_writes_folders_named_after_the_run_and_never_after_what_the_user_is_called(command, ran):
    user = json.loads(command("sim", "show", "--json"))["run"]
    frame_user = _a_kept_user(ran)
    folders = json.loads(command("sim", "export", "--user", f"person {frame_user}", "--json"))
    assert set(folders) == {"global", "private", "both"}
    assert (ran / folders["both"] / "adapter_model.safetensors").is_file()
    assert user


def test_chat_answers_with_every_model_of_a_user(command, ran):
    answers = json.loads(
        command("chat", "--user", str(_a_kept_user(ran)), "--prompt", "w4 w5", "--tokens", "3", "--json")
    )
    assert set(answers) == {"base", "global", "private", "both"}


def _a_kept_user(ran):
    import pandas as pd

    path = next(path for path in (ran / "runs").iterdir() if not path.is_symlink())
    return sorted(pd.read_parquet(path / "users.parquet").user.unique())[0]


def test_a_user_whose_adapters_were_not_kept_is_told_why(command, ran, capsys):
    kept = _a_kept_user(ran)
    import pandas as pd

    path = next(path for path in (ran / "runs").iterdir() if not path.is_symlink())
    others = set(map(str, range(12))) - set(pd.read_parquet(path / "users.parquet").user)
    assert kept not in others
    assert homespun.main(["sim", "export", "--user", min(others)]) == 1
    assert "evaluation sample" in capsys.readouterr().err


def test_the_ledger_of_a_run_verifies_and_recomputes(command):
    assert "verified" in command("audit", "verify", "runs/latest")
    assert "holds" in command("audit", "recompute", "runs/latest")


def test_a_changed_bit_in_a_ledger_is_exit_code_4(command, ran, tmp_path):
    path = next(path for path in (ran / "runs").iterdir() if not path.is_symlink()) / "ledger.jsonl"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "ledger.jsonl").write_bytes(content)
    assert "DOES NOT CHECK OUT" in command("audit", "verify", str(tmp_path), code=4)


def test_events_are_json_lines_that_end_with_the_run(command):
    lines = [json.loads(line) for line in command("sim", "run", "run.toml", "--events").splitlines()]
    kinds = [line["event"] for line in lines]
    assert kinds[0] == "plan"
    assert kinds.count("round") == 2
    assert lines[-1]["event"] == "end"
    assert lines[-1]["finished"] is True


def test_a_live_display_shows_rounds_and_leaves_nothing_behind_on_an_error():
    console = Console(force_terminal=True, file=io.StringIO(), width=100)

    def watch_and_fail():
        with terminal.drawn(console, RunConfig(rounds=2)) as progress:
            progress.round({"round": 1, "epsilon_spent": 3.2})
            progress.round({"round": 2, "epsilon_spent": "inf"})
            progress.personal(1, 2)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        watch_and_fail()
    shown = console.file.getvalue()
    assert "epsilon" in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
