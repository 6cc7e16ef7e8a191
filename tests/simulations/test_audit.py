"""The whole audit: verdicts on honest evidence of either side, and what an earlier audit remembers."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

import client.vault
import server.rounds
from common.config import load_config, read_config_file
from common.errors import DataError, VerificationError
from common.evidence import read_evidence
from common.ledger_format import verify
from common.privacy import Randomness, clip_rows
from common.wire import ReleaseSpec
from server.cohort import Roster
from simulations.audit import audit

TIME = "2026-01-31T12:00:00Z"


def verdicts(done):
    return {one.text: one.verdict for one in done.claims}


def test_an_honest_study_holds_and_what_nobody_showed_is_not_shown(run):
    done = audit([run], time=TIME)
    assert done.verdict == "holds"
    found = verdicts(done)
    assert found["No more was spent than promised"] == found["Nothing was changed afterwards"] == "holds"
    assert found["Server and devices agree"] == found["Signed with known keys"] == "not shown"
    assert "contradicted" not in found.values()


@pytest.mark.parametrize("noise", ["local", "central"])
def test_an_honest_federation_holds_on_both_sides_and_counts_what_two_sides_tell_once(fleet_zips, noise):
    server, devices = fleet_zips(noise)
    keys = [read_evidence(path).manifest["public_key"] for path in (server, *devices)]
    done = audit([server, *devices], time=TIME, keys=keys, budget=16.0)
    assert done.verdict == "holds"
    assert verdicts(done)["Signed with known keys"] == verdicts(done)["Server and devices agree"] == "holds"
    alone = audit([server], time=TIME).summed["organization"]["spent"]["epsilon"]
    assert done.summed["organization"]["spent"]["epsilon"] == alone
    assert verdicts(done)["All runs stay within the budget"] == "holds"


def test_of_a_server_that_is_shown_twice_the_evidence_with_receipts_is_matched(fleet_zips, tmp_path):
    without, devices = fleet_zips("local", receipts=False)
    kept = tmp_path / "without.zip"
    kept.write_bytes(without.read_bytes())
    done = audit([kept, *devices], time=TIME)
    (claim,) = (one for one in done.claims if one.text == "Server and devices agree")
    assert (claim.verdict, "--receipts" in claim.why) == ("not shown", True)
    both = audit([kept, fleet_zips("local")[0], *devices], time=TIME)
    assert verdicts(both)["Server and devices agree"] == "holds"
    assert len(both.reconciliations) == 1


def test_devices_alone_can_be_audited_and_only_the_one_that_sent_most_counts(fleet_zips):
    _, devices = fleet_zips("local")
    done = audit(devices, time=TIME)
    assert done.verdict == "holds"
    each = [audit([path], time=TIME).summed["organization"]["reserved_epsilon"] for path in devices]
    assert done.summed["organization"]["reserved_epsilon"] == max(each)


def test_a_key_that_was_not_named_is_a_contradiction(fleet_zips):
    server, devices = fleet_zips("local")
    own = read_evidence(server).manifest["public_key"]
    assert verdicts(audit([server], time=TIME, keys=[own]))["Signed with known keys"] == "holds"
    done = audit([server, devices[0]], time=TIME, keys=[own])
    assert (verdicts(done)["Signed with known keys"], done.verdict) == ("contradicted", "contradicted")


def test_an_earlier_audit_finds_a_ledger_that_was_rolled_back_since(run):
    before = json.loads(json.dumps(audit([run], time=TIME).to_json()))
    again = audit([run], time=TIME, since=before)
    assert verdicts(again)["No ledger was rolled back"] == "holds"
    assert [text for text in again.changes if "rolled back" not in text] == []
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-2]))
    rolled = audit([run], time=TIME, since=before)
    assert rolled.verdict == "contradicted"
    assert any("old copy" in one.why for one in rolled.claims)


def test_what_changed_is_said_ledger_by_ledger(run, fleet_zips):
    server, devices = fleet_zips("local")
    before = json.loads(json.dumps(audit([run, server], time=TIME).to_json()))
    done = audit([server, devices[0]], time=TIME, since=before)
    assert any(text.startswith("new: ") for text in done.changes)
    assert any(text.startswith("not shown any more: ") for text in done.changes)
    foreign = json.loads(json.dumps(audit([run], time=TIME).to_json()))
    with pytest.raises(DataError, match="an audit of other ledgers"):
        audit([server], time=TIME, since=foreign)
    with pytest.raises(VerificationError, match="not the JSON of an audit"):
        audit([run], time=TIME, since={"ledgers": [{"head": 1}]})


def test_a_rehearsal_claims_nothing(run, forge):
    path = forge(run, header={"rehearsal": True})
    assert audit([path], time=TIME).verdict == "no claim"


def test_a_zip_with_a_fault_is_a_verdict_and_not_a_crash(fleet_zips, tmp_path):
    server, _ = fleet_zips("local")
    content = bytearray(server.read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "broken.zip").write_bytes(content)
    done = audit([tmp_path / "broken.zip", server], time=TIME)
    assert done.verdict == "contradicted"
    assert json.dumps(done.to_json(), allow_nan=False)
    with pytest.raises(DataError):
        audit([tmp_path / "absent"], time=TIME)


def test_the_json_binds_every_file_that_was_read_and_holds_no_user_data(run):
    report = audit([run], time=TIME).to_json()
    (ledger,) = report["ledgers"]
    assert ledger["head"] == verify((run / "ledger.jsonl").read_bytes()).head.to_json()
    assert {"ledger.jsonl", "config.toml", "spec.json", "statement.json"} <= ledger["files"].keys()
    assert "secret-name" not in json.dumps(report)


def test_an_attack_that_contradicts_beside_the_ledger_contradicts_the_audit(run):
    result = {
        "name": "mechanism test",
        "target": "the mechanism",
        "measure": "epsilon of one release, at least",
        "value": 9.0,
        "low": 9.0,
        "high": "inf",
        "chance": 0.0,
        "saturation": "inf",
        "verdict": "contradicted",
        "why": "more is proven than was claimed",
    }
    (run / "attacks.json").write_text(json.dumps({"results": [result]}))
    done = audit([run], time=TIME)
    assert verdicts(done)["The code does what it promises"] == "contradicted"
    (run / "attacks.json").write_text(json.dumps({"results": [result | {"verdict": "holds"}]}))
    assert verdicts(audit([run], time=TIME))["The code does what it promises"] == "holds"
    (run / "attacks.json").write_text("[1]")
    assert audit([run], time=TIME).verdict == "holds"


# Frauds. Each is planted, and the audit's page has to say "contradicted", in which claim, and why.


def scaled(factor):
    def change(kind, body):
        def rescale(event):
            event = dict(event)
            if "event" in event:
                event["event"] = rescale(event["event"])
            else:
                event["noise_multiplier"] = factor * event["noise_multiplier"]
            return event

        return body | {"event": rescale(body["event"])} if "event" in body else body

    return change


def edited(run, name, **changes):
    (run / name).write_text(json.dumps(json.loads((run / name).read_text()) | changes))
    return [run]


def with_ledger(run, path):
    (run / "ledger.jsonl").write_bytes(path.read_bytes())
    return [run]


def with_witnesses(run, change):
    rows = [json.loads(line) for line in (run / "witnesses.jsonl").read_text().splitlines()]
    values = change(np.array([row["values"] for row in rows]))
    lines = [json.dumps({"round": n + 1, "values": row.tolist()}) for n, row in enumerate(values)]
    (run / "witnesses.jsonl").write_text("\n".join(lines) + "\n")
    return [run]


def cut_out(run, entry):
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:entry] + lines[entry + 1 :]))
    return [run]


def cut_off(run):
    lines = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(lines[:-2]))
    return [run]


def without_round_two(_, body):
    return None if body.get("round") == 2 else body


def larger(kind, body):
    return body | {"bytes": body["bytes"] + 64} if kind == "release" else body


def with_a_score(run, forge):
    """A coordinator of devices, not a study, that logs how well they do."""
    rows = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    rows[0]["evaluation"] = {"global": 1.25}
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return with_ledger(run, forge(run, header={"role": "server"}))


FRAUDS = {
    "noise halved in the ledger": (lambda r, f: [f(r, scaled(0.5))], "No more was spent", "reserves what costs"),
    "noise off in the ledger": (lambda r, f: [f(r, scaled(0.0))], "No more was spent", "an infinite epsilon"),
    "noise halved in the release": (lambda r, _: with_witnesses(r, lambda v: v / 2), "The code", "standard deviation"),
    "noise off in the release": (lambda r, _: with_witnesses(r, lambda v: v * 0), "The code", "0.000"),
    "seed fixed": (lambda r, _: with_witnesses(r, lambda v: np.stack([v[0]] * len(v))), "The code", "fixed seed"),
    "clip doubled in the request": (lambda r, _: edited(r, "spec.json", clip=2.0), "Nothing was changed", "spec.json"),
    "more released than the shared adapter": (lambda r, f: with_ledger(r, f(r, larger)), "Only shared", "bytes"),
    "a score released without noise": (with_a_score, "Only shared adapters left", "nothing was debited"),
    "budget reset between runs": (lambda r, f: [r, f(r)], "All runs stay within", "of a budget of 8"),
    "an event cut out": (lambda r, _: cut_out(r, 3), "Every ledger is complete", "index"),
    "a round never debited": (lambda r, f: with_ledger(r, f(r, without_round_two)), "Nothing was changed", "round 2"),
    "an event forged with another key": (lambda r, f: with_ledger(r, f(r)), "Signed with known keys", "not named"),
    "ledger rolled back": (lambda r, _: cut_off(r), "Nothing was changed", "cut off, rolled back or rewritten"),
    "a smaller epsilon stated": (lambda r, _: edited(r, "statement.json", epsilon=1.0), "Nothing was", "it states"),
    "a rehearsal passed off": (lambda r, f: with_ledger(r, f(r, header={"rehearsal": True})), "Nothing was", "rehears"),
}


@pytest.mark.parametrize("name", FRAUDS)
def test_a_planted_fraud_is_contradicted_with_its_reason(run, forge, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "auditor"))  # an auditor's machine remembers no run
    plant, claim, why = FRAUDS[name]
    key = verify((run / "ledger.jsonl").read_bytes()).head.writer
    done = audit(plant(run, forge), time=TIME, keys=[key], budget=8.0)
    assert done.verdict == "contradicted"
    found = {one.text: one for one in done.claims if one.verdict == "contradicted"}
    (named,) = (one for text, one in found.items() if text.startswith(claim))
    assert why in named.why


def test_a_rollback_alone_with_its_folder_is_found_by_whoever_kept_a_head(run, tmp_path):
    head = verify((run / "ledger.jsonl").read_bytes()).head
    cut_off(run)
    bare = tmp_path / "bare.jsonl"
    bare.write_bytes((run / "ledger.jsonl").read_bytes())
    assert audit([bare], time=TIME).verdict == "holds"  # the fraud that nobody can see who kept nothing
    assert audit([bare], time=TIME, heads=[head]).verdict == "contradicted"


def fixed_size(self, rate, randomness):
    chosen = randomness.permutation(len(self.subjects))[: round(rate * len(self.subjects))]
    return [self.subjects[int(index)] for index in chosen]


def seeded(cls):
    return cls.rehearsal(42)


CODE = {
    "noise halved": (
        lambda p, s: p.setattr(server.rounds, "add_central_noise", _halved(server.rounds.add_central_noise)),
        "standard deviation",
    ),
    "noise off": (lambda p, s: p.setattr(server.rounds, "add_central_noise", lambda total, *_: total), "at least"),
    "seed fixed": (lambda p, s: p.setattr(Randomness, "system", classmethod(seeded)), "fixed seed"),
    "clip doubled": (
        lambda p, s: p.setattr(
            client.vault, "clip_rows", lambda rows, clip, *a, **k: clip_rows(rows, 2 * clip, *a, **k)
        ),
        "longer than the clip",
    ),
    "per-layer clipping claimed as one": (lambda p, s: _per_layer(p, s), "clips got through the door"),
    "cohort not Poisson": (lambda p, s: p.setattr(Roster, "cohort", fixed_size), "spread 0.00"),
}


def _halved(real):
    return lambda total, spec, noise: total + (real(total, spec, noise) - total) / 2


def _per_layer(patch, spec):
    sizes = [math.prod(shape) for shape in spec.shapes]

    def per_tensor(rows, clip, dtype, origin=0.0):
        parts = np.split(rows.astype(np.float64) - origin, np.cumsum(sizes)[:-1], axis=1)
        return np.concatenate([clip_rows(part, spec.clip, dtype) for part in parts], axis=1)

    patch.setattr(client.vault, "clip_rows", per_tensor)
    patch.setattr(ReleaseSpec, "update_norm", property(lambda self: 99 * self.clip))


@pytest.mark.parametrize("name", CODE)
def test_a_fraud_in_the_code_is_contradicted_by_the_attack_and_so_by_the_report(run, monkeypatch, name):
    from client.base_model import load_base
    from simulations.mechanism import probe_mechanism, probe_sampling
    from simulations.planning import base_of

    config = load_config(read_config_file(run / "config.toml"))
    spec = replace(ReleaseSpec.from_text((run / "spec.json").read_text()), noise_multiplier=1.08)
    base = load_base(base_of(config), config.targets)
    plant, why = CODE[name]
    plant(monkeypatch, spec)
    if name == "cohort not Poisson":
        results = [probe_sampling(config, replace(spec, population=200, sampling_rate=0.1), rounds=300)]
    else:
        results = [probe_mechanism(config, spec, base, trials=1000, generator=np.random.default_rng(0))]
    (run / "attacks.json").write_text(json.dumps({"results": [one.to_json() for one in results]}))
    done = audit([run], time=TIME)
    (code,) = (one for one in done.claims if one.text == "The code does what it promises")
    assert (code.verdict, done.verdict) == ("contradicted", "contradicted")
    assert why in code.why
