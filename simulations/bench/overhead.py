"""What the engine costs beside training: clients that do nothing, and the same run on Flower's own engine.

The first is a round of clients whose training is free, through everything that a round goes through: messages, the
vault, the clip, the gate, a signed debit and release on disk for every chunk before it is
handed over, the sum, the server's
debit, noise, release entry and checkpoint. The second is a whole run from its first import, on our grid with its
workers and on Flower's Ray engine with as many actors, where every client is a message of its own as Flower's
simulations have it, and where chunks are.

What an engine costs is wall time minus pure training: the same cohort in the same pieces (chunks, or one by one where
an engine sends one user at a time) on as many workers that are warm. That is said per round once the first is over,
and for the whole run from the first import on, start and first round included. End to end is the whole run's wall time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from simulations.bench.suite import Comparison, compared, comparison_of

__all__ = ["against_ray", "main", "no_op_clients"]

CLIENTS, PARAMETERS = 1000, 100_000
COHORT, RAY_ROUNDS, RAY_TURNS = 256, 3, 5
END_TO_END, PER_ROUND, BESIDE = "end to end", "engine per round after the first", "whole run beside training"
LEAST_SECONDS = 1e-3
"""What no wall clock tells from nothing; an engine's cost below it counts as that."""


class _NoTrainer:
    """Stands where a trainer stands and moves every adapter by the same small step, at no cost."""

    scaling = 2.0

    def __init__(self) -> None:
        from types import SimpleNamespace

        from common.adapters import Layout, TensorSpec

        name = "base_model.model.layer"
        side = PARAMETERS // 16
        tensors = (TensorSpec(f"{name}.lora_A.weight", (8, side)), TensorSpec(f"{name}.lora_B.weight", (side, 8)))
        self.base = SimpleNamespace(digest="cd" * 32)
        self.layout = Layout(tensors)
        self._step = np.random.default_rng(0).normal(0, 0.1, self.layout.size).astype(np.float32)

    def fit(self, start: NDArray[np.float32], examples: Any, *_: Any, **__: Any) -> NDArray[np.float32]:
        """Return every adapter moved, shape `(users, size)`."""
        own = start if start.ndim == 2 else start[None]
        return np.broadcast_to(own + self._step, (len(examples), self.layout.size))


def no_op_clients(quick: bool) -> Comparison:
    """Milliseconds per client and round of clients that do nothing."""
    clients = 100 if quick else CLIENTS
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], float]] = {}
        walls: dict[str, list[float]] = {}
        for name, noise, receipts, chunk in (
            ("central", "central", True, 16),
            ("central, chunks of 100", "central", True, 100),
            ("central, no receipts", "central", False, 16),
            ("local noise", "local", True, 16),
        ):
            place = Path(folder) / name.replace(" ", "-").replace(",", "")
            walls[name] = []
            ways[name] = _counted(_no_op_round(place, clients, noise, receipts, chunk), walls[name])
        found = compared("no-op clients", "client and round", ways, 3 if quick else 7, clients, "central")
        wall = {name: 1e3 * float(np.median(values[1:])) / clients for name, values in walls.items()}
        return Comparison(
            found.name, found.unit, found.medians, found.spread, found.ratios,
            {"clients": clients, "parameters": PARAMETERS, "wall_ms_per_client": wall},
        )  # fmt: skip


def _counted(run: Callable[[], None], walls: list[float]) -> Callable[[], float]:
    def timed() -> float:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        walls.append(time.perf_counter() - wall)
        return time.process_time() - cpu

    return timed


def _no_op_round(folder: Path, clients: int, noise: str, receipts: bool, chunk: int) -> Callable[[], None]:
    """Prepare a run whose clients do nothing; each call is one more round of it."""
    from client.app import build
    from client.gate import Gate
    from client.vault import EncodedUser, Vault
    from common.config import RunConfig
    from common.keys import SigningKey
    from common.ledger import Ledger
    from common.promise import promise_of
    from common.wire import ReleaseSpec
    from server.rounds import Rounds
    from simulations.bench.workloads import WORKLOADS
    from simulations.grid import InProcessGrid, submit_here

    rounds = 1000
    trainer: Any = _NoTrainer()
    config = RunConfig(method="fedavg", users=clients, cohort=clients, rounds=rounds, chunk=chunk, optimizer="sgd")
    spec = ReleaseSpec(
        run="ab" * 16,
        method="fedavg",
        names=tuple(tensor.name for tensor in trainer.layout.tensors),
        shapes=tuple(tensor.shape for tensor in trainer.layout.tensors),
        dtype="float32",
        unit="user",
        noise=noise,
        clip=1.0,
        noise_multiplier=1.0,
        sampling_rate=1.0,
        rounds=rounds,
        epsilon="8.0",
        delta=1e-5,
        population=clients,
        recipe={
            "local_steps": 1, "local_batch": 1, "learning_rate": 0.5, "optimizer": "sgd",
            "scaling": 2.0, "example_records": 100, "start": 0,
        },
        model=trainer.base.digest,
        source="ef" * 32,
        witnesses=256,
    )  # fmt: skip
    promise = promise_of(spec)
    event = promise.event(spec.noise_multiplier).to_json()
    bound = {"run": spec.run, "config": "00" * 32, "source": spec.source, "model": spec.model, "data": "11" * 32}

    def ledger_at(path: Path) -> Ledger:
        ledger = Ledger.create(path, SigningKey.generate(), {"role": "study", **bound})
        ledger.append("reserve", {"event": promise.schedule(spec.noise_multiplier, rounds).to_json(), "run": spec.run})
        return ledger

    chunks = ledger_at(folder / "chunks.jsonl") if receipts else None

    def record(_: ReleaseSpec, facts: dict[str, Any]) -> None:
        if chunks is None:
            return
        debit = {"event": event, "reservation": 1, "run": spec.run, "round": facts["round"], "spec": spec.digest}
        kept = ("bytes", "dtype", "names", "round", "run", "sha256", "shapes", "spec")
        body = {"debit": chunks.head.index + 1, **{name: facts[name] for name in kept}}
        chunks.append_many([("debit", debit), ("release", body)])

    person = EncodedUser(WORKLOADS["small-batch"].users(1)[0], (), ())
    vault = Vault(trainer, lambda _: person, seed=0, gate=Gate(record if receipts else None))
    start = np.zeros(trainer.layout.size, np.float32)
    own = Rounds(config, spec, trainer.layout, start, folder, ledger_at(folder / "ledger.jsonl"))
    grid = InProcessGrid(submit_here(build(lambda _: vault), 1), 1)

    def run() -> None:
        own.run(grid, lambda finished: _none_rejected(finished.rejected))

    return run


def _none_rejected(rejected: dict[str, int]) -> bool:
    if rejected:
        raise RuntimeError(f"clients of the benchmark were rejected: {sorted(rejected)}")
    return True


def against_ray(quick: bool) -> Comparison:
    """Wall seconds of a whole run and of what is not training in it, here and on Flower's engine on Ray."""
    cohort, rounds = (32, 2) if quick else (COHORT, RAY_ROUNDS)
    engines = {"grid": ("grid", 16), "Ray, a message per client": ("ray", 1), "Ray, chunks of 16": ("ray", 16)}
    taken: dict[str, dict[str, list[float]]] = {}
    training: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(1 if quick else RAY_TURNS):
        told = {name: _child(engine, cohort, rounds, chunk) for name, (engine, chunk) in engines.items()}
        for name, (_, chunk) in engines.items():
            # Training is the engine's own work in its own pieces: who gets users one by one cannot stack them.
            alone = told["grid"][f"training in pieces of {chunk}"]
            training[name].append(alone)
            later = float(np.median(told[name]["rounds"][1:])) - alone
            whole = told[name]["total"] - rounds * alone
            for what, seconds in (
                (END_TO_END, told[name]["total"]), (PER_ROUND, later), (BESIDE, whole),
            ):  # fmt: skip
                taken.setdefault(what, {}).setdefault(name, []).append(seconds)
    name, unit = "a run on Flower's Ray engine", "s per run, first round included, wall"
    told_of = {what: comparison_of(name, unit, own, "grid", least=LEAST_SECONDS) for what, own in taken.items()}
    return replace(
        told_of[END_TO_END],
        ratios={f"{pair}, {what}": own for what, one in told_of.items() for pair, own in one.ratios.items()},
        notes={
            "cohort": cohort, "rounds": rounds, "turns": len(training["grid"]),
            "training_s_per_round": {name: float(np.median(own)) for name, own in training.items()},
            "engine_s_per_round_after_the_first": told_of[PER_ROUND].medians,
            "whole_run_beside_training_s": told_of[BESIDE].medians,
        },
    )  # fmt: skip


def _child(engine: str, cohort: int, rounds: int, chunk: int) -> dict[str, Any]:
    """Run one whole simulation in a process of its own; returns its seconds."""
    root = Path(__file__).resolve().parent.parent.parent
    with tempfile.TemporaryDirectory() as state:
        began = time.perf_counter()
        ended = subprocess.run(  # noqa: S603 - this interpreter
            [sys.executable, "-W", "ignore", "-m", __name__, engine, str(cohort), str(rounds), str(chunk)],
            cwd=root, capture_output=True, text=True, check=False,
            env={
                **os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HOMESPUN_HOME": state,
                "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0",
            },
        )  # fmt: skip
        total = time.perf_counter() - began
    if ended.returncode:
        raise RuntimeError(f"the benchmark's run on {engine} failed: {ended.stderr.strip().splitlines()[-1:]}")
    told = json.loads(ended.stdout.strip().splitlines()[-1])
    return {"total": total - told["aside"], **told}


def main(arguments: list[str]) -> int:
    """Run `engine cohort rounds chunk` once and print what it took as JSON."""
    from simulations.workers import Workers, expect_workers

    engine, cohort, rounds, chunk = arguments[0], *map(int, arguments[1:4])
    crew = len(os.sched_getaffinity(0))
    if engine == "grid":
        expect_workers(crew)  # as `homespun sim run` does
    from client.base_model import model_digest
    from common.config import RunConfig
    from server import app as server_app
    from server import run_folder
    from simulations import hosts
    from simulations.grid import InProcessGrid
    from simulations.ray_engine import run_on_ray
    from simulations.run import empty_context

    config = RunConfig(
        users=cohort, cohort=cohort, rounds=rounds, epsilon=float("inf"), chunk=chunk, method="fedavg", workers=crew
    )
    folder = hosts.base_of(config)
    ended = [time.perf_counter()]
    told: dict[str, Any] = {"aside": 0.0}
    with tempfile.TemporaryDirectory() as place:
        opened = run_folder.create(
            Path(place) / "run", config, population=cohort, model=folder, digest=model_digest(folder), data="d" * 64
        )  # fmt: skip
        app = server_app.build(lambda _: opened, lambda finished: ended.append(time.perf_counter()))  # noqa: ARG005
        text = config.to_toml()
        if engine == "ray":
            run_on_ray(app, hosts.client_app(text), crew)
        else:
            with Workers(text, crew) as workers:
                grid = InProcessGrid(lambda message: workers.submit(hosts.answer_message, text, message, crew), crew)
                app(grid, empty_context())
                aside = time.perf_counter()
                for size in (chunk, 1):
                    told[f"training in pieces of {size}"] = _pure_training(workers, text, cohort, size)
                told["aside"] = time.perf_counter() - aside
    print(json.dumps({"rounds": np.diff(ended).tolist(), **told}))  # noqa: T201
    return 0


def _pure_training(workers: Any, text: str, cohort: int, chunk: int) -> float:
    """Wall seconds of training the cohort once on these workers and nothing else."""
    pieces = [range(start, min(start + chunk, cohort)) for start in range(0, cohort, chunk)]
    began = time.perf_counter()
    for future in [workers.submit(_train_only, text, list(piece)) for piece in pieces]:
        future.result()
    return time.perf_counter() - began


def _train_only(text: str, numbers: list[int]) -> None:
    from client.trainer import Recipe
    from simulations.hosts import open_host

    host = open_host(text)
    own = host.config
    people = [host.population.encoded(str(number)).train for number in numbers]
    recipe = Recipe(own.local_steps, own.local_batch, own.learning_rate, own.optimizer)
    start = np.zeros(host.trainer.layout.size, np.float32)
    present = [each for each in people if each]
    host.trainer.fit(start, present, recipe, [np.random.default_rng(0) for _ in present])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
