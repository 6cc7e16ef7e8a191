"""The grid without a network does what Flower's own do, as far as an app can see."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from simulations import grid as grid_module
from simulations.grid import InProcessGrid, answer, assume_identity, node_context, submit_here


def echo():
    """An app that says which node it plays and hands back what it was sent, changed in place."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        record = message.content.config_records["question"]
        record["seen"] = context.node_id
        record["partition"] = context.node_config["partition-id"]
        message.content.config_records.pop("secret", None)
        return Message(message.content, reply_to=message)

    @app.query("ping")
    def ping(message, context):
        return Message(RecordDict({"pong": ConfigRecord({"node": context.node_id})}), reply_to=message)

    return app


@pytest.fixture
def grid():
    return InProcessGrid(submit_here(echo(), 3), 3)


def questions(grid, content=None):
    content = content or RecordDict({"question": ConfigRecord({"what": 1}), "secret": ConfigRecord({"x": 1})})
    return [grid.create_message(content, "train", node, "1") for node in grid.get_node_ids()]


def test_every_node_answers_as_itself(grid):
    replies = grid.send_and_receive(questions(grid))
    nodes = list(grid.get_node_ids())
    assert sorted(reply.metadata.src_node_id for reply in replies) == nodes
    answers = [reply.content.config_records["question"] for reply in replies]
    assert sorted(record["seen"] for record in answers) == nodes
    assert sorted(record["partition"] for record in answers) == [0, 1, 2]


def test_a_node_that_changes_its_message_changes_nobody_elses(grid):
    content = RecordDict({"question": ConfigRecord({"what": 1}), "secret": ConfigRecord({"x": 1})})
    grid.send_and_receive(questions(grid, content))
    assert set(content) == {"question", "secret"}
    assert dict(content.config_records["question"]) == {"what": 1}


def test_a_query_by_name_reaches_its_function(grid):
    messages = [grid.create_message(RecordDict(), "query.ping", node, "0") for node in grid.get_node_ids()]
    replies = grid.send_and_receive(messages)
    assert sorted(reply.content.config_records["pong"]["node"] for reply in replies) == list(grid.get_node_ids())


def test_replies_are_matched_to_messages_and_given_once(grid):
    identifiers = list(grid.push_messages(questions(grid)))
    assert len(set(identifiers)) == 3
    assert list(grid.pull_messages(["unknown"])) == []
    first = list(grid.pull_messages(identifiers[:1]))
    assert [reply.metadata.reply_to_message_id for reply in first] == identifiers[:1]
    assert list(grid.pull_messages(identifiers[:1])) == []
    assert len(list(grid.pull_messages(identifiers))) == 2


def test_pulling_waits_for_the_oldest_and_takes_what_else_is_there():
    futures: dict[str, Future] = {}

    def submit(message):
        return futures.setdefault(message.metadata.message_id, Future())

    grid = InProcessGrid(submit, 3)
    messages = questions(grid)
    identifiers = list(grid.push_messages(messages))
    replies = {name: answer(echo(), message, 3) for name, message in zip(identifiers, messages, strict=True)}
    futures[identifiers[2]].set_result(replies[identifiers[2]])
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(identifiers)] == [identifiers[2]]
    threading.Timer(0.05, futures[identifiers[0]].set_result, [replies[identifiers[0]]]).start()
    assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(identifiers)] == [identifiers[0]]


def test_answers_may_come_from_other_threads():
    with ThreadPoolExecutor(3) as pool:
        here = submit_here(echo(), 3)
        grid = InProcessGrid(lambda message: pool.submit(lambda: here(message).result()), 3)
        assert len(list(grid.send_and_receive(questions(grid)))) == 3


def test_a_deadline_in_the_past_waits_for_nobody(grid):
    began = time.monotonic()
    assert list(grid.send_and_receive(questions(grid), timeout=0.0)) == []
    assert time.monotonic() - began < 60.0  # it would wait for ever; the room is for a busy machine


def test_what_a_worker_raises_ends_the_run():
    def submit(_):
        future = Future()
        future.set_exception(RuntimeError("the worker died"))
        return future

    grid = InProcessGrid(submit, 1)
    with pytest.raises(RuntimeError, match="the worker died"):
        grid.send_and_receive(questions(grid))


def test_the_driver_is_the_server_again_after_a_node_has_answered(grid):
    grid.send_and_receive(questions(grid))
    assert TaskIdentity.node_id == SUPERLINK_NODE_ID == grid_module.SERVER_NODE
    broken = ClientApp()

    @broken.train()
    def train(message, context):
        raise ValueError("broken")

    (message, *_) = questions(grid)
    with pytest.raises(ValueError, match="broken"):
        answer(broken, message, 3)
    assert TaskIdentity.node_id == SUPERLINK_NODE_ID


def test_a_server_app_of_flowers_runs_on_it(grid):
    app, seen = ServerApp(), []

    @app.main()
    def main(grid, context):
        vector = np.arange(4, dtype=np.float32)
        content = RecordDict({"question": ConfigRecord({}), "arrays": ArrayRecord({"v": Array(vector)})})
        seen.extend(grid.send_and_receive(questions(grid, content)))

    app(grid, node_context(SUPERLINK_NODE_ID, 3))
    for reply in seen:
        np.testing.assert_array_equal(reply.content.array_records["arrays"]["v"].numpy(), np.arange(4))


def test_flower_may_set_the_run_and_read_it(grid):
    run = Run.create_empty(42)
    grid.set_run(run)
    assert grid.run.run_id == 42


def test_the_names_of_flowers_that_are_not_public_are_what_this_release_has():
    """Whoever moves the pinned release looks here first."""
    assume_identity(5)
    try:
        message = Message(RecordDict(), dst_node_id=2, message_type="train")
        assert message.metadata.message_id == ""
        message.metadata.__dict__["_message_id"] = "7"
        assert message.metadata.message_id == "7"
        assert (TaskIdentity.node_id, TaskIdentity.run_id) == (5, grid_module.RUN_ID)
        assert message.metadata.run_id == grid_module.RUN_ID
    finally:
        assume_identity(SUPERLINK_NODE_ID)
