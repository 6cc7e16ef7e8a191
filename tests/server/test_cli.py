"""`homespun server ...`, as an operator types it."""

from __future__ import annotations

import json

import pytest

import homespun
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
