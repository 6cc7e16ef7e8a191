"""Flower's SuperNode, run as it is but for how often its web server wakes.

uvicorn asks itself ten times a second whether it should end. That was most of what an idle device took of a processor.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import uvicorn

__all__ = ["run_node"]


def run_node(*command: str) -> None:
    """Be Flower's SuperNode, `command`, in this process; its web server wakes once a second.

    Args:
        command: The program, as `sys.argv[0]`, and its arguments.
    """
    import uvicorn

    sys.path.pop(0)  # what whoever started this put there: nothing of ours is in Flower's way
    sys.argv = list(command)
    if hasattr(uvicorn.Server, "main_loop") and hasattr(uvicorn.Server, "on_tick"):
        uvicorn.Server.main_loop = _slow_loop
    from flwr.supernode.cli import flower_supernode

    flower_supernode()


async def _slow_loop(self: uvicorn.Server) -> None:
    """Do as its own loop does every tenth time, which is when it renews the date."""
    turn = 0
    while not await self.on_tick(turn):
        turn += 10
        await asyncio.sleep(1.0)
