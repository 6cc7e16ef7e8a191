"""Tests of what is said about distributed noise, to whom, and of what is refused."""

import math
from fractions import Fraction

import pytest
from scipy import stats

from common.accounting import Gaussian, PoissonGaussian, Repeated, epsilon_of
from common.distributed_claims import distributed_claims
from common.distributed_noise import DistributedNoise
from common.errors import ClaimRefused

DELTA = 1e-5


@pytest.fixture(scope="module")
def terms(terms_with):
    return terms_with(smallest_cohort=40, largest_cohort=120)


def noise_for(terms, **changes) -> DistributedNoise:
    facts = {"dim": 1000, "clip_norm": 1.0, "noise_multiplier": 2.0, "fewest_honest": terms.fewest_honest}
    return DistributedNoise(**facts | {"largest_cohort": terms.largest_cohort} | changes)


def claims_for(terms, noise=None, **changes):
    facts = {"rounds": 30, "participation_cap": 4, "sampling_rate": 0.008, "population": 10_000, "delta": DELTA}
    return distributed_claims(noise or noise_for(terms), terms, **facts | changes)


@pytest.fixture(scope="module")
def claims(terms):
    return claims_for(terms)


def test_outsiders_and_the_coordinator_are_told_different_numbers(terms, claims):
    noise = noise_for(terms)
    known = epsilon_of(Repeated(Gaussian(2.0), 4), DELTA)
    assert claims.coordinator.epsilon == pytest.approx(known, rel=1e-6)
    # Outsiders face the noise of everybody in a full cohort but those that collude: 120 - 12.
    multiplier = 2.0 * math.sqrt(108 / terms.fewest_honest)
    assert noise.multiplier_with(108) == pytest.approx(multiplier, rel=1e-4)
    amplified = epsilon_of(Repeated(PoissonGaussian(0.008, noise.multiplier_with(108)), 30), DELTA)
    assert amplified <= claims.outsiders.epsilon <= amplified * 1.05
    assert claims.outsiders.epsilon < claims.coordinator.epsilon / 5


def test_each_statement_says_whom_it_is_about(claims):
    outsiders, coordinator = claims.outsiders.sentence(), claims.coordinator.sentence()
    assert "secret coin of rate 0.008" in outsiders
    assert "for them the coordinator's number holds" in outsiders
    assert "no amplification; no user takes part in more than 4 of 30 rounds" in coordinator
    assert "with up to 12 devices of a round" in coordinator
    for text in (outsiders, coordinator):
        assert "zero-out" in text
        assert "discrete Gaussian share from each device" in text
        assert f"delta {DELTA:.3g}" in text
        assert "sampler of the discrete noise compares floating-point numbers" in text


def test_what_collusion_leaves_is_computed_down_to_a_device_alone(terms, claims):
    noise = noise_for(terms)
    honest = [count for count, _ in claims.collusion]
    # 40 devices: 27 needed, 4 collude; at most 13 may collude before both lists of a device can be signed.
    assert honest == [23, 14, 1]
    epsilons = [statement.epsilon for _, statement in claims.collusion]
    assert epsilons == sorted(epsilons)
    assert epsilons[0] == pytest.approx(claims.coordinator.epsilon)
    alone = math.sqrt(noise.share_scale**2 - 4) / noise.sensitivity
    assert epsilons[-1] == pytest.approx(epsilon_of(Repeated(Gaussian(alone), 4), DELTA), rel=1e-6)
    assert all("all others collude" in statement.sentence() for _, statement in claims.collusion)


def test_noise_that_is_sized_for_more_honest_devices_than_the_terms_leave_is_refused(terms, terms_with):
    sybils = terms_with(smallest_cohort=40, largest_cohort=120, corrupt=Fraction(1, 4))
    with pytest.raises(ClaimRefused, match="sized for 23 honest"):
        claims_for(sybils, noise_for(terms))
    with pytest.raises(ClaimRefused, match="at most 100 devices"):
        claims_for(terms, noise_for(terms, largest_cohort=100))


def test_rounds_that_are_called_off_too_often_are_refused_since_that_tells_who_took_part(terms):
    with pytest.raises(ClaimRefused, match="called-off round tells"):
        claims_for(terms, sampling_rate=0.004)
    with pytest.raises(ClaimRefused, match="called-off round tells"):
        claims_for(terms, sampling_rate=0.012)


def test_what_a_called_off_round_may_tell_is_taken_from_delta(terms):
    rate = 0.0077
    claims = claims_for(terms, sampling_rate=rate)
    edges = stats.binom(9_999, rate)
    spent = 30 * rate * (edges.pmf(39) + edges.pmf(120))
    assert 1e-8 < spent < DELTA / 2
    event = Repeated(PoissonGaussian(rate, noise_for(terms).multiplier_with(108)), 30)
    assert claims.outsiders.epsilon == pytest.approx(epsilon_of(event, DELTA - spent), rel=1e-6)
    assert claims.outsiders.delta == DELTA


def test_without_noise_nothing_is_claimed_of_anybody(terms):
    claims = claims_for(terms, noise_for(terms, noise_multiplier=0.0))
    statements = [claims.outsiders, claims.coordinator, *(statement for _, statement in claims.collusion)]
    assert all(statement.sentence().startswith("no privacy claim") for statement in statements)


def test_a_rehearsal_claims_nothing(terms):
    claims = claims_for(terms, rehearsal=True)
    assert "rehearsal, not claimed" in claims.outsiders.sentence()
    assert "rehearsal, not claimed" in claims.coordinator.sentence()


def test_a_cap_that_is_none_is_the_callers_mistake(terms):
    for cap in (0, 31):
        with pytest.raises(ValueError, match="between one and all rounds"):
            claims_for(terms, participation_cap=cap)
