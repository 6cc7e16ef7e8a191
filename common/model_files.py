"""The files of a base model: where they are, what they are called together, and which layers stand in them.

Layers and sizes come from the headers of the safetensors files, so a server lays out adapters without torch.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from common.errors import ConfigError, DataError

__all__ = [
    "LinearModule",
    "base_folder",
    "digest_of_files",
    "is_digested",
    "linear_modules",
    "model_digest",
    "model_folder",
    "precise_digest",
    "precision_of",
]

BUILT_IN = "built-in"
"""What the model that comes with Homespun is called; `common.config` has the same word."""

DIGESTED = (
    *("*.safetensors", "config.json", "tokenizer*.json", "special_tokens_map.json", "chat_template*"),
    *("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "*.model"),
)
"""What a model is: its weights, and what makes tokens of text. Nothing else is named, so nothing else is fetched."""

PRECISIONS = ("float32", "bfloat16", "int8")
"""How a base may be held while adapters are trained over it; the first is what its digest alone names."""

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class LinearModule:
    """A linear layer of the base that may carry an adapter: `y = x W^T`, W of shape `(outputs, inputs)`."""

    name: str
    inputs: int
    outputs: int


def model_folder(name: str) -> Path:
    """Find the folder of a base: `name` itself, or the snapshot of a hub model of that name.

    Raises:
        DataError: There is no such folder, and no such model in the cache or on the hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_absolute() or name.startswith(".") or name.count("/") > 1 or folder.exists():
        raise DataError(f"{name}: no model folder here")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise DataError(
            f"{name}: neither a model folder nor a model that the hub gives us: {type(error).__name__}"
        ) from None


def base_folder(name: str) -> Path:
    """Find the folder of a base by what an option says: `built-in`, a folder, or a hub model.

    Raises:
        DataError: There is none of that name.
    """
    built_in = Path(__file__).resolve().parent.parent / "simulations" / "worlds" / "base"
    return built_in if name == BUILT_IN and built_in.is_dir() else model_folder(name)


def model_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files that make up the model, hex."""
    sums: dict[str, str] = {}
    for file in folder.iterdir():
        if is_digested(file.name) and file.is_file():
            with file.open("rb") as stream:
                sums[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return digest_of_files(sums)


def digest_of_files(sums: Mapping[str, str]) -> str:
    """The same from the SHA-256 of each file, hex, by its name; files that are none of a model's do not count."""
    total = hashlib.sha256()
    for name in sorted(filter(is_digested, sums)):
        total.update(name.encode() + b"\0" + bytes.fromhex(sums[name]))
    return total.hexdigest()


def precise_digest(digest: str, precision: str) -> str:
    """Name a base that is held at `precision`: an adapter that was made over it belongs to it and to no other.

    Raises:
        ValueError: There is no such precision.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"the precision is one of {', '.join(PRECISIONS)}")
    if precision == PRECISIONS[0]:
        return digest
    return hashlib.sha256(f"homespun base at {precision}\n{digest}".encode()).hexdigest()


def precision_of(named: str, digest: str) -> str | None:
    """At which precision the base with `digest` has the name `named`; None where that is another base."""
    return next((one for one in PRECISIONS if precise_digest(digest, one) == named), None)


def is_digested(name: str) -> bool:
    """Whether a file of this name is part of what a model's digest names."""
    return any(fnmatchcase(name, pattern) for pattern in DIGESTED)


def safetensors_header(path: Path) -> dict[str, Any]:
    """Read the JSON header of one safetensors file without reading its tensors.

    Raises:
        DataError: The file is not a safetensors file.
    """
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else MAX_HEADER_BYTES + 1
        if length > MAX_HEADER_BYTES:
            raise DataError(f"{path}: not a safetensors file")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise DataError(f"{path}: not a safetensors file") from error
    if not isinstance(header, dict):
        raise DataError(f"{path}: not a safetensors file")
    return header


def linear_modules(model: Path, targets: Sequence[str]) -> tuple[LinearModule, ...]:
    """Find the linear layers of the base in folder `model` whose last name part is in `targets`.

    Order is that of the layers' names with numbers compared as numbers, so both sides lay out alike.

    Raises:
        DataError: The folder holds no safetensors file.
        ConfigError: A target names no two-dimensional weight of this model.
    """
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise DataError(f"{model}: no .safetensors file in this model folder")
    found: dict[str, LinearModule] = {}
    for file in files:
        for key, entry in safetensors_header(file).items():
            module, _, kind = key.rpartition(".")
            if kind != "weight" or module.rpartition(".")[2] not in targets:
                continue
            shape = entry["shape"]
            if len(shape) == 2:
                found[module] = LinearModule(module, inputs=shape[1], outputs=shape[0])
    absent = sorted(set(targets) - {name.rpartition(".")[2] for name in found})
    if absent:
        raise ConfigError(f"targets: {', '.join(absent)} name no linear layer of {model}")
    return tuple(found[name] for name in sorted(found, key=_natural))


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
