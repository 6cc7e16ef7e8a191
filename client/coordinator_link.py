"""The device's own line to its coordinator, beside Flower's: TLS that trusts the invite's authority and no other."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from common.errors import DataError, Refusal
from common.files import make_private_folder
from common.fleet import FORMAT, Base, Invite, reply_object, signed_headers
from common.model_files import model_digest, model_folder

__all__ = ["CoordinatorLink", "fetch_base"]

OWN = "/v1/homespun/"
SECONDS = 30.0
PLAIN = {"accept-encoding": "identity"}
"""Bytes are counted and resumed as they are stored."""

_IS_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class CoordinatorLink:
    """Asks one coordinator, in the name of one device."""

    def __init__(self, invite: Invite, key: ec.EllipticCurvePrivateKey, *, count: Callable[[int], None]) -> None:
        """Ask nothing yet; `count` is told of every byte that goes either way."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_verify_locations(cadata=invite.authority)
        self._key = key
        self._count = count
        # trust_env off: a proxy or another authority that the environment names is not the owner's word.
        self._client = httpx.Client(
            base_url=f"https://{invite.address}", verify=context, timeout=SECONDS, trust_env=False, headers=PLAIN
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def ask(self, name: str, **values: Any) -> dict[str, Any]:
        """Ask, and read the answer.

        Raises:
            DataError: The coordinator is away, or answers nonsense.
            Refusal: It said no, with its code, or it is not the one that the invite names.
        """
        return reply_object(self._post(name, values))

    def adapter(self, run: str) -> bytes:
        """Fetch the newest global adapter of a run.

        Raises:
            DataError, Refusal: As for `ask`.
        """
        return self._post("adapter", {"run": run})

    def roster(self, run: str) -> bytes:
        """Fetch who is in the secure sums of a run.

        Raises:
            DataError, Refusal: As for `ask`.
        """
        return self._post("roster", {"run": run})

    def base_files(self, digest: str) -> list[dict[str, Any]]:
        """List the files of a base model at the coordinator."""
        return self.ask("base", digest=digest)["files"]

    def base_part(self, digest: str, name: str, offset: int, write: Callable[[bytes], object]) -> None:
        """Fetch a file of a base model from `offset` on."""
        path, body, headers = self._signed("base-file", {"digest": digest, "name": name, "offset": offset})
        try:
            with self._client.stream("POST", path, content=body, headers=headers) as reply:
                if reply.status_code != 200:
                    raise DataError(f"the coordinator does not hand {name} over ({reply.status_code})")
                for part in reply.iter_raw():
                    self._count(len(part))
                    write(part)
        except httpx.HTTPError as error:
            raise DataError(f"the coordinator went away ({type(error).__name__})") from None

    def _post(self, name: str, values: dict[str, Any]) -> bytes:
        path, body, headers = self._signed(name, values)
        try:
            reply = self._client.post(path, content=body, headers=headers)
        except httpx.ConnectError as error:
            if "CERTIFICATE_VERIFY_FAILED" in str(error) or isinstance(error.__cause__, ssl.SSLError):
                raise Refusal(
                    "wrong-authority", "who answers there is not the coordinator that the invite names"
                ) from None
            raise DataError(f"the coordinator does not answer ({type(error).__name__})") from None
        except httpx.HTTPError as error:
            raise DataError(f"the coordinator does not answer ({type(error).__name__})") from None
        self._count(len(body) + len(reply.content))
        if reply.status_code == 200:
            return reply.content
        try:
            code = str(reply_object(reply.content)["error"])[:64]
        except (DataError, KeyError):
            raise DataError(f"the coordinator answers {reply.status_code}") from None
        if reply.status_code in (401, 403):
            raise Refusal(code, f"the coordinator refuses: {code}")
        raise DataError(f"the coordinator answers: {code}")

    def _signed(self, name: str, values: dict[str, Any]) -> tuple[str, bytes, dict[str, str]]:
        path, body = OWN + name, json.dumps({"format": FORMAT, **values}).encode()
        headers = signed_headers(self._key, path, body, now=datetime.now(UTC))
        return path, body, {**headers, "content-type": "application/json"}


def fetch_base(
    base: Base, folder: Path, link: CoordinatorLink, *, allowed_megabytes: float, say: Callable[[str], None]
) -> Path:
    """Find or fetch the base model that is named by its digest; another is refused.

    Goes on where it was interrupted. A folder that the invite names, a stick among them, is used where it lies.

    Args:
        base: Which one, and its sources in order.
        folder: Where fetched models lie, each under its digest.
        link: To the coordinator.
        allowed_megabytes: What may be fetched today.
        say: Is told what is done.

    Raises:
        Refusal: What is there, or came, is another model, or it is more than may be fetched today.
        DataError: No source has it.
    """
    place = folder / base.digest[:16]
    if place.is_dir() and model_digest(place) == base.digest:
        return place
    problems: list[str] = []
    for source in base.sources:
        try:
            if source == "coordinator":
                return _from_coordinator(base, place, link, allowed_megabytes, say)
            if source.startswith("https://"):
                return _from_web(source, base, place, allowed_megabytes, say)
            found = model_folder(source.removeprefix("hub:"))
            if model_digest(found) == base.digest:
                return found
            problems.append(f"{source}: another model")
        except DataError as error:
            problems.append(f"{source}: {error}")
    raise DataError(f"no source has base model {base.digest[:16]}: {'; '.join(problems)}")


def _from_coordinator(
    base: Base, place: Path, link: CoordinatorLink, allowed_megabytes: float, say: Callable[[str], None]
) -> Path:
    files = link.base_files(base.digest)
    make_private_folder(place)
    missing = 0
    for file in files:
        name, size = str(file["name"]), int(file["bytes"])
        if not _IS_FILE.fullmatch(name):
            raise DataError("the coordinator names a file that is none of a model's")
        path = place / name
        missing += size - min(size, path.stat().st_size if path.exists() else 0)
    _check_allowance(missing / 1e6, allowed_megabytes)
    if missing:
        say(f"fetching base model {base.name}: {missing / 1e6:.1f} MB")
    for file in files:
        path = place / str(file["name"])
        have = path.stat().st_size if path.exists() else 0
        if have < int(file["bytes"]):
            with path.open("ab") as target:
                link.base_part(base.digest, path.name, have, target.write)
    return _checked(base, place)


def _from_web(source: str, base: Base, place: Path, allowed_megabytes: float, say: Callable[[str], None]) -> Path:
    """Fetch from a web server that serves the model's folder, beside a list of its files in `files.json`."""
    make_private_folder(place)
    with httpx.Client(
        base_url=source.rstrip("/") + "/", timeout=SECONDS, follow_redirects=True, headers=PLAIN
    ) as client:
        try:
            names = [str(name) for name in client.get("files.json").raise_for_status().json()]
            if not all(map(_IS_FILE.fullmatch, names)):
                raise DataError("the list names a file that is none of a model's")
            _check_allowance(base.megabytes, allowed_megabytes)
            say(f"fetching base model {base.name} from {source}")
            for name in names:
                path = place / name
                have = path.stat().st_size if path.exists() else 0
                with client.stream("GET", name, headers={"range": f"bytes={have}-"} if have else {}) as reply:
                    if reply.status_code == 416:
                        continue  # it is whole
                    reply.raise_for_status()
                    with path.open("ab" if reply.status_code == 206 else "wb") as target:
                        for part in reply.iter_raw():
                            target.write(part)
        except (httpx.HTTPError, ValueError, TypeError) as error:
            raise DataError(f"cannot be fetched ({type(error).__name__})") from None
    return _checked(base, place)


def _check_allowance(megabytes: float, allowed: float) -> None:
    if megabytes > allowed:
        raise Refusal(
            "megabytes",
            f"the base model is {megabytes:.0f} MB to fetch, and the policy allows {allowed:.0f} MB more today; raise "
            "megabytes_per_day for a day, or bring the model's folder with --model",
        )


def _checked(base: Base, place: Path) -> Path:
    if model_digest(place) == base.digest:
        return place
    for path in place.iterdir():
        path.unlink()
    raise Refusal("model-mismatch", "what came is another model than the invite names; it was thrown away")
