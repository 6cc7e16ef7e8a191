"""Numbers as they are printed."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.evaluation import Interval
from simulations.number_words import duration, number, p_value, percent, rounded_up, signed, size

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (number(1234.5678), "1,234.568"),
        (number(-0.25, 1), f"{MINUS}0.2"),
        (number(-0.0001, 2), "0.00"),
        (number(math.nan), DASH),
        (signed(0.1234), "+0.123"),
        (signed(-0.1234), f"{MINUS}0.123"),
        (signed(0.0001), "0.000"),
        (signed(Interval(0.1, -0.05, 0.3)), f"{MINUS}0.050 to +0.300"),
        (signed(Interval(0.1, math.nan, math.nan)), DASH),
        (percent(0.0), "0%"),
        (percent(0.004), "<1%"),
        (percent(0.937), "94%"),
        (percent(0.996), ">99%"),
        (percent(1.0), "100%"),
        (percent(Interval(0.5, 0.41, 0.62)), f"41{DASH}62%"),
        (percent(Interval(0.01, 0.004, 0.03)), f"<1%{DASH}3%"),
        (percent(Interval(1.0, 0.998, 1.0)), f">99%{DASH}100%"),
        (percent(Interval(0.5, 0.5, 0.5)), "50%"),
        (percent(math.nan), DASH),
        (size(999), "999 bytes"),
        (size(16_384), "16.4 kB"),
        (size(999_600), "1.0 MB"),
        (size(2.5e8), "250 MB"),
        (size(3e15), "3,000 TB"),
        (duration(3.14), "3.1 s"),
        (duration(59.7), "1 min 0 s"),
        (duration(82), "1 min 22 s"),
        (duration(3_660), "1 h 1 min"),
        (p_value(1e-4), "<0.001"),
        (p_value(0.04), "0.040"),
        (rounded_up(7.9931), "8.00"),
        (rounded_up(8.0000000000001), "8.00"),
        (rounded_up(8.001), "8.01"),
        (rounded_up(0.0), "0.00"),
        (rounded_up(1e-30), "0.01"),
    ],
)
def test_numbers_read_as_people_write_them(written, expected):
    assert written == expected


@given(st.floats(0, 1e4))
def test_epsilon_is_never_written_smaller_than_it_is(epsilon):
    assert float(rounded_up(epsilon)) >= epsilon * (1 - 1e-9)
    assert float(rounded_up(epsilon)) < epsilon + 0.0100001


@given(st.floats(0, 1))
def test_only_none_and_all_read_as_none_and_all(share):
    assert (percent(share) == "0%") == (share == 0)
    assert (percent(share) == "100%") == (share == 1)
