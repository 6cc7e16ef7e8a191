"""The README's claim over five rehearsed seeds: global and private together beat either, in the worst decile too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from common.config import load_config, read_config_file
from simulations.run import Progress, start

SETTING = Path(__file__).parents[1] / "simulations" / "experiments" / "personalization.toml"
SEEDS = range(5)


def worst_decile(values: np.ndarray) -> float:
    return float(np.sort(values)[-max(1, len(values) // 10) :].mean())


def test_the_setting_is_the_demo_s():
    assert load_config(read_config_file(SETTING)).model_copy(update={"users": None}) == load_config({})


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_both_beats_private_and_global_and_base_in_mean_and_worst_decile_over_five_seeds(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    scores: dict[str, dict[str, list[float]]] = {"mean": {}, "worst decile": {}}
    for seed in SEEDS:
        config = load_config(
            read_config_file(SETTING),
            {"seed": seed, "rehearsal": True, "evaluation_users": 120, "evaluate_every": 20, "levels": ()},
        )
        frame = pd.read_parquet(start(config, tmp_path / f"seed-{seed}", Progress()).path / "users.parquet")
        for system, own in frame[frame.split == "test"].groupby("system"):
            values = own.nats_per_token.to_numpy()
            scores["mean"].setdefault(str(system), []).append(float(values.mean()))
            scores["worst decile"].setdefault(str(system), []).append(worst_decile(values))
    for measure, by_system in scores.items():
        print(measure, {system: [round(value, 4) for value in values] for system, values in by_system.items()})
        for other in ("private", "global", "base"):
            gains = np.array(by_system[other]) - np.array(by_system["both"])
            low = stats.t.interval(0.95, len(gains) - 1, loc=gains.mean(), scale=stats.sem(gains))[0]
            print(f"{measure}: both over {other} {gains.mean():.3f}, 95 % interval from {low:.3f}, nats per token")
            assert low > 0, (measure, other, gains)
