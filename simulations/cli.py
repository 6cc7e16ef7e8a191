"""`homespun sim ...`, `homespun demo` and `homespun chat`: simulated users on this machine."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from common.config import BUILT_IN, RunConfig
from common.errors import ConfigError, DataError
from simulations import methods_cli, time_cli
from simulations.options import takes_configuration
from simulations.workers import expect_workers

__all__ = ["app", "chat", "demo", "plan"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Many users on one machine: run, look, compare, take away.",
    rich_markup_mode=None,
)

RUNS = Path("runs")
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
Events = Annotated[bool, typer.Option("--events", help="print one JSON object per line as things happen")]
Out = Annotated[
    Path | None, typer.Option("--out", help="folder of the run; runs/<name> when absent", show_default=False)
]
Run = Annotated[Path | None, typer.Argument(help="a run's folder or its name under runs/; the newest when absent")]


NOTHING_SPENT = "nothing is shared, so nothing is spent"

DEMO_SCORED = 200
"""Users whose personal models the demo trains and scores, in every system: enough for narrow intervals."""


@app.command("run")
@takes_configuration
def run(config: RunConfig, out: Out = None, as_json: Json = False, events: Events = False) -> int:
    """Train a population: shared rounds, then personal models for a sample of users, then the report.

    Example: homespun sim run --users 4000 --cohort 200 --rounds 25 --epsilon 8
    """
    expect_workers(config.workers)  # before this process imports what they import too
    from simulations import run as runs
    from simulations import terminal

    path = out if out is not None else _new_name(config)
    if events:
        terminal.emit("plan", text=_plan_text(config))
        return _end_events(runs.start(config, path, terminal.streamed()))
    console = _console(as_json)
    console.print(_plan_text(config), highlight=False)
    with terminal.drawn(console, config) as progress:
        result = runs.start(config, path, progress)
    return _end(result, console, as_json)


@app.command("resume")
def resume(run: Run = None, as_json: Json = False, events: Events = False) -> int:
    """Continue an interrupted run, with the budget it has spent.

    Example: homespun sim resume runs/latest
    """
    from common.config import load_config, read_config_file
    from server.run_folder import CONFIG

    path = _find(run)
    config = load_config(read_config_file(path / CONFIG))
    expect_workers(config.workers)
    from simulations import run as runs
    from simulations import terminal

    if events:
        return _end_events(runs.resume(path, terminal.streamed()))
    console = _console(as_json)
    with terminal.drawn(console, config) as progress:
        result = runs.resume(path, progress)
    return _end(result, console, as_json)


@app.command("list")
def list_runs(as_json: Json = False) -> int:
    """List the runs under runs/, newest first.

    Example: homespun sim list
    """
    rows = [_row(path) for path in _runs()]
    if as_json:
        print(json.dumps(rows))
        return 0
    if not rows:
        print("no runs here yet; `homespun demo` makes one")
    for row in rows:
        print(f"{row['name']:<32} {row['state']:<12} {row['method']:<10} {row['users']:>7} users  {row['promise']}")
    return 0


@app.command("show")
def show(run: Run = None, as_json: Json = False) -> int:
    """Show what a run found and what it promises.

    Example: homespun sim show
    """
    from server.registry import spent_on_data

    path = _find(run)
    if as_json:
        print(
            json.dumps(
                {
                    "run": str(path),
                    "summary": _load(path / "summary.json"),
                    "statement": _load(path / "statement.json"),
                    "spent_on_data": spent_on_data(path),
                }
            )
        )
        return 0
    _print_result(path, Console())
    return 0


@app.command("compare")
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="folders or names under runs/; the others are held against the first")
    ],
    as_json: Json = False,
) -> int:
    """Compare runs on the same users, user by user, with intervals.

    Example: homespun sim compare runs/local-20250101-120000 runs/latest
    """
    from simulations.compare import compare

    found = compare([_find(run) for run in runs])
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        Console().print(found.table())
    return 0


@app.command("export")
def export(
    run: Run = None,
    user: Annotated[str, typer.Option(help="the user's number, or the id in the data")] = "",
    out: Annotated[
        Path | None, typer.Option(help="folder to write; <run>-<user> when absent", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Write a user's private adapter as PEFT, and global and private in one, which is what the user uses.

    Example: homespun sim export runs/latest --user 17
    """
    from simulations.personal import export_user

    if not user:
        raise ConfigError("export: --user says whose adapter")
    path = _find(run)
    target = out or Path(f"{path.resolve().name}-user-{re.sub('[^A-Za-z0-9]+', '-', user)[:40]}")
    folders = export_user(path, user, target)
    if as_json:
        print(json.dumps({name: str(folder) for name, folder in folders.items()}))
    else:
        for name, folder in folders.items():
            print(f"{name:<9} {folder}")
    return 0


@app.command("answers")
def answers(
    run: Run = None,
    users: Annotated[int, typer.Option(min=1, help="how many of the kept users answer")] = 20,
    tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 24,
    as_json: Json = False,
) -> int:
    """Let a run's models answer their users' held-out questions, and score the answers by LaMP's metrics.

    Example: homespun sim answers runs/latest --users 50
    """
    from simulations.answers import score_answers

    found = score_answers(_find(run), users, tokens)
    if as_json:
        print(json.dumps({system: [asdict(task) for task in tasks] for system, tasks in found.items()}))
        return 0
    for system, tasks in found.items():
        for task in tasks:
            numbers = ", ".join(f"{name} {value:.3f}" for name, value in task.metrics.items())
            print(f"{system:<8} {task.task:<10} {task.answers:>5} answers: {numbers}; unparsable {task.unparsable:.1%}")
    return 0


@app.command("data")
def data(
    path: Annotated[str, typer.Argument(help="what --data takes: a file, a folder, a hub name, or built-in")],
    model: Annotated[str, typer.Option(help="base model whose tokens are counted")] = BUILT_IN,
    max_tokens: Annotated[int, typer.Option(help="where records are cut")] = 64,
    users: Annotated[int | None, typer.Option(help="look at this many users only", show_default=False)] = None,
    user_column: Annotated[str | None, typer.Option(show_default=False)] = None,
    text_column: Annotated[str | None, typer.Option(show_default=False)] = None,
    time_column: Annotated[str | None, typer.Option(show_default=False)] = None,
    as_json: Json = False,
) -> int:
    """Look at a data set before training: users, lengths, what is cut or dropped, one record as the model sees it.

    Example: homespun sim data notes.jsonl --model ./SmolLM2-135M
    """
    from simulations.data_report import report_of, show_report

    report = report_of(
        path,
        model=model,
        max_tokens=max_tokens,
        users=users,
        user_column=user_column,
        text_column=text_column,
        time_column=time_column,
    )
    if as_json:
        print(json.dumps(report.to_json()))
    else:
        show_report(report, Console())
    return 0


methods_cli.add_to(app)
time_cli.add_to(app, lambda run: _find(run))


@app.command("bench")
def bench(
    parts: Annotated[
        list[str] | None, typer.Argument(help="what to measure; everything when absent", show_default=False)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="fewer users and rounds: does it run, not how fast")] = False,
    compiled: Annotated[bool, typer.Option("--compiled", help="also with torch.compile, where it applies")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="JSON file to write; none when absent", show_default=False)
    ] = None,
    as_json: Json = False,
) -> int:
    """Measure the engine beside its rivals, in one run, taking turns; `make bench-rivals` adds pfl-research.

    Example: homespun sim bench --compiled --out bench.json
    """
    if "OMP_NUM_THREADS" not in os.environ:  # numpy reads it as it is imported, and was
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "OMP_NUM_THREADS": "1"})  # noqa: S606 - ourselves again
    from simulations.bench import suite

    unknown = sorted(set(parts or ()) - set(suite.PARTS))
    if unknown:
        raise ConfigError(f"bench: unknown part {unknown[0]}; choose from {', '.join(suite.PARTS)}")
    console = _console(as_json)
    results = suite.run_suite(
        tuple(parts or suite.parts_here()),
        quick=quick,
        compiled=compiled,
        say=lambda found: console.print(suite.table_of(found), markup=False, highlight=False),
    )
    if out is not None:
        out.write_text(suite.as_json(results), encoding="utf-8")
    if as_json:
        print(suite.as_json(results), end="")
    return 0


def demo(
    rehearsal: Annotated[bool, typer.Option("--rehearsal", help="seed noise and cohorts too; claims nothing")] = False,
    out: Out = None,
) -> int:
    """Personalize 4,000 built-in users at user-level epsilon 8, and show what it bought them and what it cost.

    Example: homespun demo
    """
    expect_workers(None)
    from simulations import run as runs
    from simulations import terminal

    console = Console()
    config = RunConfig(rehearsal=rehearsal, evaluation_users=DEMO_SCORED)
    console.print("Homespun demo: a population of built-in users, a frozen base, one shared adapter, private adapters.")
    console.print(_plan_text(config), highlight=False)
    with terminal.drawn(console, config) as progress:
        result = runs.start(config, out or _new_name(config, "demo"), progress)
    code = _end(result, console, as_json=False)
    if code == 0:
        from simulations import audit_cli, audit_report_cli

        code = audit_cli.verify([result.path]) or audit_cli.recompute([result.path])
        code = code or audit_report_cli.report([result.path], out=result.path / "audit")
    return code


@takes_configuration
def plan(
    config: RunConfig,
    rounds_per_week: Annotated[
        float | None, typer.Option(help="how often a round is run: says how many weeks the budget lasts", min=1e-3)
    ] = None,
    as_json: Json = False,
) -> int:
    """Say what a configuration's budget allows, and how long it lasts, before anything is trained.

    Example: homespun plan --users 4000 --cohort 200 --rounds 25 --epsilon 8 --rank 2
    """
    from simulations.outside import method_of
    from simulations.planning import plan_of

    if not method_of(config).shared:  # numbers of a budget would be about nothing
        print(json.dumps({"sentence": NOTHING_SPENT, "text": NOTHING_SPENT}) if as_json else NOTHING_SPENT)
        return 0
    planned = plan_of(config, rounds_per_week=rounds_per_week)
    text = "\n".join(planned.lines())
    print(json.dumps({**planned.to_json(), "text": text}) if as_json else text)
    return 0


def chat(
    run: Run = None,
    user: Annotated[str, typer.Option(help="the simulated user's number, or the id in the data")] = "",
    prompt: Annotated[str | None, typer.Option(help="answer this and leave", show_default=False)] = None,
    tokens: Annotated[int, typer.Option(help="longest answer, in tokens")] = 40,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token")] = 0.0,
    as_json: Json = False,
) -> int:
    """Talk to the base, the global and the personal model of a simulated user side by side; without --user to your own.

    Example: homespun chat runs/latest --user 17 --prompt "write a note about the garden"
    """
    from simulations.personal import open_chat

    if not user and run is None:
        from client.chat_cli import chat_here

        return chat_here("personal", prompt, tokens, temperature, None, as_json)
    if not user:
        raise ConfigError("chat: --user says whose model")
    session = open_chat(_find(run), user)
    if prompt is not None:
        answers = session.answer(prompt, tokens, temperature)
        if as_json:
            print(json.dumps(answers))
        else:
            for system, text in answers.items():
                print(f"{system:<8} {text}")
        return 0
    console = Console()
    console.print(f"Models: {', '.join(session.systems)}. An empty line ends the chat.")
    for example in session.examples(3):
        console.print(f"  try: {example}", style="dim", markup=False, highlight=False)
    while text := console.input("> ").strip():
        for system, answer in session.answer(text, tokens, temperature).items():
            console.print(f"{system:<8} {answer}", markup=False, highlight=False)
    return 0


def _plan_text(config: RunConfig) -> str:
    from simulations.outside import method_of
    from simulations.planning import plan_of

    if not method_of(config).shared:
        return NOTHING_SPENT
    return "\n".join(plan_of(config).lines())


def _console(as_json: bool) -> Console:
    return Console(stderr=True) if as_json else Console()


def _end_events(result: Any) -> int:
    from simulations.terminal import emit

    _point_latest(result.path)
    emit("end", run=str(result.path), finished=result.finished)
    return 0 if result.finished else 130


def _end(result: Any, console: Console, as_json: bool) -> int:
    from server.registry import spent_on_data

    _point_latest(result.path)
    if not result.finished:
        console.print(f"stopped after a finished round; `homespun sim resume {result.path}` goes on", highlight=False)
        return 130
    if as_json:
        print(
            json.dumps(
                {
                    "run": str(result.path),
                    "summary": _load(result.path / "summary.json"),
                    "statement": _load(result.path / "statement.json"),
                    "spent_on_data": spent_on_data(result.path),
                }
            )
        )
        return 0
    _print_result(result.path, console)
    return 0


def _print_result(path: Path, console: Console) -> None:
    from common.evaluation import Summary
    from server.registry import spent_on_data
    from simulations.report import terminal_table
    from simulations.report_tables import measures_table

    if not (path / "summary.json").is_file():
        raise DataError(f"{path}: the run is not finished; `homespun sim resume {path}` goes on")
    statement = _load(path / "statement.json")
    summary = Summary.from_json(_load(path / "summary.json"))
    console.print(terminal_table(summary, statement))
    if (measures := measures_table(summary)) is not None:
        console.print(measures)
    console.print(statement["sentence"], highlight=False)
    spent = spent_on_data(path)
    if spent is not None:
        console.print(spent["sentence"], highlight=False)
    console.print(f"report: {path / 'report.html'}", highlight=False)


def _new_name(config: RunConfig, prefix: str | None = None) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = f"{prefix or config.method}-{stamp}"
    path = RUNS / name
    number = 2
    while path.exists():
        path = RUNS / f"{name}-{number}"
        number += 1
    return path


def _point_latest(path: Path) -> None:
    """Let runs/latest point at the newest run where the platform has symbolic links."""
    if path.parent.resolve() != RUNS.resolve():
        return
    link = RUNS / "latest"
    try:
        link.unlink(missing_ok=True)
        link.symlink_to(path.name, target_is_directory=True)
    except OSError:
        return


def _runs() -> list[Path]:
    if not RUNS.is_dir():
        return []
    found = [path for path in RUNS.iterdir() if not path.is_symlink() and (path / "config.toml").is_file()]
    return sorted(found, key=lambda path: (path / "config.toml").stat().st_mtime, reverse=True)


def _find(run: Path | None) -> Path:
    if run is None:
        newest = _runs()
        if not newest:
            raise DataError("no runs here yet; `homespun demo` makes one")
        return newest[0]
    for path in (run, RUNS / run):
        if (path / "config.toml").is_file():
            return path
    raise DataError(f"{run}: no run in this folder")


def _row(path: Path) -> dict[str, Any]:
    from common.config import load_config, read_config_file

    config = load_config(read_config_file(path / "config.toml"))
    finished = (path / "summary.json").is_file()
    statement = _load(path / "statement.json") if finished else None
    return {
        "name": path.name,
        "state": "finished" if finished else "unfinished",
        "method": config.method,
        "users": config.users,
        "promise": statement["sentence"] if statement else f"epsilon {config.epsilon} asked",
    }


def _load(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; the run is not finished") from None


if __name__ == "__main__":
    sys.exit(app())
