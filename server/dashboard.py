"""A live page of one run, for whoever runs the coordinator: reads the run's folder, writes nothing, needs no build.

Served on this machine's loopback only, and only to a browser that asks for it by a loopback name, so that no web page
can have it fetched through a name of its own. It shows rounds, bytes, refusals by reason and what was spent. It shows
no list of devices and nothing by which one could be told from another: who was in a cohort is what amplification rests
on. Of gains it shows what the run released noised and charged, where the owners' policies let it, and each number only
if it is the one that the ledger's release names; of a study, its own scores.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import math
import secrets
import threading
import time
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from common.config import load_config, read_config_file
from common.errors import ConfigError, DataError, Refusal, VerificationError
from common.ledger import Verified, verify
from common.noised_counts import METRICS, NoisedCounts
from common.promise import promise_of
from common.wire import ReleaseSpec

__all__ = ["run_state", "serving"]

LOOPBACK = "127.0.0.1"
PAGE = Path(__file__).with_name("dashboard.html")
"""One document with its style and script; every text of the state is set as text, never as markup."""

LEDGER, LOG, SPEC, CONFIG, TOTALS = "ledger.jsonl", "rounds.jsonl", "spec.json", "config.toml", "measures.json"
COUNTS = "counts.jsonl"
SLOW_SECONDS = 300.0
"""A run whose ledger did not change for so long is said to wait."""


REASONS = {
    "budget-spent": "the owner's budget is spent",
    "busy": "busy with something else",
    "claim-refused": "the promise could not be kept there",
    "closed": "the device was shutting down",
    "failed": "training failed",
    "gate-refused": "the device's own gate let nothing out",
    "layout-mismatch": "other tensors than the base there has",
    "model-mismatch": "another base model there",
    "no-vault": "no vault is running there",
    "not-finite": "the update held no finite numbers",
    "not-here": "not a device of this run",
    "not-now": "not now: hours, power, traffic or pause, as its owner set them",
    "policy-clip": "the owner's policy: clip norm",
    "policy-cohort": "the owner's policy: rounds too small",
    "policy-delta": "the owner's policy: delta",
    "policy-epsilon": "the owner's policy: epsilon",
    "policy-metrics": "the owner's policy: metrics",
    "policy-noise": "the owner's policy: too little noise",
    "policy-not-signed": "the policy is not signed by its owner",
    "policy-rounds": "the owner's policy: too many rounds",
    "policy-trust": "the owner's policy: does not trust a coordinator with updates without noise",
    "policy-unit": "the owner's policy: unit",
    "preflight": "a check before the first release failed",
    "round-answered": "answered this round already",
    "silent": "did not answer in time",
    "small-cohort": "too few devices in the round",
    "too-few": "too few devices were left",
    "too-long": "the update was longer than the clip",
    "turned-away": "turned away: took part as often as the cap allows",
    "unavailable": "lost on the way, or did not answer",
}
"""Why users that were asked are not in the sums, in words; codes that are not here stand for themselves."""


def run_state(folder: Path, *, now: float | None = None) -> dict[str, Any]:
    """Say how the run in `folder` stands, as a JSON object; a file that is being written is read as far as it is whole.

    Args:
        folder: The run.
        now: Seconds since 1970; the clock's when absent.

    Raises:
        DataError: There is no run here.
        VerificationError: Its ledger does not check out.
    """
    if not (folder / CONFIG).is_file() or not (folder / LEDGER).is_file():
        raise DataError(f"{folder}: no run in this folder")
    config = load_config(read_config_file(folder / CONFIG))
    try:
        spec = ReleaseSpec.from_text((folder / SPEC).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, Refusal):
        raise DataError(f"{folder / SPEC}: missing or damaged") from None
    content = (folder / LEDGER).read_bytes()
    verified = verify(content[: content.rfind(b"\n") + 1])
    rounds = _rounds(folder / LOG)
    releases = [(entry.body.get("round"), entry.time) for entry in verified.entries if entry.kind == "release"]
    done = max((int(number) for number, _ in releases if isinstance(number, int)), default=0)
    age = (time.time() if now is None else now) - (folder / LEDGER).stat().st_mtime
    finished = done >= config.rounds
    promise = promise_of(spec)
    return {
        "name": folder.resolve().name,
        "state": "finished" if finished else "waiting" if age > SLOW_SECONDS else "running",
        "seconds_since_last_entry": max(0, round(age)),
        "rounds_done": done,
        "rounds_planned": config.rounds,
        "spares": config.spare_rounds,
        "debits": sum(1 for entry in verified.entries if entry.kind == "debit"),
        "population": spec.population,
        "cohort": round(spec.sampling_rate * spec.population, 1),
        "method": config.method,
        "noise": promise.noise,
        "unit": spec.unit,
        "adjacency": str(promise.adjacency),
        "delta": spec.delta,
        "budget": spec.epsilon if spec.epsilon == "inf" else float(spec.epsilon),
        "rehearsal": config.rehearsal,
        "spent": _spent(verified, spec, promise),
        "seen_without_noise": "the coordinator" if promise.noise == "central" else "nobody",
        "last_rounds": [[number, moment] for number, moment in releases[-6:][::-1]],
        "refusals": _refusals(folder, rounds),
        "bytes_down": 4.0 * spec.model_dim * len(releases) * spec.sampling_rate * spec.population,
        "bytes_up": 4.0 * spec.dim * len(releases) * spec.sampling_rate * spec.population,
        "gains": [[row["round"], row["evaluation"]] for row in rounds if row.get("evaluation")],
        "noised": _noised(folder / COUNTS, verified, spec),
        "is_study": verified.header.get("role") == "study",
        "head": verified.head.hash,
    }


@contextmanager
def serving(folder: Path, port: int = 0) -> Generator[str]:
    """Serve the page of the run in `folder` inside the block; gives its address.

    Raises:
        DataError, VerificationError: As for `run_state`; the page is not begun.
        ConfigError: The port is taken.
    """
    run_state(folder)
    try:
        server = http.server.ThreadingHTTPServer((LOOPBACK, port), _handler(folder))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port: {port} cannot be served on: {getattr(error, 'strerror', error)}") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
    thread.start()
    try:
        yield f"http://{LOOPBACK}:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(folder: Path) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        """Two things to get: the page, and how the run stands."""

        server_version = "homespun"
        sys_version = ""

        def do_GET(self) -> None:
            host = self.headers.get("Host", "").rpartition(":")[0]
            if host not in (LOOPBACK, "localhost"):
                self._answer(403, "text/plain", b"asked for by another name than this machine's\n")
            elif self.path == "/":
                nonce = secrets.token_urlsafe(18)
                self._answer(200, "text/html", PAGE.read_text(encoding="utf-8").replace("NONCE", nonce).encode(), nonce)
            elif self.path == "/state.json":
                self._answer(200, "application/json", _state(folder))
            else:
                self._answer(404, "text/plain", b"there is / and /state.json\n")

        def log_message(self, format: str, *args: Any) -> None:
            """Keep the terminal quiet."""

        def _answer(self, code: int, kind: str, body: bytes, nonce: str = "") -> None:
            self.send_response(code)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Frame-Options", "DENY")
            policy = f"default-src 'none'; connect-src 'self'; img-src data:; style-src 'nonce-{nonce}'; "
            self.send_header("Content-Security-Policy", f"{policy}script-src 'nonce-{nonce}'; frame-ancestors 'none'")
            with suppress(ConnectionError):  # the browser left
                self.end_headers()
                self.wfile.write(body)

    return Handler


def _state(folder: Path) -> bytes:
    """The state, or in words why there is none: a page that goes on asking shows it again when it is mended."""
    try:
        state = run_state(folder)
    except (DataError, VerificationError, ConfigError) as error:
        state = {"error": str(error)}
    return json.dumps(state, allow_nan=False).encode()


def _rounds(path: Path) -> list[dict[str, Any]]:
    """The log's lines; one that is being written is not there yet."""
    found: list[dict[str, Any]] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return found
    for line in lines:
        try:
            row: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("round"), int):
            found.append(_finite(row))
    return found


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        str(name): "inf" if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }


def _spent(verified: Verified, spec: ReleaseSpec, promise: Any) -> list[list[Any]]:
    """Epsilon after each of at most forty debits, as [debits, epsilon]; every enrolled user is charged alike."""
    from common.accounting import epsilon_of

    debits = sum(1 for entry in verified.entries if entry.kind == "debit")
    if spec.epsilon == "inf" or not debits:
        return []
    step = max(1, math.ceil(debits / 40))
    counts = sorted({*range(step, debits + 1, step), debits})
    return [
        [
            count,
            epsilon_of([promise.schedule(spec.noise_multiplier, count)], spec.delta, adjacency=promise.adjacency),
        ]
        for count in counts
    ]


def _refusals(folder: Path, rounds: list[dict[str, Any]]) -> list[list[Any]]:
    """How many users were asked and are not in the sums, by reason, over all rounds and never per round.

    A study's log has them by round; a coordinator of devices keeps nothing but the totals.
    """
    try:
        kept: Any = json.loads((folder / TOTALS).read_text(encoding="utf-8"))
        told: list[Any] = [kept["refused"]]
    except (OSError, ValueError, KeyError, TypeError):
        told = [row.get("rejected") for row in rounds]
    counts: Counter[str] = Counter()
    for reasons in told:
        if isinstance(reasons, dict):
            counts.update({str(name): int(count) for name, count in reasons.items() if isinstance(count, int)})
    return [[name, count, REASONS.get(name, name)] for name, count in counts.most_common()]


def _noised(path: Path, verified: Verified, spec: ReleaseSpec) -> list[dict[str, Any]] | None:
    """What was released of the last rounds beside the adapter, newest first; None where the run releases no metric."""
    own = NoisedCounts.of(spec)
    if own is None or not own.metrics:
        return None
    bound = {entry.body["counts"] for entry in verified.entries if entry.kind == "release" and "counts" in entry.body}
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    # What the ledger does not name was changed, or is being written.
    named = [line for line in lines if hashlib.sha256(line).hexdigest() in bound]
    found: list[dict[str, Any]] = []
    for line in named[-6:][::-1]:
        counts = json.loads(line)
        values = {name: [counts.get(name), counts.get(f"{name}_noise")] for name in METRICS if name in own.metrics}
        found.append({"round": counts["round"], "metrics": values})
    return found
