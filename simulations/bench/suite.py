"""`homespun sim bench`: our engine beside its rivals, in one run, round about, in one table and one JSON file.

Rounds of all engines take turns, so that whatever else the machine does falls on all alike. What is compared is the
processor time of one thread, which a busy machine changes less than the clock's, and the ratio is of medians, with the
interval that half of the rounds' own ratios lie in beside it. A worker is one thread on one core, and so is pfl at its
best on few cores: the ratio of threads is the ratio of machines, but for pfl's exchange between processes, which is
left out in its favour.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from simulations.bench.workloads import WORKLOADS, Workload

__all__ = ["PARTS", "Comparison", "compared", "comparison_of", "parts_here", "rivals_python", "run_suite"]

USERS, QUICK_USERS = 16, 8
ROUNDS, QUICK_ROUNDS = 7, 3


@dataclass(frozen=True)
class Comparison:
    """Engines that took turns over the same work.

    Attributes:
        name: What was done.
        unit: What the numbers are per, in milliseconds of processor time where nothing else is said.
        medians: Engine -> median.
        spread: Engine -> first and third quartile.
        ratios: "rival / ours" -> ratio of medians, and the quartiles of the rounds' own ratios.
        notes: What else a reader needs.
    """

    name: str
    unit: str
    medians: Mapping[str, float]
    spread: Mapping[str, tuple[float, float]]
    ratios: Mapping[str, tuple[float, float, float]]
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])


def compared(
    name: str, unit: str, engines: Mapping[str, Callable[[], float]], rounds: int, per: float, ours: str, **notes: Any
) -> Comparison:
    """Let `engines` take turns for `rounds` rounds after a first that is not counted; each returns its seconds."""
    for engine in engines.values():
        engine()
    taken: dict[str, list[float]] = {label: [] for label in engines}
    for _ in range(rounds):
        for label, engine in engines.items():
            taken[label].append(1e3 * engine() / per)
    return comparison_of(name, unit, taken, ours, **notes)


def comparison_of(
    name: str, unit: str, taken: Mapping[str, Sequence[float]], ours: str, *, least: float = 0.0, **notes: Any
) -> Comparison:
    """Put side by side what each engine took in each turn; ours below `least` counts as that in ratios."""
    return Comparison(
        name,
        unit,
        {label: median(values) for label, values in taken.items()},
        {label: _quartiles(values) for label, values in taken.items()},
        {f"{label} / {ours}": _ratio(values, taken[ours], least) for label, values in taken.items() if label != ours},
        notes,
    )


def _ratio(theirs: Sequence[float], ours: Sequence[float], least: float) -> tuple[float, float, float]:
    """Ratio of medians, and the quartiles of the turns' own ratios."""
    paired = [one / max(own, least) for one, own in zip(theirs, ours, strict=True)]
    return median(theirs) / max(median(ours), least), *_quartiles(paired)


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return low, high


def _timed(run: Callable[[], None]) -> Callable[[], float]:
    def timed() -> float:
        began = time.process_time()
        run()
        return time.process_time() - began

    return timed


def rivals_python() -> Path | None:
    """The Python of `make bench-rivals`, or of $HOMESPUN_RIVALS; None where there is none."""
    named = os.environ.get("HOMESPUN_RIVALS", ".venv-rivals")
    for path in (Path(named) / "bin" / "python", Path(named)):
        if path.is_file():
            return path
    return None


def training(workload: Workload, quick: bool, compiled: bool, python: Path | None) -> Comparison:
    """Ours against PEFT one by one, pfl, and the machine's own matrix products."""
    from simulations.bench import engines

    count, rounds = (QUICK_USERS, QUICK_ROUNDS) if quick else (USERS, ROUNDS)
    users = workload.users(count)
    with ExitStack() as stack:
        ways: dict[str, Callable[[], float]] = {"ours": _timed(engines.ours(engines.bench_trainer(), workload, users))}
        if compiled and workload.shortest == workload.longest:
            ways["ours, compiled"] = _timed(engines.ours(engines.bench_trainer(compiled=True), workload, users))
        ways["one by one"] = _timed(engines.one_by_one(workload, users))
        ways["matrix products"] = _timed(engines.matrix_products(workload, count))
        ways["matrix products, laid out"] = _timed(engines.matrix_products(workload, count, laid_out=True))
        if python is not None:
            pfl = stack.enter_context(engines.Pfl(python, workload, count))
            ways["pfl 0.6"] = lambda: pfl.round()["cpu"]
        return compared(
            f"{workload.name}: local training",
            "user",
            ways,
            rounds,
            count,
            "ours",
            users=count,
            padding=_padding(users),
        )


def _padding(users: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Padded share of what layers see: token by token, in attention's rectangles, and where batches are padded."""
    import torch

    from client.packing import pack

    rows = [record for own in users[:8] for record in own]
    packed = pack(rows, [len(own) for own in users[:8]], torch.device("cpu"))
    tokens = len(packed.ids)
    widest = sum(max(len(record.ids) for record in own) * len(own) for own in users[:8])
    from client.native import kernels

    return {
        "token by token": 0.0,
        "attention": 0.0 if kernels() is not None else 1 - tokens / packed.padded_places,
        "padded to the user's longest record": 1 - tokens / widest,
    }


def silo(quick: bool) -> Comparison:
    """Example-level DP against the same steps without it, and against Opacus' hooks."""
    from simulations.bench import engines

    trainer = engines.bench_trainer()
    records = Workload("silo", engines.SILO_RECORDS // 2, 64, 64).users(1)[0]
    ways = {
        "DP-SGD": _timed(engines.silo_steps(trainer, records, private=True)),
        "no DP": _timed(engines.silo_steps(trainer, records, private=False)),
        "Opacus hooks": _timed(engines.opacus_steps(records, trainer.layout.size)),
    }
    rounds = QUICK_ROUNDS if quick else ROUNDS
    return compared("silo: example-level DP", "step", ways, rounds, engines.SILO_STEPS, "DP-SGD")


def parts_of(quick: bool, compiled: bool) -> dict[str, Callable[[], Comparison]]:
    """What can be measured, by name."""
    from simulations.bench import gpu, overhead, population

    python = rivals_python()
    training_parts = {
        name: lambda own=own: training(own, quick, compiled, python)  # pyright: ignore[reportUnknownLambdaType]
        for name, own in WORKLOADS.items()
    }
    return {
        **training_parts,
        "silo": lambda: silo(quick),
        "overhead": lambda: overhead.no_op_clients(quick),
        "ray": lambda: overhead.against_ray(quick),
        "population": lambda: population.growth(quick),
        "gpu": lambda: gpu.on_a_gpu(quick, python, large=False),
        "gpu-large": lambda: gpu.on_a_gpu(quick, python, large=True),
    }


PARTS = (*WORKLOADS, "silo", "overhead", "ray", "population", "gpu", "gpu-large")


def parts_here() -> tuple[str, ...]:
    """What this machine can measure: the parts for GPUs where it has one."""
    import torch

    return PARTS if torch.cuda.is_available() else tuple(part for part in PARTS if not part.startswith("gpu"))


def run_suite(
    names: Sequence[str], *, quick: bool, compiled: bool, say: Callable[[Comparison], None]
) -> dict[str, Any]:
    """Measure the named parts one after the other; returns what the JSON file holds."""
    import torch

    from client.native import why_no_kernels

    torch.set_num_threads(1)
    parts = parts_of(quick, compiled)
    results: list[Comparison] = []
    load = os.getloadavg()
    for name in names:
        results.append(parts[name]())
        say(results[-1])
    return {
        "machine": {
            "processor": _processor(),
            "cores": os.cpu_count(),
            "cores_of_this_process": _allowed_cores(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "kernels": why_no_kernels() or "compiled",
            "load_before": load,
            "load_after": os.getloadavg(),
        },
        "quick": quick,
        "date": time.strftime("%Y-%m-%d"),
        "results": [asdict(result) for result in results],
    }


def _allowed_cores() -> int | None:
    """How many of the machine's cores this process may use, which `taskset` limits, for one."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def table_of(found: Comparison) -> str:
    """One part's table: medians with quartiles, then ratios."""
    lines = [f"{found.name} (per {found.unit})"]
    for label, value in found.medians.items():
        low, high = found.spread[label]
        lines.append(f"  {label:<34} {value:9.3f}  [{low:.3f}, {high:.3f}]")
    for label, (ratio, low, high) in found.ratios.items():
        lines.append(f"  {label:<48} {ratio:6.2f}x  [{low:.2f}, {high:.2f}]")
    lines += [f"  {name}: {value}" for name, value in found.notes.items()]
    return "\n".join(lines) + "\n"


def as_json(results: Mapping[str, Any]) -> str:
    """The JSON file's text."""
    return json.dumps(results, indent=1) + "\n"
