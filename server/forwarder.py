"""The one door of the coordinator: lets the fleet paths of Flower through, and the coordinator's own; all else is 403.

Flower's Control and Runtime APIs have no login and share a port with the fleet's, so that port stays on loopback and
this stands before it. It also keeps what Flower does not: a device that is not approved gets no further than here,
the moment it is revoked, and a recorded request does not pass twice.

Nothing is logged per request: who sent how much when would show who was in a cohort.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import httpx

from common.errors import Refusal, StoreError
from common.fleet import RequestGuard

__all__ = ["Answer", "Door", "OwnPaths", "Traffic", "read_capture"]

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

FLEET_PATHS = frozenset(
    f"/v1/fleet/{name}"
    for name in (
        "activate-node",
        "confirm-message-received",
        "deactivate-node",
        "get-fab",
        "get-run",
        "pull-messages",
        "pull-object",
        "push-messages",
        "push-object",
        "send-node-heartbeat",
    )
)
"""What a SuperNode with a key needs; registering itself is not among it."""

OWN = "/v1/homespun/"
MOST_BYTES = 8 << 20
"""Of one request; Flower cuts what is longer into pieces of 5 MiB."""

FLOWER_KEY, FLOWER_TIME = "flwr-public-key", "flwr-timestamp"
PASSED_ON = frozenset({"content-type", "accept", "flwr-public-key", "flwr-timestamp", "flwr-signature", "user-agent"})
RETURNED = frozenset({"content-type"})


@dataclass(frozen=True)
class Answer:
    """What the coordinator answers by itself."""

    status: int
    body: bytes | AsyncIterator[bytes]
    kind: str = "application/json"

    @classmethod
    def of(cls, status: int, /, **values: Any) -> Answer:
        """An answer of JSON."""
        return cls(status, json.dumps(values).encode())


@dataclass
class Traffic:
    """Bytes that went through, since the coordinator started; by no one's name."""

    received: int = 0
    sent: int = 0
    turned_away: int = 0


class OwnPaths(Protocol):
    """What answers below `/v1/homespun/`."""

    async def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer one request."""
        ...

    def admits(self, public_key: bytes) -> bool:
        """Whether a device is approved now."""
        ...


class Door:
    """An ASGI application."""

    def __init__(
        self,
        superlink: httpx.AsyncClient,
        own: OwnPaths,
        *,
        clock: Callable[[], datetime],
        capture: Path | None = None,
    ) -> None:
        """Stand before `superlink`, a client whose base is Flower's address.

        Args:
            superlink: Reaches Flower.
            own: Answers the coordinator's own paths.
            clock: Now, with its time zone.
            capture: Writes every request and answer to this file, in the clear, for an audit.
        """
        self._superlink = superlink
        self._own = own
        self._clock = clock
        self._capture = capture
        self._guard = RequestGuard()
        self.traffic = Traffic()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await _live(receive, send)
            return
        path: str = scope["path"]
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        body = await _body(receive)
        if body is None:
            await self._say(send, Answer.of(413, error="too-long"), path)
            return
        self.traffic.received += len(body)
        self._note(">", path, body)
        try:
            answer = await self._answered(scope["method"], path, headers, body)
        except Refusal as refusal:
            self.traffic.turned_away += 1
            answer = Answer.of(401, error=refusal.code)
        except httpx.HTTPError:
            answer = Answer.of(502, error="away")
        except StoreError:
            answer = Answer.of(503, error="busy")
        await self._say(send, answer, path)

    async def _answered(self, method: str, path: str, headers: dict[str, str], body: bytes) -> Answer:
        if path == "/health":
            return Answer.of(200, status="ok")
        if method == "POST" and path in FLEET_PATHS:
            return await self._forwarded(path, headers, body)
        if method == "POST" and path.startswith(OWN):
            return await self._own.answer(path, headers, body)
        self.traffic.turned_away += 1
        return Answer.of(403, error="forbidden")

    async def _forwarded(self, path: str, headers: dict[str, str], body: bytes) -> Answer:
        try:
            key = base64.b64decode(headers[FLOWER_KEY], validate=True)
            time = headers[FLOWER_TIME]
        except (KeyError, ValueError, binascii.Error):
            raise Refusal("bad-signature", "not signed as a SuperNode signs") from None
        if not self._own.admits(key):
            raise Refusal("not-approved", "the device is not approved, or not any more")
        # Flower signs the time alone, to the microsecond and anew for each attempt: the same one again is a recording.
        self._guard.once(key, f"{time[:64]} {path} {hashlib.sha256(body).hexdigest()}", self._clock())
        passed = {name: value for name, value in headers.items() if name in PASSED_ON}
        found = await self._superlink.post(path, content=body, headers=passed)
        kind = found.headers.get("content-type", "application/octet-stream")
        return Answer(found.status_code, found.content, kind)

    async def _say(self, send: Send, answer: Answer, path: str) -> None:
        start = [(b"content-type", answer.kind.encode("latin-1")), (b"cache-control", b"no-store")]
        if isinstance(answer.body, bytes):
            start.append((b"content-length", str(len(answer.body)).encode()))
        await send({"type": "http.response.start", "status": answer.status, "headers": start})
        if isinstance(answer.body, bytes):
            self.traffic.sent += len(answer.body)
            self._note("<", path, answer.body)
            await send({"type": "http.response.body", "body": answer.body})
            return
        async for part in answer.body:
            self.traffic.sent += len(part)
            self._note("<", path, part)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    def _note(self, direction: str, path: str, body: bytes) -> None:
        if self._capture is None:
            return
        head = f"{direction}{path}".encode()
        with self._capture.open("ab") as file:
            file.write(struct.pack(">II", len(head), len(body)) + head + body)


def read_capture(path: Path) -> list[tuple[str, str, bytes]]:
    """Read a capture: `(">" in or "<" out, path, body)` in order."""
    content, place, found = path.read_bytes(), 0, list[tuple[str, str, bytes]]()
    while place < len(content):
        head, body = struct.unpack_from(">II", content, place)
        place += 8
        name = content[place : place + head].decode()
        found.append((name[0], name[1:], content[place + head : place + head + body]))
        place += head + body
    return found


async def _body(receive: Receive) -> bytes | None:
    """Read a request's body; None where it is longer than any that Flower sends."""
    parts, size = list[bytes](), 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part: bytes = message.get("body", b"")
        size += len(part)
        if size > MOST_BYTES:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
