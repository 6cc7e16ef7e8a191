"""Tests of statements and of the claims that are refused."""

import json
import math

import pytest

from common.accounting import (
    Gaussian,
    PoissonGaussian,
    Repeated,
    Statement,
    check_claim,
    default_delta,
    make_statement,
)
from common.errors import ClaimRefused, VerificationError
from common.privacy import Adjacency, Unit


def sampled(rate: float, multiplier: float, count: int) -> Repeated:
    return Repeated(PoissonGaussian(rate, multiplier), count)


def statement(**changes) -> Statement:
    facts = {
        "delta": 1e-5,
        "unit": Unit.USER,
        "adjacency": Adjacency.ZERO_OUT,
        "mechanism": "L2 clip of the whole update, Gaussian noise on the sum",
        "sampling": "Poisson cohorts at rate 0.01, secret",
        "trust": "the coordinator sees each clipped update without noise: against it epsilon is infinite",
        "population": 4000,
    }
    return make_statement(sampled(0.01, 1.0, 1000), **{**facts, **changes})


def test_a_sentence_holds_everything_a_claim_needs():
    said = statement().sentence()
    for part in (
        "epsilon 1.83 at delta 1e-05",
        "one user",
        "zero-out",
        "Gaussian noise on the sum",
        "Poisson",
        "coordinator",
        "pld (dp-accounting 0.6",
        "Second opinion: epsilon 2.11 by rdp",
        "Does not cover: the private adapter",
        "Mironov 2012",
    ):
        assert part in said
    assert str(statement()) == f"{statement()}" == said


def test_a_statement_cannot_become_a_bare_number():
    made = statement()
    with pytest.raises(TypeError):
        float(made)
    with pytest.raises(TypeError, match="not a number"):
        f"{made:.2f}"
    with pytest.raises(TypeError):
        made + 1


def test_a_rehearsal_an_extrapolation_and_a_run_without_noise_claim_nothing():
    rehearsed = statement(rehearsal=True)
    assert rehearsed.sentence() == "calibrated to epsilon 1.83; rehearsal, not claimed"
    assert not rehearsed.is_claimed
    assert "not claimed" in statement(extrapolated_population=10**6).sentence()
    bare = make_statement(
        Gaussian(0.0),
        delta=1e-5,
        unit=Unit.USER,
        adjacency=Adjacency.ZERO_OUT,
        mechanism="none",
        sampling="none",
        trust="everyone",
        population=10,
    )
    assert bare.sentence().startswith("no privacy claim")
    assert not bare.is_claimed
    assert json.loads(json.dumps(bare.to_json(), allow_nan=False))["epsilon"] == "inf"
    assert statement().is_claimed


def test_a_rounded_epsilon_is_never_below_the_real_one():
    facts = statement().to_json()
    for epsilon, shown in [(1.8201, "1.83"), (8.0, "8.00"), (0.012301, "0.0124"), (0.0, "0"), (2.0000001, "2.01")]:
        assert f"epsilon {shown} at" in Statement.from_json({**facts, "epsilon": epsilon}).sentence()


def test_an_example_level_statement_reads_out_the_user_level_too():
    made = statement(unit=Unit.EXAMPLE, adjacency=Adjacency.ADD_REMOVE, records_per_user=10)
    assert "For a user with 10 records: epsilon 27.9" in made.sentence()
    assert "one record" in made.sentence()


def test_a_statement_survives_json_and_a_changed_one_is_refused():
    made = statement(unit=Unit.EXAMPLE, adjacency=Adjacency.ADD_REMOVE, records_per_user=2)
    written = json.loads(json.dumps(made.to_json()))
    assert Statement.from_json(written) == made
    for name, value in [
        ("epsilon", "low"),
        ("epsilon", -1.0),
        ("epsilon", True),
        ("delta", 2.0),
        ("unit", "tweet"),
        ("adjacency", 3),
        ("covered", "all"),
        ("covered", []),
        ("population", 1.5),
        ("rehearsal", "no"),
        ("second_opinion", [1, 2]),
        ("mechanism", ""),
        ("extra", 1),
    ]:
        with pytest.raises(VerificationError):
            Statement.from_json({**written, name: value})
    del written["trust"]
    with pytest.raises(VerificationError):
        Statement.from_json(written)


def test_delta_is_far_below_one_over_the_population():
    assert default_delta(1) == default_delta(10_000) == 1e-5
    assert default_delta(1_000_000) == pytest.approx(1e-7)
    for population in (0, -1, True, 1.5):
        with pytest.raises(ValueError, match="population"):
            default_delta(population)


CROWD = {
    "unit": Unit.USER,
    "noise": "central",
    "adjacency": Adjacency.ZERO_OUT,
    "sampling": "poisson",
    "sampling_rate": 0.05,
    "delta": 1e-5,
    "population": 4000,
}
SILO = {**CROWD, "unit": Unit.EXAMPLE, "noise": "local", "adjacency": Adjacency.ADD_REMOVE}
LOCAL = {**CROWD, "noise": "local", "adjacency": Adjacency.REPLACE_ONE, "sampling_rate": 1.0, "sampling": "none"}


@pytest.mark.parametrize("facts", [CROWD, SILO, LOCAL])
def test_the_three_modes_may_make_their_claim(facts):
    check_claim(**facts)


@pytest.mark.parametrize(
    ("facts", "change", "reason"),
    [
        (SILO, {"private_state_in_shared_forward": True, "private_state_training": "raw"}, "forward pass"),
        (CROWD, {"sampling": "fixed"}, "not Poisson"),
        (SILO, {"sampling": "shuffled"}, "not Poisson"),
        (CROWD, {"participation_secret": False}, "secret"),
        (CROWD, {"clip_scope": "per-tensor"}, "one norm"),
        (CROWD, {"weights": "examples"}, "uniformly"),
        (SILO, {"loss": "batch-mean"}, "per example"),
        (CROWD, {"metrics": "raw"}, "metrics"),
        (CROWD, {"delta": 1e-4}, "above the rule"),
        (CROWD, {"population": 1_000_000}, "above the rule"),
        (CROWD, {"delta": math.nan}, "above the rule"),
        (CROWD, {"events_per_cohort": 2}, "one event"),
        (SILO, {"public_rate": False}, "sampling rate"),
        (SILO, {"public_steps": False}, "number of steps"),
        (CROWD, {"public_divisor": False}, "who answered"),
        (LOCAL, {"sampling": "poisson", "sampling_rate": 0.1}, "no amplification"),
        (LOCAL, {"adjacency": Adjacency.ZERO_OUT}, "replace-one"),
    ],
)
def test_a_configuration_whose_epsilon_would_be_false_is_refused_with_the_reason(facts, change, reason):
    with pytest.raises(ClaimRefused, match=reason) as caught:
        check_claim(**{**facts, **change})
    assert caught.value.code == "claim-refused"
    assert caught.value.exit_code == 3


def test_what_the_clip_covers_is_not_refused():
    check_claim(**CROWD, private_state_in_shared_forward=True, private_state_training="raw")
    check_claim(**SILO, private_state_in_shared_forward=True, private_state_training="dp")
    check_claim(**{**CROWD, "sampling": "fixed", "sampling_rate": 1.0}, participation_secret=False)
    check_claim(**CROWD, loss="batch-mean", metrics="charged")


def test_every_reason_is_given_at_once():
    with pytest.raises(ClaimRefused) as caught:
        check_claim(**CROWD, weights="examples", metrics="raw", clip_scope="per-tensor")
    assert str(caught.value).count(";") >= 3
