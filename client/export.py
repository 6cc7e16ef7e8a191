"""What this device holds of its owner, as files that anybody's tools read; and such files taken in again.

=======================  ===========================================================================================
`adapters/SYSTEM`        PEFT folders, as stock `peft` loads them over the base: what each system of the device uses
`adapters/parts/NAME`    the adapters one by one, as they were trained, for `homespun device import`
`merged`                 asked for: the base with one system's adapter in its weights, a Hugging Face folder in float32
`profile.json`, `.txt`   the lines that the model is told, and which of them the owner deleted
`records.jsonl`          the records, one a line, as `homespun device data add` takes them
`manifest.json`          which base, which system is in use, and the digest of every file
=======================  ===========================================================================================

All of it is in the clear: whoever has the folder has read the owner's records.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.device_home import DeviceHome
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.personalization.mixing import strengthened
from client.record_store import KeptRecord, RecordStore
from common.adapters import Layout, concatenate, lora_layout, read_peft, write_peft
from common.errors import ConfigError, DataError
from common.files import make_private_folder
from common.model_files import LinearModule, linear_modules, model_digest, precision_of
from common.source import installed_version

__all__ = ["Adapter", "adapter_of", "digests_of", "part_vectors", "read_parts", "write_export"]

FORMAT = 1
MANIFEST, RECORD_LINES, PROFILE = "manifest.json", "records.jsonl", "profile.json"
ADAPTERS, PARTS, MERGED = "adapters", "parts", "merged"
BARE = frozenset({"base", "retrieval"})
OVER_SHARED = frozenset({"global", "global+retrieval", "profile", "soft-prompt", "steering"})
"""Systems without an adapter of the owner's: over the base, and over the global adapter where there is one."""

PART_NAMES = ("shared", "alone", "over_global", "in_context", "preference")
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter over the base: its vector, layout and scaling."""

    vector: Vector
    layout: Layout
    scaling: float


def adapter_of(learned: Learned, modules: tuple[LinearModule, ...], system: str) -> Adapter | None:
    """Return what `system` puts over the base's weights, as one adapter; None where it puts nothing there.

    What stands before a question, such as retrieved records, is no part of it.

    Raises:
        ConfigError: This device has no such system.
    """
    name, _, mix = system.partition("@")
    plain, _, _ = name.partition("+")
    shared_strength, private_strength = (float(part) for part in mix.split("/")) if mix else (1.0, 1.0)
    shared = learned.shared
    own: Vector | None = None
    if name in ("private", "both", "preference", "private+retrieval", "both+retrieval"):
        over = learned.alone if plain == "private" else learned.over_global
        if plain == "preference":
            over = learned.others.get("preference")
        own = learned.in_context if name.endswith("+retrieval") else over
        if own is None:
            raise ConfigError(f"system: this device has no {name}; `homespun device learn` says which there are")
        if plain == "private":
            shared = None
    elif name in BARE or (name in OVER_SHARED - {"global", "global+retrieval"} and shared is None):
        return None
    elif name not in OVER_SHARED or shared is None:
        raise ConfigError(f"system: this device has no {name}; `homespun device learn` says which there are")
    parts: list[tuple[Vector, Layout, float]] = []
    if shared is not None:
        layout = lora_layout(modules, learned.rank)
        parts.append((strengthened(shared, layout, shared_strength), layout, learned.scaling))
    if own is not None:
        layout = _layout(learned, modules, "alone" if plain == "private" else "over_global", own)
        parts.append((strengthened(own, layout, private_strength), layout, learned.scaling))
    if len(parts) == 1:
        return Adapter(*parts[0])
    vector, layout = concatenate(parts)
    return Adapter(vector, layout, 1.0)


def write_export(home: DeviceHome, target: Path, base: Path, *, merged: str | None = None) -> dict[str, Any]:
    """Write everything under `target`, whole or not at all, and return the manifest.

    Args:
        home: The device.
        target: A folder that is not there, or empty.
        base: Folder of the base model.
        merged: Write that system's merged model too.

    Raises:
        DataError: `target` holds something, or the base is not the one that was learned on.
        ConfigError: There is no such system, or it has nothing to merge.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise DataError(f"{target}: already holds something; name another folder")
    learned = LearnedStore(home).load()
    records = RecordStore(home).records()
    profile = LevelStore(home).profile_of([one.record for one in records])
    target = target.absolute()
    make_private_folder(target.parent)
    folder = target.with_name(f".{target.name}.{secrets.token_hex(6)}.new")
    folder.mkdir(mode=0o700)
    try:
        manifest: dict[str, Any] = {"format": FORMAT, "version": installed_version(), "systems": [], "parts": {}}
        if learned is not None:
            manifest |= _write_adapters(learned, base, folder, merged)
        elif merged is not None:
            raise ConfigError("export: nothing was learned yet, so there is nothing to merge; `homespun device learn`")
        _write(folder / RECORD_LINES, "".join(json.dumps(_line(one)) + "\n" for one in records))
        lines = [asdict(line) for line in profile.lines]
        _write(folder / PROFILE, json.dumps({"lines": lines, "deleted": sorted(profile.deleted)}, indent=1) + "\n")
        _write(folder / "profile.txt", "".join(f"{text}\n" for text in profile.texts))
        manifest["records"] = len(records)
        manifest["files"] = digests_of(folder)
        _write(folder / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True) + "\n")
        if target.exists():
            target.rmdir()
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return manifest


def _write_adapters(learned: Learned, base: Path, folder: Path, merged: str | None) -> dict[str, Any]:
    if precision_of(learned.base, model_digest(base)) is None:
        raise DataError(f"{base}: not the base model that this device learned on; --model names it")
    modules = linear_modules(base, learned.targets)
    systems: list[str] = []
    wanted = ["global", "private", "both", "preference", "private+retrieval", "both+retrieval", learned.chosen]
    for system in dict.fromkeys(wanted):
        try:
            adapter = adapter_of(learned, modules, system)
        except (ConfigError, ValueError):
            continue
        if adapter is not None:
            place = folder / ADAPTERS / _folder_name(system)
            write_peft(place, adapter.vector, adapter.layout, adapter.scaling, str(base))
            systems.append(system)
    parts: dict[str, int] = {}
    for name, vector in part_vectors(learned).items():
        layout = _layout(learned, modules, name, vector)
        write_peft(folder / ADAPTERS / PARTS / name, vector, layout, learned.scaling, str(base))
        parts[name] = layout.tensors[0].shape[0]
    if merged is not None:
        if merged not in systems:
            raise ConfigError(f"export: {merged} puts nothing into the base's weights; there are {', '.join(systems)}")
        _write_merged(base, folder / ADAPTERS / _folder_name(merged), folder / MERGED)
    names = ("targets", "scaling", "rank", "rank_alone", "rank_over_global", "max_tokens", "run", "round", "chosen")
    facts = {name: getattr(learned, name) for name in (*names, "losses", "test_losses", "report")}
    return {"systems": systems, "parts": parts, "merged": merged, "learned": {"base": learned.base, **facts}}


def part_vectors(learned: Learned) -> dict[str, Vector]:
    """The adapters one by one, by name; what is no adapter of the base's layers stays here."""
    found = {name: getattr(learned, name) for name in PART_NAMES[:-1]}
    found["preference"] = learned.others.get("preference")
    return {name: vector for name, vector in found.items() if vector is not None}


def _layout(learned: Learned, modules: Sequence[LinearModule], name: str, vector: Vector) -> Layout:
    """Lay out a vector by its size: a method's own part may be of another rank than the run's."""
    if name == "shared":
        return lora_layout(tuple(modules), learned.rank)
    per_rank = sum(module.inputs + module.outputs for module in modules)
    rank, rest = divmod(vector.size, per_rank)
    if rest or not rank:
        raise ConfigError(f"{name}: no adapter of this base's layers")
    return lora_layout(tuple(modules), rank)


def _write_merged(base: Path, adapter: Path, target: Path) -> None:
    """Add the adapter into the base's weights by PEFT, and save model and tokenizer."""
    import warnings

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
        whole: Any = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
        whole.save_pretrained(target)
        AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False).save_pretrained(target)


def _line(one: KeptRecord) -> dict[str, Any]:
    """A record as `data add` takes it, with its id beside it."""
    record = one.record
    said: dict[str, Any] = {"prompt": record.prompt, "response": record.response}
    if record.rejected is not None:
        said = {"prompt": record.prompt, "chosen": record.response, "rejected": record.rejected}
    elif not record.prompt:
        said = {"text": record.response}
    said |= {"time": record.time, "task": record.task, "kind": record.kind}
    return {"id": one.id, **{name: value for name, value in said.items() if value is not None}, "source": one.source}


def read_parts(folder: Path, manifest: dict[str, Any], modules: tuple[LinearModule, ...]) -> dict[str, Vector]:
    """Read an export's adapters one by one.

    Raises:
        DataError: One of them is not of this base's layers.
    """
    scaling = float(manifest["learned"]["scaling"])
    if not set(manifest["parts"]) <= set(PART_NAMES):
        raise DataError(f"{folder / MANIFEST}: names an adapter that no device has")
    return {
        str(name): read_peft(folder / ADAPTERS / PARTS / str(name), lora_layout(modules, int(rank)), scaling)
        for name, rank in manifest["parts"].items()
    }


def _folder_name(system: str) -> str:
    return system.replace("/", "-")


def digests_of(folder: Path) -> dict[str, str]:
    """SHA-256 in hex of every file of an export but its manifest, by its path in the folder."""
    digests: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as file:
                digests[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
