"""Signed statements of what was spent: only their writer can make them, and none says more than it did."""

from __future__ import annotations

import pytest

from common.errors import VerificationError
from common.keys import SigningKey
from common.ledger import Ledger
from common.spent_proof import check_proof, sign_proof

KEY = SigningKey.generate()


@pytest.fixture
def head(tmp_path):
    with Ledger.create(tmp_path / "ledger.jsonl", KEY, {"role": "device", "subject": "ab" * 16}) as ledger:
        return ledger.head


def test_a_statement_comes_back_as_it_was_signed(head):
    assert check_proof(sign_proof(head, 7, KEY), KEY.verify_key) == (head, 7)


@pytest.mark.parametrize(
    "change",
    [
        {"debits": 6},
        {"debits": 8},
        {"debits": True},
        {"debits": -1},
        {"debits": "7"},
        {"signature": "00" * 64},
        {"head": {}},
    ],
)
def test_a_statement_that_was_changed_is_refused(head, change):
    with pytest.raises(VerificationError):
        check_proof({**sign_proof(head, 7, KEY), **change}, KEY.verify_key)


def test_a_head_of_another_entry_is_refused(head):
    proof = sign_proof(head, 7, KEY)
    proof["head"]["index"] += 1
    with pytest.raises(VerificationError):
        check_proof(proof, KEY.verify_key)


def test_another_writers_statement_is_refused(head):
    with pytest.raises(VerificationError):
        check_proof(sign_proof(head, 7, SigningKey.generate()), KEY.verify_key)
    with pytest.raises(VerificationError):
        check_proof(sign_proof(head, 7, KEY), SigningKey.generate().verify_key)


@pytest.mark.parametrize("value", [None, [], "x", {}, {"head": None, "debits": 1, "signature": ""}])
def test_nonsense_is_refused(value):
    with pytest.raises(VerificationError):
        check_proof(value, KEY.verify_key)
