"""What a ledger binds of the files beside it, by digest, signature or round: needs no accountant and starts at once.

The ledger is what was signed; everything else in a folder can be edited by whoever holds it. Each check compares one
file with what the ledger says of it, and answers in words.
"""

from __future__ import annotations

import hashlib
import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import VerificationError
from common.evidence import CHECKPOINT, Evidence
from common.keys import VerifyKey
from common.ledger_format import Verified

if TYPE_CHECKING:
    from simulations.recomputation import Verdict

__all__ = ["Finding", "bindings"]

CONFIG, SPEC, LOG = "config.toml", "spec.json", "rounds.jsonl"

INTERRUPTED = "a crash that nobody resumed, or an old copy of the checkpoint"


@dataclass(frozen=True)
class Finding:
    """One claim of a run and what the evidence says.

    Attributes:
        claim: What is claimed.
        verdict: Holds, contradicted, or not shown.
        why: In words.
    """

    claim: str
    verdict: Verdict
    why: str

    def to_json(self) -> dict[str, str]:
        """Return the finding as a JSON object."""
        return {"claim": self.claim, "verdict": self.verdict, "why": self.why}


def bindings(evidence: Evidence, verified: Verified) -> list[Finding]:
    """Hold the files beside a verified ledger against what it binds of them; what is missing is "not shown"."""
    if verified.header.get("role") == "device":
        return [_policy(evidence, verified)]
    return [
        _configuration(evidence, verified),
        _request(evidence, verified),
        _log(evidence, verified),
        *_checkpoint(evidence, verified),
    ]


def _policy(evidence: Evidence, verified: Verified) -> Finding:
    """The owner's word: signed by the key of the ledger, and the one that reservations and refills name."""
    claim = "the device sent under a policy that its owner signed"
    policy, signature = evidence.files.get("policy.toml"), evidence.files.get("policy.toml.sig")
    if policy is None or signature is None:
        return Finding(claim, "not shown", "there is no signed policy")
    digest = hashlib.sha256(policy).hexdigest()
    try:
        key = VerifyKey.from_hex(verified.head.writer)
        key.verify(bytes.fromhex(signature.decode().split()[-1]), b"homespun-policy-1\n" + policy)
    except (VerificationError, ValueError, IndexError):
        return Finding(claim, "contradicted", "the policy is not signed with the key of the ledger")
    named = [str(entry.body["policy"]) for entry in verified.entries if "policy" in entry.body]
    if named and named[-1] != digest:
        return Finding(claim, "not shown", "the policy was changed since it was last used; the ledger names another")
    return Finding(claim, "holds", "signed with the key of the ledger, which names it")


def _configuration(evidence: Evidence, verified: Verified) -> Finding:
    claim = "the configuration is the one that the run began with"
    data = evidence.files.get(CONFIG)
    if data is None:
        return Finding(claim, "not shown", f"there is no {CONFIG}")
    bound = verified.header.get("config")
    if bound is None:
        return Finding(claim, "not shown", "the ledger binds no configuration")
    if hashlib.sha256(data).hexdigest() != bound:
        return Finding(claim, "contradicted", f"{CONFIG} is not what entry 0 binds: it was changed after the run began")
    try:
        rehearsal = tomllib.loads(data.decode()).get("rehearsal", False)
    except ValueError:
        return Finding(claim, "not shown", f"{CONFIG} is the one bound, but no configuration")
    if bool(rehearsal) != bool(verified.header.get("rehearsal", False)):
        return Finding(claim, "contradicted", "the ledger and the configuration differ on whether it was a rehearsal")
    return Finding(claim, "holds", "its digest is in entry 0")


def _request(evidence: Evidence, verified: Verified) -> Finding:
    claim = "devices were asked for what was reserved"
    if SPEC not in evidence.files:
        return Finding(claim, "not shown", f"there is no {SPEC}")
    try:
        fields: dict[str, Any] = json.loads(evidence.files[SPEC])
        # As `ReleaseSpec.digest` has it: one way to write it, without the fields that say nothing.
        told = {name: value for name, value in fields.items() if value is not None}
        text = json.dumps(told, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError, AttributeError, RecursionError):
        return Finding(claim, "contradicted", f"{SPEC} is no release spec")
    bound = {
        str(entry.body["spec"])
        for entry in verified.entries
        if entry.kind in {"reserve", "debit"} and "spec" in entry.body
    }
    if not bound:
        return Finding(claim, "not shown", "the ledger binds no release spec")
    if bound != {hashlib.sha256(text.encode()).hexdigest()}:
        return Finding(claim, "contradicted", f"{SPEC} is not the one that reservations and debits name")
    return Finding(claim, "holds", "its digest is in the reservation and in every debit")


def _log(evidence: Evidence, verified: Verified) -> Finding:
    claim = "every round that was run was debited"
    if LOG not in evidence.files:
        return Finding(claim, "not shown", f"{LOG} is missing")
    try:
        rounds = {int(row["round"]) for row in evidence.lines(LOG)}
    except (VerificationError, ValueError, KeyError, TypeError):
        return Finding(claim, "not shown", f"{LOG} is no log")
    debited = {entry.body.get("round") for entry in verified.entries if entry.kind == "debit"}
    if not rounds and any(entry.kind == "release" for entry in verified.entries):
        return Finding(claim, "not shown", f"{LOG} is empty: a coordinator of devices keeps none")
    missing = sorted(rounds - debited)
    if missing and verified.entries[0].kind == "open":
        return Finding(claim, "contradicted", f"{LOG} has round {missing[0]}, for which nothing was debited")
    return Finding(claim, "holds", f"{len(rounds)} rounds in the log, each debited")


def _checkpoint(evidence: Evidence, verified: Verified) -> Iterator[Finding]:
    bound = "the checkpoint stands where the ledger says"
    weights = "the shared adapter is what the last release was"
    releases = {entry.hash: entry for entry in verified.entries if entry.kind == "release"}
    if CHECKPOINT not in evidence.files:
        yield Finding(bound, "not shown", "there is no checkpoint")
        return
    try:
        facts: dict[str, Any] = json.loads(evidence.files[CHECKPOINT])
        number, head, digest = int(facts["round"]), str(facts["head"]), str(facts["sha256"])
    except (ValueError, KeyError, TypeError):
        yield Finding(bound, "contradicted", "what should be a checkpoint is none")
        return
    if number == 0:
        if releases:
            yield Finding(bound, "not shown", f"the ledger has releases, the checkpoint none: {INTERRUPTED}")
        else:
            yield Finding(bound, "holds", "nothing was released")
        return
    release = releases.get(head)
    if release is None:
        why = f"it was released under an entry that the ledger lacks ({head[:16]}): cut off, rolled back or rewritten"
        yield Finding(bound, "contradicted", why)
        return
    if release.body.get("round") != number:
        yield Finding(bound, "contradicted", f"it says round {number}, entry {release.index} another")
        return
    later = [entry.index for entry in releases.values() if entry.index > release.index]
    if later:
        yield Finding(bound, "not shown", f"entry {later[0]} released later than the checkpoint: {INTERRUPTED}")
    else:
        yield Finding(bound, "holds", f"round {number}, entry {release.index}")
    if release.body["sha256"] != digest:
        yield Finding(weights, "contradicted", f"its digest is not that of entry {release.index}")
    else:
        yield Finding(weights, "holds", f"its digest is in entry {release.index}")
