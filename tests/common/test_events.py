"""Tests of the closed list of events and its JSON form."""

import json
import math

import pytest
import rfc8785
from hypothesis import given, settings
from hypothesis import strategies as st

from common.accounting import (
    Composed,
    DiscreteGaussian,
    Gaussian,
    PoissonComposed,
    PoissonGaussian,
    Repeated,
    event_from_json,
)
from common.errors import VerificationError

MULTIPLIERS = st.just(0.0) | st.floats(1e-3, 1e3)
RATES = st.floats(1e-6, 1.0)
EVENTS = st.recursive(
    st.builds(Gaussian, MULTIPLIERS)
    | st.builds(PoissonGaussian, RATES, MULTIPLIERS)
    | st.builds(PoissonComposed, RATES, st.lists(st.builds(Gaussian, MULTIPLIERS), min_size=1, max_size=3).map(tuple))
    | st.builds(DiscreteGaussian, st.floats(0.1, 1e3), st.integers(1, 100)),
    lambda inner: (
        st.builds(Repeated, inner, st.integers(1, 10**6))
        | st.builds(Composed, st.lists(inner, min_size=1, max_size=3).map(tuple))
    ),
    max_leaves=4,
)


@given(EVENTS)
@settings(max_examples=150, deadline=None)
def test_every_event_survives_canonical_json(event):
    written = rfc8785.dumps(event.to_json())
    assert event_from_json(json.loads(written)) == event


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "gaussian",
        {},
        {"kind": "gaussian"},
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"kind": ["gaussian"], "noise_multiplier": 1.0},
        {"kind": "dp_accounting.GaussianDpEvent", "noise_multiplier": 1.0},
        {"kind": "gaussian", "noise_multiplier": 1.0, "note": "x"},
        {"kind": "gaussian", "noise_multiplier": "1.0"},
        {"kind": "gaussian", "noise_multiplier": True},
        {"kind": "gaussian", "noise_multiplier": None},
        {"kind": "gaussian", "noise_multiplier": -1.0},
        {"kind": "gaussian", "noise_multiplier": math.nan},
        {"kind": "gaussian", "noise_multiplier": math.inf},
        {"kind": "gaussian", "noise_multiplier": 10**400},
        {"kind": "poisson-gaussian", "sampling_rate": 0.0, "noise_multiplier": 1.0},
        {"kind": "poisson-gaussian", "sampling_rate": 1.1, "noise_multiplier": 1.0},
        {"kind": "poisson-gaussian", "sampling_rate": math.nan, "noise_multiplier": 1.0},
        {"kind": "poisson-composed", "sampling_rate": 0.1, "parts": []},
        {"kind": "poisson-composed", "sampling_rate": 0.1, "parts": "gaussian"},
        {
            "kind": "poisson-composed",
            "sampling_rate": 0.1,
            "parts": [{"kind": "poisson-gaussian", "sampling_rate": 0.1, "noise_multiplier": 1.0}],
        },
        {"kind": "discrete-gaussian", "scale": 1.0, "sensitivity": 1.0},
        {"kind": "discrete-gaussian", "scale": 1.0, "sensitivity": 0},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": 0},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": -3},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": True},
        {"kind": "repeated", "event": {"kind": "gaussian", "noise_multiplier": 1.0}, "count": 1.5},
        {"kind": "repeated", "event": 3, "count": 1},
        {"kind": "composed", "events": []},
        {"kind": "composed", "events": {"kind": "gaussian"}},
    ],
)
def test_an_event_that_is_not_on_the_list_or_not_possible_is_evidence_that_fails(value):
    with pytest.raises(VerificationError):
        event_from_json(value)


def test_deep_nesting_is_refused_and_not_followed():
    value = {"kind": "gaussian", "noise_multiplier": 1.0}
    for _ in range(2000):
        value = {"kind": "repeated", "event": value, "count": 2}
    with pytest.raises(VerificationError, match="deeply"):
        event_from_json(value)


@pytest.mark.parametrize(
    "make", [lambda: Gaussian(-1), lambda: PoissonGaussian(0.0, 1), lambda: Repeated(Gaussian(1), 0)]
)
def test_an_impossible_event_cannot_be_made(make):
    with pytest.raises(ValueError, match="is"):
        make()
