"""What crosses the network: round trips, and everything that a hostile peer might put there instead."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Refusal
from common.wire import (
    MAX_SPEC_CHARACTERS,
    MAX_USERS_PER_ASSIGNMENT,
    REFUSAL_CODES,
    Assignment,
    Release,
    ReleaseSpec,
    from_raw_bytes,
    raw_bytes,
    receipt_digest,
    refusal_records,
)


@pytest.fixture
def assignment(release_spec):
    return Assignment(release_spec(), 3, ("alpha", "beta"), np.arange(6, dtype=np.float32))


@pytest.fixture
def release(release_spec):
    total = np.linspace(-0.3, 0.3, 6).astype(np.float32)
    return Release(total, 1, receipt_digest(total, release_spec(), 3, 1))


def travelled(records: RecordDict) -> RecordDict:
    """What the other side gets: Flower's own bytes, there and back."""
    from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
    from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

    contents = {name: held.deflate() for name, held in get_all_nested_objects(records).items()}
    return inflate_object_from_contents(records.object_id, contents)


def test_an_assignment_survives_the_journey(assignment):
    read = Assignment.from_records(travelled(assignment.to_records()))
    assert (read.spec, read.round, read.users) == (assignment.spec, assignment.round, assignment.users)
    assert read.spec.digest == assignment.spec.digest
    assert read.vector.dtype == np.float32
    np.testing.assert_array_equal(read.vector, assignment.vector)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_a_release_survives_the_journey_to_the_last_bit(release, dtype):
    sent = replace(release, total=release.total.astype(dtype))
    read = Release.from_records(travelled(sent.to_records()))
    assert (read.users, read.receipt, read.total.dtype) == (sent.users, sent.receipt, sent.total.dtype)
    np.testing.assert_array_equal(read.total, sent.total)


@given(st.binary(max_size=64).filter(lambda data: len(data) % 4 == 0))
def test_raw_bytes_and_numbers_are_the_same_thing(data):
    assert raw_bytes(from_raw_bytes(data, "float32")) == data


def test_numbers_travel_little_endian_whatever_the_machine_writes():
    assert raw_bytes(np.array([1.0], dtype=">f4")) == bytes([0, 0, 128, 63])


def test_what_is_read_can_be_written_to(release):
    assert Release.from_records(release.to_records()).total.flags.writeable


@pytest.mark.parametrize(
    "change",
    [
        {"run": "not hex"},
        {"run": 7},
        {"method": ""},
        {"method": "x" * 300},
        {"method": "line\nbreak"},
        {"names": ("one",)},
        {"shapes": ((1, 4), (2, 0))},
        {"shapes": ((1, 4), (2, -1))},
        {"shapes": ((1, 4), (2, 1.5))},
        {"shapes": ((1, 4), ())},
        {"shapes": ((2**31, 2**31), (1, 1))},
        {"clip": math.nan},
        {"clip": math.inf},
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": "1"},
        {"clip": True},
        {"noise_multiplier": -0.1},
        {"noise_multiplier": math.nan},
        {"sampling_rate": 0.0},
        {"sampling_rate": 1.01},
        {"sampling_rate": math.nan},
        {"rounds": 0},
        {"rounds": 2.5},
        {"rounds": 2**40},
        {"epsilon": "nan"},
        {"epsilon": "-8"},
        {"epsilon": "a lot"},
        {"epsilon": 8.0},
        {"delta": 0.0},
        {"delta": 1.5},
        {"population": -3},
        {"recipe": {"local_steps": math.inf}},
        {"recipe": {"local_steps": [1]}},
        {"recipe": {"": 1}},
        {"recipe": {str(index): 1 for index in range(65)}},
        {"model": "cd"},
        {"source": None},
        {"witnesses": -1},
        {"witnesses": 2**20},
        {"extrapolation": 0.0},
        {"extrapolation": 1.5},
    ],
)
def test_a_spec_with_a_field_of_another_type_or_range_is_not_made_and_not_read(release_spec, change):
    with pytest.raises(ValueError, match="field of the release spec"):
        release_spec(**change)
    text = json.dumps(asdict(release_spec()) | change)
    with pytest.raises(Refusal, match="not one of this format") as refused:
        ReleaseSpec.from_text(text)
    assert refused.value.code == "bad-request"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        "7",
        "{",
        "[" * 100_000,
        '{"names": 1, "shapes": 2}',
        "1" * 5_000,
        " " * MAX_SPEC_CHARACTERS + "1",
    ],
)
def test_text_that_is_no_spec_is_refused(text):
    with pytest.raises(Refusal):
        ReleaseSpec.from_text(text)


def test_an_unknown_field_of_a_spec_is_refused(release_spec):
    with pytest.raises(Refusal):
        ReleaseSpec.from_text(json.dumps(asdict(release_spec()) | {"metrics": True}))


def test_specs_that_differ_in_anything_have_different_digests(release_spec):
    changes = [
        {},
        {"clip": 2.0},
        {"noise": "local"},
        {"rounds": 5},
        {"recipe": {**release_spec().recipe, "local_steps": 2}},
        {"names": ("layer.lora_B.weight", "layer.lora_A.weight")},
        {"witnesses": 1},
        {"epsilon": "8.5"},
    ]
    assert len({release_spec(**change).digest for change in changes}) == len(changes)


def test_a_spec_reads_back_equal_with_the_same_digest(release_spec):
    spec = release_spec()
    assert ReleaseSpec.from_text(spec.to_text()) == spec
    assert ReleaseSpec.from_text(json.dumps(asdict(spec), indent=3)).digest == spec.digest


def request_of(assignment, **changes):
    records = assignment.to_records()
    request = dict(records.config_records["request"]) | changes
    return RecordDict({"request": ConfigRecord(request), "shared": records.array_records["shared"]})


@pytest.mark.parametrize(
    "changes",
    [
        {"users": []},
        {"users": "alpha"},
        {"users": [7]},
        {"users": ["x" * 300]},
        {"users": ["a"] * (MAX_USERS_PER_ASSIGNMENT + 1)},
        {"round": 0},
        {"round": -1},
        {"round": True},
        {"round": 1.5},
        {"round": "1"},
        {"round": 2**40},
        {"spec": 7},
        {"spec": "{}"},
        {"spec": ["{}"]},
    ],
)
def test_a_hostile_request_is_refused(assignment, changes):
    with pytest.raises(Refusal) as refused:
        Assignment.from_records(request_of(assignment, **changes))
    assert refused.value.code == "bad-request"


def test_another_wire_format_is_refused_by_that_name(assignment):
    with pytest.raises(Refusal) as refused:
        Assignment.from_records(request_of(assignment, format=2))
    assert refused.value.code == "format"


@pytest.mark.parametrize(
    "vector",
    [
        np.zeros(5, np.float32),
        np.zeros(7, np.float32),
        np.zeros((2, 3), np.float32),
        np.zeros(6, np.float64),
        np.zeros(6, np.int32),
        np.array([0, 0, np.nan, 0, 0, 0], np.float32),
        np.array([0, 0, -np.inf, 0, 0, 0], np.float32),
    ],
)
def test_a_shared_vector_that_is_not_the_specs_or_not_finite_is_refused(assignment, vector):
    records = request_of(assignment)
    data = Array(str(vector.dtype), vector.shape, "raw-little-endian", raw_bytes(vector))
    records["shared"] = ArrayRecord({"vector": data})
    with pytest.raises(Refusal) as refused:
        Assignment.from_records(records)
    assert refused.value.code == "bad-request"


FORGED = [
    Array("float32", (6,), "raw-little-endian", bytes(20)),
    Array("float32", (6,), "raw-little-endian", bytes(28)),
    Array("float32", (10**12,), "raw-little-endian", bytes(24)),
    Array("float32", (-6,), "raw-little-endian", bytes(24)),
    Array("float32", (2, 3), "raw-little-endian", bytes(24)),
    Array("float32", (), "raw-little-endian", bytes(4)),
    Array("object", (3,), "raw-little-endian", bytes(24)),
    Array("V8", (3,), "raw-little-endian", bytes(24)),
    Array("float32", (6,), "numpy.ndarray", bytes(24)),
    Array(np.zeros(6, np.float32)),
]


@pytest.mark.parametrize("array", FORGED, ids=range(len(FORGED)))
def test_an_array_whose_bytes_are_not_what_it_says_is_refused(release, array):
    records = release.to_records()
    records["release"] = ArrayRecord({"total": array})
    with pytest.raises(Refusal) as refused:
        Release.from_records(records)
    assert refused.value.code == "bad-reply"


@pytest.mark.parametrize(
    "receipt",
    [
        {},
        {"users": 1},
        {"users": 1, "sha256": "short"},
        {"users": 1, "sha256": 7},
        {"users": math.inf, "sha256": "0" * 64},
        {"users": math.nan, "sha256": "0" * 64},
        {"users": 1.0, "sha256": "0" * 64},
        {"users": True, "sha256": "0" * 64},
        {"users": 0, "sha256": "0" * 64},
        {"users": -4, "sha256": "0" * 64},
        {"users": 10**9, "sha256": "0" * 64},
        {"users": [1], "sha256": "0" * 64},
    ],
)
def test_a_hostile_receipt_is_refused(release, receipt):
    records = release.to_records()
    records["receipt"] = ConfigRecord(receipt)
    with pytest.raises(Refusal) as refused:
        Release.from_records(records)
    assert refused.value.code == "bad-reply"


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"receipt": ConfigRecord({"users": 1, "sha256": "0" * 64})}),
        RecordDict({"release": ConfigRecord({}), "receipt": ConfigRecord({"users": 1, "sha256": "0" * 64})}),
        RecordDict({"refusal": ConfigRecord({})}),
        RecordDict({"refusal": ConfigRecord({"code": ["busy"]})}),
        RecordDict({"metrics": MetricRecord({"loss": 0.1})}),
    ],
)
def test_a_reply_that_is_no_release_is_refused(records):
    with pytest.raises(Refusal) as refused:
        Release.from_records(records)
    assert refused.value.code == "bad-reply"


@pytest.mark.parametrize("code", sorted(REFUSAL_CODES))
def test_a_refusals_code_crosses_and_nothing_else(code):
    records = travelled(refusal_records(code))
    assert set(records) == {"refusal"}
    assert set(records.config_records["refusal"]) == {"format", "code"}
    with pytest.raises(Refusal) as refused:
        Release.from_records(records)
    assert refused.value.code == code


def test_a_code_outside_the_list_neither_leaves_nor_arrives():
    assert refusal_records("dear diary").config_records["refusal"]["code"] == "failed"
    with pytest.raises(Refusal) as refused:
        Release.from_records(RecordDict({"refusal": ConfigRecord({"code": "dear diary"})}))
    assert refused.value.code == "unknown"


@settings(max_examples=60)
@given(data=st.data())
def test_one_flipped_bit_of_a_release_changes_its_receipt(release_spec, data):
    total = np.linspace(-1, 1, 6).astype(np.float32)
    receipt = receipt_digest(total, release_spec(), 3, 1)
    flipped = bytearray(raw_bytes(total))
    bit = data.draw(st.integers(0, 8 * len(flipped) - 1))
    flipped[bit // 8] ^= 1 << bit % 8
    assert receipt_digest(from_raw_bytes(bytes(flipped), "float32"), release_spec(), 3, 1) != receipt


def test_a_receipt_is_bound_to_run_round_spec_type_and_count(release_spec):
    total = np.linspace(-1, 1, 6).astype(np.float32)
    receipts = {
        receipt_digest(total, release_spec(), 3, 1),
        receipt_digest(total, release_spec(), 4, 1),
        receipt_digest(total, release_spec(), 3, 2),
        receipt_digest(total, release_spec(run="00" * 16), 3, 1),
        receipt_digest(total, release_spec(clip=2.0), 3, 1),
        receipt_digest(total.astype(np.float64), release_spec(), 3, 1),
    }
    assert len(receipts) == 6


def test_every_code_that_the_trusted_side_refuses_with_is_on_the_list():
    """Codes are written where they are decided; what is not on the list would leave as `failed`."""
    import re
    from pathlib import Path

    root = Path(__file__).resolve().parents[2]
    # answers to the owner, who is not on the network, and a coordinator's to who calls it
    owner = {"ledger-locked", "store-locked", "vault-running", "wrong-authority", "megabytes", "not-asked", "joined"}
    owner |= {"other-device", "other-history", "up", "passphrase"}
    local = owner | {"expired", "clock"}
    found = set()
    for folder in ("client", "common"):
        for path in (root / folder).rglob("*.py"):
            found |= set(re.findall(r'(?:Refusal|_refuse)\(\s*"([a-z-]+)"', path.read_text(encoding="utf-8")))
    assert found
    assert found - local <= REFUSAL_CODES
