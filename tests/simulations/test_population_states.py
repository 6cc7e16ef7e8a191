"""One file for what a population keeps: it says what the protocol says, and holds against tampering."""

from __future__ import annotations

import multiprocessing
import sqlite3

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.round_states import ShortMemory
from simulations.population_states import FILE, PopulationStates

KEY = bytes(range(32))
RUN = "ab" * 16


@pytest.fixture
def states(tmp_path):
    own = PopulationStates(tmp_path, KEY)
    yield own
    own.close()


def rows(*values):
    return np.array([[value, -value] for value in values], np.float32)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(1, 6), st.sets(st.sampled_from("abcd"), min_size=1)), min_size=1, max_size=8)
)
def test_it_answers_as_memory_does(steps, tmp_path_factory):
    states, memory = PopulationStates(tmp_path_factory.mktemp("states"), KEY), ShortMemory()
    for value, (number, users) in enumerate(sorted(steps, key=lambda step: step[0])):
        kept = rows(*(value + index for index in range(len(users))))
        for each in (states, memory):
            each.keep(RUN, number, sorted(users), kept)
        for asked in (number, number + 1):
            ours, theirs = (each.before(RUN, asked, list("abcd")) for each in (states, memory))
            assert [None if one is None else one.tolist() for one in ours] == [
                None if one is None else one.tolist() for one in theirs
            ]
    states.close()


def test_a_round_that_is_answered_again_starts_from_before_it(states):
    states.keep(RUN, 1, ["u"], rows(1))
    states.keep(RUN, 2, ["u"], rows(2))
    states.keep(RUN, 2, ["u"], rows(3))
    assert states.before(RUN, 2, ["u"])[0].tolist() == [1, -1]
    assert states.before(RUN, 3, ["u"])[0].tolist() == [3, -3]


def test_what_is_kept_outlives_the_process_and_other_runs_do_not_see_it(states, tmp_path):
    states.keep(RUN, 1, ["u"], rows(5))
    again = PopulationStates(tmp_path, KEY)
    assert again.before(RUN, 2, ["u", "v"])[0].tolist() == [5, -5]
    assert again.before("cd" * 16, 2, ["u"]) == [None]
    again.close()
    stranger = PopulationStates(tmp_path, bytes(32))
    assert stranger.before(RUN, 2, ["u"]) == [None]
    stranger.close()


def test_a_changed_or_moved_row_is_nothing_kept(states, tmp_path):
    states.keep(RUN, 1, ["u", "v"], rows(1, 2))
    states.close()
    path = tmp_path / RUN / FILE
    assert path.stat().st_mode & 0o077 == 0
    with sqlite3.connect(path) as database:
        (one, first), (other, second) = database.execute("SELECT user, sealed FROM kept").fetchall()
        database.execute("UPDATE kept SET sealed = ? WHERE user = ?", (second, one))
        database.execute("UPDATE kept SET sealed = ? WHERE user = ?", (first[:-1] + bytes([first[-1] ^ 1]), other))
    database.close()
    assert states.before(RUN, 2, ["u", "v"]) == [None, None]
    assert b"\x00\x00\x80?" not in path.read_bytes()  # 1.0 in the clear


def _write(folder, first):
    states = PopulationStates(folder, KEY)
    for number in range(1, 4):
        states.keep(RUN, number, [str(first + user) for user in range(20)], rows(*range(20)) + number)
    states.close()


def test_worker_processes_share_the_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(tmp_path, first)) for first in (0, 100)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    states = PopulationStates(tmp_path, KEY)
    assert all(one is not None for one in states.before(RUN, 4, [str(user) for user in (*range(20), *range(100, 120))]))
    states.close()


def test_memory_and_opening_do_not_grow_with_the_population(states, tmp_path):
    for start in range(0, 5000, 500):
        states.keep(RUN, 1, [str(start + user) for user in range(500)], np.zeros((500, 64), np.float32))
    states.close()
    again = PopulationStates(tmp_path, KEY)
    assert again.before(RUN, 2, ["4999"])[0].shape == (64,)
    (used,) = again._open[RUN].execute("PRAGMA cache_size").fetchone()
    assert used == -4096  # KiB, whatever the file's size
    again.close()
