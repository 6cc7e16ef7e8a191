"""Cohorts are Poisson over who is enrolled, and go to where those people live."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import ConfigError, DataError
from common.privacy import Randomness
from server.cohort import Roster

DEVICES = {2: ["aa"], 3: ["bb"], 4: ["cc"]}


def test_a_cohort_is_every_subject_by_a_coin_of_its_own():
    roster = Roster.of_hellos({2: []}, 200)
    sizes, joint, seen = [], 0, np.zeros(200)
    draws = 2000
    for draw in range(draws):
        cohort = roster.cohort(0.1, Randomness.rehearsal(draw))
        assert cohort == sorted(cohort, key=int)
        members = {int(name) for name in cohort}
        sizes.append(len(members))
        seen[list(members)] += 1
        joint += {0, 1} <= members
    # Binomial(200, 0.1): mean 20, variance 18; a cohort of fixed size would have no variance.
    assert np.mean(sizes) == pytest.approx(20, abs=0.5)
    assert np.var(sizes) == pytest.approx(18, rel=0.15)
    assert (np.abs(seen / draws - 0.1) < 5 * (0.09 / draws) ** 0.5).all()
    assert joint / draws == pytest.approx(0.01, abs=0.008)


def test_a_cohort_may_be_empty_or_everybody():
    roster = Roster.of_hellos({2: []}, 3)
    assert any(not roster.cohort(0.3, Randomness.rehearsal(seed)) for seed in range(30))
    assert roster.cohort(1.0, Randomness.rehearsal(0)) == ["0", "1", "2"]


@given(users=st.integers(0, 200), nodes=st.integers(1, 7), chunk=st.integers(1, 50))
def test_a_simulations_cohort_is_cut_into_chunks_that_are_shared_out_evenly(users, nodes, chunk):
    roster = Roster.of_hellos({node: [] for node in range(2, 2 + nodes)}, 1000)
    cohort = [str(number) for number in range(users)]
    placed = roster.place(cohort, chunk)
    assert [name for _, piece in placed for name in piece] == cohort
    assert all(0 < len(piece) <= chunk for _, piece in placed)
    loads = [sum(node == home for home, _ in placed) for node in roster.nodes]
    assert max(loads) - min(loads) <= 1


def test_devices_get_one_subject_each_whatever_the_chunk():
    roster = Roster.of_hellos(DEVICES, 3)
    assert roster.subjects == ["aa", "bb", "cc"]
    assert roster.place(["aa", "cc"], 8) == [(2, ("aa",)), (4, ("cc",))]


def test_nobody_is_enrolled_twice_and_nobody_at_all_is_an_error():
    with pytest.raises(ConfigError, match="two nodes"):
        Roster.of_hellos({2: ["aa"], 3: ["aa"]}, 2)
    with pytest.raises(ConfigError, match="no node answered"):
        Roster.of_hellos({}, 2)
    with pytest.raises(ConfigError, match="not a simulation"):
        Roster.of_hellos({2: []}, None)


def test_a_subject_whose_device_left_is_in_no_assignment_and_still_enrolled():
    roster = Roster.of_hellos(DEVICES, 3).followed({}, {2, 4})
    assert roster.subjects == ["aa", "bb", "cc"]
    assert roster.place(["aa", "bb", "cc"], 1) == [(2, ("aa",)), (4, ("cc",))]


def test_a_subject_is_followed_to_the_node_it_answers_from_now():
    roster = Roster.of_hellos(DEVICES, 3).followed({9: ["bb"]}, {2, 4, 9})
    assert roster.place(["bb"], 1) == [(9, ("bb",))]
    assert roster.nodes == (2, 4, 9)


def test_nobody_takes_over_a_subject_whose_node_is_there_or_that_two_claim_or_that_is_not_enrolled():
    roster = Roster.of_hellos(DEVICES, 3)
    claimed = roster.followed({9: ["aa", "bb", "dd"], 10: ["bb"]}, {2, 4, 9, 10})
    assert claimed.homes == {"aa": 2, "cc": 4}
    assert claimed.subjects == ["aa", "bb", "cc"]


def test_a_written_enrolment_wins_over_who_is_here():
    roster = Roster.of_hellos(DEVICES, 3).of(["bb", "zz"])
    assert list(roster.subjects) == ["bb", "zz"]
    assert roster.place(["bb", "zz"], 1) == [(3, ("bb",))]


def test_a_coordinators_roster_is_what_it_wrote_down_and_no_node_moves_a_subject(tmp_path):
    path = tmp_path / "homes.json"
    path.write_text(json.dumps({"homes": {"ada": 1, "bela": 2, "stranger": 3}}))
    roster = Roster.of_homes(path, ["ada", "bela", "cleo"], {1, 3, 4})
    assert (roster.subjects, dict(roster.homes), roster.nodes) == (["ada", "bela", "cleo"], {"ada": 1}, (1,))
    assert roster.place(["ada", "bela", "stranger"], 8) == [(1, ("ada",))]
    path.write_text("{")
    with pytest.raises(DataError):
        Roster.of_homes(path, ["ada"], {1})
