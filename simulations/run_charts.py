"""The charts of a run's page: what is drawn from which numbers, and the sentence that goes under it.

`simulations.charts` knows how to draw; this module knows what a run has to show. A chart without data is
left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.config import RunConfig
from common.evaluation import Comparison, Interval, MetricSummary, UserScores
from simulations.charts import Line, Panel, Svg, histograms, interval_mark, line_chart, points_chart, share_mark
from simulations.number_words import percent, rounded_up, signed

__all__ = ["Figure", "comparison_marks", "figures", "share_bar"]

SERIES = ("base", "global", "private", "both")


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and one sentence that says what is to be seen."""

    heading: str
    svg: Svg
    note: str


def figures(
    config: RunConfig,
    rounds: Sequence[Mapping[str, Any]],
    nats: MetricSummary | None,
    scores: UserScores | None,
    records: NDArray[np.float64] | None,
    focus: str | None,
) -> list[Figure]:
    """Return the figures that a run has data for.

    Args:
        config: The run's configuration.
        rounds: The lines of `rounds.jsonl`.
        nats: The summary of nats per token, if users were scored.
        scores: The users' scores.
        records: How many records each of those users trained on, in their order.
        focus: The system that the page is about.
    """
    found = [_learning_curve(rounds)]
    if nats is not None and scores is not None and focus is not None and "base" in scores.systems:
        found.append(_gain_histogram(nats, scores, focus))
        if records is not None:
            found.append(_gain_by_records(scores, records, focus))
    found.append(_budget_curve(config, rounds))
    return [figure for figure in found if figure is not None and figure.svg]


def comparison_marks(nats: MetricSummary | None) -> list[tuple[Comparison, Svg]]:
    """Return every pair of systems with its mean gain and interval drawn on one scale."""
    if nats is None:
        return []
    ends = [end for entry in nats.comparisons for end in _ends(entry.gain)]
    low, high = min([0.0, *ends]), max([0.0, *ends])
    margin = 0.02 * (high - low) or 1.0
    return [(entry, _gain_mark(entry, (low - margin, high + margin))) for entry in nats.comparisons]


def share_bar(comparison: Comparison) -> Svg:
    """Draw the shares of users that `comparison` helped and harmed."""
    helped, harmed = comparison.helped.estimate, comparison.harmed.estimate
    words = f"{percent(helped)} of users helped, {percent(harmed)} harmed"
    description = f"{comparison.system} against {comparison.reference}: {words}"
    return share_mark(helped, harmed, series=_series(comparison.system), description=description)


def _gain_mark(entry: Comparison, domain: tuple[float, float]) -> Svg:
    gain = entry.gain
    description = f"{entry.system} over {entry.reference}: mean gain {signed(gain.estimate)}, {signed(gain)}"
    return interval_mark(
        gain.estimate, gain.low, gain.high, domain, series=_series(entry.system), description=description
    )


def _learning_curve(rounds: Sequence[Mapping[str, Any]]) -> Figure | None:
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in rounds:
        for system, value in (line.get("evaluation") or {}).items():
            if _is_finite(value):
                curves.setdefault(system, []).append((line["round"], value))
    if max(map(len, curves.values()), default=0) < 2:
        return None
    lines = [Line(system, _series(system), points, dashed=system == "base") for system, points in curves.items()]
    note = ""
    if "global" in curves:
        (first, before), (last, after) = curves["global"][0], curves["global"][-1]
        note = (
            f"The shared adapter goes from {before:.3f} after round {first:.0f} to {after:.3f} after round {last:.0f}."
        )
    svg = line_chart(
        "Learning curve",
        f"Nats per response token on the validation sample, by round. {note}",
        lines,
        x_label="round",
        y_label="nats per response token, validation (lower is better)",
    )
    return Figure("Learning curve of the shared adapter", svg, note)


def _gain_histogram(nats: MetricSummary, scores: UserScores, focus: str) -> Figure:
    panels: list[Panel] = []
    words: list[str] = []
    for reference in ("base", "global"):
        comparison = nats.against(focus, reference)
        if comparison is not None:
            label = f"{focus} over {reference}"
            helped, harmed = percent(comparison.helped.estimate), percent(comparison.harmed.estimate)
            gains = scores.gain(focus, reference)
            panels.append(Panel(label, _series(focus), gains, f"{harmed} worse", f"{helped} better"))
            words.append(f"{signed(comparison.median_gain.estimate)} over {reference}")
    note = f"Median gain {' and '.join(words)}. The outermost bars also hold what lies beyond them."
    svg = histograms(
        "Gain per user",
        f"How many users gain how much, in {nats.metric.unit}. {note}",
        panels,
        x_label="gain, nats per response token (right of zero is better)",
    )
    return Figure("Gain per user", svg, note)


def _gain_by_records(scores: UserScores, records: NDArray[np.float64], focus: str) -> Figure:
    gains = scores.gain(focus, "base")
    lines = [Line("over base", _series(focus), _medians(records, gains))]
    if focus != "global" and "global" in scores.systems:
        over_global = _medians(records, scores.gain(focus, "global"))
        lines.append(Line("over global", _series(focus), over_global, dashed=True))
    (few, low), (many, high) = lines[0].points[0], lines[0].points[-1]
    note = "Lines are medians of users with about as many records."
    if few < many:
        note = f"Median gain over base: {signed(low)} around {few:,.0f} records, {signed(high)} around {many:,.0f}."
    svg = points_chart(
        "Gain against number of records",
        f"One point per user for the gain over base, and medians of users with about as many records. {note}",
        list(zip(records.tolist(), gains.tolist(), strict=True)),
        lines,
        series=_series(focus),
        x_label="records the user trained on",
        y_label=f"gain of {focus}, nats per response token",
    )
    return Figure("Gain against number of records", svg, note)


def _medians(records: NDArray[np.float64], gains: NDArray[np.float64]) -> list[tuple[float, float]]:
    """Return (median records, median gain) of up to eight groups of at least twelve users, by records."""
    order = np.argsort(records, kind="stable")
    groups = np.array_split(order, max(1, min(8, len(order) // 12)))
    return [(float(np.median(records[group])), float(np.median(gains[group]))) for group in groups]


def _budget_curve(config: RunConfig, rounds: Sequence[Mapping[str, Any]]) -> Figure | None:
    points = [
        (float(line["round"]), float(line["epsilon_spent"])) for line in rounds if _is_finite(line.get("epsilon_spent"))
    ]
    if not points or not config.private:
        return None
    last, spent = points[-1]
    asked = config.epsilon
    lines = [
        Line(f"spent {rounded_up(spent)}", "global", points),
        Line(f"asked {asked:g}", "base", [(points[0][0], asked), (last, asked)], dashed=True),
    ]
    note = f"After round {last:.0f}, {rounded_up(spent)} of the {asked:g} asked for is spent"
    note += f"; the noise also covers {config.spare_rounds} spare rounds." if config.spare_rounds else "."
    if config.rehearsal or config.as_if_population is not None:
        note += " Calibrated, not claimed."
    svg = line_chart(
        "Privacy budget over rounds",
        f"Epsilon spent after each round. {note}",
        lines,
        x_label="round",
        y_label=f"epsilon spent, unit {config.unit} (lower is safer)",
        from_zero=True,
        markers=False,
    )
    return Figure("Privacy budget over rounds", svg, note)


def _is_finite(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _ends(interval: Interval) -> list[float]:
    return [value for value in (interval.low, interval.estimate, interval.high) if math.isfinite(value)]


def _series(system: str) -> str:
    """Return the style class of a system; a name that is not ours is drawn like the base."""
    return system if system in SERIES else "base"
