"""What a run's folder says, held against its ledger: what the ledger binds, noise, prices, counts and statement.

The ledger is what was signed; everything else in the folder can be edited by whoever holds it. Each check compares one
thing that is said with what the ledger says, and answers in words. Needs neither torch nor Flower, nor safetensors:
the one tensor that counts is read from the file's own header.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from common.accountants import epsilon_of
from common.distributed_claims import coordinator_event, distributed_claims
from common.errors import Refusal, VerificationError
from common.events import event_from_json
from common.evidence import Evidence
from common.ledger_format import Verified
from common.noised_counts import NoisedCounts
from common.promise import promise_of
from common.secure_sum import SecureSum
from common.source import source_digest
from common.wire import COUNTS, WITNESS, ReleaseSpec
from simulations.bindings import LOG, SPEC, Finding, bindings
from simulations.recomputation import LedgerPrice

__all__ = ["Finding", "examine"]

STATEMENT, WITNESSES, PUBLISHED = "statement.json", "witnesses.jsonl", "counts.jsonl"
CERTAIN = 1e-6
"""Honest noise fails a test of it less often than this."""

SCHEDULE = "the noise and the sampling that devices were told are those that were charged"

VALUE_BYTES = 4
"""Bytes of one number of the shared vector: the server keeps and hashes it as float32."""

SAFE_IN_LOG = frozenset(
    {
        "round",
        "epsilon_spent",
        "noise_over_clip",
        "seconds",
        "bytes_down_per_user",
        "bytes_up_per_user",
        "left_out",
        "rejected",
        "counts",
    }
)
"""What a round's line may say: nothing that depends on anybody's records without noise. Refusals are
counted, for the operator; `counts` are held against the ledger by themselves."""

SCORES = frozenset({"evaluation", "loss", "losses", "accuracy", "metrics", "nats_per_token", "perplexity"})
"""What is taken from people's records, and is a release of its own."""


def examine(evidence: Evidence, verified: Verified, price: LedgerPrice) -> list[Finding]:
    """Hold everything that lies beside a verified ledger against it; what is missing is "not shown"."""
    findings = bindings(evidence, verified)
    if verified.header.get("role") == "device":
        return [*findings, _door(verified)]
    findings.append(_code(verified))
    try:
        spec = ReleaseSpec.from_text(evidence.files[SPEC].decode()) if SPEC in evidence.files else None
    except (Refusal, UnicodeDecodeError):
        spec = None
        findings.append(Finding(SCHEDULE, "not shown", f"{SPEC} is no release spec of this version"))
    if spec is not None:
        findings += [_schedule(spec, verified), _sizes(spec, verified)]
        findings += [_witnesses(evidence, spec)] if spec.witnesses and spec.noise != "local" else []
        findings += [*_secure_sums(evidence, spec, verified)] if spec.noise == "distributed" else []
        findings.append(_counts(evidence, spec, verified))
    return [*findings, _scores(evidence, verified), _statement(evidence, price)]


def _door(verified: Verified) -> Finding:
    """Each release names its tensors, and their numbers are all the bytes that left."""
    claim = "every byte that left is of a named shared tensor"
    count = 0
    for entry in verified.entries:
        if entry.kind != "release":
            continue
        body = entry.body
        names, shapes = body.get("names"), body.get("shapes")
        if not names or not shapes or len(names) != len(shapes):
            return Finding(claim, "contradicted", f"entry {entry.index} does not name what left")
        width = {"float16": 2, "float32": 4, "float64": 8}.get(str(body.get("dtype")), 0)
        numbers = sum(math.prod(shape) for shape in shapes)
        if body["bytes"] != width * numbers:
            why = f"entry {entry.index} released {body['bytes']:,} bytes; what it names are {width * numbers:,}"
            return Finding(claim, "contradicted", why)
        odd = [name for name in names if "lora_" not in name and name not in (COUNTS, WITNESS)]
        if odd:
            return Finding(
                claim, "contradicted", f"entry {entry.index} released {odd[0]}, which is no part of an adapter"
            )
        count += 1
    return Finding(claim, "holds", f"{count} releases") if count else Finding(claim, "holds", "nothing left")


def _code(verified: Verified) -> Finding:
    claim = "the run was made by the code that is installed here"
    bound = verified.header.get("source")
    if bound is None:
        return Finding(claim, "not shown", "the ledger binds no code")
    if bound != source_digest():
        return Finding(claim, "not shown", f"it names other code, {str(bound)[:16]}; attack that code, not this")
    return Finding(claim, "holds", "its digest is in entry 0; that this code did run rests on the server's word")


def _schedule(spec: ReleaseSpec, verified: Verified) -> Finding:
    claim = SCHEDULE
    promise = promise_of(spec)
    told = promise.event(spec.noise_multiplier)
    for entry in verified.entries:
        if entry.kind == "reserve":
            event = event_from_json(entry.body["event"])
            if event != promise.schedule(spec.noise_multiplier, spec.rounds):
                return Finding(
                    claim, "contradicted", f"entry {entry.index} reserves another schedule than {SPEC} states"
                )
            promised = entry.body.get("epsilon")
            if promised not in (None, "inf") and _number(promised) != _number(spec.epsilon):
                return Finding(claim, "contradicted", f"entry {entry.index} promises {promised}, {SPEC} {spec.epsilon}")
        if entry.kind == "debit" and event_from_json(entry.body["event"]) != told:
            return Finding(claim, "contradicted", f"entry {entry.index} charges another event than {SPEC} states")
    return Finding(claim, "holds", f"noise multiplier {spec.noise_multiplier:.4f}, rate {promise.rate:.4g}")


def _secure_sums(evidence: Evidence, spec: ReleaseSpec, verified: Verified) -> Iterator[Finding]:
    """Hold what is said against the coordinator, in ledger and statement, against the numbers of the spec."""
    claim = "what is promised against the coordinator is what the devices' shares and the participation cap are worth"
    try:
        event, sums = coordinator_event(spec), SecureSum.of(spec)
    except Refusal:
        yield Finding(claim, "contradicted", f"{SPEC} has distributed noise, and no secure sums that any device knows")
        return
    entries = [entry for entry in verified.entries if entry.kind == "coordinator"]
    cost = epsilon_of(event, spec.delta)
    if not entries:
        yield Finding(claim, "contradicted", "the ledger says nothing about the coordinator")
    elif any(event_from_json(entry.body["event"]) != event for entry in entries):
        yield Finding(
            claim, "contradicted", f"entry {entries[0].index} is about other shares or another cap than {SPEC}"
        )
    elif any(cost > _number(entry.body["epsilon"]) * (1 + 1e-6) for entry in entries):
        yield Finding(claim, "contradicted", f"entry {entries[0].index} promises less than the {_words(cost)} it costs")
    else:
        often = f"{sums.participation_cap} rounds at noise multiplier {sums.noise_multiplier:.4f}"
        yield Finding(claim, "holds", f"{_words(cost)} for {often}")
    claim = "the published statements are those that follow from the spec and the debits, to each of two adversaries"
    debits = sum(1 for entry in verified.entries if entry.kind == "debit")
    if STATEMENT not in evidence.files:
        yield Finding(claim, "not shown", f"there is no {STATEMENT}; the run is not finished")
        return
    try:
        statement = json.loads(evidence.files[STATEMENT])
        stated = _number(statement["epsilon"]), _number(statement["coordinator"]["epsilon"])
    except (ValueError, KeyError, TypeError):
        yield Finding(claim, "contradicted", f"{STATEMENT} does not name both")
        return
    if not debits:
        yield Finding(claim, "holds", "nothing was debited")
        return
    claims = distributed_claims(spec, debits)
    for who, said, found in zip(
        ("outsiders", "the coordinator"), stated, (claims.outsiders.epsilon, claims.coordinator.epsilon), strict=True
    ):
        if not said >= found * (1 - 1e-6):  # what is no number is no promise
            why = f"against {who} it states epsilon {_words(said)}; {_words(found)} follows"
            yield Finding(claim, "contradicted", why)
            return
    yield Finding(claim, "holds", f"{_words(stated[0])} against outsiders, {_words(stated[1])} against the coordinator")


def _sizes(spec: ReleaseSpec, verified: Verified) -> Finding:
    claim = "what was released is the shared vector and nothing more"
    expected = VALUE_BYTES * spec.model_dim
    for entry in verified.entries:
        if entry.kind == "release" and entry.body["bytes"] != expected:
            why = f"entry {entry.index} released {entry.body['bytes']} bytes; {spec.model_dim} numbers are {expected}"
            return Finding(claim, "contradicted", why)
    return Finding(claim, "holds", f"every release is {expected} bytes: {spec.model_dim} numbers")


def _witnesses(evidence: Evidence, spec: ReleaseSpec) -> Finding:
    """Test the noise where every device sent zeros; the server wrote them itself, so a liar can write others."""
    claim = "the published noise witnesses have the noise that was promised"
    if WITNESSES not in evidence.files:
        return Finding(claim, "not shown", f"there is no {WITNESSES}")
    try:
        lines = evidence.files[WITNESSES].decode().splitlines()
        values = np.array([json.loads(line)["values"] for line in lines], dtype=np.float64)
    except (ValueError, KeyError, TypeError):
        return Finding(claim, "contradicted", f"{WITNESSES} holds something else than numbers")
    if values.ndim != 2 or values.shape[1] != spec.witnesses or not np.isfinite(values).all():
        return Finding(claim, "contradicted", f"{WITNESSES} does not hold {spec.witnesses} numbers per round")
    if spec.extrapolation != 1.0:
        return Finding(claim, "not shown", "the noise was scaled down for a study, and nothing is claimed")
    from scipy.stats import chi2

    scale = spec.noise_multiplier * spec.clip
    share = float(np.sqrt(np.mean(values**2))) / scale
    if chi2.cdf(float((values**2).sum()) / scale**2, values.size) < CERTAIN:
        return Finding(claim, "contradicted", f"the noise has {share:.3f} of the standard deviation that was promised")
    worst = min(float(chi2.cdf(float((row**2).sum()) / scale**2, row.size)) for row in values)
    if worst < CERTAIN / len(values):
        return Finding(claim, "contradicted", "one round has less noise than was promised")
    if len(np.unique(values, axis=0)) < len(values):
        return Finding(claim, "contradicted", "two rounds have the same noise: it comes from a fixed seed")
    return Finding(claim, "holds", f"{len(values)} rounds, {share:.3f} of the promised standard deviation")


def _counts(evidence: Evidence, spec: ReleaseSpec, verified: Verified) -> Finding:
    """What was published beside the adapter: by name, and by the digest that each release entry holds."""
    claim = "what was published beside the adapter was charged with it, and nothing else was"
    own = NoisedCounts.of(spec)
    bound = {
        int(entry.body.get("round", 0)): str(entry.body["counts"])
        for entry in verified.entries
        if entry.kind == "release" and "counts" in entry.body
    }
    lines = evidence.files.get(PUBLISHED, b"").splitlines()
    if own is None:
        if lines or bound:
            return Finding(claim, "contradicted", f"counts were published, and {SPEC} charges for none")
        return Finding(claim, "holds", "nothing was")
    names = {"round", "clip", *own.names, *(f"{name}_noise" for name in own.metrics)}
    seen = set[Any]()
    for line in lines:
        try:
            counts = json.loads(line)
            number, odd = counts["round"], set(counts) - names
        except (ValueError, KeyError, TypeError):
            return Finding(claim, "contradicted", f"{PUBLISHED} holds something else than counts")
        if odd:
            return Finding(
                claim, "contradicted", f"round {number} published {min(odd)}, which {SPEC} does not charge for"
            )
        if number in bound and bound[number] != hashlib.sha256(line).hexdigest():
            return Finding(claim, "contradicted", f"the counts of round {number} are not those that its release names")
        seen.add(number)
    missing = sorted(number for number in bound if number not in seen)
    if missing:
        return Finding(claim, "not shown", f"the counts of round {missing[0]} are not in {PUBLISHED}")
    if seen - set(bound) and verified.entries[0].kind == "open":
        return Finding(claim, "contradicted", f"{PUBLISHED} has a round that no release names")
    return Finding(claim, "holds", f"{len(own.names)} beside the adapter in each of {len(bound)} rounds")


def _scores(evidence: Evidence, verified: Verified) -> Finding:
    """Scores taken from people's records without noise are releases that nobody charged."""
    claim = "no score of anyone's records was collected without noise"
    try:
        rows = evidence.lines(LOG)
    except VerificationError:
        rows = []
    if not rows:
        return Finding(claim, "not shown", f"{LOG} is missing, empty or no log")
    found = {str(name) for row in rows for name in (*row.keys(), *(row.get("left_out") or ()))} - SAFE_IN_LOG
    if not found:
        return Finding(claim, "holds", "the log has none")
    if verified.header.get("role") == "study":
        return Finding(
            claim,
            "holds",
            "a study on one machine, which releases nothing; whoever passes its scores on releases them, without noise",
        )
    if found & SCORES:
        why = f"the log has {', '.join(sorted(found & SCORES))} of people's records, for which nothing was debited"
        return Finding(claim, "contradicted", why)
    return Finding(claim, "not shown", f"the log has {', '.join(sorted(found))}, which this version does not know")


def _statement(evidence: Evidence, price: LedgerPrice) -> Finding:
    claim = "the published statement is no smaller than what was spent"
    if STATEMENT not in evidence.files:
        return Finding(claim, "not shown", f"there is no {STATEMENT}; the run is not finished")
    try:
        statement = json.loads(evidence.files[STATEMENT])
        stated, delta = _number(statement["epsilon"]), float(statement["delta"])
        said = (statement["unit"], statement["adjacency"])
    except (ValueError, KeyError, TypeError):
        return Finding(claim, "contradicted", f"{STATEMENT} is no statement")
    if math.isnan(stated) or not 0 < delta < 1:
        return Finding(claim, "contradicted", f"{STATEMENT} states no epsilon at a delta between 0 and 1")
    spent = epsilon_of(price.spent, delta, "pld", price.adjacency) if price.spent else 0.0
    if stated < spent * (1 - 1e-6) - 1e-9:
        return Finding(
            claim, "contradicted", f"it states epsilon {stated:.3f}; {_words(spent)} was spent at that delta"
        )
    if delta > price.delta * (1 + 1e-9):
        return Finding(claim, "contradicted", f"it states delta {delta:.3g}; {price.delta:.3g} was promised")
    if price.spent and said != (price.unit, price.adjacency.value):
        return Finding(claim, "contradicted", f"it is about {said[0]}, {said[1]}; the ledger promises {price.unit}")
    if price.is_rehearsal and not statement.get("rehearsal", False):
        return Finding(claim, "contradicted", "it claims a rehearsal")
    return Finding(claim, "holds", f"it states {_words(stated)}, {_words(spent)} was spent")


def _number(value: Any) -> float:
    return math.inf if value == "inf" else float(value)


def _words(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "no finite epsilon"
