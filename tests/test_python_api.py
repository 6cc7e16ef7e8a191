"""The Python API: what callers see, what the child process is told, and real runs from scripts and after interrupts."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import homespun
from client.user_data import Record
from common import config as configuration
from simulations.worlds.loaders import load_users as read_users
from simulations.worlds.tables import USUAL

ROOT = Path(__file__).resolve().parent.parent

# ---------------------------------------------------------------------------------------------------- configuration


def test_the_keys_are_those_of_the_configuration_in_its_order():
    assert list(homespun.RunConfig.__init__.__kwdefaults__) == list(configuration.RunConfig.model_fields)


def test_unknown_keys_come_back_all_at_once_with_what_may_have_been_meant():
    with pytest.raises(homespun.ConfigError) as caught:
        homespun.RunConfig(rnak=8, epsilom=8.0, rounds=3)
    assert caught.value.problems == (
        "rnak: unknown key; did you mean rank?",
        "epsilom: unknown key; did you mean epsilon?",
    )


def test_flags_say_to_the_child_what_was_given_and_nothing_else():
    config = homespun.RunConfig(
        model=Path("m"), targets=["q_proj", "v_proj"], epsilon=math.inf, rehearsal=False, rank=np.int64(8), delta=None
    )
    expected = ["--model=m", "--rank=8", "--targets=q_proj,v_proj", "--epsilon=inf", "--no-rehearsal"]
    assert config.flags() == expected


def test_the_command_line_reads_flags_back_to_the_same_configuration():
    import typer
    from typer.testing import CliRunner

    from simulations.options import takes_configuration

    seen = []
    app = typer.Typer()
    app.command()(takes_configuration(lambda config: seen.append(config)))
    given = {"targets": ("k_proj",), "epsilon": math.inf, "rehearsal": True, "rank": 4, "learning_rate": 0.25}
    CliRunner().invoke(app, homespun.RunConfig(**given).flags(), catch_exceptions=False)
    assert seen == [configuration.RunConfig(**given)]


def test_a_changed_configuration_is_another_one():
    config = homespun.RunConfig(rank=4, rounds=3)
    assert config.replace(rank=8, rounds=None).values == {"rank": 8}
    assert config.values == {"rank": 4, "rounds": 3}
    assert repr(config) == "RunConfig(rounds=3, rank=4)"


# ------------------------------------------------------------------------------------------------------------ users


def records_of(source, **columns):
    """What the loaders make of a source, ready to be compared."""
    return [(user.id, user.records) for user in read_users(source, **columns)]


def records_handed_on(users):
    """What the child's loader makes of what it is handed."""
    with users.on_disk() as source:
        return records_of(source, **users.columns)


def test_the_usual_columns_are_those_of_the_loaders():
    assert set(homespun._COLUMNS.split()) == set(USUAL)


@pytest.mark.parametrize(
    "people",
    [
        {"alice": ["one", "two"], "bob": ["three"]},
        {"alice": [{"prompt": "a", "response": "b", "time": 3.5}], 7: [{"prompt": "", "response": "c"}]},
        {"alice": [{"prompt": "a", "chosen": "b", "rejected": "c"}]},
        {"alice": ("wörd \U0001f600 \ud83d \u2028", "")},
    ],
)
def test_a_dict_reaches_the_child_as_the_loaders_read_it_themselves(people):
    assert records_handed_on(homespun.load_users(people)) == records_of(people)


def test_a_dict_of_texts_with_times_keeps_the_times():
    when = datetime.datetime(2024, 5, 1, tzinfo=datetime.UTC)
    people = {"alice": [{"text": "late", "time": when}, {"text": "early", "time": 5}]}
    ((name, records),) = records_handed_on(homespun.load_users(people))
    assert name == "alice"
    assert [(record.response, record.time) for record in records] == [("late", when.timestamp()), ("early", 5.0)]


def frame_of_records():
    return pd.DataFrame(
        {
            "author": ["alice", "bob", "alice", "bob"],
            "body": ["one", None, "thr\u2028ee", "four"],
            "date": pd.to_datetime(["2024-01-02", "2024-01-03 04:05:06.250001", None, "2023-05-05"], format="ISO8601"),
            "image": [object()] * 4,
        }
    )


def test_a_frame_reaches_the_child_as_the_loaders_read_it_themselves():
    frame = frame_of_records()
    columns = {"user_column": "author", "text_column": "body", "time_column": "date"}
    users = homespun.load_users(frame, user="author", text="body", time="date")
    assert users.columns == columns
    assert records_handed_on(users) == records_of(frame, **columns)


def test_a_frame_of_one_user_per_row_works_as_well():
    frame = pd.DataFrame({"user": [1, 2], "texts": [np.array(["a", "b"]), np.array(["c"])], "score": [0.5, 0.25]})
    assert records_handed_on(homespun.load_users(frame)) == records_of(frame)


def test_a_frame_is_copied_when_it_is_loaded():
    frame = pd.DataFrame({"user": ["a"], "text": ["before"]})
    users = homespun.load_users(frame)
    frame.loc[0, "text"] = "after"
    assert records_handed_on(users)[0][1][0].response == "before"


def test_a_hugging_face_dataset_reaches_the_child():
    datasets = pytest.importorskip("datasets")
    rows = {"user": ["a", "b", "a"], "text": ["x", "y", "z"], "time": [3, 1, 2], "extra": [[1], [2], [3]]}
    dataset = datasets.Dataset.from_dict(rows)
    assert records_handed_on(homespun.load_users(dataset)) == records_of(dataset)
    with pytest.raises(homespun.ConfigError, match="split of the data set: train"):
        homespun.load_users(datasets.DatasetDict({"train": dataset}))


def test_data_in_memory_are_one_persons_to_read_and_gone_afterwards():
    users = homespun.load_users({"alice": ["a secret"]})
    with users.on_disk() as source:
        place = Path(source)
        assert stat.S_IMODE(place.stat().st_mode) == 0o600
        assert stat.S_IMODE(place.parent.stat().st_mode) == 0o700
    assert not place.parent.exists()
    with pytest.raises(KeyError), users.on_disk(place):
        raise KeyError
    assert not place.parent.exists()


def test_a_run_that_goes_on_finds_the_same_data_where_they_were_and_no_others(tmp_path):
    users = homespun.load_users({"alice": ["one", "two"]})
    with users.on_disk() as source:
        place, content = Path(source), Path(source).read_bytes()
    digest = read_digest(users)
    with users.on_disk(place, digest) as again:
        assert (Path(again), Path(again).read_bytes()) == (place, content)
    others = homespun.load_users({"alice": ["one", "three"]})
    with pytest.raises(homespun.ConfigError, match="not the data"), others.on_disk(place, digest):
        pass
    assert not place.parent.exists()


def read_digest(users):
    with users.on_disk() as source:
        return read_users(source).source_digest


def test_what_a_killed_process_left_is_replaced_and_no_folder_of_another_kind_is_touched(tmp_path):
    users = homespun.load_users({"alice": ["one"]})
    left = tmp_path / "homespun-left"
    left.mkdir(mode=0o700)
    (left / homespun._IN_MEMORY).write_text("old")
    with users.on_disk(left / homespun._IN_MEMORY) as source:
        assert records_of(source) == [("alice", (Record("", "one"),))]
    assert not left.exists()
    open_to_others, otherwise_named = tmp_path / "homespun-open", tmp_path / "documents"
    open_to_others.mkdir()
    open_to_others.chmod(0o755)
    otherwise_named.mkdir(mode=0o700)
    (tmp_path / "homespun-link").symlink_to(otherwise_named)
    (otherwise_named / "thesis.txt").touch()
    for folder in (open_to_others, otherwise_named, tmp_path / "homespun-link"):
        place = folder / "thesis.txt"
        with pytest.raises(homespun.HomespunError, match="not a private folder"), users.on_disk(place):
            pass
    assert (otherwise_named / "thesis.txt").exists()


def test_a_path_and_a_name_on_the_hub_are_handed_on(tmp_path, monkeypatch):
    path = tmp_path / "notes.parquet"
    path.touch()
    monkeypatch.chdir(tmp_path)
    users = homespun.load_users("notes.parquet", user="author")
    monkeypatch.chdir("/")
    assert repr(users) == f"<users: {path}, user_column author>"
    with users.on_disk() as source:
        assert source == str(path)
    assert homespun.load_users(users) is users
    assert homespun.load_users("owner/name:config@train").name == "owner/name:config@train"


@pytest.mark.parametrize(
    ("source", "columns", "message"),
    [
        ("nothing-here.jsonl", {}, "nothing-here.jsonl: no such file"),
        ("tests/nothing-here.jsonl", {}, "no such file"),
        (Path("/no/such/folder"), {}, "no such file"),
        ([1, 2], {}, "a path, a DataFrame"),
        ({"a": ["b"]}, {"text": "body"}, "without column names"),
        ({"a": "text"}, {}, "user 1 has no list of texts"),
        ({"a": ["x"], "b": []}, {}, "user 2 has no list"),
        ({"a": ["x", {"prompt": "p", "response": "r"}]}, {}, "records of one kind"),
        ({"a": [{"prompt": "p"}]}, {}, "records of one kind"),
        (
            pd.DataFrame({"writer": ["a"]}),
            {"text": "body"},
            "no column 'user'; columns there: writer; users: no column 'b",
        ),
    ],
)
def test_what_cannot_be_read_is_said_at_once(monkeypatch, source, columns, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(homespun.ConfigError, match=message):
        homespun.load_users(source, **columns)


def test_an_error_about_users_in_memory_shows_nothing_of_theirs():
    with pytest.raises(homespun.ConfigError) as caught:
        homespun.load_users({"alice": ["my diary", 3]})
    assert not re.search("alice|diary", str(caught.value))


# ----------------------------------------------------------------------------------------------------------- child


@pytest.fixture
def child(monkeypatch, tmp_path):
    """A function that puts a program of ours in the place of the interpreter that the child is run by."""

    def install(code):
        program = tmp_path / "program"
        program.write_text(f"#!{sys.executable}\n{code}")
        program.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(program))

    monkeypatch.chdir(tmp_path)
    return install


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (1, homespun.HomespunError),
        (2, homespun.ConfigError),
        (3, homespun.Refusal),
        (4, homespun.VerificationError),
        (77, homespun.HomespunError),
    ],
)
def test_an_exit_code_becomes_an_exception_with_the_childs_one_line(child, code, error):
    child(f"import sys; sys.stderr.write('noise\\nhomespun: it is so\\n'); sys.exit({code})")
    with pytest.raises(homespun.HomespunError, match=r"^it is so$") as caught:
        homespun.plan()
    assert type(caught.value) is error


def test_every_problem_of_a_configuration_is_its_own():
    error = homespun._error(2, "rank: must be >= 1, found '0'; no more; targets.0: bad; learning_rate: must be finite")
    assert error.problems == (
        "rank: must be >= 1, found '0'; no more",
        "targets.0: bad",
        "learning_rate: must be finite",
    )


def test_a_child_that_dies_without_a_word_is_told_by_its_code(child):
    child("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(homespun.HomespunError, match="homespun plan ended with code -9"):
        homespun.plan()


def test_the_child_is_this_very_file_and_sees_no_terminal(child):
    child("import json, sys; print(json.dumps({'text': json.dumps([sys.argv[1:], sys.stdin.read()])}))")
    words, typed = json.loads(homespun.plan(homespun.RunConfig(rank=3)).text)
    assert words == ["-P", str(ROOT / "homespun.py"), "plan", "--rank=3", "--json"]
    assert typed == ""


# A run of 5 rounds, of ten times SECONDS each, that ends after the round in hand when it is interrupted. After round
# WAIT it goes on only when it was, so that no test rests on who is faster.
SLOW_RUN = """
import json, pathlib, signal, sys, time
asked = []
def interrupt(*_):
    asked.append(1)
    pathlib.Path("asked").touch()
    if len(asked) > 1:
        pathlib.Path("stopped-at-once").touch()
        sys.exit(130)
signal.signal(signal.SIGINT, interrupt)
words = sys.argv[3:]
folder = pathlib.Path(next((w.removeprefix("--out=") for w in words if w.startswith("--out=")), words[2]))
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.toml").write_text('rounds = 5\\ndata = "built-in"\\n')
log = folder / "rounds.jsonl"
done = len(log.read_text().splitlines()) if log.exists() else 0
for number in range(done + 1, 6):
    for _ in range(10):
        time.sleep(SECONDS)
    line = {"round": number, "epsilon_spent": number / 2, "seconds": 0.1}
    with log.open("a") as file:
        file.write(json.dumps(line) + "\\n")
    last = bool(asked)  # before the line is told: what is asked because of it is about the round after
    print(json.dumps({"event": "round", **line}), flush=True)
    if last:
        sys.exit(130)
    while number == WAIT and not asked:
        time.sleep(0.01)
(folder / "summary.json").write_text("{}")
print(json.dumps({"event": "personal", "done": 4, "total": 4}))
print(json.dumps({"event": "end", "run": str(folder), "finished": True}))
"""


def interrupting(after):
    """A callback that notes rounds and interrupts this process, as Ctrl-C does, in round `after`."""
    seen = []

    def on_round(line):
        seen.append(line["round"])
        if line["round"] == after:
            os.kill(os.getpid(), signal.SIGINT)

    return on_round, seen


def test_an_interrupt_ends_the_run_after_the_round_in_hand_and_resume_goes_on(child, capsys):
    child(SLOW_RUN.replace("SECONDS", "0.01").replace("WAIT", "2"))
    on_round, seen = interrupting(after=2)
    before = signal.getsignal(signal.SIGINT)
    run = homespun.simulate(on_round=on_round)
    assert signal.getsignal(signal.SIGINT) is before
    assert seen == [1, 2, 3]
    assert (run.finished, run.state) == (False, "not finished, 3 of 5 rounds are done")
    assert "run.resume() goes on" in capsys.readouterr().err
    assert "3 of 5" in run._repr_html_()
    for result in (lambda: run.statement, run.users, lambda: run.load("alice")):
        with pytest.raises(homespun.HomespunError, match=r"run.resume\(\) goes on"):
            result()
    personal = []
    assert run.resume(on_round, lambda *counts: personal.append(counts)) is run
    assert (seen, personal, run.finished) == ([1, 2, 3, 4, 5], [(4, 4)], True)
    assert run.resume(on_round) is run
    assert seen == [1, 2, 3, 4, 5]
    assert [line["round"] for line in run.rounds] == seen


def test_a_second_interrupt_stops_at_once_and_the_run_is_found_again(child):
    child(SLOW_RUN.replace("SECONDS", "5").replace("WAIT", "0"))

    def interrupt_twice():
        for file in ("runs", "asked"):  # the first when the run has a folder, the second when it has heard of the first
            while not Path(file).exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_twice, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        homespun.simulate()
    assert Path("stopped-at-once").exists()
    assert homespun.open_run().path.parent == Path("runs").absolute()


def test_an_interrupt_before_there_is_a_run_leaves_nothing_to_resume(child):
    child("import pathlib, time; pathlib.Path('begun').touch(); time.sleep(600)")

    def interrupt_once():
        while not Path("begun").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt_once, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        homespun.simulate()
    assert not Path("runs").exists()


def test_what_a_callback_raises_is_the_callers_and_ends_the_run_after_the_round_in_hand(child):
    child(SLOW_RUN.replace("SECONDS", "0.01").replace("WAIT", "1"))

    def on_round(line):
        raise StopIteration("enough")

    with pytest.raises(StopIteration, match="enough"):
        homespun.simulate(on_round=on_round)
    assert len(homespun.open_run().rounds) == 2
    assert not homespun.open_run().finished


def test_a_run_from_another_thread_works_without_a_say_in_interrupts(child):
    child(SLOW_RUN.replace("SECONDS", "0.001").replace("WAIT", "0"))
    runs = []
    thread = threading.Thread(target=lambda: runs.append(homespun.simulate(out="here")))
    thread.start()
    thread.join()
    assert runs[0].finished
    assert runs[0].path == Path("here").absolute()


def test_a_crash_says_where_the_run_is(child):
    child(SLOW_RUN.replace("SECONDS", "0.001").replace("if last:", "if True:\n        sys.exit(1)\n    if last:"))
    with pytest.raises(homespun.HomespunError, match=re.escape(f"(the run is in {Path('a').absolute()})")):
        homespun.simulate(out="a")


def test_runs_of_the_same_second_have_names_of_their_own(child):
    child(SLOW_RUN.replace("SECONDS", "0").replace("WAIT", "0"))
    runs = [homespun.simulate(homespun.RunConfig(method="FedIT/../x")) for _ in range(3)]
    assert len({run.path for run in runs}) == 3
    assert all(re.fullmatch(r"feditx-\d{8}-\d{6}(-\d)?", run.path.name) for run in runs)
    assert homespun.open_run(runs[0].path.name).path == runs[0].path


def test_where_there_is_no_run_there_is_none_to_open(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in (None, "x", tmp_path):
        with pytest.raises(homespun.ConfigError, match="no run in this folder"):
            homespun.open_run(path)


def test_data_stand_in_one_place():
    with pytest.raises(homespun.ConfigError, match="data: stands in the configuration"):
        homespun.plan(homespun.RunConfig(data="x.jsonl"), {"alice": ["one"]})


# ---------------------------------------------------------------------------------------------------------- results


def statement(**changes):
    facts = {"sentence": "epsilon 2.00 at delta 1e-05, for one user.", "epsilon": 2.0, "delta": 1e-5}
    return homespun.Statement({**facts, "unit": "user", "adjacency": "zero-out", **changes})


def test_a_statement_says_all_of_it_and_is_no_number():
    claim = statement()
    assert (claim.epsilon, claim.delta, claim.unit, claim.adjacency) == (2.0, 1e-5, "user", "zero-out")
    assert str(claim) == repr(claim) == claim.sentence
    assert "adjacency" in dir(claim)
    with pytest.raises(TypeError):
        float(claim)
    with pytest.raises(TypeError):
        format(claim, ".2f")
    with pytest.raises(AttributeError, match="'gamma'"):
        _ = claim.gamma
    assert statement(epsilon="inf").epsilon == math.inf


def test_a_round_prints_its_gist():
    line = {"round": 3, "epsilon_spent": 1.2345, "evaluation": {"base": 2.5, "global": 2.25}}
    expected = "round 3, epsilon 1.23 spent so far, global 2.2500 nats per token, base 2.5000"
    assert str(homespun.Round(line)) == expected
    assert str(homespun.Round(round=1, epsilon_spent="inf")) == "round 1, epsilon inf spent so far"
    assert homespun.Round(line) == line


def test_importing_is_quick_and_leaves_the_caller_as_it_was():
    code = (
        "import os, signal, sys, time\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "before = list(sys.path), dict(os.environ), signal.getsignal(signal.SIGINT)\n"
        "start = time.process_time()\n"
        "import homespun\n"
        "print(time.process_time() - start)\n"
        "assert before == (sys.path, dict(os.environ), signal.getsignal(signal.SIGINT))\n"
        "assert not {'subprocess', 'json', 'dataclasses', 'common', 'pandas', 'numpy'} & set(sys.modules)\n"
    )
    run = [sys.executable, "-P", "-c", code, str(ROOT)]
    seconds = [float(subprocess.run(run, check=True, capture_output=True, cwd="/").stdout) for _ in range(3)]
    assert min(seconds) < 0.25  # 0.01 alone; anything heavy takes longer, and a busy machine does not


# -------------------------------------------------------------------------------------------------------- real runs


def made_up_people(count):
    """Users with favourite words that the tiny base can tell apart; the first is alice."""
    generator = np.random.default_rng(5)
    people = {}
    for number in range(count):
        favourites = generator.integers(3, 128, size=6)
        texts = [" ".join(f"w{word}" for word in generator.choice(favourites, size=8)) for _ in range(10)]
        people["alice" if number == 0 else f"person {number}"] = texts
    return people


QUICK = {"rounds": 3, "cohort": 6, "evaluation_users": 12, "evaluate_every": 1, "workers": 0, "max_tokens": 16}

# Has no `__main__` guard, and has imported modules of its own that are named like ours.
SCRIPT = """
import client, common, json, os, pathlib, server, signal, sys
import homespun

people = json.loads(pathlib.Path("people.json").read_text())
config = homespun.RunConfig(**json.loads(pathlib.Path("keys.json").read_text()))
seen = []

def on_round(line):
    seen.append(line["round"])
    if line["round"] == 1:
        os.kill(os.getpid(), signal.SIGINT)

plan = homespun.plan(config, people)
run = homespun.simulate(config, people, on_round=on_round, out="runs/first")
halfway = {"finished": run.finished, "rounds": list(seen), "data": run.config.values["data"]}
run.resume(on_round)
ours = [name for name in sys.modules if name.partition(".")[0] in ("common", "client", "server", "simulations")]
assert sorted(ours) == ["client", "common", "server"] and client.mine and common.mine and server.mine
print(json.dumps({"plan": str(plan), "halfway": halfway, "seen": seen}))
"""


def crowded(folder):
    """Make `folder` that of somebody who has modules named like ours."""
    for name in ("common/__init__.py", "server/__init__.py", "client.py", "simulations.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine = True\n")
    return folder


def run_script(folder, code):
    (folder / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=560
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def people():
    return made_up_people(12)


@pytest.fixture(scope="module")
def interrupted(tiny_base_folder, tmp_path_factory, people):
    """A real run, made by a script of data in memory, interrupted in round 2 and resumed; and what the script told."""
    folder = crowded(tmp_path_factory.mktemp("crowded"))
    keys = {**QUICK, "model": str(tiny_base_folder), "personal_steps": 30, "personal_learning_rate": 0.02}
    (folder / "keys.json").write_text(json.dumps(keys))
    (folder / "people.json").write_text(json.dumps(people))
    told = json.loads(run_script(folder, SCRIPT))
    return homespun.open_run(folder / "runs/first", people), told


def test_a_script_without_a_guard_beside_modules_named_like_ours_is_interrupted_and_resumed(interrupted):
    run, told = interrupted
    assert "noise multiplier" in told["plan"]
    assert not told["halfway"]["finished"]
    assert told["halfway"]["rounds"] in ([1], [1, 2])
    assert told["seen"] == [1, 2, 3]
    assert not Path(told["halfway"]["data"]).parent.exists()
    assert run.finished
    assert run.report.is_file()
    claim = run.statement
    assert (claim.unit, claim.adjacency, claim.delta) == ("user", "zero-out", 1e-5)
    assert 0 < claim.epsilon <= 8
    assert "one user" in claim.sentence


def test_the_frame_has_one_row_per_user_and_system_and_a_notebook_shows_the_reports_table(interrupted):
    run = interrupted[0]
    frame = run.users()
    assert {"base", "both", "chosen", "global", "private", "retrieval"} <= set(frame["system"])
    assert frame.groupby("system")["user"].nunique().to_dict() == dict.fromkeys(frame["system"].unique(), 12)
    assert not frame.duplicated(["user", "system"]).any()
    assert len(run.users("validation")) == len(frame)
    shown = run._repr_html_()
    assert shown.count("<table") == 1
    assert shown[: shown.index("</table>") + 8].replace("\n", "") in re.sub(
        "<svg.*?</svg>", "", run.report.read_text(), flags=re.DOTALL
    ).replace("\n", "")
    assert "epsilon" in shown
    assert "<svg" not in shown


def test_a_loaded_model_is_a_stock_one_and_scores_what_the_run_says(interrupted, people):
    """Nats per token of alice's test records, by a plain loop over what `load` gives, against the run's own table."""
    import torch
    from peft import PeftModel

    run = interrupted[0]
    frame = run.users().query("user == '0'").set_index("system")["nats_per_token"]
    for system in ("base", "global", "private", "both"):
        model, tokenizer = run.load(None if system in ("base", "global") else "alice", system=system)
        assert isinstance(model, PeftModel) == (system != "base")
        nats = []
        for text in people["alice"][-2:]:
            ids = torch.tensor([tokenizer(text)["input_ids"]])
            with torch.no_grad():
                log_probabilities = model(ids).logits[0, :-1].log_softmax(-1)
            nats += (-log_probabilities.gather(1, ids[0, 1:, None])[:, 0]).tolist()
        assert np.mean(nats) == pytest.approx(frame[system], abs=1e-4), system


def test_a_run_of_data_in_memory_asks_for_them_in_another_session(interrupted, people):
    path = interrupted[0].path
    with pytest.raises(homespun.ConfigError, match=r"open_run\(path, users\)"):
        homespun.open_run(path).load("alice")
    with pytest.raises(homespun.ConfigError, match="not the data"):
        homespun.open_run(path, {**people, "alice": ["another"]}).load("alice")
    with pytest.raises(homespun.ConfigError, match="whose both model"):
        homespun.open_run(path).load()


def test_runs_are_compared_by_user_with_intervals(interrupted, tmp_path):
    run = interrupted[0]
    worse = tmp_path / "worse"
    shutil.copytree(run.path, worse)
    frame = pd.read_parquet(worse / "users.parquet")
    frame.loc[frame["system"] == "both", "nats_per_token"] += 0.5
    frame.to_parquet(worse / "users.parquet", index=False)
    found = run.compare(homespun.open_run(worse))
    rows = found.frame().query("metric == 'nats_per_token'").set_index("system")
    assert rows.loc["both", "gain"] == pytest.approx(0.5)
    assert rows.loc["both", ["gain_low", "gain_high"]].tolist() == [pytest.approx(0.5)] * 2
    assert set(rows["gain"].drop("both")) == {0.0}
    assert "better" in str(found)
    assert "<table" in found._repr_html_()


# What the documentation shows, without its comments.
EXAMPLE = """
import homespun
users = homespun.load_users("notes.parquet", user="author", text="body", time="date")
config = homespun.RunConfig(model="./SmolLM2-135M", method="dual", rank=8, cohort=50, rounds=30, epsilon=8.0)
print(homespun.plan(config, users))
run = homespun.simulate(config, users, on_round=print)
frame = run.users()
run.statement
model, tokenizer = run.load("alice", system="both")
run.compare(homespun.open_run("runs/earlier"))
"""


@pytest.mark.slow
def test_the_example_of_the_documentation_runs_as_it_is_written(tiny_base_folder, tmp_path):
    folder = crowded(tmp_path)
    shutil.copytree(tiny_base_folder, folder / "SmolLM2-135M")
    rows = [
        {"author": name, "body": text, "date": pd.Timestamp("2024-01-01") + pd.Timedelta(days=day)}
        for name, texts in made_up_people(60).items()
        for day, text in enumerate(texts)
    ]
    pd.DataFrame(rows).sample(frac=1, random_state=0).to_parquet(folder / "notes.parquet", index=False)
    earlier = """
import homespun
config = homespun.RunConfig(model="./SmolLM2-135M", method="local", rank=8, cohort=50, epsilon=8.0)
users = homespun.load_users("notes.parquet", user="author", text="body", time="date")
homespun.simulate(config, users, out="runs/earlier")
"""
    run_script(folder, earlier)
    shown = run_script(folder, f"{EXAMPLE}\nprint(type(model), len(frame), run.compare('earlier'))")
    assert "round 30, epsilon" in shown
    (rows,) = re.findall(r"PeftModelForCausalLM'> (\d+) ", shown)
    assert int(rows) >= 240  # a row for each user and each system that the run scored
    assert int(rows) % 60 == 0
    assert "60 users paired" in shown
