"""What may be measured of a federation, and said to whoever watches it, without saying who took part in what.

The app notes a run's totals in its folder: how many answered and how many were refused, by reason. They are written
once in some rounds, not after each, so that two readings a round apart do not show what one round's cohort did; reasons
that were rare stand together. The coordinator adds what it sees itself and answers with OpenMetrics 1.0 text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.files import write_private_file
from common.wire import ReleaseSpec
from server.rounds import Round, spent_epsilon

__all__ = ["Measures", "RunMeasures", "exposition", "read_measures"]

MEASURES = "measures.json"
BATCH_ROUNDS = 5
LEAST_COUNT = 5
"""Reasons that were given more rarely are counted as `other`."""

HELP = {
    "devices": ("gauge", "Devices by state"),
    "devices_online": ("gauge", "Devices that are connected now"),
    "turned_away": ("counter", "Requests that were turned away at the door"),
    "bytes": ("counter", "Bytes through the door, since the coordinator started"),
    "certificate_days": ("gauge", "Days until the certificate ends"),
    "rounds": ("counter", "Rounds that are done"),
    "rounds_wanted": ("gauge", "Rounds that the run has"),
    "answered": ("counter", "Updates that were added up, as of the last batch of rounds"),
    "refused": ("counter", "Devices asked that are not in a sum, by reason, as of the last batch of rounds"),
    "round_seconds": ("gauge", "Mean seconds of a round, over the last batch of rounds"),
    "epsilon": ("gauge", "Epsilon of what was released"),
    "epsilon_budget": ("gauge", "Epsilon that the run is calibrated to"),
    "checkpoint_age_seconds": ("gauge", "Seconds since the last checkpoint"),
}


@dataclass(frozen=True)
class RunMeasures:
    """Totals of one run as of its last batch of rounds."""

    round: int
    answered: int
    refused: dict[str, int]
    round_seconds: float
    epsilon: str
    budget: str


class Measures:
    """Counts what the rounds of one run say, and writes it once in a batch of rounds."""

    def __init__(self, path: Path, spec: ReleaseSpec, rounds: int) -> None:
        """Go on with what stands in the run's folder."""
        self._path = path / MEASURES
        self._spec = spec
        self._rounds = rounds
        kept = read_measures(path)
        self._answered = kept.answered if kept else 0
        self._refused = dict(kept.refused) if kept else {}
        self._seconds: list[float] = []

    def note(self, finished: Round) -> None:
        """Count one round."""
        self._answered += finished.answered
        for reason, count in finished.rejected.items():
            self._refused[reason] = self._refused.get(reason, 0) + count
        self._seconds.append(finished.seconds)
        if finished.number % BATCH_ROUNDS and finished.number != self._rounds:
            return
        values: dict[str, Any] = {
            "format": 1,
            "round": finished.number,
            "answered": self._answered,
            "refused": self._refused,
            "round_seconds": sum(self._seconds) / len(self._seconds),
            "epsilon": repr(spent_epsilon(self._spec, finished.spent)),
            "budget": self._spec.epsilon,
        }
        self._seconds = []
        write_private_file(self._path, json.dumps(values, sort_keys=True).encode() + b"\n", replace=True)


def read_measures(path: Path) -> RunMeasures | None:
    """Read what the app of a run wrote; None before its first batch of rounds."""
    try:
        values = json.loads((path / MEASURES).read_text(encoding="utf-8"))
        return RunMeasures(**{name: value for name, value in values.items() if name != "format"})
    except (OSError, ValueError, TypeError):
        return None


def without_rare(refused: Mapping[str, int]) -> dict[str, int]:
    """Counts by reason, the rare ones together."""
    shown = {reason: count for reason, count in refused.items() if count >= LEAST_COUNT}
    other = sum(refused.values()) - sum(shown.values())
    return {**shown, **({"other": other} if other else {})}


def exposition(samples: Iterable[tuple[str, Mapping[str, str], float]]) -> str:
    """Write samples `(name, labels, value)` as OpenMetrics 1.0 text."""
    by_name: dict[str, list[str]] = {}
    for name, labels, value in samples:
        kind = HELP[name][0]
        inside = ",".join(f'{key}="{_escaped(text)}"' for key, text in labels.items())
        suffix = "_total" if kind == "counter" else ""
        line = f"homespun_{name}{suffix}{{{inside}}} {value:g}" if inside else f"homespun_{name}{suffix} {value:g}"
        by_name.setdefault(name, []).append(line)
    lines: list[str] = []
    for name, found in by_name.items():
        kind, text = HELP[name]
        lines += [f"# TYPE homespun_{name} {kind}", f"# HELP homespun_{name} {text}", *found]
    return "\n".join([*lines, "# EOF"]) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
