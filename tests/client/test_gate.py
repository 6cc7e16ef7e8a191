"""The door: what may pass, what is written down before it does, and that a refusal leaves no trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client.gate import Gate
from common.errors import GateRefused
from common.privacy import Randomness, clip_rows
from common.wire import receipt_digest


def short(count: int = 1) -> np.ndarray:
    return np.full((count, 6), 0.1, np.float32)


class Book:
    """A record that keeps what it was given, and can fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.receipts, self._error = [], error

    def __call__(self, spec, receipt):
        if self._error is not None:
            raise self._error
        self.receipts.append((spec, receipt))


def test_one_users_update_leaves_byte_for_byte(release_spec):
    update = np.linspace(-0.4, 0.4, 6).astype(np.float32)
    release = Gate().release(update[None], release_spec(), 1)
    assert release.total.tobytes() == update.tobytes()
    assert release.total.dtype == np.float32
    assert release.users == 1


def test_a_chunk_leaves_as_its_sum_in_float64(release_spec):
    updates = np.stack([short()[0], -2 * short()[0], short()[0] / 3])
    release = Gate().release(updates, release_spec(), 1)
    assert release.total.dtype == np.float64
    np.testing.assert_allclose(release.total, updates.astype(np.float64).sum(axis=0), rtol=0, atol=1e-16)
    assert release.users == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e38, 1.001])
def test_an_update_that_is_not_finite_or_too_long_does_not_leave(release_spec, bad):
    book = Book()
    for row in range(3):
        updates = short(3)
        updates[row, 4] = bad
        with pytest.raises(GateRefused):
            Gate(book).release(updates, release_spec(), 1)
    assert book.receipts == []


@pytest.mark.parametrize(
    "updates",
    [
        np.zeros((1, 5), np.float32),
        np.zeros((1, 7), np.float32),
        np.zeros((6,), np.float32),
        np.zeros((1, 1, 6), np.float32),
        np.zeros((0, 6), np.float32),
        np.zeros((1, 6), np.float64),
        np.zeros((1, 6), np.float16),
        np.zeros((1, 6), np.int32),
        np.zeros((1, 6), np.complex64),
        np.array([[None] * 6]),
    ],
)
def test_another_shape_or_type_does_not_leave(release_spec, updates):
    book = Book()
    with pytest.raises(GateRefused):
        Gate(book).release(updates, release_spec(), 1)
    assert book.receipts == []


@pytest.mark.parametrize("dtype", ["float64", "object", "int8", "bfloat16"])
def test_a_type_that_the_gate_does_not_know_cannot_leave(release_spec, dtype):
    with pytest.raises(GateRefused):
        Gate().release(short(), release_spec(dtype=dtype), 1)


def test_the_bound_is_that_of_the_whole_update_not_of_a_tensor(release_spec):
    spec = release_spec(clip=1.0)
    each = np.zeros((1, 6), np.float32)
    each[0, 0] = each[0, 5] = 0.9  # two tensors, each inside the clip on its own
    with pytest.raises(GateRefused):
        Gate().release(each, spec, 1)


def test_a_zero_update_leaves_like_any_other(release_spec):
    release = Gate().release(np.zeros((1, 6), np.float32), release_spec(), 1)
    assert release.users == 1
    assert not release.total.any()


def test_the_receipt_is_written_before_anything_leaves_and_is_of_these_bytes(release_spec):
    book, spec = Book(), release_spec()
    release = Gate(book).release(short(), spec, 3)
    ((seen, receipt),) = book.receipts
    assert seen == spec
    assert receipt["sha256"] == release.receipt == receipt_digest(release.total, spec, 3, 1)
    assert (receipt["run"], receipt["round"], receipt["spec"]) == (spec.run, 3, spec.digest)
    assert (receipt["names"], receipt["shapes"]) == (list(spec.names), [[1, 4], [2, 1]])
    assert (receipt["dtype"], receipt["bytes"]) == ("float32", 24)


def test_what_cannot_be_written_down_does_not_leave(release_spec):
    with pytest.raises(OSError, match="full"):
        Gate(Book(OSError("full"))).release(short(), release_spec(), 1)


def test_witness_numbers_are_zero_and_listed(release_spec):
    book, spec = Book(), release_spec(witnesses=3)
    release = Gate(book).release(short(), spec, 1)
    assert release.total.shape == (9,)
    assert not release.total[6:].any()
    (_, receipt) = book.receipts[0]
    assert receipt["names"][-1] == "noise_witness"
    assert receipt["shapes"][-1] == [3]


def test_local_noise_covers_everything_that_leaves_and_nothing_leaves_without_it(release_spec):
    spec = release_spec(noise="local", witnesses=2000, noise_multiplier=0.75, clip=2.0)
    with pytest.raises(GateRefused):
        Gate().release(short(), spec, 1)
    release = Gate().release(short(), spec, 1, Randomness.rehearsal(1))
    # Sensitivity under replacement is twice the clip: 0.75 x 2 x 2.
    assert release.total[6:].std() == pytest.approx(3.0, rel=0.1)
    assert (release.total[:6] != short()[0]).all()
    again = Gate().release(short(), spec, 1, Randomness.rehearsal(2))
    assert (again.total != release.total).all()


@given(
    updates=arrays(np.float64, (3, 6), elements=st.floats(-1e300, 1e300)),
    clip=st.floats(1e-6, 1e6),
)
def test_whatever_was_clipped_passes_and_is_inside_the_bound(release_spec, updates, clip):
    release = Gate().release(clip_rows(updates, clip), release_spec(clip=clip), 1)
    assert np.isfinite(release.total).all()
    assert np.linalg.norm(release.total) <= 3 * clip * (1 + 1e-12)


class Obliging(np.ndarray):
    """Says of itself what is wanted to be heard."""

    def astype(self, *_, **__):
        return np.zeros(self.shape)


@pytest.mark.parametrize(
    "odd",
    [
        [[0.1] * 6],
        memoryview(short()),
        short().astype(">f4"),
        short().astype(object),
        np.array([["secret"] * 6], object),
        np.ma.masked_array(short(), mask=True),
        (9 * short()).view(Obliging),
        np.zeros((1, 6), [("a", "<f4")]),
    ],
    ids=["list", "memoryview", "big-endian", "object", "text", "masked", "subclass", "structured"],
)
def test_what_is_no_plain_array_of_the_specs_numbers_does_not_leave(release_spec, odd):
    book = Book()
    with pytest.raises(GateRefused):
        Gate(book).release(odd, release_spec(), 1)
    assert book.receipts == []


def test_how_an_array_lies_in_memory_and_the_sign_of_zeros_do_not_leave(release_spec):
    plain = np.array([[0.1, 0.0, -0.2, 0.0, 0.3, 0.0]], np.float32)
    signed = np.where(plain == 0, np.float32(-0.0), plain)
    spaced = np.zeros((1, 12), np.float32)
    spaced[:, ::2] = plain
    sent = {Gate().release(one, release_spec(), 1).total.tobytes() for one in (plain, signed, spaced[:, ::2])}
    assert len(sent) == 1
