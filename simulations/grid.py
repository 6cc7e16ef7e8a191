"""Flower's Grid without a network: the same ServerApp and ClientApp objects, in this process and its workers.

Flower's own engine (Ray) costs milliseconds per client and seconds per start; the apps do not see the difference.
What is passed on is a copy, so that no node can change what another receives. Three of Flower's names used here are
not public: they stand in this file only, and a test against Flower's own engine holds them.
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

__all__ = ["InProcessGrid", "assume_identity", "node_context"]

SERVER_NODE = 1
RUN_ID = 1


def assume_identity(node: int) -> None:
    """Tell Flower which task this process plays; messages cannot be made without it."""
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, RUN_ID, node


def node_context(node: int, nodes: int) -> Context:
    """The context of one simulated node; it carries no state, because no state of a user is Flower's to hold."""
    return Context(
        run_id=RUN_ID,
        node_id=node,
        node_config={"partition-id": node - SERVER_NODE - 1, "num-partitions": nodes},
        state=RecordDict(),
        run_config={},
    )


def answer(client_app: ClientApp, message: Message, nodes: int) -> Message:
    """Let one node answer one message."""
    node = message.metadata.dst_node_id
    assume_identity(node)
    try:
        return client_app(message, node_context(node, nodes))
    finally:
        assume_identity(SERVER_NODE)


class InProcessGrid(Grid):
    """A grid of simulated nodes; each hosts any user.

    `submit` runs a message somewhere and gives back a future of its reply: in this process, or in a pool of workers.
    """

    def __init__(self, submit: Callable[[Message], Future[Message]], nodes: int) -> None:
        """Connect `nodes` simulated nodes."""
        self._submit = submit
        self._nodes = tuple(range(SERVER_NODE + 1, SERVER_NODE + 1 + nodes))
        self._numbers = itertools.count(1)
        self._pending: dict[str, Future[Message]] = {}
        self._run = Run.create_empty(RUN_ID)
        assume_identity(SERVER_NODE)

    @property
    def run(self) -> Run:
        """Flower's record of the run."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Take Flower's record of the run."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Make a message to a node."""
        message = Message(content, dst_node_id=dst_node_id, message_type=message_type, ttl=ttl, group_id=group_id)
        message.metadata.__dict__["_message_id"] = str(next(self._numbers))
        return message

    def get_node_ids(self) -> Iterable[int]:
        """Every simulated node."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Hand messages on; returns their identifiers."""
        identifiers: list[str] = []
        for message in messages:
            identifier = message.metadata.message_id
            self._pending[identifier] = self._submit(message)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Give back, once, the replies that are there; waits a moment if none is."""
        wanted = [identifier for identifier in message_ids if identifier in self._pending]
        done = [identifier for identifier in wanted if self._pending[identifier].done()]
        if not done and wanted:
            done = [wanted[0]]  # waiting for the oldest costs nothing and polls nothing
        return [self._pending.pop(identifier).result() for identifier in done]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for all replies, or until `timeout` seconds have passed."""
        waiting = list(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            for reply in self.pull_messages(waiting):
                replies.append(reply)
                waiting.remove(reply.metadata.reply_to_message_id)
        return replies


def submit_here(client_app: ClientApp, nodes: int) -> Callable[[Message], Future[Message]]:
    """Answer in this process, on a copy of the message."""

    def submit(message: Message) -> Future[Message]:
        future: Future[Message] = Future()
        try:
            future.set_result(answer(client_app, copy.deepcopy(message), nodes))
        except Exception as error:
            future.set_exception(error)
        return future

    return submit
