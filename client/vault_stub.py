"""The bundle's end of the vault's socket: asks for training, waits, and hands on what comes back.

This file is pushed by the server and trusted with nothing. It holds no data, and keeps no state: whatever happens to
this process, asking again for the same round gives the same bytes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc

from client import vault_pb2 as messages
from client.vault_pb2_grpc import FleetStub
from common.errors import Refusal
from common.formats import written
from common.secagg_messages import Leg
from common.sum_wire import SumLetters
from common.wire import WIRE_FORMAT, Assignment, Release, from_raw_bytes, raw_bytes

__all__ = ["SocketVault"]

WAIT_SECONDS = 10.0
"""How long one request lets the vault work before it must say that it still does."""

GONE = frozenset(
    (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN)
)
"""What a call ends with when the vault stops in the middle of it, by how far it had come."""

ABSENT_SECONDS = 60.0
"""How long a vault may be away, as while it restarts."""

RETRY_SECONDS = 0.5
MOST_ATTEMPTS = 10

UNLIMITED = -1
"""The vault's answers come from the owner's own process; it limits what it takes, not this end."""


class SocketVault:
    """A vault that is reached over its Unix socket."""

    def __init__(self, path: str, absent_seconds: float = ABSENT_SECONDS) -> None:
        """Reach the vault at `path`; nothing is sent yet."""
        self._address = f"unix:{path}"
        self._absent_seconds = absent_seconds

    @classmethod
    def from_node_config(cls, config: Mapping[str, Any]) -> SocketVault:
        """Find the vault that the node's configuration names: `--node-config 'vault="/path/to/socket"'`.

        Raises:
            Refusal: It names none.
        """
        path = config.get("vault")
        if not isinstance(path, str) or not path.startswith("/"):
            raise Refusal("no-vault", "the node's configuration has no absolute path of a vault's socket")
        return cls(path)

    def subjects(self) -> Sequence[str]:
        """Who lives here.

        Raises:
            Refusal: The vault does not answer.
        """
        # Not waited for: whoever asks this asks again.
        return list(self._ask("Subjects", messages.SubjectsRequest(), absent_seconds=0.0).subjects)

    def train(self, assignment: Assignment) -> Release:
        """Have the assigned subjects trained, and wait for what may leave.

        Raises:
            Refusal: The vault refused, with its code, or does not answer any more.
        """
        reply = self._trained(assignment)
        total = from_raw_bytes(reply.release.total, reply.release.dtype)
        return Release(total, reply.release.users, reply.release.receipt)

    def join(self, assignment: Assignment) -> SumLetters:
        """Have the subject trained for a secure sum, and wait for its keys of the round.

        Raises:
            Refusal: The vault refused, with its code, or does not answer any more.
        """
        keys = self._trained(assignment).keys
        spec = assignment.spec
        return SumLetters(spec.run, assignment.round, Leg.KEYS, dict.fromkeys(assignment.users, keys), {})

    def answer(self, asked: SumLetters) -> SumLetters:
        """Hand letters of a secure sum on, and bring back the answers.

        A letter that was answered is not answered again, so a vault that is away loses the round.

        Raises:
            Refusal: The vault does not answer.
        """
        letters: dict[str, bytes] = {}
        refused: dict[str, str] = {}
        for subject, message in asked.letters.items():
            request = messages.SumRequest(
                format=written(WIRE_FORMAT),
                run=asked.run,
                round=asked.round,
                leg=asked.leg,
                subject=subject,
                message=message,
            )
            reply = self._ask("Sum", request, absent_seconds=0.0)
            if reply.refusal:
                refused[subject] = reply.refusal
            else:
                letters[subject] = reply.answer
        return SumLetters(asked.run, asked.round, asked.leg, letters, refused)

    def _trained(self, assignment: Assignment) -> messages.CollectReply:
        """Ask for training until it is done, and return what came of it."""
        request = messages.TrainRequest(
            format=written(WIRE_FORMAT),
            spec=assignment.spec.to_text(),
            round=assignment.round,
            subjects=assignment.users,
            vector=raw_bytes(assignment.vector),
            clip_scale=assignment.clip_scale if assignment.clip_scale != 1.0 else 0.0,
        )
        for _ in range(MOST_ATTEMPTS):
            accepted = self._ask("Train", request, self._absent_seconds)
            if accepted.refusal:
                raise Refusal(accepted.refusal, "the vault refused")
            reply = self._collect(accepted.ticket)
            if not reply.refusal:
                return reply
            if reply.refusal != "unknown-ticket":  # or else the vault was restarted before it was done
                raise Refusal(reply.refusal, "the vault refused")
            time.sleep(RETRY_SECONDS)
        raise Refusal("no-vault", "the vault does not stay up for long enough")

    def _collect(self, ticket: str) -> messages.CollectReply:
        request = messages.CollectRequest(ticket=ticket, wait_seconds=WAIT_SECONDS)
        while True:
            reply = self._ask("Collect", request, self._absent_seconds)
            if not reply.pending:
                return reply

    def _ask(self, method: str, request: Any, absent_seconds: float) -> Any:
        """Make one call, also of a vault that is away for a moment; every call here may be repeated."""
        options = [
            ("grpc.max_receive_message_length", UNLIMITED),
            ("grpc.max_send_message_length", UNLIMITED),
            ("grpc.enable_http_proxy", 0),
        ]
        deadline = time.monotonic() + absent_seconds
        while True:
            with grpc.insecure_channel(self._address, options=options) as channel:
                try:
                    return getattr(FleetStub(channel), method)(request, timeout=3 * WAIT_SECONDS)
                except grpc.RpcError as error:
                    gone = error.code() in GONE
                    if not gone or time.monotonic() >= deadline:
                        raise Refusal("no-vault" if gone else "failed", "the vault does not answer") from None
            time.sleep(RETRY_SECONDS)
