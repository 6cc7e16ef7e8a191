"""The page that a privacy officer reads and signs: one self-contained HTML file made from an audit.

The first screen says who is protected from whom, by what, how much, what is not covered, and a verdict in words for
each claim. Everything below is the evidence. Nothing is loaded, nothing runs, and nobody's data is on it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from common.accountants import epsilon_of
from common.claims import ASSUMPTIONS, NOT_COVERED
from common.events import event_from_json
from common.promise import promise_of
from common.wire import ReleaseSpec
from simulations.audit import Audit
from simulations.audit_claims import MECHANISM
from simulations.charts import Bar, Line, Svg, bars, line_chart
from simulations.number_words import number, rounded_up, size
from simulations.run_evidence import VALUE_BYTES
from simulations.shown_evidence import Shown

__all__ = ["GLOSSARY", "audit_page", "write_audit"]

RECORD = "registry-record.json"
TEMPLATES = Path(__file__).parent / "templates"
MOST_POINTS = 12
"""Of the curve of spending: each is priced anew."""

HEADLINES = {
    "holds": "The privacy claims hold, as far as the evidence goes",
    "contradicted": "The evidence contradicts a privacy claim",
    "not shown": "The evidence is not enough to judge the privacy claims",
    "no claim": "Nothing is claimed, so there is nothing to audit",
}
SEVERITY = ("contradicted", "holds", "not shown", "no claim")
UNITS = {
    "user": "Each enrolled user, with all of their records",
    "example": "Each single record; a person with many records less",
}
KEPT = "holds if the server adds the noise it promised"

GLOSSARY = (
    ("Adapter", "A small set of numbers added to a language model. The shared one is trained by everyone together."),
    (
        "Private adapter",
        "The part that each user's device trains and keeps. It never leaves, and nothing is claimed of it.",
    ),
    (
        "Update",
        "What a device sends in a round: how its records would change the shared adapter, cut to a bounded size.",
    ),
    ("Clip", "The largest size that one update may have, whatever is in it."),
    ("Noise", "Random numbers added so that no single update can be told from the result."),
    ("Epsilon", "How much one user's taking part can change what anyone sees. 0 is not at all; smaller is safer."),
    ("Delta", "The small probability with which epsilon may fail to hold."),
    ("Unit", "Who or what is hidden: one user with everything of theirs, or one record."),
    ("Budget", "The epsilon that may be spent over everything that is ever released."),
    ("Debit", "An entry that charges a release to the budget, written before the release."),
    ("Ledger", "The list of debits and releases. Each entry is signed and names the one before it."),
    ("Head", "The signature of a ledger's last entry. Whoever keeps one finds out if the ledger is later shortened."),
    ("Receipt", "A fingerprint of exactly what left a device, kept by both sides."),
    ("Accountant", "A program that computes epsilon from the events. Three independent ones are asked here."),
    (
        "Saturation",
        "The most that a test could have shown with no protection at all. Below the claim, it proves nothing.",
    ),
)


@dataclass(frozen=True)
class _Figure:
    heading: str
    svg: Svg
    note: str


def audit_page(done: Audit, *, digest: str, files: Sequence[str]) -> str:
    """Write the page.

    Args:
        done: The audit.
        digest: SHA-256 of the JSON beside the page, which a signature then covers too.
        files: Names of the files beside the page, to link to.
    """
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(amount=_amount, delta=_delta, number=number, size=size, share=_share)
    whole = done.summed["organization"]
    return environment.get_template("audit.html.j2").render(
        done=done,
        headline=HEADLINES[done.verdict],
        facts=_facts(done, whole),
        counts=[
            ("hold" if word == "holds" else word, sum(1 for one in done.claims if one.verdict == word))
            for word in SEVERITY
        ],
        figures=[one for one in _figures(done, whole) if one.svg],
        ledgers=[one.to_json_for_page() for one in map(_Row, done.shown)],
        egress=_egress(done.shown),
        attacks=[(one.evidence.name, attack) for one in done.shown for attack in one.attacks()],
        whole=whole,
        curve=[(delta, epsilon) for delta, epsilon in whole.get("spent", {}).get("curve", ())],
        not_covered=_not_covered(done),
        assumptions=ASSUMPTIONS,
        glossary=GLOSSARY,
        digest=digest,
        files=files,
    )


def write_audit(done: Audit, folder: Path, told: Mapping[str, str] | None = None) -> Path:
    """Write `audit.html`, `audit.json` and, where something is claimed, `registry-record.json`; return the page's path.

    Args:
        done: The audit.
        folder: Made where it is missing; what it holds under these names is replaced.
        told: What only the curator knows, for the registry's record.
    """
    from simulations.registry_record import registry_record

    folder.mkdir(parents=True, exist_ok=True)
    content = (json.dumps(done.to_json(), indent=1, allow_nan=False) + "\n").encode()
    (folder / "audit.json").write_bytes(content)
    files = ["audit.json"]
    record = registry_record(done, told)
    if record is not None:
        (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        files.append(RECORD)
    page = folder / "audit.html"
    page.write_text(audit_page(done, digest=hashlib.sha256(content).hexdigest(), files=files), encoding="utf-8")
    return page


def _facts(done: Audit, whole: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The first screen: who is protected from whom, by what, how much, and who sees an update without noise."""
    own = next((one for one in done.shown if one.spec is not None and one.price is not None), None)
    priced = next((one for one in done.shown if one.price is not None), None)
    if priced is None or priced.price is None:
        return [("What was shown", "No ledger that checks out, so nothing can be said about anybody's protection.")]
    price = (own or priced).price or priced.price
    spec = own.spec if own is not None else None
    spent = whole.get("spent")
    unit = str(price.unit or "user")
    central = spec is not None and promise_of(spec).noise == "central"
    devices = all(one.role == "device" for one in done.shown if one.verified is not None)
    who = "The owner of each device that is shown" if devices else UNITS.get(unit, unit)
    whom = "whoever gets the shared adapter, and every other user"
    if spec is not None:
        whom += "; not from the coordinator" if central else ", and the coordinator"
        known = [cost for _, cost in price.known]
        if known:
            whom += f", against whom it is epsilon {rounded_up(max(known))}"
    facts: list[tuple[str, str]] = []
    if done.verdict == "contradicted":
        facts.append(("Read this first", "What follows is what is claimed. The evidence contradicts a part of it."))
    facts += [("Who is protected", f"{who}."), ("From whom", f"{whom[:1].upper()}{whom[1:]}.")]
    if spec is not None:
        mechanism = promise_of(spec).statement(spec, max(price.debits, 1)).mechanism
        facts.append(("By what", f"{mechanism[:1].upper()}{mechanism[1:]}."))
    if price.is_rehearsal:
        facts.append(("How much", "Not at all: a rehearsal, whose noise can be repeated. Nothing is claimed."))
    elif spent is None:
        facts.append(("How much", f"There is no sum: {whole['why']}."))
    else:
        epsilon = next(iter(spent["epsilon"].values()))
        if isinstance(epsilon, str):
            facts.append(("How much", "Not at all: something was released without noise, so epsilon is infinite."))
        else:
            meaning = f"Epsilon {rounded_up(epsilon)} at delta {_delta(whole['delta'])}"
            text = f"{meaning}, per {unit}. {spent['people'][:1].upper()}{spent['people'][1:]}."
            facts.append(("How much", text))
    if spec is not None:
        facts.append(("Who sees an update without noise", _sees(done, spec)))
    short = ["what a private adapter's owner shows to others", "when devices are online"]
    facts.append(("What is not covered", f"{'; '.join(short).capitalize()}; the whole list is below."))
    return facts


def _sees(done: Audit, spec: ReleaseSpec) -> str:
    promise = promise_of(spec)
    if promise.noise == "local":
        return "Nobody: the noise is added on the device, before anything leaves."
    if promise.noise == "distributed":
        words = promise.statement(spec, 1).trust
        return f"{words[:1].upper()}{words[1:]}."
    kept = next(one for one in done.claims if one.text == MECHANISM)
    tested = {"holds": "tested below", "contradicted": "the test below says that it does not"}
    return (
        f"The coordinator sees each clipped update without noise. Against everyone else the claim {KEPT}; "
        f"{tested.get(kept.verdict, 'not tested here')}."
    )


class _Row:
    """One ledger as the page's tables print it."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def to_json_for_page(self) -> dict[str, Any]:
        one = self._shown
        row: dict[str, Any] = {
            "name": Path(one.evidence.name).name,
            "fault": one.fault,
            "findings": one.findings,
            "role": one.role,
            "price": None,
        }
        if one.verified is None or one.price is None:
            return row
        price = one.price.to_json()
        promised = price["promised_epsilon"] or ([price["granted_epsilon"]] if price["granted_epsilon"] else [])
        by_name = {name.split()[0]: value for name, value in price["spent"]["epsilon"].items()}
        return row | {
            "price": price,
            "promised": promised,
            "by_name": by_name,
            "accountants": list(price["spent"]["epsilon"]),
            "id": one.verified.head.ledger,
            "writer": one.verified.head.writer,
            "index": one.verified.head.index,
            "hash": one.verified.head.hash,
            "first": one.verified.entries[0].time,
            "last": one.verified.entries[-1].time,
        }


def _not_covered(done: Audit) -> list[str]:
    found: list[str] = []
    for one in done.shown:
        if one.spec is not None and one.price is not None:
            found += promise_of(one.spec).statement(one.spec, max(one.price.debits, 1)).not_covered
    return list(dict.fromkeys([*found, *NOT_COVERED, "ledgers that exist and were not shown"]))


def _figures(done: Audit, whole: Mapping[str, Any]) -> list[_Figure]:
    return [_spending(done), _distribution(done), _claim_against_evidence(done, whole), _tradeoff(whole)]


def _spending(done: Audit) -> _Figure:
    """Epsilon after each round, of every ledger that promises something, against what it promised."""
    lines: list[Line] = []
    promised = 0.0
    once = _each_once(done.shown)
    served = [one for one in once if one.role != "device"] or once
    drawn = [one for one in served if one.price is not None and one.price.spent][:4]
    for shown, series in zip(drawn, ("global", "both", "private", "base"), strict=False):
        if shown.price is None or shown.verified is None:
            continue
        events = [event_from_json(e.body["event"]) for e in shown.verified.entries if e.kind == "debit"]
        if not events or not math.isfinite(epsilon_of(events, shown.price.delta, "pld", shown.price.adjacency)):
            continue
        step = max(1, math.ceil(len(events) / MOST_POINTS))
        counts = sorted({*range(step, len(events) + 1, step), len(events)})
        points = [
            (float(count), epsilon_of(events[:count], shown.price.delta, "pld", shown.price.adjacency))
            for count in counts
        ]
        label = "spent" if len(drawn) == 1 else Path(shown.evidence.name).stem[:9]
        lines.append(Line(f"{label} {rounded_up(points[-1][1])}", series, [(0.0, 0.0), *points]))
        promised = max([promised, *(value for value in shown.price.promised if math.isfinite(value))])
    if lines and promised:
        last = max(line.points[-1][0] for line in lines)
        lines.append(Line(f"promised {promised:g}", "base", [(0.0, promised), (last, promised)], dashed=True))
    note = "Recomputed from the debits alone; a run may not pass what it promised."
    svg = line_chart(
        "Budget over rounds",
        f"Epsilon after each debit. {note}",
        lines,
        x_label="debits (rounds)",
        y_label="epsilon spent (lower is safer)",
        from_zero=True,
        markers=False,
    )
    return _Figure("Budget over rounds", svg, note)


def _distribution(done: Audit) -> _Figure:
    """How much of their budgets users spent: in crowd mode alike, since every round charges everyone."""
    devices = [one.price for one in _each_once(done.shown) if one.role == "device" and one.price is not None]
    if devices:
        counts = Counter(f"{math.floor(2 * one.reserved_epsilon) / 2:.1f}" for one in devices)
        rows = [
            Bar(
                f"epsilon {low} to {float(low) + 0.5:.1f}",
                float(count),
                f"{count} device{'s' if count > 1 else ''}",
                "both",
            )
            for low, count in sorted(counts.items(), key=lambda pair: float(pair[0]))
        ]
        note = f"What the {len(devices)} devices that are shown reserved, over everything they ever release."
        return _Figure("Spend per device", bars("Spend per device", note, rows[:10]), note)
    rows = []
    for one in _each_once(done.shown):
        if one.price is None or one.spec is None or one.price.is_rehearsal:
            continue
        cost = epsilon_of(one.price.spent, one.price.delta, "pld", one.price.adjacency) if one.price.spent else 0.0
        words = rounded_up(cost) if math.isfinite(cost) else "infinite"
        label = f"each of {one.spec.population:,} enrolled {'users' if one.spec.unit == 'user' else 'parties'}"
        rows.append(Bar(label, cost, words, "both"))
    note = "Every round charges every enrolled user, chosen or not: that all spend alike is the point, not a gap."
    return _Figure("Spend per user", bars("Spend per user", note, rows), note)


def _claim_against_evidence(done: Audit, whole: Mapping[str, Any]) -> _Figure:
    """What was promised, what recomputing says, and what attacks could prove, on one scale."""
    rows: list[Bar] = []
    promises = [value for one in done.shown if one.price is not None for value in one.price.promised]
    finite = [value for value in promises if math.isfinite(value)]
    if finite:
        rows.append(Bar("promised, the largest of any ledger", max(finite), f"{max(finite):g}", "base"))
    for name, value in (whole.get("spent") or {}).get("epsilon", {}).items():
        cost = math.inf if isinstance(value, str) else float(value)
        words = rounded_up(cost) if math.isfinite(cost) else "infinite"
        rows.append(Bar(f"spent, by {name}", cost, words, "global"))
    for one in done.shown:
        for attack in one.attacks():
            if "epsilon" not in str(attack["measure"]) or attack["verdict"] == "leaks, as expected":
                continue
            value, most = (_float(attack[part]) for part in ("value", "saturation"))
            words = f"at least {value:.2f}" if math.isfinite(value) else "no noise"
            if isinstance(attack.get("claimed_epsilon"), int | float):
                words += f" of {rounded_up(attack['claimed_epsilon'])}"
            one_release = " of one release" if "one release" in str(attack["measure"]) else ""
            rows.append(Bar(f"{attack['name']}{one_release}: proven", value, words, "private", most))
    note = (
        "Attacks prove lower bounds; after “of” stands what is claimed about what they attacked. Outlines are the most "
    )
    note += (
        "that a test could have shown. The mechanism test attacks one release of somebody who is known to be in it, "
    )
    note += "the others a whole small run."
    title = "Claim against evidence"
    return _Figure(title, bars(title, note, rows), note)


def _tradeoff(whole: Mapping[str, Any]) -> _Figure:
    points = [
        (-math.log10(delta), float(epsilon))
        for delta, epsilon in (whole.get("spent") or {}).get("curve", ())
        if not isinstance(epsilon, str)
    ]
    note = "One guarantee, read at other deltas: a smaller chance of failure costs a larger epsilon."
    svg = line_chart(
        "Epsilon at other deltas",
        note,
        [Line("epsilon", "global", points)] if len(points) > 1 else [],
        x_label="delta: one in ten to the power of",
        y_label="epsilon",
        from_zero=True,
    )
    return _Figure("The whole curve", svg, note)


def _each_once(shown: Sequence[Shown]) -> list[Shown]:
    """Leave out a ledger that was handed in twice, of two states of one the shorter."""
    longest: dict[str, Shown] = {}
    for one in shown:
        if one.verified is None:
            continue
        known = longest.get(one.verified.head.ledger)
        if known is None or known.verified is None or known.verified.head.index < one.verified.head.index:
            longest[one.verified.head.ledger] = one
    return list(longest.values())


def _egress(shown: Sequence[Shown]) -> list[dict[str, Any]]:
    """What left, by tensor: devices name each; of a server it is the shared adapter after every round, as its spec."""
    left: dict[tuple[str, str, str, str], list[int]] = {}
    for one in _each_once(shown):
        if one.verified is None:
            continue
        side, spec = "devices" if one.role == "device" else "the server", one.spec
        for entry in one.verified.entries:
            if entry.kind != "release":
                continue
            body = entry.body
            if body.get("names"):
                width = {"float16": 2, "float64": 8}.get(str(body.get("dtype")), 4)
                for name, shape in zip(body["names"], body["shapes"], strict=False):
                    key = (side, str(name), " x ".join(map(str, shape)), str(body.get("dtype", "")))
                    left.setdefault(key, []).append(width * math.prod(shape))
                continue
            tensors = [("the whole shared adapter", "")]
            sizes = [int(body["bytes"])]
            if spec is not None and sizes[0] == VALUE_BYTES * spec.model_dim:
                tensors = [(name, " x ".join(map(str, own))) for name, own in zip(spec.names, spec.shapes, strict=True)]
                sizes = [VALUE_BYTES * math.prod(own) for own in spec.shapes]
            for (name, shape), each in zip(tensors, sizes, strict=True):
                left.setdefault((side, name, shape, "float32"), []).append(each)
    return [
        {
            "side": side,
            "name": name,
            "shape": shape,
            "dtype": dtype,
            "times": len(sizes),
            "each": sizes[0],
            "all": sum(sizes),
        }
        for (side, name, shape, dtype), sizes in sorted(left.items())
    ]


def _float(value: Any) -> float:
    try:
        return math.inf if value == "inf" else float(value)
    except (TypeError, ValueError):
        return 0.0


def _amount(value: Any) -> str:
    """Write an epsilon that may be the string `inf`; rounded up, never less than it is."""
    found = _float(value)
    return rounded_up(found) if math.isfinite(found) else "infinite"


def _delta(value: Any) -> str:
    """Write delta without padding its exponent: 1e-5."""
    return f"{_float(value):.2g}".replace("e-0", "e-")


def _share(value: Any) -> str:
    found = _float(value)
    return number(found, 3) if math.isfinite(found) else "no limit"
