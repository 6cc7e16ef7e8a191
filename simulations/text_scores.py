"""Scores of generated answers: LaMP's metrics with its quirks, and how often a model falls into a loop.

LaMP (Salemi et al., 2024, arXiv:2304.11406; its evaluation/evaluation.py) scores a whole task at a time:

=====================  ===============================================================================================
LaMP_1, LaMP_2         accuracy and macro-F1 over all of the task's labels; answers are compared after `strip`, and one
                       that is no label is its own wrong class, which the macro mean does not count
LaMP_3                 mean absolute and root mean squared error; an answer that is no number counts as 1 or 5,
                       whichever is worse
LaMP_4 to LaMP_7       ROUGE-1 and ROUGE-L, F-measure without stemming, mean over answers
=====================  ===============================================================================================

Predictions and golds must be of the same questions. Anything else that is not LaMP's is scored as generated text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from common.errors import DataError

__all__ = ["LABELS", "TaskScores", "degenerates", "score_task"]

LABELS: dict[str, tuple[str, ...]] = {
    "LaMP_1": ("[1]", "[2]"),
    "LaMP_2": (
        *("sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic"),
        *("psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story"),
    ),
    "LaMP_2N": (
        *("travel", "education", "parents", "style & beauty", "entertainment", "food & drink", "science & technology"),
        *("business", "sports", "healthy living", "women", "politics", "crime", "culture & arts", "religion"),
    ),
}
"""The labels of the tasks that have a closed list, by the names that our loader gives the tasks."""

RATING = "LaMP_3"
LOWEST, HIGHEST = 1.0, 5.0
LOOP_REPEATS, LONGEST_LOOP = 4, 4
"""A loop is a run of at most this many words, said this often in a row."""


@dataclass(frozen=True)
class TaskScores:
    """What one system's answers to one task are worth.

    Attributes:
        task: Whose metrics these are.
        answers: How many answers were scored.
        metrics: Name -> value: accuracy and macro_f1, or mae and rmse, or rouge_1 and rouge_l; always degeneration.
        unparsable: Answers that are no label or no number of the task, as a share; 0 where any text is an answer.
    """

    task: str
    answers: int
    metrics: dict[str, float]
    unparsable: float


def score_task(task: str, predictions: Mapping[str, str], golds: Mapping[str, str]) -> TaskScores:
    """Score the answers to one task's questions, both by the question's id.

    Raises:
        DataError: Ids differ, there is none, or a gold is no label or no number of its task.
    """
    if predictions.keys() != golds.keys() or not golds:
        raise DataError(f"{task}: predictions and golds must be of the same questions, one at least")
    ids = sorted(golds)
    said, true = [predictions[name].strip() for name in ids], [golds[name].strip() for name in ids]
    if task in LABELS:
        metrics, unparsable = _labels(task, said, true)
    elif task == RATING:
        metrics, unparsable = _ratings(said, true)
    else:
        metrics, unparsable = _texts(said, true), 0.0
    metrics["degeneration"] = float(np.mean([degenerates(answer) for answer in said]))
    return TaskScores(task, len(ids), metrics, unparsable)


def degenerates(text: str) -> bool:
    """Whether an answer is empty or says the same one to four words four times in a row."""
    words = text.split()
    if not words:
        return True
    for length in range(1, LONGEST_LOOP + 1):
        run = length * LOOP_REPEATS
        for start in range(len(words) - run + 1):
            if words[start : start + run - length] == words[start + length : start + run]:
                return True
    return False


def _labels(task: str, said: Sequence[str], true: Sequence[str]) -> tuple[dict[str, float], float]:
    labels = LABELS[task]
    if not set(true) <= set(labels):
        raise DataError(f"{task}: a gold is none of the task's {len(labels)} labels")
    scores: list[float] = []
    for label in labels:
        right = sum(one == label == other for one, other in zip(said, true, strict=True))
        both = sum(one == label for one in said) + sum(other == label for other in true)
        scores.append(2 * right / both if both else 0.0)  # as scikit-learn has it where a class never comes up
    accuracy = float(np.mean([one == other for one, other in zip(said, true, strict=True)]))
    unknown = float(np.mean([one not in labels for one in said]))
    return {"accuracy": accuracy, "macro_f1": float(np.mean(scores))}, unknown


def _ratings(said: Sequence[str], true: Sequence[str]) -> tuple[dict[str, float], float]:
    errors: list[float] = []
    unparsable = 0
    for one, other in zip(said, true, strict=True):
        gold = _number(other)
        if gold is None:
            raise DataError(f"{RATING}: a gold is no number")
        found = _number(one)
        if found is None:
            unparsable += 1
            found = LOWEST if abs(LOWEST - gold) > abs(HIGHEST - gold) else HIGHEST
        errors.append(found - gold)
    squared = np.square(errors)
    return {"mae": float(np.abs(errors).mean()), "rmse": float(np.sqrt(squared.mean()))}, unparsable / len(said)


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _texts(said: Sequence[str], true: Sequence[str]) -> dict[str, float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    found = [scorer.score(other, one) for one, other in zip(said, true, strict=True)]
    return {
        "rouge_1": float(np.mean([one["rouge1"].fmeasure for one in found])),
        "rouge_l": float(np.mean([one["rougeL"].fmeasure for one in found])),
    }
