"""What a run promises, in words that a person who is not an engineer can hold us to.

A statement goes in as `statement.json` holds it. Out come a verdict in words, the number with everything that gives it
a meaning, and who sees what. There is no path from here to a bare epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from common.config import RunConfig
from simulations.number_words import number, rounded_up

__all__ = ["PrivacyWords", "describe_privacy"]

Status = Literal["claimed", "not claimed", "no privacy claim", "nothing shared", "unfinished"]

UNITS = {
    "user": "one user, with all of that user's records",
    "example": "one record of one user",
}
ADJACENCIES = {
    "zero-out": "zero-out: the user contributes, or contributes zeros",
    "replace-one": "replace-one: any other takes its place",
    "add-remove": "add-remove: it is there, or it is not",
}
TRUST = {
    "central": "the coordinator sees each clipped update without noise: against the coordinator epsilon is infinite",
    "local": "nobody: each device adds its own noise before anything leaves",
    "silo": "nobody outside the silo: it adds the noise to every training step itself",
}
KEPT = "It holds if the coordinator adds the noise that it promised; the ledger and the audit are how to check."
IN_SIMULATION = "Here users and coordinator were one machine; the sentence is about the same run on devices."
SCORES = (
    "the scores on this page: they come from users' held-out records without noise, so that whoever passes the page on "
    "releases them"
)


@dataclass(frozen=True)
class PrivacyWords:
    """A promise to print.

    Attributes:
        status: The verdict in words.
        headline: The number with delta, or why there is none.
        plain: What that means for one person, or what is missing.
        sees: Who sees an update without noise.
        facts: Unit, adjacency, delta, mechanism and so on, as (name, words).
        covered: What the promise covers.
        not_covered: What it does not.
        assumptions: What it rests on.
    """

    status: Status
    headline: str
    plain: tuple[str, ...]
    sees: str
    facts: tuple[tuple[str, str], ...] = ()
    covered: tuple[str, ...] = ()
    not_covered: tuple[str, ...] = ()
    assumptions: tuple[str, ...] = ()


def describe_privacy(statement: Mapping[str, Any] | None, config: RunConfig | None = None) -> PrivacyWords:
    """Put `statement` into words; `config`, where it is known, tells whether anything was shared at all."""
    if config is not None and config.method == "local":
        return PrivacyWords(
            "nothing shared",
            "Nothing left the devices",
            (
                "Every adapter was trained and kept where its records are.",
                "Nothing was released, so there is nothing to bound.",
            ),
            "Nobody: there was no update.",
            not_covered=(SCORES,),
        )
    if statement is None:
        return PrivacyWords(
            "unfinished",
            "No statement was written",
            ("The run has not ended, or its statement is missing. What it has spent so far is in its ledger.",),
            "Not stated.",
            not_covered=(SCORES,),
        )
    epsilon = _epsilon(statement)
    lists = {
        name: tuple(str(part) for part in statement.get(name) or ())
        for name in ("covered", "not_covered", "assumptions")
    }
    status, headline, plain = _verdict(statement, epsilon)
    return PrivacyWords(
        status,
        headline,
        plain,
        _sees(statement, epsilon),
        _facts(statement, epsilon),
        lists["covered"] if math.isfinite(epsilon) else (),
        (*lists["not_covered"], SCORES),
        lists["assumptions"] if math.isfinite(epsilon) else (),
    )


def _epsilon(statement: Mapping[str, Any]) -> float:
    value = statement.get("epsilon")
    return math.inf if value is None or value == "inf" else float(value)


def _verdict(statement: Mapping[str, Any], epsilon: float) -> tuple[Status, str, tuple[str, ...]]:
    if math.isinf(epsilon):
        words = "Updates were clipped, but without noise what was released may tell about any one user."
        return "no privacy claim", "Epsilon is infinite: no noise was added", (words,)
    amount = f"epsilon {rounded_up(epsilon)}"
    if statement.get("rehearsal"):
        words = (
            "Noise and cohorts came from a seed, so that the run can be repeated. "
            "Whoever has the seed can take the noise off."
        )
        return "not claimed", f"Calibrated to {amount}; rehearsal, not claimed", (words,)
    extrapolated = statement.get("extrapolated_population")
    if extrapolated:
        words = (
            f"The noise was scaled as if {extrapolated:,} users took part. Fewer did, and they are not protected by it."
        )
        return "not claimed", f"Extrapolated to {extrapolated:,} users, not claimed", (words,)
    headline = f"Epsilon {rounded_up(epsilon)} at delta {_delta(statement)}, per {statement.get('unit', 'user')}"
    return "claimed", headline, _plain(statement, epsilon)


def _plain(statement: Mapping[str, Any], epsilon: float) -> tuple[str, ...]:
    unit = statement.get("unit", "user")
    scale = 1 if epsilon > 3 else 10  # never less than it is: whole numbers, or tenths where they matter
    factor = f"e^{math.ceil(epsilon):,}"
    if epsilon < 30:
        factor = number(math.ceil(math.exp(epsilon) * scale) / scale, 0 if scale == 1 else 1)
    words = [
        f"Whatever is made of the releases, one {unit}'s taking part makes no outcome more than {factor} times as "
        "likely (e to the epsilon), except with probability delta."
    ]
    rate = statement.get("attack_rate")
    if isinstance(rate, int | float):
        most = min(1000, math.ceil(1000 * rate - 1e-9))
        words.append(
            "Of 1,000 people who took part, an attacker who wrongly accuses 10 of every 1,000 others can rightly pick "
            f"at most {most:,}."
        )
    if (other := _coordinator(statement)) is not None:
        words.append(
            f"Against the coordinator, who knows who takes part but sees noised sums alone, it is {other}. "
            "It holds against the others if the coordinator fills the noise up as it promised."
        )
    if "coordinator sees" in TRUST.get(str(statement.get("trust")), str(statement.get("trust"))):
        words.append(KEPT)
    return tuple(words)


def _sees(statement: Mapping[str, Any], epsilon: float) -> str:
    trust = str(statement.get("trust") or "not stated")
    if math.isinf(epsilon) and _coordinator(statement) is not None:
        words = (
            "nobody sees one update; the coordinator, and everyone who gets the shared adapter, sees sums without noise"
        )
    elif math.isinf(epsilon):
        words = "the coordinator sees each update, and everyone who gets the shared adapter sees sums without noise"
    else:
        words = TRUST.get(trust, trust)
    return f"{words[:1].upper()}{words[1:].rstrip('.')}. {IN_SIMULATION}"


def _facts(statement: Mapping[str, Any], epsilon: float) -> tuple[tuple[str, str], ...]:
    """Return what gives epsilon a meaning; where nothing is bounded, only what was done."""
    facts: list[tuple[str, Any]] = []
    if math.isfinite(epsilon):
        unit, adjacency = str(statement.get("unit", "")), str(statement.get("adjacency", ""))
        one_in = number(1.0 / float(statement["delta"]), 0)
        facts += [
            ("Unit", UNITS.get(unit, unit)),
            ("Adjacency", ADJACENCIES.get(adjacency, adjacency)),
            ("Delta", f"{_delta(statement)}, 1 in {one_in}"),
        ]
    facts += [("Mechanism", statement.get("mechanism")), ("Sampling", statement.get("sampling"))]
    if math.isfinite(epsilon):
        facts.append(("Accountant", " ".join(str(statement[n]) for n in ("accountant", "version") if statement.get(n))))
        if statement.get("second_opinion"):
            name, other = statement["second_opinion"]
            amount = "infinite" if other == "inf" else rounded_up(float(other))
            facts.append(("Second opinion", f"epsilon {amount} by {name}"))
        if (other := _coordinator(statement)) is not None:
            facts.append(("Against the coordinator", f"{other}; {statement['coordinator']['sampling']}"))
            left = [
                f"epsilon {rounded_up(float(amount))} where {honest} of a sum are honest"
                for honest, amount in statement.get("collusion") or ()
                if amount != "inf"
            ]
            facts.append(("If more devices collude", "; ".join(left)))
        if statement.get("group"):
            records, amount = statement["group"]
            words = "infinite" if amount == "inf" else rounded_up(float(amount))
            facts.append((f"A user with {records} records", f"epsilon {words}"))
    return tuple((name, str(words)) for name, words in facts if words)


def _coordinator(statement: Mapping[str, Any]) -> str | None:
    """The number against the coordinator, where there is one beside that against outsiders."""
    other = statement.get("coordinator")
    if not isinstance(other, Mapping):
        return None
    epsilon = _epsilon(other)
    return "without a bound" if math.isinf(epsilon) else f"epsilon {rounded_up(epsilon)} at delta {_delta(other)}"


def _delta(statement: Mapping[str, Any]) -> str:
    """Write delta without padding its exponent: 1e-5."""
    return f"{float(statement['delta']):.2g}".replace("e-0", "e-")
