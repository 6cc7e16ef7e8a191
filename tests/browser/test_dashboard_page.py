"""The live page in a real browser: it follows a run that goes on, loads nothing from elsewhere, and is legible."""

import json
import runpy
import shutil
import time
from pathlib import Path

import pytest

import server.dashboard
from server.dashboard import run_state, serving

pytestmark = pytest.mark.browser

PROBES = runpy.run_path(str(Path(__file__).with_name("test_report_page.py")))
SIZES = PROBES["SIZES"]


@pytest.fixture
def run(make_fleet, tmp_path):
    """A run that stands after its second round."""
    source = make_fleet("central").run
    shutil.copytree(source, tmp_path / "run")
    lines = (source / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "run" / "ledger.jsonl").write_bytes(b"".join(lines[:-2]))
    rows = [{"round": n, "seconds": 1.5 * n, "rejected": {"busy": 1}} for n in (1, 2)]
    (tmp_path / "run" / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "run", lines


@pytest.fixture(autouse=True)
def _leave(browser):
    """The page asks every two seconds: leave it, so that other tests see their own requests only."""
    yield
    browser.open_address("about:blank", width=1280, height=800)


def wait_for(browser, expression):
    end = time.monotonic() + 120
    while not browser.evaluate(expression):
        assert time.monotonic() < end, expression
        time.sleep(0.1)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page_is_legible_and_asks_nobody_else(browser, run, size, dark, tmp_path):
    width, height = SIZES[size]
    folder, _ = run
    with serving(folder) as address:
        browser.requests.clear()
        browser.complaints.clear()
        browser.open_address(address, width=width, height=height, dark=dark)
        wait_for(browser, "!document.getElementById('all').hidden")
        assert {url.removeprefix(address) for url in browser.requests} <= {"", "state.json"}
        assert browser.complaints == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate(PROBES["CONTRAST"]) >= 4.5
        assert browser.evaluate(PROBES["SMALLEST"]) >= 10
        assert browser.evaluate("document.querySelector('.cards').getBoundingClientRect().bottom") <= height
        browser.screenshot(tmp_path / f"{size}.png")


def test_it_follows_the_run_without_being_asked_again(browser, run):
    folder, lines = run
    with serving(folder) as address:
        browser.open_address(address, width=1280, height=800)
        wait_for(browser, "document.getElementById('rounds').textContent === '2 of 3'")
        assert "busy with something else" in browser.evaluate("document.getElementById('refusals').innerText")
        assert "releases no metric" in browser.evaluate("document.getElementById('gain-words').textContent")
        (folder / "ledger.jsonl").write_bytes(b"".join(lines))
        wait_for(browser, "document.getElementById('rounds').textContent === '3 of 3'")
        assert browser.evaluate("document.getElementById('state').textContent").startswith("Finished.")


def test_gains_that_were_released_noised_stand_there_with_their_noise(browser, run, monkeypatch):
    folder, _ = run
    state = run_state(folder)
    row = {"round": 2, "metrics": {"gain": [0.125, 0.02], "loss": [None, None]}}
    monkeypatch.setattr(server.dashboard, "run_state", lambda *_: state | {"noised": [row]})
    with serving(folder) as address:
        browser.open_address(address, width=390, height=844)
        wait_for(browser, "!document.getElementById('all').hidden")
        shown = browser.evaluate("document.getElementById('gains').innerText")
        assert "0.125 \u00b1 0.040" in shown
        assert "too few measured" in shown
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390


def test_names_are_text_and_never_markup(browser, run):
    folder, _ = run
    evil = folder.rename(folder.with_name("<img src=x onerror=alert(1)>"))
    rows = [{"round": 1, "rejected": {"<b>bold": 1}}]
    (evil / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(evil) as address:
        browser.complaints.clear()
        browser.open_address(address, width=1280, height=800)
        wait_for(browser, "!document.getElementById('all').hidden")
        assert browser.evaluate("document.querySelectorAll('img, td b').length") == 0
        assert browser.complaints == []
