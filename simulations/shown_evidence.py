"""One piece of evidence as an auditor takes it in: read, verified, priced, and held against its own ledger."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import Refusal, VerificationError
from common.evidence import HEADS, Evidence, read_evidence
from common.ledger_format import Head, Verified, verify
from common.promise import promise_of
from common.wire import ReleaseSpec
from server.kept_heads import check_remembered
from simulations.bindings import Finding
from simulations.recomputation import LedgerPrice, price_ledger
from simulations.run_evidence import examine

__all__ = ["Shown", "check", "heads_kept", "read"]

ATTACKS = "attacks.json"


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

    def to_json(self) -> dict[str, Any]:
        """Return everything that was found in it as a JSON object: no user data, no weights."""
        if self.verified is None or self.price is None:
            return {
                "ledger": self.evidence.name,
                "verdict": "contradicted",
                "faults": [str(self.fault)],
                "findings": [],
            }
        spec = self.spec
        promise = promise_of(spec) if spec is not None else None
        return {
            **self.price.to_json(),
            "ledger_id": self.verified.head.ledger,
            "entries": self.verified.head.index + 1,
            "head": self.verified.head.to_json(),
            "writer": self.verified.head.writer,
            "first_time": self.verified.entries[0].time,
            "last_time": self.verified.entries[-1].time,
            "rollback_evidence": self.rolled_back,
            "noise": promise.noise if promise is not None else None,
            "clip": spec.clip if spec is not None else None,
            "noise_multiplier": spec.noise_multiplier if spec is not None else None,
            "population": spec.population if spec is not None else None,
            "files": {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.evidence.files.items())},
            "findings": [finding.to_json() for finding in self.findings],
            "attacks": [_finite(attack) for attack in self.attacks()],
        }


def read(path: Path) -> tuple[Evidence, str | None]:
    """Read evidence, or say why it cannot be trusted as a whole.

    Raises:
        DataError: There is none.
    """
    try:
        return read_evidence(path), None
    except VerificationError as error:
        return Evidence(str(path), {}), str(error).removeprefix(f"{path}: ")


def check(evidence: Evidence, fault: str | None, kept: Sequence[Head]) -> Shown:
    """Verify a ledger against itself and against heads that others kept, price it, and examine what lies beside it."""
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
        # What others kept speaks first: it is evidence to everybody, what this machine remembers only here.
        rolled_back = verify(evidence.ledger, known_heads=known).rollback_evidence if known else None
        check_remembered(verified, Path(evidence.name))
    except VerificationError as error:
        return Shown(evidence, None, None, (), str(error), None)
    return Shown(evidence, verified, price, tuple(_findings(evidence, verified, price)), None, rolled_back)


def _findings(evidence: Evidence, verified: Verified, price: LedgerPrice) -> list[Finding]:
    is_alone = evidence.is_bare and verified.header.get("role") != "device"
    return [] if is_alone else examine(evidence, verified, price)


def heads_kept(evidence: Evidence) -> list[Head]:
    """Signed heads of other ledgers than its own that lie in a piece of evidence."""
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


def _finite(value: Any) -> Any:
    """JSON has no infinity, whoever wrote the file."""
    if isinstance(value, float) and not math.isfinite(value):
        return "inf" if value > 0 else None
    if isinstance(value, dict):
        return {str(name): _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list) else value
