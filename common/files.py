"""Files that nobody else may read, that are whole or absent, and that one process holds at a time."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path

from common.errors import Refusal, StoreError

__all__ = ["make_private_folder", "read_private_file", "sync_folder", "take_lock", "write_private_file"]


def write_private_file(path: Path, content: bytes, *, replace: bool = False) -> None:
    """Write a whole file at once, readable by its owner only (0600), and return when it is on disk.

    Guarantee: after a crash the path holds the old file, the new one, or nothing, never a part. Without `replace`
    an existing file is left alone, also when two processes race.

    Raises:
        FileExistsError: The file exists and `replace` is false.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.new")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            # A hard link, unlike a rename, fails when the name is taken.
            path.hardlink_to(temporary)
    except OSError as error:
        if error.errno is not None:  # nobody knows the temporary name, and what fails at a descriptor has none
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        # Where it could not even be made, as on a file system that is read-only, nothing is there to remove.
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_private_file(path: Path) -> bytes:
    """Read a file of secrets.

    Raises:
        StoreError: The file is missing or other users may read it.
    """
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if os.name == "posix" and stat.S_IMODE(mode) & 0o077:
                raise StoreError(f"{path}: other users may read this key file; chmod 600 it")
            return file.read()
    except (FileNotFoundError, IsADirectoryError):
        raise StoreError(f"{path}: no such key file") from None


def sync_folder(folder: Path) -> None:
    """Make names that were created, replaced or removed in `folder` survive a power cut."""
    with contextlib.suppress(PermissionError):  # Windows opens no folders, and needs no such call
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def make_private_folder(folder: Path) -> None:
    """Make `folder` and the missing ones above it, for their owner only (0700), and return when they are on disk."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    for part in reversed(missing):
        part.mkdir(mode=0o700, exist_ok=True)
        sync_folder(part.parent)


def take_lock(path: Path, code: str) -> int:
    """Take the exclusive lock that goes with `path`, an empty file `<path>.lock`; return its descriptor.

    Closing the descriptor gives the lock back, and so does the end of the process, however it ends.

    Raises:
        Refusal: With `code`; another process, or another object in this one, holds it.
    """
    import fcntl  # POSIX; what only reads works without

    descriptor = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        # flock, not POSIX record locks: those are lost when any descriptor of the file in this process is closed.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise Refusal(code, f"{path}: another process has this open") from None
    return descriptor
