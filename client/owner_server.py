"""The owner's side of a device over HTTP: an endpoint that OpenAI's clients know, the owner's page, and what it asks.

It listens on loopback and on a Unix socket that only the owner's user may open; the command line uses the latter. All
of it but the page itself, which holds no data, needs the key of the device or a session (`client.owner_access`).
Requests that come by a name which is not this machine's, or from a page of another origin, are turned away before that:
a web page elsewhere can neither rebind a name of its own to this machine nor ask in a browser's name.

Bound to another address than loopback, only the endpoint answers there; the page and everything it shows stay here.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from client.chat_requests import ChatRequest, Completion, RequestError, model_entry, models_list, read_request
from client.owner_access import Access
from client.owner_desk import OwnersDesk
from common.errors import ConfigError, DataError, HomespunError, Refusal
from common.files import make_private_folder

__all__ = ["LOOPBACK", "is_loopback", "listening", "owner_app"]

PAGE = Path(__file__).with_name("owner_page.html")
MODELS = ("base", "global", "personal")
MOST_BODY = 1 << 20
LOOPBACK = "127.0.0.1"
END: Any = object()

PAGE_POLICY = (
    "default-src 'none'; script-src 'nonce-{0}'; style-src 'nonce-{0}'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = (
    (b"cache-control", b"no-store"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
)


class _Json(JSONResponse):
    """JSON that is ASCII on its way, so that half a character, which somebody's JSON held, can be told as it is."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def owner_app(desk: OwnersDesk, access: Access) -> ASGIApp:
    """Build the application; every request passes the guard first."""
    site = _Site(desk, access)
    routes = [
        Route("/", site.page),
        Route("/session", site.session, methods=["POST"]),
        Route("/v1/models", site.models),
        Route("/v1/models/{name:path}", site.model),
        Route("/v1/chat/completions", site.completions, methods=["POST"]),
        Route("/owner/chat", site.chat, methods=["POST"]),
        Route("/owner/{what}", site.show),
        Route("/owner/{what}", site.change, methods=["POST"]),
    ]
    return _Guard(
        Starlette(routes=routes, exception_handlers={404: _not_found, 405: _not_found, RequestError: _bad}), access
    )


class _Guard:
    """Turns away what no owner would send: other names, other origins, no key, too much."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        refusal = self._refusal(scope)
        if refusal is not None:
            await refusal(scope, receive, _dressed(send))
            return
        length = 0

        async def bounded() -> Message:
            nonlocal length
            message = await receive()
            length += len(message.get("body", b""))
            if length > MOST_BODY:
                raise RequestError(f"the request is larger than {MOST_BODY} bytes", status=413)
            return message

        try:
            await self._app(scope, bounded, _dressed(send))
        except RequestError as error:
            await _Json(error.to_json(), error.status)(scope, receive, _dressed(send))

    def _refusal(self, scope: Scope) -> Response | None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path, server = str(scope["path"]), scope.get("server")
        if server is not None and server[1] is not None:  # or else it came over the socket
            host, origin = headers.get(b"host", ""), headers.get(b"origin")
            if not _is_address(host):
                return _error(403, "asked for by another name than this machine's", "forbidden")
            if origin is not None and origin != f"http://{host}":
                return _error(403, "asked for by a page of another origin", "forbidden")
            if not path.startswith("/v1/") and not is_loopback(str(server[0])):
                return _error(403, "the owner's page is on this machine's loopback only", "forbidden")
        declared = headers.get(b"content-length", "0")
        if not declared.isdigit() or int(declared) > MOST_BODY:
            return _error(413, f"the request is larger than {MOST_BODY} bytes", "too_large")
        if path in ("/", "/session"):
            return None
        scheme, _, shown = headers.get(b"authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not self._access.admits(shown.strip()):
            answer = _error(401, "no key of this device; `homespun device serve` shows it", "invalid_api_key")
            answer.headers["www-authenticate"] = "Bearer"
            return answer
        return None


class _Site:
    """The routes."""

    def __init__(self, desk: OwnersDesk, access: Access) -> None:
        self._desk = desk
        self._access = access
        self._began = int(time.time())
        self._shows: dict[str, Callable[[], dict[str, Any]]] = {
            "status": desk.status,
            "budget": desk.budget,
            "sent": desk.sent,
            "profile": desk.profile,
            "levels": desk.levels,
            "feedback": desk.feedback,
            "systems": desk.systems,
        }

    async def page(self, request: Request) -> Response:  # noqa: ARG002
        nonce = secrets.token_urlsafe(18)
        page = PAGE.read_text(encoding="utf-8").replace("NONCE", nonce)
        return HTMLResponse(page, headers={"content-security-policy": PAGE_POLICY.format(nonce)})

    async def session(self, request: Request) -> Response:
        values = await _json(request)
        try:
            return _Json({"session": self._access.redeem(str(values.get("ticket", "")))})
        except Refusal as refusal:
            return _error(401, str(refusal), "invalid_api_key")

    async def models(self, request: Request) -> Response:  # noqa: ARG002
        return _Json(models_list(MODELS, self._began))

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in MODELS and name not in await run_in_threadpool(self._desk.systems):
            return _error(404, f"no such model; there are {', '.join(MODELS)}", "model_not_found")
        return _Json(model_entry(name, self._began))

    async def completions(self, request: Request) -> Response:
        asked = read_request(await request.body())
        pieces = self._desk.chat(asked.model, asked.turns, asked.sampling)
        try:
            given = await run_in_threadpool(next, pieces, END)
        except DataError:
            return _error(404, f"no such model; there are {', '.join(MODELS)}", "model_not_found")
        except HomespunError as error:
            return _error(503, str(error), "unavailable")
        answer = Completion(asked.model, given)
        if asked.stream:
            return StreamingResponse(_events(_chunks(asked, answer, pieces), pieces), media_type="text/event-stream")
        try:
            async for piece in _awaited(pieces):
                answer.add(piece)
                if await request.is_disconnected():
                    break
        except HomespunError as error:
            return _error(503, str(error), "unavailable")
        finally:
            asyncio.get_running_loop().run_in_executor(None, pieces.close)
        return _Json(answer.whole())

    async def chat(self, request: Request) -> Response:
        """Answer the page: as the endpoint does, and with everything that the model was given."""
        asked = read_request(await request.body())
        pieces = self._desk.chat(asked.model, asked.turns, asked.sampling)
        return StreamingResponse(_events(pieces, pieces), media_type="text/event-stream")

    async def show(self, request: Request) -> Response:
        show = self._shows.get(request.path_params["what"])
        return _not_found(request) if show is None else await _answered(show)

    async def change(self, request: Request) -> Response:
        values = await _json(request)
        what, desk = request.path_params["what"], self._desk
        text: Callable[[str], str] = lambda name: str(values.get(name, ""))  # noqa: E731
        changes: dict[str, Callable[[], dict[str, Any]]] = {
            "profile": lambda: desk.edit_line(_whole(values, "line"), text("text")),
            "delete-line": lambda: desk.delete_line(_whole(values, "line")),
            "level": lambda: desk.switch(text("name"), on=_flag(values, "on")),
            "use": lambda: desk.use(text("system")),
            "keep": lambda: desk.keep_turn(text("prompt"), text("response")),
            "feedback": lambda: desk.add_feedback(
                text("prompt"), text("answer"), text("kind"), text("edited") if values.get("edited") else None
            ),
            "remove-feedback": lambda: desk.remove_feedback(text("id")),
            "export": desk.export,
            "forget": lambda: desk.forget(confirmed=values.get("confirm") == "forget"),
            "pause": lambda: desk.pause(paused=_flag(values, "paused")),
            "ticket": lambda: {"ticket": self._access.ticket(), "port": desk.port},
        }
        change = changes.get(what)
        return _not_found(request) if change is None else await _answered(change)


def _chunks(asked: ChatRequest, answer: Completion, pieces: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield answer.opening()
    for piece in pieces:
        yield answer.add(piece)
    if asked.usage:
        yield answer.counts()


async def _awaited(pieces: Iterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Wait for each piece in a thread, so that others are answered meanwhile."""
    while True:
        piece = await run_in_threadpool(next, pieces, END)
        if piece is END:
            return
        yield piece


async def _events(found: Iterator[dict[str, Any]], pieces: Generator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """Write server-sent events; whoever hangs up ends the answer."""
    try:
        async for one in _awaited(found):
            yield f"data: {json.dumps(one)}\n\n".encode()
        yield b"data: [DONE]\n\n"
    except HomespunError as error:
        shape = RequestError(str(error), kind="server_error", code="unavailable").to_json()
        yield f"data: {json.dumps(shape)}\n\n".encode()
    finally:
        asyncio.get_running_loop().run_in_executor(None, pieces.close)  # not awaited: this task may be cancelled


async def _answered(do: Callable[[], dict[str, Any]]) -> Response:
    try:
        return _Json(await run_in_threadpool(do))
    except ConfigError as error:
        return _error(400, str(error), "invalid_request_error")
    except DataError as error:
        return _error(404, str(error), "not_found")
    except HomespunError as error:
        return _error(409, str(error), "refused")


async def _json(request: Request) -> dict[str, Any]:
    try:
        found = json.loads(await request.body() or b"{}")
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    except ClientDisconnect:  # half a change is none
        raise RequestError("the request ended in the middle") from None
    if not isinstance(found, dict):
        raise RequestError("the body is not a JSON object")
    return found


def _whole(values: dict[str, Any], name: str) -> int:
    value = values.get(name)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}: a whole number")
    return value


def _flag(values: dict[str, Any], name: str) -> bool:
    value = values.get(name)
    if not isinstance(value, bool):  # what is left out would otherwise turn a level off, or training on
        raise ConfigError(f"{name}: true or false")
    return value


def _bad(request: Request, error: Exception) -> Response:  # noqa: ARG001
    if not isinstance(error, RequestError):
        raise error
    return _Json(error.to_json(), error.status)


def _not_found(request: Request, error: Exception | None = None) -> Response:  # noqa: ARG001
    return _error(404, "there is nothing at this address", "not_found")


def _error(status: int, message: str, code: str) -> Response:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return _Json(RequestError(message, kind=kind, code=code).to_json(), status)


def _dressed(send: Send) -> Send:
    async def dressed(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *HEADERS]}
        await send(message)

    return dressed


def _is_address(host: str) -> bool:
    """Whether a Host header names this machine by a number or as localhost: what no foreign name can be rebound to."""
    name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
    if name.lower() == "localhost":
        return True
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches an address; a name counts when it is localhost."""
    if address == "localhost":
        return True
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


class _Server(uvicorn.Server):
    """A server that sleeps until it is asked or told to stop; uvicorn's own wakes up ten times a second."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping: asyncio.Event | None = None

    async def main_loop(self) -> None:
        self.stopping = asyncio.Event()
        await self.stopping.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        # uvicorn waits for answers under way for as long as it was told, and leaves the lines of the others open
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # a line is closed in the loop's next turn


@contextmanager
def listening(app: ASGIApp, *, host: str = LOOPBACK, port: int = 0, path: Path | None = None) -> Generator[int]:
    """Serve inside the block, in a thread of its own; gives the port.

    Args:
        app: What answers.
        host: Address to listen on.
        port: Any that is free where 0.
        path: Of a Unix socket beside it, for the user of this process alone.

    Raises:
        ConfigError: The address or the path cannot be listened on.
    """
    sockets = [_tcp(host, port)]
    number = int(sockets[0].getsockname()[1])
    try:
        if path is not None:
            sockets.append(_unix(path))
        server = _Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, ws="none", lifespan="off", server_header=False,
                date_header=False, timeout_graceful_shutdown=1,
            )
        )  # fmt: skip
        loop = asyncio.new_event_loop()
        thread = threading.Thread(
            target=lambda: loop.run_until_complete(server.serve(sockets)), name="owner-server", daemon=True
        )
        thread.start()
        while server.stopping is None and thread.is_alive():
            time.sleep(0.01)
        try:
            yield number
        finally:
            if server.stopping is not None:
                loop.call_soon_threadsafe(server.stopping.set)
            thread.join(10.0)
            if not thread.is_alive():
                loop.close()
    finally:
        for one in sockets:
            one.close()
        if path is not None:
            path.unlink(missing_ok=True)


def _tcp(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    one = socket.socket(family, socket.SOCK_STREAM)
    try:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        one.bind((host, port))
    except (OSError, OverflowError) as error:
        one.close()
        reason = getattr(error, "strerror", None) or "not a port"
        raise ConfigError(f"{host}:{port}: cannot be listened on: {reason}") from None
    return one


def _unix(path: Path) -> socket.socket:
    if not path.parent.exists():
        make_private_folder(path.parent)
    path.unlink(missing_ok=True)
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        one.bind(str(path))
    except OSError as error:
        one.close()
        raise ConfigError(f"{path}: cannot be bound as a socket: {error.strerror}") from None
    finally:
        os.umask(before)
    return one
