"""LoRA tensors as one named vector, and the shared/private split as data.

A *layout* is an ordered list of tensor names and shapes; a vector of a layout's size is what clips, sums,
noise and stores work on. Names are those of a PEFT `adapter_model.safetensors`, so the way in and out is a
rename of nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError
from common.model_files import LinearModule

__all__ = [
    "Layout",
    "TensorSpec",
    "concatenate",
    "initial_vector",
    "lora_layout",
    "read_peft",
    "write_peft",
]

Vector = NDArray[np.float32]

PEFT_PREFIX = "base_model.model."


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


def lora_layout(modules: Sequence[LinearModule], rank: int) -> Layout:
    """Lay out one LoRA adapter: for each module A of shape `(rank, inputs)`, then B of shape `(outputs, rank)`.

    Source: Hu et al. (2021), arXiv:2106.09685; names as PEFT writes them.
    """
    tensors: list[TensorSpec] = []
    for module in modules:
        tensors.append(TensorSpec(f"{PEFT_PREFIX}{module.name}.lora_A.weight", (rank, module.inputs)))
        tensors.append(TensorSpec(f"{PEFT_PREFIX}{module.name}.lora_B.weight", (module.outputs, rank)))
    return Layout(tuple(tensors))


def initial_vector(layout: Layout, generator: np.random.Generator) -> Vector:
    """Start an adapter as PEFT does: A uniform within `1/sqrt(inputs)`, B zero, so that it changes nothing yet.

    Source: PEFT's default, `kaiming_uniform_(a=sqrt(5))` (He et al. (2015), arXiv:1502.01852).
    """
    vector = np.zeros(layout.size, dtype=np.float32)
    for tensor in layout.tensors:
        if ".lora_A." in tensor.name:
            bound = 1.0 / math.sqrt(tensor.shape[1])
            vector[layout.offsets[tensor.name]] = generator.uniform(-bound, bound, tensor.size)
    return vector


def concatenate(parts: Sequence[tuple[Vector, Layout, float]]) -> tuple[Vector, Layout]:
    """Add adapters up by concatenating their ranks, each given as vector, layout and scaling; the result has scaling 1.

    `B1 A1 s1 + B2 A2 s2 = [s1 B1, s2 B2] [A1; A2]`: the sum is exact, only the ranks add.
    """
    split = [(layout.split(vector), scaling) for vector, layout, scaling in parts]
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in parts[0][1].tensors:
        if ".lora_A." in tensor.name:
            tensors[tensor.name] = np.concatenate([part[tensor.name] for part, _ in split], axis=0)
        else:
            tensors[tensor.name] = np.concatenate([scaling * part[tensor.name] for part, scaling in split], axis=1)
    joined = Layout(tuple(TensorSpec(name, value.shape) for name, value in tensors.items()))
    return joined.join(tensors), joined


def write_peft(folder: Path, vector: Vector, layout: Layout, scaling: float, base: str) -> None:
    """Write an adapter as the folder that `peft.PeftModel.from_pretrained` loads; `base` names the base model."""
    from safetensors.numpy import save

    rank = next(tensor.shape[0] for tensor in layout.tensors if ".lora_A." in tensor.name)
    modules = [
        tensor.name.removeprefix(PEFT_PREFIX).removesuffix(".lora_A.weight")
        for tensor in layout.tensors
        if ".lora_A." in tensor.name
    ]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": scaling * rank,
        "target_modules": modules,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: np.ascontiguousarray(value) for name, value in layout.split(vector).items()}
    (folder / "adapter_model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_peft(folder: Path, layout: Layout, scaling: float) -> Vector:
    """Read a PEFT LoRA folder into a vector of `layout`; another scaling is folded into B.

    Raises:
        DataError: The folder is not a plain LoRA adapter of this layout.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load((folder / "adapter_model.safetensors").read_bytes())
        own = float(config["lora_alpha"]) / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError, SafetensorError) as error:
        raise DataError(f"{folder}: not a PEFT adapter folder ({type(error).__name__})") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        raise DataError(f"{folder}: only plain LoRA adapters can be read")
    try:
        scaled = {
            name: value.astype(np.float32) * (own / scaling if ".lora_B." in name else 1.0)
            for name, value in tensors.items()
        }
        return layout.join({name: np.asarray(value, dtype=np.float32) for name, value in scaled.items()})
    except ValueError:
        raise DataError(f"{folder}: its tensors are not those of this base, rank and targets") from None
