"""The standard workload on a CUDA device, beside the one-by-one loop and pfl on the same one; and a base of a billion.

Wall seconds, because a device works while its thread waits: every engine ends a round with its sums on the CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from simulations.bench import engines
from simulations.bench.suite import Comparison, compared
from simulations.bench.workloads import WORKLOADS, Workload, llama

__all__ = ["on_a_gpu"]

USERS, QUICK_USERS = 1024, 64
BILLION = {
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
    "vocab_size": 32_000,
}
"""Shapes as of a Llama of 1 B parameters, with random weights."""


def on_a_gpu(quick: bool, python: Path | None, *, large: bool) -> Comparison:
    """Milliseconds per user of local training; `large` takes the base of a billion in bfloat16, without rivals.

    Raises:
        ConfigError: There is no CUDA device here.
    """
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("bench: there is no CUDA device here, so the parts for GPUs cannot run")
    workload, rounds = WORKLOADS["standard"], 3 if quick else 7
    with ExitStack() as stack:
        ways: dict[str, Callable[[], float]] = {}
        if large:
            count = 4 if quick else 32
            model = llama(**BILLION).to("cuda", torch.bfloat16)
            ways["ours"] = _timed(engines.ours(engines.bench_trainer(model), workload, workload.users(count)))
        else:
            count = QUICK_USERS if quick else USERS
            users = workload.users(count)
            chunk = count  # a device wants all of them at once; the trainer cuts them into passes
            ways["ours"] = _timed(engines.ours(engines.bench_trainer(llama().to("cuda")), workload, users, chunk))
            few = Workload(workload.name, workload.batch, workload.shortest, workload.longest).users(count // 16)
            alone = engines.one_by_one(workload, few, device="cuda")
            ways["one by one"] = _timed(alone, scale=count / len(few))
            if python is not None:
                pfl = stack.enter_context(engines.Pfl(python, workload, count, device="cuda"))
                ways["pfl 0.6"] = lambda: pfl.round()["wall"]
        name = "a base of 1 B on a GPU, bfloat16" if large else "standard on a GPU"
        found: Any = compared(name, "user, wall", ways, rounds, count, "ours", device=torch.cuda.get_device_name())
    return found


def _timed(run: Callable[[], None], scale: float = 1.0) -> Callable[[], float]:
    def timed() -> float:
        import torch

        torch.cuda.synchronize()
        began = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return scale * (time.perf_counter() - began)

    return timed
