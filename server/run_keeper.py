"""Keeps the SuperLink in step with what the operator decided: who may connect, and which run goes on.

Called once a second. It compares what is on disk with what Flower says and does the one thing that is missing; what a
crash left half done is done at the next call.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from common.canonical import canonical
from common.errors import HomespunError, StoreError
from common.evidence import HEADS
from common.files import write_private_file
from server import fleet_runs, run_folder
from server.enrolment import Enrolment
from server.server_home import ServerHome
from server.superlink import Node, SuperLink, bundle, wipe_updates

__all__ = ["RunKeeper"]

NODES_SECONDS = 3.0
FIRST_SECONDS = 60.0
"""How long a run that was started may take until its app works on it."""

GONE_SECONDS = 8.0
"""How long an app may be gone before it is taken for dead; between two apps there is nothing else to wait for."""

SLOWEST_SECONDS = 300.0


class RunKeeper:
    """One coordinator's hand on Flower."""

    def __init__(
        self,
        home: ServerHome,
        superlink: SuperLink,
        version: str,
        log: Callable[..., None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the runs in `home`; `log` is told of what happens, by an event's name and its facts."""
        self._home = home
        self._superlink = superlink
        self._version = version
        self._log = log
        self._clock = clock
        self._enrolment = Enrolment(home.devices)
        self._asked = -NODES_SECONDS
        self._nodes: tuple[Node, ...] = ()
        self._worked: dict[str, float] = {}
        self._began: dict[str, float] = {}
        self._fab: bytes | None = None
        self._was_up = False

    def online(self) -> int:
        """Devices that are connected now."""
        return sum(1 for node in self._nodes if node.status == "online")

    def tend(self) -> None:
        """Do what is missing now.

        Raises:
            StoreError: The SuperLink does not answer; nothing is lost by trying again.
        """
        if self._clock() - self._asked < NODES_SECONDS:
            return
        try:
            self._nodes = self._superlink.nodes()
        except StoreError:
            if self._was_up:
                self._log("superlink", away=True)
            self._was_up = False
            return
        self._was_up = True
        self._asked = self._clock()
        self._let_in()
        self._run_next()

    def _let_in(self) -> None:
        """Register who was approved, let go who was revoked, and say where each subject lives."""
        nodes = {node.public_key: node for node in self._nodes if node.status != "unregistered"}
        homes: dict[str, int] = {}
        for device in self._enrolment.devices():
            node = nodes.get(device.public_key)
            if device.state == "approved":
                if node is None:
                    number = self._superlink.register(device.public_key)
                    self._log("registered", device=device.id)
                else:
                    number = node.id
                homes[device.subject] = number
            elif node is not None and device.state in ("revoked", "left"):
                self._superlink.unregister(node.id)
                self._log("unregistered", device=device.id, state=device.state)
        for path in self._folders():
            place = path / fleet_runs.HOMES
            content = json.dumps({"format": 1, "homes": homes}, sort_keys=True).encode() + b"\n"
            if not place.exists() or place.read_bytes() != content:
                write_private_file(place, content, replace=True)
            self._keep_heads(path)

    def _keep_heads(self, path: Path) -> None:
        """Write the heads that a run's devices signed into its folder: by them an auditor sees what was forgotten.

        The newest ones, also when the run is over: they cover what came before. How far a ledger got follows how often
        its device took part, so they are as private as receipts are.
        """
        place = path / HEADS
        try:
            subjects = set(json.loads((path / fleet_runs.ENROLLED).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return
        content = b"".join(canonical(head) + b"\n" for head in self._enrolment.heads(subjects))
        if content and (not place.exists() or place.read_bytes() != content):
            write_private_file(place, content, replace=True)

    def _run_next(self) -> None:
        """Have one run worked on, the oldest that waits; wipe what Flower kept when none is."""
        active = False
        for path in self._folders():
            try:
                seen = fleet_runs.overview(path)
            except HomespunError as error:
                self._log("unreadable", run=path.name, reason=str(error))
                continue
            if seen.state in ("finished", "failed", "stopped"):
                if fleet_runs.is_held(path):
                    active = True  # it ends after its round
                    break
                self._end(path, seen.state)
                continue
            active = True
            self._have_worked_on(path, seen)
            break
        if not active:
            self._wipe()

    def _have_worked_on(self, path: Path, seen: fleet_runs.Overview) -> None:
        now, standing = self._clock(), fleet_runs.Standing.load(path)
        if seen.state == "running":
            self._worked[path.name] = now
            if standing.round != seen.round or standing.starts > 1:
                replace(standing, round=seen.round, starts=1).save(path)
            return
        began = self._began.setdefault(path.name, now if standing.flower is not None else now - FIRST_SECONDS)
        worked = self._worked.get(path.name, began - 1.0)
        patience = GONE_SECONDS if worked > began else FIRST_SECONDS
        if standing.starts > 1:  # none came to work: what is slow to begin is not helped by one more that begins
            patience = max(patience, min(FIRST_SECONDS * 2.0 ** (standing.starts - 1), SLOWEST_SECONDS))
        if now - max(began, worked) < patience:
            return
        if standing.flower is not None:
            with suppress(StoreError):  # it has ended, or its database is gone
                self._superlink.stop(standing.flower)
        self._home.flower.joinpath("dirty").touch()
        self._fab = bundle(version=self._version) if self._fab is None else self._fab
        number = self._superlink.start(self._fab, path.absolute())
        again = standing.starts + 1 if standing.round == seen.round else 1
        fleet_runs.Standing(number, again, seen.round).save(path)
        self._began[path.name] = self._clock()
        fleet_runs.note_event(
            path, event="started-again" if again > 1 or seen.round else "started", after_round=seen.round
        )
        self._log("run-started", run=path.name, round=seen.round, again=again > 1, reason=seen.reason or None)

    def _end(self, path: Path, state: str) -> None:
        """Have Flower forget a run that is over."""
        standing = fleet_runs.Standing.load(path)
        if standing.flower is None:
            return
        with suppress(StoreError):
            status = self._superlink.status(standing.flower)
            if status and status != "finished":
                if self._clock() - self._worked.get(path.name, self._asked - GONE_SECONDS) < GONE_SECONDS:
                    return  # Flower writes down how it ended
                self._superlink.stop(standing.flower)
        fleet_runs.Standing(None, 0, standing.round).save(path)
        fleet_runs.note_event(path, event="ended", state=state)
        self._log("run-ended", run=path.name, state=state)

    def _wipe(self) -> None:
        dirty = self._home.flower / "dirty"
        if dirty.exists():
            rows = wipe_updates(self._home.flower / "superlink.sqlite")
            dirty.unlink()
            self._log("wiped", rows=rows)

    def _folders(self) -> list[Path]:
        if not self._home.runs.is_dir():
            return []
        found = [path for path in self._home.runs.glob("[!.]*") if (path / run_folder.CONFIG).is_file()]
        return sorted(found, key=lambda path: ((path / run_folder.CONFIG).stat().st_mtime_ns, path.name))
