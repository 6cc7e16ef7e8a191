"""What a system is, what it is asked, and what its answers are worth, for users side by side.

A system is the base with something over it (adapters), before the question (records, lines, a soft prompt) or inside
(a style vector). Every system is asked the same records, in its own kind of prompt; labels are the same tokens always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.personalization.soft_prompt import score_with_prefix
from client.personalization.steering import middle_layer, steered
from client.trainer import Example, Scores, Trainer
from client.user_data import HELD_OUT, Encoded, Record
from common.adapters import Layout, Vector

__all__ = ["Kind", "Part", "Scored", "System", "Under", "rows_of", "score"]

Score = Callable[[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]], float]
"""Another metric: a user's nats, tokens and first-choice hits, each shape `(records,)`, to a number."""
Under = tuple[Vector, Layout, float] | None
Kind = Literal["plain", "retrieval", "profile"]


@dataclass(frozen=True)
class System:
    """One way to answer some users.

    Attributes:
        name: As it stands in tables.
        trainer: Of `adapters`.
        adapters: One for each user, shape (users, size).
        under: A shared adapter below.
        kind: What stands before a question.
        prefixes: A soft prompt for each user, shape (users, length, hidden).
        directions: A style vector for each user, shape (users, hidden).
        competes: Whether a user may choose it; controls do not compete.
        reported: Whether it has rows of its own.
    """

    name: str
    trainer: Trainer
    adapters: NDArray[np.float32] | None = None
    under: Under = None
    kind: Kind = "plain"
    prefixes: NDArray[np.float32] | None = None
    directions: NDArray[np.float32] | None = None
    competes: bool = True
    reported: bool = True


@dataclass(frozen=True)
class Part:
    """One part of all users' records, one after the other.

    Attributes:
        records: The records.
        owner: Whose each is, shape (records,).
        asked: What is asked in each kind of prompt.
        metric: Another score of each user.
    """

    records: Sequence[Record]
    owner: NDArray[np.intp]
    asked: dict[Kind, list[Encoded]]
    metric: Score | None = None

    def only(self, users: Sequence[int]) -> Part:
        """The records of some of the users."""
        kept = np.flatnonzero(np.isin(self.owner, users)).tolist()
        asked: dict[Kind, list[Encoded]] = {kind: [those[i] for i in kept] for kind, those in self.asked.items()}
        return Part([self.records[i] for i in kept], self.owner[kept], asked, self.metric)


@dataclass(frozen=True)
class Scored:
    """Scores of a part's records, and for those that are pairs whether the preferred answer was likelier.

    Attributes:
        plain: Of the records.
        pairs: Which of them are pairs.
        right: For each pair, whether the preferred answer had fewer nats per token.
    """

    plain: Scores
    pairs: NDArray[np.intp]
    right: NDArray[np.bool_]


def score(system: System, part: Part) -> Scored:
    """Score every record of `part` under `system`."""
    asked = part.asked[system.kind]
    pairs = np.array([index for index, example in enumerate(asked) if example.rejected is not None], dtype=np.intp)
    others = [other for other in (asked[index].rejected for index in pairs.tolist()) if other is not None]
    rows: list[Example] = [*asked, *others]
    owner = np.concatenate([part.owner, part.owner[pairs]])
    if not rows:
        scores = Scores(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
    elif system.prefixes is not None or system.directions is not None:
        scores = _user_by_user(system, rows, owner)
    else:
        scores = system.trainer.score(
            rows, adapters=system.adapters, owner=owner if system.adapters is not None else None, under=system.under
        )
    count = len(asked)
    plain = Scores(scores.nats[:count], scores.tokens[:count], scores.correct[:count])
    per_token = scores.nats / np.maximum(scores.tokens, 1)
    return Scored(plain, pairs, per_token[pairs] < per_token[count:])


def rows_of(
    users: Sequence[str], part_name: str, part: Part, scored: Scored, *, only: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One row per user, or per user of `only`: what a system's answers to the part are worth to that user."""
    chosen = range(len(users)) if only is None else only
    return [{"user": users[index], "split": part_name, **_row(part, scored, index)} for index in chosen]


def _user_by_user(system: System, rows: Sequence[Example], owner: NDArray[np.intp]) -> Scores:
    """Score through the model's own forward, where soft prompts and style vectors live."""
    base = system.trainer.base
    found = Scores(np.zeros(len(rows)), np.zeros(len(rows), np.int64), np.zeros(len(rows), np.int64))
    with system.trainer.over_base(system.under):
        for user in np.unique(owner).tolist():
            own = np.flatnonzero(owner == user)
            asked = [rows[i] for i in own.tolist()]
            prefix = None if system.prefixes is None else system.prefixes[user]
            if system.directions is None:
                scores = score_with_prefix(base, prefix, asked)
            else:
                with steered(base, middle_layer(base), system.directions[user], 1.0):
                    scores = score_with_prefix(base, prefix, asked)
            found.nats[own], found.tokens[own], found.correct[own] = scores.nats, scores.tokens, scores.correct
    return found


def _row(part: Part, scored: Scored, index: int) -> dict[str, Any]:
    own = part.owner == index
    scores = scored.plain
    tokens = int(scores.tokens[own].sum())
    pairs = part.owner[scored.pairs] == index
    row: dict[str, Any] = {
        "nats_per_token": float(scores.nats[own].sum() / max(tokens, 1)),
        "accuracy": float(scores.correct[own].sum() / max(tokens, 1)),
        "exact": float(scores.exact[own].mean()) if own.any() else 0.0,
        "tokens": tokens,
        "records": int(own.sum()),
        "preference_accuracy": float(scored.right[pairs].mean()) if pairs.any() else np.nan,
        "choice": "",
    }
    if part.metric is not None:
        told = own.any()
        row["metric"] = (
            float(part.metric(scores.nats[own], scores.tokens[own], scores.correct[own])) if told else float("nan")
        )
    kinds = np.array([part.records[position].kind or "" for position in np.flatnonzero(own).tolist()])
    for kind in sorted({kind for kind in kinds.tolist() if kind.isidentifier() and kind != HELD_OUT}):
        of_kind = np.flatnonzero(own)[kinds == kind]
        row[f"nats_{kind}"] = float(scores.nats[of_kind].sum() / max(int(scores.tokens[of_kind].sum()), 1))
    return row
