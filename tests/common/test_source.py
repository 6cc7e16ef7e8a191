"""The digest of the source files that go into the Flower bundle."""

from __future__ import annotations

import pytest

from common.source import bundle_files, source_digest

FILES = {
    "common/__init__.py": "",
    "common/ledger.py": "entries = 1\n",
    "server/rounds.py": "rounds = 2\n",
    "client/__init__.py": "",
    "client/app.py": "app = 3\n",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_the_files_of_a_bundle_are_listed_in_order(tree):
    assert bundle_files(tree) == tuple(sorted(FILES))


@pytest.mark.parametrize("name", ["client/trainer.py", "simulations/grid.py", "tests/common/x.py", "common/data.json"])
def test_what_stays_out_of_the_bundle_does_not_change_the_digest(tree, name):
    before = source_digest(tree)
    (tree / name).parent.mkdir(parents=True, exist_ok=True)
    (tree / name).write_text("# new\n")
    assert source_digest(tree) == before


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_change_of_one_file_changes_the_digest(tree, name):
    before = source_digest(tree)
    (tree / name).write_text(FILES[name] + "#")
    assert source_digest(tree) != before


def test_a_renamed_file_changes_the_digest(tree):
    before = source_digest(tree)
    (tree / "common/ledger.py").rename(tree / "common/other.py")
    assert source_digest(tree) != before


def test_moving_bytes_from_one_file_to_the_next_changes_the_digest(tree):
    before = source_digest(tree)
    (tree / "common/__init__.py").write_text("entries = 1\n")
    (tree / "common/ledger.py").write_text("")
    assert source_digest(tree) != before


def test_the_digest_of_the_running_code_is_that_of_its_folder():
    from pathlib import Path

    assert source_digest() == source_digest(Path(__file__).resolve().parents[2])
