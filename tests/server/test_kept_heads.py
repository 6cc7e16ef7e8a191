"""Heads of runs' ledgers that an installation remembers: a copied or restored folder is not continued."""

from __future__ import annotations

import shutil

import pytest

from common.errors import VerificationError
from common.keys import SigningKey
from common.ledger import Ledger, verify
from server.kept_heads import check_head, check_remembered, keep_head, kept_head

RUN = "ab" * 16
EVENT = {"kind": "gaussian", "noise_multiplier": 1.0}
HEADER = {"role": "study", "run": RUN} | dict.fromkeys(("config", "source", "model", "data"), "0" * 64)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def ledger(tmp_path):
    (tmp_path / "run").mkdir()
    with Ledger.create(tmp_path / "run" / "ledger.jsonl", SigningKey.generate(), HEADER) as opened:
        yield opened


def test_what_was_never_seen_is_let_through(ledger):
    assert kept_head(RUN) is None
    check_head(RUN, ledger.entries())


def test_a_ledger_that_went_on_holds_and_an_old_copy_of_it_does_not(ledger, tmp_path):
    ledger.append("debit", {"event": EVENT})
    shutil.copytree(ledger.path.parent, tmp_path / "old")
    keep_head(RUN, ledger.append("debit", {"event": EVENT}))
    ledger.append("debit", {"event": EVENT})
    check_head(RUN, ledger.entries())
    check_remembered(verify(ledger.path.read_bytes()), ledger.path.parent)
    old = verify((tmp_path / "old" / "ledger.jsonl").read_bytes())
    with pytest.raises(VerificationError, match="went on, to entry 2"):
        check_head(RUN, old.entries)
    with pytest.raises(VerificationError, match="another copy"):
        check_remembered(old, tmp_path / "old")


def test_a_copy_that_went_on_by_itself_does_not_hold_either(ledger, tmp_path):
    key = ledger._key
    ledger.append("debit", {"event": EVENT})
    shutil.copytree(ledger.path.parent, tmp_path / "fork")
    keep_head(RUN, ledger.append("debit", {"event": EVENT}))
    with Ledger.open(tmp_path / "fork" / "ledger.jsonl", key) as fork:
        fork.append("debit", {"event": EVENT | {"noise_multiplier": 2.0}})
        fork.append("debit", {"event": EVENT})
        with pytest.raises(VerificationError):
            check_head(RUN, fork.entries())


def test_a_round_that_ends_while_the_audit_reads_is_no_rollback(ledger):
    before = verify(ledger.path.read_bytes())
    keep_head(RUN, ledger.append("debit", {"event": EVENT}))
    check_remembered(before, ledger.path.parent)


def test_evidence_of_an_earlier_day_is_not_a_rollback(ledger, tmp_path):
    before = verify(ledger.path.read_bytes())
    keep_head(RUN, ledger.append("debit", {"event": EVENT}))
    check_remembered(before, tmp_path / "evidence.zip")


def test_a_damaged_memory_is_said(ledger, home):
    keep_head(RUN, ledger.head)
    next(home.rglob(f"{RUN}.json")).write_text("{}")
    with pytest.raises(VerificationError, match="not the head"):
        check_head(RUN, ledger.entries())
