"""The front door: dispatch, exit codes, and one line for whatever goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import typer

import homespun
from common.errors import ConfigError, GateRefused, HomespunError, VerificationError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def command(monkeypatch):
    """A function that puts `target`, a function or a Typer app, behind the word `probe`."""

    def install(target, extra="device"):
        module = types.ModuleType("probe_commands")
        module.__dict__["target"] = target
        monkeypatch.setitem(sys.modules, "probe_commands", module)
        row = homespun._Command("probe_commands:target", extra, "a probe")
        monkeypatch.setitem(homespun._COMMANDS, "probe", row)

    return install


def raising(error):
    def target() -> None:
        raise error

    return target


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (HomespunError("it broke"), 1, "homespun: it broke\n"),
        (ConfigError(["rounds: too few", "rank: too big"]), 2, "homespun: rounds: too few; rank: too big\n"),
        (GateRefused("not in the spec"), 3, "homespun: not in the spec\n"),
        (VerificationError("bad hash", entry=3), 4, "homespun: entry 3: bad hash\n"),
        (KeyboardInterrupt(), 130, "homespun: interrupted\n"),
        (OSError(28, "No space left on device", "runs/a"), 1, "homespun: runs/a: No space left on device\n"),
        (typer.Exit(3), 3, ""),
        (typer.Abort(), 130, "homespun: interrupted\n"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(command, capsys, error, code, line):
    command(raising(error))
    assert homespun.main(["probe"]) == code
    assert capsys.readouterr().err.lstrip("\n") == line


def test_an_unexpected_exception_never_shows_its_text(command, capsys):
    command(raising(KeyError("my private diary line")))
    assert homespun.main(["probe"]) == 1
    shown = "".join(capsys.readouterr())
    assert "unexpected KeyError" in shown
    assert "HOMESPUN_DEBUG=1" in shown
    assert "diary" not in shown
    assert "Traceback" not in shown


def test_debugging_shows_the_traceback(command, capsys, monkeypatch):
    monkeypatch.setenv("HOMESPUN_DEBUG", "1")
    command(raising(KeyError("x")))
    assert homespun.main(["probe"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_package_names_what_brings_it(command, capsys, monkeypatch, tmp_path):
    command(raising(ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")))
    assert homespun.main(["probe"]) == 1
    assert capsys.readouterr().err == "homespun: probe needs torch, which is not installed: make setup\n"
    assert capsys.readouterr().out == ""


def test_outside_a_repository_the_remedy_is_the_extra(command, capsys, monkeypatch, tmp_path):
    command(raising(ModuleNotFoundError("No module named 'torch'", name="torch")))
    monkeypatch.setattr(homespun, "_FOLDER", tmp_path)
    monkeypatch.setattr(homespun, "_use_own_folders", lambda: None)
    assert homespun.main(["probe"]) == 1
    assert "pip install 'homespun[device]'" in capsys.readouterr().err


def test_a_missing_module_of_our_own_is_not_blamed_on_an_extra(command, capsys):
    command(raising(ModuleNotFoundError("No module named 'client.gone'", name="client.gone")))
    assert homespun.main(["probe"]) == 1
    assert "unexpected ModuleNotFoundError" in capsys.readouterr().err


def test_a_function_becomes_a_command_with_options(command, capsys):
    def target(name: str, rounds: int = 3) -> None:
        typer.echo(f"{name} {rounds}")

    command(target)
    assert homespun.main(["probe", "run-a", "--rounds", "7"]) == 0
    assert capsys.readouterr().out == "run-a 7\n"


def test_an_app_becomes_a_group(command, capsys):
    app = typer.Typer()
    app.command("run")(lambda: typer.echo("ran"))
    app.command("show")(lambda: typer.echo("shown"))
    command(app)
    assert homespun.main(["probe", "show"]) == 0
    assert capsys.readouterr().out == "shown\n"


@pytest.mark.parametrize(
    "words", [["probe", "--no-such-flag"], ["probe", "extra-word"], ["no-such-command"], ["version", "x"]]
)
def test_wrong_usage_is_one_line_and_exit_code_2(command, capsys, words):
    command(lambda: None)
    assert homespun.main(words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("homespun: ")
    assert shown.count("\n") == 1


def test_a_mistyped_command_is_guessed(capsys):
    assert homespun.main(["versoin"]) == 2
    assert "did you mean version?" in capsys.readouterr().err


def test_no_command_at_all_shows_the_help_and_is_wrong_usage(capsys):
    assert homespun.main([]) == 2
    assert capsys.readouterr().err == homespun._help()


def test_help_lists_every_command(command, capsys):
    command(lambda: None)
    assert homespun.main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in (*homespun._COMMANDS, "version"))


def test_version_says_which_code_this_is(capsys):
    from common.source import source_digest

    assert homespun.main(["version", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["homespun"] == homespun.__version__
    assert facts["source"] == source_digest(ROOT)


def test_nothing_reports_home_unless_somebody_says_so(monkeypatch):
    for name in homespun._ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    homespun.main(["version"])
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "1"


def test_a_foreign_module_that_has_one_of_our_names_is_refused(monkeypatch):
    foreign = types.ModuleType("client")
    foreign.__file__ = "/somewhere/else/client.py"
    monkeypatch.setitem(sys.modules, "client", foreign)
    with pytest.raises(ImportError, match="named client"):
        homespun._use_own_folders()


def test_importing_the_front_door_changes_nothing_and_brings_nothing_slow():
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); before = list(sys.path)\n"
        "import homespun\n"
        "assert sys.path == before\n"
        "slow = {'torch', 'flwr', 'typer', 'numpy', 'pydantic', 'common', 'client'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    subprocess.run([sys.executable, "-P", "-c", code, str(ROOT)], cwd="/", check=True)


def test_every_command_in_the_table_exists():
    for row in homespun._COMMANDS.values():
        module, _, attribute = row.target.partition(":")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute)


@pytest.mark.parametrize("word", [name for name in ("audit", "plan") if name in homespun._COMMANDS] + ["version"])
def test_what_auditors_run_starts_at_once_without_torch_and_flower(word, slower):
    code = (
        "import sys; sys.modules.update(torch=None, flwr=None); import homespun; sys.exit(homespun.main(sys.argv[1:]))"
    )
    words = [word] if word == "version" else [word, "--help"]
    seconds = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, check=True, capture_output=True)
        after = os.times()
        # Processor time, not the clock's: tests share their cores with others.
        spent = after.children_user + after.children_system - before.children_user - before.children_system
        seconds.append(spent)
    assert min(seconds) < 1.6 * slower  # 0.4 alone; torch alone takes 2.5


@pytest.mark.parametrize("arguments", [["-m", "homespun"], ["-P", "homespun.py"], ["."]])
def test_the_repository_runs_in_three_ways(arguments):
    done = subprocess.run(
        [sys.executable, *arguments, "version", "--json"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["homespun"] == homespun.__version__


def test_a_reader_that_leaves_early_is_no_error():
    code = "import os, sys; os.close(0); sys.exit(0)"
    reader = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE)
    reader.wait()
    command = [sys.executable, "homespun.py", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=reader.stdin, stderr=subprocess.PIPE, text=True)
    reader.stdin.close()
    assert done.stderr == ""
    assert done.returncode == 1
