"""Private files: whole or absent, for their owner only, one process at a time."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import Refusal, StoreError
from common.files import make_private_folder, read_private_file, take_lock, write_private_file

ROOT = Path(__file__).parents[2]


def test_a_file_is_written_for_its_owner_only_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_private_file(path, b"content")
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_private_file(path) == b"content"
    write_private_file(path, b"other", replace=True)
    assert read_private_file(path) == b"other"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_existing_file_is_left_alone_unless_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_private_file(path, b"old")
    with pytest.raises(FileExistsError):
        write_private_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_private_file(path, b"old")

    def fail(_: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_private_file(path, b"new", replace=True)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_file_of_secrets_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "file"
    write_private_file(path, b"secret")
    path.chmod(mode)
    with pytest.raises(StoreError, match="chmod 600"):
        read_private_file(path)


def test_a_missing_file_is_said(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(StoreError, match="no such"):
            read_private_file(path)


def test_folders_are_made_for_their_owner_only(tmp_path: Path) -> None:
    make_private_folder(tmp_path / "one" / "two")
    make_private_folder(tmp_path / "one" / "two")
    assert {folder.stat().st_mode & 0o777 for folder in (tmp_path / "one", tmp_path / "one" / "two")} == {0o700}


def test_a_lock_is_held_by_one_and_given_back_by_death(tmp_path: Path) -> None:
    path = tmp_path / "file"
    program = (
        "import os, sys; from pathlib import Path\n"
        "from common.errors import Refusal; from common.files import take_lock\n"
        "try: take_lock(Path(sys.argv[1]), 'taken')\n"
        "except Refusal as refusal: print(refusal.code, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )

    def answer() -> str:
        command = [sys.executable, "-c", program, str(path)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout

    descriptor = take_lock(path, "taken")
    assert answer() == "taken\n"
    with pytest.raises(Refusal, match="another process"):
        take_lock(path, "taken")
    os.close(descriptor)
    assert answer() == ""
    os.close(take_lock(path, "taken"))


def test_a_disk_that_is_full_is_said_with_the_files_name_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_private_file(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as raised:
        write_private_file(path, b"new", replace=True)
    assert raised.value.filename == str(path)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_missing_is_said_with_the_name_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as raised:
        write_private_file(tmp_path / "missing" / "file", b"x")
    assert raised.value.filename == str(tmp_path / "missing" / "file")
    write_private_file(tmp_path / "file", b"x")
    with pytest.raises(FileExistsError) as raised:
        write_private_file(tmp_path / "file", b"y")
    assert (raised.value.filename, raised.value.filename2) == (str(tmp_path / "file"), None)
