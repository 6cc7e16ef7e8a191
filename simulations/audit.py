"""The whole audit of some evidence: verify, recompute, reconcile, and a verdict in words per claim.

An auditor trusts nobody: what is read here was written by whoever is audited. Each claim says what was looked at and
who holds that evidence, and "not shown" is an answer. Needs no model, neither torch nor Flower, and no network.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import Refusal, VerificationError
from common.evidence import HEADS, Evidence, read_evidence
from common.ledger_format import Head, Verified, verify
from common.promise import promise_of
from common.source import source_digest
from common.wire import ReleaseSpec
from simulations.recomputation import LedgerPrice, Verdict, price_ledger, totals, worst
from simulations.reconciliation import Reconciliation, reconcile
from simulations.run_evidence import Finding, examine

__all__ = ["Audit", "Claim", "Shown", "audit"]

FORMAT = "homespun-audit-1"
ATTACKS = "attacks.json"

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
class Shown:
    """One piece of evidence, checked.

    Attributes:
        evidence: As it was read.
        verified: Its ledger; None where that does not check out.
        price: What the ledger cost; None where there is no price.
        findings: What lies beside the ledger, held against it.
        fault: Why the ledger does not check out.
        rolled_back: What heads that others kept say; None where there were none.
    """

    evidence: Evidence
    verified: Verified | None
    price: LedgerPrice | None
    findings: tuple[Finding, ...]
    fault: str | None
    rolled_back: str | None

    @property
    def role(self) -> str:
        """Whose ledger it says to be."""
        return str(self.verified.header.get("role")) if self.verified is not None else "unknown"

    @property
    def spec(self) -> ReleaseSpec | None:
        """What devices were asked for, if it is shown and is a spec."""
        try:
            return ReleaseSpec.from_text(self.evidence.files["spec.json"].decode())
        except (KeyError, UnicodeDecodeError, Refusal):
            return None

    def attacks(self) -> list[dict[str, Any]]:
        """The results of attacks that lie beside the ledger."""
        try:
            results: Any = json.loads(self.evidence.files[ATTACKS])["results"]
            found: list[dict[str, Any]] = [dict(one) for one in results]
        except (KeyError, ValueError, TypeError, RecursionError):
            return []
        needed = {"name", "target", "measure", "value", "low", "high", "chance", "saturation", "verdict", "why"}
        return [one for one in found if needed <= one.keys()]


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


@dataclass(frozen=True)
class Audit:
    """An audit that was done.

    Attributes:
        shown: The evidence, piece by piece.
        claims: The headline claims.
        summed: Sums per data set, subject and base model, and over everything.
        reconciliations: Both sides of each run for which both were shown.
        changes: What changed since an earlier audit, in words; None where none was given.
        time: When, by the auditor's clock.
    """

    shown: tuple[Shown, ...]
    claims: tuple[Claim, ...]
    summed: Mapping[str, Any]
    reconciliations: tuple[Reconciliation, ...]
    changes: tuple[str, ...] | None
    time: str

    @property
    def verdict(self) -> Verdict:
        """Contradicted if any claim is; otherwise what the ledgers themselves and their prices say."""
        if any(one.verdict == "contradicted" for one in self.claims):
            return "contradicted"
        if all(one.price is None or one.price.is_rehearsal or one.price.verdict == "no claim" for one in self.shown):
            return "no claim"
        return worst(one.verdict for one in self.claims if one.text in (COMPLETE, SPENT))

    def to_json(self) -> dict[str, Any]:
        """Return everything that was found as a JSON object: no user data, no weights."""
        return {
            "format": FORMAT,
            "made": self.time,
            "auditing_code": source_digest(),
            "verdict": self.verdict,
            "changed_since": None if self.changes is None else list(self.changes),
            "claims": [one.to_json() for one in self.claims],
            "ledgers": [_ledger_json(one) for one in self.shown],
            "totals": dict(self.summed),
            "reconciliations": [one.to_json() for one in self.reconciliations],
        }


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


def audit(
    paths: Sequence[Path],
    *,
    time: str,
    keys: Sequence[str] = (),
    heads: Iterable[Head] = (),
    budget: float | None = None,
    since: Mapping[str, Any] | None = None,
) -> Audit:
    """Verify, recompute and reconcile what lies in `paths`.

    Args:
        paths: Zips of evidence, run folders or ledgers, of either side.
        time: When, for the report.
        keys: Public keys that may have signed.
        heads: Signed heads that somebody else kept.
        budget: Epsilon granted for everything together.
        since: The JSON of an earlier audit, whose heads count as kept ones.

    Raises:
        DataError: A path holds no evidence at all.
    """
    pieces = [_read(path) for path in paths]
    kept = [*heads, *_heads_of(since)]
    for piece, _ in pieces:
        kept += _heads_of_lines(piece)
    shown = tuple(_check(piece, fault, kept) for piece, fault in pieces)
    prices = [one.price for one in shown if one.price is not None]
    summed = totals(prices, budget=budget)
    matched, trouble = _reconciled(shown)
    claims = (
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
    changes = None if since is None else tuple(_changes(since, shown, claims))
    return Audit(shown, claims, summed, matched, changes, time)


def _read(path: Path) -> tuple[Evidence, str | None]:
    try:
        return read_evidence(path), None
    except VerificationError as error:
        return Evidence(str(path), {}), str(error)


def _check(evidence: Evidence, fault: str | None, kept: Sequence[Head]) -> Shown:
    if fault is not None:
        return Shown(evidence, None, None, (), fault, None)
    try:
        verified = verify(evidence.ledger)
        if evidence.manifest is not None and evidence.manifest["public_key"] != verified.head.writer:
            raise VerificationError("the zip is signed with another key than its ledger")
        price = price_ledger(verified, evidence.name)
    except VerificationError as error:
        return Shown(evidence, None, None, (), str(error), None)
    known = [head for head in kept if head.ledger == verified.head.ledger]
    rolled_back: str | None = None
    try:
        rolled_back = verify(evidence.ledger, known_heads=known).rollback_evidence if known else None
    except VerificationError as error:
        return Shown(evidence, None, None, (), str(error), None)
    return Shown(evidence, verified, price, tuple(_findings(evidence, verified, price)), None, rolled_back)


def _findings(evidence: Evidence, verified: Verified, price: LedgerPrice) -> list[Finding]:
    is_alone = evidence.is_bare and verified.header.get("role") != "device"
    return [] if is_alone else examine(evidence, verified, price)


def _heads_of_lines(evidence: Evidence) -> list[Head]:
    found: list[Head] = []
    try:
        own = verify(evidence.ledger).head.ledger
        for text in evidence.lines(HEADS):
            head = Head.from_json(text)
            if head.ledger != own:  # what a side kept of itself shows nobody anything
                found.append(head)
    except (VerificationError, ValueError, KeyError, TypeError):
        pass
    return found


def _heads_of(since: Mapping[str, Any] | None) -> list[Head]:
    if since is None:
        return []
    try:
        return [Head.from_json(one["head"]) for one in since["ledgers"] if one.get("head")]
    except (VerificationError, ValueError, KeyError, TypeError):
        raise VerificationError("--since: not the JSON of an audit") from None


def _reconciled(shown: Sequence[Shown]) -> tuple[tuple[Reconciliation, ...], str | None]:
    devices = [one for one in shown if one.role == "device"]
    found: list[Reconciliation] = []
    for one in shown:
        if one.verified is None or "run" not in one.verified.header or not devices:
            continue
        try:
            found.append(reconcile(one.evidence, [device.evidence for device in devices]))
        except VerificationError as error:
            return tuple(found), str(error)
    return tuple(found), None


# Headline claims, each with who holds the evidence


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
        return Claim(text, "contradicted", wrong[0], holder)
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
    return _judged(SIDES, found, holder, "nothing to compare")


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


# Since an earlier audit


def _changes(since: Mapping[str, Any], shown: Sequence[Shown], claims: Sequence[Claim]) -> Iterable[str]:
    before = {str(one.get("ledger_id")): one for one in since["ledgers"]}
    now = {str(_ledger_json(one).get("ledger_id")): _ledger_json(one) for one in shown if one.verified is not None}
    old_claims = {str(one["claim"]): str(one["verdict"]) for one in since.get("claims", ())}
    for claim in claims:
        was = old_claims.get(claim.text)
        if was is not None and was != claim.verdict:
            yield f"{claim.text}: was {was}, now {claim.verdict}"
    for name, one in now.items():
        old = before.get(name)
        if old is None:
            yield f"new: {one['ledger']}, {one['entries']:,} entries"
        elif old["entries"] != one["entries"]:
            words = f"{one['ledger']}: {one['entries'] - old['entries']:,} more entries"
            was, is_now = _first(old), _first(one)
            yield words + (f"; epsilon spent went from {was} to {is_now}" if was != is_now else "")
    for name, old in before.items():
        if name not in now:
            yield f"not shown any more: {old['ledger']}"


def _first(ledger: Mapping[str, Any]) -> str:
    value = next(iter(ledger.get("spent", {}).get("epsilon", {}).values()), 0.0)
    return value if isinstance(value, str) else f"{value:.2f}"


def _ledger_json(one: Shown) -> dict[str, Any]:
    if one.verified is None or one.price is None:
        return {"ledger": one.evidence.name, "verdict": "contradicted", "faults": [str(one.fault)], "findings": []}
    spec = one.spec
    promise = promise_of(spec) if spec is not None else None
    return {
        **one.price.to_json(),
        "ledger_id": one.verified.head.ledger,
        "entries": one.verified.head.index + 1,
        "head": one.verified.head.to_json(),
        "writer": one.verified.head.writer,
        "first_time": one.verified.entries[0].time,
        "last_time": one.verified.entries[-1].time,
        "rollback_evidence": one.rolled_back,
        "noise": promise.noise if promise is not None else None,
        "clip": spec.clip if spec is not None else None,
        "noise_multiplier": spec.noise_multiplier if spec is not None else None,
        "population": spec.population if spec is not None else None,
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(one.evidence.files.items())},
        "findings": [finding.to_json() for finding in one.findings],
        "attacks": [_finite(attack) for attack in one.attacks()],
    }


def _finite(value: Any) -> Any:
    """JSON has no infinity, whoever wrote the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else None
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value
