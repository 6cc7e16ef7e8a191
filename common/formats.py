"""Format numbers, and how two versions that differ by one talk to each other without asking.

Every message and file carries the number of its format. Whoever writes for others writes the format before its newest,
as long as there was one; whoever reads takes its newest and the two before. So a version that brings format n writes
n - 1, the next one writes n, and a device and a coordinator that are one minor version apart understand each other
whichever of them is older. Two apart, they say so in words, and nothing of the message is looked at. A field that came
later is left out of a message while it says nothing.
"""

from __future__ import annotations

from typing import Any

__all__ = ["oldest", "readable", "said", "written"]


def written(newest: int) -> int:
    """The format that is written by a version whose newest is `newest`."""
    return max(1, newest - 1)


def oldest(newest: int) -> int:
    """The oldest format that such a version reads: what the version before it writes."""
    return max(1, newest - 2)


def readable(found: Any, newest: int) -> bool:
    """Whether a version whose newest format is `newest` reads format `found`."""
    return isinstance(found, int) and not isinstance(found, bool) and oldest(newest) <= found <= newest


def said(found: Any, newest: int, what: str) -> str:
    """Why format `found` is not read, and who has to be updated."""
    reads = ", ".join(str(number) for number in range(oldest(newest), newest + 1))
    if not isinstance(found, int) or isinstance(found, bool):
        return f"{what} names no format; this version reads {reads}"
    who = "this side is too old: update it" if found > newest else "whoever wrote it is too old: update that side"
    return f"{what} is of format {found}, this version reads {reads}; {who}"
