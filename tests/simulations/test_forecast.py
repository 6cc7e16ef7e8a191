"""What a run says it will take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.config import RunConfig
from simulations.forecast import Forecast, forecast
from simulations.hosts import host_of


@pytest.mark.parametrize(("seconds", "words"), [(12.0, "12 seconds"), (300.0, "5 minutes"), (7200.0, "2.0 hours")])
def test_time_is_said_in_the_unit_that_fits(seconds, words):
    assert words in Forecast(seconds, 2**30, 2).sentence()


def test_twice_the_work_is_expected_to_take_longer(tiny_base_folder, tmp_path):
    import json

    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"user": str(u), "texts": ["w5 w6 w7"] * 5}) + "\n" for u in range(6)))
    config = RunConfig(model=str(tiny_base_folder), data=str(path), cohort=3, rounds=10, personal_steps=0)
    host = host_of(config)
    once = forecast(host, 0)
    twenty = forecast(replace(host, config=config.model_copy(update={"rounds": 200})), 0)
    assert 0 < once.seconds < twenty.seconds
    assert once.bytes > 50_000_000
