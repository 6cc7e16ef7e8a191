"""`homespun audit ...`: checks that need nothing but the wheel and the files that are checked.

Starts in a fraction of a second: neither torch nor Flower nor an accountant is imported before it is needed.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from common.errors import DataError, VerificationError

if TYPE_CHECKING:
    from common.ledger_format import Head, Verified

__all__ = ["app"]

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    help="Check ledgers and recompute what was spent, trusting nobody.",
    rich_markup_mode=None,
)

Paths = Annotated[list[Path], typer.Argument(help="ledger files, or run folders that hold ledger.jsonl")]
Json = Annotated[bool, typer.Option("--json", help="print JSON instead of text")]
LEDGER = "ledger.jsonl"


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
    """Verify chains and signatures: one line per ledger; exit code 4 when one does not check out.

    Example: homespun audit verify runs/latest
    """
    from common.ledger_format import verify as verify_ledger

    heads = [one for path in head or [] for one in _heads(path)]
    results: list[dict[str, Any]] = []
    for path in paths:
        file = _ledger_file(path)
        try:
            known = [one for one in heads if _concerns(one, file)]
            verified = verify_ledger(file.read_bytes(), known_heads=known, public_keys=key or None)
        except VerificationError as error:
            results.append({"ledger": str(file), "verified": False, "reason": str(error), "entry": error.entry})
        else:
            results.append({"ledger": str(file), "verified": True, **_facts(verified)})
    if as_json:
        print(json.dumps(results))
    else:
        for result in results:
            print(_line(result))
    return 0 if all(result["verified"] for result in results) else 4


@app.command("recompute")
def recompute(paths: Paths, as_json: Json = False) -> int:
    """Recompute epsilon from the events in the ledgers, with two accountants, and compare with what was promised.

    Example: homespun audit recompute runs/latest
    """
    results = [_recomputed(_ledger_file(path)) for path in paths]
    if as_json:
        print(json.dumps(results))
    else:
        for result in results:
            print(_recomputed_text(result))
    return 0 if all(result["verdict"] != "contradicted" for result in results) else 4


def _recomputed(file: Path) -> dict[str, Any]:
    """Price every debit of one ledger, and what was reserved; the ledger is verified first."""
    from common.accountants import Accountant, accountant_version, epsilon_of
    from common.events import event_from_json
    from common.ledger_format import verify as verify_ledger

    verified = verify_ledger(file.read_bytes())
    promise = next((entry.body for entry in verified.entries if entry.kind == "reserve"), None)
    if promise is None or "delta" not in promise:
        raise DataError(f"{file}: the ledger states no delta, so there is no promise to compare with")
    delta = float(promise["delta"])
    spent = [event_from_json(entry.body["event"]) for entry in verified.entries if entry.kind == "debit"]
    claimed = math.inf if promise["epsilon"] == "inf" else float(promise["epsilon"])
    both: tuple[Accountant, ...] = ("pld", "rdp")
    prices = {name: (epsilon_of(spent, delta, name) if spent else 0.0) for name in both}
    reserved = epsilon_of([event_from_json(promise["event"])], delta) if math.isfinite(claimed) else math.inf
    holds = math.isinf(claimed) or max(prices["pld"], reserved) <= claimed * (1 + 1e-6)
    return {
        "ledger": str(file),
        "rehearsal": bool(verified.header.get("rehearsal", False)),
        "unit": promise.get("unit"),
        "adjacency": promise.get("adjacency"),
        "delta": delta,
        "debits": len(spent),
        "claimed_epsilon": _plain(claimed),
        "reserved_epsilon": _plain(reserved),
        "spent_epsilon": {accountant_version(name): _plain(value) for name, value in prices.items()},
        "verdict": "no claim" if math.isinf(claimed) else "holds" if holds else "contradicted",
    }


def _recomputed_text(result: dict[str, Any]) -> str:
    if result["verdict"] == "no claim":
        return f"{result['ledger']}: no privacy claim was made; {result['debits']} releases without one"
    prices = ", ".join(f"{value:.3f} by {name}" for name, value in result["spent_epsilon"].items())
    rehearsal = " This was a rehearsal: nothing is claimed." if result["rehearsal"] else ""
    return (
        f"{result['ledger']}: {result['verdict']}. Promised epsilon {result['claimed_epsilon']:g} at delta "
        f"{result['delta']:.3g} per {result['unit']} ({result['adjacency']}); {result['debits']} debits cost {prices}; "
        f"the whole reservation costs {result['reserved_epsilon']:.3f}.{rehearsal}"
    )


def _ledger_file(path: Path) -> Path:
    file = path / LEDGER if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"{path}: no ledger here")
    return file


def _heads(path: Path) -> list[Head]:
    from common.ledger_format import Head

    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [Head.from_json(json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a file of signed heads ({type(error).__name__})") from None


def _concerns(head: Head, file: Path) -> bool:
    """Whether a kept head is of this ledger: heads of several may lie in one file."""
    return head.ledger.encode() in file.read_bytes()[:20_000]


def _facts(verified: Verified) -> dict[str, Any]:
    return {
        "ledger_id": verified.head.ledger,
        "role": verified.header.get("role"),
        "entries": verified.head.index + 1,
        "debits": sum(1 for entry in verified.entries if entry.kind == "debit"),
        "rehearsal": bool(verified.header.get("rehearsal", False)),
        "head": verified.head.hash,
        "rollback_evidence": verified.rollback_evidence,
    }


def _line(result: dict[str, Any]) -> str:
    if not result["verified"]:
        return f"{result['ledger']}: DOES NOT CHECK OUT: {result['reason']}"
    return (
        f"{result['ledger']}: verified, {result['entries']} entries, {result['debits']} debits, "
        f"head {result['head'][:16]}; rollback evidence: {result['rollback_evidence']}"
    )


def _plain(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
