"""What a device keeps between rounds: it comes back, from before the round that is asked again, and is sealed."""

from __future__ import annotations

import numpy as np
import pytest

from client.adapter_store import AdapterStore
from client.round_states import ShortMemory, StoredStates

KEY = bytes(range(32))
RUN = "ab" * 16


def vectors(value, users=2):
    return np.full((users, 3), value, np.float32)


@pytest.fixture(params=["memory", "store"])
def states(request, tmp_path):
    if request.param == "memory":
        return ShortMemory()
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
