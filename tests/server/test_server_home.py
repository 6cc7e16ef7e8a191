"""The folder of a coordinator: settings that last, and a process that is told from another one with its number."""

from __future__ import annotations

import json
import os
import re
import socket
import stat

import pytest

from common.errors import ConfigError, DataError, StoreError
from server.server_home import ServerHome, bound, check_address


@pytest.fixture
def home(tmp_path):
    return ServerHome.open(tmp_path / "server", create=True)


def test_a_coordinator_is_made_only_when_asked_for(tmp_path):
    with pytest.raises(DataError, match="server up"):
        ServerHome.open(tmp_path / "server")
    home = ServerHome.open(tmp_path / "server", create=True)
    assert stat.S_IMODE(home.folder.stat().st_mode) == 0o700


def test_settings_are_kept_changed_and_taken_out(home):
    assert home.settings() == {}
    home.change_settings(address="here:1", name="a")
    home.change_settings(name=None)
    assert home.settings() == {"address": "here:1", "format": 1}


@pytest.mark.parametrize("content", ["", "[]", '{"format": 2}', '{"address": "x"}'])
def test_settings_of_another_format_are_refused(home, content):
    (home.folder / "settings.json").write_text(content)
    with pytest.raises(StoreError):
        home.settings()


def test_the_coordinator_that_runs_is_found_and_a_dead_one_is_not(home):
    assert home.running() is None
    home.note_running("host:9443", "127.0.0.1:1")
    found = home.running()
    assert (found.pid, found.address, found.metrics) == (os.getpid(), "host:9443", "")

    values = json.loads((home.folder / "coordinator.json").read_text())
    (home.folder / "coordinator.json").write_text(json.dumps(values | {"started": "1"}))
    assert home.running() is None  # another process got its number
    home.note_stopped()
    assert home.running() is None
    assert not home.stop_running()


@pytest.mark.parametrize(
    "text", ["host", "host:", "host:0", "host:65536", "host:99999", "a b:1", "http://host:1", ":1"]
)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(ConfigError, match=re.escape(text)):
        check_address(text)


def test_an_address_that_somebody_listens_on_is_refused_and_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=f"{taken}: cannot be listened on: Address already in use"):
            bound(taken)


def test_an_address_that_is_free_is_taken_at_once():
    (one,) = bound("127.0.0.1:0")
    with one:
        assert one.getsockname()[1] > 0


def test_runs_are_listed_the_oldest_first_and_what_is_none_is_passed_over(tmp_path):
    home = ServerHome(tmp_path)
    assert home.run_folders() == []
    for age, name in enumerate(("new", "old", ".hidden")):
        (home.runs / name).mkdir(parents=True)
        (home.runs / name / "config.toml").touch()
        os.utime(home.runs / name / "config.toml", ns=(0, 10**9 - age))
    (home.runs / "empty").mkdir()
    assert [path.name for path in home.run_folders()] == ["old", "new"]
