"""The folder of a coordinator: settings that last, and a process that is told from another one with its number."""

from __future__ import annotations

import json
import os
import stat

import pytest

from common.errors import DataError, StoreError
from server.server_home import ServerHome


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
