"""What a device may still release: at its real price, over all runs, and written down first."""

from __future__ import annotations

import math

import numpy as np
import pytest

from client.device_ledger import DeviceLedger
from client.gate import Gate
from client.policy import Policy
from common.accounting import calibrate, epsilon_of, event_from_json
from common.errors import BudgetSpent, Refusal, StoreError
from common.keys import SigningKey
from common.ledger import Ledger, verify

ROUNDS = 3
NOISE = calibrate(epsilon=4.0, delta=1e-5, rounds=ROUNDS, sampling_rate=0.5)
UPDATE = np.full((1, 6), 0.1, np.float32)


@pytest.fixture
def key():
    return SigningKey.generate()


@pytest.fixture
def ledger(tmp_path, key):
    with Ledger.create(tmp_path / "ledger.jsonl", key, {"role": "device", "subject": "ab" * 16}) as ledger:
        yield ledger


@pytest.fixture
def spec(release_spec):
    def spec(**changes):
        asked = {"rounds": ROUNDS, "noise_multiplier": NOISE, "epsilon": "4.0", "population": 40}
        return release_spec(**(asked | changes))

    return spec


def policy(**changes):
    return Policy.model_validate({"trust_coordinator": True, "smallest_cohort": 5, "epsilon": 5.0} | changes)


def release(books, spec, number, update=UPDATE):
    books.check(spec, number)
    return Gate(books.record).release(update, spec, number)


def kinds(ledger):
    return [entry.kind for entry in ledger.entries()]


def test_the_first_release_reserves_the_run_and_every_release_is_a_debit(ledger, spec):
    books = DeviceLedger(ledger, policy())
    released = [release(books, spec(), number) for number in (1, 2)]
    assert kinds(ledger) == ["open", "reserve", "debit", "release", "debit", "release"]
    _, reserve, *rest = ledger.entries()
    assert epsilon_of([event_from_json(reserve.body["event"])], 1e-5) <= 4.0
    for debit, written, sent, number in zip(rest[::2], rest[1::2], released, (1, 2), strict=True):
        assert debit.body["reservation"] == reserve.index
        assert written.body["debit"] == debit.index
        assert (written.body["sha256"], written.body["round"]) == (sent.receipt, number)
    assert verify(ledger.path.read_bytes()).entries


def test_the_same_bytes_again_are_the_same_debit_and_others_another(ledger, spec):
    books = DeviceLedger(ledger, policy())
    for update in (UPDATE, UPDATE):
        release(books, spec(), 1, update)
    assert kinds(ledger).count("debit") == 1
    release(books, spec(), 1, -UPDATE)
    release(books, spec(), 2, UPDATE)
    assert kinds(ledger).count("debit") == 3


def test_a_run_gets_no_release_beyond_what_it_reserved(ledger, spec):
    books = DeviceLedger(ledger, policy())
    for number in range(1, ROUNDS + 1):
        release(books, spec(), number)
    with pytest.raises(BudgetSpent):
        books.check(spec(), ROUNDS + 1)
    with pytest.raises(BudgetSpent):
        Gate(books.record).release(UPDATE, spec(), ROUNDS + 1)
    release(books, spec(), ROUNDS)  # what was released may be fetched again
    assert kinds(ledger).count("debit") == ROUNDS


def test_another_run_of_the_same_subject_adds_to_the_price(ledger, spec):
    books = DeviceLedger(ledger, policy(epsilon=5.0))
    release(books, spec(), 1)
    other = spec(run="00" * 16)
    with pytest.raises(BudgetSpent):
        books.check(other, 1)
    with pytest.raises(BudgetSpent):
        Gate(books.record).release(UPDATE, other, 1)
    assert kinds(ledger) == ["open", "reserve", "debit", "release"]
    generous = DeviceLedger(ledger, policy(epsilon=8.0))
    release(generous, other, 1)
    assert kinds(ledger).count("reserve") == 2


def test_two_runs_that_each_fit_do_not_both_fit_because_both_asked_first(ledger, spec):
    books = DeviceLedger(ledger, policy(epsilon=5.0))
    first, second = spec(), spec(run="00" * 16)
    books.check(first, 1)
    books.check(second, 1)
    Gate(books.record).release(UPDATE, first, 1)
    with pytest.raises(BudgetSpent):
        Gate(books.record).release(UPDATE, second, 1)


def test_a_server_that_understates_the_price_is_not_believed(ledger, spec):
    books = DeviceLedger(ledger, policy(smallest_noise_multiplier=0.0))
    for lie in ({"noise_multiplier": 0.5}, {"rounds": 300}, {"noise_multiplier": 0.0}):
        with pytest.raises(BudgetSpent):
            books.check(spec(**lie), 1)
    assert kinds(ledger) == ["open"]


def test_noise_on_the_device_is_priced_under_replacement(ledger, spec):
    books = DeviceLedger(ledger, policy(trust_coordinator=False))
    local = spec(noise="local")
    with pytest.raises(BudgetSpent):  # no amplification, and twice the sensitivity
        books.check(local, 1)
    enough = calibrate(epsilon=4.0, delta=1e-5, rounds=ROUNDS, adjacency="replace-one")
    books.check(spec(noise="local", noise_multiplier=enough), 1)


def test_prices_under_different_adjacencies_are_added_up(ledger, spec):
    books = DeviceLedger(ledger, policy(epsilon=6.0))
    release(books, spec(), 1)
    enough = calibrate(epsilon=4.0, delta=1e-5, rounds=ROUNDS, adjacency="replace-one")
    with pytest.raises(BudgetSpent):
        books.check(spec(noise="local", noise_multiplier=enough, run="00" * 16), 1)


@pytest.mark.parametrize(
    ("change", "grant", "code"),
    [
        ({}, {"trust_coordinator": False}, "policy-trust"),
        ({"clip": 1.5}, {}, "policy-clip"),
        ({"epsilon": "5.5"}, {}, "policy-epsilon"),
        ({"epsilon": "inf", "noise_multiplier": 0.0}, {}, "policy-noise"),
        ({"sampling_rate": 0.1}, {}, "policy-cohort"),
        ({"delta": 1e-3}, {}, "policy-delta"),
        ({"rounds": 2000}, {}, "policy-rounds"),
    ],
)
def test_what_the_owner_does_not_grant_is_refused_with_the_policys_code(ledger, spec, change, grant, code):
    with pytest.raises(Refusal) as refused:
        DeviceLedger(ledger, policy(**grant)).check(spec(**change), 1)
    assert refused.value.code == code
    assert kinds(ledger) == ["open"]


def test_what_is_spent_outlives_the_process(ledger, spec, tmp_path, key):
    release(DeviceLedger(ledger, policy()), spec(), 1)
    ledger.close()
    with Ledger.open(tmp_path / "ledger.jsonl", key) as again:
        books = DeviceLedger(again, policy())
        release(books, spec(), 1)
        with pytest.raises(BudgetSpent):
            books.check(spec(run="00" * 16), 1)
        assert kinds(again).count("debit") == 1


def test_without_a_limit_everything_is_still_written_down(ledger, spec):
    books = DeviceLedger(ledger, policy(epsilon=math.inf, smallest_noise_multiplier=0.0))
    release(books, spec(noise_multiplier=0.0, epsilon="inf"), 1)
    assert kinds(ledger) == ["open", "reserve", "debit", "release"]


def test_a_ledger_that_cannot_be_written_lets_nothing_leave(ledger, spec):
    books = DeviceLedger(ledger, policy())
    books.check(spec(), 1)
    ledger.path.unlink()
    with pytest.raises(StoreError):
        Gate(books.record).release(UPDATE, spec(), 1)
