"""Tests of who masks with whom, and of the bound on what a coordinator can cut out of a graph."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats

from common.mask_graph import MAX_COHORT, honest_survivors, isolation_risk, needed, neighbours

TWO_THIRDS = Fraction(2, 3)
TENTH = Fraction(1, 10)


@pytest.mark.parametrize(
    ("devices", "threshold", "count"),
    [(3, TWO_THIRDS, 2), (9, TWO_THIRDS, 6), (100, TWO_THIRDS, 67), (100, Fraction(51, 100), 51), (4, Fraction(1), 4)],
)
def test_what_is_needed_is_exact(devices, threshold, count):
    assert needed(devices, threshold) == count


@pytest.mark.parametrize("devices", range(1, 200))
def test_two_groups_that_are_each_enough_share_an_honest_device(devices):
    colluding = math.floor(TENTH * devices)
    # Each group has at least this many honest devices, and there are no more than devices - colluding.
    assert 2 * (needed(devices, TWO_THIRDS) - colluding) > devices - colluding


def test_a_small_cohort_is_a_full_graph_and_a_large_one_is_not():
    assert [neighbours(devices, TWO_THIRDS, TENTH) for devices in (3, 100, 128)] == [2, 99, 127]
    assert neighbours(1000, TWO_THIRDS, TENTH) < 100
    assert neighbours(MAX_COHORT, TWO_THIRDS, TENTH) < 120


@pytest.mark.parametrize("devices", [129, 200, 500, 1000])
@pytest.mark.parametrize("corrupt", [Fraction(0), TENTH, Fraction(1, 4)])
def test_a_graph_that_is_not_full_meets_both_of_its_bounds(devices, corrupt):
    degree = neighbours(devices, TWO_THIRDS, corrupt)
    assert isolation_risk(devices, degree, TWO_THIRDS, corrupt) <= 2.0**-40
    dropped = math.floor(0.15 * devices)
    spare = degree + 1 - needed(degree + 1, TWO_THIRDS)
    assert devices * stats.hypergeom(devices - 1, dropped, degree).sf(spare) <= 1e-2 * (1 + 1e-9)


def test_a_sparser_graph_is_never_safer():
    risks = [isolation_risk(300, degree, TWO_THIRDS, TENTH) for degree in (12, 24, 36, 48, 60, 72)]
    assert risks == sorted(risks, reverse=True)
    assert risks[0] == 1.0 > risks[-1] > 0


def smallest_group(devices: int, degree: int, corrupt: Fraction, generator) -> int:
    """Draw a graph, and return the smallest group of honest survivors that the best attacker can single out.

    Tries every set of survivors and every group among them: no honest edge out of it, and self masks that join.
    """
    colluding = math.floor(corrupt * devices)
    honest = range(devices - colluding)
    drawn = [
        {int(other) + (int(other) >= one) for other in generator.choice(devices - 1, degree, replace=False)}
        for one in honest
    ]
    least = needed(degree + 1, TWO_THIRDS)
    wanted = needed(devices, TWO_THIRDS) - colluding
    faithless = set(range(devices - colluding, devices))
    best = len(honest)
    for size in range(1, wanted):
        for group in itertools.combinations(honest, size):
            inside = set(group)
            if any(len(drawn[one] & (inside | faithless)) + 1 < least for one in group):
                continue
            # Whoever a member drew outside the group has to be dropped; enough others must be left.
            outside = set(honest) - inside
            left = outside - set().union(*(drawn[one] for one in group))
            if len(left) + size >= wanted:
                return size
    return best


@pytest.mark.parametrize(("degree", "bound"), [(2, 1.0), (4, 0.56), (7, 0.01)])
def test_the_bound_is_above_what_an_attacker_finds_in_small_graphs(degree, bound):
    generator = np.random.default_rng(degree)
    devices, corrupt, graphs = 12, Fraction(0), 150
    found = sum(smallest_group(devices, degree, corrupt, generator) < 8 for _ in range(graphs))
    assert isolation_risk(devices, degree, TWO_THIRDS, corrupt) <= bound
    assert found <= graphs * bound + 4 * math.sqrt(graphs * bound)
    assert found > 0 or degree > 2  # the attacker is not a straw man


def test_honest_survivors_are_those_needed_less_those_that_collude():
    assert honest_survivors(100, TWO_THIRDS, TENTH) == 57
    assert honest_survivors(1000, TWO_THIRDS, TENTH) == 667 - 100 - 20


@pytest.mark.parametrize(
    ("devices", "threshold", "corrupt"),
    [
        (0, TWO_THIRDS, TENTH),
        (MAX_COHORT + 1, TWO_THIRDS, TENTH),
        (10, Fraction(1, 2), TENTH),
        (10, TWO_THIRDS, Fraction(1, 3)),
        (10, Fraction(51, 100), TENTH),
    ],
)
def test_a_threshold_that_collusion_defeats_is_refused(devices, threshold, corrupt):
    with pytest.raises(ValueError, match=r"a round has|the threshold is"):
        neighbours(devices, threshold, corrupt)
