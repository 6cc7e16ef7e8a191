"""What a device keeps between rounds: it comes back, from before the round that is asked again, and is sealed."""

from __future__ import annotations

import numpy as np
import pytest

from client.adapter_store import AdapterStore
from client.round_states import FolderStates, ShortMemory, StoredStates

KEY = bytes(range(32))
RUN = "ab" * 16


def vectors(value, users=2):
    return np.full((users, 3), value, np.float32)


@pytest.fixture(params=["memory", "folder", "store"])
def states(request, tmp_path):
    if request.param == "memory":
        return ShortMemory()
    if request.param == "folder":
        return FolderStates(tmp_path / "states", KEY)
    return StoredStates(lambda: AdapterStore(tmp_path / "kept.sqlite", KEY, keep_versions=2), "cd" * 32)


def test_nothing_is_kept_at_first_and_then_what_was_kept_comes_back(states):
    assert states.before(RUN, 1, ["ada", "bob"]) == [None, None]
    states.keep(RUN, 1, ["ada"], vectors(1.5, 1))
    ada, bob = states.before(RUN, 2, ["ada", "bob"])
    assert ada.tolist() == [1.5, 1.5, 1.5]
    assert bob is None
    assert states.before("cd" * 16, 2, ["ada"]) == [None]


def test_a_round_that_is_answered_again_starts_from_before_it(states):
    states.keep(RUN, 1, ["ada", "bob"], vectors(1))
    states.keep(RUN, 4, ["ada", "bob"], vectors(4))
    assert [kept[0] for kept in states.before(RUN, 4, ["ada", "bob"])] == [1, 1]
    states.keep(RUN, 4, ["ada", "bob"], vectors(5))
    assert [kept[0] for kept in states.before(RUN, 5, ["ada", "bob"])] == [5, 5]


def test_files_of_simulated_devices_show_neither_names_nor_numbers_and_a_changed_one_is_nothing(tmp_path):
    states = FolderStates(tmp_path, KEY)
    states.keep(RUN, 1, ["ada-lovelace"], vectors(1.25, 1))
    (path,) = (tmp_path / RUN).iterdir()
    content = path.read_bytes()
    assert b"ada" not in content
    assert "ada" not in path.name
    assert vectors(1.25, 1).tobytes() not in content
    assert (tmp_path / RUN).stat().st_mode & 0o077 == 0
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert states.before(RUN, 2, ["ada-lovelace"]) == [None]
    path.write_bytes(content)
    assert FolderStates(tmp_path, bytes(32)).before(RUN, 2, ["ada-lovelace"]) == [None]


def test_one_users_state_is_not_taken_for_anothers(tmp_path):
    states = FolderStates(tmp_path, KEY)
    states.keep(RUN, 1, ["ada", "bob"], vectors(1))
    ada, bob = (states._path(RUN, name) for name in ("ada", "bob"))
    ada.replace(bob)
    assert states.before(RUN, 2, ["ada", "bob"]) == [None, None]
