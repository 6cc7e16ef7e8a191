"""Flower's SuperNode under our launcher; that it works is what the flower tier is for."""

from __future__ import annotations

import asyncio
import sys

import flwr.supernode.cli
import pytest
import uvicorn

from client.supernode import run_node


class Ends(Exception):
    """Flower's own program would run now."""


def test_flowers_supernode_is_run_as_it_is_but_for_how_often_its_web_server_wakes(monkeypatch):
    began = []

    def program():
        began.append(list(sys.argv))
        raise Ends

    waited, turns = [], []

    async def sleep(seconds):
        waited.append(seconds)

    class Server(uvicorn.Server):
        async def on_tick(self, counter):
            turns.append(counter)
            return len(turns) == 4

    monkeypatch.setattr(flwr.supernode.cli, "flower_supernode", program)
    monkeypatch.setattr(uvicorn.Server, "main_loop", uvicorn.Server.main_loop)
    monkeypatch.setattr(sys, "argv", ["-c"])
    monkeypatch.setattr(sys, "path", ["ours", *sys.path])
    with pytest.raises(Ends):
        run_node("/bin/flower-supernode", "--superlink", "here:1")
    assert "ours" not in sys.path
    assert began == [["/bin/flower-supernode", "--superlink", "here:1"]]
    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(Server(uvicorn.Config("none:app")).main_loop())
    assert turns == [0, 10, 20, 30]  # every one of them renews the date, as uvicorn's tenth does
    assert waited == [1.0, 1.0, 1.0]
