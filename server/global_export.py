"""The global adapter of a run as a PEFT folder, which stock tools load over the base; it may be given to anybody.

What a run's mechanism released is public, and so is what is made of it. The folder carries the run's statement of what
that promises to whom, in the run's own numbers.
"""

from __future__ import annotations

import json
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from common.adapters import lora_layout, write_peft
from common.config import load_config, read_config_file
from common.errors import DataError, Refusal
from common.methods import method_named
from common.model_files import base_folder, linear_modules
from common.split import split_of
from common.wire import ReleaseSpec
from server.checkpoint import Checkpoint
from server.run_folder import CHECKPOINT, CONFIG, SPEC

__all__ = ["GlobalAdapter", "write_global_adapter"]


@dataclass(frozen=True)
class GlobalAdapter:
    """What was written: where, after which round of how many, and over which base."""

    folder: Path
    round: int
    rounds: int
    base: str


def write_global_adapter(run: Path, target: Path) -> GlobalAdapter:
    """Write the newest global adapter of the run in folder `run` to `target`; works while the run goes on.

    Raises:
        DataError: There is no run, its method shares no adapter, or `target` holds something.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: already holds something; --out chooses another folder")
    if not (run / CONFIG).is_file():
        raise DataError(f"{run}: no run in this folder")
    config = load_config(read_config_file(run / CONFIG))
    try:
        spec = ReleaseSpec.from_text((run / SPEC).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, Refusal):
        raise DataError(f"{run / SPEC}: missing or damaged") from None
    checkpoint = Checkpoint.load(run / CHECKPOINT)
    layout = lora_layout(linear_modules(base_folder(config.model), config.targets), config.rank)
    split = split_of(method_named(spec.method), layout, spec.recipe)
    if not split.sent.size:
        raise DataError(f"{run}: method {spec.method} shares nothing, so there is no global adapter")
    adapter = split.adapter(checkpoint.vector)
    if adapter.shape != (layout.size,):
        raise DataError(f"{run}: method {spec.method} shares no whole adapter; `sim export` writes a user's")
    building = target.absolute().with_name(f".{target.name}.{secrets.token_hex(6)}.new")
    try:
        write_peft(building, adapter, layout, config.scaling, config.model)
        promise = {
            "run": spec.run,
            "round": checkpoint.round,
            "rounds": spec.rounds,
            "unit": spec.unit,
            "noise": spec.noise,
            "epsilon": spec.epsilon,
            "delta": spec.delta,
            "noise_multiplier": spec.noise_multiplier,
            "base": spec.model,
        }
        (building / "homespun.json").write_text(json.dumps(promise, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        if target.exists():
            target.rmdir()
        building.rename(target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return GlobalAdapter(target, checkpoint.round, spec.rounds, spec.model)
