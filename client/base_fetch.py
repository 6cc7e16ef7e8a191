"""Brings the base model that an invite names: from a folder, the hub, a web server or the coordinator.

A base is named by its digest, which is the digest of the list of its files and theirs. Whoever sends that list along
is found out before a byte of another model is fetched; of the others the whole model is checked, and thrown away where
it is another. What is half fetched stays, also after a kill, and is gone on with: at once where the line was cut, and
tomorrow where today's megabytes are used up.

==================  ==================================================================================================
`coordinator`       asked over the device's own line
`https://...`       a folder on a web server, with a list of its files in `files.json`; `http://` serves the same,
                    because the digest, not the server, says what is taken
`hub:NAME`          a repository of the Hugging Face hub; what its cache already holds is used where it lies
a folder            used where it lies; copied from a file system that may go away, as a USB stick's
==================  ==================================================================================================
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import httpx

from client.coordinator_link import PLAIN, SECONDS, CoordinatorLink
from common.errors import DataError, HomespunError, Refusal
from common.files import make_private_folder
from common.fleet import Base
from common.model_files import digest_of_files, is_digested, model_digest, model_folder

__all__ = ["fetch_base"]

PART = ".part"
COUNTED_BYTES = 1 << 20
READ_BYTES = 1 << 20
MOST_FILES = 256
MOST_LIST_BYTES, MOST_HUB_BYTES = 1 << 20, 1 << 24
"""Of a list of files; the hub's names every file of a repository with much beside it."""

TRIES = 3
"""How often a file is asked for again without a byte of it coming."""

WAIT_SECONDS = 0.5
UNLIMITED = 1 << 62

_IS_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_IS_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class _File:
    """A file of a model as a source lists it; what it does not say is None."""

    name: str
    bytes: int | None
    sha256: str | None


class _Source(Protocol):
    """Where a model may be had."""

    def files(self) -> list[_File]:
        """List its files."""
        ...

    def read(self, name: str, offset: int) -> Iterable[bytes]:
        """Give a file from `offset` on; ends early where the line is cut."""
        ...


def fetch_base(
    base: Base,
    folder: Path,
    link: CoordinatorLink,
    *,
    allowed_megabytes: float,
    say: Callable[[str], None],
    count: Callable[[int], None],
) -> Path:
    """Find or fetch the base model that is named by its digest; another is refused.

    Args:
        base: Which one, and its sources in order.
        folder: Where fetched models lie, each under its digest.
        link: To the coordinator.
        allowed_megabytes: What may be fetched today.
        say: Is told what is done.
        count: Is told of every byte that came over the network.

    Returns:
        The folder of the model.

    Raises:
        Refusal: `megabytes`: today's are used up; what came is kept. `model-mismatch`: what came is another model, and
            was thrown away.
        DataError: No source has it.
    """
    place = folder / base.digest[:16]
    if place.is_dir() and model_digest(place) == base.digest:
        return place
    problems: list[str] = []
    another = False
    for source in base.sources:
        fetch = _Fetch(base, place, allowed_megabytes, say, count)
        try:
            if source == "coordinator":
                return fetch.take(_OfCoordinator(link, base.digest))
            if source.startswith(("https://", "http://")):
                with _OfWeb(source) as web:
                    return fetch.take(web)
            if source.startswith("hub:"):
                name = source.removeprefix("hub:")
                found = _in_cache(name)
                if found is not None and model_digest(found) == base.digest:
                    return found
                with _OfHub(name) as hub:
                    return fetch.take(hub)
            found = model_folder(source)
            if model_digest(found) != base.digest:
                raise Refusal("model-mismatch", f"{source} holds another model")
            return fetch.take(_OfFolder(found)) if _may_go_away(found, folder) else found
        except Refusal as refusal:
            if refusal.code != "model-mismatch":
                raise
            another = True
            problems.append(f"{source}: {refusal}")
        except HomespunError as error:
            problems.append(f"{source}: {error}")
    said = f"no source has base model {base.digest[:16]}: {'; '.join(problems)}"
    if another:
        raise Refusal("model-mismatch", said)
    raise DataError(said)


class _Fetch:
    """One model on its way from one source."""

    def __init__(
        self,
        base: Base,
        place: Path,
        allowed_megabytes: float,
        say: Callable[[str], None],
        count: Callable[[int], None],
    ) -> None:
        self._base = base
        self._whole = place
        self._place = place.with_name(place.name + PART)  # whoever looks for the model must not find half of it
        self._left = int(max(0.0, min(allowed_megabytes, 1e12)) * 1e6)
        self._say = say
        self._count = count
        self._uncounted = 0

    def take(self, source: _Source) -> Path:
        """Bring every file that is missing, and check what came."""
        if isinstance(source, _OfFolder):
            self._left = UNLIMITED  # no traffic: the day's megabytes say nothing of a stick
        make_private_folder(self._place)
        files = [one for one in source.files() if is_digested(one.name)]
        sums = {one.name: one.sha256 for one in files if one.sha256 is not None}
        if len(sums) == len(files) and digest_of_files(sums) != self._base.digest:
            raise Refusal("model-mismatch", "its list of files is that of another model")
        wanted = {one.name for one in files}
        for path in self._place.iterdir():
            if path.name.removesuffix(PART) not in wanted:
                path.unlink()
        missing = sum((one.bytes or 0) - self._have(one.name) for one in files if not (self._place / one.name).exists())
        free = shutil.disk_usage(self._place).free
        if missing > free:
            raise DataError(f"{missing / 1e6:.0f} MB are missing, and the disk has {free / 1e6:.0f} MB left")
        self._say(f"fetching base model {self._base.name}: {missing / 1e6:.1f} MB")
        try:
            for one in files:
                if not (self._place / one.name).exists():
                    self._bring(source, one)
        finally:
            self._count(self._uncounted)
            self._uncounted = 0
        if model_digest(self._place) == self._base.digest:
            if self._whole.exists():
                shutil.rmtree(self._whole)  # what lay there was looked at first, and is damaged
            return self._place.rename(self._whole)
        for path in self._place.iterdir():
            path.unlink()
        raise Refusal("model-mismatch", "what came is another model than the invite names; it was thrown away")

    def _have(self, name: str) -> int:
        part = self._place / (name + PART)
        return part.stat().st_size if part.exists() else 0

    def _bring(self, source: _Source, file: _File) -> None:
        """Bring one file whole; it has its name only then."""
        part, tries = self._place / (file.name + PART), 0
        while file.bytes is None or self._have(file.name) < file.bytes:
            before = self._have(file.name)
            whole = self._bring_some(source, file, part)
            if whole and file.bytes is None:
                break
            tries = 0 if self._have(file.name) > before else tries + 1
            if tries >= TRIES:
                raise DataError(f"{file.name} ends after {before} bytes, and does not go on")
            if not whole:
                time.sleep(WAIT_SECONDS)
        part.touch()  # a file without a byte
        if file.sha256 is not None:
            with part.open("rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != file.sha256:
                    part.unlink()
                    raise Refusal("model-mismatch", f"{file.name} is another file than was listed; it was thrown away")
        part.replace(part.with_name(file.name))

    def _bring_some(self, source: _Source, file: _File, part: Path) -> bool:
        """Append what comes in one go; False where the line was cut."""
        most = float("inf") if file.bytes is None else file.bytes
        with part.open("ab") as target:
            try:
                for piece in source.read(file.name, target.tell()):
                    piece = piece[: int(min(self._left, most - target.tell(), len(piece)))]
                    target.write(piece)
                    if not isinstance(source, _OfFolder):
                        self._note(len(piece))
                    if self._left <= 0:
                        self._stop()
                    if target.tell() >= most:
                        break
            except httpx.TransportError:
                return False
        return True

    def _note(self, size: int) -> None:
        self._left -= size
        self._uncounted += size
        if self._uncounted >= COUNTED_BYTES:
            self._count(self._uncounted)
            self._uncounted = 0

    def _stop(self) -> None:
        have = sum(path.stat().st_size for path in self._place.iterdir()) / 1e6
        raise Refusal(
            "megabytes",
            f"{have:.1f} of {self._base.megabytes:.1f} MB of the base model are here, and the policy allows no more "
            "today; it goes on tomorrow. Raise megabytes_per_day for a day, or bring the model's folder with --model",
        )


class _OfCoordinator:
    """The coordinator hands the model over."""

    def __init__(self, link: CoordinatorLink, digest: str) -> None:
        self._link = link
        self._digest = digest

    def files(self) -> list[_File]:
        return _listed(self._link.base_files(self._digest))

    def read(self, name: str, offset: int) -> Iterator[bytes]:
        return self._link.base_part(self._digest, name, offset)


class _OfWeb:
    """A web server has the model's folder."""

    def __init__(self, address: str) -> None:
        self._client = httpx.Client(
            base_url=address.rstrip("/") + "/", timeout=SECONDS, follow_redirects=True, headers=PLAIN
        )

    def __enter__(self) -> _OfWeb:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def files(self) -> list[_File]:
        try:
            return _listed(self._object("files.json", MOST_LIST_BYTES))
        except httpx.HTTPError as error:
            raise DataError(f"its list of files cannot be fetched ({type(error).__name__})") from None
        except (ValueError, RecursionError):
            raise DataError("its files.json is no list of files") from None

    def _object(self, name: str, most: int, **params: str) -> Any:
        """Fetch JSON, and no more of it than `most` bytes, whatever is sent.

        Raises:
            ValueError: It is longer, or not JSON.
            httpx.HTTPError: It cannot be fetched.
        """
        content = bytearray()
        with self._client.stream("GET", name, params=params) as reply:
            for piece in reply.raise_for_status().iter_raw():  # raw: what is packed small may be large
                content += piece
                if len(content) > most:
                    raise ValueError
        return json.loads(content)

    def address(self, name: str) -> str:
        """Where a file lies."""
        return name

    def read(self, name: str, offset: int) -> Iterator[bytes]:
        headers = {"range": f"bytes={offset}-"} if offset else {}
        with self._client.stream("GET", self.address(name), headers=headers) as reply:
            if reply.status_code == 416:  # there is no more of it
                return
            if reply.status_code not in (200, 206):
                raise DataError(f"{name} is not handed over ({reply.status_code})")
            skip = offset if reply.status_code == 200 else 0  # a server that knows no ranges begins anew
            for piece in reply.iter_raw():
                if skip < len(piece):
                    yield piece[skip:]
                skip = max(0, skip - len(piece))


class _OfHub(_OfWeb):
    """A repository of the hub has the model."""

    def __init__(self, name: str) -> None:
        from huggingface_hub import constants

        super().__init__(constants.ENDPOINT)
        self._name = name

    def files(self) -> list[_File]:

        if os.environ.get("HF_HUB_OFFLINE") == "1" and self._client.base_url.host not in ("localhost", "127.0.0.1"):
            raise DataError("HF_HUB_OFFLINE is set, so the hub is not asked")
        try:
            entries = self._object(f"api/models/{self._name}/revision/main", MOST_HUB_BYTES, blobs="true")["siblings"]
            return _listed(
                [
                    {"name": one["rfilename"], "bytes": one.get("size"), "sha256": (one.get("lfs") or {}).get("sha256")}
                    for one in entries
                    if "/" not in str(one["rfilename"]) and is_digested(str(one["rfilename"]))
                ]
            )
        except (httpx.HTTPError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise DataError(f"the hub does not list {self._name} ({type(error).__name__})") from None

    def address(self, name: str) -> str:
        return f"{self._name}/resolve/main/{name}"


class _OfFolder:
    """A folder that may go away has the model."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def files(self) -> list[_File]:
        found = [path for path in self._folder.iterdir() if path.is_file() and is_digested(path.name)]
        return [_File(path.name, path.stat().st_size, None) for path in found]

    def read(self, name: str, offset: int) -> Iterator[bytes]:
        try:
            with (self._folder / name).open("rb") as file:
                file.seek(offset)
                while piece := file.read(READ_BYTES):
                    yield piece
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from None


def _listed(entries: Any) -> list[_File]:
    """Read a hostile list of files: names, or objects with name, bytes and sha256.

    Raises:
        DataError: It is none, or names what is no file of a model.
    """
    found: list[_File] = []
    if not isinstance(entries, list) or not 0 < len(entries) <= MOST_FILES:
        raise DataError("its list of files is none")
    for entry in entries:
        facts: Mapping[str, Any] = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(facts, dict) or not _IS_FILE.fullmatch(str(facts.get("name", ""))):
            raise DataError("its list names a file that is none of a model's")
        size, digest = facts.get("bytes"), facts.get("sha256")
        if not (size is None or (isinstance(size, int) and size >= 0)):
            raise DataError("its list names a size that is none")
        if not (digest is None or (isinstance(digest, str) and _IS_DIGEST.fullmatch(digest))):
            raise DataError("its list names a digest that is none")
        found.append(_File(str(facts["name"]), size, digest))
    return found


def _in_cache(name: str) -> Path | None:
    """The hub's own cache of a repository, where it is there already."""
    from huggingface_hub import snapshot_download

    with suppress(Exception):  # whatever is wrong with a cache, the hub itself is asked next
        return Path(snapshot_download(name, local_files_only=True))
    return None


def _may_go_away(found: Path, folder: Path) -> bool:
    """Whether a folder lies on another file system than what this device keeps: a stick, or a share."""
    make_private_folder(folder)
    return found.stat().st_dev != folder.stat().st_dev
