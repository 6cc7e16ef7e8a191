"""The vault behind its socket, and the stub before it: one debit per ticket, hostile requests, restarts."""

from __future__ import annotations

import os
import stat
import threading
import time
from contextlib import contextmanager

import grpc
import numpy as np
import pytest

from client import vault_pb2 as messages
from client.vault_pb2_grpc import FleetStub
from client.vault_service import MOST_KEPT, MOST_PENDING, FleetService, Outbox, serving
from client.vault_stub import SocketVault
from common.errors import BudgetSpent, ConfigError, Refusal, StoreError
from common.wire import Assignment, Release, raw_bytes, receipt_digest

DIARY = "dear diary, today I told nobody"
SUBJECT = "ab" * 16
KEY = bytes(range(32))


class CountingVault:
    """The production seam: a vault that answers with noise of its own, so that no answer is like another."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.trained = error, []
        self.go_on = threading.Event()
        self.go_on.set()

    def subjects(self):
        return [SUBJECT]

    def train(self, assignment):
        assert self.go_on.wait(120)
        self.trained.append(assignment)
        if self.error is not None:
            raise self.error
        total = np.random.default_rng().normal(size=assignment.vector.size).astype(np.float32)
        return Release(total, 1, receipt_digest(total, assignment.spec, assignment.round, 1))


@pytest.fixture
def vault():
    return CountingVault()


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A function `(vault) -> context manager of the stub`, at one socket with one outbox."""
    monkeypatch.chdir(tmp_path)

    @contextmanager
    def start(vault, path="vault.sock"):
        service = FleetService(vault, Outbox(tmp_path / "outbox", KEY), model="cd" * 32)
        with serving(service, tmp_path / path, dim=6):
            yield SocketVault(str(tmp_path / path), absent_seconds=60.0)

    return start


@contextmanager
def raw(tmp_path):
    """The generated stub: what a hostile bundle would use."""
    with grpc.insecure_channel(f"unix:{tmp_path / 'vault.sock'}") as channel:
        yield FleetStub(channel)


@pytest.fixture
def assignment(release_spec):
    return Assignment(release_spec(), 1, (SUBJECT,), np.ones(6, np.float32))


def collected(stub, ticket):
    """What comes of a ticket, however busy the machine is."""
    while (reply := stub.Collect(messages.CollectRequest(ticket=ticket, wait_seconds=5))).pending:
        pass
    return reply


def request(assignment, **changes):
    fields = {
        "format": 1,
        "spec": assignment.spec.to_text(),
        "round": assignment.round,
        "subjects": assignment.users,
        "vector": raw_bytes(assignment.vector),
    }
    return messages.TrainRequest(**(fields | changes))


def test_what_the_vault_releases_arrives_to_the_last_bit(serve, vault, assignment):
    with serve(vault) as stub:
        assert stub.subjects() == [SUBJECT]
        release = stub.train(assignment)
    assert release.receipt == receipt_digest(release.total, assignment.spec, 1, 1)
    (seen,) = vault.trained
    assert (seen.spec, seen.round, seen.users) == (assignment.spec, 1, (SUBJECT,))
    np.testing.assert_array_equal(seen.vector, assignment.vector)


def test_the_same_round_and_spec_give_the_same_bytes_and_are_trained_once(serve, vault, assignment, release_spec):
    with serve(vault) as stub:
        first = stub.train(assignment)
        again = stub.train(assignment)
        # Another vector is no second look at the same person.
        third = stub.train(Assignment(release_spec(), 1, (SUBJECT,), np.zeros(6, np.float32)))
    with serve(vault) as stub:  # nor is another process
        fourth = stub.train(assignment)
    assert len({release.total.tobytes() for release in (first, again, third, fourth)}) == 1
    assert len(vault.trained) == 1


def test_another_round_spec_run_or_subject_is_another_release(serve, vault, release_spec):
    vector = np.ones(6, np.float32)
    with serve(vault) as stub:
        for number, spec, users in [
            (1, release_spec(), (SUBJECT,)),
            (2, release_spec(), (SUBJECT,)),
            (1, release_spec(clip=0.5), (SUBJECT,)),
            (1, release_spec(run="00" * 16), (SUBJECT,)),
            (1, release_spec(), ("cd" * 16,)),
        ]:
            stub.train(Assignment(spec, number, users, vector))
    assert len(vault.trained) == 5


def test_asking_twice_while_it_is_being_trained_trains_once(serve, vault, assignment, tmp_path):
    vault.go_on.clear()
    with serve(vault), raw(tmp_path) as stub:
        tickets = {stub.Train(request(assignment)).ticket for _ in range(3)}
        assert len(tickets) == 1
        (ticket,) = tickets
        assert stub.Collect(messages.CollectRequest(ticket=ticket)).pending
        assert stub.Status(messages.StatusRequest()).pending == 1
        vault.go_on.set()
        assert collected(stub, ticket).release.users == 1
        assert stub.Status(messages.StatusRequest()).pending == 0
    assert len(vault.trained) == 1


def test_more_work_than_fits_is_refused(serve, vault, release_spec, tmp_path):
    vault.go_on.clear()
    vector = np.ones(6, np.float32)
    with serve(vault), raw(tmp_path) as stub:
        replies = [
            stub.Train(request(Assignment(release_spec(), number, (SUBJECT,), vector)))
            for number in range(1, MOST_PENDING + 3)
        ]
        assert [reply.refusal for reply in replies] == [""] * MOST_PENDING + ["busy"] * 2
        vault.go_on.set()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RuntimeError(DIARY), "failed"),
        (StoreError(DIARY), "failed"),
        (TimeoutError(DIARY), "failed"),
        (BudgetSpent(DIARY), "budget-spent"),
        (Refusal("policy-clip", DIARY), "policy-clip"),
        (Refusal("store-locked", DIARY), "failed"),
    ],
)
def test_what_goes_wrong_is_a_code_and_may_be_asked_for_again(serve, assignment, tmp_path, error, code):
    vault = CountingVault(error)
    with serve(vault) as stub, raw(tmp_path) as hostile:
        with pytest.raises(Refusal) as refused:
            stub.train(assignment)
        assert refused.value.code == code
        ticket = hostile.Train(request(assignment)).ticket
        reply = collected(hostile, ticket)
        assert DIARY not in str(reply)
        vault.error = None
        assert stub.train(assignment).users == 1


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"format": 2}, "format"),
        ({"spec": "{}"}, "bad-request"),
        ({"spec": "[" * 100_000}, "bad-request"),
        ({"round": 0}, "bad-request"),
        ({"round": 2**32 - 1}, "bad-request"),
        ({"subjects": []}, "bad-request"),
        ({"subjects": [""]}, "bad-request"),
        ({"subjects": ["x" * 300]}, "bad-request"),
        ({"vector": b""}, "bad-request"),
        ({"vector": bytes(23)}, "bad-request"),
        ({"vector": bytes(28)}, "bad-request"),
        ({"vector": np.full(6, np.nan, "<f4").tobytes()}, "bad-request"),
        ({"vector": np.full(6, np.inf, "<f4").tobytes()}, "bad-request"),
    ],
)
def test_a_hostile_request_does_not_reach_the_vault(serve, vault, assignment, tmp_path, change, code):
    with serve(vault), raw(tmp_path) as stub:
        assert stub.Train(request(assignment, **change)).refusal == code
    assert vault.trained == []


@pytest.mark.parametrize("ticket", ["", "0" * 64, "../../etc/passwd", "0" * 63 + "/", "x" * 100_000, "0" * 64 + "\n"])
def test_a_ticket_that_was_not_given_out_fetches_nothing(serve, vault, tmp_path, ticket):
    with serve(vault), raw(tmp_path) as stub:
        reply = stub.Collect(messages.CollectRequest(ticket=ticket, wait_seconds=float("nan")))
    assert reply.refusal == "unknown-ticket"


def test_a_request_far_larger_than_the_base_allows_is_not_read(serve, vault, assignment, tmp_path):
    with serve(vault), raw(tmp_path) as stub:
        with pytest.raises(grpc.RpcError) as refused:
            stub.Train(request(assignment, vector=bytes(4 << 20)))
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert stub.Subjects(messages.SubjectsRequest()).subjects == [SUBJECT]
    assert vault.trained == []


def test_a_vault_that_restarts_while_it_is_asked_is_asked_again(serve, vault, assignment):
    outcome = []
    with serve(vault) as stub:
        vault.go_on.clear()
        asking = threading.Thread(target=lambda: outcome.append(stub.train(assignment)))
        asking.start()
        while not stub._ask("Status", messages.StatusRequest(), 0.0).pending:
            time.sleep(0.01)
        threading.Timer(0.1, vault.go_on.set).start()
    with serve(vault):
        asking.join(90)
    (release,) = outcome
    assert release.users == 1
    assert len(vault.trained) == 1


def test_a_vault_that_is_not_there_is_a_code(tmp_path, assignment):
    absent = SocketVault(str(tmp_path / "nobody.sock"), absent_seconds=0.0)
    for ask in (absent.subjects, lambda: absent.train(assignment)):
        with pytest.raises(Refusal) as refused:
            ask()
        assert refused.value.code == "no-vault"


@pytest.mark.parametrize("config", [{}, {"vault": ""}, {"vault": "relative.sock"}, {"vault": 7}])
def test_a_node_must_name_an_absolute_socket(config):
    with pytest.raises(Refusal) as refused:
        SocketVault.from_node_config(config)
    assert refused.value.code == "no-vault"


def test_the_socket_is_for_owner_and_group_and_goes_with_its_vault(serve, vault, tmp_path):
    with serve(vault, "folder/vault.sock"):
        assert stat.S_IMODE((tmp_path / "folder").stat().st_mode) == 0o710
        assert stat.S_IMODE((tmp_path / "folder" / "vault.sock").stat().st_mode) == 0o660
    assert not (tmp_path / "folder" / "vault.sock").exists()


def test_a_second_vault_does_not_take_the_socket_of_the_first(serve, vault, assignment):
    with serve(vault) as stub:
        with pytest.raises(Refusal, match="another process"), serve(CountingVault()):
            pass
        assert stub.train(assignment).users == 1


def test_a_socket_that_a_killed_vault_left_behind_is_no_obstacle(serve, vault, assignment, tmp_path):
    with serve(vault):
        os.link(tmp_path / "vault.sock", tmp_path / "left.sock")
    (tmp_path / "left.sock").rename(tmp_path / "vault.sock")
    with serve(vault) as stub:
        assert stub.train(assignment).users == 1


def test_a_path_too_long_for_a_socket_is_said_in_words(vault, tmp_path):
    service = FleetService(vault, Outbox(tmp_path / "outbox", KEY), model="cd" * 32)
    with pytest.raises(ConfigError, match="too long"), serving(service, tmp_path / ("x" * 120), dim=6):
        pass
    service.close()


def test_the_outbox_is_sealed_and_every_bit_of_it_counts(tmp_path, assignment, vault):
    outbox = Outbox(tmp_path / "outbox", KEY)
    release, ticket = vault.train(assignment), "0" * 64
    outbox.put(ticket, release)
    (path,) = (tmp_path / "outbox").iterdir()
    sealed = path.read_bytes()
    assert release.total.tobytes() not in sealed
    assert release.receipt.encode() not in sealed
    for place in range(0, len(sealed), 7):
        path.write_bytes(sealed[:place] + bytes([sealed[place] ^ 1]) + sealed[place + 1 :])
        with pytest.raises(StoreError):
            outbox.get(ticket)
    path.write_bytes(sealed)
    path.rename(path.with_name("1" * 64 + ".sealed"))
    with pytest.raises(StoreError):  # a release is kept for one ticket
        outbox.get("1" * 64)
    with pytest.raises(StoreError):
        Outbox(tmp_path / "outbox", bytes(32)).get("1" * 64)


def test_the_outbox_keeps_the_newest(tmp_path, assignment, vault):
    outbox = Outbox(tmp_path / "outbox", KEY)
    for number in range(MOST_KEPT + 5):
        outbox.put(f"{number:064x}", vault.train(assignment))
        path = tmp_path / "outbox" / f"{number:064x}.sealed"
        os.utime(path, ns=(number, number))
    assert len(list((tmp_path / "outbox").iterdir())) <= MOST_KEPT
    assert outbox.get(f"{MOST_KEPT + 4:064x}") is not None
    assert outbox.get("0" * 64) is None
