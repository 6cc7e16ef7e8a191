"""What crosses the network in a secure sum: letters, one per device, whose content `common.secagg_messages` defines.

A round's first message is the ordinary assignment: the device trains, keeps the update, and answers with its keys. The
other four are `SumLetters`. A simulated node hosts many devices and gets a letter for each of them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import Refusal
from common.formats import readable, said, written
from common.keys import SigningKey
from common.secagg_messages import Leg, digest
from common.wire import MAX_USERS_PER_ASSIGNMENT, REFUSAL_CODES, WIRE_FORMAT

if TYPE_CHECKING:
    from flwr.app import RecordDict

__all__ = ["SUM_LEGS", "SumLetters", "read_roster"]

_IS_KEY = re.compile("[0-9a-f]{64}")

SUM_LEGS = (Leg.KEYS, Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK)
"""A round's legs, by the answer that devices give."""

MAX_LETTER_BYTES = 1 << 31
MAX_ROUND = 2**31 - 1


@dataclass(frozen=True)
class SumLetters:
    """The letters of one leg, to the devices of a node or from them.

    Attributes:
        run: Identifier of the run.
        round: Number of the sum, which no other sum of the run has.
        leg: Which answer is asked for, or given.
        letters: Message by subject.
        refused: Of an answer: code by subject, of those that refused.
    """

    run: str
    round: int
    leg: Leg
    letters: Mapping[str, bytes]
    refused: Mapping[str, str]

    def to_records(self) -> RecordDict:
        """Write the letters as Flower records."""
        from flwr.app import ConfigRecord, RecordDict

        content: dict[str, Any] = {
            "format": written(WIRE_FORMAT),
            "run": self.run,
            "round": self.round,
            "leg": int(self.leg),
            "subjects": list(self.letters),
            "letters": list(self.letters.values()),
            "refusers": list(self.refused),
            "codes": list(self.refused.values()),
        }
        return RecordDict({"sum": ConfigRecord(content)})

    @classmethod
    def from_records(cls, records: RecordDict) -> SumLetters:
        """Read letters, or refuse; what stands in them is not trusted yet.

        Raises:
            Refusal: The reply carries a refusal's code, or these are no letters of this format.
        """
        try:
            refused: Any = records.config_records.get("refusal")
            if refused is not None:
                code = refused["code"]
                raise Refusal(code if code in REFUSAL_CODES else "unknown", "the device refused")
            content: Any = records.config_records["sum"]
            if not readable(content["format"], WIRE_FORMAT):
                raise Refusal("format", said(content["format"], WIRE_FORMAT, "the letter"))
            letters = _paired(content["subjects"], content["letters"], bytes)
            codes = _paired(content["refusers"], content["codes"], str)
            run, number, leg = content["run"], content["round"], Leg(content["leg"])
            if not (isinstance(run, str) and len(run) <= 64 and type(number) is int and 1 <= number <= MAX_ROUND):
                raise TypeError
            if leg not in SUM_LEGS or sum(map(len, letters.values())) > MAX_LETTER_BYTES:
                raise ValueError
            known = {name: code if code in REFUSAL_CODES else "unknown" for name, code in codes.items()}
            return cls(run, number, leg, letters, known)
        except (KeyError, ValueError, TypeError, AttributeError):
            raise Refusal("bad-message", "these are no letters of a secure sum") from None


def simulated_identity(run: str, subject: str) -> SigningKey:
    """Return the enrolment key of a simulated user: public, because all of them are one process anyway."""
    return SigningKey(digest("simulated identity", run.encode(), subject.encode()))


def read_roster(path: Path) -> frozenset[str]:
    """Read a JSON list of enrolment keys, as hex: the devices that may take part in secure sums.

    Raises:
        Refusal: `unknown-key`: it is missing, or not such a list, so that nobody is known.
    """
    try:
        keys = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(keys, list) and all(isinstance(key, str) and _IS_KEY.fullmatch(key) for key in keys):
            return frozenset(keys)
    except (OSError, ValueError, RecursionError):
        pass
    raise Refusal("unknown-key", f"{path}: not a roster of enrolled devices")


def _paired(names: Any, values: Any, kind: type) -> dict[str, Any]:
    if not isinstance(names, list) or not isinstance(values, list) or len(names) != len(values):
        raise TypeError
    if len(names) > MAX_USERS_PER_ASSIGNMENT or len(set(names)) != len(names):
        raise ValueError
    if not all(isinstance(name, str) and 0 < len(name) <= 256 for name in names):
        raise TypeError
    if not all(isinstance(value, kind) for value in values):
        raise TypeError
    return dict(zip(names, values, strict=True))
