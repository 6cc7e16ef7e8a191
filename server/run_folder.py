"""The folder of one run on the server: configuration, spec, ledger, checkpoint, log.

A folder is made whole in a temporary place beside its own and then renamed, so that there is never half a run; it is
opened again by `reopen`, which finds the run where its checkpoint and its ledger say it stands.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.adapters import Layout, Vector, lora_layout, read_peft
from common.claims import default_delta
from common.config import RunConfig, load_config, read_config_file
from common.distributed_claims import coordinator_event
from common.errors import ConfigError, DataError, Refusal, VerificationError
from common.keys import SigningKey
from common.ledger import Ledger
from common.methods import method_named
from common.model_files import linear_modules, precise_digest
from common.noised_counts import NoisedCounts
from common.places import state_home
from common.promise import promise_of
from common.secure_sum import SecureSum, with_secure_sums
from common.shared_levels import check_shared_levels
from common.source import source_digest
from common.split import public_start, sent_layout, split_of
from common.traffic import check_dtype, fits_float16
from common.wire import ReleaseSpec
from server.aggregation import ServerStep
from server.checkpoint import Checkpoint

__all__ = ["RunFolder", "create", "prepare_spec", "reopen"]

CONFIG, SPEC, LEDGER, CHECKPOINT, LOG = (
    "config.toml",
    "spec.json",
    "ledger.jsonl",
    "checkpoint.safetensors",
    "rounds.jsonl",
)
WITNESSES = 256
"""Released numbers that are zero before noise (docs/privacy.md): enough to find a halved noise, free in the model."""


@dataclass(frozen=True)
class RunFolder:
    """An opened run.

    Attributes:
        path: The folder.
        config: Its resolved configuration.
        spec: What devices are asked for.
        layout: The shared layout; what the method sends is the spec's names.
        start: The shared vector before round 1.
        ledger: Open for appending, locked against a second process.
    """

    path: Path
    config: RunConfig
    spec: ReleaseSpec
    layout: Layout
    start: Vector
    ledger: Ledger


def signing_key() -> SigningKey:
    """The key that this installation signs its ledgers with; made on first use, readable by its owner alone."""
    path = state_home() / "keys" / "writer.key"
    if path.exists():
        return SigningKey.load(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = SigningKey.generate()
    key.save(path)
    return key


def prepare_spec(
    config: RunConfig,
    *,
    population: int,
    model: Path,
    digest: str = "00" * 32,
    run: str = "00" * 16,
) -> tuple[ReleaseSpec, Layout]:
    """Lay out the shared adapter, calibrate the noise and write down what devices will be asked for.

    Args:
        config: The resolved configuration.
        population: Enrolled users; public.
        model: The base's folder, whose file headers name its layers.
        digest: The base's digest; a plan needs none.
        run: Random identifier of the run, hex; a plan needs none.

    Raises:
        ConfigError: The cohort is larger than the population, or the targets are not in the base.
        ClaimRefused: The promise could not be kept.
    """
    method = method_named(config.method)
    if config.private:
        method.check_claim(config.unit, private_noise=config.private_noise)
    check_shared_levels(config.shared_levels, config.unit, claimed=config.private)
    if config.cohort > population:
        raise ConfigError(f"cohort: {config.cohort} users per round is more than the population of {population}")
    layout = lora_layout(linear_modules(model, config.targets), config.rank)
    sent = sent_layout(method, layout, config.shared_layers or 0)
    rate = config.cohort / population
    releases = config.rounds + config.spare_rounds
    delta = config.delta if config.delta is not None else default_delta(population)
    noisy = config.private and sent.size > 0
    counts = counts_of(config)
    if counts is not None and not sent.size:
        raise ConfigError(f"method {config.method} shares nothing, so nothing leaves beside it; leave the counts out")
    spec = ReleaseSpec(
        run=run,
        method=config.method,
        names=tuple(tensor.name for tensor in sent.tensors),
        shapes=tuple(tensor.shape for tensor in sent.tensors),
        dtype="float16" if config.update_dtype == "float16" else "float32",
        unit=config.unit,
        noise=config.noise,
        clip=config.clip,
        noise_multiplier=0.0,
        sampling_rate=rate,
        rounds=releases,
        epsilon=repr(config.epsilon),
        delta=delta,
        population=population,
        recipe=recipe_of(config),
        model=precise_digest(digest, config.base_precision),
        source=source_digest(),
        witnesses=WITNESSES if noisy and config.unit == "user" else 0,
        extrapolation=_extrapolation(config, population),
        counts=None if counts is None else counts.to_plain(),
    )
    if noisy:
        multiplier = promise_of(spec).calibrate(config.epsilon, delta, releases)
        spec = replace(spec, noise_multiplier=multiplier)
    if config.update_dtype == "auto" and fits_float16(spec):
        spec = replace(spec, dtype="float16")
    check_dtype(spec)
    if config.noise == "distributed" and sent.size > 0:
        spec = with_secure_sums(
            spec,
            epsilon=config.epsilon,
            coordinator_epsilon=config.coordinator_epsilon,
            participation_cap=config.participation_cap,
        )
    return spec, layout


def counts_of(config: RunConfig) -> NoisedCounts | None:
    """What a run wants beside the updates; None for nothing."""
    if config.clip_quantile is None and not config.noised_metrics:
        return None
    return NoisedCounts(config.noised_metrics, config.clip_quantile, config.clip_learning_rate, config.count_share)


def recipe_of(config: RunConfig) -> dict[str, float | int | str]:
    """How devices are asked to train, and what they need to know of the method: public facts, as plain values."""
    optional: dict[str, float | int | str] = {}
    if config.ranks is not None:
        optional["ranks"] = ",".join(map(str, config.ranks))
    if config.shared_levels:
        optional["shared_levels"] = ",".join(config.shared_levels)
    return {
        "local_steps": config.local_steps,
        "local_batch": config.local_batch,
        "learning_rate": config.learning_rate,
        "optimizer": config.optimizer,
        "max_tokens": config.max_tokens,
        "scaling": config.scaling,
        "example_records": config.example_records,
        "rank": config.rank,
        "personal_rank": config.personal_rank or config.rank,
        "shared_layers": config.shared_layers or 0,
        "proximal_weight": config.proximal_weight,
        "private_noise": int(config.private_noise),
        "start_seed": config.seed,
        **optional,
    }


def _extrapolation(config: RunConfig, population: int) -> float:
    """Factor on the noise that makes the noise on the mean that of a larger population at the same rate."""
    if config.as_if_population is None:
        return 1.0
    if config.as_if_population < population:
        raise ConfigError(f"as_if_population: must be at least the {population} users who are here")
    return population / config.as_if_population


def create(
    path: Path,
    config: RunConfig,
    *,
    population: int,
    model: Path,
    digest: str,
    data: str | None,
    roster: str = "",
) -> RunFolder:
    """Make the folder of a new run.

    `data` is the digest of the data set, under which a study's budget is registered; None where devices hold the data.
    `roster` is the digest of the roster that devices check each other by in secure sums.

    Raises:
        ConfigError: There is a run or anything else in `path` already, or the configuration does not fit the base.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"out: {path} already holds something; choose another folder, or resume the run in it")
    spec, layout = prepare_spec(config, population=population, model=model, digest=digest, run=secrets.token_hex(16))
    if roster and spec.secure_sum is not None:
        spec = replace(spec, secure_sum={**spec.secure_sum, "roster": roster})
    start = _start(config, layout)
    sent = _layout_of(spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        building.chmod(0o755 & ~_umask())
        (building / CONFIG).write_text(config.to_toml(), encoding="utf-8")
        (building / SPEC).write_text(spec.to_text() + "\n", encoding="utf-8")
        (building / LOG).touch()
        state = ServerStep.of(config).start(start.size)
        Checkpoint(0, start, state, "", sent.digest).save(building / CHECKPOINT)
        ledger = Ledger.create(building / LEDGER, signing_key(), _header(config, spec, data))
        reserved = ledger.append("reserve", _reservation(config, spec))
        if spec.secure_sum is not None:
            ledger.append("coordinator", _coordinator(config, spec, reserved.index))
        ledger.close()
        if path.exists():
            path.rmdir()
        building.rename(path)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return reopen(path)


def reopen(path: Path) -> RunFolder:
    """Open a run that exists.

    Raises:
        DataError: There is no run in `path`, or a file of it is missing or damaged.
        VerificationError: The configuration or the spec is not the one that the ledger was opened for.
        Refusal: Another process has its ledger open.
    """
    if not (path / CONFIG).is_file():
        raise DataError(f"{path}: no run in this folder")
    config = load_config(read_config_file(path / CONFIG))
    try:
        spec = ReleaseSpec.from_text((path / SPEC).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, Refusal):
        raise DataError(f"{path / SPEC}: missing or damaged; the run cannot be continued") from None
    start = Checkpoint.load(path / CHECKPOINT)
    ledger = Ledger.open(path / LEDGER, signing_key())
    try:
        _check_bound(path, spec, ledger)
    except BaseException:
        ledger.close()
        raise
    return RunFolder(path, config, spec, _layout_of(spec), start.vector, ledger)


def _check_bound(path: Path, spec: ReleaseSpec, ledger: Ledger) -> None:
    """What was promised, reserved and priced is what goes on: nobody makes the noise smaller between two rounds."""
    # As it was written: a later version, which knows more keys, would write it differently.
    if ledger.header.get("config") != hashlib.sha256((path / CONFIG).read_bytes()).hexdigest():
        raise VerificationError(f"{path / CONFIG}: not the configuration that the run's ledger was opened for")
    reserved = [entry.body for entry in ledger.entries() if entry.kind == "reserve"]
    if not any(body.get("spec") == spec.digest and body.get("run") == spec.run for body in reserved):
        raise VerificationError(f"{path / SPEC}: not the spec that the run's ledger reserved a budget for")


def _layout_of(spec: ReleaseSpec) -> Layout:
    return Layout.from_json([[name, shape] for name, shape in zip(spec.names, spec.shapes, strict=True)])


def _start(config: RunConfig, layout: Layout) -> Vector:
    """What the server sends in round 1.

    Raises:
        ConfigError: The run is to start from an adapter, and its method freezes or keeps parts that this would replace.
    """
    split = split_of(method_named(config.method), layout, recipe_of(config))
    if config.init_adapter is None:
        return split.vector_of(public_start(layout, config.seed))
    if split.method.sends not in ("A and B", "products"):
        raise ConfigError(
            f"init_adapter: method {config.method} sends {split.method.sends} alone, and the rest of an adapter to "
            "start from would be on no device"
        )
    return split.vector_of(read_peft(Path(config.init_adapter), layout, config.scaling))


def _header(config: RunConfig, spec: ReleaseSpec, data: str | None) -> dict[str, Any]:
    whose = {"role": "server"} if data is None else {"role": "study", "data": data}
    return {
        **whose,
        "run": spec.run,
        "config": hashlib.sha256(config.to_toml().encode()).hexdigest(),
        "source": spec.source,
        "model": spec.model,
        "rehearsal": config.rehearsal,
    }


def _reservation(config: RunConfig, spec: ReleaseSpec) -> dict[str, Any]:
    """The whole schedule, spares included, priced as one; every round's debit names it."""
    event = promise_of(spec).schedule(spec.noise_multiplier, spec.rounds)
    return {
        "event": event.to_json(),
        "run": spec.run,
        "spec": spec.digest,
        "epsilon": config.epsilon if config.private and config.as_if_population is None else "inf",
        "delta": spec.delta,
        "unit": spec.unit,
        "adjacency": str(promise_of(spec).adjacency),
        "population": spec.population,
    }


def _coordinator(config: RunConfig, spec: ReleaseSpec, reservation: int) -> dict[str, Any]:
    """The same schedule against whoever knows who takes part; the reservation is about those who do not."""
    return {
        "event": coordinator_event(spec).to_json(),
        "reservation": reservation,
        "run": spec.run,
        "spec": spec.digest,
        "epsilon": float(SecureSum.of(spec).epsilon) if config.private else "inf",
        "delta": spec.delta,
        "unit": spec.unit,
        "adjacency": str(promise_of(spec).adjacency),
        "population": spec.population,
    }


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
