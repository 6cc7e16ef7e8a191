"""What a run says it will take."""

from __future__ import annotations

import json

import pytest

from common.config import RunConfig
from simulations.forecast import Forecast, forecast, steps_of
from simulations.hosts import host_of


@pytest.mark.parametrize(("seconds", "words"), [(12.0, "12 seconds"), (300.0, "5 minutes"), (7200.0, "2.0 hours")])
def test_time_is_said_in_the_unit_that_fits(seconds, words):
    assert words in Forecast(seconds, 2**30, 2).sentence()


def test_twenty_times_the_rounds_are_twenty_times_the_shared_steps():
    config = RunConfig(cohort=3, rounds=10, local_steps=2, personal_steps=0, levels=())
    assert steps_of(config, 6) == 10 * 3 * 2
    assert steps_of(config.model_copy(update={"rounds": 200}), 6) == 20 * steps_of(config, 6)


def test_personal_steps_are_counted_for_the_users_that_are_scored():
    config = RunConfig(cohort=3, rounds=1, local_steps=1, personal_steps=40, evaluation_users=5, levels=())
    few = steps_of(config, 2) - 3
    assert few > 2 * 40
    assert steps_of(config, 100) - 3 == pytest.approx(few * 5 / 2)


def test_a_forecast_measures_a_chunk_of_the_runs_own_users(tiny_base_folder, tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"user": str(u), "texts": ["w5 w6 w7"] * 5}) + "\n" for u in range(6)))
    config = RunConfig(model=str(tiny_base_folder), data=str(path), cohort=3, rounds=10, personal_steps=0)
    once = forecast(host_of(config), 0)
    assert once.seconds > 0
    assert once.workers == 0
    assert once.bytes > 50_000_000
