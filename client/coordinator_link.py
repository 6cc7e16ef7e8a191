"""The device's own line to its coordinator, beside Flower's: TLS that trusts the invite's authority and no other."""

from __future__ import annotations

import json
import ssl
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import DataError, Refusal
from common.fleet import FORMAT, Invite, reply_object, signed_headers
from common.formats import written

__all__ = ["CoordinatorLink"]

OWN = "/v1/homespun/"
SECONDS = 30.0
PLAIN = {"accept-encoding": "identity"}
"""Bytes are counted and resumed as they are stored."""


WORDS = {
    "unknown-token": "it does not know this invite; ask its operator for another",
    "used-up": "the invite let in as many devices as it was made for; ask for another",
    "expired": "the invite is over; ask for another",
    "revoked": "this device's key is let in no more; `homespun device leave`, and join again by a new invite",
    "subject-taken": "another device is enrolled for the same person; its operator can revoke that one",
    "not-enrolled": "it does not know this device; `homespun device leave`, and join again by a new invite",
    "left": "this device left it; join again by a new invite",
    "pending": "its operator has to approve this device first",
    "bad-request": "it does not understand what is asked; compare `homespun version` on both sides",
    "clock": "the clocks of both are more than 300 s apart; `homespun doctor` says by how much",
    "repeated": "this very request was there before",
    "busy": "it is asked too much at the moment; try again",
    "bad-signature": "it cannot tell that this device asks",
}
"""What a code of the coordinator means to whoever reads it here; no word of the coordinator's own is shown."""


class CoordinatorLink:
    """Asks one coordinator, in the name of one device."""

    def __init__(self, invite: Invite, key: ec.EllipticCurvePrivateKey, *, count: Callable[[int], None]) -> None:
        """Ask nothing yet; `count` is told of every byte that goes either way."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=invite.authority)
        self._key = key
        self._count = count
        self._place = f"the coordinator at {invite.address}"
        # trust_env off: a proxy or another authority that the environment names is not the owner's word.
        self._client = httpx.Client(
            base_url=f"https://{invite.address}", verify=context, timeout=SECONDS, trust_env=False, headers=PLAIN
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, name: str, **values: Any) -> dict[str, Any]:
        """Ask, and read the answer.

        Raises:
            DataError: The coordinator is away, or answers nonsense.
            Refusal: It said no, with its code, or it is not the one that the invite names.
        """
        return reply_object(self._post(name, values))

    def adapter(self, run: str) -> bytes:
        """Fetch the newest global adapter of a run.

        Raises:
            DataError, Refusal: As for `ask`.
        """
        return self._post("adapter", {"run": run})

    def roster(self, run: str) -> bytes:
        """Fetch who is in the secure sums of a run.

        Raises:
            DataError, Refusal: As for `ask`.
        """
        return self._post("roster", {"run": run})

    def base_files(self, digest: str) -> Any:
        """List the files of a base model at the coordinator, as it names them."""
        return self.ask("base", digest=digest).get("files")

    def base_part(self, digest: str, name: str, offset: int) -> Iterator[bytes]:
        """Fetch a file of a base model from `offset` on; whoever takes it counts it.

        Raises:
            DataError: The coordinator does not hand it over.
            httpx.TransportError: The line was cut.
        """
        path, body, headers = self._signed("base-file", {"digest": digest, "name": name, "offset": offset})
        with self._client.stream("POST", path, content=body, headers=headers) as reply:
            if reply.status_code != 200:
                raise DataError(f"the coordinator does not hand {name} over ({reply.status_code})")
            yield from reply.iter_raw()

    def _post(self, name: str, values: dict[str, Any]) -> bytes:
        path, body, headers = self._signed(name, values)
        try:
            reply = self._client.post(path, content=body, headers=headers)
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error) or isinstance(error.__cause__, ssl.SSLError):
                raise Refusal(
                    "wrong-authority", "who answers there is not the coordinator that the invite names"
                ) from None
            raise DataError(f"{self._place} does not answer ({type(error).__name__})") from None
        except httpx.HTTPError as error:
            raise DataError(f"{self._place} does not answer ({type(error).__name__})") from None
        self._count(len(body) + len(reply.content))
        if reply.status_code == 200:
            return reply.content
        try:
            code = str(reply_object(reply.content)["error"])[:64]
        except (DataError, KeyError):
            raise DataError(f"the coordinator answers {reply.status_code}") from None
        if reply.status_code in (401, 403):
            raise Refusal(code, f"the coordinator refuses, {code}: {WORDS.get(code, 'it does not say more')}")
        raise DataError(f"the coordinator answers: {code}")

    def _signed(self, name: str, values: dict[str, Any]) -> tuple[str, bytes, dict[str, str]]:
        path, body = OWN + name, json.dumps({"format": written(FORMAT), **values}).encode()
        headers = signed_headers(self._key, path, body, now=datetime.now(UTC))
        return path, body, {**headers, "content-type": "application/json"}
