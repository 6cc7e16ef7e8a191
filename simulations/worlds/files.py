"""Files read piece by piece, gzipped or not: lines, and the entries of a JSON array.

Nothing here holds a whole file; errors name the file and the line or entry, never content.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from common.errors import DataError

__all__ = ["digest_of", "is_array", "open_binary", "read_entries", "read_lines"]

CHUNK = 1 << 20
"""Bytes read at a time."""

LARGEST_ENTRY = 1 << 28
"""Characters after which an entry that still does not parse is called broken; bounds memory on a broken file."""

_ARRAY = re.compile(r'\s*(?:\[|\{[^\[\]{}]*"golds"\s*:\s*\[)')


def digest_of(paths: Sequence[Path]) -> str:
    """SHA-256 in hex: of one file, what `sha256sum` prints; of several, of their digests in this order, a line each.

    Raises:
        DataError: A file cannot be read.
    """
    digests: list[str] = []
    for path in paths:
        try:
            with path.open("rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in digests).encode()).hexdigest()


def open_binary(path: Path) -> IO[bytes]:
    """Open a file for reading, unpacking gzip where the name ends so.

    Raises:
        DataError: It cannot be opened.
    """
    try:
        return cast("IO[bytes]", gzip.open(path)) if path.suffix == ".gz" else path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a text file with their numbers from 1; line ends stay on, blank lines too.

    Raises:
        DataError: A line is not UTF-8, or the file cannot be read to its end.
    """
    with open_binary(path) as file:
        number = 0
        lines = iter(file)
        while True:
            with _readable(path):
                line = next(lines, None)
            if line is None:
                return
            number += 1
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{path}: line {number}: not UTF-8") from None
            yield number, text


def is_array(path: Path) -> bool:
    """Whether a JSON file begins as `read_entries` reads it.

    Raises:
        DataError: The file is empty, not UTF-8, or cannot be read.
    """
    with open_binary(path) as file:
        return _Window(path, file).begin()


def read_entries(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the entries of a JSON array one by one, with their numbers from 1.

    The array is the file's top level, or the value of its key "golds" (LaMP writes both).

    Raises:
        DataError: The file is not UTF-8, holds no such array, or an entry is not valid JSON.
    """
    parse = json.JSONDecoder().raw_decode
    with open_binary(path) as file:
        window = _Window(path, file)
        if not window.begin():
            raise DataError(f'{path}: neither a JSON array nor an object with an array under "golds"')
        number = 0
        while window.next_character() != "]":
            if number:
                if window.next_character() != ",":
                    raise DataError(f"{path}: after entry {number}: not valid JSON")
                window.at += 1
                window.next_character()
            number += 1
            while True:
                try:
                    entry, window.at = parse(window.text, window.at)
                    break
                except (json.JSONDecodeError, RecursionError):
                    held = len(window.text) - window.at
                    # twice as much each time, so that parsing again costs a constant factor
                    if held >= LARGEST_ENTRY or not window.fill(max(CHUNK, held)):
                        raise DataError(f"{path}: entry {number}: not valid JSON") from None
                except ValueError:  # what Python says to a whole number of thousands of digits
                    raise DataError(f"{path}: entry {number}: a number with too many digits") from None
            yield number, entry


class _Window:
    """The stretch of a text file that is being parsed: `text`, from `at` on."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at = "", 0

    def begin(self) -> bool:
        """Read the beginning and step into the array, if there is one."""
        self.fill()
        if not self.text.strip():
            raise DataError(f"{self._path}: is empty")
        start = _ARRAY.match(self.text)
        self.at = start.end() if start else 0
        return start is not None

    def fill(self, size: int = CHUNK) -> bool:
        """Let go of what is parsed and read about `size` more bytes; False at the end of the file."""
        with _readable(self._path):
            data = self._file.read(size)
        try:
            self.text = self.text[self.at :] + self._decode(data, not data)
        except UnicodeDecodeError:
            raise DataError(f"{self._path}: not UTF-8") from None
        self.at = 0
        return bool(data)

    def next_character(self) -> str:
        """Skip white space; empty at the end of the file."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or not self.fill():
                return self.text[self.at : self.at + 1]


@contextmanager
def _readable(path: Path) -> Generator[None]:
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise DataError(f"{path}: not a whole gzip file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
