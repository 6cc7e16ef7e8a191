"""Retrieval against BM25 written out, and what may be offered at all."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.personalization.retrieval import RetrievalIndex, words_of
from client.user_data import Record


def bm25(question, texts, k1=1.5, b=0.75):
    """Lucene's BM25: saturation, length norm, and idf = ln(1 + (N - n + 0.5) / (n + 0.5))."""
    documents = [words_of(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = []
    for document in documents:
        score = 0.0
        for word in words_of(question):
            containing = sum(word in other for other in documents)
            if containing:
                idf = math.log(1 + (len(documents) - containing + 0.5) / (containing + 0.5))
                count = document.count(word)
                score += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
        scores.append(score)
    return scores


word = st.sampled_from(["red", "green", "blue", "dog", "cat", "runs", "sits"])


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(word, min_size=1, max_size=8), min_size=1, max_size=8), question=st.lists(word, max_size=4)
)
def test_words_are_ranked_by_bm25_and_equals_by_recency(texts, question):
    records = [Record("", " ".join(text)) for text in texts]
    found = RetrievalIndex(records).search(" ".join(question))
    expected = np.array(bm25(" ".join(question), [record.response for record in records]))
    assert sorted(one.position for one in found) == list(range(len(records)))
    np.testing.assert_allclose([one.score for one in found], expected[[one.position for one in found]], atol=1e-5)
    for before, after in pairwise(found):
        assert before.score >= after.score
        assert before.score > after.score or before.position > after.position
    assert all((one.reason == "words") == (expected[one.position] > 0) for one in found)


def test_without_words_the_most_recent_comes_first():
    index = RetrievalIndex([Record("", text) for text in ("one", "two", "three")])
    assert [(one.position, one.reason) for one in index.search("")] == [(2, "recent"), (1, "recent"), (0, "recent")]
    assert [one.position for one in index.search("nothing of the kind")] == [2, 1, 0]


def test_a_record_is_never_offered_to_itself_nor_what_came_later_to_plain_text():
    index = RetrievalIndex([Record("", text) for text in ("one", "two", "three")])
    assert [one.position for one in index.search("two", but=1)] == [2, 0]
    assert [one.position for one in index.search("", but=1, before=1)] == [0]


def test_no_records_and_records_without_a_word_are_no_error():
    assert RetrievalIndex([]).search("anything") == []
    assert [one.position for one in RetrievalIndex([Record("", "...")]).search("anything")] == [0]


def test_meaning_brings_up_what_shares_no_word():
    meanings = {"dog": (1.0, 0.0), "hound": (0.9, 0.1), "invoice": (0.0, 1.0)}

    def embed(texts):
        return np.array([meanings[text.strip()] for text in texts])

    records = [Record("", "hound"), Record("", "invoice")]
    found = RetrievalIndex(records, embed=embed).search("dog")
    assert (found[0].position, found[0].reason) == (0, "meaning")
    assert RetrievalIndex(records).search("dog")[0].position == 1


@pytest.mark.parametrize(
    ("text", "words"), [("My Dog's", ["my", "dog", "s"]), ("日本 tea", ["日", "本", "tea"]), ("", [])]
)
def test_words_are_cut_as_scripts_write_them(text, words):
    assert words_of(text) == words
