"""`homespun audit ...`: checks that need nothing but the wheel and the files that are checked.

Starts in a fraction of a second: neither torch nor Flower nor an accountant is imported before it is needed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import DataError, VerificationError
from simulations import audit_report_cli

if TYPE_CHECKING:
    from common.ledger_format import Head, Verified
    from simulations.bindings import Finding
    from simulations.recomputation import LedgerPrice

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Check ledgers and recompute what was spent, trusting nobody.",
    rich_markup_mode=None,
)

audit_report_cli.add_to(app)

Paths = Annotated[list[Path], typer.Argument(help="zips of evidence, run folders, or ledger files")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]


@app.command("verify")
def verify(
    paths: Paths,
    head: Annotated[
        list[Path] | None, typer.Option(help="file of signed heads that somebody else kept, one JSON object per line")
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option(help="public key, hex, whose entries are accepted; repeatable")
    ] = None,
    as_json: Json = False,
) -> int:
    """Verify chains, signatures, kept heads and what a ledger binds of the files beside it; exit code 4 when one fails.

    One line per ledger or signed report.

    Example: homespun audit verify runs/latest server.zip audit-report/audit.html
    """
    from common.evidence import read_evidence
    from common.ledger_format import verify as verify_ledger
    from server.kept_heads import check_remembered
    from simulations.bindings import bindings

    heads = [one for path in head or [] for one in _heads(path)]
    results: list[dict[str, Any]] = []
    for path in paths:
        try:
            if _is_signed(path):
                results.append(_signature(path, key or []))
                continue
            evidence = read_evidence(path)
            known = [one for one in heads if _concerns(one, evidence.ledger)]
            verified = verify_ledger(evidence.ledger, known_heads=known, public_keys=key or None)
            if evidence.manifest is not None and evidence.manifest["public_key"] != verified.head.writer:
                raise VerificationError("the zip is signed with another key than its ledger")
            check_remembered(verified, path)
            found = [] if evidence.is_bare else bindings(evidence, verified)
            broken = [one.why for one in found if one.verdict == "contradicted"]
            if broken:
                raise VerificationError("; ".join(broken))
        except VerificationError as error:
            reason = str(error).removeprefix(f"{path}: ")
            results.append({"ledger": str(path), "verified": False, "reason": reason, "entry": error.entry})
        else:
            results.append({"ledger": str(path), "verified": True, **_facts(verified, found)})
    if as_json:
        print(json.dumps(results))
    else:
        for result in results:
            print(_line(result))
    return 0 if all(result["verified"] for result in results) else 4


@app.command("recompute")
def recompute(
    paths: Paths,
    budget: Annotated[
        float | None, typer.Option(help="epsilon granted for everything together", show_default=False, min=0)
    ] = None,
    as_json: Json = False,
) -> int:
    """Recompute epsilon from the events in the ledgers, by three accountants, and hold it against what was promised.

    A run's folder is held against its ledger as well. Exit code 4 when something is contradicted.

    Example: homespun audit recompute runs/monday runs/tuesday --budget 10
    """
    from simulations.recomputation import totals, worst

    results: list[dict[str, Any]] = []
    prices: list[LedgerPrice] = []
    for path in paths:
        result, price = _recomputed(path)
        results.append(result)
        prices += [price] if price is not None else []
    summed = totals(prices, budget=budget)
    parts = [*summed["data_sets"], *summed["subjects"], summed["organization"]]
    verdicts = [result["verdict"] for result in results]
    verdict = worst([*verdicts, *(part["verdict"] for part in parts if budget is not None)])
    if as_json:
        print(json.dumps({"verdict": verdict, "ledgers": results, "totals": summed}))
    else:
        for result in results:
            print("\n".join(_recomputed_lines(result)))
        if len(prices) > 1 or budget is not None:
            print("\n".join(_total_lines(summed)))
        print(f"verdict: {verdict}")
    return 4 if verdict == "contradicted" else 0


def _recomputed(path: Path) -> tuple[dict[str, Any], LedgerPrice | None]:
    """Price one ledger, and hold the run's folder around it against it; the ledger is verified first."""
    from common.evidence import read_evidence
    from common.ledger_format import verify as verify_ledger
    from simulations.recomputation import price_ledger, worst
    from simulations.run_evidence import examine

    try:
        evidence = read_evidence(path)
        verified = verify_ledger(evidence.ledger)
        price = price_ledger(verified, str(path))
    except VerificationError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return {"ledger": str(path), "verdict": "contradicted", "faults": [f"does not check out: {reason}"]}, None
    is_alone = evidence.is_bare and verified.header.get("role") != "device"
    findings = [] if is_alone else examine(evidence, verified, price)
    result = price.to_json()
    result["findings"] = [finding.to_json() for finding in findings]
    # What a folder fails to show does not take back what the ledger does show.
    result["verdict"] = worst([price.verdict, *(one.verdict for one in findings if one.verdict == "contradicted")])
    return result, price


def _recomputed_lines(result: dict[str, Any]) -> list[str]:
    lines = [f"{result['ledger']}: {result['verdict']}"]
    lines += [f"  contradicted: {fault}" for fault in result["faults"]]
    if "spent" not in result:
        return lines
    amounts = result["promised_epsilon"] or ([result["granted_epsilon"]] if result["granted_epsilon"] else [])
    promised = ", ".join(_amount(epsilon) for epsilon in amounts) or "nothing"
    word = "granted" if result["granted_epsilon"] and not result["promised_epsilon"] else "promised"
    lines.append(
        f"  {word}: epsilon {promised} at delta {result['delta']:.3g} per {result['unit']} ({result['adjacency']}); "
        f"what was reserved costs {_amount(result['reserved_epsilon'])} as a whole"
    )
    for known in result["against_the_coordinator"]:
        lines.append(
            f"  against the coordinator, who knows who takes part: promised epsilon "
            f"{_amount(known['promised_epsilon'])}, a user at the participation cap costs {_amount(known['epsilon'])}"
        )
    lines.append(f"  spent, {result['debits']} debits: {_prices(result['spent'])}")
    lines.append(f"  {result['spent']['difference']}")
    lines.append(f"  {_readings(result['spent'])}")
    if result["rehearsal"]:
        lines.append("  this was a rehearsal: nothing is claimed")
    else:
        lines.append(f"  {result['spent']['people']}")
    return lines + [f"  {one['verdict']}: {one['claim']} ({one['why']})" for one in result["findings"]]


def _total_lines(summed: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    groups = [(f"data set {part['data'][:16]}", part) for part in summed["data_sets"]]
    groups += [(f"subject {part['subject'][:16]}", part) for part in summed["subjects"]]
    groups += [(f"base model {part['model'][:16]}", part) for part in summed["models"]]
    for name, part in [*groups, ("everything together", summed["organization"])]:
        count = f"{len(part['ledgers'])} ledgers"
        if "spent" in part:
            lines.append(f"{name}, {count}: {part['verdict']}. Spent: {_prices(part['spent'])}; {part['why']}")
        else:
            lines.append(f"{name}, {count}: {part['verdict']}: {part['why']}")
    if "spent" in summed["organization"]:
        lines.append(f"  {summed['organization']['spent']['people']}")
    lines += [f"left out, a rehearsal: {name}" for name in summed["left_out"]]
    return lines


def _readings(spent: dict[str, Any]) -> str:
    """The same cost as mu, at other deltas, and as an attacker's best."""
    curve = ", ".join(f"{_amount(epsilon)} at {delta:.0e}" for delta, epsilon in spent["curve"])
    caught = 100 * spent["true_positive_rate_at_1_percent"]
    mu = _amount(spent["equivalent_mu"])
    return f"as a Gaussian mechanism: mu {mu}; an attacker's best at 1 % false alarms: {caught:.1f} %; epsilon {curve}"


def _prices(spent: dict[str, Any]) -> str:
    return ", ".join(f"epsilon {_amount(value)} by {name}" for name, value in spent["epsilon"].items())


def _amount(epsilon: float | str) -> str:
    return epsilon if isinstance(epsilon, str) else f"{epsilon:.3f}"


@app.command("attack")
def attack(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    seed: Annotated[int | None, typer.Option(help="repeat an attack's coins and canaries", show_default=False)] = None,
    trials: Annotated[int, typer.Option(help="of the mechanism test", min=200)] = 20_000,
    as_json: Json = False,
) -> int:
    """Attack a simulated run: the mechanism, the global adapter, the private adapters; writes attacks.json into it.

    Every number stands beside the most that the test could have shown. Exit code 4 when a claim is contradicted.

    Example: homespun audit attack runs/latest
    """
    from simulations.attacks import ATTACKS, Effort, attack_run

    say = (lambda text: None) if as_json else print  # noqa: ARG005
    report = attack_run(run, effort=Effort(trials=trials), seed=seed, say=say)
    if as_json:
        print(json.dumps(report))
    else:
        if not report["code_is_that_of_the_run"]:
            print("the run was made by other code than is installed here: what was attacked is this code's mechanism")
        print(f"verdict: {report['verdict']}; {run / ATTACKS}, {report['seconds']:.0f} s")
    return 4 if report["verdict"] == "contradicted" else 0


def _heads(path: Path) -> list[Head]:
    from common.ledger_format import Head

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Head.from_json(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a file of signed heads ({type(error).__name__})") from None


def _concerns(head: Head, ledger: bytes) -> bool:
    """Whether a kept head is of this ledger: heads of several may lie in one file."""
    return head.ledger.encode() in ledger[:20_000]


def _is_signed(path: Path) -> bool:
    """Whether a file has a detached signature beside it; a ledger carries its own."""
    return path.is_file() and path.with_name(path.name + ".sig").is_file()


def _signature(path: Path, keys: list[str]) -> dict[str, Any]:
    from simulations.signatures import check_beside, check_signature

    signed = check_signature(path)
    check_beside(path)
    if keys and signed.signer not in keys:
        raise VerificationError(f"signed by {signed.signer[:16]}, which is not among the public keys")
    return {"ledger": str(path), "verified": True, "signature": signed.to_json()}


def _facts(verified: Verified, bound: Sequence[Finding]) -> dict[str, Any]:
    return {
        "ledger_id": verified.head.ledger,
        "role": verified.header.get("role"),
        "entries": verified.head.index + 1,
        "debits": sum(1 for entry in verified.entries if entry.kind == "debit"),
        "rehearsal": bool(verified.header.get("rehearsal", False)),
        "head": verified.head.hash,
        "rollback_evidence": verified.rollback_evidence,
        "bindings": [one.to_json() for one in bound],
    }


def _line(result: dict[str, Any]) -> str:
    if not result["verified"]:
        return f"{result['ledger']}: DOES NOT CHECK OUT: {result['reason']}"
    if "signature" in result:
        by = result["signature"]
        return f"{result['ledger']}: signed by {by['name'] or 'nobody named'}, key {by['signer']}, {by['time']}"
    held = sum(1 for one in result["bindings"] if one["verdict"] == "holds")
    missing = [one["why"] for one in result["bindings"] if one["verdict"] == "not shown"]
    words = (
        f"; {held} of {len(result['bindings'])} things that it binds are here and agree" if result["bindings"] else ""
    )
    words += f" ({'; '.join(missing)})" if missing else ""
    return (
        f"{result['ledger']}: verified, {result['entries']} entries, {result['debits']} debits, "
        f"head {result['head'][:16]}{words}; rollback evidence: {result['rollback_evidence']}"
    )
