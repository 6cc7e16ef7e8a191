"""Evaluation against oracles that are as slow and plain as possible, closed forms, and known coverage."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.evaluation import (
    ACCURACY,
    NATS,
    Interval,
    Metric,
    Summary,
    compare,
    sign_flip_test,
    summarize,
    user_scores,
)

finite = st.floats(-5, 5, allow_nan=False, width=32)


def generator(seed=0):
    return np.random.default_rng(seed)


def frame_of(**systems):
    """One row per user and system from name=[score per user]."""
    rows = [(f"u{index:03}", name, score) for name, scores in systems.items() for index, score in enumerate(scores)]
    users, names, scores = zip(*rows, strict=True)
    return {"user": list(users), "system": list(names), "nats_per_token": list(scores)}


def naive_worst_decile(scores, *, higher_is_better):
    ordered = sorted(scores, reverse=not higher_is_better)
    count = math.ceil(len(ordered) / 10)
    return sum(ordered[:count]) / count


@given(st.lists(st.tuples(finite, finite), min_size=2, max_size=33), st.booleans())
def test_estimates_equal_a_naive_oracle(pairs, higher_is_better):
    metric = Metric("nats_per_token", "nats", higher_is_better, 0.01)
    base, ours = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    summary = summarize(frame_of(base=base, both=ours), generator(), metrics=[metric], resamples=3).metrics[0]
    for name, scores in (("base", base), ("both", ours)):
        system = summary.system(name)
        assert system.mean.estimate == pytest.approx(sum(scores) / len(scores), abs=1e-9)
        assert system.median.estimate == pytest.approx(sorted_median(scores), abs=1e-9)
        expected = naive_worst_decile(scores, higher_is_better=higher_is_better)
        assert system.worst_decile.estimate == pytest.approx(expected, abs=1e-9)
    gains = [(o - b) if higher_is_better else (b - o) for b, o in zip(base, ours, strict=True)]
    comparison = summary.against("both", "base")
    assert comparison.gain.estimate == pytest.approx(sum(gains) / len(gains), abs=1e-9)
    assert comparison.median_gain.estimate == pytest.approx(sorted_median(gains), abs=1e-9)
    expected = naive_worst_decile(gains, higher_is_better=True)
    assert comparison.worst_decile_gain.estimate == pytest.approx(expected, abs=1e-9)
    assert comparison.helped.estimate == pytest.approx(sum(gain > 0.01 for gain in gains) / len(gains))
    assert comparison.harmed.estimate == pytest.approx(sum(gain < -0.01 for gain in gains) / len(gains))


def sorted_median(values):
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


@pytest.mark.parametrize(("users", "expected"), [(1, 1.0), (10, 10.0), (11, 10.5), (20, 19.5), (21, 20.0), (100, 95.5)])
def test_worst_decile_of_the_numbers_one_to_n_has_a_closed_form(users, expected):
    summary = summarize(frame_of(base=np.arange(1, users + 1)), generator(), resamples=10)
    assert summary.metrics[0].system("base").worst_decile.estimate == expected


def test_bootstrap_equals_a_loop_that_draws_users_one_resample_at_a_time():
    scores = generator(1).normal(2.0, 0.5, size=(2, 37))
    summary = summarize(frame_of(base=scores[0], both=scores[1]), generator(5), resamples=400).metrics[0]
    drawn = generator(5).integers(37, size=(400, 37))
    loops = {"base": [], "worst": [], "gain": [], "helped": []}
    for users in drawn:
        base, both = [scores[0][user] for user in users], [scores[1][user] for user in users]
        gains = [b - o for b, o in zip(base, both, strict=True)]
        loops["base"].append(sum(base) / 37)
        loops["worst"].append(naive_worst_decile(both, higher_is_better=False))
        loops["gain"].append(sum(gains) / 37)
        loops["helped"].append(sum(gain > NATS.tolerance for gain in gains) / 37)
    comparison = summary.against("both", "base")
    found = {
        "base": summary.system("base").mean,
        "worst": summary.system("both").worst_decile,
        "gain": comparison.gain,
        "helped": comparison.helped,
    }
    for name, values in loops.items():
        low, high = np.quantile(values, [0.025, 0.975])
        assert (found[name].low, found[name].high) == (pytest.approx(low), pytest.approx(high)), name


def test_drawing_in_parts_covers_every_resample(monkeypatch):
    monkeypatch.setattr("common.evaluation.VALUES_AT_ONCE", 100)
    scores = generator(2).normal(size=(2, 30))
    interval = compare(scores[0], scores[1], NATS, generator(), resamples=301).gain
    drawn = generator()
    parts = [drawn.integers(30, size=(3, 30)) for _ in range(100)] + [drawn.integers(30, size=(1, 30))]
    means = (scores[1] - scores[0])[np.concatenate(parts)].mean(axis=-1)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(means, [0.025, 0.975])))


def test_the_interval_of_the_mean_covers_the_truth_about_as_often_as_it_says():
    truth, users, trials = 0.3, 60, 300
    draws = generator(3)
    hits = 0
    for _ in range(trials):
        gains = draws.exponential(truth, size=users)
        interval = compare(np.zeros(users), gains, NATS, draws, resamples=200).gain
        hits += interval.low <= truth <= interval.high
    # 95 % nominal; a percentile interval on 60 skewed values is known to fall a little short of it
    assert 0.89 <= hits / trials <= 0.98


def test_pairing_makes_the_interval_of_a_difference_narrower_than_users_differ():
    base = generator(4).normal(3.0, 1.0, size=200)
    ours = base - 0.05 + generator(5).normal(0, 0.02, size=200)
    summary = summarize(frame_of(base=base, both=ours), generator(6)).metrics[0]
    comparison = summary.against("both", "base")
    assert comparison.gain.high - comparison.gain.low < 0.01
    assert summary.system("base").mean.high - summary.system("base").mean.low > 0.2
    assert comparison.verdict == "better"


def test_a_constant_gain_has_an_interval_of_one_point_and_everyone_helped_has_an_exact_bound():
    users = 40
    comparison = compare(np.full(users, 1.0), np.full(users, 1.5), NATS, generator())
    assert comparison.gain == Interval(0.5, 0.5, 0.5)
    assert comparison.helped.estimate == comparison.helped.high == 1.0
    assert comparison.harmed.estimate == comparison.harmed.low == 0.0
    # Clopper-Pearson at 0 of n: P[no success] = tail at the upper bound
    assert (1 - comparison.harmed.high) ** users == pytest.approx(0.025)
    assert comparison.helped.low == pytest.approx(1 - comparison.harmed.high)


def test_a_gain_within_the_tolerance_neither_helps_nor_harms():
    comparison = compare([1.0, 1.0, 1.0, 1.0], [1.009, 0.991, 1.5, 0.5], NATS, generator())
    assert (comparison.helped.estimate, comparison.harmed.estimate) == (0.25, 0.25)


def test_more_accuracy_is_a_gain_and_more_nats_is_not():
    assert compare([0.5, 0.6], [0.4, 0.4], ACCURACY, generator()).gain.estimate == pytest.approx(0.15)
    assert compare([0.5, 0.6], [0.4, 0.4], NATS, generator()).gain.estimate == pytest.approx(-0.15)


def test_every_system_is_compared_with_those_before_it_in_the_usual_order():
    scores = generator(1).normal(size=(4, 8))
    frame = frame_of(both=scores[0], private=scores[1], base=scores[2], **{"global": scores[3]})
    summary = summarize(frame, generator()).metrics[0]
    assert [entry.system for entry in summary.systems] == ["base", "global", "private", "both"]
    assert [(entry.system, entry.reference) for entry in summary.comparisons] == [
        ("global", "base"),
        ("private", "base"),
        ("private", "global"),
        ("both", "base"),
        ("both", "global"),
        ("both", "private"),
    ]
    assert summary.against("base", "both") is None
    assert summary.system("no such system") is None


def test_a_user_without_a_score_for_every_system_is_left_out_and_counted():
    frame = frame_of(base=[1.0, 2.0, 3.0, 4.0], both=[0.5, math.nan, 2.5])
    scores = user_scores(frame)
    assert scores.labels == ("u000", "u002")
    assert scores.values.tolist() == [[1.0, 3.0], [0.5, 2.5]]
    summary = summarize(frame, generator()).metrics[0]
    assert (summary.users, summary.excluded) == (2, 2)


def test_only_the_rows_of_the_split_count():
    frame = frame_of(base=[1.0, 2.0], both=[0.5, 1.5])
    doubled = {name: values * 2 for name, values in frame.items()}
    doubled["nats_per_token"] = frame["nats_per_token"] + [9.0] * 4
    doubled["split"] = ["test"] * 4 + ["validation"] * 4
    assert summarize(doubled, generator()).metrics[0].system("base").mean.estimate == 1.5
    assert summarize(doubled, generator(), split="validation").metrics[0].system("base").mean.estimate == 9.0
    with pytest.raises(ValueError, match="two rows"):
        user_scores(doubled)


def test_a_row_of_no_tokens_is_not_a_perfect_score():
    frame = frame_of(base=[1.0, 0.0], both=[0.5, 0.0]) | {"tokens": [9, 0, 9, 0]}
    summary = summarize(frame, generator()).metrics[0]
    assert (summary.users, summary.excluded) == (1, 1)
    assert summary.system("both").mean.estimate == 0.5


def test_a_metric_that_nobody_has_is_left_out():
    frame = frame_of(base=[1.0, 2.0]) | {"accuracy": [math.nan, math.nan]}
    assert [entry.metric.name for entry in summarize(frame, generator()).metrics] == ["nats_per_token"]
    assert summarize({"user": [], "system": [], "nats_per_token": []}, generator()).metrics == ()


def test_one_user_has_estimates_and_no_interval():
    summary = summarize(frame_of(base=[2.0], both=[1.0]), generator())
    comparison = summary.metrics[0].against("both", "base")
    assert comparison.gain.estimate == 1.0
    assert math.isnan(comparison.gain.low)
    assert comparison.verdict == "no clear difference"
    assert summary.to_json()["metrics"][0]["systems"][0]["mean"] == [2.0, None, None]


def test_a_summary_survives_json_and_has_no_user_in_it():
    scores = generator(8).normal(2.0, 0.3, size=(2, 25))
    frame = frame_of(base=scores[0], both=scores[1]) | {"accuracy": generator(9).uniform(size=50).tolist()}
    summary = summarize(frame, generator())
    text = json.dumps(summary.to_json(), allow_nan=False)
    assert Summary.from_json(json.loads(text)) == summary
    assert "u007" not in text
    with pytest.raises(ValueError, match="version 1"):
        Summary.from_json({"version": 2})


def test_the_same_generator_state_gives_the_same_summary():
    frame = frame_of(base=generator(1).normal(size=20), both=generator(2).normal(size=20))
    assert summarize(frame, generator(3)) == summarize(frame, generator(3))
    assert summarize(frame, generator(3)) != summarize(frame, generator(4))


def test_arrays_that_cannot_be_paired_are_refused():
    for ours, theirs in (([1.0], [1.0, 2.0]), ([], []), ([[1.0]], [[1.0]]), ([math.nan], [1.0])):
        with pytest.raises(ValueError, match=r"score"):
            compare(ours, theirs, NATS, generator())


@given(st.lists(st.integers(-40, 40), min_size=1, max_size=9))
def test_the_exact_sign_flip_test_equals_enumeration(eighths):
    patterns = list(itertools.product((1, -1), repeat=len(eighths)))
    sums = [abs(sum(sign * gain for sign, gain in zip(signs, eighths, strict=True))) for signs in patterns]
    extreme = sum(total >= abs(sum(eighths)) for total in sums)
    assert sign_flip_test([gain / 8 for gain in eighths], generator()) == extreme / len(patterns)


def test_the_sign_flip_test_has_known_values():
    # all of one sign: only the observed pattern and its mirror are as extreme
    assert sign_flip_test([1.0] * 10, generator()) == 2 / 2**10
    assert sign_flip_test([0.0] * 10, generator()) == 1.0
    assert sign_flip_test([1.0] * 50, generator(), flips=999) == 1 / 1000


def test_the_drawn_sign_flip_test_agrees_with_the_exact_one():
    gains = generator(11).normal(0.25, 1.0, size=12)
    exact = sign_flip_test(gains, generator())
    drawn = sign_flip_test(gains, generator(1), flips=4000)
    assert 0.05 < exact < 0.95
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000))


def test_the_sign_flip_test_rejects_a_true_null_no_more_often_than_it_says():
    draws = generator(12)
    rejections = sum(sign_flip_test(draws.normal(size=15), draws, flips=199) <= 0.05 for _ in range(600))
    # 600 trials at 5 %: 30 expected, standard deviation 5.3
    assert 12 <= rejections <= 50


def test_perplexity_is_the_geometric_mean_over_users():
    system = summarize(frame_of(base=[1.0, 2.0, 4.5]), generator()).metrics[0].system("base")
    assert system.perplexity.estimate == pytest.approx(math.prod(map(math.exp, [1.0, 2.0, 4.5])) ** (1 / 3))
    assert system.perplexity.low == pytest.approx(math.exp(system.mean.low))
