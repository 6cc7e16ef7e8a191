"""Signed statements of how much a ledger has debited, which others keep for its writer.

Who restores an old copy of a ledger has forgotten what was spent since. A head that somebody kept shows that, but not
how much; this statement says both, and is handed back to whoever wrote it.
"""

from __future__ import annotations

from typing import Any

from common.errors import VerificationError
from common.keys import SigningKey, VerifyKey
from common.ledger import Head

__all__ = ["check_proof", "sign_proof"]

FORMAT = "homespun-debits-1"


def sign_proof(head: Head, debits: int, key: SigningKey) -> dict[str, Any]:
    """State that the ledger whose last entry is `head` holds so many debits."""
    return {"head": head.to_json(), "debits": debits, "signature": key.sign(_message(head, debits)).hex()}


def check_proof(value: Any, writer: VerifyKey) -> tuple[Head, int]:
    """Read a statement.

    Raises:
        VerificationError: It is not one that `writer` signed.
    """
    try:
        head, count = Head.from_json(value["head"]), value["debits"]
        if not isinstance(count, int) or isinstance(count, bool) or count < 0 or head.writer != writer.hex:
            raise ValueError
        writer.verify(bytes.fromhex(value["signature"]), _message(head, count))
        head.verify()
    except (KeyError, ValueError, TypeError):
        raise VerificationError("not a statement of this writer's ledger") from None
    return head, count


def _message(head: Head, count: int) -> bytes:
    return f"{FORMAT}\n{head.ledger}\n{head.index}\n{head.hash}\n{count}\n".encode()
