"""What the owner of a device hands to an auditor: its ledger, what was granted, and heads that others signed.

It shows what left and when, under which runs, to whom the owner gives it; it holds no tensor, no record and no name
but the random one of the ledger.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from client.device_home import HEAD, LEDGER, POLICY, DeviceHome
from client.membership import STANDING
from client.policy import SIGNATURE_SUFFIX
from common.canonical import canonical
from common.evidence import HEADS, write_evidence
from common.ledger_kinds import is_head

__all__ = ["write_device_evidence"]


def write_device_evidence(home: DeviceHome, out: Path, *, time: str) -> dict[str, Any]:
    """Write the evidence of this device as one signed zip, and return its manifest.

    Works beside a vault that is running.

    Raises:
        StoreError, VerificationError: The ledger is gone, or does not check out; nothing is written.
    """
    verified = home.read_ledger()
    files: dict[str, bytes] = {}
    content = (home.folder / LEDGER).read_bytes()
    lines = content.splitlines(keepends=True)[: len(verified.entries)]
    files["ledger.jsonl"] = b"".join(lines)
    for name in (POLICY, POLICY + SIGNATURE_SUFFIX):
        if (home.folder / name).is_file():
            files[name] = (home.folder / name).read_bytes()
    heads = [entry.body["head"] for entry in verified.entries if entry.kind == "receipt"]
    heads += _kept_of_others(home)
    if (home.folder / HEAD).is_file():
        heads.append(json.loads((home.folder / HEAD).read_bytes()))
    files[HEADS] = b"".join(canonical(head) + b"\n" for head in heads)
    return write_evidence(out, files, role="device", head=verified.head.to_json(), key=home.key, time=time)


def _kept_of_others(home: DeviceHome) -> list[dict[str, Any]]:
    """Heads that coordinators signed and this device keeps, those that a coordinator went back on among them."""
    try:
        proofs = json.loads((home.folder / STANDING).read_bytes())["proofs"]
        return [proof["head"] for proof in proofs if is_head(proof["head"])]
    except (OSError, ValueError, KeyError, TypeError):
        return []
