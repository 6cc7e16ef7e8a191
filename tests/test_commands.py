"""Every command that was promised is there, has one example, prints JSON where it prints data, and ends as it says."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from functools import cache

import click
import pytest
import typer

import homespun

PROMISED = {
    "": "demo plan chat doctor version",
    "sim": "run resume list show sweep compare export data methods bench",
    "device": "join up down status pause resume leave open chat serve sent backup restore "
    "export import forget evidence learn",
    "device data": "add list show remove",
    "device profile": "show edit delete",
    "device level": "list on off",
    "device policy": "show set check",
    "device budget": "show refill",
    "server": "up down status invite devices approve revoke run runs stop resume export renew backup restore evidence "
    "dashboard",
    "device feedback": "list add remove",
    "audit": "verify recompute reconcile attack report sign",
}
"""The design's list of commands; `learn` came by decision 0007."""

PRINTS_NO_DATA = {
    *("demo", "device join", "device up", "device down", "device pause", "device resume", "device leave"),
    *(
        "device open",
        "device chat",
        "device serve",
        "device feedback add",
        "device feedback remove",
        "device policy set",
        "device level on",
    ),
    *("device level off", "server up", "server down", "server invite", "server approve", "server revoke"),
    *("server renew", "server run", "server stop", "server resume", "server backup", "server restore"),
    "server dashboard",
}
"""Commands that do something and say so in a line, or talk until they are ended."""

PENDING: set[str] = set()
"""Promised, and not there yet; one that has arrived must leave this list."""

WORDS = [f"{group} {name}".strip() for group, names in PROMISED.items() for name in names.split()]


@cache
def command(path: str) -> click.Command | None:
    """Find a command; None where there is none."""
    first, *rest = path.split()
    row = homespun._COMMANDS.get(first)
    if row is None:
        return None
    homespun._use_own_folders()
    module, _, attribute = row.target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    if not isinstance(target, typer.Typer):
        app = typer.Typer(add_completion=False)
        app.command()(target)
        target = app
    found: click.Command | None = typer.main.get_command(target)
    for word in rest:
        found = found.commands.get(word) if isinstance(found, click.Group) else None
    return found


def options(path: str) -> set[str]:
    return {option for parameter in command(path).params for option in parameter.opts}


HERE = [path for path in WORDS if path != "version" and path not in PENDING]


@pytest.mark.parametrize("path", HERE)
def test_a_promised_command_is_there_and_says_what_it_does_with_one_example(path):
    found = command(path)
    assert found is not None
    assert not isinstance(found, click.Group)
    text = found.help or ""
    assert text.strip()[:1].isupper()
    (example,) = re.findall(r"^Example: (homespun .+)$", text, re.MULTILINE)
    assert shlex.split(example)[1 : 1 + len(path.split())] == path.split()


@pytest.mark.parametrize("path", HERE)
def test_an_example_is_one_that_the_command_takes(path):
    """Parsed, never run: every word and option of it exists."""
    found = command(path)
    (example,) = re.findall(r"^Example: (homespun .+)$", found.help or "", re.MULTILINE)
    words = shlex.split(example, comments=True)[1 + len(path.split()) :]
    found.make_context(path, words, resilient_parsing=False)


@pytest.mark.parametrize("path", HERE)
def test_no_option_shows_python_where_a_person_reads(path):
    for parameter in command(path).params:
        shown = f"{parameter.metavar or ''} {getattr(parameter, 'help', '') or ''}"
        assert not re.search(r"typing|<class|Literal|NoneType|default: \]", shown), (path, parameter.name, shown)


@pytest.mark.parametrize("path", ["sim lifelong", "device serve", "server invite"])
def test_help_shows_no_escapes(path, capsys):
    assert homespun.main([*path.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "[default:" in shown
    assert "\\[" not in shown


@pytest.mark.parametrize("path", [path for path in HERE if path not in PRINTS_NO_DATA])
def test_what_prints_data_prints_it_as_json_when_asked(path):
    assert "--json" in options(path)


def test_what_is_pending_has_not_arrived_unnoticed():
    assert [path for path in sorted(PENDING) if command(path) is not None] == []
    assert set(WORDS) >= PENDING


def test_no_command_is_there_that_nobody_promised():
    more = {
        *("sim answers", "sim newcomers", "sim lifelong", "device level used"),  # more than the list, on purpose
    }

    def walk(found, path):
        if isinstance(found, click.Group):
            for name, inner in found.commands.items():
                yield from walk(inner, f"{path} {name}")
        else:
            yield path

    there = {path for word in homespun._COMMANDS for path in walk(command(word), word)}
    assert there - set(WORDS) - more == set()


class TestExitCodes:
    """0 done, 1 failed, 2 usage, 3 refused on purpose, 4 evidence fails, each by commands of several groups."""

    @pytest.fixture(autouse=True)
    def place(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
        monkeypatch.chdir(tmp_path)
        return tmp_path

    @pytest.mark.parametrize(
        "words", ["version", "sim list --json", "sim methods --json", "doctor --offline --json", "--help"]
    )
    def test_what_is_done_ends_with_0(self, words, capsys):
        assert homespun.main(words.split()) == 0
        out = capsys.readouterr().out
        if "--json" in words:
            json.loads(out)

    @pytest.mark.parametrize(
        "words",
        [
            "device data list",
            "device export",
            "device sent",
            "sim show",
            "audit verify nothing.jsonl",
            "server export x",
        ],
    )
    def test_what_fails_ends_with_1_in_one_line(self, words, capsys):
        assert homespun.main(words.split()) == 1
        assert capsys.readouterr().err.count("\n") == 1

    @pytest.mark.parametrize("path", HERE)
    def test_an_option_that_is_not_there_ends_with_2_in_one_line(self, path, capsys):
        assert homespun.main([*path.split(), "--no-such-option"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "--help shows how" in err

    def test_what_is_refused_on_purpose_ends_with_3(self, place, capsys):
        (place / "a.txt").write_text("a note of mine")
        assert homespun.main(["device", "data", "add", "a.txt", "--yes"]) == 0
        for words in ("device forget", "device data add ./b.txt"):
            (place / "b.txt").write_text("another note")
            assert homespun.main(words.split()) == 3
            assert "--yes" in capsys.readouterr().err

    def test_evidence_that_fails_ends_with_4(self, place, capsys):
        (place / "ledger.jsonl").write_text('{"format": "something else"}\n')
        assert homespun.main(["audit", "verify", "ledger.jsonl"]) == 4
        assert "DOES NOT CHECK OUT" in capsys.readouterr().out
