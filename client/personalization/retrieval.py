"""Retrieval over the user's own records, on the user's own device: words, meaning, and what is recent.

Words are ranked by BM25 (Robertson and Zaragoza, 2009, Foundations and Trends in Information Retrieval 3(4)) through
the bm25s library; meaning, where a function for it is given, by the cosine of embeddings such as the base model's own
hidden states. Two rankings are joined by reciprocal ranks (Cormack, Clarke and Buettcher, 2009, SIGIR). Among equals,
and where a question has no words, the most recent record comes first.

Nothing here leaves the device: the index holds the records, and what it finds goes into the prompt of the model beside
it and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.user_data import Record

__all__ = ["Embed", "Found", "RetrievalIndex", "words_of"]

Embed = Callable[[Sequence[str]], NDArray[np.floating]]
"""Texts to vectors, shape (texts, width)."""

RANK_OFFSET = 60
"""The constant of reciprocal rank fusion; its authors' value."""

_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(f"[{_IDEOGRAPHS}]|[^\\W{_IDEOGRAPHS}]+")


@dataclass(frozen=True)
class Found:
    """One record that retrieval offers.

    Attributes:
        position: Which of the indexed records.
        score: By what it was ranked: BM25, or the sum of reciprocal ranks where meaning counts too; 0 for recency.
        reason: "words", "meaning" or "recent": what brought it up.
    """

    position: int
    score: float
    reason: str


class RetrievalIndex:
    """An index over one user's records, in the order of time.

    Attributes:
        records: What is indexed, the oldest first.
    """

    def __init__(self, records: Sequence[Record], *, embed: Embed | None = None) -> None:
        """Index `records`, which stand in the order of time; `embed` adds ranking by meaning."""
        import bm25s

        self.records = tuple(records)
        texts = [f"{record.prompt}\n{record.response}" for record in self.records]
        corpus = [words_of(text) for text in texts]
        self._words: bm25s.BM25 | None = None
        if any(corpus):
            self._words = bm25s.BM25()
            self._words.index(corpus, show_progress=False)
        self._embed = embed
        self._vectors = _normalized(embed(texts)) if embed is not None and texts else None

    def search(self, question: str, *, but: int | None = None, before: int | None = None) -> list[Found]:
        """Rank all records for a question, best first.

        Args:
            question: What is asked; empty for plain text, which is ranked by recency alone.
            but: A record that is not offered: the question's own, when the adapter is trained with what is retrieved.
            before: Only records before this position are offered: plain text is not shown what came after it.
        """
        count = len(self.records)
        recency = np.arange(count)
        by_words = self._by_words(question)
        by_meaning = self._by_meaning(question)
        score = by_words
        if by_meaning is not None:
            score = _reciprocal_ranks(by_words) + _reciprocal_ranks(by_meaning)
        order = np.lexsort((-recency, -score))
        found: list[Found] = []
        for position in order.tolist():
            if position == but or (before is not None and position >= before):
                continue
            reason = "recent"
            if by_words[position] > 0:
                reason = "words"
            elif by_meaning is not None and question:
                reason = "meaning"
            found.append(Found(position, float(score[position]) if reason != "recent" else 0.0, reason))
        return found

    def _by_words(self, question: str) -> NDArray[np.float64]:
        if self._words is None:
            return np.zeros(len(self.records))
        known = [word for word in words_of(question) if word in self._words.vocab_dict]
        if not known:
            return np.zeros(len(self.records))
        return np.asarray(self._words.get_scores(known), dtype=np.float64)

    def _by_meaning(self, question: str) -> NDArray[np.float64] | None:
        if self._embed is None or self._vectors is None or not question.strip():
            return None
        return np.asarray(self._vectors @ _normalized(self._embed([question]))[0], dtype=np.float64)


def words_of(text: str) -> list[str]:
    """Cut a text into lower-case words; a script that writes without spaces into characters."""
    return _WORD.findall(text.lower())


def _normalized(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    values = np.asarray(vectors, dtype=np.float64)
    return values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)


def _reciprocal_ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (60 + rank); what scores alike shares the better rank, and a score of zero or less earns nothing."""
    ranks = np.array([np.sum(scores > own) + 1 for own in scores], dtype=np.float64)
    return np.where(scores > 0, 1.0 / (RANK_OFFSET + ranks), 0.0)
