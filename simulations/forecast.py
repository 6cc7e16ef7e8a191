"""What a run will take: measured on one chunk of its own users before round 1, not remembered from another machine."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass

import numpy as np

from client.trainer import Recipe
from common.config import RunConfig
from simulations.hosts import Host
from simulations.outside import method_of

__all__ = ["Forecast", "forecast", "steps_of"]

SCORING_SHARE = 1.25
"""Scoring adds about a quarter to the training of personal models (docs/performance.md)."""

STEPS_PER_LEVEL = 17
"""What one level costs for one user, in shared steps: its training, its scoring, and its part of the choice. Measured
on the demo: 300 users with three levels took 120 s more than without, 50 steps of 16 ms on each of two processors."""


@dataclass(frozen=True)
class Forecast:
    """Expected time and memory of a run.

    Attributes:
        seconds: Wall time of rounds and personal models together.
        bytes: Resident memory of the driver and its workers together.
        workers: Worker processes it was computed for.
    """

    seconds: float
    bytes: int
    workers: int

    def sentence(self) -> str:
        """The forecast in words."""
        minutes = self.seconds / 60
        span = f"{self.seconds:.0f} seconds" if self.seconds < 90 else f"{minutes:.0f} minutes"
        if minutes >= 90:
            span = f"{minutes / 60:.1f} hours"
        crew = f"{self.workers} worker processes" if self.workers else "this process alone"
        return f"expect about {span} with {crew}, and {self.bytes / 2**30:.1f} GiB of memory in all"


def forecast(host: Host, workers: int | None) -> Forecast:
    """Train one chunk of users for one step, twice, and extrapolate to the whole run."""
    import torch

    config = host.config
    crew = len(os.sched_getaffinity(0)) if workers is None else workers
    people = [host.population.encoded(str(number)).train for number in range(min(config.chunk, len(host.population)))]
    people = [own for own in people if own]
    if not people:
        return Forecast(0.0, _resident() * (crew + 1), crew)
    start = np.zeros(host.trainer.layout.size, np.float32)
    seconds = float("inf")
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if crew else threads)  # as a worker does
    for _ in range(2):  # the first pass warms caches up
        began = time.perf_counter()
        recipe = Recipe(1, config.local_batch, config.learning_rate, config.optimizer)
        host.trainer.fit(start, people, recipe, [np.random.default_rng(0) for _ in people])
        seconds = min(seconds, time.perf_counter() - began)
    torch.set_num_threads(threads)
    steps = steps_of(config, len(host.population))
    return Forecast(seconds / len(people) * steps / max(crew, 1), _resident() * (crew + 1), crew)


def steps_of(config: RunConfig, users: int) -> float:
    """What a run over a population of `users` costs, in steps of one user's shared training."""
    method = method_of(config)
    shared = config.rounds * config.cohort * config.local_steps if method.shared else 0
    scored = min(config.evaluation_users, users)
    personal = scored * config.personal_steps * SCORING_SHARE
    personal *= (config.personal_batch / config.local_batch) * ((2 if method.shared else 1) if method.private else 0)
    levels = scored * STEPS_PER_LEVEL * len(config.levels) if method.private else 0
    return shared + personal + levels


def _resident() -> int:
    """Largest resident memory of this process so far, in bytes (Linux counts in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
