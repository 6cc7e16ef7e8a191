"""Tests of the letters of a secure sum on the wire, and of the roster file: round trips, and what is refused."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import Refusal
from common.secagg_messages import Leg
from common.sum_wire import SUM_LEGS, SumLetters, read_roster, simulated_identity
from common.wire import refusal_records

NAMES = st.text("abcdef0123456789", min_size=1, max_size=40)


@given(
    letters=st.dictionaries(NAMES, st.binary(max_size=200), max_size=4),
    refused=st.dictionaries(NAMES, st.sampled_from(["too-few", "bad-lists", "closed"]), max_size=3),
    leg=st.sampled_from(SUM_LEGS),
    number=st.integers(1, 2**31 - 1),
)
def test_letters_come_back_as_they_were_written(letters, refused, leg, number):
    written = SumLetters("ab" * 16, number, leg, letters, refused)
    assert SumLetters.from_records(written.to_records()) == written


def changed(**changes):
    records = SumLetters("ab", 1, Leg.SHARES, {"a": b"1"}, {}).to_records()
    for name, value in changes.items():
        records.config_records["sum"][name] = value
    return records


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"run": "x" * 65},
        {"run": 3},
        {"round": 0},
        {"round": 2**31},
        {"round": 1.5},
        {"leg": 12},
        {"leg": 0},
        {"leg": "masked"},
        {"subjects": ["a", "b"]},
        {"subjects": ["a", "a"], "letters": [b"1", b"2"]},
        {"subjects": [""]},
        {"subjects": ["x" * 257]},
        {"letters": ["1"]},
        {"letters": b"1"},
        {"codes": ["too-few"]},
    ],
)
def test_what_are_no_letters_is_one_refusal(change):
    with pytest.raises(Refusal) as refusal:
        SumLetters.from_records(changed(**change))
    assert refusal.value.code in {"bad-message", "format"}


def test_a_code_from_outside_the_closed_list_tells_nothing():
    found = SumLetters.from_records(changed(refusers=["a"], codes=["the diary says ..."]))
    assert found.refused == {"a": "unknown"}
    with pytest.raises(Refusal) as refusal:
        SumLetters.from_records(refusal_records("budget-spent"))
    assert refusal.value.code == "budget-spent"


def test_a_roster_is_a_list_of_keys_and_nothing_else_is_one(tmp_path):
    path = tmp_path / "devices.json"
    key = simulated_identity("run", "1").verify_key.hex
    path.write_text(json.dumps([key]))
    assert read_roster(path) == {key}
    for content in ("", "{}", '["short"]', f'["{key}", 3]', f'"{key}"', "[" * 100_000):
        path.write_text(content)
        with pytest.raises(Refusal) as refusal:
            read_roster(path)
        assert refusal.value.code == "unknown-key"
    with pytest.raises(Refusal):
        read_roster(tmp_path / "absent.json")


def test_simulated_users_have_keys_of_their_own_in_every_run():
    keys = {simulated_identity(run, name).verify_key.hex for run in ("a", "b") for name in ("1", "2")}
    assert len(keys) == 4
    assert simulated_identity("a", "1").verify_key.hex == simulated_identity("a", "1").verify_key.hex
