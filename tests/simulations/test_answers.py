"""LaMP's files, in the published format with its quirks, are loaded, run and scored."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import homespun
from common.config import RunConfig
from common.errors import DataError
from simulations.answers import score_answers
from simulations.run import Progress, start

RATING = "What is the score of the following review on a scale of 1 to 5? just answer with 1, 2, 3, 4, or 5. review: "
MOVIE = "Which tag does this movie relate to among the following tags? tags: [comedy, romance] description: "


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))


def write(folder, instruction, item, golds, *, as_dict):
    """Six queries as LaMP has them: a list, or a dict with "golds" as its e-mail script writes; ids out of order."""
    questions = [
        {
            "id": f"{number}1",
            "input": f"{instruction}w{number + 20} w9 w10",
            "profile": [{"id": f"{number}{n}", **item(number + n)} for n in range(6)],
        }
        for number in (5, 3, 1, 4, 2, 6)
    ]
    outputs = [{"id": question["id"], "output": gold} for question, gold in zip(questions, golds, strict=True)]
    folder.mkdir()
    body = {"task": "LaMP_3", "golds": questions} if as_dict else questions
    (folder / "dev_questions.json").write_text(json.dumps(body))
    (folder / "dev_outputs.json").write_text(json.dumps({"task": "LaMP_3", "golds": outputs[::-1]}))
    return folder


def config_of(folder, tiny_base_folder, **changes):
    values = {
        "model": str(tiny_base_folder),
        "data": str(folder),
        "cohort": 3,
        "rounds": 1,
        "local_batch": 2,
        "personal_steps": 2,
        "personal_batch": 2,
        "evaluation_users": 4,
        "workers": 0,
        "rehearsal": True,
        "max_tokens": 32,
    }
    return RunConfig(**(values | changes))


@pytest.mark.parametrize("as_dict", [False, True])
def test_lamp_ratings_load_run_and_score(tmp_path, tiny_base_folder, as_dict, capsys):
    ratings = write(
        tmp_path / "lamp",
        RATING,
        lambda n: {"text": f"w{n + 30} w{n + 40}", "score": str(1 + n % 5), "date": "2020-01-01"},
        ["1", "2", "3", "4", "5", "5"],
        as_dict=as_dict,
    )
    run = start(config_of(ratings, tiny_base_folder), tmp_path / "run", Progress()).path
    frame = pd.read_parquet(run / "users.parquet")
    assert (frame[(frame.split == "test") & (frame.system == "both")].records == 1).all()
    found = score_answers(run, 3, 4)
    assert set(found) == {"base", "global", "private", "both"}
    for tasks in found.values():
        (scores,) = tasks
        assert (scores.task, scores.answers) == ("LaMP_3", 3)
        assert 0 <= scores.metrics["mae"] <= scores.metrics["rmse"] <= 4
        assert scores.unparsable == 1.0  # words of a base that knows no digit: each counts as the worse end
    assert homespun.main(["sim", "answers", str(run), "--users", "2", "--tokens", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["both"][0]["answers"] == 2


def test_lamp_tags_that_are_no_label_are_wrong_and_counted(tmp_path, tiny_base_folder):
    movies = write(
        tmp_path / "lamp",
        MOVIE,
        lambda n: {"description": f"w{n + 30} w{n + 40}", "tag": "comedy"},
        ["comedy"] * 6,
        as_dict=False,
    )
    run = start(config_of(movies, tiny_base_folder, levels=()), tmp_path / "run", Progress()).path
    (scores,) = score_answers(run, 4, 3)["both"]
    assert scores.task == "LaMP_2"
    assert (scores.metrics["accuracy"], scores.unparsable) == (0.0, 1.0)


def test_plain_text_has_no_answers_to_score(audited_base, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(audited_base / "home"))
    with pytest.raises(DataError, match="plain text"):
        score_answers(audited_base / "run", 2, 2)
