"""Many prompts answered at once, greedily: what a model says by itself, for style vectors and for what is measured.

Prompts of any lengths stand side by side, padded on the right, and each row's next token is written where its own text
ends; with causal attention no row sees its padding. Nothing is cached between tokens: answers are short and many, and
a cache knows nothing of rows of unequal length.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from client.base_model import BaseModel
from client.trainer import Trainer
from common.adapters import Layout, Vector

__all__ = ["end_tokens", "greedy_answers"]

Ids = NDArray[np.int32]
ROWS_AT_ONCE = 64


def end_tokens(base: BaseModel) -> frozenset[int]:
    """Tokens after which an answer has ended."""
    ends = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    own = getattr(base.tokenizer, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return frozenset(int(token) for token in (*listed, own) if token is not None)


@torch.no_grad()
def greedy_answers(
    trainer: Trainer,
    prompts: Sequence[Ids],
    tokens: int,
    *,
    adapters: NDArray[np.float32] | None = None,
    owner: NDArray[np.intp] | None = None,
    under: tuple[Vector, Layout, float] | None = None,
) -> list[Ids]:
    """Answer every prompt in at most `tokens` tokens; int32, without the token that ends an answer.

    Args:
        trainer: Of the adapters.
        prompts: Token ids, at least one each.
        tokens: Longest answer.
        adapters: Adapters, shape `(users, size)`; none when absent.
        owner: For each prompt, which of `adapters` answers it.
        under: A frozen adapter below: vector, layout, scaling.
    """
    answers: list[Ids] = [np.zeros(0, np.int32)] * len(prompts)
    order = np.argsort([len(one) for one in prompts], kind="stable")
    with trainer.over_base(under):
        for start in range(0, len(order), ROWS_AT_ONCE):
            rows = order[start : start + ROWS_AT_ONCE]
            trainer.lay_over_rows(adapters, None if owner is None else owner[rows])
            try:
                found = _answer(trainer.base, [prompts[i] for i in rows.tolist()], tokens)
            finally:
                trainer.lay_over_rows(None, None)
            for row, answer in zip(rows.tolist(), found, strict=True):
                answers[row] = answer
    return answers


def _answer(base: BaseModel, prompts: Sequence[Ids], tokens: int) -> list[Ids]:
    lengths = torch.tensor([len(one) for one in prompts], device=base.device)
    text = torch.zeros(len(prompts), int(lengths.max()) + tokens, dtype=torch.int64, device=base.device)
    for row, prompt in enumerate(prompts):
        text[row, : len(prompt)] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
    ends = torch.tensor(sorted(end_tokens(base)), device=base.device)
    at, each = lengths.clone(), torch.arange(len(prompts), device=base.device)
    going = torch.ones(len(prompts), dtype=torch.bool, device=base.device)
    for _ in range(tokens):
        hidden = base.hidden(text[:, : int(at.max())])
        chosen = base.logits(hidden[each, at - 1]).argmax(dim=1)
        going &= ~torch.isin(chosen, ends)
        if not going.any():
            break
        text[each[going], at[going]] = chosen[going]
        at += going
    return [
        text[row, length:end].cpu().numpy().astype(np.int32)
        for row, (length, end) in enumerate(zip(lengths.tolist(), at.tolist(), strict=True))
    ]
