"""The ledger: what was appended is there and says who wrote it; whatever is done to the file is found."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.canonical import canonical
from common.errors import HomespunError, Refusal, StoreError, VerificationError
from common.keys import SigningKey
from common.ledger import Debit, Entry, Head, Ledger, debits, verify
from common.ledger_format import signed_line
from common.ledger_kinds import KINDS

ROOT = Path(__file__).parents[2]
KEY = SigningKey(bytes(range(32)))
STRANGER = SigningKey(bytes(range(1, 33)))
SUBJECT = "5a" * 16
EVENT = {"kind": "poisson-gaussian", "noise_multiplier": 1.25, "sampling_rate": 0.01}
DIGEST = "ab" * 32

Body = dict[str, Any]


def clock() -> float:
    return 1_750_000_000.0


def make(path: Path, items: list[tuple[str, Body]] | None = None, header: Body | None = None) -> Ledger:
    header = {"role": "device", "subject": SUBJECT, "salt": "00" * 16} if header is None else header
    ledger = Ledger.create(path, KEY, header, clock=clock)
    if items:
        ledger.append_many(items)
    return ledger


def story(path: Path) -> Ledger:
    """One of everything that a device's ledger may hold."""
    ledger = make(path)
    reserve = ledger.append("reserve", {"event": EVENT, "run": "run-1", "epsilon": 8.0, "delta": 1e-5})
    debit = ledger.append("debit", {"event": EVENT, "run": "run-1", "round": 1, "reservation": reserve.index})
    release = {"debit": debit.index, "bytes": 12, "sha256": DIGEST, "names": ["lora_A"], "shapes": [[3]]}
    sent = ledger.append("release", release | {"dtype": "float32", "round": 1, "spec": DIGEST})
    ledger.append("receipt", {"head": debit.to_json(), "release": sent.index, "event": EVENT})
    ledger.append("checkpoint", {"weights": DIGEST, "round": 1, "debit": debit.index})
    ledger.append("refill", {"epsilon": float("inf"), "delta": 1e-5, "authorization": "cd" * 64})
    ledger.append("forget", {"scope": "records"})
    ledger.append("tombstone", {"subject": SUBJECT})
    ledger.append("cancel", {"reservation": reserve.index, "reason": "stopped"})
    ledger.append("debit", {"event": EVENT, "run": "run-2", "round": 1})
    return ledger


def lines_of(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


def resign(line: bytes, key: SigningKey = KEY, **changes: Any) -> bytes:
    """Forge: change fields of an entry and sign it again."""
    fields = json.loads(line) | changes
    del fields["signature"]
    payload = canonical(fields)
    head = Head(fields["ledger"], fields["index"], hashlib.sha256(payload).hexdigest(), fields["writer"], "")
    return signed_line(payload, key.sign(head.message()).hex())


def stand_alone() -> Any:
    """The second implementation, which docs/ledger.md points to."""
    spec = importlib.util.spec_from_file_location("verify_ledger", ROOT / "docs" / "verify_ledger.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


OTHER = stand_alone()


def both_refuse(data: bytes, entry: int | None, *, heads: tuple[Head, ...] = (), keys: list[str] | None = None) -> str:
    """Check that both verifiers refuse, and blame the same entry; return the reason."""
    with pytest.raises(VerificationError) as caught:
        verify(data, known_heads=heads, public_keys=keys)
    assert caught.value.entry == entry
    with pytest.raises(OTHER.Bad) as other:
        OTHER.verify(data, [head.to_json() for head in heads], keys)
    assert str(other.value).startswith("a kept head is not signed" if entry is None else f"entry {entry}: ")
    return str(caught.value)


# --- writing and reading ---------------------------------------------------------------------------------------


def test_what_was_appended_is_read_back_and_verifies(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "ledger.jsonl"
    with story(path) as ledger:
        head = ledger.head
        entries = ledger.entries()
    verified = verify(path.read_bytes(), public_keys=[KEY.verify_key])
    assert verified.entries == entries
    assert verified.head == head
    assert verified.header["subject"] == SUBJECT
    assert [entry.index for entry in entries] == list(range(len(entries)))
    assert {entry.writer for entry in entries} == {KEY.verify_key.hex}
    assert {entry.time for entry in entries} == {"2025-06-15T15:06:40Z"}
    assert verified.rollback_evidence.startswith("none")
    assert OTHER.verify(path.read_bytes()) == (len(entries), head.hash)


def test_a_ledger_is_continued_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    story(path).close()
    before = path.read_bytes()
    with Ledger.open(path, KEY, clock=clock) as ledger:
        assert path.read_bytes() == before
        ledger.append("debit", {"event": EVENT})
    assert path.read_bytes().startswith(before)
    assert len(verify(path.read_bytes()).entries) == len(before.splitlines()) + 1


def test_the_files_are_the_owners_only(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "ledger.jsonl"
    make(path).close()
    assert {file.stat().st_mode & 0o777 for file in path.parent.iterdir()} == {0o600}
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_a_ledger_is_never_begun_anew_over_another(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path).close()
    before = path.read_bytes()
    with pytest.raises(StoreError, match="never begun anew"):
        make(path)
    assert path.read_bytes() == before


def test_two_ledgers_with_one_header_have_two_ids(tmp_path: Path) -> None:
    header = {"role": "device", "subject": SUBJECT}
    heads = {make(tmp_path / name, header=header).head.ledger for name in ("one", "two")}
    assert len(heads) == 2


def test_an_append_is_on_disk_before_its_head_is_handed_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make(tmp_path / "ledger.jsonl")
    synced: list[int] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.fstat(descriptor).st_size)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    ledger.append("debit", {"event": EVENT})
    assert synced == [ledger.path.stat().st_size]
    ledger.append_many([("debit", {"event": EVENT})] * 50)
    assert synced[1:] == [ledger.path.stat().st_size]


def test_numbers_come_back_as_the_rule_says(tmp_path: Path) -> None:
    event = {"a": float("inf"), "b": 2**60, "c": 1.0, "d": 1e-300, "e": (1, 2), "f": -0.0, "g": 1e16}
    with make(tmp_path / "ledger.jsonl", [("debit", {"event": event})]) as ledger:
        stored = ledger.entries()[-1].body["event"]
    assert stored == {"a": "inf", "b": str(2**60), "c": 1, "d": 1e-300, "e": [1, 2], "f": 0, "g": 1e16}
    assert verify(ledger.path.read_bytes()).entries[-1].body["event"] == stored
    OTHER.verify(ledger.path.read_bytes())


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
@settings(max_examples=60, deadline=None)
def test_any_event_survives_and_both_verifiers_agree(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    path = tmp_path_factory.mktemp("event") / "ledger.jsonl"
    with make(path, [("debit", {"event": {"value": value}})]) as ledger:
        assert verify(path.read_bytes()).entries == ledger.entries()
        assert OTHER.verify(path.read_bytes()) == (2, ledger.head.hash)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("note", {"text": "anything"}),
        ("debit", {}),
        ("debit", {"event": "poisson"}),
        ("debit", {"event": EVENT, "comment": "free text"}),
        ("debit", {"event": EVENT, "round": -1}),
        ("debit", {"event": EVENT, "round": True}),
        ("debit", {"event": EVENT, "round": 1.5}),
        ("debit", {"event": EVENT, "round": 2**53}),
        ("debit", {"event": EVENT, "run": "dear diary"}),
        ("debit", {"event": EVENT, "subject": "alice"}),
        ("debit", {"event": EVENT, "reservation": 77}),
        ("debit", {"event": {"value": float("nan")}}),
        ("open", {"role": "device", "subject": SUBJECT, "salt": "00" * 16}),
        ("release", {"debit": 5, "bytes": 1, "sha256": DIGEST}),
        ("release", {"debit": 0, "bytes": 1, "sha256": DIGEST}),
        ("cancel", {"reservation": 0}),
        ("refill", {"epsilon": -1.0, "delta": 1e-5}),
        ("receipt", {"head": {"index": 3}}),
        ("forget", {"scope": "everything the user ever said"}),
        ("compact", {"hashes": DIGEST, "header": {}, "opened_by": DIGEST, "totals": [], "unreleased": []}),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(tmp_path: Path, kind: str, body: Body) -> None:
    with make(tmp_path / "ledger.jsonl") as ledger:
        before = ledger.path.read_bytes()
        with pytest.raises(ValueError) as caught:  # noqa: PT011 (each has its own words)
            ledger.append_many([("debit", {"event": EVENT}), (kind, body)])
        for private in ("diary", "alice", "anything", "ever said"):
            assert private not in str(caught.value)
        assert ledger.path.read_bytes() == before
        assert ledger.append("debit", {"event": EVENT}).index == 1
    verify(ledger.path.read_bytes())


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"role": "device"},
        {"role": "server", "run": "run-1"},
        {"role": "study", "run": "run-1", "config": DIGEST, "source": DIGEST, "model": DIGEST},
        {"role": "owner", "subject": SUBJECT},
        {"role": "device", "subject": SUBJECT, "name": "Alice"},
    ],
)
def test_a_header_must_bind_the_ledger_to_what_its_role_says(tmp_path: Path, header: Body) -> None:
    with pytest.raises(ValueError, match="open"):
        make(tmp_path / "ledger.jsonl", header=header)
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_debit_is_not_used_twice(tmp_path: Path) -> None:
    with make(tmp_path / "ledger.jsonl") as ledger:
        debit = ledger.append("debit", {"event": EVENT}).index
        for _ in range(2):  # sending the same bytes again is the same release
            ledger.append("release", {"debit": debit, "bytes": 1, "sha256": DIGEST})
        with pytest.raises(ValueError, match="another payload"):
            ledger.append("release", {"debit": debit, "bytes": 1, "sha256": "cd" * 32})


def test_nothing_follows_the_end(tmp_path: Path) -> None:
    with make(tmp_path / "ledger.jsonl", [("end", {"reason": "finished"})]) as ledger:
        with pytest.raises(ValueError, match="end of the ledger"):
            ledger.append("debit", {"event": EVENT})
        line = resign(
            lines_of(ledger.path)[-1], kind="debit", body={"event": EVENT}, index=2, previous=ledger.head.hash
        )
    both_refuse(ledger.path.read_bytes() + line, 2)


# --- what is found ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [11, pytest.param(1, marks=pytest.mark.slow)])
def test_every_single_bit_counts(tmp_path: Path, stride: int) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT, "round": 1}), ("debit", {"event": EVENT, "round": 2})]).close()
    data = path.read_bytes()
    starts = [sum(map(len, lines_of(path)[:index])) for index in range(4)]
    for bit in range(0, 8 * len(data), stride):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(VerificationError) as caught:
            verify(bytes(changed))
        blamed = caught.value.entry
        assert blamed is not None
        # The entry that was hit, or for its newline the one it now runs into.
        assert starts[blamed] <= bit // 8 < starts[blamed + 1] if blamed < 3 else bit // 8 == len(data) - 1


def test_the_second_verifier_finds_every_bit_too(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT, "round": 1})]).close()
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 13):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(OTHER.Bad, match=r"^entry [01]: |^entry 2: the last"):
            OTHER.verify(bytes(changed))


def test_deletions_and_reorderings_name_the_first_bad_entry(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    story(path).close()
    lines = lines_of(path)
    for index in range(len(lines) - 1):
        both_refuse(b"".join(lines[:index] + lines[index + 1 :]), index)
        swapped = [*lines[:index], lines[index + 1], lines[index], *lines[index + 2 :]]
        both_refuse(b"".join(swapped), index)
        both_refuse(b"".join([*lines[: index + 1], *lines[index:]]), index + 1)


def test_a_changed_past_is_found_although_it_was_signed_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    story(path).close()
    lines = lines_of(path)
    for index in range(len(lines) - 1):
        body = json.loads(lines[index])["body"]
        forged = resign(lines[index], body=body, time="2000-01-01T00:00:00Z")
        both_refuse(b"".join([*lines[:index], forged, *lines[index + 1 :]]), index + 1)


def test_an_empty_or_torn_ledger_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT})]).close()
    data = path.read_bytes()
    both_refuse(b"", 0)
    both_refuse(data[:-1], 1)
    both_refuse(data + data[:30], 2)


def test_an_entry_of_another_ledger_does_not_fit(tmp_path: Path) -> None:
    items: list[tuple[str, Body]] = [("debit", {"event": EVENT})] * 3
    make(tmp_path / "one", items).close()
    make(tmp_path / "two", items, {"role": "device", "subject": SUBJECT, "salt": "11" * 16}).close()
    one, two = lines_of(tmp_path / "one"), lines_of(tmp_path / "two")
    for index in range(4):
        both_refuse(b"".join([*one[:index], two[index], *one[index + 1 :]]), max(index, 1))
    # Also when the swapped entry is linked into the chain and signed by the same writer.
    linked = resign(two[1], previous=json.loads(one[1])["previous"])
    assert "another ledger" in both_refuse(b"".join([one[0], linked]), 1)


def test_a_stranger_cannot_write(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT})]).close()
    opening, line = lines_of(path)
    both_refuse(opening + resign(line, STRANGER), 1)
    assert "does not allow" in both_refuse(opening + resign(line, STRANGER, writer=STRANGER.verify_key.hex), 1)
    both_refuse(path.read_bytes(), 0, keys=[STRANGER.verify_key.hex])
    with pytest.raises(StoreError, match="may not write"):
        Ledger.open(path, STRANGER)


def test_a_writer_whom_the_header_lists_may_write(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    header = {"role": "device", "subject": SUBJECT, "writers": [STRANGER.verify_key.hex]}
    make(path, [("debit", {"event": EVENT})], header).close()
    with Ledger.open(path, STRANGER) as ledger:
        ledger.append("refill", {"epsilon": 8.0, "delta": 1e-5})
    assert {entry.writer for entry in verify(path.read_bytes()).entries} == {
        KEY.verify_key.hex,
        STRANGER.verify_key.hex,
    }
    both_refuse(path.read_bytes(), 2, keys=[KEY.verify_key.hex])


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "note"},
        {"kind": "note", "body": {}},
        {"format": "homespun-ledger-2"},
        {"body": {"event": EVENT, "comment": "hello"}},
        {"body": {}},
        {"body": []},
        {"index": "1"},
        {"index": 1.5},
        {"extra": 1},
        {"writer": None},
        {"time": "yesterday"},
    ],
)
def test_a_signed_entry_of_the_wrong_form_is_refused(tmp_path: Path, changes: Body) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT})]).close()
    opening, line = lines_of(path)
    fields = json.loads(line) | changes
    forged = opening + canonical(fields) + b"\n"
    with pytest.raises(VerificationError) as caught:
        verify(forged)
    assert caught.value.entry == 1
    if changes.keys() == {"kind"}:
        assert "hello" not in both_refuse(opening + resign(line, **changes), 1)


@given(st.binary(max_size=200), st.data())
@settings(max_examples=150, deadline=None)
def test_a_verifier_raises_one_kind_of_error_and_nothing_else(junk: bytes, data: st.DataObject) -> None:
    templates = [b"[" * 100_000, b'{"a":' * 50_000, b"1" * 10_000, b'{"body":{"event":{"a":1e400}}}', junk]
    text = data.draw(st.sampled_from(templates)) + data.draw(st.sampled_from([b"", b"\n", b"\n\n", b"\r\n"]))
    with pytest.raises(VerificationError):
        verify(text)
    with pytest.raises(OTHER.Bad):
        OTHER.verify(text)


def test_no_error_shows_what_a_forged_entry_holds(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT})]).close()
    opening, line = lines_of(path)
    for changes in ({"kind": "MARKER"}, {"body": {"MARKER": 1}}, {"body": {"event": EVENT, "run": "MARKER MARKER"}}):
        with pytest.raises(VerificationError) as caught:
            verify(opening + resign(line, **changes))
        assert "MARKER" not in str(caught.value)


# --- heads -----------------------------------------------------------------------------------------------------


def test_without_a_kept_head_a_cut_ledger_verifies_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    story(path).close()
    cut = b"".join(lines_of(path)[:4])
    assert verify(cut).rollback_evidence.startswith("none")


def test_a_kept_head_finds_a_cut_and_a_restored_copy(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    story(path).close()
    data, lines = path.read_bytes(), lines_of(path)
    heads = [entry.head for entry in verify(data).entries]
    assert verify(data, known_heads=heads).rollback_evidence.startswith(f"{len(heads)} kept heads agree")
    for kept in range(1, len(lines)):
        cut = b"".join(lines[:kept])
        assert verify(cut, known_heads=heads[:kept]).head == heads[kept - 1]
        assert "missing" in both_refuse(cut, kept, heads=(heads[-1],))


def test_a_kept_head_finds_a_second_history(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT, "round": 1})]).close()
    copy = path.read_bytes()
    with Ledger.open(path, KEY) as ledger:
        kept = ledger.append("debit", {"event": EVENT, "round": 2})
    path.write_bytes(copy)
    with Ledger.open(path, KEY) as ledger:  # without a kept head nobody can know
        ledger.append_many([("debit", {"event": EVENT, "round": 3})] * 3)
    assert "rewritten" in both_refuse(path.read_bytes(), 2, heads=(kept,))
    with pytest.raises(VerificationError, match="rewritten"):
        Ledger.open(path, KEY, known_heads=[kept])


def test_a_kept_head_finds_a_ledger_that_was_begun_anew(tmp_path: Path) -> None:
    one = make(tmp_path / "one", [("debit", {"event": EVENT})])
    two = make(tmp_path / "two", header={"role": "device", "subject": SUBJECT})
    assert "begun anew" in both_refuse(two.path.read_bytes(), 0, heads=(one.head,))


def test_a_forged_head_accuses_nobody(tmp_path: Path) -> None:
    ledger = make(tmp_path / "ledger.jsonl", [("debit", {"event": EVENT})])
    for change in ({"index": 7}, {"hash": DIGEST}, {"writer": STRANGER.verify_key.hex}, {"signature": "00" * 64}):
        forged = dataclasses.replace(ledger.head, **change)
        assert "not signed" in both_refuse(ledger.path.read_bytes(), None, heads=(forged,))


def test_a_head_survives_json_and_nothing_else_passes_for_one(tmp_path: Path) -> None:
    head = make(tmp_path / "ledger.jsonl").head
    assert Head.from_json(json.loads(json.dumps(head.to_json()))) == head
    head.verify()
    for value in (None, [], {}, head.to_json() | {"index": -1}, head.to_json() | {"more": 1}, "head"):
        with pytest.raises(VerificationError):
            Head.from_json(value)


# --- one process, and crashes ----------------------------------------------------------------------------------


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = make(path)
    program = (
        "import sys; from pathlib import Path; from common.errors import Refusal; from common.keys import SigningKey\n"
        "from common.ledger import Ledger\n"
        "try: Ledger.open(Path(sys.argv[1]), SigningKey(bytes(range(32))))\n"
        "except Refusal as refusal: print(refusal.code)\n"
    )
    command = [sys.executable, "-c", program, str(path)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == "ledger-locked\n"
    with pytest.raises(Refusal, match="another process"):
        Ledger.open(path, KEY)
    ledger.close()
    assert subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout == ""
    Ledger.open(path, KEY).close()


def test_a_forked_child_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = make(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(os, "getpid", lambda: -1)
    with pytest.raises(Refusal, match="forked"):
        ledger.append("debit", {"event": EVENT})


def test_a_file_that_was_swapped_under_an_open_ledger_is_noticed(tmp_path: Path) -> None:
    ledger = make(tmp_path / "ledger.jsonl", [("debit", {"event": EVENT})])
    content = ledger.path.read_bytes()
    ledger.path.unlink()
    with pytest.raises(StoreError, match="changed by someone else"):
        ledger.append("debit", {"event": EVENT})
    ledger.path.write_bytes(content)
    with pytest.raises(StoreError, match="changed by someone else"):
        ledger.append("debit", {"event": EVENT})


def test_after_a_failed_flush_nothing_more_is_promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = make(path)

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(StoreError, match="Input/output"):
            ledger.append("debit", {"event": EVENT})
    with pytest.raises(StoreError, match="open the ledger again"):
        ledger.append("debit", {"event": EVENT})
    ledger.close()
    with Ledger.open(path, KEY) as again:
        assert again.append("debit", {"event": EVENT}).index == 2


def test_a_disk_that_fills_up_in_mid_line_leaves_a_ledger_that_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = make(path)
    real, calls = os.write, []

    def write(descriptor: int, data: memoryview) -> int:
        calls.append(len(data))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(descriptor, bytes(data)[:40])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        with pytest.raises(StoreError, match="No space"):
            ledger.append("debit", {"event": EVENT})
    ledger.close()
    with Ledger.open(path, KEY) as again:
        assert [entry.kind for entry in again.entries()] == ["open", "recovered"]


def test_a_torn_line_is_cut_kept_aside_and_said(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT})] * 2).close()
    sound, last = b"".join(lines_of(path)[:2]), lines_of(path)[2]
    for length in (1, len(last) // 2, len(last) - 1):
        path.write_bytes(sound + last[:length])
        with Ledger.open(path, KEY) as ledger:
            assert [entry.kind for entry in ledger.entries()] == ["open", "debit", "recovered"]
            assert ledger.entries()[-1].body["cut_bytes"] == length
            assert ledger.append("debit", {"event": EVENT}).index == 3
        aside = tmp_path / "ledger.jsonl.torn-2"
        assert aside.read_bytes() == last[:length]
        assert aside.stat().st_mode & 0o777 == 0o600
        verify(path.read_bytes())
        OTHER.verify(path.read_bytes())


def test_a_ledger_that_is_damaged_elsewhere_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT})] * 2).close()
    damaged = path.read_bytes().replace(b'"index":1', b'"index":7') + b'{"torn'
    path.write_bytes(damaged)
    with pytest.raises(VerificationError) as caught:
        Ledger.open(path, KEY)
    assert caught.value.entry == 1
    assert path.read_bytes() == damaged
    assert sorted(file.name for file in tmp_path.iterdir()) == ["ledger.jsonl", "ledger.jsonl.lock"]


@pytest.mark.parametrize("step", range(12))
def test_a_crash_during_recovery_is_recovered_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    path = tmp_path / "ledger.jsonl"
    make(path, [("debit", {"event": EVENT})]).close()
    torn = b'{"body":{"event'
    with path.open("ab") as file:
        file.write(torn)

    class Crash(BaseException):
        pass

    calls = 0

    def crashing(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == step:
                raise Crash
            return real(*arguments, **options)

        return call

    with monkeypatch.context() as patch:
        for name in ("fsync", "truncate", "write", "replace"):
            patch.setattr(os, name, crashing(getattr(os, name)))
        with contextlib.suppress(Crash):
            Ledger.open(path, KEY).close()
    with Ledger.open(path, KEY) as ledger:
        assert [entry.kind for entry in ledger.entries()] == ["open", "debit", "recovered"]
        assert ledger.entries()[-1].body["cut_bytes"] == len(torn)
    assert (tmp_path / "ledger.jsonl.torn-2").read_bytes() == torn
    assert not (tmp_path / "ledger.jsonl.torn").exists()


CRASHING_WRITER = """
import sys
from pathlib import Path
from common.keys import SigningKey
from common.ledger import Ledger
ledger = Ledger.open(Path(sys.argv[1]), SigningKey(bytes(range(32))))
sys.stdout.write(f"{len(ledger.entries()) - 1}\\n"); sys.stdout.flush()
event = {"kind": "gaussian", "noise_multiplier": 1.25}
number = 0
while True:
    number += 1
    if number % 3:
        head = ledger.append("debit", {"event": event, "round": number})
    else:
        head = ledger.append_many([("debit", {"event": event, "round": number})] * 20)[-1]
    sys.stdout.write(f"{head.index} {head.hash}\\n"); sys.stdout.flush()
"""


def crash_rounds(path: Path, rounds: int, seed: int) -> int:
    """Kill a writer again and again; return how often a line was torn."""
    generator = random.Random(seed)  # noqa: S311 (chooses instants, nothing else)
    seen: list[tuple[int, str]] = []
    for _ in range(rounds):
        child = subprocess.Popen([sys.executable, "-c", CRASHING_WRITER, str(path)], cwd=ROOT, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(generator.uniform(0.0, 0.03))
        child.send_signal(signal.SIGKILL)
        rest, _ = child.communicate()
        acknowledged = [line.split() for line in rest.decode().splitlines(keepends=True) if line.endswith("\n")]
        seen += [(int(index), entry_hash) for index, entry_hash in acknowledged]
        with Ledger.open(path, KEY) as ledger:
            hashes = [entry.hash for entry in ledger.entries()]
        # Whatever was acknowledged before any kill is there, unchanged.
        assert all(hashes[index] == entry_hash for index, entry_hash in seen)
    verified = verify(path.read_bytes())
    OTHER.verify(path.read_bytes())
    return sum(entry.kind == "recovered" for entry in verified.entries)


def test_kill_9_in_the_middle_of_appends_loses_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    make(tmp_path / "ledger.jsonl").close()
    crash_rounds(tmp_path / "ledger.jsonl", 12, seed=1)


@pytest.mark.slow
def test_kill_9_two_hundred_times(tmp_path: Path) -> None:
    for seed in range(20):  # ten at a time: every restart reads the whole ledger twice
        make(tmp_path / f"{seed}.jsonl").close()
        crash_rounds(tmp_path / f"{seed}.jsonl", 10, seed)


# --- what was charged, and compaction --------------------------------------------------------------------------


def charged(entries: tuple[Entry, ...]) -> Counter[tuple[str, bytes, str | None, str | None]]:
    counts: Counter[tuple[str, bytes, str | None, str | None]] = Counter()
    for debit in debits(entries):
        counts[debit.kind, canonical(debit.event), debit.subject, debit.run] += debit.count
    return counts


def test_a_reservation_is_charged_whole_until_it_is_cancelled(tmp_path: Path) -> None:
    whole = {"kind": "repeated", "count": 10, "event": EVENT}
    with make(tmp_path / "ledger.jsonl") as ledger:
        reservation = ledger.append("reserve", {"event": whole, "run": "run-1"}).index
        for number in range(3):
            ledger.append("debit", {"event": EVENT, "run": "run-1", "round": number, "reservation": reservation})
        free = ledger.append("debit", {"event": EVENT, "run": "run-2"}).index
        assert list(debits(ledger.entries())) == [
            Debit(reservation, "reserve", whole, 1, None, "run-1"),
            Debit(free, "debit", EVENT, 1, None, "run-2"),
        ]
        ledger.append("cancel", {"reservation": reservation, "reason": "stopped"})
        assert [(debit.kind, debit.run) for debit in debits(ledger.entries())] == [
            ("debit", "run-1"),
            ("debit", "run-1"),
            ("debit", "run-1"),
            ("debit", "run-2"),
        ]
        with pytest.raises(ValueError, match="not open"):
            ledger.append("debit", {"event": EVENT, "reservation": reservation})


@given(st.data())
@settings(max_examples=25, deadline=None)
def test_compaction_changes_no_charge_and_no_hash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("compaction") / "ledger.jsonl"
    plain = path.with_name("plain.jsonl")
    open_reservations: list[int] = []
    unreleased: list[int] = []
    heads: list[Head] = []
    steps = ("debit", "reserve", "under", "cancel", "release", "refill", "tombstone", "compact")
    # The same story twice: `path` is compacted, `plain` is told without.
    with make(path) as ledger, make(plain) as twin:
        for step in data.draw(st.lists(st.sampled_from(steps), min_size=3, max_size=14)):
            event = {"kind": "gaussian", "noise_multiplier": data.draw(st.sampled_from([1.0, 1.25, 3]))}
            bound = {"run": data.draw(st.sampled_from(["a", "b"])), "round": data.draw(st.integers(0, 9))}
            kind, body = step, dict[str, Any]()
            if step == "compact":
                heads.append(ledger.compact(keep_archive=False))
                twin.append("forget", {"scope": "all"})  # so that indices stay in step
                continue
            if step in {"debit", "reserve"}:
                body = {"event": event, **bound}
            elif step == "under" and open_reservations:
                kind, body = "debit", {"event": event, **bound, "reservation": open_reservations[-1]}
            elif step == "cancel" and open_reservations:
                body = {"reservation": open_reservations.pop()}
            elif step == "release" and unreleased:
                body = {"debit": unreleased.pop(), "bytes": 1, "sha256": DIGEST}
            elif step == "refill":
                body = {"epsilon": 8.0, "delta": 1e-5}
            elif step == "tombstone":
                body = {"subject": SUBJECT}
            else:
                continue
            head = ledger.append(kind, body)
            twin.append(kind, body)
            heads.append(head)
            if kind == "reserve":
                open_reservations.append(head.index)
            if kind == "debit":
                unreleased.append(head.index)
        verified = verify(path.read_bytes(), known_heads=heads)
        OTHER.verify(path.read_bytes(), [head.to_json() for head in heads])
        assert charged(verified.entries) == charged(twin.entries())
        assert verified.head.index == twin.head.index


def test_a_compacted_ledger_is_shorter_goes_on_and_still_finds_a_rollback(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = make(path, [("debit", {"event": EVENT, "run": "run-1", "round": number}) for number in range(300)])
    full, old = path.read_bytes(), ledger.entries()
    head = ledger.compact()
    assert len(path.read_bytes()) < len(full) / 4
    reserve = ledger.append("reserve", {"event": EVENT})
    ledger.close()
    with Ledger.open(path, KEY, known_heads=[old[17].head]) as again:
        assert again.header["subject"] == SUBJECT
        again.append("debit", {"event": EVENT, "reservation": reserve.index})
        # A debit from before that was not used can still be released once; its index is remembered.
        again.append("release", {"debit": 5, "bytes": 1, "sha256": DIGEST})
        with pytest.raises(ValueError, match="another payload"):
            again.append("release", {"debit": 5, "bytes": 1, "sha256": "cd" * 32})
        second = again.compact()
        with pytest.raises(ValueError, match="without an earlier debit"):
            again.append("release", {"debit": 5, "bytes": 1, "sha256": DIGEST})
        again.append("cancel", {"reservation": reserve.index})
    data = path.read_bytes()
    assert "agree" in verify(data, known_heads=[old[3].head, head, second]).rollback_evidence
    assert [debit.count for debit in debits(verify(data).entries)] == [300, 1]
    other = dataclasses.replace(old[3].head, hash=DIGEST)
    signature = KEY.sign(other.message()).hex()
    both_refuse(data, 3, heads=(dataclasses.replace(other, signature=signature),))
    archive = (tmp_path / f"ledger.jsonl.archive-{head.index}").read_bytes()
    assert archive.startswith(full)
    assert verify(archive).head == head
    OTHER.verify(archive)


def test_a_crash_in_compaction_leaves_a_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = make(path, [("debit", {"event": EVENT})] * 3)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("common.ledger.write_private_file", fail)
        with pytest.raises(KeyboardInterrupt):
            ledger.compact()
    ledger.close()
    with Ledger.open(path, KEY) as again:
        assert [debit.count for debit in debits(again.entries())] == [1, 1, 1]
        again.compact()
        assert [debit.count for debit in debits(again.entries())] == [3]
    OTHER.verify(path.read_bytes())


def test_a_summary_that_leaves_something_out_does_not_verify(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = make(path, [("debit", {"event": EVENT})] * 3)
    head = ledger.compact()
    archive = lines_of(tmp_path / f"ledger.jsonl.archive-{head.index}")
    body = json.loads(archive[-1])["body"]
    for change in (
        {"totals": []},
        {"totals": [body["totals"][0] | {"count": 2}]},
        {"unreleased": []},
        {"hashes": body["hashes"][64:]},
        {"opened_by": STRANGER.verify_key.hex},
    ):
        forged = resign(archive[-1], body=body | change)
        both_refuse(b"".join(archive[:-1]) + forged, 4)
    # At the front the hashes, header and opener still have to fit; the totals rest on the writer's word.
    for change in ({"hashes": body["hashes"][64:]}, {"header": body["header"] | {"salt": "22" * 16}}):
        with pytest.raises(VerificationError):
            verify(resign(archive[-1], body=body | change))


# --- speed, start, and the stand-alone verifier ----------------------------------------------------------------


def test_ten_thousand_entries_append_and_verify_in_seconds(tmp_path: Path, slower: float) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = make(path)
    start = time.process_time()
    ledger.append_many([("debit", {"event": EVENT, "run": "run-1", "round": number}) for number in range(10_000)])
    appended = time.process_time() - start
    data = path.read_bytes()
    start = time.process_time()
    assert len(verify(data).entries) == 10_001
    assert time.process_time() - start < 5 * slower
    assert appended < 10 * slower


def test_verifying_starts_without_the_heavy_libraries(tmp_path: Path, slower: float) -> None:
    path = tmp_path / "ledger.jsonl"
    story(path).close()
    program = (
        "import sys, time; start = time.process_time()\n"
        "from pathlib import Path; from common.ledger import verify\n"
        "verify(Path(sys.argv[1]).read_bytes())\n"
        "print(time.process_time() - start)\n"
        "print(sorted({'scipy', 'torch', 'pydantic', 'numpy', 'flwr', 'dp_accounting'} & sys.modules.keys()))\n"
    )
    output = subprocess.run(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert output[1] == "[]"
    assert float(output[0]) < 0.5 * slower


def test_the_stand_alone_verifier_imports_nothing_of_ours_and_answers_by_exit_code(tmp_path: Path) -> None:
    path, head = tmp_path / "ledger.jsonl", tmp_path / "head.json"
    with story(path) as ledger:
        head.write_text(json.dumps(ledger.head.to_json()))
    script = tmp_path / "verify_ledger.py"
    script.write_bytes((ROOT / "docs" / "verify_ledger.py").read_bytes())

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", str(script), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    sound = run(path, "--head", head, "--key", KEY.verify_key.hex)
    assert sound.returncode == 0, sound.stderr
    assert "1 kept heads agree" in sound.stdout
    path.write_bytes(b"".join(lines_of(path)[:-1]))
    cut = run(path, "--head", head)
    assert cut.returncode == 4
    assert "entry 10: missing" in cut.stderr
    assert run(path).returncode == 0


def test_the_specification_lists_every_kind() -> None:
    text = (ROOT / "docs" / "ledger.md").read_text(encoding="utf-8")
    for kind, (required, optional) in KINDS.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| `{kind}` |"))
        cells = [cell.strip() for cell in row.split("|")]
        assert set(cells[2].replace("`", "").replace(",", "").split()) - {"-"} == required
        assert set(cells[3].replace("`", "").replace(",", "").split()) - {"-"} == optional
        assert OTHER.KINDS[kind] is not None
        assert set(OTHER.KINDS[kind][0].split()) == required
        assert set(OTHER.KINDS[kind][1].split()) == optional
    assert OTHER.KINDS.keys() == KINDS.keys()


def test_every_error_is_one_of_ours() -> None:
    assert issubclass(VerificationError, HomespunError)
    assert VerificationError("x", 3).entry == 3
