"""The whole audit of some evidence: verify, recompute, reconcile, and a verdict in words per claim.

An auditor trusts nobody: what is read here was written by whoever is audited. Each claim says what was looked at and
who holds that evidence, and "not shown" is an answer. Needs no model, neither torch nor Flower, and no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import DataError, VerificationError
from common.evidence import RECEIPTS
from common.ledger_format import Head
from common.source import source_digest
from simulations.audit_claims import COMPLETE, SPENT, Claim, headline_claims
from simulations.recomputation import Verdict, totals, worst
from simulations.reconciliation import Reconciliation, reconcile
from simulations.shown_evidence import Shown, check, heads_kept, read

__all__ = ["Audit", "audit"]

FORMAT = "homespun-audit-1"


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
            "ledgers": [one.to_json() for one in self.shown],
            "totals": dict(self.summed),
            "reconciliations": [one.to_json() for one in self.reconciliations],
        }


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
        DataError: A path holds no evidence at all, or the earlier audit is of nothing that is here.
    """
    pieces = [read(path) for path in paths]
    kept = [*heads, *_heads_of(since)]
    for piece, _ in pieces:
        kept += heads_kept(piece)
    shown = tuple(check(piece, fault, kept) for piece, fault in pieces)
    prices = [one.price for one in shown if one.price is not None]
    summed = totals(prices, budget=budget)
    _has_one_in_common(since, shown)
    matched, trouble = _reconciled(shown)
    claims = headline_claims(shown, summed, matched, trouble=trouble, keys=keys, budget=budget)
    changes = None if since is None else tuple(_changes(since, shown, claims))
    return Audit(shown, claims, summed, matched, changes, time)


def _heads_of(since: Mapping[str, Any] | None) -> list[Head]:
    if since is None:
        return []
    try:
        return [Head.from_json(one["head"]) for one in since["ledgers"] if one.get("head")]
    except (VerificationError, ValueError, KeyError, TypeError):
        raise VerificationError("--since: not the JSON of an audit") from None


def _has_one_in_common(since: Mapping[str, Any] | None, shown: Sequence[Shown]) -> None:
    """Refuse to say what changed since an audit of something else."""
    before = set() if since is None else {str(one.get("ledger_id")) for one in since["ledgers"] if one.get("ledger_id")}
    now = {one.verified.head.ledger for one in shown if one.verified is not None}
    if before and now and not before & now:
        raise DataError("--since: an audit of other ledgers; none of those that are shown here is in it")


def _reconciled(shown: Sequence[Shown]) -> tuple[tuple[Reconciliation, ...], str | None]:
    devices = [one for one in shown if one.role == "device"]
    found: list[Reconciliation] = []
    servers: dict[str, Shown] = {}
    for one in shown:
        if one.verified is None or "run" not in one.verified.header or not devices:
            continue
        known = servers.get(one.verified.head.ledger)
        if known is None or _shows_more(one, known):  # of one ledger that was handed in twice
            servers[one.verified.head.ledger] = one
    for one in servers.values():
        try:
            found.append(reconcile(one.evidence, [device.evidence for device in devices]))
        except VerificationError as error:
            return tuple(found), str(error)
    return tuple(found), None


def _shows_more(one: Shown, other: Shown) -> bool:
    def facts(shown: Shown) -> tuple[bool, int]:
        return RECEIPTS in shown.evidence.files, shown.verified.head.index if shown.verified is not None else -1

    return facts(one) > facts(other)


# Since an earlier audit


def _changes(since: Mapping[str, Any], shown: Sequence[Shown], claims: Sequence[Claim]) -> Iterable[str]:
    before = {str(one.get("ledger_id")): one for one in since["ledgers"]}
    now = {str(one.to_json().get("ledger_id")): one.to_json() for one in shown if one.verified is not None}
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
