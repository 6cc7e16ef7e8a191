"""`homespun server ...`, as an operator types it."""

from __future__ import annotations

import json
import socket

import pytest

import homespun
from server.cli import _last_words
from server.server_home import ServerHome


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path))
    return tmp_path / "server"


def test_before_the_first_up_there_is_nothing_to_say(capsys):
    assert homespun.main(["server", "status"]) == 1
    assert "homespun server up" in capsys.readouterr().err


def test_status_says_whether_the_coordinator_runs(home, capsys):
    opened = ServerHome.open(home, create=True)
    assert homespun.main(["server", "status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["running"] is False
    opened.note_running("host:9443", "127.0.0.1:1")
    assert homespun.main(["server", "status"]) == 0
    assert "host:9443" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["--address", "fleet:99999"], ["--listen", "9443"], ["--metrics", "9464"]])
def test_an_address_that_is_none_is_refused_before_anything_starts(home, words, capsys):
    assert homespun.main(["server", "up", "--detach", *words]) == 2
    assert words[1] in capsys.readouterr().err
    assert not (home / "coordinator.log").exists()


def test_a_coordinator_whose_address_is_taken_never_says_that_it_runs(home, capsys, monkeypatch):
    said = []
    monkeypatch.setattr("server.server_home.ServerHome.note_running", lambda *_: said.append("runs"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        assert homespun.main(["server", "up", "--listen", taken]) == 2
    assert f"{taken}: cannot be listened on" in capsys.readouterr().err
    assert said == []


def test_why_a_coordinator_gave_up_is_read_from_its_log_and_not_from_an_earlier_day(tmp_path):
    log = tmp_path / "coordinator.log"
    log.write_text("homespun: of yesterday\n")
    start = log.stat().st_size
    assert _last_words(log, start) == ""
    with log.open("a") as file:
        file.write('{"event": "down"}\nhomespun: host:9443: cannot be listened on\n')
    assert _last_words(log, start) == ": host:9443: cannot be listened on"
