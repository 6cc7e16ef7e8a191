"""LoRA tensors as one named vector, and the shared/private split as data.

A *layout* is an ordered list of tensor names and shapes; a vector of a layout's size is what clips, sums,
noise and stores work on. Names are those of a PEFT `adapter_model.safetensors`, so the way in and out is a
rename of nothing. Module names and sizes come from the header of the base's safetensors files: the server
can lay out an adapter without torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError, DataError

__all__ = ["Layout", "LinearModule", "TensorSpec", "linear_modules", "lora_layout"]

Vector = NDArray[np.float32]

PEFT_PREFIX = "base_model.model."
MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: its name in PEFT's files and its shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Layout:
    """An ordered list of tensors that together form one vector of shape `(size,)`."""

    tensors: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        """Refuse two tensors of one name: the split between them would be ambiguous."""
        names = [tensor.name for tensor in self.tensors]
        if len(set(names)) != len(names):
            raise ValueError("a layout names each tensor once")

    @cached_property
    def size(self) -> int:
        """Number of values in a vector of this layout."""
        return sum(tensor.size for tensor in self.tensors)

    @cached_property
    def offsets(self) -> dict[str, slice]:
        """Where each tensor lies in the vector."""
        offsets: dict[str, slice] = {}
        start = 0
        for tensor in self.tensors:
            offsets[tensor.name] = slice(start, start + tensor.size)
            start += tensor.size
        return offsets

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names and shapes in order, hex."""
        text = json.dumps([[tensor.name, list(tensor.shape)] for tensor in self.tensors])
        return hashlib.sha256(text.encode()).hexdigest()

    def split(self, vector: NDArray[Any]) -> dict[str, NDArray[Any]]:
        """Cut `vector`, shape `(size,)`, into its named tensors; views, not copies."""
        if vector.shape != (self.size,):
            raise ValueError(f"expected shape ({self.size},), found {vector.shape}")
        return {tensor.name: vector[self.offsets[tensor.name]].reshape(tensor.shape) for tensor in self.tensors}

    def join(self, tensors: Mapping[str, NDArray[Any]]) -> Vector:
        """Put named tensors back into one float32 vector.

        Raises:
            ValueError: A tensor is missing, unknown, or of another shape.
        """
        if tensors.keys() != self.offsets.keys():
            unknown = sorted(tensors.keys() - self.offsets.keys())
            missing = sorted(self.offsets.keys() - tensors.keys())
            raise ValueError(f"tensors differ from the layout: {unknown=} {missing=}")
        vector = np.empty(self.size, dtype=np.float32)
        for tensor in self.tensors:
            value = tensors[tensor.name]
            if value.shape != tensor.shape:
                raise ValueError(f"{tensor.name}: expected shape {tensor.shape}, found {value.shape}")
            vector[self.offsets[tensor.name]] = np.ravel(value)
        return vector

    def select(self, names: Iterable[str]) -> Layout:
        """Return the sub-layout of `names`, in this layout's order."""
        wanted = set(names)
        return Layout(tuple(tensor for tensor in self.tensors if tensor.name in wanted))

    def to_json(self) -> list[list[Any]]:
        """Return `[[name, [sizes]], ...]`."""
        return [[tensor.name, list(tensor.shape)] for tensor in self.tensors]

    @classmethod
    def from_json(cls, value: Sequence[Sequence[Any]]) -> Layout:
        """Read what `to_json` wrote."""
        return cls(tuple(TensorSpec(str(name), tuple(map(int, shape))) for name, shape in value))


@dataclass(frozen=True)
class LinearModule:
    """A linear layer of the base that may carry an adapter: `y = x W^T`, W of shape `(outputs, inputs)`."""

    name: str
    inputs: int
    outputs: int


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


def lora_layout(modules: Sequence[LinearModule], rank: int) -> Layout:
    """Lay out one LoRA adapter: for each module A of shape `(rank, inputs)`, then B of shape `(outputs, rank)`.

    Source: Hu et al. (2021), arXiv:2106.09685; names as PEFT writes them.
    """
    tensors: list[TensorSpec] = []
    for module in modules:
        tensors.append(TensorSpec(f"{PEFT_PREFIX}{module.name}.lora_A.weight", (rank, module.inputs)))
        tensors.append(TensorSpec(f"{PEFT_PREFIX}{module.name}.lora_B.weight", (module.outputs, rank)))
    return Layout(tuple(tensors))


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))
