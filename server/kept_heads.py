"""How far the ledger of every run got, as this installation saw it: beside the runs' folders, not in them.

A run whose folder was copied and went on elsewhere, or was put back from an old copy, would release under debits that
are used already. It is not continued, and an audit on this machine says why. Whoever puts back this state as well is
found by nobody here; a head on another machine finds them.
"""

from __future__ import annotations

import json
from pathlib import Path

from common.canonical import canonical
from common.errors import VerificationError
from common.evidence import LEDGER
from common.files import make_private_folder, write_private_file
from common.ledger_format import Entry, Head, Verified, verify
from common.places import state_home

__all__ = ["check_head", "check_remembered", "keep_head", "kept_head"]

MOST_CHARACTERS = 64
"""Of the name of a run, which becomes the name of a file."""


def keep_head(run: str, head: Head) -> None:
    """Remember the `head` of a run's ledger; after every round."""
    path = _file(run)
    make_private_folder(path.parent)
    write_private_file(path, canonical(head.to_json()) + b"\n", replace=True)


def kept_head(run: str) -> Head | None:
    """Return the head of a run's ledger that is remembered; None where none was seen.

    Raises:
        VerificationError: What is remembered is damaged.
    """
    path = _file(run)
    try:
        return Head.from_json(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, VerificationError):
        raise VerificationError(f"{path}: not the head of a ledger") from None


def check_head(run: str, entries: tuple[Entry, ...]) -> None:
    """Return if a run's ledger holds what was seen of it.

    Raises:
        VerificationError: It went on in another copy of its folder, or the folder was put back from an old copy.
    """
    head = kept_head(run)
    if head is None or entries[0].kind == "compact":
        return
    if not any((entry.ledger, entry.index, entry.hash) == (head.ledger, head.index, head.hash) for entry in entries):
        raise VerificationError(
            f"this run went on, to entry {head.index} of its ledger, in another copy of its folder; what is here is "
            "older and would release under debits that are used. Continue that copy, or start a new run",
            min(head.index, entries[-1].index),
        )


def check_remembered(verified: Verified, folder: Path) -> None:
    """Hold a run's folder that is audited on this machine against what this machine saw of it.

    Evidence of an earlier day is not older than it should be, so only folders are held against it.

    Raises:
        VerificationError: As for `check_head`.
    """
    run, ledger = verified.header.get("run"), folder / LEDGER
    if not (isinstance(run, str) and len(run) <= MOST_CHARACTERS and run.isalnum() and ledger.is_file()):
        return
    head = kept_head(run)
    if head is None or head.ledger != verified.head.ledger:
        return
    if head.index > verified.head.index:  # a round may have ended since the ledger was read
        content = ledger.read_bytes()
        verified = verify(content[: content.rfind(b"\n") + 1])
    check_head(run, verified.entries)


def _file(run: str) -> Path:
    return state_home() / "heads" / f"{run}.json"
