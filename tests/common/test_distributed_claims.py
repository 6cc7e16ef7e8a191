"""Tests of what is said about distributed noise, to whom, and of what is refused."""

import math
from dataclasses import replace

import pytest

from common.accounting import Gaussian, PoissonGaussian, Repeated, epsilon_of
from common.distributed_claims import coordinator_event, distributed_claims
from common.errors import Refusal
from common.secure_sum import SecureSum, called_off, with_secure_sums

DELTA = 1e-5


@pytest.fixture(scope="module")
def spec(release_spec):
    """Cohorts of 80 of 10,000 users."""
    plain = release_spec(
        noise="distributed", sampling_rate=0.008, population=10_000, rounds=30, shapes=((10, 40), (40, 10))
    )
    return with_secure_sums(plain, epsilon=2.0, coordinator_epsilon=4.0, participation_cap=4)


@pytest.fixture(scope="module")
def claims(spec):
    return distributed_claims(spec, 30)


def test_outsiders_and_the_coordinator_are_told_different_numbers(spec, claims):
    sums = SecureSum.of(spec)
    known = epsilon_of(Repeated(Gaussian(sums.noise_multiplier), 4), DELTA)
    assert claims.coordinator.epsilon == pytest.approx(known, rel=1e-6)
    assert 3.9 < claims.coordinator.epsilon <= 4.0
    revealed = called_off(0.008, 10_000, 30, sums.smallest_cohort, sums.largest_cohort)
    assert 0 < revealed <= 0.02 * DELTA
    amplified = epsilon_of(Repeated(PoissonGaussian(0.008, spec.noise_multiplier), 30), DELTA - revealed)
    assert claims.outsiders.epsilon == pytest.approx(amplified, rel=1e-6)
    assert claims.outsiders.epsilon < claims.coordinator.epsilon / 5


def test_each_statement_says_whom_it_is_about(spec, claims):
    outsiders, coordinator = claims.outsiders.sentence(), claims.coordinator.sentence()
    assert "with probability 0.008 (Poisson)" in outsiders
    assert "against them, with up to" in outsiders
    assert "epsilon 4.00 at the same delta" in outsiders  # the other number stands in the same sentence
    assert "no amplification; no user takes part in more than 4 of 30 rounds" in coordinator
    assert f"with up to {SecureSum.of(spec).colluding()} devices of a round" in coordinator
    for text in (outsiders, coordinator):
        assert "zero-out" in text
        assert "a share of discrete Gaussian noise" in text
        assert f"delta {DELTA:.3g}" in text
        assert "sampler of the discrete noise compares floating-point numbers" in text
        assert "enrols devices of its own" in text


def test_fewer_rounds_cost_less_and_the_cap_binds_the_coordinator(spec, claims):
    early = distributed_claims(spec, 2)
    assert early.outsiders.epsilon < claims.outsiders.epsilon
    known = epsilon_of(Repeated(Gaussian(SecureSum.of(spec).noise_multiplier), 2), DELTA)
    assert early.coordinator.epsilon == pytest.approx(known, rel=1e-6)
    assert distributed_claims(spec, 4).coordinator.epsilon == pytest.approx(claims.coordinator.epsilon)


def test_what_collusion_leaves_is_computed_down_to_a_device_alone(spec, claims):
    sums = SecureSum.of(spec)
    honest = [count for count, _ in claims.collusion]
    # Of 117 devices 78 are needed; with 38 colluding, 40 are left.
    assert honest[-1] == 1
    assert honest[0] == sums.largest_cohort - math.ceil(2 * sums.largest_cohort / 3) + 1
    epsilons = [claims.coordinator.epsilon, *(statement.epsilon for _, statement in claims.collusion)]
    assert epsilons == sorted(epsilons)
    share = min(sums.noise(spec, size).share_scale for size in range(sums.smallest_cohort, sums.largest_cohort + 1))
    alone = math.sqrt(share**2 - 4) / sums.noise(spec, sums.smallest_cohort).sensitivity
    assert epsilons[-1] == pytest.approx(epsilon_of(Repeated(Gaussian(alone), 4), DELTA), rel=1e-6)
    assert all("all others collude" in statement.sentence() for _, statement in claims.collusion)


def test_the_event_against_the_coordinator_is_one_release_for_every_round_that_a_user_takes_part_in(spec):
    multiplier = SecureSum.of(spec).noise_multiplier
    assert coordinator_event(spec) == Repeated(Gaussian(multiplier), 4)
    assert coordinator_event(spec, 1) == Repeated(Gaussian(multiplier), 1)


def test_what_a_run_publishes_beside_the_outsiders_number_names_the_coordinator_and_collusion(claims):
    said = claims.to_json()
    assert said["coordinator"]["epsilon"] == claims.coordinator.epsilon
    assert said["coordinator"]["sentence"] == claims.coordinator.sentence()
    assert [honest for honest, _ in said["collusion"]] == [honest for honest, _ in claims.collusion]


def test_without_noise_nothing_is_claimed_of_anybody(spec):
    claims = distributed_claims(
        with_secure_sums(spec, epsilon=math.inf, coordinator_epsilon=None, participation_cap=4), 30
    )
    statements = [claims.outsiders, claims.coordinator, *(statement for _, statement in claims.collusion)]
    assert all(statement.sentence().startswith("no privacy claim") for statement in statements)


def test_a_rehearsal_claims_nothing(spec):
    claims = distributed_claims(spec, 30, rehearsal=True)
    assert "rehearsal, not claimed" in claims.outsiders.sentence()
    assert "rehearsal, not claimed" in claims.coordinator.sentence()


def test_a_spec_without_secure_sums_has_no_such_claims(spec):
    with pytest.raises(Refusal):
        distributed_claims(replace(spec, secure_sum=None), 30)
