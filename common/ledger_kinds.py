"""The closed list of ledger entries: which kinds there are, and what each must and may hold.

Every value has a checked form. There is no field for free text, so nothing a user wrote can end up in a ledger; an
`event` is an object that `common.accounting` checks against its own closed list.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, cast

from common.canonical import SAFE_INTEGER

__all__ = ["ENTRY_CHECKS", "KEPT_BY_COMPACTION", "KINDS", "check_body", "is_head"]

HEAD_FORMAT = "homespun-head-1"

Json = dict[str, Any]
Check = Callable[[Any], bool]


def check_body(kind: str, body: Json) -> None:
    """Return if `body` is what `kind` allows.

    Raises:
        ValueError: An unknown kind or field, a missing field, or a value of the wrong form; never shows a value.
    """
    if kind not in KINDS:
        raise ValueError("unknown kind")
    required, optional = KINDS[kind]
    missing = required - body.keys()
    if missing:
        raise ValueError(f"{kind} lacks {', '.join(sorted(missing))}")
    if not body.keys() <= required | optional:
        raise ValueError(f"{kind} has a field that it may not have")
    for name, value in body.items():
        if not _FIELDS[name](value):
            raise ValueError(f"{kind}: {name} is malformed")
    if kind == "open":
        absent = ROLES[body["role"]] - body.keys()
        if absent:
            raise ValueError(f"open for role {body['role']} lacks {', '.join(sorted(absent))}")


def _text(pattern: str) -> Check:
    expression = re.compile(pattern)
    return lambda value: isinstance(value, str) and expression.fullmatch(value) is not None


def _list_of(check: Check) -> Check:
    return lambda value: isinstance(value, list) and all(map(check, cast(list[Any], value)))


def _one_of(*values: str) -> Check:
    return lambda value: isinstance(value, str) and value in values


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= SAFE_INTEGER


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def _is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value == "inf" or (number and value >= 0)


_is_digest = _text("[0-9a-f]{64}")
_is_id = _text("[0-9a-f]{16,64}")
_is_word = _text("[A-Za-z0-9_][A-Za-z0-9_.:+/@-]{0,254}")
_is_signature = _text("[0-9a-f]{128}")


def is_head(value: Any) -> bool:
    """Tell whether it is the JSON form of a signed head."""
    checks: dict[str, Check] = {
        "format": _one_of(HEAD_FORMAT),
        "ledger": _is_digest,
        "index": _is_count,
        "hash": _is_digest,
        "writer": _is_digest,
        "signature": _is_signature,
    }
    if not isinstance(value, dict) or cast(Json, value).keys() != checks.keys():
        return False
    return all(check(value[name]) for name, check in checks.items())


def _is_total(value: Any) -> bool:
    """Tell whether it is `{body, count, index, kind}` of a kind that compaction keeps."""
    if not isinstance(value, dict) or cast(Json, value).keys() != {"body", "count", "index", "kind"}:
        return False
    fields = cast(Json, value)
    if not _one_of(*KEPT_BY_COMPACTION)(fields["kind"]) or not _is_object(fields["body"]):
        return False
    if not _is_count(fields["count"]) or not _is_count(fields["index"]):
        return False
    check_body(fields["kind"], fields["body"])
    return True


def _is_header(value: Any) -> bool:
    if not _is_object(value):
        return False
    check_body("open", value)
    return True


ENTRY_CHECKS: dict[str, Check] = {
    "body": _is_object,
    "index": _is_count,
    "kind": _is_word,
    "ledger": _is_digest,
    "previous": _is_digest,
    "signature": _is_signature,
    "time": _text("[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z"),
    "writer": _is_digest,
}

ROLES: dict[str, set[str]] = {
    "device": {"subject"},
    "server": {"run", "config", "source", "model"},
    "study": {"run", "config", "source", "model", "data"},
    "registry": {"data"},
}
"""Who keeps a ledger, and what its first entry must be bound to."""

_FIELDS: dict[str, Check] = {
    "adjacency": _is_word,
    "authorization": _is_signature,
    "bytes": _is_count,
    "cohort_commitment": _is_digest,
    "config": _is_digest,
    "counts": _is_digest,
    "cut_bytes": _is_count,
    "cut_digest": _is_digest,
    "data": _is_digest,
    "debit": _is_count,
    "delta": _is_amount,
    "dtype": _is_word,
    "epsilon": _is_amount,
    "event": _is_object,
    "hashes": _text("(?:[0-9a-f]{64})+"),
    "head": is_head,
    "header": _is_header,
    "model": _is_digest,
    "names": _list_of(_is_word),
    "opened_by": _is_digest,
    "policy": _is_digest,
    "population": _is_count,
    "reason": _one_of("finished", "stopped", "refused", "moved", "failed"),
    "rehearsal": lambda value: isinstance(value, bool),
    "release": _is_count,
    "reservation": _is_count,
    "role": lambda value: isinstance(value, str) and value in ROLES,
    "round": _is_count,
    "run": _is_word,
    "salt": _is_id,
    "scope": _one_of("records", "adapters", "profile", "all"),
    "sha256": _is_digest,
    "shapes": _list_of(_list_of(_is_count)),
    "source": _is_digest,
    "spec": _is_digest,
    "subject": _is_id,
    "totals": _list_of(_is_total),
    "unit": _is_word,
    "unreleased": _list_of(_is_count),
    "weights": _is_digest,
    "writers": _list_of(_is_digest),
}
"""A field means the same in every kind that has it."""

_DIGESTS = {"config", "data", "model", "policy", "source", "spec"}
_BOUND = {"round", "run", "subject"} | _DIGESTS
_PROMISE = {"adjacency", "delta", "epsilon", "population", "unit"}

KINDS: dict[str, tuple[set[str], set[str]]] = {
    # kind: fields it must have, fields it may have
    "open": ({"role", "salt"}, {"rehearsal", "run", "subject", "writers"} | _DIGESTS),
    "reserve": ({"event"}, _BOUND | _PROMISE),
    "coordinator": ({"delta", "epsilon", "event", "reservation"}, _BOUND | _PROMISE - {"delta", "epsilon"}),
    "cancel": ({"reservation"}, {"reason", "run", "subject"}),
    "join": ({"round", "run"}, {"spec", "subject"}),
    "debit": ({"event"}, _BOUND | {"cohort_commitment", "reservation"}),
    "release": ({"bytes", "debit", "sha256"}, _BOUND | {"cohort_commitment", "counts", "dtype", "names", "shapes"}),
    "receipt": ({"head"}, {"event", "release", "round", "run"}),
    "checkpoint": ({"weights"}, {"debit", "round", "run"}),
    "refill": ({"delta", "epsilon"}, {"authorization", "policy", "subject"}),
    "forget": ({"scope"}, {"subject"}),
    "tombstone": ({"subject"}, set()),
    "recovered": ({"cut_bytes", "cut_digest"}, set()),
    "compact": ({"hashes", "header", "opened_by", "totals", "unreleased"}, set()),
    "end": (set(), {"reason", "run"}),
}
"""The closed list. Fields are never removed and meanings never change; another meaning is another kind."""

KEPT_BY_COMPACTION: dict[str, set[str]] = {
    "reserve": {"event", "run", "subject"} | _PROMISE,
    "coordinator": {"event", "reservation", "run", "subject"} | _PROMISE,
    "cancel": {"reservation", "run", "subject"},
    "join": {"round", "run", "subject"},
    "debit": {"event", "reservation", "run", "subject"},
    "refill": {"authorization", "delta", "epsilon", "policy", "subject"},
    "forget": {"scope", "subject"},
    "tombstone": {"subject"},
}
"""What of which kind outlives compaction; equal debits are counted, and everything else keeps its index."""
