"""LaMP's metrics against values worked out by hand, unparsable answers included."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.errors import DataError
from simulations.text_scores import LABELS, degenerates, score_task


def scored(task, said, true):
    ids = [str(number) for number in range(len(true))]
    return score_task(task, dict(zip(ids, said, strict=True)), dict(zip(ids, true, strict=True)))


def test_citations_by_hand():
    """Four questions: right, wrong, no label, right after strip. F1 of [1] is 2*1/(1+2), of [2] is 2*1/(2+2)."""
    found = scored("LaMP_1", ["[1]", "[2]", "maybe [1]", " [2]\n"], ["[1]", "[1]", "[2]", "[2]"])
    assert found.metrics["accuracy"] == 0.5
    assert found.metrics["macro_f1"] == pytest.approx((2 / 3 + 2 / 4) / 2)
    assert found.unparsable == 0.25


def test_macro_f1_counts_labels_that_never_came_up_as_zero():
    found = scored("LaMP_2", ["comedy", "action"], ["comedy", "romance"])
    assert found.metrics["macro_f1"] == pytest.approx(1 / 15)
    assert found.metrics["accuracy"] == 0.5


def test_ratings_by_hand_and_no_number_is_the_worse_end():
    """Gold 4: 1 is worse; gold 2: 5 is worse; gold 3: both are as bad, and 5 is taken. Errors 0, -3, 3, 2."""
    found = scored("LaMP_3", ["4", "good", "five stars", "nan"], ["4", "4", "2", "3"])
    assert found.metrics["mae"] == pytest.approx((0 + 3 + 3 + 2) / 4)
    assert found.metrics["rmse"] == pytest.approx(math.sqrt((0 + 9 + 9 + 4) / 4))
    assert found.unparsable == 0.75


def test_rouge_by_hand():
    """ "the cat sat" for "the cat ran fast": 2 words shared, in order; precision 2/3, recall 2/4, F 4/7."""
    found = scored("LaMP_4", ["The cat sat"], ["the cat ran fast"])
    assert found.metrics["rouge_1"] == pytest.approx(4 / 7)
    assert found.metrics["rouge_l"] == pytest.approx(4 / 7)
    turned = scored("LaMP_5", ["fast the"], ["the cat ran fast"])
    assert turned.metrics["rouge_1"] == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert turned.metrics["rouge_l"] == pytest.approx(2 * 0.5 * 0.25 / 0.75)


def test_rouge_does_not_stem():
    assert scored("LaMP_7", ["cats"], ["cat"]).metrics["rouge_1"] == 0.0


def test_labels_agree_with_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(0)
    labels = LABELS["LaMP_2N"]
    true = [labels[i] for i in generator.integers(len(labels), size=60)]
    said = [*(labels[i] for i in generator.integers(len(labels), size=50)), *["none of them"] * 10]
    numbers = [[labels.index(one) if one in labels else -1 for one in own] for own in (true, said)]
    expected = metrics.f1_score(*numbers, labels=range(len(labels)), average="macro", zero_division=0)
    found = scored("LaMP_2N", said, true)
    assert found.metrics["macro_f1"] == pytest.approx(expected)
    assert found.metrics["accuracy"] == pytest.approx(metrics.accuracy_score(*numbers))


def test_other_questions_than_the_golds_are_refused():
    for said, true in (({"a": "[1]"}, {"b": "[1]"}), ({}, {}), ({"a": "[1]", "b": "[1]"}, {"a": "[1]"})):
        with pytest.raises(DataError, match="same questions"):
            score_task("LaMP_1", said, true)


@pytest.mark.parametrize(("task", "gold"), [("LaMP_1", "[3]"), ("LaMP_2", "horror"), ("LaMP_3", "good")])
def test_a_gold_that_is_no_answer_of_its_task_is_refused(task, gold):
    with pytest.raises(DataError, match="gold"):
        scored(task, ["x"], [gold])


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("", True),
        ("no no no no", True),
        ("a b a b a b a b c", True),
        ("no no no", False),
        ("one two three four", False),
    ],
)
def test_a_loop_is_found(text, looping):
    assert degenerates(text) == looping


@given(st.lists(st.sampled_from(["comedy", "action", "romance"]), min_size=1, max_size=20))
def test_right_answers_are_worth_everything(true):
    assert scored("LaMP_2", true, true).metrics["accuracy"] == 1.0
    assert scored("LaMP_4", true, true).metrics["rouge_l"] == pytest.approx(1.0)
