"""What the coordinator answers devices by itself: enrolling, how things stand, the newest adapter, the base model.

A device calls now and then, chosen or not, and every device gets the same answer about runs, the newest global adapter
included. So neither what it asks nor what it gets shows who was in a cohort. Whether it would take part, and why not,
it says of everything that is open, before anybody is drawn.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import DataError, HomespunError, Refusal, VerificationError
from common.fleet import FORMAT, RequestGuard, device_id, reply_object
from common.formats import written
from common.keys import SigningKey
from common.ledger import Head
from common.model_files import is_digested
from common.vouched_roster import check_enrolment, federation_of
from server import fleet_runs, run_folder
from server.certificates import Authority
from server.checkpoint import Checkpoint
from server.enrolment import Enrolment
from server.forwarder import OWN, Answer
from server.server_home import ServerHome

__all__ = ["DeviceCalls"]

CACHE_SECONDS = 1.0
PART_BYTES = 1 << 20
MOST_PROOFS = 64
SUBJECT_CHARACTERS = 64


class DeviceCalls:
    """Answers below `/v1/homespun/`."""

    def __init__(self, home: ServerHome, key: SigningKey, *, version: str, clock: Callable[[], datetime]) -> None:
        """Answer for the coordinator in `home`, whose ledgers `key` signs."""
        self._home = home
        self._key = key
        self._version = version
        self._clock = clock
        self._enrolment = Enrolment(home.devices)
        self._guard = RequestGuard()
        self._states: tuple[float, dict[str, str]] = (-CACHE_SECONDS, {})
        self._runs: tuple[float, list[dict[str, Any]]] = (-CACHE_SECONDS, [])
        self._untold = 0
        self._adapters: dict[str, tuple[int, bytes]] = {}

    async def answer(self, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Answer one request."""
        now = self._clock()
        try:
            public = self._guard.check(headers, path, body, now=now)
            asked = reply_object(body)
            name = path.removeprefix(OWN)
            if name == "enrol":
                return await asyncio.to_thread(self._enrol, public, asked, now)
            if not self.admits(public):
                device = await asyncio.to_thread(self._enrolment.device, device_id(public))
                raise Refusal(device.state if device is not None else "not-enrolled", "not approved")
            if name == "standing":
                return await asyncio.to_thread(self._standing, public, asked, now)
            if name == "leave":
                await asyncio.to_thread(self._enrolment.set_state, device_id(public), "left")
                self._states = (-CACHE_SECONDS, {})
                return Answer.of(200, format=written(FORMAT), status="left")
            if name == "adapter":
                return await asyncio.to_thread(self._adapter, asked)
            if name == "roster":
                return await asyncio.to_thread(self._roster, asked)
            if name == "base":
                return await asyncio.to_thread(self._base_files, asked)
            if name == "base-file":
                return await asyncio.to_thread(self._base_file, asked)
        except Refusal as refusal:
            await asyncio.to_thread(self._enrolment.note_refused, refusal.code, now=now)
            status = 403 if refusal.code in ("revoked", "left", "pending", "not-enrolled") else 401
            return Answer.of(status, format=written(FORMAT), error=refusal.code)
        except HomespunError:
            return Answer.of(400, format=written(FORMAT), error="bad-request")
        return Answer.of(404, format=written(FORMAT), error="unknown")

    def admits(self, public_key: bytes) -> bool:
        """Whether a device is approved now; a change of mind takes effect within a second."""
        asked_at, states = self._states
        if time.monotonic() - asked_at > CACHE_SECONDS:
            states = {one.id: one.state for one in self._enrolment.devices()}
            self._states = (time.monotonic(), states)
        return states.get(device_id(public_key)) == "approved"

    def _enrol(self, public: bytes, asked: dict[str, Any], now: datetime) -> Answer:
        token, version, subject = (str(asked.get(name, "")) for name in ("token", "version", "subject"))
        if not (subject.isalnum() and 16 <= len(subject) <= SUBJECT_CHARACTERS):
            raise Refusal("bad-request", "the device names no subject")
        vouched = None
        if asked.get("enrolment") is not None:  # an older device sends the token itself, and is in no secure sum
            federation = federation_of(Authority(self._home.tls).root.read_text(encoding="ascii"))
            try:
                vouched = check_enrolment(asked["enrolment"], federation, device_id(public))
            except VerificationError:
                raise Refusal("bad-signature", "the device is not vouched for as an invite vouches") from None
        device = self._enrolment.enrol(token, public, version, subject, now=now, vouched=vouched)
        self._states = (-CACHE_SECONDS, {})
        return Answer.of(200, format=written(FORMAT), status=device.state, device=device.id, version=self._version)

    def _standing(self, public: bytes, asked: dict[str, Any], now: datetime) -> Answer:
        head = asked.get("ledger")
        self._enrolment.note_call(
            device_id(public),
            str(asked.get("version", "")),
            str(asked.get("verdict", "")),
            head if _is_signed(head) else None,
            now=now,
        )
        proofs = asked.get("proofs", [])
        if isinstance(proofs, list):
            for proof in proofs[:MOST_PROOFS]:
                self._keep(proof)
        runs, untold = self._open_runs()
        # A device that was put back from a copy takes this answer as all that was spent, so it says what it leaves out.
        return Answer.of(
            200, format=written(FORMAT), status="approved", version=self._version, runs=runs, untold=untold
        )

    def _keep(self, proof: Any) -> None:
        """Give a device's statement to the run that it is about."""
        if not isinstance(proof, dict):
            return
        for path in self._run_folders():
            fleet_runs.keep_proof(path, proof, self._key.verify_key)

    def _open_runs(self) -> tuple[list[dict[str, Any]], int]:
        """Every run, and how many have a ledger here and could not be read."""
        asked_at, runs = self._runs
        if time.monotonic() - asked_at > CACHE_SECONDS:
            found = [(path, self._facts(path)) for path in self._run_folders()]
            runs = [facts for _, facts in found if facts is not None]
            self._untold = sum(1 for path, facts in found if facts is None and (path / run_folder.LEDGER).exists())
            self._runs = (time.monotonic(), runs)
        return runs, self._untold

    def _facts(self, path: Path) -> dict[str, Any] | None:
        try:
            seen = fleet_runs.overview(path)
            round_number, content = self._content(path)
            proof = fleet_runs.spent_proof(path, self._key)
        except HomespunError:
            return None
        return {
            "name": seen.name,
            "run": seen.run,
            "spec": seen.spec.to_text(),
            "open": seen.state in ("waiting", "running"),
            "proof": proof,
            "adapter": {
                "round": round_number,
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            },
        }

    def _adapter(self, asked: dict[str, Any]) -> Answer:
        for path in self._run_folders():
            facts = self._facts(path)
            if facts is not None and facts["run"] == asked.get("run"):
                return Answer(200, self._content(path)[1], "application/octet-stream")
        raise DataError("no such run")

    def _roster(self, asked: dict[str, Any]) -> Answer:
        """Who is in the secure sums of a run, as devices check it."""
        for path in self._run_folders():
            facts, place = self._facts(path), path / fleet_runs.ROSTER
            if facts is not None and facts["run"] == asked.get("run") and place.is_file():
                return Answer(200, place.read_bytes(), "application/json")
        raise DataError("no such run")

    def _content(self, path: Path) -> tuple[int, bytes]:
        """The newest global adapter of a run: its round, and its numbers as they travel."""
        place = path / run_folder.CHECKPOINT
        stamp = place.stat().st_mtime_ns
        kept = self._adapters.get(path.name)
        if kept is None or kept[0] != stamp:
            checkpoint = Checkpoint.load(place)
            content = np.uint32(checkpoint.round).astype("<u4").tobytes() + checkpoint.vector.astype("<f4").tobytes()
            kept = (stamp, content)
            self._adapters[path.name] = kept
        return int(np.frombuffer(kept[1][:4], "<u4")[0]), kept[1]

    def _run_folders(self) -> list[Path]:
        if not self._home.runs.is_dir():
            return []
        return sorted(path for path in self._home.runs.glob("[!.]*") if (path / run_folder.CONFIG).is_file())

    def _base_folder(self, asked: dict[str, Any]) -> Path:
        folder = self._home.settings().get("bases", {}).get(str(asked.get("digest", "")))
        if folder is None or not Path(folder).is_dir():
            raise DataError("this base model is not here")
        return Path(folder)

    def _base_files(self, asked: dict[str, Any]) -> Answer:
        folder = self._base_folder(asked)
        files = [{"name": path.name, "bytes": path.stat().st_size, "sha256": _sum(path)} for path in base_files(folder)]
        return Answer.of(200, format=written(FORMAT), files=files)

    def _base_file(self, asked: dict[str, Any]) -> Answer:
        folder, offset = self._base_folder(asked), asked.get("offset", 0)
        paths = {path.name: path for path in base_files(folder)}
        path = paths.get(str(asked.get("name", "")))
        if path is None or not isinstance(offset, int) or not 0 <= offset <= path.stat().st_size:
            raise DataError("no such part of the base model")
        return Answer(200, _parts(path, offset), "application/octet-stream")


def _is_signed(value: Any) -> bool:
    """Whether it is a head of a ledger, signed by whom it says; an auditor is shown no other."""
    try:
        Head.from_json(value).verify()
    except (VerificationError, ValueError, KeyError, TypeError):
        return False
    return True


def base_files(folder: Path) -> list[Path]:
    """The files of a base model that a device needs: those that its digest names."""
    return sorted(path for path in folder.iterdir() if path.is_file() and is_digested(path.name))


def _sum(path: Path) -> str:
    facts = path.stat()
    return _sum_of(path, facts.st_size, facts.st_mtime_ns)


@lru_cache(maxsize=256)
def _sum_of(path: Path, size: int, changed: int) -> str:  # noqa: ARG001 - a file that changed is read again
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


async def _parts(path: Path, offset: int) -> AsyncIterator[bytes]:
    with path.open("rb") as file:
        file.seek(offset)
        while part := await asyncio.to_thread(file.read, PART_BYTES):
            yield part
