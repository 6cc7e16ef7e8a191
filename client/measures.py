"""What a device measures on its own validation records for a run that asks; it leaves as a noised count, or not at all.

See `common.noised_counts` for the ranges, the norm and the noise that a number leaves under.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.trainer import Example, Trainer
from common.adapters import Layout, Vector

__all__ = ["measure"]


def measure(
    trainer: Trainer, adapter: Vector, people: Sequence[Sequence[Example]], metrics: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """Score the shared `adapter`, shape `(size,)`, on each user's validation records.

    Args:
        trainer: Of the shared adapter.
        adapter: As the round starts from it.
        people: Validation records of each user.
        metrics: Rows of `common.noised_counts.METRICS`.

    Returns:
        For each metric one number per user, in nats per token; NaN for whoever has no record.
    """
    if not metrics:
        return {}
    records = [one for own in people for one in own]
    owner = np.array([index for index, own in enumerate(people) for _ in own], dtype=np.intp)

    def per_token(under: tuple[Vector, Layout, float] | None) -> NDArray[np.float64]:
        if not records:
            return np.full(len(people), np.nan)
        scores = trainer.score(records, under=under)
        nats, tokens = (np.bincount(owner, of, len(people)) for of in (scores.nats, scores.tokens))
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(tokens > 0, nats / tokens, np.nan)

    found = {"loss": per_token((adapter, trainer.layout, trainer.scaling))}
    if "gain" in metrics:
        found["gain"] = per_token(None) - found["loss"]
    return {name: found[name] for name in metrics}
