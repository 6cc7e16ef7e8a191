"""What a configuration would do, before anything is trained: `homespun plan`, and the first lines of every run.

Needs neither torch nor Flower: the base's layers are read from the headers of its files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from common.config import BUILT_IN, RunConfig
from common.model_files import model_folder
from common.noised_counts import NoisedCounts
from common.planner import Plan, Shape, plan
from common.privacy import Unit
from common.secure_sum import SecureSum
from common.sum_cost import sum_cost
from common.traffic import fits_float16, traffic_of
from common.wire import ReleaseSpec
from server.run_folder import prepare_spec
from simulations.outside import method_of
from simulations.worlds.built_in import base_folder

__all__ = ["DEFAULT_USERS", "base_of", "count_users", "plan_of"]

DEFAULT_USERS = 4000
"""Users of the built-in world when nobody says how many."""


def base_of(config: RunConfig) -> Path:
    """The folder of the base that a configuration names."""
    return base_folder() if config.model == BUILT_IN else model_folder(config.model)


def plan_of(config: RunConfig, users: int | None = None, *, rounds_per_week: float | None = None) -> Plan:
    """Plan a configuration for `users` enrolled users; counted from the data when absent.

    Args:
        config: What is planned.
        users: Enrolled users.
        rounds_per_week: How often a round is run, to say how many weeks the budget lasts.

    Raises:
        ConfigError, DataError: The configuration does not fit its data or its base.
        ClaimRefused: The promise could not be kept.
    """
    method_of(config)
    population = users or config.users or count_users(config)
    spec, _ = prepare_spec(config, population=population, model=base_of(config))
    sent = [name for name in spec.names if name.endswith(".weight")]
    layers = {layer_of(name) for name in sent}
    targets = {name.split(".lora_")[0].rpartition(".")[2] for name in sent}
    shape = None
    if sent:
        values = spec.model_dim / (config.rank * len(layers) * len(targets))
        shape = Shape(rank=config.rank, layers=len(layers), targets=len(targets), values_per_rank=values)
    users_matter = config.unit == "user"
    distributed = _distributed(config, spec)
    found = plan(
        dim=max(spec.model_dim, 1),
        population=population if users_matter else config.example_records,
        cohort=config.cohort if users_matter else min(config.local_batch, config.example_records),
        rounds=config.rounds * (1 if users_matter else config.local_steps),
        spare_rounds=config.spare_rounds * (1 if users_matter else config.local_steps),
        parties=1 if users_matter else config.cohort,
        epsilon=config.epsilon,
        delta=spec.delta,
        unit=Unit(config.unit),
        noise=config.noise if users_matter else "central",
        shape=shape,
        steps_per_round=1 if users_matter else config.local_steps,
        rounds_per_week=rounds_per_week,
        **distributed,
    )
    # A device sends as few bytes as lose nothing, unless it was told otherwise.
    auto = config.update_dtype is None and fits_float16(spec)
    found = replace(found, traffic=traffic_of(replace(spec, dtype="float16") if auto else spec))
    if spec.secure_sum is None:
        return found
    return replace(found, secure_sum=sum_cost(spec, found.noise_multiplier))


def _distributed(config: RunConfig, spec: ReleaseSpec) -> dict[str, float]:
    """What distributed noise has beyond its multiplier: rounding, shares that may be left out, the coordinator's."""
    if not config.private:
        return {}
    counts = NoisedCounts.of(spec)
    if spec.secure_sum is None:  # what counts beside the update take of its norm is more noise on the update
        return {} if counts is None else {"excess": 1.0 / counts.update_share}
    sums = SecureSum.of(spec)
    noise = sums.noise(spec, sums.largest_cohort)
    share = 1.0 if counts is None else counts.update_share
    if config.coordinator_epsilon is None:
        return {"excess": noise.level * noise.step / (spec.clip * spec.noise_multiplier) / share}
    return {"excess": noise.inflation / share, "floor": noise.level * noise.step / spec.clip / share}


def layer_of(name: str) -> str:
    """The part of a tensor's name that counts its layer."""
    return next((part for part in name.split(".") if part.isdigit()), "")


def count_users(config: RunConfig) -> int:
    """How many users the data of a configuration hold."""
    if config.data == BUILT_IN:
        return DEFAULT_USERS
    from simulations.worlds.loaders import load_users

    source = load_users(
        config.data, user_column=config.user_column, text_column=config.text_column, time_column=config.time_column
    )
    return sum(1 for _ in source)
