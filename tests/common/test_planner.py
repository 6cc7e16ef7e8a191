"""Tests of the planner: its arithmetic, its verdicts, and that its alternatives really work."""

import json
import math
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from common.accounting import PoissonGaussian, Repeated, epsilon_of
from common.planner import LEARNS_AT, Shape, plan
from common.privacy import Randomness, Unit, clip_rows, gaussian_noise

ROOT = Path(__file__).parents[2]
SMALL = {"dim": 8192, "population": 4000, "cohort": 200, "rounds": 25, "epsilon": 8.0, "spare_rounds": 2}
HOPELESS = {"dim": 65_536, "population": 50, "cohort": 50, "rounds": 25, "epsilon": 2.0, "spare_rounds": 2}


def test_the_noise_is_the_one_that_calibration_gives_for_all_rounds():
    made = plan(**SMALL)
    price = epsilon_of(Repeated(PoissonGaussian(0.05, made.noise_multiplier), 27), made.delta)
    assert 7.98 < price <= 8.0
    assert made.rounds == 27
    assert made.delta == 1e-5
    assert 0 < made.epsilon_per_round < 8.0


def test_the_predicted_noise_on_the_mean_is_what_the_mechanism_adds():
    made = plan(**SMALL)
    noise = gaussian_noise(1.0, made.noise_multiplier, made.dim, Randomness.rehearsal(0)) / made.cohort
    assert math.hypot(*noise) == pytest.approx(made.noise_to_clip, rel=0.03)
    assert made.signal_to_noise == pytest.approx(0.25 / made.noise_to_clip)
    assert made.total_signal_to_noise == pytest.approx(made.signal_to_noise * 5.0)


def test_the_predicted_local_noise_is_what_the_devices_add():
    made = plan(**{**SMALL, "dim": 256, "cohort": 100}, noise="local")
    randomness = Randomness.rehearsal(1)
    total = sum(gaussian_noise(2.0, made.noise_multiplier, made.dim, randomness) for _ in range(100))
    assert math.hypot(*(total / 100)) == pytest.approx(made.noise_to_clip, rel=0.15)
    # Nothing is amplified, and the sensitivity is doubled.
    assert made.noise_multiplier > plan(**{**SMALL, "dim": 256, "cohort": 100}).noise_multiplier * 2


def test_enough_users_can_be_expected_to_learn_and_need_no_alternative():
    made = plan(**SMALL)
    assert made.verdict == "learns"
    assert made.alternatives == ()
    assert "can be expected to learn a shared adapter of 8,192 numbers" in made.sentence()


def test_twenty_silos_with_a_million_numbers_drown_as_published():
    made = plan(dim=1_100_000, population=20, cohort=20, rounds=30, epsilon=8.0)
    assert made.noise_multiplier == pytest.approx(3.3, abs=0.05)
    assert made.noise_to_clip == pytest.approx(174, rel=0.02)
    assert made.verdict == "will not learn"


def test_a_hopeless_plan_says_so_and_names_what_would_work():
    made = plan(**HOPELESS)
    assert made.verdict == "will not learn"
    said = made.sentence()
    assert said.startswith("50 users at epsilon 2 will not learn a shared adapter of 65,536 numbers;")
    assert said.endswith("or stay local.")
    users = re.search(r"([\d,]+) users would", said)
    assert users is not None
    number = int(users[1].replace(",", ""))
    again = plan(**{**HOPELESS, "population": number, "cohort": number})
    assert again.total_signal_to_noise >= LEARNS_AT * 0.999
    # and it is the nearest: a tenth fewer would not
    fewer = int(number * 0.9)
    assert plan(**{**HOPELESS, "population": fewer, "cohort": fewer}).total_signal_to_noise < LEARNS_AT


def test_every_alternative_learns_when_it_is_planned_itself():
    shape = Shape(rank=8, layers=16, targets=2, values_per_rank=256)
    facts = {**SMALL, "dim": shape.dim, "population": 2000, "cohort": 150, "epsilon": 4.0}
    made = plan(**facts, shape=shape)
    assert made.verdict == "may learn"
    kinds = set()
    for alternative in made.alternatives:
        assert alternative.signal_to_noise >= LEARNS_AT * 0.999
        if found := re.fullmatch(r"([\d,]+) users", alternative.change):
            number = int(found[1].replace(",", ""))
            again = plan(**{**facts, "population": number, "cohort": number * 150 / 2000})
        elif found := re.fullmatch(r"rank (\d+)", alternative.change):
            again = plan(**{**facts, "dim": replace(shape, rank=int(found[1])).dim})
            more = plan(**{**facts, "dim": replace(shape, rank=int(found[1]) + 1).dim})
            assert more.total_signal_to_noise < LEARNS_AT
        elif found := re.fullmatch(r"on (\d+) layers?", alternative.change):
            again = plan(**{**facts, "dim": replace(shape, layers=int(found[1])).dim})
        elif found := re.fullmatch(r"with (\d+) targets? per layer", alternative.change):
            again = plan(**{**facts, "dim": replace(shape, targets=int(found[1])).dim})
        else:
            found = re.fullmatch(r"epsilon ([\d.]+)", alternative.change)
            assert found is not None
            again = plan(**{**facts, "epsilon": float(found[1])})
        kinds.add(alternative.change.split()[0])
        assert again.total_signal_to_noise == pytest.approx(alternative.signal_to_noise, rel=2e-3)
    assert {"rank", "on"} <= kinds


def test_rank_and_layers_are_reduced_together_when_neither_is_enough():
    shape = Shape(rank=4, layers=4, targets=1, values_per_rank=600)
    made = plan(**{**SMALL, "dim": shape.dim, "population": 300, "cohort": 40, "epsilon": 4.0}, shape=shape)
    smaller = [other.change for other in made.alternatives if other.change.startswith("rank")]
    assert smaller
    assert all(" on " in change for change in smaller)


def test_no_alternative_is_offered_that_nobody_could_take():
    made = plan(**{**SMALL, "dim": 65_536, "population": 1000}, noise="local")
    assert made.alternatives == ()
    assert made.sentence().endswith("stay local: train private adapters only.")


def test_the_assumption_is_printed_and_matters():
    made = plan(**SMALL)
    assert any("assuming that the mean clipped update is 25% of the clip norm" in line for line in made.lines())
    assert plan(**SMALL, signal_share=0.5).signal_to_noise == pytest.approx(2 * made.signal_to_noise)


def test_without_noise_there_is_no_claim_and_no_division_by_zero():
    made = plan(**{**SMALL, "epsilon": math.inf})
    assert made.noise_multiplier == 0.0
    assert made.total_signal_to_noise == math.inf
    assert made.lines()[0] == "no noise: no privacy claim"
    assert json.loads(json.dumps(made.to_json(), allow_nan=False))["epsilon"] == "inf"


def test_parties_that_noise_their_own_records_average_out():
    facts = {"dim": 4096, "population": 10_000, "cohort": 100, "rounds": 200, "epsilon": 8.0, "unit": Unit.EXAMPLE}
    one, four = plan(**facts), plan(**facts, parties=4)
    assert one.noise_to_clip == pytest.approx(2 * four.noise_to_clip)
    assert "10,000 records" in one.sentence()


@pytest.mark.parametrize(
    "change",
    [{"cohort": 5000}, {"cohort": 0}, {"dim": 0}, {"rounds": 0}, {"signal_share": 0.0}, {"spare_rounds": -1}],
)
def test_a_plan_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match=r"cohort|sizes|share"):
        plan(**{**SMALL, **change})


def test_the_rounds_that_are_left_fit_and_one_more_does_not():
    found = plan(**SMALL, rounds_per_week=7.0)
    event = PoissonGaussian(found.cohort / found.population, found.noise_multiplier)
    assert found.rounds <= found.rounds_left
    assert epsilon_of(Repeated(event, found.rounds_left), found.delta) <= found.epsilon
    assert epsilon_of(Repeated(event, found.rounds_left + 1), found.delta) > found.epsilon
    assert found.weeks_left == pytest.approx(found.rounds_left / 7.0)
    said = f"{found.rounds_left} rounds of this noise, which last {found.weeks_left:.1f} weeks at 7 rounds a week"
    assert any(said in line for line in found.lines())
    assert found.to_json()["weeks_left"] == found.weeks_left
    assert not any("weeks" in line for line in plan(**SMALL).lines())
    with pytest.raises(ValueError, match="rounds per week"):
        plan(**SMALL, rounds_per_week=0.0)


def test_a_round_of_a_silo_is_all_its_steps():
    steps = plan(**SMALL | {"rounds": 40, "unit": "example"}, steps_per_round=8)
    assert steps.rounds_left == 5


def test_the_planner_starts_quickly_and_without_torch_or_flwr():
    code = """
import sys
from common.planner import plan
plan(dim=8192, population=4000, cohort=200, rounds=25, epsilon=8.0)
print([name for name in ("torch", "flwr") if name in sys.modules])
"""
    start = time.process_time()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout.strip() == "[]"
    assert time.process_time() - start < 10.0  # 2 s alone; the rest is room for a busy machine


def test_the_assumed_share_is_that_of_clipped_updates_that_agree_by_a_quarter():
    # users share one direction and differ in the others: the mean of their clipped updates is the shared part
    randomness = Randomness.rehearsal(2)
    updates = randomness.normal((400, 300)) / math.sqrt(299)
    updates[:, 0] = 0.25 / math.sqrt(1 - 0.25**2)
    mean = clip_rows(updates * 7.0, 1.0).mean(axis=0)
    assert math.hypot(*mean) == pytest.approx(0.25, abs=0.02)
