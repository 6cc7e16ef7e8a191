"""The promise in words: every kind of run, and no way to a number without its meaning."""

import runpy
from pathlib import Path

import pytest

from common.config import RunConfig
from simulations.privacy_words import describe_privacy

STATEMENT = runpy.run_path(str(Path(__file__).with_name("fake_run.py")))["STATEMENT"]


def all_words(words):
    facts = [part for pair in words.facts for part in pair]
    return " ".join(
        [words.status, words.headline, *words.plain, words.sees, *facts, *words.covered, *words.not_covered]
    )


def test_a_claim_carries_unit_adjacency_delta_and_who_sees_what():
    words = describe_privacy(STATEMENT)
    assert (words.status, words.headline) == ("claimed", "Epsilon 8.00 at delta 1e-5, per user")
    assert dict(words.facts)["Unit"] == "one user, with all of that user's records"
    assert dict(words.facts)["Adjacency"].startswith("zero-out:")
    assert dict(words.facts)["Delta"] == "1e-5, 1 in 100,000"
    assert dict(words.facts)["Second opinion"] == "epsilon 8.02 by prv (prv-accountant 0.2.0)"
    assert "against the coordinator epsilon is infinite" in words.sees
    assert "if the coordinator adds the noise" in words.plain[-1]
    # e^7.9931 = 2960.4; 0.2364 of 1,000 people, never rounded down
    assert "2,961 times" in words.plain[0]
    assert "at most 237." in words.plain[1]
    assert words.covered == tuple(STATEMENT["covered"])
    assert set(STATEMENT["not_covered"]) < set(words.not_covered)


def test_the_scores_on_the_page_are_named_as_not_covered():
    for statement in (STATEMENT, STATEMENT | {"epsilon": "inf"}, None):
        assert any("scores on this page" in item for item in describe_privacy(statement).not_covered)


@pytest.mark.parametrize("epsilon", ["inf", float("inf"), None])
def test_a_run_without_noise_makes_no_claim(epsilon):
    words = describe_privacy(STATEMENT | {"epsilon": epsilon})
    assert words.status == "no privacy claim"
    assert words.covered == words.assumptions == ()
    assert "Delta" not in dict(words.facts)
    assert "everyone who gets the shared adapter" in words.sees


def test_a_rehearsal_is_calibrated_and_not_claimed():
    words = describe_privacy(STATEMENT | {"rehearsal": True})
    assert words.status == "not claimed"
    assert words.headline == "Calibrated to epsilon 8.00; rehearsal, not claimed"


def test_an_extrapolated_run_is_not_claimed():
    words = describe_privacy(STATEMENT | {"extrapolated_population": 1_000_000})
    assert (words.status, words.headline) == ("not claimed", "Extrapolated to 1,000,000 users, not claimed")


def test_noise_on_the_device_needs_nobody_to_be_trusted():
    words = describe_privacy(STATEMENT | {"trust": "local", "adjacency": "replace-one"})
    assert words.sees.startswith("Nobody: each device adds its own noise")
    assert not any("coordinator adds" in sentence for sentence in words.plain)


def test_a_local_run_shares_nothing_whatever_its_statement_says():
    words = describe_privacy(STATEMENT, RunConfig(method="local"))
    assert words.status == "nothing shared"
    assert "epsilon" not in all_words(words).lower()


def test_a_run_without_a_statement_claims_nothing():
    words = describe_privacy(None, RunConfig())
    assert words.status == "unfinished"
    assert "epsilon" not in all_words(words).lower()


def test_a_strong_promise_is_not_rounded_away():
    words = describe_privacy(STATEMENT | {"epsilon": 0.5, "attack_rate": None})
    assert "1.7 times" in words.plain[0]
    assert "epsilon" in describe_privacy(STATEMENT | {"epsilon": 300.0}).plain[0]
    assert "e^300" in describe_privacy(STATEMENT | {"epsilon": 300.0}).plain[0]


def test_a_statement_as_the_accounting_writes_it_can_be_put_into_words():
    claims = pytest.importorskip("common.claims")
    fields = STATEMENT | {"epsilon": 3.0}
    statement = claims.Statement.from_json(fields)
    assert describe_privacy(statement.to_json()).headline == "Epsilon 3.00 at delta 1e-5, per user"


def test_an_epsilon_that_protects_nobody_is_put_into_words_too():
    assert "e^5,125 times" in describe_privacy(STATEMENT | {"epsilon": 5124.07}).plain[0]
