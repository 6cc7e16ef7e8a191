"""Which charts a run gets, and that their sentences say what the numbers say."""

from xml.etree import ElementTree

import numpy as np
import pytest

from common.config import RunConfig
from common.evaluation import summarize, user_scores
from simulations.run_charts import comparison_marks, figures, share_bar


def parse(svg):
    return ElementTree.fromstring(str(svg))  # noqa: S314


def scored(users=60, *, gain=0.2):
    base = np.linspace(2.0, 3.0, users)
    systems = {"base": base, "global": base - gain / 2, "both": base - gain}
    frame = {
        "user": np.tile([f"u{index:03}" for index in range(users)], len(systems)),
        "system": np.repeat(list(systems), users),
        "nats_per_token": np.concatenate(list(systems.values())),
    }
    summary = summarize(frame, np.random.default_rng(0), resamples=50)
    return summary.metrics[0], user_scores(frame)


def round_line(number, **more):
    return {"round": number, "epsilon_spent": 0.5 * number} | more


def curve(first, last):
    return [
        round_line(1, evaluation={"base": 2.5, "global": first}),
        round_line(2),
        round_line(3, evaluation={"base": 2.5, "global": last}),
    ]


def headings(found):
    return [figure.heading for figure in found]


def test_a_whole_run_gets_four_figures_and_their_sentences():
    nats, scores = scored()
    records = np.linspace(10, 500, 60)
    found = figures(RunConfig(rounds=3), curve(2.4, 2.1), nats, scores, records, "both")
    assert len(found) == 4
    notes = [figure.note for figure in found]
    assert notes[0] == "The shared adapter goes from 2.400 after round 1 to 2.100 after round 3."
    assert notes[1].startswith("Median gain +0.200 over base and +0.100 over global.")
    assert notes[2].startswith("Median gain over base: +0.200 around")
    assert notes[3].startswith("After round 3, 1.50 of the 8 asked for is spent")
    for figure in found:
        assert figure.note in figure.svg, "a screen reader is told the same"
        parse(figure.svg)


def test_a_run_without_scores_or_rounds_gets_no_figure():
    assert figures(RunConfig(), [], None, None, None, None) == []


def test_a_run_without_noise_has_no_budget_to_draw():
    lines = [{"round": 1, "epsilon_spent": "inf"}]
    assert figures(RunConfig(epsilon="inf"), lines, None, None, None, None) == []
    assert figures(RunConfig(epsilon="inf"), [round_line(1)], None, None, None, None) == []


def test_a_rehearsal_says_under_its_budget_that_nothing_is_claimed():
    (figure,) = figures(RunConfig(rehearsal=True), [round_line(1), round_line(2)], None, None, None, None)
    assert figure.note.endswith("Calibrated, not claimed.")


def test_one_evaluation_is_not_a_curve():
    lines = [round_line(1, evaluation={"base": 2.5, "global": 2.4})]
    assert headings(figures(RunConfig(), lines, None, None, None, None)) == ["Privacy budget over rounds"]


def test_medians_follow_the_number_of_records():
    nats, scores = scored()
    more = np.where(np.arange(60) < 30, 20.0, 200.0)
    gains = scores.values.copy()
    gains[2, 30:] -= 0.3
    uneven = type(scores)(scores.metric, scores.systems, scores.labels, gains, 0)
    figure = next(f for f in figures(RunConfig(), [], nats, uneven, more, "both") if "records" in f.heading)
    assert figure.note == "Median gain over base: +0.200 around 20 records, +0.500 around 200."


def test_every_pair_is_drawn_on_one_scale():
    nats, _ = scored()
    marks = comparison_marks(nats)
    assert [(entry.system, entry.reference) for entry, _ in marks] == [
        ("global", "base"),
        ("both", "base"),
        ("both", "global"),
    ]
    at = {}
    for entry, svg in marks:
        root = parse(svg)
        at[entry.system, entry.reference] = float(root.find("circle").get("cx"))
        zero = next(float(node.get("x1")) for node in root.iter("line") if node.get("class") == "zero")
    assert at["both", "base"] - zero == pytest.approx(2 * (at["global", "base"] - zero), abs=0.3)
    assert comparison_marks(None) == []


def test_a_share_bar_says_its_shares_in_words():
    nats, _ = scored()
    title = parse(share_bar(nats.against("both", "base"))).find("title").text
    assert title == "both against base: 100% of users helped, 0% harmed"
