"""Two versions that differ by one understand each other, whichever is older; two that differ by more say so."""

from __future__ import annotations

import json

import numpy as np
import pytest

from client import membership
from common import fleet, wire
from common.errors import DataError, Refusal, StoreError
from common.formats import readable, said, written
from common.wire import Assignment, Release


def speak(monkeypatch, newest):
    """Be the version whose newest format is `newest`, on every line and in every file that has a number."""
    monkeypatch.setattr(wire, "WIRE_FORMAT", newest)
    monkeypatch.setattr(fleet, "FORMAT", newest)
    monkeypatch.setattr(membership, "FORMAT", newest)


@pytest.mark.parametrize("older", range(1, 9))
def test_versions_that_differ_by_one_read_each_other_and_by_two_do_not(older):
    newer, much_newer = older + 1, older + 2
    assert readable(written(newer), older)
    assert readable(written(older), newer)
    assert readable(written(older), older)
    assert not readable(written(much_newer), older)
    if older > 1:  # the first version has nothing older to write
        assert not readable(written(older), much_newer)


@pytest.mark.parametrize("found", [0, -1, True, None, "1", 1.0, [1]])
def test_what_is_no_format_is_not_read(found):
    assert not readable(found, 1)
    assert "names no format" in said(found, 2, "it") or found in (0, -1)


def test_whoever_is_too_old_is_named():
    assert "this side is too old" in said(9, 3, "the message")
    assert "whoever wrote it is too old" in said(1, 4, "the message")
    assert "reads 2, 3, 4" in said(1, 4, "the message")


def rounds(release_spec):
    spec = release_spec()
    vector = np.zeros(spec.model_dim, np.float32)
    return Assignment(spec, 1, ("ab" * 8,), vector), Release(vector, 1, "cd" * 32)


@pytest.mark.parametrize(("device", "coordinator"), [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2)])
def test_a_device_one_version_apart_takes_part_in_a_round(monkeypatch, release_spec, device, coordinator):
    assignment, release = rounds(release_spec)
    speak(monkeypatch, coordinator)
    asked = assignment.to_records()
    speak(monkeypatch, device)
    assert Assignment.from_records(asked).spec == assignment.spec
    answered = release.to_records()
    speak(monkeypatch, coordinator)
    assert Release.from_records(answered).receipt == release.receipt


@pytest.mark.parametrize(("device", "coordinator"), [(1, 3), (4, 1), (2, 4), (4, 2)])
def test_a_device_two_versions_apart_is_refused_with_words(monkeypatch, release_spec, device, coordinator):
    assignment, _ = rounds(release_spec)
    speak(monkeypatch, coordinator)
    asked = assignment.to_records()
    speak(monkeypatch, device)
    with pytest.raises(Refusal, match="too old") as refused:
        Assignment.from_records(asked)
    assert refused.value.code == "format"


def test_messages_beside_flower_and_invites_keep_the_same_rule(monkeypatch, tmp_path):
    speak(monkeypatch, 4)
    assert fleet.reply_object(b'{"format": 3, "new": 1}')["new"] == 1
    for found in (1, 5):
        with pytest.raises(DataError, match="too old"):
            fleet.reply_object(json.dumps({"format": found}).encode())
        (tmp_path / "invite.json").write_text(json.dumps({"format": found}))
        with pytest.raises(DataError, match="too old"):
            fleet.Invite.load(tmp_path / "invite.json")
    (tmp_path / "invite.json").write_text(json.dumps({"format": 2}))
    with pytest.raises(DataError, match="not an invite; look at"):  # read, and then found wanting
        fleet.Invite.load(tmp_path / "invite.json")


def test_a_devices_files_of_the_version_before_open_and_older_ones_say_so(monkeypatch, tmp_path):
    membership._write(tmp_path / "standing.json", {"called": "now"})
    speak(monkeypatch, 2)
    assert membership._read(tmp_path / "standing.json") == {"called": "now"}
    speak(monkeypatch, 4)
    with pytest.raises(StoreError, match="too old"):
        membership._read(tmp_path / "standing.json")


def test_a_spec_that_uses_nothing_new_is_what_an_earlier_version_reads(release_spec):
    text = release_spec().to_text()
    assert set(json.loads(text)) == {
        *("clip", "delta", "dtype", "epsilon", "extrapolation", "method", "model", "names", "noise"),
        *("noise_multiplier", "population", "recipe", "rounds", "run", "sampling_rate", "shapes", "source", "unit"),
        "witnesses",
    }
