"""The page of a run in a real browser: nothing loaded, nothing logged, legible on a desk and on a phone."""

import runpy
from pathlib import Path

import pytest

from simulations.report import write_report

pytestmark = pytest.mark.browser

FAKE = runpy.run_path(str(Path(__file__).parent.parent / "simulations" / "fake_run.py"))

RUNS = {
    "whole": {},
    "no-claim": {"statement": FAKE["STATEMENT"] | {"epsilon": "inf"}, "epsilon": "inf"},
    "local": {"method": "local", "systems": ("base", "private")},
    "unfinished": {"systems": (), "statement": None},
}
SIZES = {"desk": (1280, 800), "phone": (390, 844)}

CONTRAST = """
(() => {
  const channel = c => (c /= 255) <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
  const light = rgb => {
    const [r, g, b] = rgb.match(/[\\d.]+/g).map(Number);
    return 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = ink => (Math.max(ink, paper) + 0.05) / (Math.min(ink, paper) + 0.05);
  const lowest = [...document.querySelectorAll('p, td, th, small, li, dd, dt, caption, h1, h2, h3, text')].map(node => {
    const style = getComputedStyle(node);
    return ratio(light(node.tagName === 'text' ? style.fill : style.color));
  });
  return Math.min(...lowest);
})()
"""

SMALLEST = """
Math.min(...[...document.querySelectorAll('p, td, th, small, li, dd, caption, svg.chart text')]
  .filter(node => node.getBoundingClientRect().width > 2)
  .map(node => {
    const chart = node.closest('svg.chart');
    const scale = chart ? chart.getBoundingClientRect().width / chart.viewBox.baseVal.width : 1;
    return parseFloat(getComputedStyle(node).fontSize) * scale;
  }))
"""

OVERFLOWING = """
[...document.querySelectorAll('main *')].filter(node => !node.closest('svg, pre, thead') &&
  node.getBoundingClientRect().right > document.documentElement.clientWidth + 1)
  .map(node => node.outerHTML.slice(0, 80))
"""

COLLIDING = """
[...document.querySelectorAll('svg.chart')].flatMap(chart => {
  const boxes = [...chart.querySelectorAll('text')].map(node => [node.textContent, node.getBoundingClientRect()]);
  const across = (p, q) => Math.min(p.right, q.right) - Math.max(p.left, q.left);
  const down = (p, q) => Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
  return boxes.flatMap(([a, p], i) => boxes.slice(i + 1)
    .filter(([b, q]) => across(p, q) > 1 && down(p, q) > 4)
    .map(([b]) => a + ' | ' + b));
})
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return {
        name: write_report(FAKE["write_fake_run"](root / name, users=120, **settings))
        for name, settings in RUNS.items()
    }


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", RUNS)
def test_the_page_is_legible_and_loads_nothing(browser, pages, name, size, dark):
    browser.requests.clear()
    browser.complaints.clear()
    width, height = SIZES[size]
    browser.open(pages[name], width=width, height=height, dark=dark)
    assert browser.requests == [pages[name].as_uri()]
    assert browser.complaints == []
    assert browser.evaluate("document.documentElement.scrollWidth") <= width
    assert browser.evaluate(OVERFLOWING) == []
    assert browser.evaluate(COLLIDING) == []
    assert browser.evaluate(CONTRAST) >= 4.5
    assert browser.evaluate(SMALLEST) >= 10


def test_the_probes_see_what_they_should(browser, pages):
    browser.open(pages["whole"], width=390, height=844)
    browser.evaluate("document.querySelectorAll('svg.chart text').forEach(node => node.setAttribute('x', 60))")
    browser.evaluate("document.querySelector('h2').style.color = 'rgb(250, 250, 250)'")
    browser.evaluate("document.querySelector('.note').style.cssText = 'font-size: 6px; width: 700px; max-width: none'")
    assert browser.evaluate(COLLIDING)
    assert browser.evaluate(OVERFLOWING)
    assert browser.evaluate(CONTRAST) < 1.1
    assert browser.evaluate(SMALLEST) == 6


def test_the_first_screen_of_a_desk_holds_the_result_and_the_promise(browser, pages):
    browser.open(pages["whole"], width=1280, height=800)
    for selector in ("h1", "table.cards", ".status", ".promise"):
        assert browser.evaluate(f"document.querySelector('{selector}').getBoundingClientRect().bottom") <= 800


def test_dark_and_light_follow_the_reader(browser, pages):
    papers = set()
    for dark in (False, True):
        browser.open(pages["whole"], width=1280, height=800, dark=dark)
        papers.add(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(papers) == 2


def test_paper_is_white_whatever_the_reader_prefers(browser, pages):
    browser.open(pages["whole"], width=690, height=1000, dark=True, media="print")
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.evaluate("getComputedStyle(document.querySelector('.figures')).gridTemplateColumns").count("px") == 2
    browser.send("Emulation.setEmulatedMedia", media="screen")


def test_the_page_can_be_photographed(browser, pages, tmp_path):
    browser.open(pages["whole"], width=390, height=844)
    browser.screenshot(tmp_path / "phone.png")
    assert (tmp_path / "phone.png").read_bytes().startswith(b"\x89PNG")
