"""The configuration: every mistake at once, and a resolved file is valid input again."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.config import METHOD_ALIASES, RunConfig, load_config, read_config_file
from common.errors import ConfigError


@given(
    rounds=st.integers(1, 1000),
    epsilon=st.one_of(st.floats(0.01, 100), st.just(math.inf)),
    learning_rate=st.floats(1e-6, 10),
    targets=st.lists(st.sampled_from(["q_proj", "v_proj", "o_proj"]), min_size=1, unique=True),
    delta=st.one_of(st.none(), st.floats(1e-12, 1e-5)),
)
def test_what_is_written_reads_back_equal(tmp_path_factory, rounds, epsilon, learning_rate, targets, delta):
    config = RunConfig(
        rounds=rounds,
        epsilon=epsilon,
        learning_rate=learning_rate,
        targets=tuple(targets),
        delta=delta,
        data='a "b"\\c',
    )
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_text(config.to_toml())
    assert load_config(read_config_file(path)) == config


def test_all_problems_come_at_once_and_name_their_keys():
    with pytest.raises(ConfigError) as caught:
        load_config({"rounds": 0, "nonsense": 1, "noise": "loud"}, {"rank": "two"})
    assert len(caught.value.problems) == 4
    for name in ("rounds", "nonsense", "noise", "rank"):
        assert any(problem.startswith(name) for problem in caught.value.problems)


def test_later_sources_win_and_none_is_no_value():
    assert load_config({"rank": 4, "rounds": 3}, {"rank": 8, "rounds": None}) == RunConfig(rank=8, rounds=3)


def test_flags_arrive_as_text():
    config = load_config({"epsilon": "inf", "targets": "q_proj, o_proj", "rounds": "7", "learning_rate": "1e-3"})
    assert (config.epsilon, config.targets, config.rounds) == (math.inf, ("q_proj", "o_proj"), 7)
    assert not config.private


@pytest.mark.parametrize("value", ["0", "-1", "nan"])
def test_an_epsilon_that_promises_nothing_sensible_is_refused(value):
    with pytest.raises(ConfigError, match="epsilon"):
        load_config({"epsilon": value})


def test_a_cohort_larger_than_the_population_is_refused():
    with pytest.raises(ConfigError, match="cohort"):
        load_config({"users": 10, "cohort": 11})


@pytest.mark.parametrize(("alias", "name"), METHOD_ALIASES.items())
def test_papers_names_mean_our_methods(alias, name):
    assert load_config({"method": alias.upper()}).method == name


def test_a_file_that_is_not_there_or_is_no_toml_is_named(tmp_path):
    broken = tmp_path / "broken.toml"
    broken.write_text("rounds = = 3")
    for path in (tmp_path / "missing.toml", broken, tmp_path):
        with pytest.raises(ConfigError, match=path.name):
            read_config_file(path)


def test_hyphens_in_a_file_are_underscores(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("learning-rate = 0.5\n")
    assert load_config(read_config_file(path)).learning_rate == 0.5


@pytest.mark.parametrize(
    ("key", "value"), [("users", 10**20), ("rounds", 2**31), ("local_steps", 2**40), ("clip", 1e-300), ("clip", 1e300)]
)
def test_numbers_that_no_run_can_have_are_named(key, value):
    with pytest.raises(ConfigError, match=key):
        load_config({key: value})
