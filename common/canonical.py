"""Canonical JSON (RFC 8785): one value, one text, so that a hash or a signature over it means the value.

The written rule for numbers, which everything signed or hashed here follows:

- finite floats as RFC 8785 says: the shortest text that reads back to the same double. So 1.0 is written `1`, and
  a reader takes an int or a float wherever it expects a number;
- minus zero is `0`; NaN is refused;
- infinities are the strings `inf` and `-inf`;
- integers beyond 2**53 - 1 either way are strings of decimal digits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import rfc8785

__all__ = ["SAFE_INTEGER", "canonical", "canonical_digest", "read_canonical"]

SAFE_INTEGER = 2**53 - 1


def canonical(value: Any) -> bytes:
    """Return the canonical JSON of `value`.

    Raises:
        ValueError: NaN, a key that is no string, text that is not Unicode, or a type that JSON does not have.
    """
    return rfc8785.dumps(_plain(value))


def canonical_digest(value: Any) -> str:
    """Return SHA-256 over the canonical JSON of `value`, 64 hex digits."""
    return hashlib.sha256(canonical(value)).hexdigest()


def read_canonical(text: bytes) -> Any:
    """Return the value that `text` is the canonical JSON of.

    Raises:
        ValueError: It is not JSON, or not canonical: another order, other spaces, a key twice, another way to write
            a number or a character.
        RecursionError: It is nested deeper than this interpreter reads.
    """
    try:
        value: Any = json.loads(text.decode(), parse_int=_whole, parse_constant=_no_constant)
    except ValueError:
        raise ValueError("not JSON") from None
    try:
        same = rfc8785.dumps(value) == text
    except rfc8785.CanonicalizationError:
        same = False
    if not same:
        raise ValueError("not in canonical form")
    return value


def _whole(text: str) -> int | float:
    # RFC 8785 writes 1e16 as 10000000000000000; it is a double there, and has to be one here.
    number = int(text)
    return number if -SAFE_INTEGER <= number <= SAFE_INTEGER else float(text)


def _no_constant(_: str) -> float:
    raise ValueError("not JSON")


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if math.isnan(value):
            raise ValueError("NaN has no canonical form")
        return ("inf" if value > 0 else "-inf") if math.isinf(value) else value
    if isinstance(value, int) and not isinstance(value, bool):
        return value if -SAFE_INTEGER <= value <= SAFE_INTEGER else str(value)
    if isinstance(value, Mapping):
        items = cast(Mapping[Any, Any], value)
        if not all(isinstance(key, str) for key in items):
            raise ValueError("keys of a JSON object are strings")
        return {key: _plain(part) for key, part in items.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in cast(Sequence[Any], value)]
    if value is None or isinstance(value, bool | str):
        return value
    raise ValueError(f"JSON has no {type(value).__name__}")
