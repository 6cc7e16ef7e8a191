"""Numbers as people read them: with their unit, no more digits than they carry, and a real minus sign."""

from __future__ import annotations

import math

from common.evaluation import Interval

__all__ = ["duration", "number", "p_value", "percent", "rounded_up", "signed", "size"]

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"


def number(value: float, digits: int = 3) -> str:
    """Write `value`, or a dash where it is not one."""
    if not math.isfinite(value):
        return DASH
    text = f"{abs(value):,.{digits}f}"
    return MINUS + text if value < 0 and float(text.replace(",", "")) else text


def signed(value: float | Interval, digits: int = 3) -> str:
    """Write a difference with its sign; of an interval, its two ends."""
    if isinstance(value, Interval):
        return f"{signed(value.low, digits)} to {signed(value.high, digits)}" if math.isfinite(value.low) else DASH
    text = number(value, digits)
    return (
        text if not math.isfinite(value) or text.startswith(MINUS) or not float(text.replace(",", "")) else f"+{text}"
    )


def percent(share: float | Interval) -> str:
    """Write a share of 0 to 1; what is neither none nor all never reads as 0% or 100%. Of an interval, its two ends."""
    if isinstance(share, Interval):
        if not math.isfinite(share.low):
            return DASH
        low, high = percent(share.low), percent(share.high)
        return (
            f"{low.rstrip('%') if low[0] not in '<>' and high[0] != '>' else low}{DASH}{high}" if low != high else low
        )
    if not math.isfinite(share):
        return DASH
    if 0.0 < share < 0.01:
        return "<1%"
    return ">99%" if 0.99 < share < 1.0 else f"{100.0 * share:.0f}%"


def rounded_up(epsilon: float) -> str:
    """Write epsilon with two decimals, never less than it is."""
    scaled = epsilon * 100.0
    nearest = round(scaled)
    # a value calibrated to 8 may come back as 8.0000000000001
    whole = nearest if nearest and abs(scaled - nearest) < 1e-9 * scaled else math.ceil(scaled)
    return f"{whole / 100.0:.2f}"


def size(octets: float) -> str:
    """Write bytes in the decimal unit that leaves one to three digits before the point."""
    value, unit = float(octets), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if abs(value) >= 999.5:
            value, unit = value / 1000.0, larger
    digits = 0 if unit == "bytes" or value >= 99.95 else 1
    return f"{value:,.{digits}f} {unit}"


def duration(seconds: float) -> str:
    """Write a time in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def p_value(value: float) -> str:
    """Write a p-value, which is never zero."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"
