"""One simulated run: rounds, then personal models for a sample of users, then what people look at.

The run's folder is the server's (`server.run_folder`) with the results beside it. Rounds resume from their
checkpoint; what comes after them is computed again when it is missing, from the same seeds.
"""

from __future__ import annotations

import contextlib
import errno
import json
import signal
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, RecordDict

from client.pass_size import measure_pass_tokens
from client.preflight import Preflight, PreflightReport
from common.adapters import Vector, write_peft
from common.config import RunConfig
from common.distributed_claims import distributed_claims
from common.errors import DataError, HomespunError
from common.masks import packed_bytes
from common.methods import Method
from common.model_files import model_digest
from common.promise import promise_of
from common.secure_sum import SecureSum
from common.wire import ReleaseSpec
from server import app as server_app
from server import registry, run_folder
from server.checkpoint import Checkpoint
from server.kept_heads import check_head, keep_head
from server.rounds import Round, add_central_noise, spent_epsilon
from simulations import hosts
from simulations.forecast import forecast
from simulations.grid import InProcessGrid, submit_here
from simulations.outside import check_outside, method_of
from simulations.personal import STORE, keep_adapters, open_store
from simulations.planning import base_of
from simulations.population import Population
from simulations.workers import Workers, expect_workers

__all__ = ["Progress", "RunResult", "resume", "start"]

CURVE_USERS = 60
"""Users of the evaluation sample whose validation records draw the learning curve."""

QUERIES = "queries.parquet"
USERS, STATEMENT, DATA, GLOBAL = "users.parquet", "statement.json", "data.json", "global"
PREFLIGHT = "preflight.json"


@dataclass
class Progress:
    """How a run tells what it does; the command line draws it, the default is silent.

    Attributes:
        say: A line for the log.
        round: After every round: the line of `rounds.jsonl`.
        personal: After every chunk of the evaluation sample: users done and users in all.
    """

    say: Callable[[str], None] = lambda text: None  # noqa: ARG005
    round: Callable[[dict[str, Any]], None] = lambda line: None  # noqa: ARG005
    personal: Callable[[int, int], None] = lambda done, total: None  # noqa: ARG005


@dataclass(frozen=True)
class RunResult:
    """Where a run ended.

    Attributes:
        path: Its folder.
        finished: Whether all rounds are done and the results written; otherwise `resume` continues it.
    """

    path: Path
    finished: bool


def start(config: RunConfig, path: Path, progress: Progress) -> RunResult:
    """Begin a run in the new folder `path`.

    Raises:
        ConfigError, DataError: The configuration, the data or the base cannot be used; nothing was written.
        Refusal: The promise could not be kept.
    """
    method = method_of(config)
    folder = base_of(config)
    digest = model_digest(folder)
    expect_workers(config.workers)
    host = hosts.host_of(config)
    if not config.rehearsal:  # before the workers open the base, which read what is remembered
        host.trainer.pass_tokens = measure_pass_tokens(host.trainer)
    population = host.population
    resolved = config.model_copy(
        update={
            "users": len(population),
            "model": config.model if config.model == "built-in" else str(folder.resolve()),
            "data": config.data
            if config.data == "built-in" or not Path(config.data).exists()
            else _absolute(config.data),
        }
    )
    if not population.sample(1, config.seed):
        raise DataError(f"{config.data}: no user has enough records to train on and to be scored by; three are needed")
    for found in check_outside(resolved, host.trainer):
        progress.say(found)
    tried = _preflight(resolved, host, digest, method)
    with _naming_a_full_disk(path):
        opened = run_folder.create(
            path,
            resolved,
            population=len(population),
            model=folder,
            digest=digest,
            data=population.digest,
        )
        opened.ledger.close()
        hosts.forget_removed_runs()
        _write_json(path / DATA, describe(population, resolved))
        if tried is not None:
            _write_json(path / PREFLIGHT, tried.to_json())
    progress.say(forecast(host, config.workers).sentence())
    return _continue(path, progress, tried=True)


def _preflight(config: RunConfig, host: hosts.Host, digest: str, method: Method) -> PreflightReport | None:
    """Try the model and the noise out where something is promised, before anything is written or spent.

    Raises:
        Refusal: What the promise rests on does not hold here.
    """
    if not config.private or not method.shared:
        return None
    spec, _ = run_folder.prepare_spec(config, population=len(host.population), model=base_of(config), digest=digest)
    return _try_out(spec, host)


def _try_out(spec: ReleaseSpec, host: hosts.Host) -> PreflightReport | None:
    if spec.epsilon == "inf" or not spec.names:
        return None
    return Preflight(host.trainer, central_noise=add_central_noise).check(spec)


def resume(path: Path, progress: Progress) -> RunResult:
    """Continue the run in `path` from where its checkpoint and its ledger say it stands.

    Raises:
        DataError: There is no run in `path`.
        BudgetSpent: The rounds that are left would exceed what was reserved.
        Refusal: What the promise rests on does not hold here (any more); nothing was spent.
    """
    return _continue(path, progress, tried=False)


def _continue(path: Path, progress: Progress, *, tried: bool) -> RunResult:
    opened = run_folder.reopen(path)
    config, text = opened.config, opened.config.to_toml()
    method = method_of(config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_naming_a_full_disk(path))
        stack.callback(opened.ledger.close)
        check_head(opened.spec.run, opened.ledger.entries())
        workers = stack.enter_context(Workers(text, config.workers))
        host = hosts.open_host(text)
        if host.population.digest != opened.ledger.header["data"]:
            raise DataError(f"{config.data}: not the data that this run began with; a run is continued on its own data")
        if not tried and Checkpoint.load(path / run_folder.CHECKPOINT).round < config.rounds:
            # The machine, its libraries or what comes from outside may be others than when the run began.
            check_outside(config, host.trainer)
            _try_out(opened.spec, host)
        sample = host.population.sample(config.evaluation_users, config.seed)
        stopped = False
        vector: Vector | None = None
        if method.shared:
            stopped = _run_rounds(opened, workers, sample, progress)
            vector = Checkpoint.load(path / run_folder.CHECKPOINT).vector
        if stopped:
            return RunResult(path, finished=False)
        _finish(opened, workers, host, sample, vector, progress)
    return RunResult(path, finished=True)


def _run_rounds(opened: run_folder.RunFolder, workers: Workers, sample: Sequence[str], progress: Progress) -> bool:
    """Run the rounds that are left; True when the owner asked to stop before the last."""
    config, path = opened.config, opened.path
    text = config.to_toml()
    done = Checkpoint.load(path / run_folder.CHECKPOINT).round
    _cut_log(path / run_folder.LOG, done)
    lost = sum(1 for entry in opened.ledger.entries() if entry.kind == "debit") - done
    if lost > 0:
        progress.say(f"{lost} release(s) were debited and lost in a crash; spare rounds pay for them")
    if done >= config.rounds:
        return False
    curve = [str(name) for name in sample[:CURVE_USERS]]
    stop = StopRequest()

    def on_round(finished: Round) -> bool:
        keep_head(opened.spec.run, opened.ledger.head)
        line: dict[str, Any] = {
            "round": finished.number,
            "epsilon_spent": _finite(spent_epsilon(opened.spec, finished.spent)),
            "noise_over_clip": _noise_over_clip(opened),
            "seconds": round(finished.seconds, 3),
            "bytes_down_per_user": 4 * opened.spec.model_dim,
            "bytes_up_per_user": _bytes_up(opened.spec),
            "rejected": finished.rejected,
        }
        if finished.counts:
            line["counts"] = {name: value for name, value in finished.counts.items() if name != "round"}
        if finished.number % config.evaluate_every == 0 or finished.number in (1, config.rounds):
            line["evaluation"] = _curve_point(workers, text, curve, finished.vector)
        with (path / run_folder.LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        progress.round(line)
        if failed := finished.rejected.get("failed"):
            # A device that fails costs utility; in a study it is a mistake in the code, the data or the machine.
            raise HomespunError(
                f"round {finished.number}: training failed for {failed} of its users; HOMESPUN_DEBUG=1 shows why, and "
                f"`homespun sim resume {path}` goes on without them in this round"
            )
        return stop.asked and finished.number < config.rounds

    registry.enter(opened)
    if method_of(config).remembers:
        hosts.note_run(opened.spec.run, path)
    app = server_app.build(lambda context: opened, on_round)  # noqa: ARG005
    nodes = max(1, workers.count)
    with stop.listening():
        if config.engine == "ray":
            from simulations.ray_engine import run_on_ray

            run_on_ray(app, hosts.client_app(text), nodes, config.ray_address)
        else:
            grid = InProcessGrid(lambda message: workers.submit(hosts.answer_message, text, message, nodes), nodes)
            if config.secagg == "full":  # devices keep secrets from leg to leg, so all of them live in this process
                grid = InProcessGrid(submit_here(hosts.client_app(text), 1), 1)
            app(grid, empty_context())
    return stop.asked and Checkpoint.load(path / run_folder.CHECKPOINT).round < config.rounds


class StopRequest:
    """Ctrl-C once ends the run after the round in hand; twice ends it at once.

    Attributes:
        asked: Whether somebody asked.
    """

    asked = False

    @contextlib.contextmanager
    def listening(self) -> Generator[None]:
        """Listen for Ctrl-C in the block; does nothing outside the main thread."""

        def note(number: int, frame: Any) -> None:  # noqa: ARG001
            if self.asked:
                raise KeyboardInterrupt
            self.asked = True

        try:
            before = signal.signal(signal.SIGINT, note)
        except ValueError:
            yield
            return
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _naming_a_full_disk(path: Path) -> Generator[None]:
    """Say which folder has no room: the operating system's error on a write does not."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        what_next = "; with more room, `homespun sim resume` goes on" if (path / run_folder.CONFIG).exists() else ""
        raise DataError(f"{path}: cannot be written: {error.strerror}{what_next}") from None


def empty_context() -> Context:
    """A context for apps that bring their own configuration."""
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})


def _curve_point(workers: Workers, text: str, users: Sequence[str], vector: Vector) -> dict[str, float]:
    pieces = [users[start::4] for start in range(4)]
    futures = [workers.submit(hosts.score_shared, text, piece, vector) for piece in pieces if piece]
    totals = np.sum([future.result() for future in futures], axis=0)
    return {"base": totals[0] / totals[2], "global": totals[1] / totals[2]}


def _finish(
    opened: run_folder.RunFolder,
    workers: Workers,
    host: hosts.Host,
    sample: Sequence[str],
    vector: Vector | None,
    progress: Progress,
) -> None:
    """Train and score the sample's personal models, write results, adapters and report."""
    from simulations.report import write_report

    path, config = opened.path, opened.config
    rows: list[dict[str, Any]] = []
    queries: list[dict[str, Any]] = []
    # of even size and two at least, because a control needs another user in the same piece
    count = max(1, min(-(-len(sample) // config.chunk), len(sample) // 2))
    pieces = [list(map(str, piece)) for piece in np.array_split(sample, count)]
    text = config.to_toml()
    pooled = workers.submit(hosts.fit_pooled, text).result()
    futures: list[Future[Any]] = [
        workers.submit(hosts.score_systems, text, piece, vector, pooled, opened.spec.to_text()) for piece in pieces
    ]
    (path / STORE).unlink(missing_ok=True)  # of an attempt that did not get to the end
    with open_store(path) as store:
        done = 0
        for piece, future in zip(pieces, futures, strict=True):
            scored, adapters = future.result()
            queries += scored.queries
            for system, own in scored.rows.items():
                for row in own:
                    trained_on = len(host.population.encoded(row["user"]).train)
                    rows.append({"system": system, "train_records": trained_on, **row})
            for name, vectors in adapters.items():
                keep_adapters(store, piece, name, vectors, host.base.digest)
            done += len(piece)
            progress.personal(done, len(sample))
    _write_table(path / QUERIES, queries + _untuned(queries))
    _write_table(path / USERS, rows + _untuned(rows))
    if vector is not None:
        write_peft(path / GLOBAL, *host.shared_adapter(vector), str(base_of(config)))
    debited = sum(1 for entry in opened.ledger.entries() if entry.kind == "debit")
    statement = promise_of(opened.spec).statement(
        opened.spec, debited, rehearsal=config.rehearsal, as_if_population=config.as_if_population
    )
    said = {**statement.to_json(), "sentence": statement.sentence()}
    if opened.spec.secure_sum is not None and debited:
        said |= distributed_claims(opened.spec, debited, rehearsal=config.rehearsal).to_json()
    _write_json(path / STATEMENT, said)
    registry.settle(opened)
    if (spent := registry.spent_on_data(path)) is not None:
        _write_json(path / registry.SPENT_ON_DATA, spent)
    write_report(path)


def _untuned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of "preference" for users whose piece had no pair to tune on, where others had: what is tuned, as it is.

    Without them a system would be scored on some users only, and nobody else would count in any comparison.
    """
    tuned = {row["user"] for row in rows if row["system"] == "preference"}
    if not tuned:
        return []
    start = "both" if any(row["system"] == "both" for row in rows) else "private"
    same = [{**row, "system": "preference"} for row in rows if row["system"] == start and row["user"] not in tuned]
    return [row | {"degeneration": np.nan} if "degeneration" in row else row for row in same]


def describe(population: Population, config: RunConfig) -> dict[str, Any]:
    """Say in numbers what the data are; a sample of users stands for the lengths."""
    names = [str(number) for number in range(min(len(population), 500))]
    encoded = [population.encoded(name) for name in names]
    lengths = np.array([len(one.ids) for own in encoded for one in (*own.train, *own.validation, *own.test)])
    return {
        "users": len(population),
        "sampled_users": len(names),
        "records_in_sample": len(lengths),
        "records_per_user": float(len(lengths) / max(len(names), 1)),
        "token_percentiles": {str(p): float(np.percentile(lengths, p)) for p in (10, 50, 90, 99)}
        if len(lengths)
        else {},
        "unscored_in_sample": sum(1 for own in encoded if not own.test),
        "max_tokens": config.max_tokens,
        "digest": population.digest,
    }


def _noise_over_clip(opened: run_folder.RunFolder) -> float:
    """Expected L2 norm of the noise on the mean, in clips."""
    spec = opened.spec
    promise = promise_of(spec)
    cohort = spec.sampling_rate * spec.population
    if spec.unit == "example":  # noise enters the gradient at every step; this is one step's, on one party's mean
        return float(spec.noise_multiplier * np.sqrt(spec.model_dim) / float(spec.recipe["local_batch"]))
    if spec.noise == "distributed" and spec.secure_sum is not None:
        sums = SecureSum.of(spec)
        noise = sums.noise(spec, sums.largest_cohort)
        return float(noise.level * noise.step / spec.clip * np.sqrt(spec.model_dim) / cohort)
    devices = np.sqrt(cohort) if spec.noise == "local" else 1.0
    scale = promise.noise_scale(spec.noise_multiplier * spec.extrapolation, 1.0)
    return float(scale * devices * np.sqrt(spec.model_dim) / cohort)


def _bytes_up(spec: ReleaseSpec) -> int:
    """What one user's update takes on the way up; the keys and shares of a secure sum come on top of it."""
    if spec.secure_sum is None:
        return 4 * spec.dim
    sums = SecureSum.of(spec)
    noise = sums.noise(spec, sums.largest_cohort)
    return packed_bytes(noise.padded_dim, noise.bits)


def _finite(value: float) -> float | str:
    return value if np.isfinite(value) else "inf"


def _cut_log(path: Path, rounds: int) -> None:
    """Drop lines of rounds that the checkpoint does not hold: they are run again."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["round"] <= rounds]
    if len(kept) != len(lines):
        path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    import pandas as pd

    temporary = path.with_suffix(".writing")
    pd.DataFrame(rows).to_parquet(temporary, index=False)
    temporary.replace(path)


def _absolute(name: str) -> str:
    return str(Path(name).resolve())
