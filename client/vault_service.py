"""The vault as a process of its own: serves the fleet over a Unix socket, one assignment at a time.

Whoever connects is taken to be hostile: a bundle is the server's code. It can ask for what `vault.proto` lists, and
gets gated bytes, a code, or nothing. `Train` acknowledges and `Collect` fetches, because Flower ends a client's process
whenever it likes: what was trained is kept, sealed, and the same (run, round, spec) gives the same bytes under the same
debit, whatever vector is sent along the second time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import grpc

from client import vault_pb2 as messages
from client.vault_pb2_grpc import FleetServicer, add_FleetServicer_to_server
from common.errors import ConfigError, Refusal, StoreError
from common.files import make_private_folder, take_lock, write_private_file
from common.formats import readable, said
from common.keys import open_sealed, seal
from common.secagg_messages import Leg
from common.sum_wire import SumLetters
from common.wire import (
    REFUSAL_CODES,
    WIRE_FORMAT,
    Assignment,
    Release,
    ReleaseSpec,
    canonical,
    from_raw_bytes,
    raw_bytes,
)

__all__ = ["FleetService", "Outbox", "serving"]

MOST_PENDING = 4
"""Assignments that may wait; more are refused, so that a bundle cannot fill the memory."""

MOST_WAIT_SECONDS = 20.0
MOST_KEPT = 32
"""Releases that are kept for a second request; of older ones the ledger remembers what they were."""

THREADS = 8
MOST_CALLS = 32
SPEC_BYTES = 2 << 20
"""Room in a request beside the vector: for a spec, or for the letter of a round of 2,000 devices."""

LONGEST_SOCKET_PATH = 100

_IS_TICKET = re.compile("[0-9a-f]{64}")

_log = logging.getLogger("homespun.vault")


class FleetVault(Protocol):
    """The part of a vault that is served."""

    def subjects(self) -> Any:
        """Who lives here."""
        ...

    def train(self, assignment: Assignment) -> Release:
        """Train and gate."""
        ...

    def join(self, assignment: Assignment) -> SumLetters:
        """Train, and begin a secure sum."""
        ...

    def answer(self, asked: SumLetters) -> SumLetters:
        """Answer letters of a secure sum."""
        ...


class Outbox:
    """Releases by ticket, each sealed in a file of its own; the newest are kept."""

    def __init__(self, folder: Path, key: bytes) -> None:
        """Keep releases in `folder`, sealed under `key`."""
        make_private_folder(folder)
        self._folder = folder
        self._key = key

    def get(self, ticket: str) -> Release | None:
        """Find what was released under a ticket; None where it is not kept, or not any more.

        Raises:
            StoreError: A file was changed, or sealed under another key.
        """
        path = self._path(ticket)
        try:
            sealed = path.read_bytes()
        except FileNotFoundError:
            return None
        head, _, data = open_sealed(self._key, sealed, _context(ticket)).partition(b"\n")
        try:
            facts = json.loads(head)
            return Release(from_raw_bytes(data, facts["dtype"]), facts["users"], facts["receipt"])
        except (ValueError, KeyError, TypeError):
            raise StoreError(f"{path}: not a release") from None

    def put(self, ticket: str, release: Release) -> None:
        """Keep a release, on disk when this returns, and drop the oldest beyond the limit."""
        facts = {"dtype": str(release.total.dtype), "users": release.users, "receipt": release.receipt}
        content = canonical(facts) + b"\n" + raw_bytes(release.total)
        write_private_file(self._path(ticket), seal(self._key, content, _context(ticket)), replace=True)
        kept = sorted(self._folder.glob("*.sealed"), key=lambda path: path.stat().st_mtime_ns)
        for old in kept[:-MOST_KEPT]:
            old.unlink(missing_ok=True)

    def _path(self, ticket: str) -> Path:
        return self._folder / f"{ticket}.sealed"


class FleetService(FleetServicer):
    """Answers a bundle's requests; trains in one thread, in the order of the requests."""

    def __init__(
        self,
        vault: FleetVault,
        outbox: Outbox,
        *,
        model: str,
        note_refusal: Callable[[str, str], None] = lambda code, reason: None,  # noqa: ARG005
    ) -> None:
        """Serve `vault`, whose base has the digest `model`.

        `note_refusal` is told, for the owner, what is refused here; the vault tells of its own refusals itself.
        """
        self._vault = vault
        self._outbox = outbox
        self._model = model
        self._note_refusal = note_refusal
        self._lock = threading.Lock()
        self._jobs: dict[str, Future[None]] = {}
        self._keys: dict[str, bytes] = {}  # of secure sums; not on disk, because the secrets behind them are not
        self._trainer = ThreadPoolExecutor(1, thread_name_prefix="vault-trainer")

    def close(self) -> None:
        """Take no more work; what is being trained is finished first."""
        self._trainer.shutdown(wait=True, cancel_futures=True)

    def Status(self, request: messages.StatusRequest, context: Any) -> messages.StatusReply:  # noqa: ARG002, D102
        with self._lock:
            pending = sum(1 for job in self._jobs.values() if not job.done())
        return messages.StatusReply(format=WIRE_FORMAT, model=self._model, pending=pending)

    def Subjects(self, request: messages.SubjectsRequest, context: Any) -> messages.SubjectsReply:  # noqa: ARG002, D102
        return messages.SubjectsReply(subjects=self._vault.subjects())

    def Train(self, request: messages.TrainRequest, context: Any) -> messages.TrainReply:  # noqa: ARG002, D102
        try:
            return messages.TrainReply(ticket=self._accept(request))
        except Refusal as refusal:
            self._note_refusal(refusal.code, str(refusal))
            return messages.TrainReply(refusal=_code_of(refusal))
        except Exception as error:
            return messages.TrainReply(refusal=_code_of(error))

    def Collect(self, request: messages.CollectRequest, context: Any) -> messages.CollectReply:  # noqa: ARG002, D102
        try:
            release = self._fetch(request.ticket, request.wait_seconds)
        except Exception as error:
            return messages.CollectReply(refusal=_code_of(error))
        if release is None:
            return messages.CollectReply(pending=True)
        if isinstance(release, bytes):
            return messages.CollectReply(keys=release)
        return messages.CollectReply(
            release=messages.Release(
                total=raw_bytes(release.total),
                dtype=str(release.total.dtype),
                users=release.users,
                receipt=release.receipt,
            )
        )

    def Sum(self, request: messages.SumRequest, context: Any) -> messages.SumReply:  # noqa: ARG002, D102
        try:
            return messages.SumReply(answer=self._answer(request))
        except Exception as error:
            return messages.SumReply(refusal=_code_of(error))

    def _answer(self, request: messages.SumRequest) -> bytes:
        try:
            if not readable(request.format, WIRE_FORMAT):
                raise Refusal("format", said(request.format, WIRE_FORMAT, "the bundle's request"))
            try:
                leg = Leg(request.leg)
            except ValueError:
                raise Refusal("bad-message", "there is no such leg") from None
        except Refusal as refusal:
            self._note_refusal(refusal.code, str(refusal))
            raise
        asked = SumLetters(request.run, request.round, leg, {request.subject: request.message}, {})
        answer = self._vault.answer(asked)
        if request.subject in answer.refused:
            raise Refusal(answer.refused[request.subject], f"a letter of leg {leg.name.lower()} was refused")
        return answer.letters[request.subject]

    def _accept(self, request: messages.TrainRequest) -> str:
        if not readable(request.format, WIRE_FORMAT):
            raise Refusal("format", said(request.format, WIRE_FORMAT, "the bundle's request"))
        try:
            vector = from_raw_bytes(request.vector, "float32")
        except ValueError:
            raise Refusal("bad-request", "the shared vector is not a whole number of float32") from None
        spec = ReleaseSpec.from_text(request.spec)
        scale = request.clip_scale or 1.0
        assignment = Assignment(spec, request.round, tuple(request.subjects), vector, clip_scale=scale)
        ticket = _ticket(assignment)
        with self._lock:
            job = self._jobs.get(ticket)
            if (job is not None and not job.done()) or ticket in self._keys or self._outbox.get(ticket) is not None:
                return ticket
            waiting = {name: job for name, job in self._jobs.items() if not job.done()}
            if len(waiting) >= MOST_PENDING:
                raise Refusal("busy", f"{MOST_PENDING} assignments wait already")
            if len(self._jobs) > MOST_KEPT:
                self._jobs = waiting
            self._jobs[ticket] = self._trainer.submit(self._train, ticket, assignment)
        return ticket

    def _train(self, ticket: str, assignment: Assignment) -> None:
        if assignment.spec.noise == "distributed":
            (keys,) = self._vault.join(assignment).letters.values()
            with self._lock:
                self._keys = {**dict(list(self._keys.items())[1 - MOST_KEPT :]), ticket: keys}
            return
        # The gate's debit is on disk when `train` returns. A crash before the next line is over sends nothing.
        self._outbox.put(ticket, self._vault.train(assignment))

    def _fetch(self, ticket: str, wait_seconds: float) -> Release | bytes | None:
        """Find a release, or the keys of a secure sum; None while it is being made."""
        with self._lock:
            job = self._jobs.get(ticket)
        if job is not None:
            wait([job], min(wait_seconds, MOST_WAIT_SECONDS) if wait_seconds > 0 else 0.0)
            if not job.done():
                return None
            job.result()
        if ticket in self._keys:
            return self._keys[ticket]
        release = self._outbox.get(ticket) if _IS_TICKET.fullmatch(ticket) else None
        if release is None:
            raise Refusal("unknown-ticket", "nothing is known of this ticket")
        return release


@contextmanager
def serving(service: FleetService, path: Path, *, dim: int) -> Generator[None]:
    """Serve on the Unix socket `path` inside the block; afterwards the socket is gone.

    Args:
        service: What answers.
        path: Of the socket; a missing folder is made. Whoever may write to the socket may ask: owner and group.
        dim: Numbers of the largest shared vector that is taken.

    Raises:
        ConfigError: The path is too long for a socket, or cannot be bound.
        Refusal: Another vault serves there.
    """
    path = path.absolute()
    if len(os.fsencode(path)) > LONGEST_SOCKET_PATH:
        raise ConfigError(f"{path}: too long for a Unix socket; at most {LONGEST_SOCKET_PATH} bytes")
    if not path.parent.exists():
        path.parent.mkdir(mode=0o710, parents=True)
    lock = take_lock(path, "vault-running")
    server = grpc.server(
        ThreadPoolExecutor(THREADS, thread_name_prefix="vault-fleet"),
        maximum_concurrent_rpcs=MOST_CALLS,
        options=[("grpc.max_receive_message_length", 4 * dim + SPEC_BYTES), ("grpc.max_send_message_length", -1)],
    )
    add_FleetServicer_to_server(service, server)
    try:
        before = os.umask(0o117)
        try:
            server.add_insecure_port(f"unix:{path}")
        except RuntimeError:
            raise ConfigError(f"{path}: cannot be bound as a socket") from None
        finally:
            os.umask(before)
        server.start()
        try:
            yield
        finally:
            server.stop(grace=1.0).wait()
            service.close()
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _ticket(assignment: Assignment) -> str:
    """Name (run, round, spec) and whose it is; not the vector, so that another vector is no second release."""
    named = [assignment.spec.run, assignment.round, assignment.spec.digest, sorted(assignment.users)]
    return hashlib.sha256(canonical(named)).hexdigest()


def _context(ticket: str) -> bytes:
    return b"homespun outbox 1 " + ticket.encode()


def _code_of(error: Exception) -> str:
    """Say no with a code; why is for the owner's log, and an exception's own text for nobody: it may hold records."""
    if isinstance(error, Refusal):
        _log.warning("refused %s: %s", error.code, error)
        return error.code if error.code in REFUSAL_CODES else "failed"
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    where = f"{place.tb_frame.f_code.co_filename}:{place.tb_lineno}" if place is not None else "nowhere"
    _log.error("failed: %s at %s", type(error).__name__, where)
    return "failed"
