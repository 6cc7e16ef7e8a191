"""How many tokens one training pass holds on this machine: measured once per machine and base, then remembered.

Longer passes pay what a pass costs beside its matrix products less often; shorter ones stay nearer to a core, or fit
into a GPU's memory. Which wins depends on the machine and the base, so a few passes of random tokens are timed. The
size changes results by rounding only; a rehearsal, which has to repeat itself on other machines too, does not measure.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from client.compiled_code import processor
from client.native import kernels_for
from client.optimizers import Recipe
from client.trainer import Trainer
from common.files import write_private_file
from common.places import cache_home

__all__ = ["known_pass_tokens", "measure_pass_tokens"]

CPU_SIZES, DEVICE_SIZES = (512, 1024, 2048), (1 << 13, 1 << 14, 1 << 15, 1 << 16, 1 << 17)
ROUNDS = 3
RECORD, RECORDS_PER_USER = 64, 4
MOST_SECONDS = 3.0
"""What measuring may take; a base whose passes are longer is bound by its products, and keeps the default."""

WORTH = 0.97
"""A longer pass has to take less than this of a shorter one's time per token."""


@dataclass(frozen=True)
class _Record:
    ids: NDArray[np.int32]
    first_label: int = 1


def known_pass_tokens(trainer: Trainer) -> int | None:
    """What was measured for this base on this machine; None where nothing was."""
    try:
        found = json.loads(_path(trainer).read_text(encoding="utf-8"))["tokens"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if type(found) is int and 0 < found <= DEVICE_SIZES[-1] else None


def measure_pass_tokens(trainer: Trainer) -> int:
    """Give what is known, or time a few passes, remember the best size, and give that."""
    if (known := known_pass_tokens(trainer)) is not None:
        return known
    sizes = DEVICE_SIZES if trainer.base.device.type == "cuda" else CPU_SIZES
    best = _fastest(trainer, sizes)
    path = _path(trainer)
    with contextlib.suppress(OSError):  # it is measured again next time
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_private_file(path, json.dumps({"tokens": best}).encode(), replace=True)
    return best


def _fastest(trainer: Trainer, sizes: tuple[int, ...]) -> int:
    """The shortest pass whose time per token no longer one beats; the trainer's own where time runs out first."""
    before, began = trainer.pass_tokens, time.perf_counter()
    seconds: dict[int, list[float]] = {}
    try:
        for _ in range(ROUNDS + 1):
            for size in sizes:
                try:
                    seconds.setdefault(size, []).append(_seconds_per_token(trainer, size))
                except torch.OutOfMemoryError:
                    sizes = tuple(each for each in sizes if each < size)
                    break
                if time.perf_counter() - began > MOST_SECONDS:
                    return before
    finally:
        trainer.pass_tokens = before
    chosen = sizes[0] if sizes else before
    for size in sizes[1:]:
        if min(seconds[size][1:]) < WORTH * min(seconds[chosen][1:]):
            chosen = size
    return chosen


def _seconds_per_token(trainer: Trainer, size: int) -> float:
    generator = np.random.default_rng(size)
    words = trainer.base.model.config.get_text_config().vocab_size
    users = [
        [_Record(generator.integers(0, words, RECORD).astype(np.int32)) for _ in range(RECORDS_PER_USER)]
        for _ in range(size // (RECORD * RECORDS_PER_USER))
    ]
    trainer.pass_tokens = size
    start, recipe = np.zeros(trainer.layout.size, np.float32), Recipe(1, RECORDS_PER_USER, 0.1)
    began = time.perf_counter()
    trainer.fit(start, users, recipe, [np.random.default_rng(0)] * len(users))  # its result is on the CPU: it is done
    return (time.perf_counter() - began) / size


def _path(trainer: Trainer) -> Path:
    base = trainer.base
    kernels = "torch" if kernels_for(torch.empty(0)) is None else "kernels"
    device = torch.cuda.get_device_name(base.device) if base.device.type == "cuda" else processor()
    told = [base.digest, trainer.layout.digest, device, str(torch.get_num_threads()), torch.__version__, kernels]
    name = hashlib.sha256("\n".join(told).encode()).hexdigest()[:24]
    return cache_home() / "pass-size" / f"{name}.json"
