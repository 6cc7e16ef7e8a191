"""The door: the fleet paths pass for whoever is approved, once; everything else stays outside."""

from __future__ import annotations

import asyncio
import base64
from datetime import UTC, datetime

import httpx
import pytest

from server.forwarder import FLEET_PATHS, MOST_BYTES, Answer, Door, read_capture

NOW = datetime(2026, 11, 22, tzinfo=UTC)
KEY = b"-----BEGIN PUBLIC KEY-----\nof an approved device\n-----END PUBLIC KEY-----\n"
SECRET = b"the numbers of an update"


class Own:
    """The production seam: what answers the coordinator's own paths."""

    def __init__(self):
        self.approved, self.asked = {KEY}, []

    async def answer(self, path, headers, body):  # noqa: ARG002
        self.asked.append(path)
        return Answer.of(200, path=path)

    def admits(self, public_key):
        return public_key in self.approved


class Flower:
    """What stands behind the door."""

    def __init__(self):
        self.seen = []

    def __call__(self, request):
        self.seen.append((request.url.path, request.content, dict(request.headers)))
        return httpx.Response(200, content=b"reply to " + request.content, headers={"content-type": "application/x"})


@pytest.fixture
def own():
    return Own()


@pytest.fixture
def flower():
    return Flower()


def post(door, path, body=SECRET, *, headers=None, method="POST"):
    async def go():
        transport = httpx.ASGITransport(app=door)
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
            return await client.request(method, path, content=body, headers=headers or {})

    return asyncio.run(go())


def door_of(own, flower, **options):
    superlink = httpx.AsyncClient(transport=httpx.MockTransport(flower), base_url="https://superlink")
    return Door(superlink, own, clock=lambda: NOW, **options)


def signed(key=KEY, time="2026-11-22T00:00:00.000001+00:00"):
    return {"flwr-public-key": base64.b64encode(key).decode(), "flwr-timestamp": time, "flwr-signature": "c2ln"}


def test_fleet_paths_pass_as_they_are(own, flower):
    door = door_of(own, flower)
    for number, path in enumerate(sorted(FLEET_PATHS)):
        reply = post(door, path, headers=signed(time=f"2026-11-22T00:00:0{number % 10}.{number:06}+00:00"))
        assert (reply.status_code, reply.content) == (200, b"reply to " + SECRET)
    assert [path for path, _, _ in flower.seen] == sorted(FLEET_PATHS)
    assert flower.seen[0][2]["flwr-signature"] == "c2ln"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet//pull-messages",
        "/v1/FLEET/pull-messages",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/%2e%2e/control/start-run",
        "/openapi.json",
        "/docs",
        "/",
        "",
    ],
)
def test_nothing_else_passes(own, flower, path):
    door = door_of(own, flower)
    assert post(door, path, headers=signed()).status_code == 403
    assert flower.seen == []
    assert door.traffic.turned_away == 1


def test_only_posts_pass(own, flower):
    door = door_of(own, flower)
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        assert post(door, "/v1/fleet/pull-messages", method=method, headers=signed()).status_code == 403
    assert post(door, "/health", b"", method="GET").json() == {"status": "ok"}
    assert flower.seen == []


def test_an_unknown_or_revoked_device_gets_no_further(own, flower):
    door = door_of(own, flower)
    for headers in ({}, signed(b"another key"), {**signed(), "flwr-public-key": "no base64!"}):
        reply = post(door, "/v1/fleet/pull-messages", headers=headers)
        assert reply.status_code == 401
        assert SECRET not in reply.content
    assert flower.seen == []
    assert post(door, "/v1/fleet/pull-messages", headers=signed()).status_code == 200
    own.approved.clear()
    late = signed(time="2026-11-22T00:00:05.000000+00:00")
    assert post(door, "/v1/fleet/pull-messages", headers=late).json() == {"error": "not-approved"}
    assert len(flower.seen) == 1


def test_a_recorded_message_does_not_pass_twice(own, flower):
    door = door_of(own, flower)
    assert post(door, "/v1/fleet/push-object", headers=signed()).status_code == 200
    again = post(door, "/v1/fleet/push-object", headers=signed())
    assert (again.status_code, again.json()) == (401, {"error": "repeated"})
    other = signed(time="2026-11-22T00:00:00.000002+00:00")
    assert post(door, "/v1/fleet/push-object", headers=other).status_code == 200
    assert len(flower.seen) == 2


def test_more_than_any_message_holds_is_not_taken(own, flower):
    door = door_of(own, flower)
    assert post(door, "/v1/fleet/push-object", bytes(MOST_BYTES + 1), headers=signed()).status_code == 413
    assert flower.seen == []


def test_own_paths_are_answered_here(own, flower):
    assert post(door_of(own, flower), "/v1/homespun/standing").json() == {"path": "/v1/homespun/standing"}
    assert (own.asked, flower.seen) == (["/v1/homespun/standing"], [])


def test_flower_being_away_is_said_and_nothing_more(own):
    def gone(_):
        raise httpx.ConnectError("127.0.0.1:5123 refused")

    reply = post(door_of(own, gone), "/v1/fleet/pull-messages", headers=signed())
    assert (reply.status_code, reply.json()) == (502, {"error": "away"})


def test_a_capture_holds_all_that_crossed_in_order(own, flower, tmp_path):
    door = door_of(own, flower, capture=tmp_path / "capture")
    post(door, "/v1/fleet/push-object", headers=signed())
    post(door, "/v1/homespun/standing", b"{}")
    post(door, "/v1/control/list-runs", b"let me in")
    found = read_capture(tmp_path / "capture")
    assert [(way, path) for way, path, _ in found] == [
        (">", "/v1/fleet/push-object"),
        ("<", "/v1/fleet/push-object"),
        (">", "/v1/homespun/standing"),
        ("<", "/v1/homespun/standing"),
        (">", "/v1/control/list-runs"),
        ("<", "/v1/control/list-runs"),
    ]
    assert (found[0][2], found[1][2]) == (SECRET, b"reply to " + SECRET)
    assert door.traffic.received == sum(len(body) for way, _, body in found if way == ">")
    assert door.traffic.sent == sum(len(body) for way, _, body in found if way == "<")


def test_without_a_capture_nothing_of_a_request_is_written_or_logged(own, flower, tmp_path, caplog, capfd):
    post(door_of(own, flower), "/v1/fleet/push-object", headers=signed())
    assert list(tmp_path.iterdir()) == []
    written = capfd.readouterr()
    assert SECRET.decode() not in caplog.text + written.out + written.err
