"""Three columns, one table: how each mode is priced, and what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.accounting import epsilon_of
from common.errors import ClaimRefused
from common.privacy import Adjacency, Unit
from common.promise import promise_of
from common.wire import ReleaseSpec

SPEC = ReleaseSpec(
    run="0" * 32,
    method="dual",
    names=("a",),
    shapes=((10,),),
    dtype="float32",
    unit="user",
    noise="central",
    clip=1.0,
    noise_multiplier=1.0,
    sampling_rate=0.05,
    rounds=20,
    epsilon="8.0",
    delta=1e-5,
    population=1000,
    recipe={"local_steps": 3, "local_batch": 8, "example_records": 200, "learning_rate": 0.1, "optimizer": "sgd"},
    model="0" * 64,
    source="0" * 64,
)
LOCAL = replace(SPEC, noise="local")
SILO = replace(SPEC, unit="example")


def test_central_noise_hides_a_user_who_contributes_zeros_and_is_amplified():
    promise = promise_of(SPEC)
    assert (promise.unit, promise.adjacency, promise.rate) == (Unit.USER, Adjacency.ZERO_OUT, 0.05)
    assert promise.noise_scale(2.0, 3.0) == 6.0


def test_local_noise_hides_one_user_behind_any_other_and_claims_no_amplification():
    promise = promise_of(LOCAL)
    assert (promise.adjacency, promise.rate) == (Adjacency.REPLACE_ONE, 1.0)
    assert promise.noise_scale(2.0, 3.0) == 12.0  # sensitivity 2C


def test_a_silo_hides_a_record_and_charges_every_step():
    promise = promise_of(SILO)
    assert (promise.unit, promise.adjacency, promise.rate, promise.steps) == (
        Unit.EXAMPLE,
        Adjacency.ADD_REMOVE,
        0.04,
        3,
    )


@pytest.mark.parametrize("spec", [SPEC, LOCAL, SILO])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_schedule_of_the_calibrated_noise_costs_at_most_what_was_asked(spec, epsilon):
    promise = promise_of(spec)
    multiplier = promise.calibrate(epsilon, 1e-5, 20)
    assert 0.98 * epsilon < epsilon_of([promise.schedule(multiplier, 20)], 1e-5) <= epsilon
    rounds = [promise.event(multiplier)] * 20
    assert epsilon_of(rounds, 1e-5) == pytest.approx(epsilon_of([promise.schedule(multiplier, 20)], 1e-5), rel=1e-3)


def test_a_delta_above_the_rule_is_refused():
    with pytest.raises(ClaimRefused, match="delta"):
        promise_of(SPEC).calibrate(8.0, 1e-3, 20)


def test_the_statement_of_central_noise_says_who_sees_updates_without_it():
    sentence = promise_of(SPEC).statement(SPEC, 20).sentence()
    assert "against the coordinator epsilon is infinite" in sentence
    for spec in (LOCAL, SILO):
        assert "nobody sees an update without noise" in promise_of(spec).statement(spec, 20).sentence()


def test_nothing_debited_is_nothing_spent():
    statement = promise_of(SPEC).statement(SPEC, 0)
    assert statement.epsilon == 0
    assert "nothing is shared" in statement.mechanism


def test_rehearsals_and_extrapolations_claim_nothing():
    promise = promise_of(SPEC)
    assert not promise.statement(SPEC, 5, rehearsal=True).is_claimed
    assert not promise.statement(SPEC, 5, as_if_population=10**6).is_claimed
    assert promise.statement(SPEC, 5).is_claimed
