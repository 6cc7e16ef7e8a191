"""Where measurements and health of a coordinator are read: OpenMetrics over plain HTTP, on an address of its own."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from common.errors import HomespunError
from server import fleet_runs, run_folder
from server.certificates import Authority
from server.enrolment import Enrolment
from server.forwarder import Receive, Scope, Send, Traffic
from server.measures import exposition, read_measures, without_rare
from server.server_home import ServerHome

__all__ = ["Watch"]

TYPE = b"application/openmetrics-text; version=1.0.0; charset=utf-8"


class Watch:
    """An ASGI application of two paths, `/metrics` and `/health`."""

    def __init__(
        self,
        home: ServerHome,
        traffic: Traffic,
        online: Callable[[], int],
        authority: Authority,
        *,
        clock: Callable[[], datetime],
    ) -> None:
        """Watch the coordinator in `home`."""
        self._home = home
        self._traffic = traffic
        self._online = online
        self._authority = authority
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            while scope["type"] == "lifespan":
                message = await receive()
                await send({"type": f"{message['type']}.complete"})
                if message["type"] == "lifespan.shutdown":
                    return
            return
        status, kind, body = 404, b"text/plain", b"not here; /metrics and /health are\n"
        if scope["path"] == "/health":
            status, body = 200, b"ok\n"
        elif scope["path"] == "/metrics":
            status, kind, body = 200, TYPE, (await asyncio.to_thread(self.text)).encode()
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def text(self) -> str:
        """Everything that is measured now."""
        samples: list[tuple[str, Mapping[str, str], float]] = []
        states = Counter(device.state for device in Enrolment(self._home.devices).devices())
        samples += [("devices", {"state": state}, float(count)) for state, count in sorted(states.items())]
        samples.append(("devices_online", {}, float(self._online())))
        samples.append(("turned_away", {}, float(self._traffic.turned_away)))
        samples.append(("bytes", {"direction": "received"}, float(self._traffic.received)))
        samples.append(("bytes", {"direction": "sent"}, float(self._traffic.sent)))
        samples.append(("certificate_days", {}, float(self._authority.days_left("leaf", now=self._clock()))))
        for path in sorted(self._home.runs.glob("[!.]*")) if self._home.runs.is_dir() else ():
            try:
                samples += self._of_run(fleet_runs.overview(path), {"run": path.name})
            except HomespunError:
                continue
        return exposition(samples)

    def _of_run(self, seen: fleet_runs.Overview, label: dict[str, str]) -> list[Any]:
        age = time.time() - (self._home.runs / seen.name / run_folder.CHECKPOINT).stat().st_mtime
        samples: list[Any] = [
            ("rounds", label, float(seen.round)),
            ("rounds_wanted", label, float(seen.rounds)),
            ("epsilon_budget", label, float(seen.spec.epsilon)),
            ("checkpoint_age_seconds", label, age),
        ]
        measured = read_measures(self._home.runs / seen.name)
        if measured is not None:
            samples.append(("answered", label, float(measured.answered)))
            samples.append(("round_seconds", label, measured.round_seconds))
            samples.append(("epsilon", label, float(measured.epsilon)))
            for reason, count in sorted(without_rare(measured.refused).items()):
                samples.append(("refused", {**label, "reason": reason}, float(count)))
        return samples
