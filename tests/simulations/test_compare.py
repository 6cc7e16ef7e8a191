"""Comparing runs: pairs of one user's own scores, checked against arithmetic by hand, and what is refused."""

from __future__ import annotations

import io
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from common.config import RunConfig
from common.errors import ConfigError, DataError
from simulations.compare import compare

USERS = ("3", "11", "20", "4")


def scores_of(generator, systems, users=USERS, split="test"):
    """A table of made-up scores, shuffled: nothing may depend on the order of rows."""
    rows = [
        {
            "system": system,
            "user": user,
            "split": split,
            "nats_per_token": float(generator.uniform(1, 3)),
            "accuracy": float(generator.uniform()),
            "tokens": 40 + int(user),
            "records": 5,
        }
        for system in systems
        for user in users
    ]
    return pd.DataFrame([rows[index] for index in generator.permutation(len(rows))])


@pytest.fixture
def run_folder(tmp_path):
    """A function that writes the files of a finished run that a comparison reads."""

    def write(name, frame, *, digest="d" * 64, **keys):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.toml").write_text(RunConfig(**{"users": 300, **keys}).to_toml())
        (folder / "data.json").write_text(json.dumps({"digest": digest}))
        if frame is not None:
            frame.to_parquet(folder / "users.parquet", index=False)
        return folder

    return write


def mean_gain(frame, system, reference_frame, reference_system, metric="nats_per_token", sign=-1):
    """The naive way: look every user up."""

    def score(table, user, name):
        rows = table[(table["user"] == user) & (table["system"] == name) & (table["split"] == "test")]
        return rows[metric].item()

    gains = [sign * (score(frame, user, system) - score(reference_frame, user, reference_system)) for user in USERS]
    return float(np.mean(gains))


def test_gains_are_means_of_each_users_own_difference(run_folder):
    generator = np.random.default_rng(1)
    frames = [scores_of(generator, ("base", "global", "private", "both")) for _ in range(2)]
    found = compare([run_folder("old", frames[0]), run_folder("new", frames[1])])
    assert found.runs == ("old", "new")
    assert found.users == len(USERS)
    pairs = [(entry.metric, entry.system, entry.reference_system) for entry in found.differences]
    systems = ("base", "global", "private", "both")
    assert pairs == [(metric, each, each) for metric in ("nats_per_token", "accuracy") for each in systems]
    for entry in found.differences:
        sign = -1 if entry.metric == "nats_per_token" else 1
        expected = mean_gain(frames[1], entry.system, frames[0], entry.system, entry.metric, sign)
        assert entry.gain.estimate == pytest.approx(expected)
        assert entry.gain.low <= entry.gain.estimate <= entry.gain.high
        assert sign * (entry.mean - entry.reference_mean) == pytest.approx(expected)


def test_what_users_end_up_with_is_compared_under_both_its_names(run_folder):
    generator = np.random.default_rng(2)
    local, dual = scores_of(generator, ("base", "private")), scores_of(generator, ("base", "global", "private", "both"))
    found = compare([run_folder("local", local, method="local"), run_folder("dual", dual)])
    last = [entry for entry in found.differences if entry.metric == "nats_per_token"][-1]
    assert (last.system, last.reference_system) == ("both", "private")
    assert last.gain.estimate == pytest.approx(mean_gain(dual, "both", local, "private"))


def test_only_test_records_count(run_folder):
    generator = np.random.default_rng(3)
    frames = [scores_of(generator, ("base", "both")) for _ in range(2)]
    folders = [run_folder("old", frames[0]), run_folder("new", frames[1])]
    noisy = [pd.concat([frame, scores_of(generator, ("base", "both"), split="validation")]) for frame in frames]
    with_validation = [run_folder("old-2", noisy[0]), run_folder("new-2", noisy[1])]
    assert [entry.gain for entry in compare(folders).differences] == [
        entry.gain for entry in compare(with_validation).differences
    ]


@settings(max_examples=10, deadline=None)
@given(st.floats(0.02, 2.0), st.integers(0, 2**32 - 1))
def test_the_same_gain_for_everyone_leaves_no_doubt(tmp_path_factory, gain, seed):
    frame = scores_of(np.random.default_rng(seed), ("both",))
    better = frame.assign(nats_per_token=frame["nats_per_token"] - gain)
    folder = tmp_path_factory.mktemp("pair")
    for name, table in (("old", frame), ("new", better)):
        (folder / name).mkdir()
        (folder / name / "config.toml").write_text(RunConfig(users=300).to_toml())
        (folder / name / "data.json").write_text('{"digest": "d"}')
        table.to_parquet(folder / name / "users.parquet", index=False)
    (entry, *_) = compare([folder / "old", folder / "new"]).differences
    assert (entry.gain.low, entry.gain.high) == (pytest.approx(gain), pytest.approx(gain))
    assert (entry.helped.estimate, entry.harmed.estimate, entry.verdict) == (1.0, 0.0, "better")
    (backwards, *_) = compare([folder / "new", folder / "old"]).differences
    assert backwards.gain.estimate == pytest.approx(-gain)
    assert backwards.verdict == "worse"


def test_several_runs_are_held_against_the_first(run_folder):
    generator = np.random.default_rng(4)
    folders = [run_folder(name, scores_of(generator, ("both",))) for name in ("a", "b", "c")]
    differences = compare(folders).differences
    assert [(entry.run, entry.reference) for entry in differences if entry.metric == "accuracy"] == [
        ("b", "a"),
        ("c", "a"),
    ]


def test_settings_in_which_the_runs_differ_are_told_and_where_the_data_lay_is_not(run_folder):
    frame = scores_of(np.random.default_rng(5), ("both",))
    old = run_folder("old", frame, rank=2, epsilon=8.0, data="here/a.jsonl")
    new = run_folder("new", frame, rank=4, epsilon=float("inf"), data="there/b.jsonl")
    found = compare([old, new])
    assert found.settings == {"rank": (2, 4), "epsilon": (8.0, float("inf"))}
    assert found.to_json()["settings"] == {"rank": [2, 4], "epsilon": [8.0, "inf"]}
    assert "rank 2 and 4" in found.sentence()


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ({"digest": "e" * 64}, "different data"),
        ({"seed": 7}, r"seed 7 and 0"),
        ({"users": 301}, r"users 301 and 300"),
        ({"text_column": "body"}, r"text_column body and None"),
        ({"unit": "example"}, r"unit example and user"),
    ],
)
def test_runs_in_which_a_number_may_be_another_person_are_refused(run_folder, difference, message):
    frame = scores_of(np.random.default_rng(6), ("both",))
    with pytest.raises(ConfigError, match=message):
        compare([run_folder("old", frame), run_folder("new", frame, **difference)])


def test_runs_that_scored_other_users_are_refused(run_folder):
    generator = np.random.default_rng(7)
    old = run_folder("old", scores_of(generator, ("both",)))
    new = run_folder("new", scores_of(generator, ("both",), USERS[:3]), evaluation_users=3)
    with pytest.raises(ConfigError, match=r"different users were scored \(evaluation_users 3 and 300\)"):
        compare([old, new])


def test_runs_that_saw_the_records_differently_are_refused(run_folder):
    frame = scores_of(np.random.default_rng(8), ("both",))
    shorter = frame.assign(tokens=frame["tokens"] - 1)
    with pytest.raises(ConfigError, match="max_tokens"):
        compare([run_folder("old", frame), run_folder("new", shorter, max_tokens=32)])


def test_one_run_is_no_comparison(run_folder):
    with pytest.raises(ConfigError, match="two runs"):
        compare([run_folder("only", scores_of(np.random.default_rng(9), ("both",)))])


def test_an_unfinished_run_says_how_to_finish_it(run_folder):
    frame = scores_of(np.random.default_rng(10), ("both",))
    with pytest.raises(DataError, match="homespun sim resume"):
        compare([run_folder("old", frame), run_folder("new", None)])


@pytest.mark.parametrize("damage", ["not a table", "no digest", "no rows"])
def test_a_damaged_run_is_one_clear_error(run_folder, damage):
    frame = scores_of(np.random.default_rng(11), ("both",))
    good, bad = run_folder("good", frame), run_folder("bad", frame[:0] if damage == "no rows" else frame)
    if damage == "not a table":
        (bad / "users.parquet").write_bytes(b"PAR1 no")
    if damage == "no digest":
        (bad / "data.json").write_text("{}")
    with pytest.raises(DataError, match="bad"):
        compare([good, bad])


def test_the_json_is_flat_rows_and_the_terminal_shows_the_gains(run_folder):
    generator = np.random.default_rng(12)
    found = compare([run_folder(name, scores_of(generator, ("base", "both"))) for name in ("old", "new")])
    value = json.loads(json.dumps(found.to_json(), allow_nan=False))
    row, gain = value["differences"][1], found.differences[1].gain
    assert (row["gain"], row["gain_low"], row["gain_high"]) == (gain.estimate, gain.low, gain.high)
    shown = io.StringIO()
    Console(file=shown, width=160).print(found.table())
    assert f"{gain.estimate:+.4f}" in shown.getvalue()
    assert "new: both" in shown.getvalue()


def test_one_user_leaves_nothing_to_resample_and_the_json_stays_json(run_folder):
    frame = scores_of(np.random.default_rng(13), ("both",), USERS[:1])
    value = compare([run_folder("old", frame), run_folder("new", frame)]).to_json()
    assert value["differences"][0]["gain_low"] is None
    json.dumps(value, allow_nan=False)
