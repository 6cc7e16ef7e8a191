"""The headline claims of an audit: each with a verdict in words, why, and who holds the evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from simulations.bindings import Finding
from simulations.recomputation import Verdict, worst
from simulations.reconciliation import Reconciliation
from simulations.shown_evidence import Shown

__all__ = ["COMPLETE", "MECHANISM", "SPENT", "Claim", "headline_claims"]

EGRESS = {
    "what was released is the shared vector and nothing more",
    "every byte that left is of a named shared tensor",
    "only the tensors that the run shares left the devices",
    "no score of anyone's records was collected without noise",
}
NOISE = {"the published noise witnesses have the noise that was promised"}
CODE = "the run was made by the code that is installed here"
"""Findings that other headline claims than "nothing was changed afterwards" are about."""


@dataclass(frozen=True)
class Claim:
    """One headline claim.

    Attributes:
        text: What is claimed.
        verdict: What the evidence says.
        why: In words.
        holder: Who holds the evidence, so that nobody else can be asked for it.
    """

    text: str
    verdict: Verdict
    why: str
    holder: str

    def to_json(self) -> dict[str, str]:
        """Return it as a JSON object."""
        return {"claim": self.text, "verdict": self.verdict, "why": self.why, "evidence_held_by": self.holder}


COMPLETE = "Every ledger is complete and unaltered"
KEYS = "Signed with known keys"
ROLLBACK = "No ledger was rolled back"
SPENT = "No more was spent than promised"
AGREE = "Accountants agree on what was spent"
UNCHANGED = "Nothing was changed afterwards"
LEFT = "Only shared adapters left"
SIDES = "Server and devices agree"
MECHANISM = "The code does what it promises"
BUDGET = "All runs stay within the budget"


def headline_claims(
    shown: Sequence[Shown],
    summed: Mapping[str, Any],
    matched: Sequence[Reconciliation],
    *,
    trouble: str | None,
    keys: Sequence[str],
    budget: float | None,
) -> tuple[Claim, ...]:
    """Judge everything that was shown.

    Args:
        shown: The evidence.
        summed: What all of it adds up to.
        matched: Both sides of each run for which both were shown.
        trouble: Why both sides could not be matched.
        keys: Public keys that may have signed.
        budget: Epsilon granted for everything together.
    """
    return (
        _complete(shown),
        _signed(shown, keys),
        _kept(shown),
        _spent(shown),
        _agree(shown, summed),
        _unchanged(shown),
        _left(shown, matched),
        _sides(shown, matched, trouble),
        _mechanism(shown),
        _budget(summed, budget),
    )


def _complete(shown: Sequence[Shown]) -> Claim:
    faults = [f"{Path(one.evidence.name).name}: {one.fault}" for one in shown if one.fault is not None]
    entries = sum(len(one.verified.entries) for one in shown if one.verified is not None)
    why = faults[0] if faults else f"{_count(len(shown), 'ledger')}, {entries:,} entries: every link and signature"
    return Claim(COMPLETE, "contradicted" if faults else "holds", why, "who has the ledger")


def _signed(shown: Sequence[Shown], keys: Sequence[str]) -> Claim:
    holder = "who got the keys from their writers"
    writers = [(one.evidence.name, one.verified.head.writer) for one in shown if one.verified is not None]
    if not keys:
        return Claim(KEYS, "not shown", "no public key was named; they are listed below", holder)
    strangers = [f"{name} is signed with {key[:16]}, which was not named" for name, key in writers if key not in keys]
    why = strangers[0] if strangers else f"{_count(len(writers), 'ledger')}, {_count(len(keys), 'key')}"
    return Claim(KEYS, "contradicted" if strangers else "holds", why, holder)


def _kept(shown: Sequence[Shown]) -> Claim:
    holder = "the other side, or an earlier audit"
    sound = [one for one in shown if one.verified is not None]
    bare = [one.evidence.name for one in sound if one.rolled_back is None]
    if len(bare) < len(shown) and not bare and sound:
        return Claim(ROLLBACK, "holds", "each agrees with a head that somebody else kept", holder)
    why = "nobody kept a head of them" if len(bare) == len(sound) else f"nobody kept a head of {Path(bare[0]).name}"
    return Claim(ROLLBACK, "not shown", why, holder)


def _spent(shown: Sequence[Shown]) -> Claim:
    holder = "who has the ledger"
    prices = [one.price for one in shown if one.price is not None]
    faults = [f"{Path(price.name).name}: {fault}" for price in prices for fault in price.faults]
    if faults:
        return Claim(SPENT, "contradicted", faults[0], holder)
    claimed = [price for price in prices if not price.is_rehearsal and price.verdict == "holds"]
    if not claimed:
        verdict = worst(price.verdict for price in prices if not price.is_rehearsal)
        return Claim(
            SPENT, verdict, "nothing was promised" if verdict == "no claim" else "no promise is stated", holder
        )
    return Claim(SPENT, "holds", f"recomputed from events alone, {_count(len(claimed), 'ledger')}", holder)


def _agree(shown: Sequence[Shown], summed: Mapping[str, Any]) -> Claim:
    spent = summed["organization"].get("spent")
    readings = [spent] if spent else [one.price.to_json()["spent"] for one in shown if one.price is not None]
    holder = "anyone"
    broken = [one["difference"] for one in readings if not one["accountants_agree"]]
    if broken:
        return Claim(AGREE, "contradicted", broken[0], holder)
    if not readings:
        return Claim(AGREE, "not shown", "nothing has a price", holder)
    amounts = [f"{value:.3f}" if not isinstance(value, str) else value for value in readings[0]["epsilon"].values()]
    names = [name.split()[0].upper().replace("RDP", "Rényi") for name in readings[0]["epsilon"]]
    why = ", ".join(f"{name} {amount}" for name, amount in zip(names, amounts, strict=True))
    return Claim(AGREE, "holds", f"{why}; why they differ is below", holder)


def _of(shown: Sequence[Shown], wanted: Callable[[str], bool]) -> list[tuple[str, Finding]]:
    return [(one.evidence.name, finding) for one in shown for finding in one.findings if wanted(finding.claim)]


def _judged(text: str, found: Sequence[tuple[str, Finding]], holder: str, nothing: str) -> Claim:
    wrong = [f"{Path(name).name}: {one.why}" for name, one in found if one.verdict == "contradicted"]
    if wrong:
        return Claim(text, "contradicted", "; ".join(dict.fromkeys(wrong[:3])), holder)
    if not found:
        return Claim(text, "not shown", nothing, holder)
    open_ones = [f"{one.claim}: {one.why}" for _, one in found if one.verdict == "not shown"]
    if len(open_ones) == len(found):
        return Claim(text, "not shown", open_ones[0], holder)
    more = f"; not shown: {open_ones[0]}" if open_ones else ""
    return Claim(text, "holds", f"{_count(len(found) - len(open_ones), 'check')} passed{more}", holder)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _unchanged(shown: Sequence[Shown]) -> Claim:
    found = _of(shown, lambda claim: claim not in EGRESS | NOISE | {CODE})
    return _judged(UNCHANGED, found, "who has the folder or the zip", "only ledgers were shown")


def _left(shown: Sequence[Shown], matched: Sequence[Reconciliation]) -> Claim:
    found = _of(shown, lambda claim: claim in EGRESS)
    found += [("both sides", one) for match in matched for one in match.findings if one.claim in EGRESS]
    return _judged(LEFT, found, "the device; the server", "only ledgers")


def _sides(shown: Sequence[Shown], matched: Sequence[Reconciliation], trouble: str | None) -> Claim:
    holder = "the devices"
    if trouble is not None:
        return Claim(SIDES, "contradicted", trouble, holder)
    if not matched:
        roles = {one.role for one in shown}
        why = "a study has no devices" if "study" in roles else "only one side was shown"
        return Claim(SIDES, "not shown", why, holder)
    found = [("both sides", one) for match in matched for one in match.findings if one.claim not in EGRESS]
    judged = _judged(SIDES, found, holder, "nothing to compare")
    open_ones = [one.why for match in matched if match.verdict == "not shown" for one in match.unmatched]
    return (
        judged
        if judged.verdict == "contradicted" or not open_ones
        else replace(judged, verdict="not shown", why=open_ones[0])
    )


def _mechanism(shown: Sequence[Shown]) -> Claim:
    holder = "who has the code; that it ran is the server's word"
    found = _of(shown, lambda claim: claim in NOISE)
    for one in shown:
        for attack in one.attacks():
            if attack["verdict"] in ("holds", "contradicted", "not shown"):
                found.append((one.evidence.name, Finding(str(attack["name"]), attack["verdict"], str(attack["why"]))))
    nothing = "no attack was run on it"
    claim = _judged(MECHANISM, found, holder, nothing)
    tested = any(one.attacks() for one in shown)
    if claim.verdict == "holds" and not tested:
        return Claim(MECHANISM, "not shown", f"the server's own noise witnesses agree; {nothing}", holder)
    return claim


def _budget(summed: Mapping[str, Any], budget: float | None) -> Claim:
    parts = [*summed["data_sets"], *summed["subjects"], summed["organization"]]
    holder = "who has all the ledgers"
    if budget is None:
        return Claim(BUDGET, "not shown", "nobody said what all of it may cost", holder)
    over = [part["why"] for part in parts if part["verdict"] == "contradicted"]
    if over:
        return Claim(BUDGET, "contradicted", over[0], holder)
    whole = summed["organization"]
    return Claim(BUDGET, whole["verdict"], str(whole["why"]), holder)
