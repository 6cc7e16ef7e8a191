"""The Flower ClientApp: a shim. A Flower message comes in, the vault is asked, its answer goes out.

A SuperNode runs whatever bundle the server sends, and starts a new process for every message. So nothing here is
trusted and nothing here touches data, torch or keys: the vault is another process that the owner started, and this
file can only ask it.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from common.errors import Refusal
from common.sum_wire import SumLetters
from common.wire import Assignment, Release, refusal_records

__all__ = ["FleetVault", "app", "build"]


class FleetVault(Protocol):
    """What the bundle may ask a vault for; a closed list."""

    def subjects(self) -> Sequence[str]:
        """Who lives here: one subject id on a device; a simulation answers with nobody and takes any number."""
        ...

    def train(self, assignment: Assignment) -> Release:
        """Train the assigned users and give back what the gate let through."""
        ...

    def join(self, assignment: Assignment) -> SumLetters:
        """Train the assigned users, begin a secure sum, and give back their keys of the round."""
        ...

    def answer(self, asked: SumLetters) -> SumLetters:
        """Answer letters of a secure sum."""
        ...


def build(connect: Callable[[Context], FleetVault]) -> ClientApp:
    """Make the app over a way to reach the vault: a socket on a device, the vault itself in a simulation."""
    shim = ClientApp()

    @shim.query("hello")
    def hello(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        return _answer(
            message,
            lambda: RecordDict({"hello": ConfigRecord({"subjects": list(connect(context).subjects())})}),
        )

    @shim.train()
    def train(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        return _answer(message, lambda: _trained(connect(context), Assignment.from_records(message.content)))

    @shim.train("sum")
    def sum_up(message: Message, context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        asked = SumLetters.from_records
        return _answer(message, lambda: connect(context).answer(asked(message.content)).to_records())

    return shim


def _trained(vault: FleetVault, assignment: Assignment) -> RecordDict:
    if assignment.spec.noise == "distributed" and not assignment.devices:
        return vault.join(assignment).to_records()
    return vault.train(assignment).to_records()


def _answer(message: Message, work: Callable[[], RecordDict]) -> Message:
    """Answer with what `work` returns, or with a code; an exception's text would leave the device, so it never does."""
    try:
        content = work()
    except Refusal as refusal:
        content = refusal_records(refusal.code)
    except Exception:
        if os.environ.get("HOMESPUN_DEBUG") == "1":
            traceback.print_exc()  # on this machine's standard error, whose owner asked for it
        content = refusal_records("failed")
    return Message(content, reply_to=message)


def _connect_to_socket(context: Context) -> FleetVault:
    """Reach the vault of this device over its local socket, named by the node's configuration."""
    from client.vault_stub import SocketVault

    return SocketVault.from_node_config(dict(context.node_config))


app = build(_connect_to_socket)
