"""The resident coordinator: Flower's SuperLink and SuperExec under supervision, the door before them, runs that go on.

Everything that must survive is in files before it is acted on, so this process may be killed at any instant: started
again, it takes Flower's processes along, lets the same devices in, and goes on with the same runs.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import signal
import socket
import ssl
import sys
from collections.abc import Generator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from common.errors import HomespunError, StoreError
from common.files import make_private_folder, take_lock, write_private_file
from common.supervision import Supervised, program
from server.certificates import ROOT_DAYS, Authority
from server.device_calls import DeviceCalls
from server.door_watch import Watch
from server.forwarder import Door
from server.run_folder import signing_key
from server.run_keeper import RunKeeper
from server.server_home import ServerHome, bound
from server.superlink import SuperLink

__all__ = ["Coordinator", "log_event"]

TEND_SECONDS = 1.0
RENEWED_SECONDS = 5.0
FLOWER_LOOPBACK = "127.0.0.1"


def log_event(event: str, **facts: Any) -> None:
    """Write one line of JSON to standard error."""
    line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "event": event, **facts}
    sys.stderr.write(json.dumps(line) + "\n")
    sys.stderr.flush()


class _Server(uvicorn.Server):
    """Leaves signals to whoever runs several servers in one process."""

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        """Capture none."""
        yield


class Coordinator:
    """One coordinator, from `up` until it is told to stop."""

    def __init__(self, home: ServerHome, *, version: str, metrics: str = "", capture: Path | None = None) -> None:
        """Coordinate what is in `home`, whose settings name the address.

        Args:
            home: The folder.
            version: Of Homespun.
            metrics: Where measurements are served, `host:port`; empty for nowhere.
            capture: Where every request and answer is written in the clear; for an audit.
        """
        self._home = home
        self._version = version
        self._metrics = metrics
        self._capture = capture
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Coordinate until SIGTERM or SIGINT.

        Raises:
            Refusal: Another coordinator runs in this folder.
            ConfigError: An address cannot be listened on.
        """
        lock = take_lock(self._home.folder / "coordinator", "coordinator-running")
        try:
            await self._run()
        finally:
            self._home.note_stopped()
            os.close(lock)

    async def _run(self) -> None:
        settings = self._home.settings()
        address, listen = str(settings["address"]), str(settings["listen"])
        authority = self._authority(address)
        # Before anything starts, and before it is said that this one runs.
        places = [bound(one) for one in (listen, self._metrics) if one]
        inner = f"{FLOWER_LOOPBACK}:{_free_port(settings.get('superlink_port'))}"
        self._home.change_settings(superlink_port=int(inner.rpartition(":")[2]))
        flower = _flower_processes(self._home, authority, inner)
        superlink = SuperLink(inner, authority.root.read_bytes())
        calls = DeviceCalls(self._home, signing_key(), version=self._version, clock=_now)
        keeper = RunKeeper(self._home, superlink, self._version, log_event)
        async with httpx.AsyncClient(
            base_url=f"https://{inner}", verify=_trusting(authority.root), timeout=60.0, limits=_LIMITS
        ) as client:
            door = Door(client, calls, clock=_now, capture=self._capture)
            servers = [_served(door, authority.pair("leaf"))]
            if self._metrics:
                watch = Watch(self._home, door.traffic, keeper.online, authority, clock=_now)
                servers.append(_served(watch, None))
            loop = asyncio.get_running_loop()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.add_signal_handler(number, self._stop.set)
            tasks = [loop.create_task(server.serve(sockets)) for server, sockets in zip(servers, places, strict=True)]
            tasks.append(loop.create_task(self._follow_certificate(servers[0], authority)))
            try:
                self._home.note_running(address, inner, self._metrics)
                log_event("up", address=address, listen=listen, metrics=self._metrics or None)
                await self._tend(flower, keeper, tasks)
            finally:
                log_event("down")
                for server in servers:
                    server.should_exit = True
                await asyncio.wait(tasks[: len(servers)], timeout=5.0)
                for task in tasks:
                    task.cancel()
                # SuperExec first: the server's app hears of it, and its checkpoint is durable anyway.
                for process in reversed(flower):
                    await asyncio.to_thread(process.stop)
                superlink.close()

    async def _tend(self, flower: list[Supervised], keeper: RunKeeper, tasks: list[asyncio.Task[Any]]) -> None:
        while not self._stop.is_set():
            for process in flower:
                started = process.starts
                process.tend()
                if process.starts > max(started, 1):
                    log_event("restarted", process=flower.index(process), last_exit=process.last_exit)
            try:
                await asyncio.to_thread(keeper.tend)
            except HomespunError as error:
                log_event("waiting", reason=str(error))
            for task in tasks:
                if task.done() and not self._stop.is_set():
                    task.result()
                    raise StoreError("a server of the coordinator ended by itself")
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), TEND_SECONDS)

    def _authority(self, address: str) -> Authority:
        now = _now()
        authority = Authority.open(self._home.tls, now=now)
        host = address.rpartition(":")[0]
        if not authority.pair("leaf")[0].exists():
            authority.issue("leaf", [host, "localhost", FLOWER_LOOPBACK], now=now)
        if not authority.pair("inner")[0].exists():
            authority.issue("inner", ["localhost", FLOWER_LOOPBACK], now=now, days=ROOT_DAYS)
        warning = authority.warning(now=now)
        if warning:
            log_event("certificate", warning=warning)
        return authority

    async def _follow_certificate(self, server: uvicorn.Server, authority: Authority) -> None:
        """Take a renewed leaf up without a restart: connections that stand stay, new ones see it."""
        certificate, key = authority.pair("leaf")
        seen = certificate.stat().st_mtime_ns
        while True:
            await asyncio.sleep(RENEWED_SECONDS)
            now = certificate.stat().st_mtime_ns
            context = server.config.ssl
            if now != seen and context is not None:
                with suppress(ssl.SSLError):  # between two files of one pair
                    context.load_cert_chain(certificate, key)
                    seen = now
                    log_event("certificate", renewed=True)


_LIMITS = httpx.Limits(max_connections=200, max_keepalive_connections=50)


def _served(app: Any, pair: tuple[Path, Path] | None) -> uvicorn.Server:
    certificate, key = pair if pair is not None else (None, None)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        ws="none",
        server_header=False,
        date_header=True,  # by it a device's `doctor` finds a clock that is wrong
        timeout_keep_alive=75,
        ssl_certfile=certificate,
        ssl_keyfile=key,
    )
    return _Server(config)


def _flower_processes(home: ServerHome, authority: Authority, inner: str) -> list[Supervised]:
    make_private_folder(home.flower)
    secret = home.flower / "superexec.secret"
    if not secret.exists():
        write_private_file(secret, secrets.token_bytes(32))
    host, _, port = inner.rpartition(":")
    certificate, key = authority.pair("inner")
    trust = [str(authority.root), str(certificate), str(key)]
    link = [
        *(program("flower-superlink"), "--host", host, "--port", port),
        *("--ssl-ca-certfile", trust[0], "--ssl-certfile", trust[1], "--ssl-keyfile", trust[2]),
        *("--enable-supernode-auth", "--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret), "--database", str(home.flower / "superlink.sqlite")),
    ]
    executor = [
        *(program("flower-superexec"), "--runtime-api-address", inner, "--root-certificates", str(authority.root)),
        *("--superexec-auth-secret-file", str(secret)),
    ]
    environment = {
        **os.environ,
        "FLWR_HOME": str(home.flower),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }
    for name in ("SSL_CERT_FILE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        environment.pop(name, None)
    return [
        Supervised(link, home.flower / "superlink.log", environment=environment, folder=home.flower),
        Supervised(executor, home.flower / "superexec.log", environment=environment, folder=home.flower),
    ]


def _trusting(root: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(root)
    return context


def _free_port(kept: Any) -> int:
    """The port that was used before if it is free, so that whoever survived a restart finds it again."""
    for port in (kept, 0):
        if not isinstance(port, int):
            continue
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(OSError):
                one.bind((FLOWER_LOOPBACK, port))
                return int(one.getsockname()[1])
    raise StoreError("no port on loopback is free")


def _now() -> datetime:
    return datetime.now(UTC)
