"""A sweep as people see it: one table for a terminal, and one page with a figure that needs nothing but itself."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from common.evaluation import Interval
from simulations.charts import Line, Svg, line_chart
from simulations.sweep import Point, Sweep

__all__ = ["sweep_page", "sweep_table"]

COLOURS = ("#0069a8", "#00734f", "#9c4a82", "#c2410c", "#6a7280", "#8a6d00", "#4b3fa7", "#a3123a", "#2f6f6f", "#7a4a1f")
CELLS = "In a cell: mean gain over the base; below it that of the worst tenth of users. Nats per response token."
STYLE = Path(__file__).parent / "templates" / "page.css"


def sweep_table(found: Sweep) -> Table:
    """Lay the points out for a terminal: one row per system, one column per epsilon; five fit into 80 columns."""
    epsilons = _epsilons(found)
    caption = "\n".join([CELLS, _promise(found), *_sentences(found)])
    table = Table(
        title=found.setting,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method: system", no_wrap=True)
    for epsilon in epsilons:
        table.add_column(f"epsilon\n{_name(epsilon)}", justify="right", no_wrap=True)
    table.add_column("harmed", justify="right", no_wrap=True)
    for label, points in _lines(found):
        cells = [f"{_signed(point.gain)}\n{_signed(point.worst_decile_gain)}" if point else "" for point in points]
        worst = max(point.harmed for point in points if point)
        table.add_row(label, *cells, f"{worst:.0%}")
    for cell, reason in found.refused:
        table.add_row(cell, f"refused: {reason[:60]}")
    return table


def sweep_page(found: Sweep) -> str:
    """One self-contained page: figure, table, and what stops helping where."""
    lines = _lines(found)
    names = [_name(epsilon) for epsilon in _epsilons(found)]
    charts = [
        _chart(found, "Mean gain over the base", lambda point: point.gain.estimate, names),
        _chart(found, "Gain of the worst tenth of users", lambda point: point.worst_decile_gain.estimate, names),
    ]
    colours = "\n".join(f".series-m{number} {{ --c: {colour}; }}" for number, colour in enumerate(COLOURS))
    rows = "".join(
        f"<tr><th>{html.escape(label)}</th>"
        + "".join(f"<td>{_cell(point)}</td>" if point else "<td></td>" for point in points)
        + "</tr>"
        for label, points in lines
    )
    head = "".join(f"<th>epsilon {html.escape(name)}</th>" for name in names)
    turns = "".join(f"<li>{html.escape(turn.sentence())}</li>" for turn in found.turns)
    own = "".join(f"<li>{html.escape(one.sentence())}</li>" for one in found.own)
    refused = "".join(f"<li>{html.escape(cell)}: {html.escape(reason)}</li>" for cell, reason in found.refused)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<link rel="icon" href="data:,"><title>Homespun sweep: {html.escape(found.setting)}</title>
<style>
{STYLE.read_text(encoding="utf-8")}
{colours}
.chart {{ overflow: visible; width: 100%; max-width: 640px; margin-right: 120px; }}
.mark {{ stroke: var(--quiet); stroke-width: 1; stroke-dasharray: 2 4; }}
</style></head><body>
<header><p class="kicker"><b>Homespun</b> sweep</p><h1>What sharing buys at each epsilon</h1>
<p class="lede">{html.escape(found.setting)}. {html.escape(_promise(found))}</p></header>
<main><section class="first">{"".join(charts)}</section>
<section><h2>Where sharing stops helping</h2><ul>{turns}</ul></section>
<section><h2>Is it the user's own style?</h2><p>Any adapter trained on such text may help. What it helps more than
another user's adapter does is the user's own, in nats per response token:</p><ul>{own}</ul></section>
<section><h2>Every point</h2><table><thead><tr><th>method: system</th>{head}</tr></thead><tbody>{rows}</tbody>
<caption>Nats per response token gained over the base on the user's own test records: mean [95 % interval], then the
mean over the tenth of users with the lowest gain; helped and harmed are shares of users.</caption></table></section>
{f"<section><h2>Refused</h2><ul>{refused}</ul></section>" if refused else ""}
</main></body></html>
"""


def _sentences(found: Sweep) -> list[str]:
    return [one.sentence() for one in (*found.turns, *found.own)]


def _chart(found: Sweep, title: str, value: Callable[[Point], float], names: Sequence[str]) -> Svg:
    lines = [
        Line(label, f"m{number % len(COLOURS)}", [(float(x), value(point)) for x, point in enumerate(points) if point])
        for number, (label, points) in enumerate(_lines(found))
    ]
    epsilons = _epsilons(found)
    marks = [
        (float(epsilons.index(turn.stops_at)), turn.method)
        for turn in found.turns
        if turn.stops_at is not None and turn.helps_at and turn.stops_at in epsilons
    ]
    words = " ".join(turn.sentence() + "." for turn in found.turns)
    return line_chart(
        title,
        f"{title} by epsilon, one line per system. {words}",
        lines,
        x_label="epsilon" + (", calibrated, not claimed" if found.rehearsal else " per " + "unit of privacy"),
        y_label="nats per response token (higher is better)",
        x_names=names,
        marks=marks,
    )


def _lines(found: Sweep) -> list[tuple[str, list[Point | None]]]:
    """Points by method and system, over all epsilons; systems that say the same as one before are left out."""
    epsilons = _epsilons(found)
    order = {"both": 0, "private": 1, "global": 2}
    lines: list[tuple[str, list[Point | None]]] = []
    seen: set[tuple[float | None, ...]] = set()
    for method in dict.fromkeys(point.method for point in found.points):
        own = [point for point in found.points if point.method == method]
        for system in sorted({point.system for point in own}, key=lambda name: (order.get(name, 3), name)):
            by_epsilon = {point.epsilon: point for point in own if point.system == system}
            points = [by_epsilon.get(epsilon) for epsilon in epsilons]
            key = tuple(None if point is None else round(point.gain.estimate, 6) for point in points)
            if key not in seen:
                seen.add(key)
                lines.append((f"{method}: {system}", points))
    return lines


def _epsilons(found: Sweep) -> list[float]:
    return sorted({point.epsilon for point in found.points})


def _promise(found: Sweep) -> str:
    if found.rehearsal:
        return "Epsilon is calibrated, not claimed: the runs are rehearsals, whose noise is seeded."
    return "Each run claims its epsilon if it alone is released; all runs on one data set add up."


def _cell(point: Point) -> str:
    low, high = (f"{value:+.3f}" if math.isfinite(value) else "?" for value in (point.gain.low, point.gain.high))
    return (
        f"{_signed(point.gain)} <small>[{low}, {high}]; {_signed(point.worst_decile_gain)}; "
        f"{point.helped:.0%} / {point.harmed:.0%}</small>"
    )


def _signed(interval: Interval) -> str:
    return f"{interval.estimate:+.3f}"


def _name(epsilon: float) -> str:
    return "inf" if math.isinf(epsilon) else f"{epsilon:g}"
