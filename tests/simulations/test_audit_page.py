"""The page that is signed: what it must say, on honest evidence and on a fraud, and what it may never hold."""

from __future__ import annotations

import hashlib
import html
import json
import math
import re

import pytest

from common.evidence import read_evidence
from simulations.audit import audit
from simulations.audit_page import GLOSSARY, _egress, write_audit

TIME = "2026-01-31T12:00:00Z"


def text_of(page):
    body = page.read_text().partition("</style>")[2]
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)))


@pytest.fixture
def central(fleet_zips, tmp_path):
    server, devices = fleet_zips("central")
    return write_audit(audit([server, *devices], time=TIME, budget=16.0), tmp_path / "report")


def test_the_first_words_say_who_from_whom_by_what_how_much_and_what_not(central):
    first = text_of(central)[:2000]
    for words in (
        "Each enrolled user, with all of their records",
        "not from the coordinator",
        "is clipped to L2 norm 1",
        "at delta 1e-5, per user",
        "Of 1,000 people who took part, an attacker who wrongly accuses 10 of every 1,000 others can rightly pick",
        "holds if the server adds the noise it promised",
        "What is not covered",
    ):
        assert words in first


def test_with_local_noise_nobody_sees_an_update_without_it(fleet_zips, tmp_path):
    server, devices = fleet_zips("local")
    page = write_audit(audit([server, *devices], time=TIME), tmp_path / "report")
    assert "Nobody: the noise is added on the device" in text_of(page)[:2000]


def test_the_page_stands_alone_and_runs_nothing(central):
    page = central.read_text()
    assert not re.search(r"<script|<img|<link(?! rel=\"icon\")|src=|url\((?!#)|@import|https?://", page)
    assert "default-src 'none'" in page


def test_every_part_is_there(central):
    page, words = central.read_text(), text_of(central)
    assert page.count('<svg class="chart"') == 4
    for heading in ("Budget over rounds", "Spend per device", "Claim against evidence", "What left", "Signature"):
        assert heading in words
    assert len(GLOSSARY) == 15
    assert all(word in words and meaning in words for word, meaning in GLOSSARY)
    assert "noise_witness" in words
    assert "What a dishonest server could still hide" in words


def test_what_left_is_named_tensor_by_tensor_and_a_ledger_that_is_shown_twice_counts_once(fleet_zips, tmp_path):
    server, _ = fleet_zips("central")
    spec = json.loads(read_evidence(server).files["spec.json"])
    again = tmp_path / "again.zip"
    again.write_bytes(server.read_bytes())
    done = audit([server, again], time=TIME)
    rows = _egress(done.shown)
    assert {row["name"] for row in rows} == set(spec["names"])
    assert {row["times"] for row in rows} == {3}
    assert sum(row["each"] for row in rows) == 4 * sum(math.prod(shape) for shape in spec["shapes"])


def test_the_page_names_the_digest_of_the_data_beside_it_and_links_it(central):
    digest = hashlib.sha256((central.parent / "audit.json").read_bytes()).hexdigest()
    assert digest in central.read_text()
    assert 'href="audit.json"' in central.read_text()
    assert 'href="registry-record.json"' in central.read_text()


def test_no_number_on_the_page_is_below_what_was_spent(central):
    spent = next(
        iter(
            json.loads((central.parent / "audit.json").read_text())["totals"]["organization"]["spent"][
                "epsilon"
            ].values()
        )
    )
    stated = float(re.search(r"Epsilon ([0-9.]+) at delta", text_of(central))[1])
    assert spent <= stated < spent + 0.011


def test_a_fraud_is_the_headline_with_its_reason(run, tmp_path):
    statement = json.loads((run / "statement.json").read_text())
    (run / "statement.json").write_text(json.dumps(statement | {"epsilon": 0.5}))
    words = text_of(write_audit(audit([run], time=TIME), tmp_path / "report"))
    assert words.index("The evidence contradicts a privacy claim") < 100
    assert "it states epsilon 0.500" in words[:600]
    assert "What follows is what is claimed" in words


def test_changes_come_first(run, tmp_path):
    before = json.loads(json.dumps(audit([run], time=TIME).to_json()))
    words = text_of(write_audit(audit([run], time=TIME, since=before), tmp_path / "report"))
    assert words.index("What changed since the last audit") < words.index("Who is protected")


def test_user_data_and_names_never_reach_it_and_markup_is_escaped(run, tmp_path):
    evil = run.rename(run.with_name("<script>alert(1)"))
    page = write_audit(audit([evil], time=TIME), tmp_path / "report")
    assert "secret-name" not in page.read_text()
    assert "<script" not in page.read_text()


def test_a_run_with_attacks_shows_each_beside_chance_and_the_most_it_could_have_shown(run, tmp_path):
    result = {
        "name": "canary users, one shot",
        "target": "the global adapter",
        "measure": "epsilon, at least",
        "value": 0.5,
        "low": 0.5,
        "high": "inf",
        "chance": 0.0,
        "saturation": 4.7,
        "claimed_epsilon": 7.125,
        "verdict": "not shown",
        "why": "the most that it could show is below the claim",
    }
    (run / "attacks.json").write_text(json.dumps({"results": [result, {"nonsense": 1}]}))
    words = text_of(write_audit(audit([run], time=TIME), tmp_path / "report"))
    assert "canary users, one shot: proven" in words
    assert "at least 0.50 of 7.13" in words
    assert "0.500 0.500 to no limit 0.000 7.125 4.700" in words


@pytest.mark.parametrize("nothing", ["rehearsal", "bare", "broken"])
def test_what_claims_or_shows_nothing_still_has_a_page(run, forge, tmp_path, nothing):
    path = {"rehearsal": lambda: forge(run, header={"rehearsal": True}), "bare": lambda: run / "ledger.jsonl"}
    if nothing == "broken":
        (run / "ledger.jsonl").write_bytes(b"{}\n")
    page = write_audit(audit([path.get(nothing, lambda: run)()], time=TIME), tmp_path / "report")
    headline = {"rehearsal": "Nothing is claimed", "bare": "claims hold", "broken": "contradicts"}[nothing]
    assert headline in text_of(page)[:200]
    assert (tmp_path / "report" / "registry-record.json").exists() == (nothing == "nothing")
