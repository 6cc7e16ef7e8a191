"""Where state lies: one variable moves all of it, otherwise the XDG folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from common.places import cache_home, runtime_home, state_home

PLACES = (state_home, cache_home, runtime_home)


def test_one_variable_moves_everything():
    variables = {"HOMESPUN_HOME": "/srv/h", "XDG_STATE_HOME": "/x", "XDG_CACHE_HOME": "/y", "XDG_RUNTIME_DIR": "/z"}
    assert [place(variables) for place in PLACES] == [Path("/srv/h"), Path("/srv/h/cache"), Path("/srv/h/run")]


def test_the_xdg_folders_are_used():
    variables = {"XDG_STATE_HOME": "/x", "XDG_CACHE_HOME": "/y", "XDG_RUNTIME_DIR": "/z"}
    assert [place(variables) for place in PLACES] == [Path("/x/homespun"), Path("/y/homespun"), Path("/z/homespun")]


@pytest.mark.parametrize("value", ["", "relative/folder"])
def test_an_empty_or_relative_xdg_variable_is_ignored(value, monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    variables = dict.fromkeys(("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR"), value)
    state = Path("/home/someone/.local/state/homespun")
    assert [place(variables) for place in PLACES] == [state, Path("/home/someone/.cache/homespun"), state / "run"]


def test_a_relative_home_is_taken_from_where_the_command_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert state_home({"HOMESPUN_HOME": "here"}) == tmp_path / "here"


def test_a_tilde_is_the_users_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert state_home({"HOMESPUN_HOME": "~/h"}) == Path("/home/someone/h")


def test_the_environment_of_the_process_is_read_when_none_is_given(monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", "/srv/h")
    assert state_home() == Path("/srv/h")
    assert runtime_home() == Path("/srv/h/run")
