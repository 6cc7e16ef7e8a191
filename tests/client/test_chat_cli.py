"""`homespun device chat`, `serve` and `feedback`: what a person at a terminal gets."""

from __future__ import annotations

import json
import os
import signal

import pytest

import homespun
from client.device_home import DeviceHome
from client.feedback_store import FeedbackStore
from client.level_store import LevelStore
from client.personalization.profile import Profile
from client.record_store import RecordStore

QUESTION = "what is my dog called?"


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    home = DeviceHome.open(create=True)
    LevelStore(home).keep_profile(Profile().edited(1, "My dog is called Rufus."))
    return home


@pytest.fixture
def said(monkeypatch):
    """Have these lines typed."""

    def say(*lines):
        typed = iter(lines)

        def read(shown=""):
            try:
                return next(typed)
            except StopIteration:
                raise EOFError from None

        monkeypatch.setattr("builtins.input", read)

    return say


def test_one_question_is_answered_by_the_model_of_ones_own(home, capsys):
    assert homespun.main(["device", "chat", "--prompt", QUESTION]) == 0
    assert "Rufus" in capsys.readouterr().out
    assert homespun.main(["chat", "--prompt", QUESTION]) == 0  # without a run: my own
    assert "Rufus" in capsys.readouterr().out
    assert homespun.main(["device", "chat", "--system", "base", "--prompt", QUESTION, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["used"] == "base"
    assert found["profile"] == []
    assert found["finish"] in ("stop", "length")
    assert len(RecordStore(home)) == 0


def test_a_conversation_is_corrected_and_nothing_else_is_kept(home, said, capsys):
    said(
        "/why",
        QUESTION,
        "/why",
        "/edit It is Rufus, of course.",
        "/base",
        "tell me more",
        "/keep",
        "/nonsense",
        "/quit",
    )
    assert homespun.main(["device", "chat"]) == 0
    out = capsys.readouterr().out
    assert "profile: My dog is called Rufus." in out
    assert "nothing was answered yet" in out
    assert "/edit TEXT" in out
    records = [one for one in RecordStore(home).records()]
    assert sorted(one.source for one in records) == ["chat", "feedback"]
    assert [one.edited for one in FeedbackStore(home).all().values()] == ["It is Rufus, of course."]


def test_feedback_is_listed_added_and_taken_back(home, capsys):
    add = ["device", "feedback", "add", "--prompt", "Sign off", "--answer", "Best"]
    assert homespun.main([*add, "--better", "Cheers", "--json"]) == 0
    name = json.loads(capsys.readouterr().out)["id"]
    assert homespun.main([*add, "--bad"]) == 0
    capsys.readouterr()
    assert homespun.main(["device", "feedback", "list", "--json"]) == 0
    assert {one["kind"] for one in json.loads(capsys.readouterr().out)} == {"edit", "down"}
    assert homespun.main(["device", "feedback", "remove", name[:8]]) == 0
    assert homespun.main(["device", "feedback", "remove", name[:8]]) == 1
    assert homespun.main([*add, "--better", "Best"]) == 2
    assert [one.kind for one in FeedbackStore(home).all().values()] == ["down"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--host", "0.0.0.0"], 3),  # noqa: S104
        (["--host", "192.168.1.5", "--port", "8642"], 3),
        (["--beyond-this-machine"], 2),
        (["--port", "0"], 2),
    ],
)
def test_the_endpoint_is_reached_from_elsewhere_only_when_that_is_said_twice(home, words, code, capsys):
    assert homespun.main(["device", "serve", *words]) == code
    assert "hs-" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["chat", "--json"], ["chat", "--system", "nobody", "--prompt", "x"], ["open", "--print"]]
)
def test_what_cannot_be_done_is_said_in_a_line(home, words, capsys):
    assert homespun.main(["device", *words]) in (1, 2, 3)
    assert len(capsys.readouterr().err.strip().splitlines()) == 1


class TestServingAlone:
    """`serve` where nothing is up: other commands know of it, and it leaves nothing behind."""

    @pytest.fixture
    def served(self, home, monkeypatch, capsys):  # noqa: ARG002
        """Do something while it serves, and end it."""
        monkeypatch.setattr("signal.signal", lambda *_: None)
        monkeypatch.setattr("client.owner_desk.OwnersDesk.begin_counting", lambda self: None)
        monkeypatch.setattr("client.owner_host.PORT", 0)

        def call(do):
            def meanwhile(*_):
                do()
                raise KeyboardInterrupt

            monkeypatch.setattr("client.chat_cli._say_where", meanwhile)
            assert homespun.main(["device", "serve"]) == 130
            return capsys.readouterr()

        return call

    def test_status_says_so_and_what_needs_a_quiet_device_is_refused(self, served, tmp_path, capsys):
        codes = []

        def do():
            codes.append(homespun.main(["device", "up"]))
            codes.append(homespun.main(["device", "backup", str(tmp_path / "copy")]))
            codes.append(homespun.main(["device", "status"]))

        said = served(do)
        assert codes == [3, 3, 0]
        assert said.out.startswith("serves its owner, as process")
        assert said.err.count("homespun device down") == 2
        assert homespun.main(["device", "status", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["up"], facts["only_serves"], facts["process"]) == (False, False, None)

    def test_forgetting_ends_it_first(self, served, home, monkeypatch):
        ended = []

        def kill(pid, number):
            ended.append((pid, number))
            (home.folder / "agent.json").unlink()

        monkeypatch.setattr("client.fleet_cli.os.kill", kill)
        said = served(lambda: homespun.main(["device", "forget", "--yes"]))
        assert ended == [(os.getpid(), signal.SIGTERM)]
        assert "down\nerased" in said.out
