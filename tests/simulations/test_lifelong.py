"""Records that arrive over time, in a small run: what is asked before it is learned, and what is taken back."""

from __future__ import annotations

import json

import numpy as np
import pytest

import homespun
from client.personalization import lifelong as rules
from common.config import RunConfig
from common.errors import ConfigError, DataError
from simulations import hosts, lifelong
from simulations.lifelong import POLICIES, Lifelong, lifelong_of
from simulations.run import Progress, start


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_base_folder):
    home = tmp_path_factory.mktemp("lifelong")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMESPUN_HOME", str(home / "home"))
        texts = [[f"w{3 + user} w{4 + word % 3} w{5 + user} w{9 + word}" for word in range(26)] for user in range(10)]
        lines = [json.dumps({"user": f"secret-{user}", "texts": own}) + "\n" for user, own in enumerate(texts)]
        (home / "people.jsonl").write_text("".join(lines))
        config = RunConfig(
            model=str(tiny_base_folder),
            data=str(home / "people.jsonl"),
            cohort=5,
            rounds=1,
            local_batch=2,
            local_steps=1,
            personal_steps=3,
            personal_batch=2,
            evaluation_users=4,
            workers=0,
            max_tokens=24,
            rehearsal=True,
        )
        yield start(config, home / "run", Progress()).path


@pytest.fixture(autouse=True)
def home(run, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(run.parent / "home"))


def test_every_policy_is_asked_about_the_future_and_about_what_it_once_knew(run):
    found = lifelong_of(run, 3, 4)
    assert set(found.future) == set(POLICIES) == set(found.remembered)
    assert all(len(gains) == 2 for gains in found.future.values())
    first = {gains[0].estimate for gains in found.future.values()}
    assert len(first) == 1  # before the second period is learned, all policies have the same adapter
    assert found.refits["once"] == 1.0  # the shared adapter moved
    assert found.refits["everything"] == 2.0
    assert found.refits["guarded"] <= 2.0
    assert Lifelong.from_json(found.to_json()).to_json() == found.to_json()


def test_nobody_trains_on_what_is_asked_before_it_was_asked(run, monkeypatch):
    """Every record that a fit sees was a training record of this period or an earlier one."""
    study = None
    real_init, real_fit = lifelong._Study.__init__, lifelong._Study.fit

    def keep(self, *arguments):
        nonlocal study
        real_init(self, *arguments)
        study = self

    def watched(self, users, starts, rows, under, salt):
        for user, own in zip(users, rows, strict=True):
            allowed = {id(one) for one in self.learned(user, salt)}
            assert {id(one) for one in own} <= allowed
        return real_fit(self, users, starts, rows, under, salt)

    monkeypatch.setattr(lifelong._Study, "__init__", keep)
    monkeypatch.setattr(lifelong._Study, "fit", watched)
    lifelong_of(run, 4, 3)
    assert study is not None


def test_a_refit_that_is_worse_is_taken_back_with_the_shared_adapter_it_lay_over(run, monkeypatch):
    monkeypatch.setattr(lifelong, "keep_refit", lambda *arguments: False)
    found = lifelong_of(run, 3, 4)
    assert found.taken_back == 1.0
    monkeypatch.setattr(lifelong, "keep_refit", rules.keep_refit)
    # whoever takes everything back still has what was fitted in the first period, and over no shared adapter
    host = hosts.host_of(RunConfig.model_validate(_config(run)))
    study = lifelong._Study(
        host, lifelong._periods(host, 3, 4, None), host.shared_adapter(np.zeros(host.split.sent.size, np.float32))
    )
    kept = lifelong._first(study, 4)
    before = kept.adapters.copy()
    monkeypatch.setattr(lifelong, "keep_refit", lambda *arguments: False)
    back, due = lifelong._guarded(study, kept, 1, study.shared, [1.0] * 4)
    assert back == due == 4
    np.testing.assert_array_equal(kept.adapters, before)
    assert kept.unders == [None] * 4
    assert all(own.shared == "" for own in kept.belonging)


def test_who_becomes_another_person_brings_another_person_s_records(run):
    host = hosts.host_of(RunConfig.model_validate(_config(run)))
    plain, changed = lifelong._periods(host, 4, 3, None), lifelong._periods(host, 4, 3, 2)
    first = [one.ids.tolist() for one in plain[0][0][0]]
    assert [one.ids.tolist() for one in changed[0][0][0]] == first
    assert [one.ids.tolist() for one in changed[3][0][0]] == [one.ids.tolist() for one in plain[3][0][1]]


def test_the_command_keeps_what_it_found_and_the_page_shows_it(run, capsys):
    assert homespun.main(["sim", "lifelong", str(run), "--periods", "3", "--users", "3", "--drift", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((run / "lifelong.json").read_text()) == printed
    assert printed["drifted_at"] == printed["moved_at"] == 3
    page = (run / "report.html").read_text()
    assert "Records that arrive over time" in page
    assert "secret-" not in page
    assert homespun.main(["sim", "lifelong", str(run), "--periods", "3", "--users", "3"]) == 0
    assert "rehearsal" in capsys.readouterr().out


def test_too_few_periods_or_records_are_refused(run):
    with pytest.raises(ConfigError, match="at least 3"):
        lifelong_of(run, 2, 4)
    with pytest.raises(DataError, match="60 records"):
        lifelong_of(run, 10, 4)


def _config(run):
    from common.config import read_config_file

    return read_config_file(run / "config.toml")
