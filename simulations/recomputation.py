"""What ledgers cost, recomputed from their events alone, and held against what they promised.

Nobody's epsilon is taken over. Events are read from verified ledgers, priced by accountants that share no code
(privacy loss distributions, PRV, Rényi), and added up: per ledger, per data set, per subject, and over everything
that an organization shows, as if one person were in all of it. Needs neither torch nor Flower.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from common.accountants import Accountant, accountant_version, attack_rate, curve, epsilon_of, equivalent_mu
from common.budget import chosen_epsilon
from common.canonical import canonical_digest
from common.claims import default_delta
from common.events import Composed, Event, Repeated, event_from_json
from common.ledger_format import Entry, Verified, debits
from common.privacy import Adjacency

__all__ = ["LedgerPrice", "price_ledger", "readings", "totals", "worst"]

Verdict = Literal["holds", "contradicted", "not shown", "no claim"]

DELTAS = tuple(10.0**-power for power in range(3, 11))
TOLERANCE = 1e-6
"""Relative; a calibrated epsilon may be one rounding above the promise."""

ACCOUNTANTS_DIFFER = 0.02
"""PRV states the upper end of an interval of 0.01, and both round up; beyond this and 1 % they disagree."""

SEVERITY: tuple[Verdict, ...] = ("no claim", "holds", "not shown", "contradicted")


@dataclass(frozen=True)
class LedgerPrice:
    """One ledger, priced.

    Attributes:
        name: What the caller calls it.
        header: Entry 0's body.
        unit: Whose presence the promise hides; None where the ledger makes none.
        adjacency: What the noise was measured under.
        delta: Failure probability of the promise, the smallest of several.
        promised: Epsilon of each reservation, infinite where nothing was claimed.
        granted: Epsilon in force over everything this ledger ever charges: the last refill's; None without one.
        debits: How many debits there are.
        spent: The events that were debited.
        charged: What counts against the budget: whole reservations, and debits outside of them.
        spent_in: The run of each of `spent`, in their order; None where the ledger names none.
        charged_in: The same of `charged`.
        reserved_epsilon: What the reservations cost together.
        known: Distributed noise: what was promised against the coordinator, who knows who takes part, and its price.
        faults: What contradicts the promise, in words.
        verdict: Of the promise.
    """

    name: str
    header: dict[str, Any]
    unit: str | None
    adjacency: Adjacency
    delta: float
    promised: tuple[float, ...]
    granted: float | None
    debits: int
    spent: tuple[Event, ...]
    charged: tuple[Event, ...]
    spent_in: tuple[str | None, ...]
    charged_in: tuple[str | None, ...]
    reserved_epsilon: float
    faults: tuple[str, ...]
    verdict: Verdict
    known: tuple[tuple[float, float], ...] = ()

    @property
    def is_rehearsal(self) -> bool:
        """Whether noise or cohorts came from a seed, so that nothing is claimed."""
        return bool(self.header.get("rehearsal", False))

    def to_json(self) -> dict[str, Any]:
        """Return the price with all its readings as a JSON object."""
        return {
            "ledger": self.name,
            "role": self.header.get("role"),
            "rehearsal": self.is_rehearsal,
            "unit": self.unit,
            "adjacency": self.adjacency.value,
            "delta": self.delta,
            "debits": self.debits,
            "promised_epsilon": [_plain(epsilon) for epsilon in self.promised],
            "granted_epsilon": None if self.granted is None else _plain(self.granted),
            "reserved_epsilon": _plain(self.reserved_epsilon),
            "against_the_coordinator": [
                {"promised_epsilon": _plain(promised), "epsilon": _plain(cost)} for promised, cost in self.known
            ],
            "spent": readings(self.spent, self.delta, self.adjacency, self.unit),
            "verdict": self.verdict,
            "faults": list(self.faults),
        }


def price_ledger(verified: Verified, name: str) -> LedgerPrice:
    """Price one ledger and say whether its promises hold.

    Raises:
        VerificationError: An event is not one of the closed list.
    """
    reservations = list(_said(verified.entries, "reserve"))
    promises = [body for _, body, _ in reservations if "epsilon" in body]
    grants = list(_said(verified.entries, "refill"))
    deltas = [float(body["delta"]) for body in (promises or [body for _, body, _ in grants]) if "delta" in body]
    delta = min(deltas, default=1e-5)
    adjacency = _common_adjacency([body for _, body, _ in reservations])
    spent = tuple(_times(event_from_json(body["event"]), count) for _, body, count in _said(verified.entries, "debit"))
    charged = tuple(_times(event_from_json(one.event), one.count) for one in debits(verified.entries))
    granted = [_number(body["epsilon"]) for _, body, _ in grants]
    faults: list[str] = []
    for index, body, _ in reservations:
        faults += _faults_of_promise(verified.entries, index, body, adjacency)
    known = tuple(
        (
            _number(body["epsilon"]),
            epsilon_of(event_from_json(body["event"]), float(body["delta"]), "pld", adjacency),
        )
        for _, body, _ in _said(verified.entries, "coordinator")
    )
    for bound, cost in known:
        if cost > bound * (1 + TOLERANCE):
            faults.append(f"epsilon {bound:g} is promised against the coordinator; its rounds cost {_words(cost)}")
    units = {str(body["unit"]) for _, body, _ in reservations if "unit" in body}
    if len(units) > 1 or (len({body.get("adjacency") for body in promises}) > 1 and not granted):
        faults.append("its promises are about different units or adjacencies, so they have no sum")
    promised = tuple(_number(body["epsilon"]) for body in promises)
    loose = [body for _, body, _ in _said(verified.entries, "debit") if body.get("reservation") is None]
    if loose and promises and not granted:
        cost = epsilon_of(spent, delta, "pld", adjacency)
        if cost > max(promised) * (1 + TOLERANCE):
            faults.append(f"{len(loose)} debits stand outside every reservation; with them {cost:.3f} was spent")
    if granted:
        faults += _beyond_what_was_granted(verified.entries, delta, adjacency)
    if faults:
        verdict: Verdict = "contradicted"
    elif not promises:
        verdict = "holds" if granted else "not shown" if spent else "no claim"
    else:
        verdict = "no claim" if all(math.isinf(epsilon) for epsilon in promised) else "holds"
    return LedgerPrice(
        name=name,
        header=verified.header,
        unit=units.pop() if len(units) == 1 else None,
        adjacency=adjacency,
        delta=delta,
        promised=promised,
        granted=granted[-1] if granted else None,
        debits=sum(count for _, _, count in _said(verified.entries, "debit")),
        spent=spent,
        charged=charged,
        spent_in=tuple(body.get("run") for _, body, _ in _said(verified.entries, "debit")),
        charged_in=tuple(one.run for one in debits(verified.entries)),
        reserved_epsilon=epsilon_of(
            [event_from_json(body["event"]) for _, body, _ in reservations], delta, "pld", adjacency
        )
        if reservations
        else 0.0,
        faults=tuple(faults),
        verdict=verdict,
        known=known,
    )


def _beyond_what_was_granted(entries: Sequence[Entry], delta: float, adjacency: Adjacency) -> list[str]:
    """Where more was charged than the owner's last word allowed, at any time; a refill is over everything ever."""
    points = [place for place, entry in enumerate(entries) if entry.kind == "refill" and place > 0]
    for end in (*points[1:], len(entries)):
        before = entries[:end]
        limits = [_number(body["epsilon"]) for _, body, _ in _said(before, "refill")]
        charged = [_times(event_from_json(one.event), one.count) for one in debits(before)]
        cost = chosen_epsilon(charged, delta, adjacency)
        if limits and cost > limits[-1] * (1 + TOLERANCE):
            return [f"{_words(cost)} was charged, {limits[-1]:.3f} granted"]
    return []


def _common_adjacency(bodies: Sequence[dict[str, Any]]) -> Adjacency:
    """The adjacency under which all of them hold together.

    A multiplier against replacement, the doubled sensitivity, bounds zeroing out as well.
    """
    kinds = {str(body["adjacency"]) for body in bodies if "adjacency" in body}
    return Adjacency(kinds.pop()) if len(kinds) == 1 else Adjacency.ZERO_OUT


def _faults_of_promise(entries: Sequence[Entry], index: int, body: dict[str, Any], adjacency: Adjacency) -> list[str]:
    """What is wrong with one reservation and the debits made under it."""
    faults: list[str] = []
    promised = _number(body.get("epsilon", "inf"))
    reserved = event_from_json(body["event"])
    delta = float(body.get("delta", 1e-5))
    under = [
        (event_from_json(own["event"]), count)
        for _, own, count in _said(entries, "debit")
        if own.get("reservation") == index
    ]
    if math.isfinite(promised):
        cost = epsilon_of(reserved, delta, "pld", adjacency)
        if cost > promised * (1 + TOLERANCE):
            faults.append(f"entry {index} promises epsilon {promised:g} and reserves what costs {_words(cost)}")
        spent = epsilon_of([_times(event, count) for event, count in under], delta, "pld", adjacency) if under else 0.0
        if spent > promised * (1 + TOLERANCE):
            faults.append(
                f"entry {index} promises epsilon {promised:g}; what was debited under it costs {_words(spent)}"
            )
    allowed = _steps(reserved)
    for event, count in _counted(under).items():
        if count > allowed[event]:
            kind = "were not reserved" if event not in allowed else f"were debited of {allowed[event]} that it reserves"
            faults.append(f"under entry {index}, {count} releases of {_named(event)} {kind}")
    population = body.get("population")
    if math.isfinite(promised) and isinstance(population, int) and population and delta > default_delta(population):
        faults.append(
            f"entry {index} states delta {delta:.3g}; for {population:,} at most {default_delta(population):.3g} says "
            "anything"
        )
    return faults


def totals(prices: Sequence[LedgerPrice], *, budget: float | None = None) -> dict[str, Any]:
    """Add ledgers up: per data set, per subject, per base model, and all together.

    What several runs released about the same people composes, whatever each run promised; what two sides tell of one
    run counts once. Rehearsals claim nothing and are left out; ledgers whose units or adjacencies differ have no sum.

    Args:
        prices: The ledgers.
        budget: What was granted for everything together; the sums are held against it.
    """
    counted = _each_once([price for price in prices if not price.is_rehearsal])
    groups: dict[str, Any] = {"data_sets": [], "subjects": [], "models": []}
    for name, field in (("data_sets", "data"), ("subjects", "subject"), ("models", "model")):
        by_name: dict[str, list[LedgerPrice]] = defaultdict(list)
        for price in counted:
            if isinstance(price.header.get(field), str):
                by_name[price.header[field]].append(price)
        groups[name] = [{field: key, **_sum(own, budget)} for key, own in sorted(by_name.items())]
    return {
        **groups,
        "organization": _sum(counted, budget),
        "left_out": [price.name for price in prices if price.is_rehearsal],
    }


def _each_once(prices: Sequence[LedgerPrice]) -> list[LedgerPrice]:
    """Leave out a ledger that was handed in twice, of two states of one the shorter; its salt makes a header unique."""
    longest: dict[str, LedgerPrice] = {}
    for price in prices:
        name = canonical_digest(price.header)
        if name not in longest or longest[name].debits < price.debits:
            longest[name] = price
    return list(longest.values())


def _sum(prices: Sequence[LedgerPrice], budget: float | None) -> dict[str, Any]:
    spending = [price for price in prices if price.spent or price.charged]
    result: dict[str, Any] = {"ledgers": [price.name for price in prices], "budget": budget}
    kinds = {price.adjacency for price in spending}
    summable = len(kinds) < 2 or kinds == {Adjacency.ZERO_OUT, Adjacency.REPLACE_ONE}
    if len({price.unit for price in spending}) > 1 or not summable:
        return result | {"verdict": "not shown", "why": "units or adjacencies differ, so there is no sum"}
    adjacency = kinds.pop() if len(kinds) == 1 else Adjacency.ZERO_OUT  # what bounds replacement bounds zeroing out
    delta = min((price.delta for price in spending), default=1e-5)
    spent = _of_one_person([(price, price.spent, price.spent_in) for price in spending], delta, adjacency)
    charged = _of_one_person([(price, price.charged, price.charged_in) for price in spending], delta, adjacency)
    found = readings(spent, delta, adjacency, spending[0].unit if spending else None)
    reserved = epsilon_of(charged, delta, "pld", adjacency) if charged else 0.0
    epsilon = epsilon_of(spent, delta, "pld", adjacency) if spent else 0.0
    alone = max((price.promised[0] for price in spending if price.promised), default=0.0)
    verdict: Verdict = "no claim" if math.isinf(epsilon) else "not shown"
    why = "nobody said what all of it together may cost; --budget does"
    if budget is not None:
        verdict = "contradicted" if max(epsilon, 0.0) > budget * (1 + TOLERANCE) else "holds"
        why = f"{_words(epsilon)} was spent of a budget of {budget:g}"
    return result | {
        "delta": delta,
        "reserved_epsilon": _plain(reserved),
        "largest_promise": _plain(alone),
        "spent": found,
        "verdict": verdict,
        "why": why,
    }


def _of_one_person(
    told: Sequence[tuple[LedgerPrice, tuple[Event, ...], tuple[str | None, ...]]], delta: float, adjacency: Adjacency
) -> list[Event]:
    """The events that one person can have been in, each once, whoever told of it.

    A server's ledger covers every enrolled person in its run. A device's ledger and a registry tell of the same run
    again, and add only what no server's ledger tells of. Devices are different people: of what only they tell, the
    one that tells most counts.
    """
    covered = {price.header["run"] for price, _, _ in told if "run" in price.header}
    events = [event for price, own, _ in told if "run" in price.header for event in own]
    alone: list[list[Event]] = [[]]
    for price, own, runs in told:
        if "run" in price.header:
            continue
        rest = [event for event, run in zip(own, runs, strict=True) if run not in covered]
        if price.header.get("role") == "device":
            alone.append(rest)
        else:
            events += rest
    most = max(alone, key=lambda rest: epsilon_of(rest, delta, "pld", adjacency) if rest else 0.0)
    return [*events, *most]


def readings(
    events: Sequence[Event], delta: float, adjacency: Adjacency = Adjacency.ZERO_OUT, unit: str | None = "user"
) -> dict[str, Any]:
    """Say what `events` cost: by every accountant, at every delta, and what it means for an attacker.

    Returns:
        A JSON object; an infinite epsilon is the string `inf`.
    """
    names: tuple[Accountant, ...] = ("pld", "prv", "rdp")
    prices: dict[Accountant, float] = {}
    without: dict[str, str] = {}
    for name in names:
        try:
            prices[name] = epsilon_of(events, delta, name, adjacency) if events else 0.0
        except ValueError as error:
            without[name] = str(error)
    epsilon = prices["pld"]
    rate = attack_rate(events, adjacency=adjacency)
    agree, words = _difference(prices)
    return {
        "epsilon": {accountant_version(name): _plain(value) for name, value in prices.items()},
        "without_a_price": without,
        "accountants_agree": agree,
        "difference": words,
        "curve": [[at, _plain(value)] for at, value in curve(events, DELTAS, adjacency)],
        "equivalent_mu": _plain(equivalent_mu(epsilon, delta) if epsilon > 0 else 0.0),
        "true_positive_rate_at_1_percent": rate,
        "people": people(rate, unit),
    }


def people(rate: float, unit: str | None) -> str:
    """Say a true positive rate at 1 % false positives in people, or in records where these are the unit."""
    found = min(1000, math.ceil(1000 * rate - 1e-9))
    who = "records that took part" if unit == "example" else "people who took part"
    return (
        f"of 1,000 {who}, an attacker who wrongly accuses 10 of every 1,000 others can rightly pick at most {found:,}"
    )


def worst(verdicts: Iterable[str]) -> Verdict:
    """Return the gravest of several verdicts; `no claim` where there is none."""
    said = set(verdicts)
    for verdict in SEVERITY[::-1]:
        if {verdict} & said:
            return verdict
    return "no claim"


def _difference(prices: dict[Accountant, float]) -> tuple[bool, str]:
    """Whether the accountants agree, and why their numbers are not the same."""
    pld = prices["pld"]
    if math.isinf(pld):
        return all(math.isinf(value) for value in prices.values()), "something was released without noise"
    parts: list[str] = []
    agree = True
    if "prv" in prices:
        gap = prices["prv"] - pld
        agree = abs(gap) <= ACCOUNTANTS_DIFFER + 0.01 * pld
        parts.append(
            f"PRV differs by {gap:+.3f}: it states the upper end of an interval of 0.01, PLD rounds every loss up"
            if agree
            else f"PRV differs by {gap:+.3f}, more than both can be wrong: one of them is broken"
        )
    if "rdp" in prices:
        over = prices["rdp"] / pld - 1.0 if pld > 0 else 0.0
        if prices["rdp"] < pld * (1 - 0.01) - ACCOUNTANTS_DIFFER:
            agree = False
            parts.append("Rényi is below PLD, which it cannot be: one of them is broken")
        else:
            parts.append(f"Rényi is {over:.0%} above PLD: it bounds the tail by moments, which is looser")
    return agree, "; ".join(parts) or "one accountant only has a price for these events"


def _said(entries: Sequence[Entry], kind: str) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Every entry of `kind` as (index, body, times), those that compaction summed up included."""
    for place, entry in enumerate(entries):
        if entry.kind == "compact" and place == 0:
            for total in entry.body["totals"]:
                if total["kind"] == kind:
                    yield total["index"], total["body"], total["count"]
        elif entry.kind == kind:
            yield entry.index, entry.body, 1


def _steps(event: Event) -> Counter[Event]:
    """The single events that one event stands for, counted."""
    counts: Counter[Event] = Counter()
    if isinstance(event, Repeated):
        for step, count in _steps(event.event).items():
            counts[step] += count * event.count
    elif isinstance(event, Composed):
        for part in event.events:
            counts += _steps(part)
    else:
        counts[event] = 1
    return counts


def _counted(events: Iterable[tuple[Event, int]]) -> Counter[Event]:
    counts: Counter[Event] = Counter()
    for event, times in events:
        for step, count in _steps(event).items():
            counts[step] += count * times
    return counts


def _named(event: Event) -> str:
    multiplier = getattr(event, "noise_multiplier", None)
    return event.kind if multiplier is None else f"noise multiplier {multiplier:.4g}"


def _times(event: Event, count: int) -> Event:
    return event if count == 1 else Repeated(event, count)


def _number(value: Any) -> float:
    return math.inf if value == "inf" else float(value)


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"


def _words(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "an infinite epsilon"
