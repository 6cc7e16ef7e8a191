"""Verify a Homespun ledger without Homespun: `python verify_ledger.py LEDGER [--head FILE]... [--key HEX]...`.

Written from docs/ledger.md alone; it needs Python 3.11 and the package `cryptography`, and shares no code with
`common/ledger_format.py`. Exit code 0: sound. 4: it is not, and the first bad entry is named. The form of single
values (how many hex digits a digest has) is left to the other implementation; which fields a kind has is checked.
"""

import argparse
import hashlib
import json
import sys
from decimal import Decimal
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SAFE = 2**53 - 1
ENTRY = {"body", "format", "index", "kind", "ledger", "previous", "signature", "time", "writer"}
DIGESTS = "config data model policy source spec"
PROMISE = "adjacency delta epsilon population unit"
KINDS = {  # kind: (fields it must have, fields it may have)
    "open": ("role salt", f"rehearsal run subject writers {DIGESTS}"),
    "reserve": ("event", f"round run subject {DIGESTS} {PROMISE}"),
    "coordinator": ("delta epsilon event reservation", f"round run subject {DIGESTS} adjacency population unit"),
    "cancel": ("reservation", "reason run subject"),
    "join": ("round run", "spec subject"),
    "debit": ("event", f"round run subject {DIGESTS} cohort_commitment reservation"),
    "release": ("bytes debit sha256", f"round run subject {DIGESTS} cohort_commitment counts dtype names shapes"),
    "receipt": ("head", "event release round run"),
    "checkpoint": ("weights", "debit round run"),
    "refill": ("delta epsilon", "authorization policy subject"),
    "forget": ("scope", "subject"),
    "tombstone": ("subject", ""),
    "recovered": ("cut_bytes cut_digest", ""),
    "compact": ("hashes header opened_by totals unreleased", ""),
    "end": ("", "reason run"),
}
KEPT = {
    "reserve": f"event run subject {PROMISE}",
    "coordinator": f"event reservation run subject {PROMISE}",
    "cancel": "reservation run subject",
    "join": "round run subject",
    "debit": "event reservation run subject",
    "refill": "authorization delta epsilon policy subject",
    "forget": "scope subject",
    "tombstone": "subject",
}


class Bad(Exception):
    """The ledger is not sound."""


def need(condition, reason):
    """Go on if `condition` holds."""
    if not condition:
        raise Bad(reason)


def number(value):
    """Write a double as ECMAScript's Number::toString does (RFC 8785, section 3.2.2.3)."""
    if value == 0:
        return "0"
    _, digits, exponent = Decimal(repr(abs(value))).normalize().as_tuple()
    text, sign = "".join(map(str, digits)), "-" if value < 0 else ""
    point = len(text) + exponent
    if len(text) <= point <= 21:
        return sign + text + "0" * (point - len(text))
    if 0 < point <= 21:
        return f"{sign}{text[:point]}.{text[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{text}"
    return f"{sign}{text[0]}{'.' if text[1:] else ''}{text[1:]}e{point - 1:+d}"


def canonical(value):
    """Write a value as RFC 8785 says."""
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(canonical(key) + ":" + canonical(value[key]) for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    if isinstance(value, float) or (type(value) is int and abs(value) > SAFE):
        return number(float(value))
    return json.dumps(value, ensure_ascii=False)


def digest(value):
    """Return SHA-256 over the canonical text, in hex."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def signed(writer, signature, ledger, index, entry_hash):
    """Tell whether it is a head that `writer` signed."""
    message = f"homespun-head-1\n{ledger}\n{index}\n{entry_hash}\n".encode()
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(writer)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return bytes.fromhex(writer + signature).hex() == writer + signature  # hex has one spelling here


def said(entries):
    """List (index, kind, body, count) of what the entries say about budgets."""
    for place, entry in enumerate(entries):
        if entry["kind"] == "compact" and place == 0:
            yield from ((t["index"], t["kind"], t["body"], t["count"]) for t in entry["body"]["totals"])
        elif entry["kind"] in KEPT:
            yield entry["index"], entry["kind"], entry["body"], 1


def totals(entries):
    """Add up what compaction keeps; equal debits are counted."""
    found = {}
    for index, kind, body, count in said(entries):
        kept = {name: body[name] for name in body if name in KEPT[kind].split()}
        same = canonical([kind, kept]) if kind == "debit" else index
        found.setdefault(same, {"body": kept, "count": 0, "index": index, "kind": kind})["count"] += count
    return list(found.values())


def verify(data, heads=(), keys=None):
    """Return (number of entries, hash of the last), or raise Bad."""
    need(data, "entry 0: the ledger is empty")
    entries, hashes, open_reservations, released = [], [], {}, {}
    ledger = header = opener = None
    for line in data.split(b"\n")[:-1]:
        index = len(hashes)
        try:
            entry = json.loads(line)
            need(isinstance(entry, dict) and entry.keys() == ENTRY, "not the fields of an entry")
            need(canonical(entry).encode() == line, "not in canonical form")
            need(entry["format"] == "homespun-ledger-1", "unknown format")
            kind, body = entry["kind"], entry["body"]
            need(kind in KINDS, "unknown kind")
            must, may = (set(names.split()) for names in KINDS[kind])
            need(must <= body.keys() <= must | may, f"not the fields of {kind}")
            if not entries:
                need(kind in {"open", "compact"}, "does not begin with open or compact")
                header, opener = (body, entry["writer"]) if kind == "open" else (body["header"], body["opened_by"])
                ledger = digest({"header": header, "writer": opener})
                if kind == "compact":
                    hashes = [body["hashes"][at : at + 64] for at in range(0, len(body["hashes"]), 64)]
                    released = dict.fromkeys(body["unreleased"])
                    for total in body["totals"]:
                        if total["kind"] in {"reserve", "cancel"}:
                            is_reserve = total["kind"] == "reserve"
                            open_reservations[total["index"] if is_reserve else total["body"]["reservation"]] = (
                                is_reserve
                            )
            index = len(hashes)
            need(not (entries and kind == "open"), "a second open entry")
            need(entry["ledger"] == ledger, "belongs to another ledger")
            need(type(entry["index"]) is int and entry["index"] == index, f"expected index {index}")
            need(entry["previous"] == (hashes[-1] if hashes else "0" * 64), "does not follow the entry before it")
            need(entry["writer"] in {opener, *header.get("writers", [])}, "written by someone else")
            need(keys is None or {entry["writer"], opener} <= set(keys), "written by an unknown key")
            entry_hash = digest({name: entry[name] for name in ENTRY - {"signature"}})
            need(signed(entry["writer"], entry["signature"], ledger, index, entry_hash), "signature is wrong")
            need(not entries or entries[-1]["kind"] != "end", "follows the end of the ledger")
            need("reservation" not in body or open_reservations.get(body["reservation"]), "reservation not open")
            if kind == "release":
                need(body["debit"] in released, "releases without an earlier debit")
                need(released[body["debit"]] in {None, body["sha256"]}, "another payload under a used debit")
                released[body["debit"]] = body["sha256"]
            if kind == "compact" and entries:
                unreleased = sorted(at for at, payload in released.items() if payload is None)
                summary = {"hashes": "".join(hashes), "header": header, "opened_by": opener, "unreleased": unreleased}
                need(body == summary | {"totals": totals(entries)}, "is not what the entries before it add up to")
            if kind in {"reserve", "cancel"}:
                open_reservations[index if kind == "reserve" else body["reservation"]] = kind == "reserve"
            if kind == "debit":
                released[index] = None
        except Bad as error:
            raise Bad(f"entry {index}: {error}") from None
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
            raise Bad(f"entry {index}: malformed") from None
        entries.append(entry)
        hashes.append(entry_hash)
    need(data.endswith(b"\n"), f"entry {len(hashes)}: the last line is torn")
    for head in heads:
        need(head["ledger"] == ledger, "entry 0: a kept head is of another ledger")
        fields = (head[name] for name in ("writer", "signature", "ledger", "index", "hash"))
        need(signed(*fields), "a kept head is not signed by its writer")
        need(head["index"] < len(hashes), f"entry {len(hashes)}: missing, a kept head shows entry {head['index']}")
        need(head["hash"] == hashes[head["index"]], f"entry {head['index']}: a kept head shows another entry here")
    return len(hashes), hashes[-1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Verify a Homespun ledger.")
    parser.add_argument("ledger", type=Path)
    parser.add_argument("--head", type=Path, action="append", default=[], help="a head that someone else kept (JSON)")
    parser.add_argument("--key", action="append", help="accept only these writers (hex)")
    options = parser.parse_args()
    kept = [json.loads(path.read_bytes()) for path in options.head]
    try:
        count, last = verify(options.ledger.read_bytes(), kept, options.key)
    except Bad as error:
        sys.exit(sys.stderr.write(f"{options.ledger}: {error}\n") and 4)
    evidence = f"{len(kept)} kept heads agree" if kept else "none: no head that someone else kept was given"
    sys.stdout.write(f"{count} entries verify; last hash {last}; rollback evidence: {evidence}\n")
