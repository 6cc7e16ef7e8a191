"""Charts: well-formed, to scale, labelled, escaped, and empty rather than wrong."""

import math
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulations.charts import Line, Panel, histograms, interval_mark, line_chart, points_chart, share_mark

HOSTILE = "<script>alert('x')</script> & \"quoted\""


def parse(svg):
    return ElementTree.fromstring(str(svg))  # noqa: S314


def of_class(root, *classes):
    return [node for node in root.iter() if set(classes) <= set(node.get("class", "").split())]


def texts(root):
    return [node.text for node in root.iter("text")]


def coordinates(node):
    return [tuple(map(float, pair.split(","))) for pair in node.get("points").split()]


def draw_line(points, **options):
    return line_chart("Title", "What it shows", [Line("one", "global", points)], x_label="x", y_label="y", **options)


def test_a_line_is_to_scale_and_labelled_where_it_ends():
    root = parse(draw_line([(0, 1.0), (5, 2.0), (10, 3.0)]))
    (line,) = of_class(root, "line")
    (x0, y0), (x1, y1), (x2, y2) = coordinates(line)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2)
    assert y0 > y2, "more is higher on the page"
    (label,) = of_class(root, "end")
    assert label.text == "one"
    assert float(label.get("y")) == pytest.approx(y2, abs=5)
    assert root.find("title").text == "Title"
    assert root.find("desc").text == "What it shows"
    assert root.get("role") == "img"


def test_ticks_stand_where_their_numbers_are():
    root = parse(draw_line([(0, 0.0), (10, 8.0)], from_zero=True))
    line = coordinates(of_class(root, "line")[0])
    ticks = {node.text: float(node.get("y")) - 4 for node in of_class(root, "tick") if node.get("text-anchor") == "end"}
    assert ticks["0"] == pytest.approx(line[0][1], abs=0.2)
    assert ticks["8"] == pytest.approx(line[1][1], abs=0.2)


def test_labels_of_lines_that_end_together_do_not_touch():
    lines = [Line(f"line {index}", "global", [(0, 0.0), (1, 1.0 + index * 1e-6)]) for index in range(4)]
    root = parse(line_chart("t", "d", lines, x_label="x", y_label="y"))
    heights = sorted(float(node.get("y")) for node in of_class(root, "end"))
    assert min(np.diff(heights)) >= 15.9
    assert heights[-1] <= 240


def test_bars_count_every_user_once_and_zero_is_an_edge():
    gains = np.array([-0.31, -0.05, 0.02, 0.02, 0.11, 0.4, 0.41, 0.42])
    panel = Panel("both over base", "both", gains, "2 worse", "6 better")
    root = parse(histograms("t", "d", [panel], x_label="gain"))
    zero = float(of_class(root, "zero")[0].get("x1"))
    harm, bars = of_class(root, "harm"), of_class(root, "bar")
    assert all(float(bar.get("x")) + float(bar.get("width")) <= zero for bar in harm)
    assert all(float(bar.get("x")) >= zero for bar in bars)
    heights = [float(bar.get("height")) for bar in harm + bars]
    smallest = min(heights)
    assert sum(round(height / smallest) for height in heights) == len(gains)
    assert {"2 worse", "6 better", "both over base"} <= set(texts(root))


def test_outliers_are_counted_in_the_outermost_bar_and_do_not_squash_the_rest():
    gains = np.concatenate([np.linspace(-0.1, 0.3, 999), [50.0]])
    root = parse(histograms("t", "d", [Panel("p", "both", gains, "", "")], x_label="gain"))
    assert len(of_class(root, "bar")) > 8
    heights = [float(bar.get("height")) for bar in of_class(root, "harm") + of_class(root, "bar")]
    assert max(heights) == 200


def test_points_are_drawn_one_per_user_until_they_are_too_many():
    line = [Line("median", "both", [(1.0, 0.1), (100.0, 0.2)])]
    for users, drawn in ((50, 50), (5_000, 0)):
        points = [(1.0 + index % 100, 0.1) for index in range(users)]
        svg = points_chart("t", "d", points, line, series="both", x_label="records", y_label="gain")
        assert len(of_class(parse(svg), "user")) == drawn
        assert of_class(parse(svg), "line")


def test_a_wide_x_axis_is_logarithmic():
    points = [(1.0, 0.0), (10.0, 0.1), (100.0, 0.2)]
    svg = points_chart("t", "d", points, [], series="both", x_label="x", y_label="y")
    first, middle, last = (float(node.get("cx")) for node in of_class(parse(svg), "user"))
    assert middle - first == pytest.approx(last - middle, abs=0.2)


def test_an_interval_stands_on_the_scale_of_its_table():
    root = parse(interval_mark(0.5, 0.25, 0.75, (0.0, 1.0), series="both", description="gain"))
    (whisker,) = of_class(root, "whisker")
    (dot,) = of_class(root, "dot")
    assert (float(whisker.get("x1")) + float(whisker.get("x2"))) / 2 == pytest.approx(float(dot.get("cx")))
    assert float(whisker.get("x2")) - float(whisker.get("x1")) == pytest.approx(104)
    without = parse(interval_mark(0.5, math.nan, math.nan, (0.0, 1.0), series="both", description="gain"))
    assert not of_class(without, "whisker")


def test_shares_fill_a_bar_from_both_ends():
    root = parse(share_mark(0.75, 0.125, series="both", description="shares"))
    (harm,), (bar,) = of_class(root, "harm"), of_class(root, "bar")
    assert (float(harm.get("x")), float(harm.get("width"))) == (0, 15)
    assert (float(bar.get("x")), float(bar.get("width"))) == (30, 90)


def test_nothing_is_drawn_from_nothing():
    assert draw_line([]) == ""
    assert histograms("t", "d", [], x_label="x") == ""
    assert histograms("t", "d", [Panel("p", "both", np.array([]), "", "")], x_label="x") == ""
    assert points_chart("t", "d", [], [], series="both", x_label="x", y_label="y") == ""


def test_every_text_is_escaped():
    point = [(1.0, 1.0), (2.0, 2.0)]
    hostile = Line(HOSTILE, HOSTILE, point)
    panel = Panel(HOSTILE, HOSTILE, np.array([0.1, -0.2]), HOSTILE, HOSTILE)
    charts = [
        line_chart(HOSTILE, HOSTILE, [hostile], x_label=HOSTILE, y_label=HOSTILE),
        histograms(HOSTILE, HOSTILE, [panel], x_label=HOSTILE),
        points_chart(HOSTILE, HOSTILE, point, [hostile], series=HOSTILE, x_label=HOSTILE, y_label=HOSTILE),
        interval_mark(0.1, 0.0, 0.2, (0.0, 1.0), series=HOSTILE, description=HOSTILE),
        share_mark(0.5, 0.2, series=HOSTILE, description=HOSTILE),
    ]
    for chart in charts:
        assert "<script" not in chart
        assert parse(chart).find("title").text == HOSTILE


values = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.lists(st.tuples(st.integers(0, 1000), values), min_size=1, max_size=20))
def test_any_finite_numbers_give_a_well_formed_chart_within_its_frame(points):
    line = Line("line", "both", sorted(points))
    gains = np.array([y for _, y in points])
    for svg in (
        draw_line(points),
        histograms("t", "d", [Panel("p", "both", gains, "", "")], x_label="x"),
        points_chart("t", "d", points, [line], series="both", x_label="x", y_label="y"),
    ):
        root = parse(svg)
        width, height = map(float, root.get("viewBox").split()[2:])
        for node in root.iter():
            for name in ("x", "x1", "x2", "cx"):
                assert -0.5 <= float(node.get(name, 0)) <= width + 0.5
            for name in ("y", "y1", "y2", "cy"):
                assert -0.5 <= float(node.get(name, 0)) <= height + 0.5
        assert not re.search(r'"(nan|inf|-inf)"', str(svg))
