"""Releases and weeks that a device's budget has left."""

from __future__ import annotations

from dataclasses import replace

import pytest

from client.budget_keeper import BudgetKeeper, account_of
from client.device_home import DeviceHome
from client.outlook import outlook_of
from client.policy import Policy
from common.accounting import Repeated, epsilon_of
from common.ledger import Ledger
from common.privacy import Adjacency
from common.promise import promise_of
from common.wire import ReleaseSpec

LOCAL = ReleaseSpec(
    run="ab" * 8,
    method="dual",
    names=("layer.lora_A.weight",),
    shapes=((2, 3),),
    dtype="float32",
    unit="user",
    noise="local",
    clip=1.0,
    noise_multiplier=4.0,
    sampling_rate=0.5,
    rounds=5,
    epsilon="8.0",
    delta=1e-5,
    population=100,
    recipe={"local_steps": 1, "local_batch": 2},
    model="1" * 64,
    source="2" * 64,
)
DAY = 24 * 3600.0


@pytest.fixture
def opened(tmp_path):
    """A keeper whose clock moves two days with every look at it, and its home."""
    home = DeviceHome.open(tmp_path / "device", create=True)
    home.grant(Policy.model_validate({"epsilon": 8.0, "smallest_cohort": 10}))
    now = [1.7e9]

    def clock():
        now[0] += 2 * DAY
        return now[0]

    with home.open_ledger(clock=clock) as ledger:
        yield home, ledger, BudgetKeeper(home, ledger)


def release(keeper, number):
    receipt = {"run": LOCAL.run, "round": number, "spec": LOCAL.digest, "bytes": 24, "sha256": f"{number:064x}"}
    keeper.record(LOCAL, receipt | {"names": ["layer.lora_A.weight"], "shapes": [[2, 3]], "dtype": "float32"})


def outlook(home, ledger: Ledger):
    return outlook_of(ledger.entries(), account_of(ledger.entries(), home.policy()))


def test_nothing_is_foretold_before_anything_was_released(opened):
    home, ledger, _ = opened
    assert outlook(home, ledger) is None


def test_what_is_reserved_and_what_a_next_run_could_reserve(opened):
    home, ledger, keeper = opened
    release(keeper, 1)
    found = outlook(home, ledger)
    assert found.reserved == 4
    assert (found.per_week, found.weeks) == (None, None)
    event = promise_of(LOCAL).event(4.0)

    def cost(count):
        return epsilon_of([Repeated(event, count)], 1e-5, adjacency=Adjacency.REPLACE_ONE)

    assert cost(5 + found.further) <= 8.0 < cost(5 + found.further + max(1, found.further // 50) + 1)
    # That is what the keeper would grant.
    keeper.check(replace(LOCAL, run="cd" * 8, rounds=found.further), 1)
    assert f"{found.further:,} more" in found.sentence()


def test_weeks_follow_the_pace_of_the_last_releases(opened):
    home, ledger, keeper = opened
    for number in range(1, 4):
        release(keeper, number)
    found = outlook(home, ledger)
    assert found.reserved == 2
    assert found.per_week is not None
    assert found.weeks == pytest.approx(2 / found.per_week)
    assert "a week of late" in found.sentence()
