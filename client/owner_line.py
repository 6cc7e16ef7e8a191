"""The command line's end of the owner's side: asks the resident process over its Unix socket.

Commands that only look read the device's files and need nobody. This is for what the resident process alone has: a
model that is loaded already, and links for a browser.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from client.device_home import DeviceHome
from client.owner_access import Access
from common.errors import ConfigError, DataError, Refusal
from common.places import runtime_home

__all__ = ["OwnerLine", "owner_socket"]

SECONDS = 90.0
ANSWER_SECONDS = 600.0


def owner_socket(home: DeviceHome) -> Path:
    """Where the owner's side of the device in `home` is asked."""
    from client.agent import socket_path

    return socket_path(home.folder, runtime_home()).with_name("owner.sock")


class OwnerLine:
    """A line to the resident process of one device."""

    def __init__(self, home: DeviceHome) -> None:
        """Find the process; nothing is asked yet."""
        self._path = owner_socket(home)
        self._key = Access(home).key

    @property
    def is_up(self) -> bool:
        """Whether somebody answers there."""
        if not self._path.is_socket():
            return False
        try:
            self.ask("levels")
        except (Refusal, DataError, ConfigError):
            return False
        return True

    def ask(self, what: str, change: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Ask for one thing, or change it.

        Raises:
            Refusal: Nobody answers, or it is refused.
            DataError: There is no such thing.
            ConfigError: The change is none.
        """
        with self._client(SECONDS) as client:
            answer = (
                client.get(f"/owner/{what}") if change is None else client.post(f"/owner/{what}", json=dict(change))
            )
            _check(answer)
            return answer.json()

    def chat(
        self, system: str, turns: Sequence[tuple[str, str]], sampling: Mapping[str, Any]
    ) -> Generator[dict[str, Any]]:
        """Have the resident process answer; what comes is what `client.owner_desk.OwnersDesk.chat` gives.

        Raises:
            Refusal: Nobody answers, or not to the end.
            DataError: There is no such model.
        """
        messages = [{"role": role, "content": text} for role, text in turns]
        body = {"model": system, "messages": messages, **sampling}
        with self._client(ANSWER_SECONDS) as client, client.stream("POST", "/owner/chat", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
            _check(answer)
            for line in answer.iter_lines():
                name, _, content = line.partition(": ")
                if name != "data" or content == "[DONE]":
                    continue
                found = json.loads(content)
                if "error" in found:
                    raise (DataError if found["error"]["code"] == "not_found" else _refusal)(found["error"]["message"])
                yield found

    @contextmanager
    def _client(self, seconds: float) -> Generator[httpx.Client]:
        gone = Refusal("no-vault", "the device is not up; `homespun device up` starts it")
        if not self._path.is_socket():
            raise gone
        headers = {"authorization": f"Bearer {self._key}"}
        transport = httpx.HTTPTransport(uds=str(self._path))
        with httpx.Client(transport=transport, base_url="http://device", headers=headers, timeout=seconds) as client:
            try:
                yield client
            except httpx.TransportError:
                raise gone from None


def _check(answer: httpx.Response) -> None:
    if answer.status_code == 200:
        return
    try:
        message = str(answer.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = f"the device answered {answer.status_code}"
    if answer.status_code == 400:
        raise ConfigError(message)
    if answer.status_code == 404:
        raise DataError(message)
    raise _refusal(message)


def _refusal(message: str) -> Refusal:
    return Refusal("not-now", message)
