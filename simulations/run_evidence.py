"""What a run's folder says, held against its ledger: configuration, spec, checkpoint, log and statement.

The ledger is what was signed; everything else in the folder can be edited by whoever holds it. Each check compares one
thing that is said with what the ledger binds, and answers in words. Needs neither torch nor Flower, nor safetensors:
the one tensor that counts is read from the file's own header.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.accountants import epsilon_of
from common.config import load_config, read_config_file
from common.distributed_claims import coordinator_event, distributed_claims
from common.errors import ConfigError, Refusal
from common.events import event_from_json
from common.ledger_format import Verified
from common.promise import promise_of
from common.secure_sum import SecureSum
from common.source import source_digest
from common.wire import ReleaseSpec
from simulations.recomputation import LedgerPrice, Verdict

__all__ = ["Finding", "examine"]

CONFIG, SPEC, CHECKPOINT, LOG, STATEMENT, WITNESSES = (
    "config.toml",
    "spec.json",
    "checkpoint.safetensors",
    "rounds.jsonl",
    "statement.json",
    "witnesses.jsonl",
)
CERTAIN = 1e-6
"""Honest noise fails a test of it less often than this."""

VALUE_BYTES = 4
"""Bytes of one number of the shared vector: the server keeps and hashes it as float32."""

LARGEST_HEADER = 1 << 24
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


def examine(folder: Path, verified: Verified, price: LedgerPrice) -> list[Finding]:
    """Hold everything in a run's folder against its verified ledger; missing files are "not shown"."""
    spec = _spec(folder)
    findings = [_configuration(folder, verified), _code(verified)]
    if isinstance(spec, Finding):
        findings.append(spec)
    else:
        findings += [_spec_is_bound(spec, verified), _schedule(spec, verified), _sizes(spec, verified)]
        findings += [_witnesses(folder, spec)] if spec.witnesses and spec.noise != "local" else []
        findings += [*_secure_sums(folder, spec, verified)] if spec.noise == "distributed" else []
    findings += [_log(folder, verified), *_checkpoint(folder, verified), _statement(folder, price)]
    return findings


def _configuration(folder: Path, verified: Verified) -> Finding:
    claim = "the configuration is the one that the run began with"
    try:
        data = (folder / CONFIG).read_bytes()
    except OSError:
        return Finding(claim, "not shown", f"there is no {CONFIG}")
    bound = verified.header.get("config")
    if bound is None:
        return Finding(claim, "not shown", "the ledger binds no configuration")
    if hashlib.sha256(data).hexdigest() != bound:
        return Finding(claim, "contradicted", f"{CONFIG} is not what entry 0 binds: it was changed after the run began")
    try:
        config = load_config(read_config_file(folder / CONFIG))
    except ConfigError:
        return Finding(claim, "not shown", f"{CONFIG} is the one bound, but not a configuration of this version")
    if config.rehearsal != bool(verified.header.get("rehearsal", False)):
        return Finding(claim, "contradicted", "the ledger and the configuration differ on whether it was a rehearsal")
    return Finding(claim, "holds", "its digest is in entry 0")


def _code(verified: Verified) -> Finding:
    claim = "the run was made by the code that is installed here"
    bound = verified.header.get("source")
    if bound is None:
        return Finding(claim, "not shown", "the ledger binds no code")
    if bound != source_digest():
        return Finding(claim, "not shown", f"it names other code, {str(bound)[:16]}; attack that code, not this")
    return Finding(claim, "holds", "its digest is in entry 0; that this code did run rests on the server's word")


def _spec(folder: Path) -> ReleaseSpec | Finding:
    claim = "devices were asked for what was reserved"
    try:
        return ReleaseSpec.from_text((folder / SPEC).read_text(encoding="utf-8"))
    except OSError:
        return Finding(claim, "not shown", f"there is no {SPEC}")
    except (Refusal, UnicodeDecodeError):
        return Finding(claim, "contradicted", f"{SPEC} is no release spec")


def _spec_is_bound(spec: ReleaseSpec, verified: Verified) -> Finding:
    claim = "devices were asked for what was reserved"
    bound = {
        str(entry.body["spec"])
        for entry in verified.entries
        if entry.kind in {"reserve", "debit"} and "spec" in entry.body
    }
    if not bound:
        return Finding(claim, "not shown", "the ledger binds no release spec")
    if bound != {spec.digest}:
        return Finding(claim, "contradicted", f"{SPEC} is not the one that reservations and debits name")
    return Finding(claim, "holds", "its digest is in the reservation and in every debit")


def _schedule(spec: ReleaseSpec, verified: Verified) -> Finding:
    claim = "the noise and the sampling that devices were told are those that were charged"
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


def _secure_sums(folder: Path, spec: ReleaseSpec, verified: Verified) -> Iterator[Finding]:
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
    try:
        statement = json.loads((folder / STATEMENT).read_text(encoding="utf-8"))
        stated = _number(statement["epsilon"]), _number(statement["coordinator"]["epsilon"])
    except OSError:
        yield Finding(claim, "not shown", f"there is no {STATEMENT}; the run is not finished")
        return
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
        if said < found * (1 - 1e-6):
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


def _witnesses(folder: Path, spec: ReleaseSpec) -> Finding:
    """Test the noise where every device sent zeros; the server wrote them itself, so a liar can write others."""
    claim = "the published noise witnesses have the noise that was promised"
    try:
        lines = (folder / WITNESSES).read_text(encoding="utf-8").splitlines()
        values = np.array([json.loads(line)["values"] for line in lines], dtype=np.float64)
    except OSError:
        return Finding(claim, "not shown", f"there is no {WITNESSES}")
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


def _log(folder: Path, verified: Verified) -> Finding:
    claim = "every round that was run was debited"
    try:
        lines = (folder / LOG).read_text(encoding="utf-8").splitlines()
        rounds = {int(json.loads(line)["round"]) for line in lines}
    except (OSError, ValueError, KeyError, TypeError):
        return Finding(claim, "not shown", f"{LOG} is missing or is no log")
    debited = {entry.body.get("round") for entry in verified.entries if entry.kind == "debit"}
    missing = sorted(rounds - debited)
    if missing and verified.entries[0].kind == "open":
        return Finding(claim, "contradicted", f"{LOG} has round {missing[0]}, for which nothing was debited")
    return Finding(claim, "holds", f"{len(rounds)} rounds in the log, each debited")


def _checkpoint(folder: Path, verified: Verified) -> Iterator[Finding]:
    bound = "the checkpoint stands where the ledger says"
    weights = "the shared adapter is what the last release was"
    releases = {entry.hash: entry for entry in verified.entries if entry.kind == "release"}
    try:
        metadata, digest = _vector_of(folder / CHECKPOINT)
        number, head = int(metadata["round"]), metadata["head"]
    except OSError:
        yield Finding(bound, "not shown", f"there is no {CHECKPOINT}")
        return
    except (ValueError, KeyError, TypeError):
        yield Finding(bound, "contradicted", f"{CHECKPOINT} is no checkpoint")
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


def _vector_of(path: Path) -> tuple[dict[str, str], str]:
    """Return a checkpoint's metadata and the digest of its vector.

    Raises:
        ValueError, KeyError, TypeError: It is no safetensors file with a vector.
    """
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    if length > LARGEST_HEADER:
        raise ValueError("the header is too long")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    start, end = header["vector"]["data_offsets"]
    return header["__metadata__"], hashlib.sha256(data[8 + length + start : 8 + length + end]).hexdigest()


def _statement(folder: Path, price: LedgerPrice) -> Finding:
    claim = "the published statement is no smaller than what was spent"
    try:
        statement = json.loads((folder / STATEMENT).read_text(encoding="utf-8"))
        stated, delta = _number(statement["epsilon"]), float(statement["delta"])
        said = (statement["unit"], statement["adjacency"])
    except OSError:
        return Finding(claim, "not shown", f"there is no {STATEMENT}; the run is not finished")
    except (ValueError, KeyError, TypeError):
        return Finding(claim, "contradicted", f"{STATEMENT} is no statement")
    spent = epsilon_of(price.spent, delta, "pld", price.adjacency) if price.spent and 0 < delta < 1 else 0.0
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
