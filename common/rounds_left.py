"""How long a budget lasts: the rounds that still fit into it, and the weeks in which they go at a pace.

The planner asks before anything is spent, a device's owner afterwards; both mean the same by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from datetime import datetime

__all__ = ["pace_of", "rounds_left", "weeks_left"]

SECONDS_PER_WEEK = 7 * 24 * 3600.0


def rounds_left(fits: Callable[[int], bool], *, limit: int, known: int = 0) -> int:
    """Return the most rounds that fit, to within a hundredth and never too many; at most `limit`.

    Args:
        fits: Whether that many more rounds stay within the budget; false for all above one for which it is.
        limit: Where the search ends; a budget without an end has as many.
        known: So many are known to fit.
    """
    if known >= limit:
        return limit
    if not fits(known + 1):
        return known
    low, high = known + 1, 2 * (known + 1)
    while high <= limit and fits(high):
        low, high = high, high * 2
    if high > limit:
        if fits(limit):
            return limit
        high = limit
    while high - low > max(1, low // 100):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def weeks_left(rounds: int, per_week: float | None) -> float | None:
    """Return how many weeks `rounds` last at a pace; None without one.

    Raises:
        ValueError: The pace is no positive finite number.
    """
    if per_week is None:
        return None
    if not (per_week > 0 and math.isfinite(per_week)):
        raise ValueError("the rounds per week are a positive finite number")
    return rounds / per_week


def pace_of(times: Sequence[str]) -> float | None:
    """Return the releases per week from the first to the last of `times`, `2026-01-31T23:59:59Z`; None without two."""
    moments = [datetime.fromisoformat(time.replace("Z", "+00:00")).timestamp() for time in times]
    span = moments[-1] - moments[0] if moments else 0.0
    return (len(moments) - 1) / span * SECONDS_PER_WEEK if span > 0 else None
