"""A sweep as people see it: every point is on the page, the page needs nothing, and what it says is escaped."""

from __future__ import annotations

import html
import math
from io import StringIO
from xml.etree import ElementTree

import pytest
from rich.console import Console

from common.evaluation import Interval
from simulations.sweep import Own, Point, Sweep, turn_of
from simulations.sweep_page import sweep_page, sweep_table


def point(method, system, epsilon, gain):
    return Point(
        method,
        system,
        epsilon,
        epsilon,
        1,
        20,
        1.0,
        Interval(gain, gain - 0.1, gain + 0.1),
        Interval(gain - 0.2, -1, 1),
        0.8,
        0.1,
    )


@pytest.fixture
def found():
    points = [point("local", "private", epsilon, 0.2) for epsilon in (1.0, 8.0, math.inf)]
    for epsilon, gain in ((1.0, 0.1), (8.0, 0.4), (math.inf, 0.5)):
        points += [point("dual", "global", epsilon, gain - 0.05), point("dual", "private", epsilon, 0.2)]
        points += [point("dual", "both", epsilon, gain)]
    gains = [
        (epsilon, Interval(low + 0.1, low, low + 0.2)) for epsilon, low in ((1.0, -0.2), (8.0, 0.1), (math.inf, 0.2))
    ]
    turns = (turn_of("dual", "private alone", gains),)
    own = (Own("dual", "both", ((8.0, Interval(0.07, 0.02, 0.12)),)),)
    return Sweep(tuple(points), turns, own, (("fedsa-epsilon1", "no <b>claim</b>"),), True, "notes & letters")


def test_the_page_needs_nothing_but_itself_and_shows_every_line_once(found):
    page = sweep_page(found)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    for label in ("dual: both", "dual: global", "local: private"):
        assert page.count(f">{label}</text>") == 2, "once in each figure"
    assert "dual: private" not in page, "the same line as local: private"
    assert "no &lt;b&gt;claim" in page
    assert "notes &amp; letters" in page
    assert "calibrated, not claimed" in page


def test_the_figures_are_well_formed_and_mark_where_sharing_stops_helping(found):
    page = sweep_page(found)
    figures = [f"<svg{part.partition('</svg>')[0]}</svg>" for part in page.split("<svg")[1:]]
    assert len(figures) == 2
    for figure in figures:
        drawing = ElementTree.fromstring(figure)  # noqa: S314 - our own
        lines = [one for one in drawing.iter() if one.get("class", "").startswith("line ")]
        assert len(lines) == 3
        assert all(len(line.get("points").split()) == 3 for line in lines)
        (mark,) = (one for one in drawing.iter() if one.get("class") == "mark")
        assert float(mark.get("x1")) == float(lines[0].get("points").split(",")[0]), "at epsilon 1"
        texts = [one.text for one in drawing.iter("text")]
        assert {"1", "8", "inf"} <= set(texts)


def test_the_terminal_shows_a_row_per_system_and_a_column_per_epsilon(found):
    out = StringIO()
    Console(file=out, width=80).print(sweep_table(found))
    text = out.getvalue()
    assert "…" not in text  # nothing is cut off
    assert text.count("epsilon") >= 2
    assert "harmed" in text
    assert {"1", "inf", "+0.400", "+0.200"} <= set(text.split())
    assert "no longer at 1" in " ".join(text.split())
    assert "refused" in text


def test_the_control_stands_in_words_beside_the_table_and_on_the_page(found):
    said = "a user's own adapter over another user's: +0.070 [+0.020, +0.120] at epsilon 8"
    assert said in found.own[0].sentence()
    assert html.escape(said) in sweep_page(found)
    console = Console(width=200, file=StringIO())
    console.print(sweep_table(found))
    assert said in " ".join(console.file.getvalue().split())
