"""The shim: what a vault says is passed on, and what goes wrong says nothing."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID

from client.app import app, build
from common.errors import BudgetSpent, GateRefused, Refusal
from common.wire import Assignment, Release, receipt_digest
from simulations.grid import answer, assume_identity

DIARY = "dear diary, today I told nobody"
NODE = 2


class FakeVault:
    """The production seam: a vault that answers, or raises what it is told to."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.assignments = error, []

    def subjects(self):
        if self.error is not None:
            raise self.error
        return ["ab" * 16]

    def train(self, assignment):
        self.assignments.append(assignment)
        if self.error is not None:
            raise self.error
        total = assignment.vector * 2
        return Release(total, 1, receipt_digest(total, assignment.spec, assignment.round, 1))


@pytest.fixture
def assignment(release_spec):
    return Assignment(release_spec(), 1, ("ab" * 16,), np.ones(6, np.float32))


def ask(shim, content, kind="train"):
    assume_identity(SUPERLINK_NODE_ID)
    message = Message(content, dst_node_id=NODE, message_type=kind)
    message.metadata.__dict__["_message_id"] = "1"
    return answer(shim, message, 1)


def everything_in(reply) -> str:
    return repr(reply.content) + repr(reply.metadata)


def test_an_assignment_reaches_the_vault_and_its_release_the_server(assignment):
    vault = FakeVault()
    reply = ask(build(lambda _: vault), assignment.to_records())
    release = Release.from_records(reply.content)
    np.testing.assert_array_equal(release.total, 2 * np.ones(6, np.float32))
    assert vault.assignments[0].users == assignment.users
    assert set(reply.content) == {"release", "receipt"}


def test_hello_says_who_lives_here_and_nothing_else():
    reply = ask(build(lambda _: FakeVault()), RecordDict(), "query.hello")
    assert {name: dict(record) for name, record in reply.content.items()} == {"hello": {"subjects": ["ab" * 16]}}


@pytest.mark.parametrize(
    "error", [RuntimeError(DIARY), ValueError(DIARY), KeyError(DIARY), MemoryError(DIARY), UnicodeError(DIARY)]
)
@pytest.mark.parametrize("kind", ["train", "query.hello"])
@pytest.mark.parametrize("debug", [False, True])
def test_the_text_of_an_exception_never_leaves(assignment, error, kind, debug, monkeypatch):
    if debug:
        monkeypatch.setenv("HOMESPUN_DEBUG", "1")
    reply = ask(build(lambda _: FakeVault(error)), assignment.to_records(), kind)
    assert DIARY not in everything_in(reply)
    assert reply.content.config_records["refusal"]["code"] == "failed"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Refusal("policy-trust", DIARY), "policy-trust"),
        (BudgetSpent(DIARY), "budget-spent"),
        (GateRefused(DIARY), "gate-refused"),
        (Refusal(DIARY, DIARY), "failed"),
    ],
)
def test_a_refusal_leaves_as_a_code_from_the_list(assignment, error, code):
    reply = ask(build(lambda _: FakeVault(error)), assignment.to_records())
    assert DIARY not in everything_in(reply)
    assert dict(reply.content.config_records["refusal"]) == {"format": 1, "code": code}


@pytest.mark.parametrize(
    "content",
    [RecordDict(), RecordDict({"request": ConfigRecord({"format": 1, "spec": "{}", "users": ["a"], "round": 1})})],
)
def test_a_request_that_is_none_does_not_reach_the_vault(content):
    vault = FakeVault()
    reply = ask(build(lambda _: vault), content)
    assert reply.content.config_records["refusal"]["code"] == "bad-request"
    assert vault.assignments == []


def test_a_node_that_names_no_vault_says_so(assignment):
    assert ask(app, assignment.to_records()).content.config_records["refusal"]["code"] == "no-vault"
