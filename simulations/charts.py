"""Charts as inline SVG: no script, no image, no font to fetch; readable on paper and by a screen reader.

Each chart has a title and a description that says in words what it shows. Lines carry their labels, so that no
legend has to be matched by colour. Colours are classes that the page's style sheet fills in, in light and in dark
(`.series-NAME`): a chart knows names, not colours. Every text that enters is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bar", "Line", "Panel", "bars", "histograms", "interval_mark", "line_chart", "points_chart", "share_mark"]

Floats = NDArray[np.float64]

WIDTH = 460
PLOT_HEIGHT = 200
LEFT, RIGHT, TOP, BOTTOM = 48, 92, 30, 46
LABEL_GAP = 16
"""Pixels that two labels at the ends of lines keep between them."""

MOST_POINTS = 1_500
"""Beyond this many, points are a blot: only their medians are drawn."""

MINUS = "\N{MINUS SIGN}"


class Svg(str):
    """A finished chart: every text in it is escaped already, so a template takes it as it is."""

    __slots__ = ()

    def __html__(self) -> str:
        """Return the chart for a template that escapes everything else."""
        return self


@dataclass(frozen=True)
class Line:
    """One line of a chart: `points` as (x, y), labelled at its right end."""

    label: str
    series: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One histogram: per-user gains, and the shares to print left and right of zero."""

    label: str
    series: str
    gains: Floats
    harmed: str
    helped: str


@dataclass(frozen=True)
class Bar:
    """One bar: a value with its words, and where it matters the most that it could have been."""

    label: str
    value: float
    words: str
    series: str
    most: float | None = None


@dataclass(frozen=True)
class _Axis:
    """A scale from data to pixels."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(part) if self.logarithmic else part for part in (self.low, self.high, value))
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)


def line_chart(
    title: str,
    description: str,
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    from_zero: bool = False,
    markers: bool = True,
    x_names: Sequence[str] = (),
    marks: Sequence[tuple[float, str]] = (),
) -> Svg:
    """Draw lines over a common x axis, each labelled where it ends; empty without a point.

    Args:
        title: What the chart is.
        description: What it shows, in words.
        lines: At least one with a point.
        x_label: What the x axis is.
        y_label: What the y axis is, with its unit.
        from_zero: Whether the y axis begins at zero.
        markers: Whether points are marked.
        x_names: Names of the places 0, 1, ... on the x axis, where it has places instead of a scale.
        marks: Upright lines at (x, label).
    """
    points = [point for line in lines for point in line.points]
    if not points:
        return Svg()
    xs, ys = zip(*points, strict=True)
    low, high = _widen(0.0 if from_zero else min(ys), max(ys), above=0.06, below=0.0 if from_zero else 0.06)
    ends = (0.0, float(max(len(x_names) - 1, 1))) if x_names else _widen(min(xs), max(xs))
    x_axis = _Axis(*ends, LEFT, WIDTH - RIGHT)
    y_axis = _Axis(low, high, TOP + PLOT_HEIGHT, TOP)
    parts = [_frame(x_axis, y_axis, x_label, y_label, whole_x=True, x_names=x_names)]
    for number, (at, label) in enumerate(marks):
        x = _px(x_axis(at))
        parts.append(_tag("line", x1=x, x2=x, y1=TOP, y2=TOP + PLOT_HEIGHT, class_="mark"))
        parts.append(_text(x + 3, TOP + 10 + 12 * number, f"{label}: no help here", "tick"))
    for line in lines:
        path = " ".join(f"{_px(x_axis(x))},{_px(y_axis(y))}" for x, y in line.points)
        style = f"line series-{line.series}" + (" dashed" if line.dashed else "")
        parts.append(_tag("polyline", points=path, class_=style))
        if markers and not line.dashed and len(line.points) <= 40:
            parts += [
                _tag("circle", cx=_px(x_axis(x)), cy=_px(y_axis(y)), r=2.6, class_=f"dot series-{line.series}")
                for x, y in line.points
            ]
    parts += _end_labels([line for line in lines if line.points], y_axis)
    return _svg(title, description, TOP + PLOT_HEIGHT + BOTTOM, parts)


def histograms(title: str, description: str, panels: Sequence[Panel], *, x_label: str) -> Svg:
    """Draw panels of per-user gains over one x axis; bars left of zero are hatched, and shares stand beside them."""
    panels = [panel for panel in panels if panel.gains.size]
    if not panels:
        return Svg()
    every = np.concatenate([panel.gains for panel in panels])
    low, high = np.quantile(every, [0.005, 0.995])
    # zero is always a bin edge: a bar is all harm or all help
    width = _step((max(high, 0.0) - min(low, 0.0)) or 1.0, 24)
    first, last = math.floor(min(low, -width) / width), math.ceil(max(high, width) / width)
    edges = np.arange(first, last + 1) * width
    plot, gap = (92, 46) if len(panels) > 1 else (PLOT_HEIGHT, 0)
    x_axis = _Axis(edges[0], edges[-1], 14, WIDTH - 14)
    zero = _px(x_axis(0.0))
    parts: list[str] = []
    bottom = 0.0
    for index, panel in enumerate(panels):
        top = 44 + index * (plot + gap)
        bottom = top + plot
        inside = np.clip(panel.gains, edges[0] + width / 4, edges[-1] - width / 4)
        counts = np.histogram(inside, edges)[0]
        tallest = int(counts.max())
        for edge, count in zip(edges[:-1], counts.tolist(), strict=True):
            if count:
                kind = "harm" if edge < -width / 2 else f"bar series-{panel.series}"
                left, right = x_axis(edge), x_axis(edge + width)
                height = plot * count / tallest
                parts.append(
                    _tag(
                        "rect",
                        x=_px(left + 0.6),
                        y=_px(bottom - height),
                        width=_px(right - left - 1.2),
                        height=_px(height),
                        class_=kind,
                    )
                )
        parts += [
            _tag("line", x1=x_axis.start, x2=x_axis.end, y1=bottom, y2=bottom, class_="axis"),
            _tag("line", x1=zero, x2=zero, y1=top - 8, y2=bottom + 5, class_="zero"),
            _text(x_axis.start, top - 26, panel.label, "label strong"),
            _text(x_axis.start, top - 9, panel.harmed, "label quiet"),
            _text(x_axis.end, top - 9, panel.helped, "label quiet", anchor="end"),
        ]
    parts += _x_ticks(x_axis, bottom, signed=True)
    parts.append(_text((x_axis.start + x_axis.end) / 2, bottom + 38, x_label, "label quiet", anchor="middle"))
    return _svg(title, description, int(bottom) + BOTTOM, parts)


def points_chart(
    title: str,
    description: str,
    points: Sequence[tuple[float, float]],
    lines: Sequence[Line],
    *,
    series: str,
    x_label: str,
    y_label: str,
) -> Svg:
    """Draw a point per user, none where they are too many to tell apart, under lines; a wide x axis is logarithmic."""
    if not points:
        return Svg()
    xs, ys = (np.array(values, dtype=np.float64) for values in zip(*points, strict=True))
    on_lines = [y for line in lines for _, y in line.points]
    low, high = np.quantile(ys, [0.005, 0.995])
    low, high = _widen(min(low, 0.0, *on_lines), max(high, 0.0, *on_lines), above=0.05, below=0.05)
    logarithmic = bool(xs.min() > 0 and xs.max() > 8 * xs.min())
    x_axis = _Axis(*_widen(float(xs.min()), float(xs.max())), LEFT + 6, WIDTH - RIGHT, logarithmic)
    y_axis = _Axis(low, high, TOP + PLOT_HEIGHT, TOP)
    parts = [_frame(x_axis, y_axis, x_label, y_label, signed_y=True, whole_x=True)]
    if len(points) <= MOST_POINTS:
        parts += [
            _tag(
                "circle",
                cx=_px(x_axis(x)),
                cy=_px(y_axis(min(max(y, low), high))),
                r=2.2,
                class_=f"user series-{series}",
            )
            for x, y in zip(xs.tolist(), ys.tolist(), strict=True)
        ]
    for line in lines:
        path = " ".join(f"{_px(x_axis(x))},{_px(y_axis(y))}" for x, y in line.points)
        parts.append(_tag("polyline", points=path, class_="halo"))
        style = f"line series-{line.series}" + (" dashed" if line.dashed else "")
        parts.append(_tag("polyline", points=path, class_=style))
    parts += _end_labels([line for line in lines if line.points], y_axis)
    return _svg(title, description, TOP + PLOT_HEIGHT + BOTTOM, parts)


def bars(title: str, description: str, rows: Sequence[Bar]) -> Svg:
    """Draw labelled bars from zero, one under the other; an outline shows the most that a value could have been.

    A value without an end is drawn over the whole width, and its words say so.
    """
    if not rows:
        return Svg()
    ends = [end for row in rows for end in (row.value, row.most or 0.0) if math.isfinite(end)]
    largest = max(ends, default=0.0) or 1.0
    axis = _Axis(0.0, largest, 0.0, WIDTH - 100)
    parts: list[str] = []
    for index, row in enumerate(rows):
        top = 6 + 40 * index
        parts.append(_text(0, top + 10, row.label, "label quiet"))
        if row.most is not None:
            width = _px(axis(min(row.most, largest)))
            parts.append(_tag("rect", x=0, y=top + 16, width=width, height=13, class_="outline"))
        length = _px(max(axis(min(row.value, largest)), 1.0))
        parts.append(_tag("rect", x=0, y=top + 16, width=length, height=13, class_=f"bar series-{row.series}"))
        furthest = max(length, _px(axis(min(row.most or 0.0, largest))))
        parts.append(_text(furthest + 8, top + 27, row.words, "label strong"))
    return _svg(title, description, 6 + 40 * len(rows), parts)


def interval_mark(
    estimate: float, low: float, high: float, domain: tuple[float, float], *, series: str, description: str
) -> Svg:
    """Draw one estimate with its interval on a scale that all rows of a table share, zero marked."""
    width, height = 220, 22
    axis = _Axis(*domain, 6, width - 6)
    middle = height / 2
    parts = [
        _tag("line", x1=axis.start, x2=axis.end, y1=middle, y2=middle, class_="grid"),
        _tag("line", x1=_px(axis(0.0)), x2=_px(axis(0.0)), y1=1, y2=height - 1, class_="zero"),
    ]
    if math.isfinite(low) and math.isfinite(high):
        parts.append(
            _tag("line", x1=_px(axis(low)), x2=_px(axis(high)), y1=middle, y2=middle, class_=f"whisker series-{series}")
        )
    parts.append(_tag("circle", cx=_px(axis(estimate)), cy=middle, r=4, class_=f"dot series-{series}"))
    return _svg(description, "", height, parts, width=width, class_="mark")


def share_mark(helped: float, harmed: float, *, series: str, description: str) -> Svg:
    """Draw the shares of users helped and harmed as one bar of full width; what is between them did not change."""
    width, height = 120, 8
    left = width * min(max(harmed, 0.0), 1.0)
    right = width * min(max(helped, 0.0), 1.0)
    parts = [
        _tag("rect", x=0, y=0, width=width, height=height, class_="track"),
        _tag("rect", x=0, y=0, width=_px(left), height=height, class_="harm"),
        _tag("rect", x=_px(width - right), y=0, width=_px(right), height=height, class_=f"bar series-{series}"),
    ]
    return _svg(description, "", height, parts, width=width, class_="mark share")


def _svg(
    title: str, description: str, height: float, parts: Sequence[str], *, width: int = WIDTH, class_: str = "chart"
) -> Svg:
    heading = f"<title>{html.escape(title)}</title>"
    if description:
        heading += f"<desc>{html.escape(description)}</desc>"
    label = html.escape(f"{title}. {description}".strip())
    opening = f'<svg class="{class_}" viewBox="0 0 {width} {height:g}" role="img" aria-label="{label}">'
    return Svg(f"{opening}{heading}{''.join(parts)}</svg>")


def _tag(name: str, **attributes: object) -> str:
    """Return one empty element; `class_` becomes `class`."""
    pairs = (
        f'{key.rstrip("_")}="{f"{value:g}" if isinstance(value, float) else html.escape(str(value))}"'
        for key, value in attributes.items()
    )
    return f"<{name} {' '.join(pairs)}/>"


def _text(x: float, y: float, text: str, class_: str, *, anchor: str = "start") -> str:
    place = f'x="{_px(x):g}" y="{_px(y):g}" text-anchor="{anchor}"'
    return f'<text {place} class="{html.escape(class_)}">{html.escape(text)}</text>'


def _px(value: float) -> float:
    return round(float(value), 1)


def _frame(
    x_axis: _Axis,
    y_axis: _Axis,
    x_label: str,
    y_label: str,
    *,
    signed_y: bool = False,
    whole_x: bool = False,
    x_names: Sequence[str] = (),
) -> str:
    """Return grid, ticks and axis names; the y axis is named above its end, where it needs no turned text."""
    step = _step(y_axis.high - y_axis.low, 5)
    parts: list[str] = []
    for value in _multiples(y_axis.low, y_axis.high, step):
        y = _px(y_axis(value))
        style = "zero" if signed_y and value == 0 else "grid"
        parts.append(_tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y, class_=style))
        parts.append(_text(LEFT - 8, y + 4, _number(value, step, signed=signed_y), "tick", anchor="end"))
    bottom = y_axis.start
    parts += _x_ticks(x_axis, bottom, whole=whole_x, names=x_names)
    parts += [
        _text(0, 13, y_label, "label quiet"),
        _text((x_axis.start + x_axis.end) / 2, bottom + 40, x_label, "label quiet", anchor="middle"),
    ]
    return "".join(parts)


def _x_ticks(
    axis: _Axis, bottom: float, *, signed: bool = False, whole: bool = False, names: Sequence[str] = ()
) -> list[str]:
    if names:
        return [
            _text(_px(axis(float(place))), bottom + 20, name, "tick", anchor="middle")
            for place, name in enumerate(names)
        ]
    if axis.logarithmic:
        candidates = [m * 10.0**e for e in range(-3, 10) for m in (1, 2, 5)]
        values = [value for value in candidates if axis.low <= value <= axis.high * 1.0001]
        step = min(values, default=1.0)
    else:
        step = _step(axis.high - axis.low, 6)
        step = max(step, 1.0) if whole else step
        values = _multiples(axis.low, axis.high, step)
    parts: list[str] = []
    for value in values:
        x = _px(axis(value))
        parts.append(_tag("line", x1=x, x2=x, y1=bottom, y2=bottom + 5, class_="axis"))
        parts.append(_text(x, bottom + 20, _number(value, step, signed=signed), "tick", anchor="middle"))
    return parts


def _end_labels(lines: Sequence[Line], y_axis: _Axis) -> list[str]:
    """Label lines at their right ends, in their order, pushed apart where they would touch."""
    ends = sorted(((y_axis(line.points[-1][1]), line) for line in lines), key=lambda end: end[0])
    heights: list[float] = []
    for y, _ in ends:
        heights.append(max(y, heights[-1] + LABEL_GAP) if heights else y)
    lowest = y_axis.start
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], lowest)
        lowest = heights[index] - LABEL_GAP
    return [
        _text(WIDTH - RIGHT + 9, height + 4, line.label, f"label end series-{line.series}")
        for height, (_, line) in zip(heights, ends, strict=True)
    ]


def _widen(low: float, high: float, *, above: float = 0.0, below: float = 0.0) -> tuple[float, float]:
    """Return a range with margins in parts of its span; values that are one for the eye get a range around them."""
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high), 1e-9):
        half = 0.5 * (abs(high) if 0 < abs(high) < 1 else 1.0)
        return low - half, high + half
    return low - below * span, high + above * span


def _step(span: float, ticks: int) -> float:
    """Return 1, 2 or 5 times a power of ten, so that at most about `ticks` of them fill `span`."""
    raw = span / ticks
    magnitude = 10.0 ** math.floor(math.log10(raw))
    return next(factor * magnitude for factor in (1.0, 2.0, 5.0, 10.0) if factor * magnitude >= raw * (1 - 1e-9))


def _multiples(low: float, high: float, step: float) -> list[float]:
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def _number(value: float, step: float, *, signed: bool = False) -> str:
    """Write a tick with the digits its step needs, thousands set off, a real minus sign."""
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    text = f"{abs(value):,.{digits}f}"
    if float(text.replace(",", "")) == 0:
        return "0"
    return (MINUS if value < 0 else "+" if signed else "") + text
