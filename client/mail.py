"""Mail as records: what the owner wrote, and what it answered.

Only messages from the owner's addresses are learned. The message that one answers stands before it as the prompt,
where it is in the same file; nobody else's words are ever a label.
"""

from __future__ import annotations

import mailbox
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from email.utils import parseaddr, parsedate_to_datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from client.user_data import Record
from common.errors import ConfigError, DataError

__all__ = ["own_words", "read_mailbox"]

_SIGNATURE = re.compile(r"^-- ?$", re.MULTILINE)
_FORWARDED = re.compile(r"^\s*(-{2,} ?(original message|forwarded message).*|_{20,})\s*$", re.IGNORECASE | re.MULTILINE)
_INTRODUCTION = re.compile(
    r"^[^\n>]{0,200}(\n[^\n>]{0,120})?(wrote|schrieb|écrit|escribió|scrisse)\s*:\s*$", re.MULTILINE
)
_HIDDEN = {"script", "style", "head", "title"}
_BLOCKS = {"p", "div", "br", "li", "tr", "h1", "h2", "h3", "blockquote"}


@dataclass(frozen=True)
class _Mail:
    sender: str
    name: str
    answers: str
    time: float | None
    text: str


def read_mailbox(path: Path, mine: Sequence[str], left_out: Counter[str]) -> list[Record]:
    """Read the owner's messages of an mbox file in its order.

    Args:
        path: The file.
        mine: The owner's addresses; not needed where all messages are from one.
        left_out: Counts what is passed over.

    Raises:
        DataError: It is no mbox file.
        ConfigError: There are messages of several senders, and nobody said who the owner is.
    """
    mails = _mails(path, left_out)
    own = {address.strip().lower() for address in mine}
    if not own:
        senders = {mail.sender for mail in mails}
        if len(senders) > 1:
            raise ConfigError(f"{path}: mail from {len(senders)} senders; --mine ADDRESS says which is you")
        own = senders
    by_name = {mail.name: mail for mail in mails if mail.name}
    found: list[Record] = []
    for mail in mails:
        if mail.sender not in own:
            left_out["messages of others"] += 1
            continue
        asked = by_name.get(mail.answers)
        prompt = asked.text if asked is not None and asked is not mail else ""
        found.append(Record(prompt, mail.text, mail.time, "reply" if prompt else "text"))
    return found


def own_words(text: str) -> str:
    """Take quotations, what was forwarded, and the signature off a message."""
    for mark in (_FORWARDED, _SIGNATURE):
        found = mark.search(text)
        if found is not None:
            text = text[: found.start()]
    lines = text.splitlines()
    quoted = [index for index, line in enumerate(lines) if line.lstrip().startswith(">")]
    kept = "\n".join(line for index, line in enumerate(lines) if index not in set(quoted))
    if quoted:
        kept = _INTRODUCTION.sub("", kept)
    return re.sub(r"\n{3,}", "\n\n", kept).strip()


def _mails(path: Path, left_out: Counter[str]) -> list[_Mail]:
    try:
        with path.open("rb") as file:
            start = file.read(5)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if start and start != b"From ":
        raise DataError(f"{path}: line 1: an mbox file begins with a line 'From ...'")
    found: list[_Mail] = []
    box = mailbox.mbox(path, create=False)
    try:
        for key in box.iterkeys():
            try:
                message: Any = BytesParser(policy=policy.default).parsebytes(box.get_bytes(key))
                mail = _mail(message)
            except (ValueError, LookupError, TypeError, AttributeError, IndexError):  # what mail is in the world
                left_out["messages that cannot be read"] += 1
                continue
            found.append(mail)
    finally:
        box.close()
    return found


def _mail(message: EmailMessage) -> _Mail:
    _, sender = parseaddr(str(message.get("From", "")))
    time: float | None = None
    try:
        time = parsedate_to_datetime(str(message["Date"])).timestamp()
    except (ValueError, TypeError, OverflowError):
        time = None
    names = (str(message.get(key, "")).strip() for key in ("Message-ID", "In-Reply-To"))
    name, answers = names
    return _Mail(sender.lower(), name, answers, time, own_words(_body(message)))


def _body(message: EmailMessage) -> str:
    part = message.get_body(preferencelist=("plain", "html"))
    if part is None:
        return ""
    content = part.get_content()
    if not isinstance(content, str):
        return ""
    content = content.replace("\r\n", "\n")
    if part.get_content_subtype() != "html":
        return content
    reader = _Words()
    reader.feed(content)
    return reader.text


class _Words(HTMLParser):
    """The words of an HTML message, quotations left out."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self._parts: list[str] = []
        self._hidden = 0

    @property
    def text(self) -> str:
        lines = (re.sub(r"[^\S\n]+", " ", line).strip() for line in "".join(self._parts).splitlines())
        return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in _HIDDEN or tag == "blockquote":
            self._hidden += 1
        if tag in _BLOCKS:
            self._parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if (tag in _HIDDEN or tag == "blockquote") and self._hidden:
            self._hidden -= 1
        if tag in _BLOCKS:
            self._parts.append("\n")

    def handle_data(self, data: str) -> None:
        if not self._hidden:
            self._parts.append(data)
