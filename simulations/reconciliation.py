"""What a server says happened against what devices say happened, release by release.

A device's ledger has one entry for every release that went through its gate: run, round, spec, event, tensor names,
bytes and a receipt over exactly what left. A server's ledger has one debit and one release per round, and a salted
commitment to the receipts of what it took in. Each side signed its own before it knew what would be asked of the other.

Whoever holds a server's opened receipts and a device's ledger knows in which rounds the device took part. Where a claim
rests on that being secret (noise `central`), that person stands outside the claim; the result says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common.errors import Refusal, VerificationError
from common.events import event_from_json
from common.evidence import HEADS, RECEIPTS, Evidence, commitment
from common.ledger_format import Entry, Head, Verified, verify
from common.wire import ReleaseSpec
from simulations.bindings import Finding
from simulations.recomputation import Verdict, worst

__all__ = ["Reconciliation", "reconcile"]

FEWEST_COHORTS = 25
"""Rounds from which on a fixed cohort size can be told from chance."""

CERTAIN = 1e-6
"""Honest cohorts are accused less often than this."""

DEBITED = "every round in which a device released something is debited by the server"
TAKEN = "what the devices released is in the server's sums"
KNOWN = "what is in the server's sums was released by a device that says so"
COMMITTED = "the server's receipts are those that it committed to before it went on"
MATCHED = frozenset({DEBITED, TAKEN, KNOWN, COMMITTED})
"""The findings that together say whether both sides tell of the same releases."""

OUTSIDE = (
    "whoever reads this next to a device's ledger knows in which rounds the device took part, and stands outside a "
    "claim that rests on that being secret"
)


@dataclass(frozen=True)
class Reconciliation:
    """Both sides of one run.

    Attributes:
        run: The run, as the server's ledger names it.
        devices: How many devices showed their ledgers.
        releases: How many releases of this run they show.
        matched: How many of those the server says it took in, by receipt.
        findings: What was compared, with verdicts.
        missing: Who is missing what, in words.
    """

    run: str
    devices: int
    releases: int
    matched: int
    findings: tuple[Finding, ...]
    missing: tuple[str, ...] = field(default=())

    @property
    def verdict(self) -> Verdict:
        """Contradicted if any finding is; otherwise what the release by release comparison says.

        That nobody kept a head, or that rounds are too few to tell coins from a fixed size, leaves what was matched.
        """
        decisive = [one for one in self.findings if one.verdict == "contradicted" or one.claim in MATCHED]
        return worst([one.verdict for one in decisive])

    @property
    def unmatched(self) -> tuple[Finding, ...]:
        """What keeps it from saying that both sides tell of the same releases, where nothing is contradicted."""
        return tuple(one for one in self.findings if one.claim in MATCHED and one.verdict == "not shown")

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object."""
        return {
            "run": self.run,
            "devices": self.devices,
            "releases": self.releases,
            "matched_by_receipt": self.matched,
            "verdict": self.verdict,
            "findings": [one.to_json() for one in self.findings],
            "missing": list(self.missing),
            "note": OUTSIDE,
        }


@dataclass(frozen=True)
class _Side:
    """One verified ledger with what lay beside it."""

    evidence: Evidence
    verified: Verified

    @property
    def noise(self) -> str:
        """Who adds the noise, as far as a spec is shown."""
        try:
            return ReleaseSpec.from_text(self.evidence.files["spec.json"].decode()).noise
        except (KeyError, UnicodeDecodeError, Refusal):
            return ""

    @property
    def name(self) -> str:
        """A device by the first digits of its random subject."""
        subject = self.verified.header.get("subject")
        return f"device {str(subject)[:8]}" if subject else "the server"


def reconcile(server: Evidence, devices: Sequence[Evidence]) -> Reconciliation:
    """Match what `devices` released in a run with what `server` says of it.

    Raises:
        VerificationError: A ledger does not check out, or one is not of the side that it should be.
    """
    sides = _each_once([_side(one) for one in (server, *devices)])
    central, own = sides[0], sides[1:]
    if "run" not in central.verified.header:
        raise VerificationError(f"{server.name}: not a server's ledger: it is bound to no run")
    for side in own:
        if side.verified.header.get("role") != "device":
            raise VerificationError(f"{side.evidence.name}: not a device's ledger")
    run = str(central.verified.header["run"])
    openings, committed = _openings(central)
    sent = [(side, entry) for side in own for entry in _releases(side.verified.entries, run)]
    missing: list[str] = []
    findings = [
        _one_per_device(own),
        _heads(sides),
        _debited(central, sent),
        _same_price(central, sent),
        _same_tensors(central, sent),
        committed,
    ]
    matched = 0
    if openings is not None:
        findings.append(_cohort_sizes(central, openings))
        received, extra = _received(sent, openings, central, len(own))
        matched = sum(1 for _, entry in sent if entry.body["sha256"] in openings.get(entry.body.get("round"), ()))
        findings += [received, extra]
    missing += _missing(central, own, sent, openings)
    return Reconciliation(run, len(own), len(sent), matched, tuple(findings), tuple(missing))


def _side(evidence: Evidence) -> _Side:
    try:
        return _Side(evidence, verify(evidence.ledger))
    except VerificationError as error:
        raise VerificationError(f"{evidence.name}: {error}") from None


def _each_once(sides: Sequence[_Side]) -> list[_Side]:
    """Leave out a ledger that was handed in twice, of two states of one the shorter."""
    longest: dict[str, _Side] = {}
    for side in sides:
        known = longest.get(side.verified.head.ledger)
        if known is None or known.verified.head.index < side.verified.head.index:
            longest[side.verified.head.ledger] = side
    return list(longest.values())


def _releases(entries: Sequence[Entry], run: str) -> list[Entry]:
    return [entry for entry in entries if entry.kind == "release" and entry.body.get("run") == run]


def _one_per_device(own: Sequence[_Side]) -> Finding:
    claim = "each device showed one ledger of its own"
    subjects = Counter(str(side.verified.header.get("subject")) for side in own)
    writers = Counter(side.verified.head.writer for side in own)
    for counted, what in ((subjects, "subject"), (writers, "key")):
        twice = [name for name, count in counted.items() if count > 1]
        if twice:
            return Finding(
                claim, "contradicted", f"two ledgers have one {what}, {twice[0][:8]}: one person, two budgets"
            )
    return Finding(claim, "holds", f"{len(own)} ledgers, each of another subject and key")


def _heads(sides: Sequence[_Side]) -> Finding:
    """Hold every head that any side kept against the ledger it is of: a rollback shows on whichever side it was."""
    claim = "no ledger lost an entry that another side had seen"
    kept: list[tuple[str, Head]] = []
    for side in sides:
        texts = [entry.body["head"] for entry in side.verified.entries if entry.kind == "receipt"]
        texts += side.evidence.lines(HEADS)
        for text in texts:
            try:
                kept.append((side.name, Head.from_json(text)))
            except (VerificationError, ValueError, KeyError, TypeError):
                return Finding(claim, "contradicted", f"{side.name} shows a head that is none")
    compared = 0
    for side in sides:
        ledger = side.verified.head.ledger
        others = [head for name, head in kept if head.ledger == ledger and name != side.name]
        own = [head for name, head in kept if head.ledger == ledger and name == side.name]
        for head in (*others, *own):
            try:
                verify(side.evidence.ledger, known_heads=[head])
            except VerificationError as error:
                return Finding(claim, "contradicted", f"{side.name}: {error}")
        compared += len(others)
    if not compared:
        return Finding(claim, "not shown", "no side kept a head of another's ledger")
    return Finding(claim, "holds", f"{compared} heads that one side kept of another agree")


def _debited(central: _Side, sent: Sequence[tuple[_Side, Entry]]) -> Finding:
    """A release that a device made in a round is covered by the server's debit of that round."""
    claim = DEBITED
    debited = {
        (entry.body.get("round"), entry.body.get("spec")) for entry in central.verified.entries if entry.kind == "debit"
    }
    if central.verified.entries[0].kind == "compact":
        return Finding(claim, "not shown", "the server's ledger was summed up, and names no rounds before that")
    for side, entry in sent:
        number, spec = entry.body.get("round"), entry.body.get("spec")
        if number not in {known for known, _ in debited}:
            return Finding(
                claim, "contradicted", f"{side.name} released in round {number}, for which the server debited nothing"
            )
        if (number, spec) not in debited:
            return Finding(
                claim,
                "contradicted",
                f"{side.name} was asked under another spec in round {number} than the server debited",
            )
    if not sent:
        return Finding(claim, "not shown", "the devices that are here released nothing in this run")
    return Finding(claim, "holds", f"{len(sent)} releases in {len({e.body.get('round') for _, e in sent})} rounds")


def _same_price(central: _Side, sent: Sequence[tuple[_Side, Entry]]) -> Finding:
    """Both sides charged the same event for the same round."""
    claim = "both sides charged the same noise and the same sampling"
    if central.noise == "distributed":
        why = "devices are charged for what the coordinator could learn, the server's ledger for what outsiders could"
        return Finding(claim, "not shown", why)
    charged = {
        entry.body.get("round"): event_from_json(entry.body["event"])
        for entry in central.verified.entries
        if entry.kind == "debit"
    }
    for side, entry in sent:
        by_index = {one.index: one for one in side.verified.entries}
        debit = by_index.get(entry.body["debit"])
        theirs = charged.get(entry.body.get("round"))
        if debit is None or theirs is None:
            continue
        if event_from_json(debit.body["event"]) != theirs:
            return Finding(
                claim, "contradicted", f"{side.name} charged another event in round {entry.body.get('round')}"
            )
    if not sent:
        return Finding(claim, "not shown", "nothing to compare")
    return Finding(claim, "holds", "event by event")


def _same_tensors(central: _Side, sent: Sequence[tuple[_Side, Entry]]) -> Finding:
    """What devices say left is what the spec names, and nothing beside it."""
    claim = "only the tensors that the run shares left the devices"
    try:
        spec = ReleaseSpec.from_text(central.evidence.files["spec.json"].decode())
    except (KeyError, UnicodeDecodeError, Refusal):
        return Finding(claim, "not shown", "the server shows no release spec")
    if spec.noise == "distributed":
        return Finding(claim, "not shown", "what leaves is masked: the sum alone has the shape that the spec names")
    names = [name for name, _ in spec.tensors]
    shapes = [list(shape) for _, shape in spec.tensors]
    width = 2 if spec.dtype == "float16" else 4
    for side, entry in sent:
        body = entry.body
        if body.get("names") != names or body.get("shapes") != shapes:
            others = sorted(set(body.get("names") or ()) - set(names))
            what = f"{others[0]}, which the run does not share" if others else "other shapes than the run shares"
            return Finding(claim, "contradicted", f"{side.name} released {what}, in round {body.get('round')}")
        if body["bytes"] != width * spec.dim:
            return Finding(
                claim,
                "contradicted",
                f"{side.name} released {body['bytes']:,} bytes in round {body.get('round')}; "
                f"{spec.dim:,} numbers are {width * spec.dim:,}",
            )
    if not sent:
        return Finding(claim, "not shown", "nothing to compare")
    return Finding(claim, "holds", f"{spec.dim:,} numbers in {len(names)} tensors, every time")


def _openings(central: _Side) -> tuple[dict[Any, set[str]] | None, Finding]:
    """The receipts that the server says it took in, by round, held against what its ledger committed to."""
    claim = COMMITTED
    bound = {
        entry.body.get("round"): entry.body["cohort_commitment"]
        for entry in central.verified.entries
        if entry.kind == "release" and "cohort_commitment" in entry.body
    }
    if not bound:
        return None, Finding(claim, "not shown", "its ledger commits to no receipts")
    rows = central.evidence.lines(RECEIPTS)
    if not rows:
        return None, Finding(claim, "not shown", "it shows no receipts; server evidence --receipts would include them")
    found: dict[Any, set[str]] = {}
    try:
        for row in rows:  # a round that was run again after a crash has two lines; the ledger says which counts
            if commitment(str(row["salt"]), [str(one) for one in row["receipts"]]) == bound.get(row["round"]):
                found[row["round"]] = {str(one) for one in row["receipts"]}
    except (KeyError, TypeError):
        return None, Finding(claim, "contradicted", "its receipts are not of the form that it writes")
    if len(found) < len(bound):
        absent = [number for number in bound if number not in found]
        return None, Finding(
            claim, "contradicted", f"the receipts of round {absent[0]} are not those that the ledger commits to"
        )
    return found, Finding(claim, "holds", f"{len(found)} rounds")


def _cohort_sizes(central: _Side, openings: dict[Any, set[str]]) -> Finding:
    """Cohorts drawn by coins spread; a fixed size does not. Whoever is away makes them smaller, never more alike."""
    claim = "the sizes of the cohorts spread as those of coins do"
    reserved = next((entry.body for entry in central.verified.entries if entry.kind == "reserve"), {})
    event = next((entry.body["event"] for entry in central.verified.entries if entry.kind == "debit"), {})
    rate, population = event.get("sampling_rate"), reserved.get("population")
    if not isinstance(rate, int | float) or not isinstance(population, int) or not 0 < rate < 1:
        return Finding(claim, "no claim", "no sampling is claimed")
    sizes = [len(receipts) for receipts in openings.values()]
    if len(sizes) < FEWEST_COHORTS:
        return Finding(claim, "not shown", f"{len(sizes)} rounds are too few to tell; {FEWEST_COHORTS} would do")
    from scipy.stats import chi2

    mean = sum(sizes) / len(sizes)
    spread = sum((size - mean) ** 2 for size in sizes) / max(mean * (1 - rate), 1e-9)
    if chi2.cdf(spread, len(sizes) - 1) < CERTAIN:
        return Finding(claim, "contradicted", f"{len(sizes)} cohorts of nearly one size: they were not drawn by coins")
    return Finding(claim, "holds", f"{len(sizes)} cohorts, mean {mean:.1f}, no more alike than coins make them")


def _received(
    sent: Sequence[tuple[_Side, Entry]], openings: dict[Any, set[str]], central: _Side, devices: int
) -> tuple[Finding, Finding]:
    """What devices sent is in the sum, and what is in the sum was sent."""
    taken, known = TAKEN, KNOWN
    of_round = {entry.body["sha256"]: entry.body.get("round") for _, entry in sent}
    lost = [
        (side.name, entry.body.get("round"))
        for side, entry in sent
        if entry.body["sha256"] not in openings.get(entry.body.get("round"), set())
    ]
    first = (
        Finding(taken, "holds", f"{len(sent)} receipts found")
        if not lost
        else Finding(
            taken,
            "not shown",
            f"{len(lost)} of {len(sent)} releases are in no sum, the first by {lost[0][0]} in round {lost[0][1]}: lost "
            "on the way, or left out by the server",
        )
    )
    unknown = [(number, one) for number, receipts in openings.items() for one in receipts if one not in of_round]
    misplaced = [
        number for number, receipts in openings.items() for one in receipts if of_round.get(one, number) != number
    ]
    population = next(
        (entry.body.get("population") for entry in central.verified.entries if entry.kind == "reserve"), None
    )
    if misplaced:
        return first, Finding(known, "contradicted", f"a release of another round was counted in round {misplaced[0]}")
    if unknown and population == devices:
        return first, Finding(
            known,
            "contradicted",
            f"all {devices} enrolled devices are here, and none made a release that is in round {unknown[0][0]}",
        )
    if unknown:
        return first, Finding(
            known, "not shown", f"{len(unknown)} receipts are of devices that did not show their ledgers"
        )
    return first, Finding(known, "holds", f"{sum(map(len, openings.values()))} receipts, each in a device's ledger")


def _missing(
    central: _Side,
    own: Sequence[_Side],
    sent: Sequence[tuple[_Side, Entry]],
    openings: dict[Any, set[str]] | None,
) -> list[str]:
    said: list[str] = []
    rounds = {entry.body.get("round") for entry in central.verified.entries if entry.kind == "release"}
    debited = {entry.body.get("round") for entry in central.verified.entries if entry.kind == "debit"}
    if debited - rounds:
        said.append(
            f"the server debited {len(debited - rounds)} rounds that it never released: crashes, or rounds in progress"
        )
    for side in own:
        mine = [entry for owner, entry in sent if owner is side]
        if not mine:
            said.append(f"{side.name} shows no release of this run: it was never chosen, or refused")
        elif openings is not None:
            taken = sum(1 for one in mine if one.body["sha256"] in openings.get(one.body.get("round"), set()))
            if taken < len(mine):
                said.append(f"{side.name}: the server has {taken} of its {len(mine)} releases")
    population = next(
        (entry.body.get("population") for entry in central.verified.entries if entry.kind == "reserve"), None
    )
    if isinstance(population, int) and population > len(own):
        said.append(f"{population - len(own):,} of {population:,} enrolled devices did not show their ledgers")
    return said
