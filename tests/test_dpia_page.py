"""docs/dpia.md names commands, files, tests and headings; all of them are there."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import click
import pytest
import typer

import homespun

ROOT = Path(__file__).resolve().parents[1]
PAGES = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("dpia.md", "audit.md")}


def commands() -> set[str]:
    """Every command there is, as it is typed."""
    found = {"version"}
    for word, row in homespun._COMMANDS.items():
        module, _, attribute = row.target.partition(":")
        target = getattr(importlib.import_module(module), attribute)
        found.add(word)
        if isinstance(target, typer.Typer):
            found |= set(_below(word, typer.main.get_command(target)))
    return found


def _below(prefix, command):
    yield prefix
    if isinstance(command, click.Group):
        for name, part in command.commands.items():
            yield from _below(f"{prefix} {name}", part)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_the_page_names_exists(page):
    known = commands()
    named = re.findall(r"`homespun ([a-z]+(?: [a-z]+){0,2})", PAGES[page])
    assert len(named) > 4
    for words in named:
        parts = words.split()
        assert any(" ".join(parts[:length]) in known for length in range(len(parts), 1, -1)) or parts[0] in known - {
            "device",
            "server",
            "audit",
            "sim",
        }, words


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_test_that_the_page_names_exists(page):
    for path in re.findall(r"`((?:common|client|server|simulations|docs|tests)/[a-z_/]+\.(?:py|md))`", PAGES[page]):
        assert (ROOT / path).is_file(), path
    found = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert set(re.findall(r"`(test_[a-z0-9_]+)`", PAGES[page])) - found == set()


def test_every_heading_of_article_35_and_every_right_from_13_to_22_has_its_row():
    page = PAGES["dpia.md"]
    for letter in "abcd":
        assert f"## Article 35(7)({letter})" in page
    rows = re.findall(r"^\| ([0-9, ]+) \|", page, re.M)
    assert sorted(int(number) for row in rows for number in row.split(",")) == list(range(13, 23))


def test_what_is_kept_is_as_much_as_the_code_keeps():
    from client.device_home import KEPT_RELEASES
    from client.vault_service import MOST_KEPT

    assert f"the last {KEPT_RELEASES} releases" in PAGES["dpia.md"]
    assert f"the last {MOST_KEPT} releases" in PAGES["dpia.md"]
