"""Tests of secret sharing: any threshold of shares gives the secret back, fewer fit every secret."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.privacy import Randomness
from common.shamir import PRIME, SHARE_BYTES, join_shares, split_secret


def is_prime(number: int) -> bool:
    """Miller and Rabin's test with the first forty primes as bases; wrong with chance below 4^-40."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    bases = [base for base in range(2, 180) if all(base % small for small in range(2, base))][:40]
    for base in bases:
        value = pow(base, odd, number)
        if value not in (1, number - 1) and all((value := value * value % number) != number - 1 for _ in range(twos)):
            return False
    return True


def test_the_modulus_is_the_smallest_prime_above_every_secret():
    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range(2**256, PRIME))


@settings(max_examples=50, deadline=None)
@given(secret=st.binary(min_size=32, max_size=32), data=st.data(), count=st.integers(1, 30), seed=st.integers(0, 2**32))
def test_any_threshold_of_shares_joins_to_the_secret(secret, data, count, seed):
    points = data.draw(st.lists(st.integers(1, 2**16 - 1), min_size=count, max_size=count, unique=True))
    threshold = data.draw(st.integers(1, count))
    shares = split_secret(secret, points, threshold, Randomness.rehearsal(seed).bytes)
    kept = data.draw(st.permutations(points))[:threshold]
    assert join_shares({point: shares[point] for point in kept}) == secret
    # More shares than the threshold lie on the same polynomial.
    assert join_shares(shares) == secret


def naive_join(shares: dict[int, bytes]) -> int:
    """Lagrange's formula at zero, one inversion per factor."""
    total = 0
    for point, share in shares.items():
        term = int.from_bytes(share, "big")
        for other in shares:
            if other != point:
                term = term * other * pow(other - point, -1, PRIME) % PRIME
        total += term
    return total % PRIME


def test_joining_is_lagranges_formula():
    shares = split_secret(os.urandom(32), range(3, 15), 7, os.urandom)
    some = {point: shares[point] for point in (3, 4, 8, 9, 11, 13, 14)}
    assert int.from_bytes(join_shares(some), "big") == naive_join(some)


def test_fewer_shares_than_the_threshold_fit_every_secret_equally():
    shares = split_secret(bytes(32), range(1, 6), 4, os.urandom)
    for wanted in (0, 1, 2**256 - 1, int.from_bytes(os.urandom(32), "big")):
        # For any other secret there is one fourth share, at any point, that makes the three others join to it.
        three = {point: shares[point] for point in (1, 2, 5)}
        base = naive_join(three | {4: bytes(SHARE_BYTES)})
        weight = (naive_join(three | {4: (1).to_bytes(SHARE_BYTES, "big")}) - base) % PRIME
        fourth = (wanted - base) * pow(weight, -1, PRIME) % PRIME
        assert join_shares(three | {4: fourth.to_bytes(SHARE_BYTES, "big")}) == wanted.to_bytes(32, "big")


def test_a_share_alone_says_nothing_of_an_even_or_odd_secret():
    ones = [0, 0]
    for last in (0, 1):
        for at in range(2000):
            shares = split_secret(bytes(31) + bytes([last]), (1, 2), 2, Randomness.rehearsal(at, last).bytes)
            ones[last] += shares[1][-1] & 1
    assert all(abs(count - 1000) < 6 * 2000**0.5 / 2 for count in ones)


def test_too_few_or_forged_shares_do_not_join_to_the_secret():
    secret = os.urandom(32)
    shares = split_secret(secret, range(1, 10), 6, os.urandom)
    assert join_shares({point: shares[point] for point in range(1, 6)}) != secret
    forged = {point: shares[point] for point in range(1, 7)}
    forged[3] = bytes(SHARE_BYTES - 1) + bytes([shares[3][-1] ^ 1])
    assert join_shares(forged) != secret


@pytest.mark.parametrize(
    ("secret", "points", "threshold"),
    [
        (bytes(31), (1, 2), 2),
        (bytes(32), (0, 1), 2),
        (bytes(32), (1, 1), 2),
        (bytes(32), (1, 2**16), 2),
        (bytes(32), (1, 2), 3),
        (bytes(32), (1, 2), 0),
    ],
)
def test_what_cannot_be_shared_is_refused(secret, points, threshold):
    with pytest.raises(ValueError, match=r"secret|points|threshold"):
        split_secret(secret, points, threshold, os.urandom)


@pytest.mark.parametrize(
    "shares", [{}, {0: bytes(33)}, {1: bytes(32)}, {1: b"\xff" * 33}, {1: PRIME.to_bytes(33, "big")}]
)
def test_what_is_no_share_is_refused(shares):
    with pytest.raises(ValueError, match="share"):
        join_shares(shares)
