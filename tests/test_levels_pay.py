"""Adapters and retrieval together beat each alone, and what each user chooses harms almost nobody: five seeds.

It takes minutes per seed. With HOMESPUN_LEVELS_RUNS naming a folder, its runs are kept there, and a test that was
interrupted goes on with them.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from common.config import load_config, read_config_file
from simulations.run import Progress, resume, start

SETTING = Path(__file__).parents[1] / "simulations" / "experiments" / "levels.toml"
SEEDS = range(1, 6)
"""Seeds 0 and 101 were looked at while the prior and the weights of the choice were set; they are not used here."""
ORDERS = (
    ("both", "private"),
    ("both", "global"),
    ("both", "another"),
    ("both+retrieval", "retrieval"),
    ("both+retrieval", "global+retrieval"),
    ("chosen", "global"),
)
TOLERANCE = 0.01


def run_of(seed: int, folder: Path) -> Path:
    """The finished run of a seed: started, continued, or there already."""
    path = folder / f"seed-{seed}"
    if (path / "summary.json").is_file():
        return path
    if (path / "config.toml").is_file():
        return resume(path, Progress()).path
    config = load_config(
        read_config_file(SETTING), {"seed": seed, "rehearsal": True, "evaluation_users": 120, "evaluate_every": 8}
    )
    return start(config, path, Progress()).path


def test_the_setting_is_the_demo_s_but_for_its_rounds():
    small = load_config(read_config_file(SETTING))
    assert small.model_copy(update={"users": None, "cohort": 200, "rounds": 20}) == load_config({})


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_levels_add_up_and_the_choice_harms_almost_nobody_over_five_seeds(tmp_path, monkeypatch):
    kept = os.environ.get("HOMESPUN_LEVELS_RUNS")
    folder = Path(kept) if kept else tmp_path
    monkeypatch.setenv("HOMESPUN_HOME", str(folder / "home"))
    means: dict[str, list[float]] = {}
    gains: list[float] = []
    left: list[bool] = []
    others: dict[str, list[float]] = {}
    for seed in SEEDS:
        frame = pd.read_parquet(run_of(seed, folder) / "users.parquet")
        tested = frame[frame.split == "test"]
        table = tested.pivot(index="user", columns="system", values="nats_per_token")
        for system in table:
            means.setdefault(str(system), []).append(float(table[system].mean()))
        gains += (table["global"] - table["chosen"]).tolist()
        left += (tested[tested.system == "chosen"].choice != "global").tolist()
        columns = [name for name in tested if name.startswith("nats_") and name != "nats_per_token"]
        for column in (*columns, "preference_accuracy", "degeneration"):
            for system, mean in tested.groupby("system")[column].mean().dropna().items():
                others.setdefault(f"{column}, {system}", []).append(float(mean))
    for system, values in sorted(means.items(), key=lambda entry: np.mean(entry[1])):
        print(f"{system}: {np.mean(values):.3f} nats per token, by seed {[round(value, 3) for value in values]}")
    for name, values in sorted(others.items()):
        print(f"{name}: {np.mean(values):.3f}")
    for better, worse in ORDERS:
        gain = np.array(means[worse]) - np.array(means[better])
        low, high = stats.t.interval(0.95, len(gain) - 1, loc=gain.mean(), scale=stats.sem(gain))
        print(f"{better} over {worse}: {gain.mean():.3f} nats per token, 95 % interval {low:.3f} to {high:.3f}")
        assert low > 0, (better, worse, gain)
    harmed, helped = (float(np.mean(np.array(signed) > TOLERANCE)) for signed in (np.negative(gains), gains))
    said = f"helped {helped:.0%}, harmed {harmed:.1%}"
    print(f"the choice left global for {np.mean(left):.0%} of {len(gains)} users, {said}")
    assert harmed <= 0.02
