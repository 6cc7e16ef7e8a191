"""The owner's page in a real browser: it streams, compares, is corrected, and asks nobody but its own device."""

import json
import runpy
import threading
import time
from pathlib import Path

import pytest

from client.base_model import SharedBase
from client.device_home import DeviceHome
from client.feedback_store import FeedbackStore
from client.level_store import LevelStore
from client.owner_host import owners_side, page_link
from client.record_store import NewRecord, RecordStore
from client.user_data import Record
from common.model_files import base_folder

pytestmark = pytest.mark.browser

TESTS = Path(__file__).parent
PROBES = runpy.run_path(str(TESTS / "test_report_page.py"))
SIZES = PROBES["SIZES"]
ANSWERED = "document.querySelectorAll('.answer .tools:not([hidden])').length === {count}"
HERE = runpy.run_path(str(TESTS.parent / "client" / "test_owner_server.py"))


@pytest.fixture(scope="module")
def shared():
    return SharedBase(base_folder("built-in"))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    home = DeviceHome.open(create=True)
    RecordStore(home).add([NewRecord(Record("what is my cat called?", "Mitzi <b>", 1.0, task="reply"), "test")])
    return home


@pytest.fixture
def side(home, shared):
    process = HERE["HereProcess"](home, shared.folder)
    with owners_side(home, lambda: process, port=0) as found:
        yield found


@pytest.fixture(autouse=True)
def _leave(browser):
    yield
    browser.open_address("about:blank", width=1280, height=800)


def wait_for(browser, expression):
    end = time.monotonic() + 120
    while not browser.evaluate(expression):
        said = browser.evaluate("(document.getElementById('error') || {}).textContent")
        assert time.monotonic() < end, (expression, said)
        time.sleep(0.05)


def enter(browser, home, size="desk", *, dark=False):
    width, height = SIZES[size]
    browser.open_address("about:blank", width=width, height=height)
    browser.requests.clear()
    browser.complaints.clear()
    browser.open_address(page_link(home), width=width, height=height, dark=dark)
    wait_for(browser, "!document.getElementById('all').hidden && !!document.getElementById('device').textContent")


def ask(browser, question, system="personal"):
    count = browser.evaluate("document.querySelectorAll('.answer').length")
    count += 3 if system == "compare" else 1
    submit(browser, question, system)
    wait_for(browser, ANSWERED.format(count=count))


def submit(browser, question, system="personal"):
    browser.evaluate(
        f"document.getElementById('system').value = {json.dumps(system)};"
        f"document.getElementById('question').value = {json.dumps(question)};"
        "document.getElementById('ask').requestSubmit(); 1"
    )


def tab(browser, name, ready):
    browser.evaluate(f"document.getElementById('tab-{name}').click(); 1")
    wait_for(browser, ready)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_every_part_is_legible_and_asks_nobody_else(browser, side, home, size, dark, tmp_path):
    enter(browser, home, size, dark=dark)
    ask(browser, "write a note about the garden", "compare")
    parts = {
        "chat": "!document.getElementById('chat').hidden",
        "you": "document.querySelectorAll('#levels .item').length > 3",
        "corrections": "!!document.getElementById('said').textContent",
        "privacy": "!!document.getElementById('budget-sentence').textContent",
    }
    for name, ready in parts.items():
        tab(browser, name, ready)
        assert browser.evaluate("document.documentElement.scrollWidth") <= SIZES[size][0]
        assert browser.evaluate(PROBES["CONTRAST"]) >= 4.5
        assert browser.evaluate(PROBES["SMALLEST"]) >= 10
        browser.screenshot(tmp_path / f"{size}-{name}.png")
    assert "delta" in browser.evaluate("document.getElementById('budget-sentence').textContent")
    assert "Nothing ever left" in browser.evaluate("document.getElementById('sent-words').textContent")
    own = f"http://127.0.0.1:{side.port}/"
    assert {url for url in browser.requests if not url.startswith((own, "data:", "about:"))} == set()
    assert browser.complaints == []


def test_the_ticket_does_not_stay_in_the_address_and_is_good_once(browser, side, home):
    link = page_link(home)
    browser.open_address(link, width=1280, height=800)
    wait_for(browser, "!document.getElementById('all').hidden")
    assert browser.evaluate("location.href") == link.partition("#")[0]
    assert browser.evaluate("document.cookie") == ""
    assert browser.evaluate("Object.keys(localStorage).length") == 0
    browser.evaluate("sessionStorage.clear(); 1")
    browser.open_address("about:blank", width=1280, height=800)
    browser.open_address(link, width=1280, height=800)
    wait_for(browser, "document.getElementById('error').textContent.includes('was used')")
    assert browser.evaluate("document.getElementById('all').hidden")


def test_an_answer_streams_piece_by_piece(browser, home, shared):
    seen = threading.Event()

    class Waits(HERE["HereProcess"]):
        """Says no more than the first piece of text until that was seen."""

        def talk(self, facts):
            said = False
            for piece in super().talk(facts):
                assert not said or seen.wait(60)
                said = said or bool(piece.get("text"))
                yield piece

    process = Waits(home, shared.folder)
    with owners_side(home, lambda: process, port=0):
        enter(browser, home)
        text = "document.querySelector('.answer .text').textContent"
        submit(browser, "write a note about the garden")
        wait_for(browser, f"!!document.querySelector('.answer .text') && {text} !== ''")
        first = browser.evaluate(text)
        assert browser.evaluate("document.querySelector('.answer .tools').hidden")
        seen.set()
        wait_for(browser, ANSWERED.format(count=1))
        whole = browser.evaluate(text)
        assert whole.startswith(first)
        assert len(whole) > len(first)
        browser.open_address("about:blank", width=1280, height=800)


def test_an_edit_of_an_answer_becomes_a_pair(browser, side, home):
    enter(browser, home)
    ask(browser, "write a note about the garden")
    answer = browser.evaluate("document.querySelector('.answer .text').textContent")
    assert len(answer.split()) > 1
    assert len(RecordStore(home)) == 1  # nothing of it is kept
    browser.evaluate(
        "[...document.querySelectorAll('.tools button')].find(b => b.textContent === 'Correct').click(); 1"
    )
    assert browser.evaluate("document.getElementById('edit').open")
    browser.evaluate(
        "document.getElementById('edited').value = 'Ahoy, the garden!'; document.getElementById('edit-save').click(); 1"
    )
    wait_for(browser, "document.querySelector('.who').textContent.includes('1 pair')")
    (said,) = FeedbackStore(home).all().values()
    assert (said.kind, said.answer, said.edited) == ("edit", answer, "Ahoy, the garden!")
    pair = [one.record for one in RecordStore(home).records() if one.source == "feedback"]
    assert [(one.response, one.rejected) for one in pair] == [("Ahoy, the garden!", answer)]
    tab(browser, "corrections", "document.querySelectorAll('#said .item').length === 1")
    browser.evaluate("document.querySelector('#said button').click(); 1")
    wait_for(browser, "document.querySelectorAll('#said .item').length === 0")
    assert len(RecordStore(home)) == 1


def test_the_profile_is_edited_and_the_next_answer_knows_it(browser, side, home):
    enter(browser, home)
    tab(browser, "you", "document.querySelectorAll('#levels .item').length > 3")
    browser.evaluate(
        "document.getElementById('new-line').value = 'My dog is called Rufus.';"
        "document.getElementById('add-line').requestSubmit(); 1"
    )
    wait_for(browser, "[...document.querySelectorAll('#lines input')].some(one => one.value.includes('Rufus'))")
    assert "My dog is called Rufus." in [line.text for line in LevelStore(home).profile().lines]
    tab(browser, "chat", "!document.getElementById('chat').hidden")
    ask(browser, "what is my dog called?", "compare")
    texts = browser.evaluate("[...document.querySelectorAll('.answer .text')].map(one => one.textContent)")
    assert ["Rufus" in text for text in texts] == [False, False, True]
    assert "Rufus" in browser.evaluate("document.getElementById('shown').textContent")


def test_it_says_which_records_were_used_as_text_and_never_as_markup(browser, side, home):
    enter(browser, home)
    LevelStore(home).prefer("retrieval")
    ask(browser, "what is my cat called?")
    assert "Mitzi <b>" in browser.evaluate("document.getElementById('shown').textContent")
    assert browser.evaluate("document.querySelectorAll('#shown b').length") == 0
    assert browser.complaints == []


def test_it_is_used_with_the_keyboard_alone(browser, side, home):
    enter(browser, home)
    assert browser.evaluate("document.activeElement.id") == "question"
    for letter in "hello":
        browser.send("Input.dispatchKeyEvent", type="char", text=letter)
    for kind in ("rawKeyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13)
    wait_for(browser, "document.querySelectorAll('.answer .tools:not([hidden])').length === 1")
    browser.evaluate("document.getElementById('tab-chat').focus(); 1")
    for kind in ("rawKeyDown", "keyUp"):
        browser.send("Input.dispatchKeyEvent", type=kind, key="ArrowRight", code="ArrowRight", windowsVirtualKeyCode=39)
    wait_for(browser, "!document.getElementById('you').hidden")
    assert browser.evaluate("document.activeElement.id") == "tab-you"
