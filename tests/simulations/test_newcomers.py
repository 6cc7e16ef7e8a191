"""People who just came: who they are, what they are asked, and what stands beside the run afterwards."""

from __future__ import annotations

import json

import numpy as np
import pytest

import homespun
from common.config import RunConfig
from common.errors import ConfigError, DataError
from simulations import hosts
from simulations.newcomers import ASKED, NewcomerCurve, _people, _with_history, curve_of
from simulations.run import Progress, start

CONFIG = {
    "cohort": 6,
    "rounds": 1,
    "local_batch": 2,
    "local_steps": 1,
    "personal_steps": 2,
    "personal_batch": 2,
    "evaluation_users": 4,
    "workers": 0,
    "max_tokens": 24,
    "rehearsal": True,
}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_people(path, users, records):
    texts = [[f"w{3 + user} w{4 + word} w{5 + user + word} w9" for word in range(records)] for user in range(users)]
    lines = [json.dumps({"user": f"secret-{user}", "texts": own}) + "\n" for user, own in enumerate(texts)]
    path.write_text("".join(lines))
    return str(path)


@pytest.fixture
def run(home, tiny_base_folder):
    data = write_people(home / "people.jsonl", 18, 14)
    config = RunConfig(model=str(tiny_base_folder), data=data, users=12, **CONFIG)
    return start(config, home / "runs" / "one", Progress()).path


def test_newcomers_took_no_part_and_are_asked_the_same_records_at_every_number(run):
    curve = curve_of(run, [0, 1, 5], 10)
    assert (curve.users, curve.enrolled, curve.reference) == (6, False, "global")  # 18 in the file, 12 in the run
    for count in curve.records:
        assert curve.at("global", count).nats == pytest.approx(curve.at("global", 0).nats)
    nothing = {system for system in curve.systems if curve.at(system, 0) is not None}
    assert not {"both", "private", "another"} & nothing  # an adapter is trained on something
    assert curve.at("global+retrieval", 0).gain.estimate == pytest.approx(0.0, abs=1e-6)
    assert curve.at("both", 1).gain.estimate != 0.0


def test_what_is_asked_is_never_learned(run, monkeypatch):
    seen = []
    real = hosts.personalized

    def watched(host, users, *rest):
        for name in users:
            parts = host.population.split(name)
            seen.append([(record.response, record.time) for record in (*parts.train, *parts.validation)])
            assert len(parts.test) == ASKED
            assert not set(seen[-1]) & {(record.response, record.time) for record in parts.test}
        return real(host, users, *rest)

    monkeypatch.setattr(hosts, "personalized", watched)
    curve_of(run, [0, 2, 5], 3)
    assert sorted({len(own) for own in seen}) == [0, 2, 5]


def test_the_command_keeps_the_curve_and_the_page_shows_it(run, capsys):
    assert homespun.main(["sim", "newcomers", str(run), "--records", "0,5", "--users", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    kept = json.loads((run / "newcomers.json").read_text())
    assert kept == printed
    assert NewcomerCurve.from_json(kept).to_json() == kept
    page = (run / "report.html").read_text()
    assert "People who just came" in page
    assert "secret-" not in page
    assert homespun.main(["sim", "newcomers", str(run), "--records", "0,5", "--users", "4"]) == 0
    assert "5 records" in capsys.readouterr().out


def test_where_everybody_is_enrolled_the_curve_says_so(home, tiny_base_folder):
    data = write_people(home / "all.jsonl", 8, 20)
    config = RunConfig(model=str(tiny_base_folder), data=data, **CONFIG)
    path = start(config, home / "runs" / "all", Progress()).path
    curve = curve_of(path, [0, 2], 4)
    assert curve.enrolled
    assert "of the run itself" in curve.sentence()
    with pytest.raises(DataError, match="nobody has the 28 records"):
        curve_of(path, [20], 4)
    with pytest.raises(ConfigError, match="increasing"):
        curve_of(path, [5, 1], 4)


@pytest.mark.parametrize(("unit", "records"), [("user", 20), ("example", 40)])
def test_people_of_the_run_are_never_asked_what_the_run_trained_on(home, tiny_base_folder, unit, records):
    data = write_people(home / "all.jsonl", 4, records)
    host = hosts.host_of(RunConfig(model=str(tiny_base_folder), data=data, unit=unit, **CONFIG | {"cohort": 2}))
    people, enrolled = _people(host, ASKED, 4)
    assert enrolled
    learned = {record.response for name in "0123" for record in host.population.split(name).train}
    assert learned
    for own in people:
        assert not learned & {record.response for record in _with_history(own, 0).records}
    few = write_people(home / "few.jsonl", 4, 12)
    host = hosts.host_of(RunConfig(model=str(tiny_base_folder), data=few, unit=unit, **CONFIG | {"cohort": 2}))
    with pytest.raises(DataError, match="outside of what the run trained on"):
        _people(host, ASKED, 4)


@pytest.mark.parametrize(("method", "rank"), [("ditto", 2), ("fedsa", 3)])
def test_newcomers_to_a_method_that_remembers_start_with_nothing_kept(home, tiny_base_folder, method, rank):
    data = write_people(home / "people.jsonl", 14, 12)
    config = RunConfig(
        model=str(tiny_base_folder), data=data, users=10, method=method, rank=2, personal_rank=rank, **CONFIG
    )
    curve = curve_of(start(config, home / "runs" / "kept", Progress()).path, [0, 3], 4)
    assert np.isfinite(curve.at("both", 3).nats)


def test_where_nothing_is_shared_newcomers_start_from_the_base(home, tiny_base_folder):
    data = write_people(home / "people.jsonl", 14, 12)
    config = RunConfig(model=str(tiny_base_folder), data=data, users=10, method="local", **CONFIG)
    curve = curve_of(start(config, home / "runs" / "local", Progress()).path, [0, 3], 4)
    assert curve.reference == "base"
    assert "private+retrieval" in curve.systems
    assert all(np.isfinite(point.nats) for point in curve.points)
