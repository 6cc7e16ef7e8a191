"""A personal model over time: what it belongs to, when it is fitted again, on what, and when that is taken back.

Records arrive; the shared adapter and the base move. A private adapter was trained over one base and one shared
adapter and is wrong over any other, so it says which, and is refused elsewhere until it is fitted again. A refit trains
on what is new and on a sample of what is old, so that the old is not forgotten; it stays only where validation
records are not worse for it, or else the pair of shared and private adapter from before stays in use.

Records of a user are split by time (`client.user_data.split`), so the validation records of today are younger than
anything that an adapter of yesterday was trained on: both may be judged by them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from common.adapters import Vector
from common.errors import StoreError

__all__ = ["Belonging", "drift_p_value", "keep_refit", "refit_reason", "rehearsal"]

REHEARSED = 32
"""Old records that are trained on again beside the new ones, at most."""
DRIFT_LEVEL = 0.01
GROWTH = 0.25
"""A refit is due when a quarter more records are there than it was trained on."""
TOLERANCE = 0.01
"""Nats per token by which a refit may be worse on validation records and stay: one percent of perplexity."""
MOST_ARRANGEMENTS = 9_999


@dataclass(frozen=True)
class Belonging:
    """What a private adapter was trained over and on.

    Attributes:
        base: Digest of the base model, hex.
        shared: Digest of the shared adapter below it, hex; empty where there was none.
        run: The run that made the shared adapter; empty where there was none.
        round: The round after which that was sent.
        records: Training records at the time.
    """

    base: str
    shared: str = ""
    run: str = ""
    round: int = 0
    records: int = 0

    @classmethod
    def over(cls, base: str, shared: Vector | None, *, run: str = "", round: int = 0, records: int = 0) -> Belonging:
        """Name a base and a shared adapter."""
        return cls(base, _digest(shared), run, round, records)

    def check(self, base: str, shared: Vector | None) -> None:
        """Refuse a base or a shared adapter that the private one was not trained over.

        Raises:
            StoreError: It is another one.
        """
        if base != self.base:
            raise StoreError("the private adapter was trained over another base model; it must be fitted again")
        if _digest(shared) != self.shared:
            raise StoreError(
                f"the private adapter was trained over the shared one of round {self.round}, not over this one; it "
                "must be fitted again, or used with that one"
            )

    def to_text(self) -> str:
        """Write it, as for the note of a stored version."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_text(cls, text: str) -> Belonging:
        """Read what `to_text` wrote; more keys may stand beside it.

        Raises:
            StoreError: It is something else.
        """
        try:
            found = json.loads(text)
            return cls(
                str(found["base"]), str(found["shared"]), str(found["run"]), int(found["round"]), int(found["records"])
            )
        except (ValueError, KeyError, TypeError):
            raise StoreError("the note of a private adapter does not say what it belongs to") from None


def refit_reason(
    belonging: Belonging | None, *, base: str, shared: Vector | None, records: int, drift: float = 1.0
) -> str | None:
    """Say why a private adapter must be fitted again, or None where it need not be.

    Args:
        belonging: Of the adapter that is there; None where there is none.
        base: Digest of the base that is in use.
        shared: The newest shared adapter; None where there is none.
        records: Training records there are now.
        drift: Of `drift_p_value`, where somebody looked.
    """
    if belonging is None:
        return "there is none yet"
    if belonging.base != base:
        return "the base model is another one"
    if belonging.shared != _digest(shared):
        return "the shared adapter moved"
    if drift <= DRIFT_LEVEL:
        return "the newest records are unlike those it was trained on"
    if records >= (1.0 + GROWTH) * max(belonging.records, 1):
        return f"{records - belonging.records} records are new"
    return None


def rehearsal(names: Sequence[str], new: int, size: int = REHEARSED) -> list[int]:
    """Positions to train on: the newest `new` records, and of the older ones a uniform sample of at most `size`.

    A record is in the sample by the digest of its name, so that the sample changes by one record at most when one
    arrives, and a record that was removed leaves it and no trace (bottom-k sampling; Cohen and Kaplan, 2007).

    Args:
        names: What names each record and no other, the oldest first.
        new: How many of them are new, from the end.
        size: Most of the older ones.
    """
    older = range(max(len(names) - new, 0))
    ranked = sorted(older, key=lambda position: hashlib.sha256(names[position].encode()).digest())
    return [*sorted(ranked[:size]), *range(len(older), len(names))]


def drift_p_value(
    older: NDArray[np.float64], newer: NDArray[np.float64], generator: np.random.Generator | None = None
) -> float:
    """Test "the adapter's gain is no lower on newer records than on older ones"; the one-sided p-value.

    Gains are of records that the adapter was not trained on, so what differs is time alone. The difference of means is
    compared with those of random arrangements of the same gains, all of them where they are few.

    Args:
        older: Gain of the private adapter over the shared one per record, in nats per token.
        newer: The same of what arrived since.
        generator: Draws arrangements; it guards nothing.

    Guarantee: where the gains are exchangeable, a p-value of at most `level` comes up with probability at most
        `level`, whatever their distribution.

    Source: Phipson and Smyth (2010), Stat. Appl. Genet. Mol. Biol. 9(1): the observed arrangement counts as one.
    """
    pooled = np.concatenate([older, newer]).astype(np.float64)
    if not len(older) or not len(newer) or not np.isfinite(pooled).all():
        return 1.0
    generator = generator or np.random.default_rng(0)
    observed = older.mean() - newer.mean()
    as_large = 1
    for _ in range(MOST_ARRANGEMENTS // 512 + 1):
        drawn = generator.permuted(np.tile(pooled, (512, 1)), axis=1)
        gaps = drawn[:, : len(older)].mean(axis=1) - drawn[:, len(older) :].mean(axis=1)
        as_large += int((gaps >= observed - 1e-12).sum())
    return as_large / (1 + 512 * (MOST_ARRANGEMENTS // 512 + 1))


def keep_refit(
    before: NDArray[np.float64], after: NDArray[np.float64], tokens: NDArray[np.int64], tolerance: float = TOLERANCE
) -> bool:
    """Whether a refit stays: its validation records cost at most `tolerance` nats per token more than before.

    Args:
        before: Nats of each validation record under the shared and private adapter from before, shape (records,).
        after: The same under the new pair.
        tokens: Labelled tokens of each record.
        tolerance: Nats per token.

    Guarantee: without validation records, or where nothing before is finite, the refit stays; a refit that is not
        finite never does.
    """
    if not np.isfinite(after).all():
        return False
    total = float(tokens.sum())
    if total <= 0 or not np.isfinite(before).all():
        return True
    return float(after.sum() - before.sum()) / total <= tolerance


def _digest(vector: Vector | None) -> str:
    if vector is None:
        return ""
    return hashlib.sha256(np.ascontiguousarray(vector, dtype="<f4").tobytes()).hexdigest()
