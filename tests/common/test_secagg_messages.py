"""Tests of the terms of a round, of the owner's policy, and of how messages are read."""

import contextlib
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Refusal
from common.secagg_messages import AggregationPolicy, Leg, MessageReader, Terms, digest, write_message


def test_terms_are_read_as_they_were_written(terms_with):
    terms = terms_with(threshold=Fraction(7, 10), corrupt=Fraction(1, 3))
    assert Terms.from_bytes(terms.to_bytes()) == terms


def test_every_fact_of_a_round_changes_its_digest(terms_with):
    changes = {"run": "ac", "round": 2, "spec": "1" * 64, "dim": 65, "bits": 17, "smallest_cohort": 4}
    changes |= {"largest_cohort": 199, "threshold": Fraction(3, 4), "corrupt": Fraction(0)}
    digests = {terms_with(**{name: value}).digest for name, value in changes.items()} | {terms_with().digest}
    assert len(digests) == len(changes) + 1


@pytest.mark.parametrize(
    "change",
    [
        {"run": "../x"},
        {"run": ""},
        {"spec": "0" * 63},
        {"round": 0},
        {"round": True},
        {"dim": 0},
        {"dim": 2**29},
        {"bits": 33},
        {"smallest_cohort": 2},
        {"smallest_cohort": 300},
        {"largest_cohort": 2001},
        {"threshold": Fraction(1, 2)},
        {"threshold": Fraction(4, 3)},
        {"corrupt": Fraction(1, 3)},
        {"corrupt": Fraction(-1, 3)},
    ],
)
def test_terms_that_no_round_can_have_are_neither_made_nor_read(terms_with, change):
    with pytest.raises(ValueError, match=r"."):
        terms_with(**change)
    text = terms_with().to_bytes().decode()
    for name, value in change.items():
        old = {
            "run": '"ab"',
            "spec": f'"{"0" * 64}"',
            "threshold": "[2,3]",
            "corrupt": "[1,10]",
            "largest_cohort": "200",
        }
        was = old.get(name, {"round": "1", "dim": "64", "bits": "16", "smallest_cohort": "3"}.get(name))
        new = f"[{value.numerator},{value.denominator}]" if isinstance(value, Fraction) else str(value).lower()
        text = text.replace(f'"{name}":{was}', f'"{name}":"{new}"' if isinstance(value, str) else f'"{name}":{new}')
    assert text != terms_with().to_bytes().decode()
    with pytest.raises(Refusal) as refusal:
        Terms.from_bytes(text.encode())
    assert refusal.value.code == "bad-message"


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_damaged_terms_are_refused_and_raise_nothing_else(terms_with, data):
    text = bytearray(terms_with().to_bytes())
    place = data.draw(st.integers(0, len(text) - 1))
    text[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(Refusal):
        assert Terms.from_bytes(bytes(text)).digest != terms_with().digest


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{}", b'{"format":1}', b'{"format":2}', b"\xff", b"1"])
def test_what_are_no_terms_is_refused(text):
    with pytest.raises(Refusal):
        Terms.from_bytes(text)


def test_the_noise_is_sized_for_the_worst_cohort_size_that_is_allowed(terms_with):
    # 20 devices: 14 needed, 2 collude. 21: 14 needed, 2 collude. 129: a graph with gaps.
    assert terms_with(smallest_cohort=20, largest_cohort=128).fewest_honest == 12
    assert terms_with(smallest_cohort=21, largest_cohort=21).fewest_honest == 12
    assert terms_with(smallest_cohort=150, largest_cohort=150).fewest_honest == 100 - 15 - 3


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"smallest_cohort": 21}, "small-cohort"),
        ({"smallest_cohort": 20, "threshold": Fraction(7, 10)}, "low-threshold"),
        ({"smallest_cohort": 20, "corrupt": Fraction(1, 5)}, "few-honest"),
    ],
)
def test_terms_below_the_owners_policy_are_refused(terms_with, policy, code):
    terms = terms_with(smallest_cohort=20)
    AggregationPolicy(smallest_cohort=20, corrupt=Fraction(1, 10)).check(terms)
    with pytest.raises(Refusal) as refusal:
        AggregationPolicy(**policy).check(terms)
    assert refusal.value.code == code


def test_parts_of_a_digest_do_not_run_into_each_other():
    assert digest("a", b"b", b"c") != digest("a", b"bc") != digest("ab", b"c")
    assert digest("a", b"") != digest("a")


def test_a_message_is_read_part_by_part_to_its_last_byte(terms_with):
    terms = terms_with()
    message = write_message(Leg.SURVIVORS, terms, [1, 4, 9], [], b"x" * 6)
    reader = MessageReader(message, Leg.SURVIVORS, terms)
    assert reader.indices(9) == (1, 4, 9)
    assert reader.indices(9) == ()
    assert reader.records(3, 2) == [b"xxx", b"xxx"]
    reader.finish()


def code_of(read) -> str:
    with pytest.raises(Refusal) as refusal:
        read()
    return refusal.value.code


def test_a_message_of_another_leg_round_or_form_is_refused(terms_with):
    terms = terms_with()
    message = write_message(Leg.SURVIVORS, terms, [1])
    assert code_of(lambda: MessageReader(message, Leg.CONSENTS, terms)) == "out-of-order"
    assert code_of(lambda: MessageReader(message, Leg.SURVIVORS, terms_with(round=2))) == "wrong-round"
    assert code_of(lambda: MessageReader(message, Leg.SURVIVORS, terms_with(run="ac"))) == "wrong-round"
    assert code_of(lambda: MessageReader(b"x" + message, Leg.SURVIVORS, terms)) == "bad-message"
    assert code_of(lambda: MessageReader(message[:30], Leg.SURVIVORS, terms)) == "bad-message"
    assert code_of(lambda: MessageReader(message, Leg.SURVIVORS, terms).finish()) == "bad-message"
    assert code_of(lambda: MessageReader(message[:-1], Leg.SURVIVORS, terms).indices(3)) == "bad-message"
    assert code_of(lambda: MessageReader(message, Leg.SURVIVORS, terms).records(3)) == "bad-message"


@pytest.mark.parametrize("listed", [[0], [2, 1], [1, 1], [1, 10]])
def test_a_list_that_is_not_in_order_repeats_or_goes_too_far_is_refused(terms_with, listed):
    message = write_message(Leg.SURVIVORS, terms_with(), listed)
    assert code_of(lambda: MessageReader(message, Leg.SURVIVORS, terms_with()).indices(9)) == "bad-lists"
    rows = write_message(Leg.CONSENTS, terms_with(), b"".join(at.to_bytes(2, "little") + b"y" for at in listed))
    assert code_of(lambda: MessageReader(rows, Leg.CONSENTS, terms_with()).indexed(1, 9)) == "bad-lists"
