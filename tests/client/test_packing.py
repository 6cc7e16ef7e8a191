"""Records laid end to end: nothing is lost, nothing is padded but attention's rectangles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from client.packing import Segments, by_length, pack, passes, runs

CPU = torch.device("cpu")


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_spreading_and_collecting_is_the_identity(lengths, seed):
    segments = Segments(np.array(lengths), CPU)
    rows = torch.from_numpy(np.random.default_rng(seed).normal(size=(sum(lengths), 3)))
    assert torch.equal(segments.collect(segments.spread(rows)), rows)
    zeroed = segments.spread_zero(rows)
    assert torch.equal(segments.collect(zeroed), rows)
    assert zeroed.sum().item() == pytest.approx(rows.sum().item())
    for index, (length, start) in enumerate(zip(lengths, np.cumsum(lengths) - lengths, strict=True)):
        assert torch.equal(zeroed[index, :length], rows[start : start + length])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), users=st.integers(1, 6))
def test_every_token_and_label_of_a_pass_is_where_it_says(seed, users, random_examples):
    generator = np.random.default_rng(seed)
    sizes = [int(generator.integers(1, 5)) for _ in range(users)]
    rows = random_examples(generator, sum(sizes), shortest=3, longest=60)
    packed = pack(rows, sizes, CPU)
    assert packed.ids.tolist() == [int(token) for row in rows for token in row.ids]
    labels = [(r, p) for r, row in enumerate(rows) for p in range(row.first_label, len(row.ids))]
    assert packed.targets.tolist() == [int(rows[r].ids[p]) for r, p in labels]
    starts = np.cumsum([0, *(len(row.ids) for row in rows)])
    assert packed.positions.tolist() == [int(starts[r]) + p - 1 for r, p in labels]
    assert packed.label_records.tolist() == [r for r, _ in labels]
    sums = np.bincount(packed.label_records, packed.weights, len(rows))
    np.testing.assert_allclose(sums, 1.0)
    if packed.places is not None:
        flat = torch.cat([grid.tokens for grid in packed.grids])
        assert torch.equal(flat[packed.places], torch.arange(len(packed.ids)))


def test_ragged_records_are_padded_by_less_than_a_tenth_for_what_works_token_by_token(random_examples):
    rows = random_examples(np.random.default_rng(0), 64, shortest=4, longest=64)
    packed = pack(rows, [4] * 16, CPU)
    assert len(packed.ids) == sum(len(row.ids) for row in rows)  # none at all
    assert packed.padded_places < 1.5 * len(packed.ids) < len(rows) * 64


def test_passes_hold_whole_users_and_stay_within_their_tokens(random_examples):
    generator = np.random.default_rng(1)
    rows = random_examples(generator, 40, shortest=4, longest=20)
    owner = np.repeat(np.arange(10), 4)
    cut = passes(rows, owner, 100)
    assert [i for piece in cut for i in range(piece.start, piece.stop)] == list(range(40))
    for piece in cut:
        assert sum(len(row.ids) for row in rows[piece]) <= 100
        assert piece.start % 4 == 0
    alone = passes(rows, owner, 1)
    assert len(alone) == 40  # a record alone may be longer than a pass


def test_runs_name_owners_in_their_order():
    names, sizes = runs(np.array([2, 2, 3, 7, 7, 7]))
    assert names.tolist() == [2, 3, 7]
    assert sizes == [2, 1, 3]


def test_by_length_takes_every_record_once(random_examples):
    rows = random_examples(np.random.default_rng(2), 33)
    cut = by_length(rows, 50)
    assert sorted(int(i) for piece in cut for i in piece) == list(range(33))
    assert all(len(piece) * max(len(rows[i].ids) for i in piece) <= 50 for piece in cut)
