"""Both sides of a run, matched release by release: agreement on honest ones, and every way in which they can differ."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest

import homespun
from common.errors import VerificationError
from common.evidence import Evidence, commitment, read_evidence
from common.keys import SigningKey
from common.ledger import Ledger
from common.ledger_format import verify
from simulations.reconciliation import _cohort_sizes, _Side, reconcile

CLAIMS = {
    "devices": "each device showed one ledger of its own",
    "heads": "no ledger lost an entry that another side had seen",
    "debited": "every round in which a device released something is debited by the server",
    "price": "both sides charged the same noise and the same sampling",
    "tensors": "only the tensors that the run shares left the devices",
    "committed": "the server's receipts are those that it committed to before it went on",
    "taken": "what the devices released is in the server's sums",
    "known": "what is in the server's sums was released by a device that says so",
}


@pytest.fixture
def sides(fleet_zips):
    server, devices = fleet_zips("local")
    return read_evidence(server), [read_evidence(path) for path in devices]


def verdicts(server, devices):
    found = {one.claim: one.verdict for one in reconcile(server, devices).findings}
    return {name: found.get(claim) for name, claim in CLAIMS.items()}


def contradicted(server, devices):
    return {name for name, verdict in verdicts(server, devices).items() if verdict == "contradicted"}


def rewritten(evidence, tmp_path, change, **files):
    """The same evidence with a ledger that its writer wrote anew, well signed."""
    entries = verify(evidence.ledger).entries
    opened = {name: value for name, value in entries[0].body.items() if name != "salt"}
    folder = tmp_path / f"rewritten-{len(list(tmp_path.iterdir()))}"
    with Ledger.create(folder / "ledger.jsonl", SigningKey.generate(), opened) as ledger:
        moved = {}
        for entry in entries[1:]:
            body = dict(entry.body)
            for field in ("reservation", "debit"):
                if field in body:
                    body[field] = moved.get(body[field])
            body = change(entry.kind, body)
            if body is not None:
                moved[entry.index] = ledger.append(entry.kind, body).index
    kept = {name: data for name, data in evidence.files.items() if name != "heads.jsonl"}
    return Evidence(evidence.name, kept | files | {"ledger.jsonl": (folder / "ledger.jsonl").read_bytes()})


def test_an_honest_run_agrees_on_every_release(sides):
    server, devices = sides
    found = reconcile(server, devices)
    assert {name: v for name, v in verdicts(server, devices).items() if name != "heads"} == {
        name: "holds" for name in CLAIMS if name != "heads"
    }
    assert found.matched == found.releases > 0
    assert found.verdict == "holds"  # although nobody kept a head, and three rounds are too few to tell coins
    assert found.unmatched == ()
    assert found.to_json()["matched_by_receipt"] == found.releases


def test_without_receipts_what_can_be_compared_still_is(fleet_zips):
    server, devices = fleet_zips("central", receipts=False)
    found = verdicts(read_evidence(server), [read_evidence(path) for path in devices])
    assert found["debited"] == found["price"] == found["tensors"] == "holds"
    assert found["committed"] == "not shown"
    assert found["taken"] is None
    whole = reconcile(read_evidence(server), [read_evidence(path) for path in devices])
    assert whole.verdict == "not shown"
    assert "--receipts" in whole.unmatched[0].why


def test_devices_that_are_not_here_are_counted_and_accuse_nobody(sides):
    server, devices = sides
    found = reconcile(server, devices[:2])
    assert "contradicted" not in verdicts(server, devices[:2]).values()
    assert any("2 of 4 enrolled devices" in text for text in found.missing)


def test_a_round_that_the_server_never_debited(sides, tmp_path):
    server, devices = sides
    number = next(e.body["round"] for d in devices for e in verify(d.ledger).entries if e.kind == "release")
    fraud = rewritten(server, tmp_path, lambda kind, body: None if body.get("round") == number else body)
    assert "debited" in contradicted(fraud, devices)


def test_a_server_that_charged_more_noise_than_it_asked_for(sides, tmp_path):
    server, devices = sides

    def change(kind, body):
        if kind == "debit":
            body["event"] = body["event"] | {"noise_multiplier": 2 * body["event"]["noise_multiplier"]}
        return body

    assert "price" in contradicted(rewritten(server, tmp_path, change), devices)


def test_a_device_that_was_asked_under_another_spec(sides, tmp_path):
    server, devices = sides
    fraud = rewritten(server, tmp_path, lambda k, body: body | {"spec": "ab" * 32} if k == "debit" else body)
    assert "debited" in contradicted(fraud, devices)


def test_a_private_tensor_that_was_released_as_well(sides, tmp_path):
    server, devices = sides

    def change(kind, body):
        if kind == "release":
            body["names"], body["shapes"] = [*body["names"], "private.lora_B.weight"], [*body["shapes"], [4, 2]]
            body["bytes"] += 32
        return body

    who = next(n for n, d in enumerate(devices) if any(e.kind == "release" for e in verify(d.ledger).entries))
    fraud = [*devices]
    fraud[who] = rewritten(devices[who], tmp_path, change)
    assert "tensors" in contradicted(server, fraud)


def test_receipts_that_were_exchanged_after_the_ledger_committed_to_them(sides):
    server, devices = sides
    rows = [json.loads(line) for line in server.files["receipts.jsonl"].splitlines()]
    rows[0]["receipts"] = ["ab" * 32]
    text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    fraud = Evidence(server.name, {**server.files, "receipts.jsonl": text})
    assert "committed" in contradicted(fraud, devices)


def committed_to(server, tmp_path, change):
    """A server that commits, in its ledger as well, to other receipts than it got."""
    rows = [json.loads(line) for line in server.files["receipts.jsonl"].splitlines()]
    change(rows)
    bound = {row["round"]: commitment(row["salt"], row["receipts"]) for row in rows}
    text = b"".join(json.dumps(row).encode() + b"\n" for row in rows)

    def rebound(kind, body):
        return body | {"cohort_commitment": bound[body["round"]]} if kind == "release" else body

    return rewritten(server, tmp_path, rebound, **{"receipts.jsonl": text})


def test_a_user_whom_the_server_invented(sides, tmp_path):
    server, devices = sides
    fraud = committed_to(server, tmp_path, lambda rows: rows[0]["receipts"].append("ab" * 32))
    assert "known" in contradicted(fraud, devices)
    assert verdicts(fraud, devices[:3])["known"] == "not shown"


def test_a_release_that_was_counted_again_in_a_later_round(sides, tmp_path):
    server, devices = sides

    def replay(rows):
        full = next(row for row in rows if row["receipts"])
        rows[rows.index(full) - 1]["receipts"].append(full["receipts"][0])

    assert "known" in contradicted(committed_to(server, tmp_path, replay), devices)


def test_a_server_that_dropped_all_but_one_is_asked_why(sides, tmp_path):
    server, devices = sides

    def drop(rows):
        for row in rows:
            row["receipts"] = row["receipts"][:1]

    fraud = committed_to(server, tmp_path, drop)
    found = reconcile(fraud, devices)
    assert verdicts(fraud, devices)["taken"] == "not shown"
    assert found.verdict == "not shown"
    assert any("the server has" in text for text in found.missing)


def test_a_ledger_that_was_rolled_back_behind_a_head_that_another_side_kept(sides):
    server, devices = sides
    lines = server.ledger.splitlines(keepends=True)
    head = json.dumps(verify(server.ledger).head.to_json()).encode() + b"\n"
    cut = Evidence(server.name, {**server.files, "ledger.jsonl": b"".join(lines[:-1])})
    keeps = Evidence(devices[0].name, {**devices[0].files, "heads.jsonl": head})
    assert "heads" in contradicted(cut, [keeps, *devices[1:]])
    assert verdicts(server, [keeps, *devices[1:]])["heads"] == "holds"


def test_cohorts_of_one_size_are_not_drawn_by_coins_and_honest_ones_are_not_accused(fleet_zips):
    server = read_evidence(fleet_zips("central")[0])
    side = _Side(server, verify(server.ledger))  # it reserves for four users, three of whom are expected in a round
    fixed = {number: {f"{number}-{n}" for n in range(3)} for number in range(30)}
    assert _cohort_sizes(side, fixed).verdict == "contradicted"
    assert _cohort_sizes(side, dict(list(fixed.items())[:10])).verdict == "not shown"
    generator = np.random.default_rng(0)
    for _ in range(200):
        honest = {number: {str(n) for n in range(generator.binomial(4, 0.75))} for number in range(30)}
        assert _cohort_sizes(side, honest).verdict == "holds"


def test_one_person_with_two_budgets(sides, tmp_path):
    server, devices = sides
    second = rewritten(devices[0], tmp_path, lambda kind, body: body if kind == "refill" else None)
    assert "devices" in contradicted(server, [devices[0], second])


def test_a_ledger_that_is_handed_in_twice_counts_once_and_accuses_nobody(sides):
    server, devices = sides
    once, twice = reconcile(server, devices), reconcile(server, [*devices, devices[0]])
    assert (twice.devices, twice.releases, twice.verdict) == (once.devices, once.releases, once.verdict)


def test_what_is_not_a_side_is_no_side(sides, run):
    server, devices = sides
    with pytest.raises(VerificationError, match="not a server's"):
        reconcile(devices[0], devices)
    with pytest.raises(VerificationError, match="not a device's"):
        reconcile(server, [read_evidence(run)])


def test_the_command_ends_with_the_verdict(fleet_zips, tmp_path, capsys):
    server, devices = fleet_zips("local")
    words = ["audit", "reconcile", str(server), *map(str, devices)]
    assert homespun.main(words) == 0
    shown = capsys.readouterr().out
    assert "holds: what the devices released is in the server's sums" in shown
    assert "stands outside a claim" in shown
    assert homespun.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["devices"] == 4
    with zipfile.ZipFile(devices[0]) as archive:
        (tmp_path / "ledger.jsonl").write_bytes(archive.read("ledger.jsonl").replace(b"release", b"rEleAse", 1))
    capsys.readouterr()
    assert homespun.main([*words, str(tmp_path / "ledger.jsonl")]) == 4
    assert str(tmp_path / "ledger.jsonl") in capsys.readouterr().err
