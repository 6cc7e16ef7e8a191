"""What the benchmarks train: one small Llama with random weights, and users with random records.

The standard workload is a Llama of hidden size 128, 4 layers and 2,048 tokens of vocabulary with LoRA of rank 8 on
queries and values, trained for two local steps by SGD. Rivals in an environment of their own import this file too, so
it needs numpy, torch and transformers only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["RANK", "SCALING", "TARGETS", "WORKLOADS", "BenchRecord", "Workload", "llama"]

RANK, SCALING = 8, 2.0
TARGETS = ("q_proj", "v_proj")
VOCABULARY = 2048


@dataclass(frozen=True)
class BenchRecord:
    """A record of random tokens whose every token but the first is a label."""

    ids: NDArray[np.int32]
    first_label: int = 1


@dataclass(frozen=True)
class Workload:
    """Users alike in number of records; what differs between workloads.

    Attributes:
        name: As the tables call it.
        batch: Records per local step; every user takes two steps over records of its own.
        shortest: Tokens of the shortest record.
        longest: Tokens of the longest record; lengths are uniform between the two.
    """

    name: str
    batch: int
    shortest: int
    longest: int
    steps: int = 2

    def users(self, count: int, seed: int = 0) -> list[list[BenchRecord]]:
        """Make the records of `count` users."""
        generator = np.random.default_rng([seed, self.batch, self.shortest])
        lengths = generator.integers(self.shortest, self.longest + 1, (count, self.steps * self.batch))
        return [
            [BenchRecord(generator.integers(0, VOCABULARY, int(length)).astype(np.int32)) for length in own]
            for own in lengths
        ]


WORKLOADS = {
    own.name: own
    for own in (
        Workload("standard", batch=8, shortest=64, longest=64),
        Workload("small-batch", batch=2, shortest=64, longest=64),
        Workload("ragged", batch=4, shortest=4, longest=64),
    )
}


def llama(seed: int = 0, **changes: Any) -> Any:
    """The standard base with random weights, in evaluation mode; `changes` replace parts of its configuration."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 344,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        "use_cache": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes))).eval()
