"""Shamir's secret sharing: 32 secret bytes become shares of which any `threshold` give them back and fewer say nothing.

Source: Shamir (1979), "How to share a secret". The field is that of the integers modulo 2^256 + 297, the smallest
prime above 2^256, so that every 32-byte secret is an element and a share is 33 bytes.

Proof sketch. A polynomial of degree below `threshold` whose other coefficients are uniform takes, at any
`threshold` - 1 points but zero, values that are uniform and independent of the secret: for every secret there is
exactly one such polynomial through them. Test: `test_fewer_shares_than_the_threshold_fit_every_secret_equally`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache

__all__ = ["PRIME", "SECRET_BYTES", "SHARE_BYTES", "join_shares", "split_secret"]

PRIME = 2**256 + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
MAX_POINT = 2**16


def split_secret(
    secret: bytes, points: Iterable[int], threshold: int, random_bytes: Callable[[int], bytes]
) -> dict[int, bytes]:
    """Return one 33-byte share of `secret`, 32 bytes, for each of `points`.

    Args:
        secret: What to share.
        points: Who gets a share, as distinct whole numbers from 1.
        threshold: Shares that are needed to join; at most the number of points.
        random_bytes: A secure source, such as `Randomness.system().bytes`.

    Guarantee: any `threshold` - 1 shares are independent of the secret.

    Raises:
        ValueError: A secret of another length, points that repeat or are out of range, or a threshold out of range.
    """
    listed = list(points)
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, found {len(secret)}")
    if len(set(listed)) != len(listed) or not all(0 < point < MAX_POINT for point in listed):
        raise ValueError("the points are distinct whole numbers from 1")
    if not 1 <= threshold <= len(listed):
        raise ValueError("the threshold is between 1 and the number of points")
    coefficients = [_element(random_bytes) for _ in range(threshold - 1)]
    constant = int.from_bytes(secret, "big")
    shares: dict[int, bytes] = {}
    for point in listed:
        value = 0
        for coefficient in coefficients:  # Horner's rule, highest power first
            value = (value + coefficient) * point % PRIME
        shares[point] = ((value + constant) % PRIME).to_bytes(SHARE_BYTES, "big")
    return shares


def join_shares(shares: Mapping[int, bytes]) -> bytes | None:
    """Return the secret that exactly threshold-many `shares`, by point, were split from.

    Fewer shares, or a forged one, give another secret, or None where the result is no 32-byte secret: whoever joins
    must be able to tell the right one, by a public key or a commitment.

    Raises:
        ValueError: No share, a point out of range, or a share that is no element of the field.
    """
    points = tuple(sorted(shares))
    if not points or not all(0 < point < MAX_POINT for point in points):
        raise ValueError("shares are given by points from 1")
    total = 0
    for point, weight in zip(points, _weights(points), strict=True):
        value = int.from_bytes(shares[point], "big")
        if len(shares[point]) != SHARE_BYTES or value >= PRIME:
            raise ValueError("a share is not an element of the field")
        total += weight * value
    secret = total % PRIME
    return secret.to_bytes(SECRET_BYTES, "big") if secret < 2**256 else None


@lru_cache(maxsize=64)
def _weights(points: tuple[int, ...]) -> tuple[int, ...]:
    """Return Lagrange's weights at zero: the product over other points j of j / (j - i), modulo the prime."""
    tops: list[int] = []
    bottoms: list[int] = []
    product = 1
    for point in points:
        product = product * point % PRIME
    for point in points:
        bottom = point
        for other in points:
            if other != point:
                bottom = bottom * (other - point) % PRIME
        bottoms.append(bottom)
    # One inversion for all (Montgomery): prefix products, then backwards.
    prefixes = [1]
    for bottom in bottoms:
        prefixes.append(prefixes[-1] * bottom % PRIME)
    inverse = pow(prefixes[-1], -1, PRIME)
    for index in range(len(points) - 1, -1, -1):
        tops.append(product * prefixes[index] % PRIME * inverse % PRIME)
        inverse = inverse * bottoms[index] % PRIME
    return tuple(reversed(tops))


def _element(random_bytes: Callable[[int], bytes]) -> int:
    """Draw a uniform element of the field by rejection."""
    while True:
        # 257 bits of 33 bytes: about half are below the prime.
        value = int.from_bytes(random_bytes(SHARE_BYTES), "big") >> 7
        if value < PRIME:
            return value
