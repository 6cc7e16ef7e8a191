"""The audit's page in a real browser: nothing loaded, nothing logged, the first screen whole, on desk and phone."""

import json
import runpy
import shutil
from pathlib import Path

import pytest

from simulations.audit import audit
from simulations.audit_page import write_audit

pytestmark = pytest.mark.browser

PROBES = runpy.run_path(str(Path(__file__).with_name("test_report_page.py")))
SIZES = PROBES["SIZES"]
TIME = "2026-01-31T12:00:00Z"
ATTACK = {
    "name": "mechanism test",
    "target": "the mechanism: clip, gate, sum and noise as they are in the code",
    "measure": "epsilon of one release, at least",
    "value": 5.9,
    "low": 5.9,
    "high": "inf",
    "chance": 0.0,
    "saturation": "inf",
    "verdict": "holds",
    "why": "less is proven than was claimed",
}


@pytest.fixture
def pages(fleet_zips, tmp_path):
    """A page that holds, with both sides and an attack, and one of a fraud that an earlier audit had passed."""
    server, devices = fleet_zips("central")
    whole = write_audit(audit([server, *devices], time=TIME, budget=16.0), tmp_path / "whole")
    folder = tmp_path / "run"
    folder.mkdir()
    from common.evidence import read_evidence

    for name, content in read_evidence(server).files.items():
        (folder / name).write_bytes(content)
    (folder / "attacks.json").write_text(json.dumps({"results": [ATTACK]}))
    before = json.loads(json.dumps(audit([folder], time=TIME).to_json()))
    (folder / "config.toml").write_bytes((folder / "config.toml").read_bytes() + b"# later\n")
    fraud = write_audit(audit([folder], time=TIME, since=before), tmp_path / "fraud")
    return {"whole": whole, "fraud": fraud}


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_legible_and_loads_nothing(browser, pages, size, dark):
    width, height = SIZES[size]
    for page in pages.values():
        browser.requests.clear()
        browser.complaints.clear()
        browser.open(page, width=width, height=height, dark=dark)
        assert browser.requests == [page.as_uri()]
        assert browser.complaints == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(PROBES["OVERFLOWING"]) == []
        assert browser.evaluate(PROBES["COLLIDING"]) == []
        assert browser.evaluate(PROBES["CONTRAST"]) >= 4.5
        assert browser.evaluate(PROBES["SMALLEST"]) >= 10


def test_the_first_screen_of_a_desk_holds_who_what_how_much_and_every_verdict(browser, pages):
    browser.open(pages["whole"], width=1280, height=800)
    assert browser.evaluate("document.querySelector('.claims tbody').getBoundingClientRect().bottom") <= 800
    browser.open(pages["fraud"], width=1280, height=800)
    assert browser.evaluate("document.querySelector('.alarm').getBoundingClientRect().bottom") <= 300


def test_the_first_screen_of_a_phone_says_whether_it_holds_and_how_much(browser, pages):
    browser.open(pages["whole"], width=390, height=844)
    for number in (1, 2, 3, 4):
        place = f"document.querySelector('dl.lead dd:nth-of-type({number})').getBoundingClientRect().bottom"
        assert browser.evaluate(place) <= 844


def test_verdicts_are_words_and_not_colour_alone(browser, pages):
    browser.open(pages["fraud"], width=1280, height=800)
    words = browser.evaluate("[...document.querySelectorAll('.claims .verdict')].map(one => one.innerText.trim())")
    said = {word.lstrip("\u2713\u2715?\u2013 \n") for word in words}
    assert said <= {"holds", "contradicted", "not shown", "no claim"}
    assert {"contradicted", "holds"} <= said


def test_paper_is_white_and_the_signature_stays_together(browser, pages):
    browser.open(pages["whole"], width=690, height=1000, dark=True, media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.querySelector('.signature')).breakInside") == "avoid"
    browser.send("Emulation.setEmulatedMedia", media="screen")
    shutil.rmtree(pages["whole"].parent)
