"""What stands on a run's page, and in the terminal, beside the first table: kinds of question, newcomers, time.

Each is a table of words; where there is a figure it comes with it. What a run does not have is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from common.errors import DataError
from common.evaluation import Interval, Metric, MetricSummary, Summary
from common.query_tests import QueryComparison, compare_queries
from simulations.charts import Line, Svg, line_chart
from simulations.lifelong import FILE as LIFELONG
from simulations.lifelong import Lifelong
from simulations.newcomers import FILE as NEWCOMERS
from simulations.newcomers import NewcomerCurve, Point
from simulations.number_words import number, p_value, percent, signed

__all__ = ["KIND_PREFIX", "SYSTEM_WORDS", "ReportTable", "kind_metrics", "measures_table", "query_tests", "tables_of"]

QUERIES = "queries.parquet"

SYSTEM_WORDS = {
    "base": "the frozen model as it came",
    "global": "with the shared adapter",
    "private": "with the user's private adapter alone",
    "both": "shared and private adapter together",
    "profile": "shared adapter, and lines about the user before the question",
    "soft-prompt": "shared adapter, and a few private vectors before the question",
    "steering": "shared adapter, and the direction of the user's style added inside",
    "retrieval": "the frozen model, and the user's own past records before the question",
    "global+retrieval": "shared adapter and retrieval",
    "private+retrieval": "private adapter trained with retrieval, and asked with it",
    "both+retrieval": "both adapters, the private one trained with retrieval, and asked with it",
    "preference": "both, the private one tuned on the user's preference pairs",
    "another": "control: shared adapter and another user's private one",
    "pooled": "control: an adapter trained on users' pooled records, without privacy",
    "chosen": "what each user would use, by their own validation records",
}

KIND_PREFIX = "nats_"
SHOWN = ("profile", "global+retrieval", "retrieval", "private", "both", "private+retrieval", "both+retrieval", "chosen")
"""Lines of the newcomers' figure."""
COLOURS = 8
AGAINST_OTHERS = (
    *(("both+retrieval", "retrieval"), ("both+retrieval", "global+retrieval"), ("both+retrieval", "both")),
    *(("private+retrieval", "retrieval"), ("both", "private"), ("both", "another"), ("private", "another")),
)
"""Pairs of systems that are compared beside each with the reference."""


@dataclass(frozen=True)
class ReportTable:
    """A table of words.

    Attributes:
        heading: What it is about.
        caption: How to read it.
        head: Headings of the columns.
        rows: Cells, each with what stands small beside it.
        svg: A figure, if any.
    """

    heading: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[tuple[str, str], ...], ...]
    svg: Svg = field(default_factory=Svg)


def kind_metrics(columns: Sequence[str]) -> list[Metric]:
    """Metrics of the kinds of question that a table of users has columns for."""
    kinds = [name.removeprefix(KIND_PREFIX) for name in columns if name.startswith(KIND_PREFIX)]
    return [
        Metric(f"{KIND_PREFIX}{kind}", f"nats per response token, {kind}", higher_is_better=False, tolerance=0.01)
        for kind in sorted(set(kinds) - {"per_token"})
    ]


def query_tests(folder: Path) -> list[QueryComparison]:
    """Compare a run's systems question by question; empty where it kept no questions.

    Raises:
        DataError: What it kept cannot be read.
    """
    path = folder / QUERIES
    if not path.is_file():
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
        frame = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
        systems = list(dict.fromkeys(map(str, frame["system"])))
        reference = "global" if "global" in systems else "base"
        pairs = [(system, reference) for system in systems if system != reference]
        return compare_queries(frame, [*pairs, *AGAINST_OTHERS], np.random.default_rng(0))
    except (pa.ArrowException, OSError, KeyError):
        raise DataError(f"{path}: not the questions of a run") from None


def tables_of(folder: Path, summary: Summary | None, queries: Sequence[QueryComparison] = ()) -> list[ReportTable]:
    """What a run's folder and summary have tables for.

    Raises:
        DataError: A file beside the run is not what its name says.
    """
    found = [] if summary is None else [_kinds(summary)]
    found += [_by_query(queries)] if queries else []
    found += [_read(folder / NEWCOMERS, lambda value: _newcomers(NewcomerCurve.from_json(value)))]
    found += [_read(folder / LIFELONG, lambda value: _lifelong(Lifelong.from_json(value)))]
    return [table for table in found if table is not None]


def measures_table(summary: Summary) -> Table | None:
    """Lay measures beside nats per token out for a terminal, one column each; None where there is none."""
    rest = summary.metrics[1:]
    if not rest:
        return None
    table = Table(title="the same in other measures, mean and interval", title_justify="left", box=SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True
    table.add_column("system", no_wrap=True)
    for entry in rest:
        users = "" if entry.users == summary.metrics[0].users else f"\n{entry.users} users"
        table.add_column(_short(entry.metric) + users, justify="right")
    for system in [entry.system for entry in summary.metrics[0].systems]:
        table.add_row(system, *(_cell(entry, system) for entry in rest))
    return table


def _cell(entry: MetricSummary, name: str) -> str:
    system = entry.system(name)
    if system is None:
        return ""
    mean, show = system.mean, number if entry.metric.name.startswith(KIND_PREFIX) else percent
    return f"{show(mean.estimate)}\n{show(mean.low)}-{show(mean.high)}"


def _short(metric: Metric) -> str:
    words = metric.name.removeprefix(KIND_PREFIX).replace("_", " ")
    return f"{words}\nnats" if metric.name.startswith(KIND_PREFIX) else words.replace(" ", "\n")


def _read(path: Path, make: Callable[[Any], ReportTable]) -> ReportTable | None:
    if not path.is_file():
        return None
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: not what its name says") from None


def _kinds(summary: Summary) -> ReportTable | None:
    kinds = [entry for entry in summary.metrics[1:] if entry.metric.name.startswith(KIND_PREFIX)]
    if not kinds:
        return None
    systems = [entry.system for entry in summary.metrics[0].systems]
    rows = tuple(
        ((system, ""), *((_words(own.mean) if (own := entry.system(system)) else ("", "")) for entry in kinds))
        for system in systems
    )
    heads = tuple(f"{entry.metric.name.removeprefix(KIND_PREFIX)}, {entry.users:,} users" for entry in kinds)
    caption = (
        "Nats per response token, lower is better, mean over the users who were asked such questions. Extraction asks "
        "for what the user once said, abstraction for what their records show together, generalization for both with "
        "what the model knows."
    )
    return ReportTable("By kind of question", caption, ("System", *heads), rows)


def _by_query(queries: Sequence[QueryComparison]) -> ReportTable:
    rows = tuple(
        (
            (f"{one.system} over {one.reference}", ""),
            (signed(one.gain.estimate), signed(one.gain)),
            (p_value(one.p_by_query), ""),
            (p_value(one.p_by_user), ""),
            (p_value(one.p_adjusted), ""),
        )
        for one in queries
    )
    caption = (
        f"{queries[0].queries:,} questions of {queries[0].users:,} users; every question counts once, so who asks more "
        "counts more. Gains in nats per token, with intervals that resample users. The first p takes questions of one "
        "user as independent, which they are not; the second turns a user's questions together; the third is that "
        "after Holm's correction for all pairs of this table."
    )
    head = ("Pair", "Mean gain per question", "p by question", "p by user", "p by user, corrected")
    return ReportTable("Question by question", caption, head, rows)


def _words(interval: Interval) -> tuple[str, str]:
    return number(interval.estimate), f"{number(interval.low)} to {number(interval.high)}"


def _newcomers(curve: NewcomerCurve) -> ReportTable:
    rows: list[tuple[tuple[str, str], ...]] = []
    lines: list[Line] = []
    for system in curve.systems:
        points = [curve.at(system, count) for count in curve.records]
        rows.append(((system, ""), *(("", "") if one is None else _gain(one) for one in points)))
        if system in SHOWN:
            own = [(float(at), one.gain.estimate) for at, one in enumerate(points) if one is not None]
            lines.append(Line(system, f"m{SHOWN.index(system) % COLOURS}", own))
    said = curve.sentence()
    caption = f"{said[0].upper()}{said[1:]}. Gains in nats per response token over {curve.reference}."
    svg = line_chart(
        "Gain of newcomers by records",
        caption,
        lines,
        x_label="records that a newcomer has",
        y_label=f"gain over {curve.reference}, nats per response token",
        x_names=[str(count) for count in curve.records],
    )
    head = ("System", *(f"{count} records" for count in curve.records))
    return ReportTable("People who just came", caption, head, tuple(rows), svg)


def _gain(point: Point) -> tuple[str, str]:
    return signed(point.gain.estimate), f"{signed(point.gain)}; {percent(point.harmed.estimate)} harmed"


def _lifelong(found: Lifelong) -> ReportTable:
    rows: list[tuple[tuple[str, str], ...]] = []
    for policy, gains in found.future.items():
        cells = [(signed(gain.estimate), signed(gain)) for gain in gains]
        memory = found.remembered[policy]
        refits = (f"{found.refits[policy]:.1f}", "per user")
        rows.append(((policy, ""), *cells, (signed(memory.estimate), signed(memory)), refits))
    lines = [
        Line(policy, f"m{at}", [(float(period), gain.estimate) for period, gain in enumerate(gains)])
        for at, (policy, gains) in enumerate(found.future.items())
    ]
    caption = (
        f"{found.sentence()}. Gains in nats per response token over what stands below the private adapter, on records "
        "asked before they were learned; then on the first period's records that nobody trained on, in the end."
    )
    names = [f"period {period}" for period in range(2, found.periods + 1)]
    svg = line_chart(
        "Gain over time", caption, lines, x_label="period asked", y_label="gain, nats per response token", x_names=names
    )
    head = ("Policy", *names, "first period, at the end", "refits")
    return ReportTable("Records that arrive over time", caption, head, tuple(rows), svg)
