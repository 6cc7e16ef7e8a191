"""What training over a base will take of memory, told before the base is opened; and passes cut so that it fits.

An estimate from `config.json` and the sizes of the files, held against measurements in docs/devices.md. It decides what
is tried; what is granted is enforced by the resident vault, which ends a child that takes more.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError, Refusal

__all__ = ["MemoryPlan"]

INTERPRETER_MEGABYTES = 460.0
"""A process that imported torch and transformers, and opened a tokenizer and a ledger: measured."""

MOST_TOKENS, FEWEST_TOKENS = 512, 64
FEWEST_LOGITS = 64
"""Positions whose logits exist at a time, at least (`client.label_loss`)."""

SLACK = 1.15


@dataclass(frozen=True)
class MemoryPlan:
    """How a base is trained over within a grant.

    Attributes:
        pass_tokens: Tokens of one pass, forward and backward.
        keep_little: Keep each layer's input only, and compute the rest again on the way back.
        megabytes: What it is estimated to take.
    """

    pass_tokens: int
    keep_little: bool
    megabytes: float

    @classmethod
    def of(cls, folder: Path, precision: str, granted: float) -> MemoryPlan:
        """Plan for a grant in megabytes: whole passes where they fit, smaller or more frugal ones where not.

        Raises:
            Refusal: `not-now`; even the smallest pass would take more. The reason, for the owner, says how much.
            DataError: The folder says nothing of its size.
        """
        try:
            values: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            values = values.get("text_config") or values
            hidden, layers = int(values["hidden_size"]), int(values["num_hidden_layers"])
            inner, vocabulary = int(values["intermediate_size"]), int(values["vocab_size"])
            heads = int(values["num_attention_heads"])
            keys = int(values.get("num_key_value_heads") or heads) * int(values.get("head_dim") or hidden // heads)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
            raise DataError(f"{folder}: its config.json does not say how large it is") from None
        linear = layers * (2 * hidden * hidden + 2 * hidden * keys + 3 * hidden * inner)
        tables = vocabulary * hidden * (1 if values.get("tie_word_embeddings", True) else 2)
        each = {"float32": (4, 4), "bfloat16": (2, 2), "int8": (1, 4)}[precision]
        weights = linear * each[0] + tables * each[1]
        block = 4 * linear / layers if precision == "int8" else 0  # one layer's weights, dequantized
        width = 4  # over bfloat16 too: norms, rotations and gates are float32 there; measured, docs/devices.md
        logits = 2 * 4 * FEWEST_LOGITS * vocabulary
        kept = width * (7 * hidden + 2 * keys + 5 * inner)  # by one layer for one token
        fixed = INTERPRETER_MEGABYTES + SLACK * (weights + block + logits) / 1e6
        plans = [(tokens, frugal) for tokens in _halves() for frugal in (False, True)]
        sizes = [
            fixed + SLACK * tokens * (kept + layers * width * hidden if frugal else kept * layers) / 1e6
            for tokens, frugal in plans
        ]
        for (tokens, frugal), size in zip(plans, sizes, strict=True):
            if size <= granted:
                return cls(tokens, frugal, size)
        raise Refusal(
            "not-now",
            f"training over this base at {precision} takes about {min(sizes):.0f} MB, and memory_megabytes grants "
            f"{granted:.0f}; a run over an int8 base takes less",
        )

    def apply(self, base: Any) -> None:
        """Have the pass by hand over an opened base keep as little as was planned."""
        found = getattr(base.model, "_homespun_pass", None)
        if found is not None and self.keep_little:
            found.keep_little = True


def _halves() -> list[int]:
    found = [MOST_TOKENS]
    while found[-1] > FEWEST_TOKENS:
        found.append(found[-1] // 2)
    return found
