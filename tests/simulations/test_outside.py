"""Methods and metrics from outside: what is sound runs and says what was tried, what is not runs without a promise."""

from __future__ import annotations

import json
import sys

import pandas as pd
import pytest

import homespun
from common.config import RunConfig
from common.errors import ConfigError
from common.methods import METHODS
from simulations.outside import method_of, metric_of

MODULE = '''
from dataclasses import replace

import numpy as np

from common.methods import METHODS


def sparse(updates):
    """Keep the larger half of each row."""
    kept = updates.copy()
    kept[np.abs(updates) < np.median(np.abs(updates), axis=1, keepdims=True)] = 0.0
    return kept


seen = []


def flipping(updates):
    """Turn every second row round that passes: a row depends on who came before it."""
    seen.append(1)
    return updates * (-1.0 if len(seen) % 2 else 1.0)


def doubled(updates):
    """Two rows for one person."""
    return np.concatenate([updates, updates])


def short(updates):
    return updates[:, 1:]


def failing(updates):
    raise ValueError("Alice's secret")


DOUBLED = replace(METHODS["dual"], name="doubled", aliases=(), transform=doubled)
SHORT = replace(METHODS["dual"], name="short", aliases=(), transform=short)
FAILING = replace(METHODS["dual"], name="failing", aliases=(), transform=failing)
SPARSE = replace(METHODS["dual"], name="sparse", aliases=(), leaves="half of both factors", transform=sparse)
COUPLED = replace(METHODS["fedavg"], name="coupled", aliases=(), transform=flipping)
JOINT = replace(METHODS["fedsa"], name="joint", aliases=())
NOTHING = 7


def hits(nats, tokens, correct):
    return correct.sum() / tokens.sum()


def loud(nats, tokens, correct):
    return nats.sum()


calls = []


def worded(nats, tokens, correct):
    return "good"


def long(nats, tokens, correct):
    return nats


def broken(nats, tokens, correct):
    raise KeyError("Alice's secret")




def remembering(nats, tokens, correct):
    calls.append(1)
    return 1.0 / len(calls)
'''

SMALL = (
    *["--cohort=4", "--rounds=1", "--local-steps=2", "--local-batch=2", "--personal-steps=2", "--personal-batch=2"],
    *["--evaluation-users=4", "--workers=0", "--max-tokens=24", "--rehearsal"],
)


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_base_folder):
    """A function `(*arguments) -> exit code` of `homespun sim run` in a folder that holds the module."""
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outer.py").write_text(MODULE)
    texts = [[f"w{3 + user * 7 + word} w{4 + user} w{5 + word}" for word in range(8)] for user in range(10)]
    lines = (json.dumps({"user": f"u{user}", "texts": own}) + "\n" for user, own in enumerate(texts))
    (tmp_path / "notes.jsonl").write_text("".join(lines))
    before = set(METHODS)
    data = ["--data", str(tmp_path / "notes.jsonl"), "--model", str(tiny_base_folder)]
    yield lambda *given: homespun.main(["sim", "run", *data, *SMALL, "--out", "run", *given])
    for name in set(METHODS) - before:
        del METHODS[name]
    sys.modules.pop("outer", None)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]


def test_a_sound_row_from_outside_is_tried_and_runs_under_a_promise(run, capsys, tmp_path):
    assert run("--method", "outer:SPARSE", "--epsilon", "8") == 0
    assert "outer:SPARSE: one user moves what is released by" in capsys.readouterr().out.replace("\n", " ")
    frame = pd.read_parquet(tmp_path / "run" / "users.parquet")
    assert {"base", "global", "private", "both"} <= set(frame.system)
    assert json.loads((tmp_path / "run" / "statement.json").read_text())["epsilon"] <= 8


def test_a_row_that_couples_people_is_refused_and_runs_without_a_promise(run, capsys, tmp_path):
    assert run("--method", "outer:COUPLED", "--epsilon", "8") == 3
    error = capsys.readouterr().err
    assert "times the stated sensitivity" in error
    assert not (tmp_path / "run").exists()
    assert run("--method", "outer:COUPLED", "--epsilon", "inf") == 0


def test_a_row_whose_private_part_is_in_the_pass_is_refused_in_a_silo_like_ours(run, capsys):
    assert run("--method", "outer:JOINT", "--epsilon", "8", "--unit", "example") == 3
    assert "private part" in capsys.readouterr().err


def test_a_metric_from_outside_is_tried_and_stands_in_the_table(run, capsys, tmp_path):
    assert run("--metric", "outer:hits", "--epsilon", "8") == 0
    assert "moves a sum by at most 1" in capsys.readouterr().out.replace("\n", " ")
    frame = pd.read_parquet(tmp_path / "run" / "users.parquet")
    assert (frame.metric - frame.accuracy).abs().max() < 1e-9


@pytest.mark.parametrize(("name", "words"), [("loud", "not between 0 and 1"), ("remembering", "scored before")])
def test_a_metric_without_bounds_or_of_others_is_refused_under_a_promise(run, capsys, name, words):
    assert run("--metric", f"outer:{name}", "--epsilon", "8") == 3
    assert words in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("row", ["DOUBLED", "SHORT"])
def test_a_row_that_makes_no_update_of_an_update_is_refused_by_its_name(run, capsys, tmp_path, row):
    assert run("--method", f"outer:{row}", "--epsilon", "8") == 3
    assert f"method outer:{row}: " in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_row_that_fails_is_named_and_what_it_says_is_not_repeated(run, capsys, tmp_path):
    assert run("--method", "outer:FAILING", "--epsilon", "8") == 2
    error = capsys.readouterr().err
    assert "outer:FAILING fails on made-up people (ValueError)" in error
    assert "secret" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("epsilon", ["8", "inf"])
@pytest.mark.parametrize("name", ["worded", "long", "broken"])
def test_a_metric_that_gives_no_number_is_named_before_anything_is_trained(run, capsys, tmp_path, name, epsilon):
    assert run("--metric", f"outer:{name}", "--epsilon", epsilon) == 2
    error = capsys.readouterr().err
    assert f"outer:{name} gives no number" in error
    assert "secret" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["def broken(:", "raise RuntimeError('x')", "import sys; sys.exit(7)"])
def test_a_module_that_cannot_be_imported_is_named(run, capsys, tmp_path, text):
    (tmp_path / "torn.py").write_text(text)
    assert run("--metric", "torn:score") == 2
    assert "torn:score cannot be imported" in capsys.readouterr().err


def test_a_metric_that_is_refused_scores_where_nothing_is_promised(run):
    assert run("--metric", "outer:loud", "--epsilon", "inf") == 0


@pytest.mark.parametrize("place", ["outer:NOTHING", "outer:MISSING", "nowhere:ROW"])
def test_what_is_no_row_is_no_method(run, place):
    assert run("--method", place) == 2
    with pytest.raises(ConfigError):
        method_of(RunConfig(method=place))


def test_a_device_imports_nothing_that_a_server_names(run, tiny_base_folder, release_spec):
    import numpy as np

    from client.base_model import load_base
    from client.trainer import Trainer
    from client.vault import Vault
    from common.errors import Refusal
    from common.wire import Assignment

    trainer = Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)
    spec = release_spec(method="outer:SPARSE", model=trainer.base.digest)
    with pytest.raises(Refusal) as refused:
        Vault(trainer, lambda _: None, seed=0).train(Assignment(spec, 1, ("0",), np.zeros(spec.model_dim, np.float32)))
    assert refused.value.code == "bad-request"
    assert "outer" not in sys.modules


def test_no_metric_is_none_and_what_cannot_be_called_is_none_either(run):
    assert metric_of(RunConfig()) is None
    with pytest.raises(ConfigError, match="not a function"):
        metric_of(RunConfig(metric="outer:NOTHING"))
