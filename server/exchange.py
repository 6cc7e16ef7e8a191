"""Messages to nodes and what comes back before the time is over; Flower delivers each at most once."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid

__all__ = ["Errand", "exchange"]

POLL_SECONDS = (0.02, 1.0)
"""How long to wait before asking for replies again: at first, and at most."""

MESSAGES_PER_PUSH = 64


@dataclass(frozen=True)
class Errand:
    """One message to a node.

    Attributes:
        node: Whom it goes to.
        users: Whom it is about.
        content: Makes what it says, when it is sent: contents of a large cohort are not all held at once.
    """

    node: int
    users: tuple[str, ...]
    content: Callable[[], RecordDict]


def exchange(
    grid: Grid,
    errands: Sequence[Errand],
    kind: str,
    group: str,
    *,
    seconds: float,
    one_by_one: bool,
    answered: Callable[[Errand, Message], None],
    lost: Callable[[str, int], None],
) -> None:
    """Send every errand, and hand on what comes back within `seconds`.

    Args:
        grid: Of Flower.
        errands: What goes out.
        kind: Message type.
        group: Group that the messages belong to.
        seconds: How long to wait for replies in all.
        one_by_one: Whether to fetch replies one by one, as those of devices must be.
        answered: Takes a reply.
        lost: Counts users by reason: `unavailable` where a message could not be sent, `bad-reply` where Flower cannot
            read what came, `silent` where nothing came.
    """
    asked: dict[str, Errand] = {}
    for start in range(0, len(errands), MESSAGES_PER_PUSH):
        batch = errands[start : start + MESSAGES_PER_PUSH]
        messages = [grid.create_message(one.content(), kind, one.node, group) for one in batch]
        taken = {identifier for identifier in grid.push_messages(messages) if identifier}
        for message, errand in zip(messages, batch, strict=True):
            if message.metadata.message_id in taken:
                asked[message.metadata.message_id] = errand
            else:
                lost("unavailable", len(errand.users))
    deadline = time.monotonic() + seconds
    pause = POLL_SECONDS[0]
    while asked and time.monotonic() < deadline:
        replies = _pull(grid, asked, lost) if one_by_one else list(grid.pull_messages(list(asked)))
        for reply in replies:
            errand = asked.pop(reply.metadata.reply_to_message_id, None)
            if errand is not None:
                answered(errand, reply)
        pause = POLL_SECONDS[0] if replies else min(1.25 * pause, POLL_SECONDS[1])
        if not replies:
            time.sleep(pause)
    lost("silent", sum(len(errand.users) for errand in asked.values()))


def _pull(grid: Grid, asked: dict[str, Errand], lost: Callable[[str, int], None]) -> list[Message]:
    """Take the replies that are there, one by one.

    Flower reads a reply's objects as it fetches it, and raises when a device sent something else; what it had fetched
    with it is lost. So such a one counts as a bad reply, and nobody else is lost with it.
    """
    replies: list[Message] = []
    for identifier in list(asked):
        try:
            replies += grid.pull_messages([identifier])
        except (ValueError, TypeError, LookupError, AttributeError):
            lost("bad-reply", len(asked.pop(identifier).users))
        except Exception as error:
            if type(error).__name__ != "DecodeError":  # of protobuf; whatever else it is, it is not the device's
                raise
            lost("bad-reply", len(asked.pop(identifier).users))
    return replies
