"""Attack 7: edit, delete, reorder, truncate or swap ledger entries; put an old copy back."""

from __future__ import annotations

import json
import shutil

import pytest

import homespun
from common.errors import ConfigError, StoreError, VerificationError
from common.ledger import verify
from server import run_folder
from server.rounds import Rounds
from simulations.run import Progress


def lines_of(path):
    return (path / "ledger.jsonl").read_bytes().splitlines(keepends=True)


def edited(lines, other):
    entry = json.loads(lines[2])
    entry["body"]["event"]["noise_multiplier"] = 100.0
    return [*lines[:2], json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n", *lines[3:]], 2


def one_bit(lines, other):
    changed = bytearray(lines[3])
    changed[len(changed) // 2] ^= 1
    return [*lines[:3], bytes(changed), *lines[4:]], 3


ATTACKS = {
    "edited": edited,
    "one bit": one_bit,
    "deleted": lambda lines, other: (lines[:2] + lines[3:], 2),
    "reordered": lambda lines, other: ([*lines[:2], lines[3], lines[2], *lines[4:]], 2),
    "torn": lambda lines, other: ([*lines[:-1], lines[-1][:-9]], 5),
    "swapped": lambda lines, other: ([*lines[:2], other[2], *lines[3:]], 2),
    "another run's": lambda lines, other: ([lines[0], *other[1:]], 1),
}


@pytest.fixture
def runs(study):
    return [study.start(name, rounds=2, rounds_only=True) for name in ("one", "other")]


def test_attack_07_every_change_is_found_and_the_first_bad_entry_is_named(runs, capsys):
    one, other = runs
    whole, stranger = lines_of(one), lines_of(other)
    assert [entry.kind for entry in verify(b"".join(whole)).entries] == ["open", "reserve", *["debit", "release"] * 2]
    for name, attack in ATTACKS.items():
        changed, entry = attack(whole, stranger)
        with pytest.raises(VerificationError) as found:
            verify(b"".join(changed))
        assert found.value.entry == entry, name
        (one / "ledger.jsonl").write_bytes(b"".join(changed))
        assert homespun.main(["audit", "verify", str(one)]) == 4
        assert f"entry {entry}" in capsys.readouterr().out
        if name != "torn":  # a torn end is what a crash leaves, and is recovered
            with pytest.raises(VerificationError):
                run_folder.reopen(one)


def test_attack_07_a_server_does_not_start_from_an_old_copy_of_its_ledger(study):
    path = study.folder / "run"
    copies = []

    def copy(line):
        copies.append((line["round"], (path / "ledger.jsonl").read_bytes()))

    study.start(rounds=3, rounds_only=True, progress=Progress(round=copy))
    (path / "ledger.jsonl").write_bytes(copies[0][1])
    verify(copies[0][1])  # by itself an old copy is a sound ledger
    opened = run_folder.reopen(path)
    rounds = Rounds(opened.config, opened.spec, opened.layout, opened.start, path, opened.ledger)
    with pytest.raises(ConfigError, match="does not hold the entry"):
        rounds.resume_point()
    opened.ledger.close()


def test_attack_07_heads_that_somebody_else_kept_find_a_rolled_back_folder(study, capsys, monkeypatch):
    path = study.folder / "run"
    backup = study.folder / "backup"

    def back_up(line):
        if line["round"] == 1:
            shutil.copytree(path, backup)

    study.start(rounds=2, rounds_only=True, progress=Progress(round=back_up))
    head = verify((path / "ledger.jsonl").read_bytes()).head
    heads = study.folder / "heads.jsonl"
    heads.write_text(json.dumps(head.to_json()) + "\n")
    assert homespun.main(["audit", "verify", str(backup)]) == 4  # the machine that ran it remembers
    capsys.readouterr()
    monkeypatch.setenv("HOMESPUN_HOME", str(study.folder / "another machine"))
    assert homespun.main(["audit", "verify", str(backup)]) == 0
    assert "rollback evidence: none" in capsys.readouterr().out
    assert homespun.main(["audit", "verify", str(backup), "--head", str(heads)]) == 4
    with pytest.raises(VerificationError):
        verify((backup / "ledger.jsonl").read_bytes(), known_heads=[head])


def test_attack_07_a_device_with_a_changed_ledger_does_not_start(study):
    host = study.host()
    device = study.device(host, trust_coordinator=True)
    device.ask(study.assignment(study.spec(host)))
    device.close()
    ledger = study.folder / "device" / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.raises(VerificationError):
        study.device(host)


def test_attack_07_a_device_does_not_start_from_an_old_copy_of_its_ledger_or_from_none(study):
    """The old copy is a sound ledger with budget left; the device knows of entries that it does not hold."""
    host = study.host()
    device = study.device(host, trust_coordinator=True)
    device.ask(study.assignment(study.spec(host)))
    ledger = study.folder / "device" / "ledger.jsonl"
    old = ledger.read_bytes()
    device.ask(study.assignment(study.spec(host), 2))
    device.close()
    new = ledger.read_bytes()
    assert len(verify(old).entries) < len(verify(new).entries)
    ledger.write_bytes(old)
    with pytest.raises(VerificationError):
        study.device(host)
    ledger.unlink()
    with pytest.raises(StoreError, match="stays spent"):
        study.device(host)
    ledger.write_bytes(new)
    study.device(host).close()
