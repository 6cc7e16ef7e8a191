"""One copy of a base per machine: weights are mapped from their files, so every process reads the same pages.

A worker per core would otherwise hold a base per core. A mapped page belongs to the operating system's cache: it is
shared by all processes that map it, and can be dropped and read again when memory is short. Mappings are private:
should anybody write to a weight, it gets a copy of its own, and the file stays as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["share_weights"]

TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
MOST_HEADER_BYTES = 100_000_000
"""As safetensors itself allows."""


def share_weights(model: Any, folder: Path) -> int:
    """Let the weights of `model` on the CPU be those that lie in the files of `folder`; returns the bytes mapped.

    A weight is taken when its file has a tensor of the same name, type, shape and content; any other stays as it is,
    such as one that was converted to another type when it was opened.
    """
    parameters = {name: each for name, each in model.named_parameters() if each.device.type == "cpu"}
    shared = 0
    for path in sorted(folder.glob("*.safetensors")):
        for name, mapped in _tensors(path):
            own = parameters.get(name)
            if own is None or own.dtype != mapped.dtype or own.shape != mapped.shape or not torch.equal(own, mapped):
                continue
            own.data = mapped
            shared += mapped.nbytes
    return shared


def _tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of a safetensors file, mapped.

    Source: the format's description, https://github.com/huggingface/safetensors, "Format".
    """
    try:
        whole = np.memmap(path, dtype=np.uint8, mode="c")  # copy on write
        length = int.from_bytes(whole[:8].tobytes(), "little")
        if length > MOST_HEADER_BYTES:
            return
        header: dict[str, Any] = json.loads(whole[8 : 8 + length].tobytes())
    except (OSError, ValueError):  # whoever opened the model has said what is wrong with its files
        return
    for name, told in header.items():
        if name == "__metadata__" or told["dtype"] not in TYPES:
            continue
        kind, (start, stop) = TYPES[told["dtype"]], told["data_offsets"]
        piece = whole[8 + length + start : 8 + length + stop]
        fits = piece.nbytes == math.prod(told["shape"]) * kind.itemsize and piece.ctypes.data % kind.itemsize == 0
        if not piece.nbytes or not fits:
            continue
        yield name, torch.from_numpy(piece).view(kind).view(told["shape"])
