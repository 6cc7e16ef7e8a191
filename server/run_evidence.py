"""What a server hands to an auditor about one run: everything that binds it, and nothing about any user.

The log is cut to what says nothing about anyone's records; the names of what was left out are kept, so that an auditor
sees that it was there. The receipts of who answered are left out unless they are asked for: who holds them and a
device's ledger knows who took part, and stands outside a claim that rests on that being secret.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.canonical import canonical
from common.errors import DataError, VerificationError
from common.evidence import (
    CHECKPOINT,
    HEADS,
    LEDGER,
    RECEIPTS,
    WEIGHTS,
    checkpoint_facts,
    in_reading_order,
    write_evidence,
)
from common.keys import SigningKey
from common.ledger import verify

__all__ = ["collect", "write_run_evidence"]

AS_THEY_ARE = ("config.toml", "spec.json", "statement.json", "witnesses.jsonl", "counts.jsonl", "attacks.json")
LOG = "rounds.jsonl"
SAFE_IN_LOG = ("round", "epsilon_spent", "noise_over_clip", "seconds", "bytes_down_per_user", "bytes_up_per_user")
"""Of a round's line: what does not depend on anybody's records or on who answered."""


def collect(folder: Path, *, receipts: bool = False) -> dict[str, bytes]:
    """Gather the evidence of the run in `folder`, contents by name.

    Args:
        folder: The run.
        receipts: With the receipts of what devices sent and the heads of their ledgers, for an auditor who is to
            reconcile both sides.

    Raises:
        DataError: There is no run here.
        VerificationError: A file of it is not what it should be.
    """
    if not (folder / LEDGER).is_file():
        raise DataError(f"{folder}: no run in this folder")
    files: dict[str, bytes] = {}
    if (folder / WEIGHTS).is_file():
        try:
            files[CHECKPOINT] = canonical(checkpoint_facts(folder / WEIGHTS))
        except (ValueError, KeyError, TypeError):
            raise VerificationError(f"{folder / WEIGHTS}: no checkpoint") from None
    # How far a device's ledger got follows how often it took part.
    wanted = (*AS_THEY_ARE, LOG, LEDGER, *((RECEIPTS, HEADS) if receipts else ()))
    for name in in_reading_order(wanted):
        if (folder / name).is_file():
            files[name] = _log(folder / name) if name == LOG else (folder / name).read_bytes()
    files[LEDGER] = files[LEDGER][: files[LEDGER].rfind(b"\n") + 1]  # a line that is being written is not there yet
    return files


def write_run_evidence(
    folder: Path, out: Path, key: SigningKey, *, time: str, receipts: bool = False
) -> dict[str, Any]:
    """Write the evidence of the run in `folder` as one signed zip, and return its manifest.

    Raises:
        DataError: There is no run here.
        VerificationError: Its ledger does not check out, or is not signed with `key`; nothing is written.
    """
    files = collect(folder, receipts=receipts)
    verified = verify(files[LEDGER])
    if verified.head.writer != key.verify_key.hex:
        raise VerificationError(f"{folder}: its ledger is signed with another key than this installation's")
    role = str(verified.header["role"])
    return write_evidence(out, files, role=role, head=verified.head.to_json(), key=key, time=time)


def _log(path: Path) -> bytes:
    kept: list[bytes] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row: dict[str, Any] = json.loads(line)
            cut: dict[str, Any] = {name: row[name] for name in SAFE_IN_LOG if name in row}
            left_out = sorted(row.keys() - set(SAFE_IN_LOG))
        except (ValueError, AttributeError):
            continue  # a line that is being written
        kept.append(canonical(cut | ({"left_out": left_out} if left_out else {})) + b"\n")
    return b"".join(kept)
