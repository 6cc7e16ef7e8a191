"""Who may ask for the owner's side of a device: keys for programs, and links for a browser.

A program shows the key of this device, which comes out of the device's master key and stands nowhere on disk; it stays
the same until it is renewed. A browser is given a link with a ticket in its fragment, which browsers send to nobody:
not to a server, not in a Referer, not into a log. The page trades the ticket, once and within ten minutes, for a
session that it keeps in its tab. There is no cookie: a cookie would go to every other port of this machine too.
"""

from __future__ import annotations

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from client.device_home import DeviceHome
from common.errors import Refusal, StoreError
from common.files import write_private_file

__all__ = ["Access"]

FILE = "owner.json"
TICKET_SECONDS = 600.0
SESSION_SECONDS = 12 * 3600.0
"""Since it was last used."""

MOST_OPEN = 64


class Access:
    """The keys, tickets and sessions of one device; tickets and sessions end with the process."""

    def __init__(self, home: DeviceHome, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Give access to `home`."""
        self._home = home
        self._clock = clock
        self._lock = threading.Lock()
        self._tickets: dict[str, float] = {}
        self._sessions: dict[str, float] = {}

    @property
    def key(self) -> str:
        """What programs show, as `Authorization: Bearer`."""
        return f"hs-{self._home.master.subkey(f'owner key {self._name()}').hex()}"

    def renew_key(self) -> str:
        """Make another key; whoever shows the one before is refused from now on."""
        write_private_file(self._home.folder / FILE, _new_name(), replace=True)
        return self.key

    def ticket(self) -> str:
        """Make a ticket for one link."""
        with self._lock:
            return _issued(self._tickets, self._clock() + TICKET_SECONDS, self._clock())

    def redeem(self, ticket: str) -> str:
        """Trade a ticket for a session.

        Raises:
            Refusal: It was used, is too old, or none of ours.
        """
        with self._lock:
            now = self._clock()
            shown = ticket.encode(errors="surrogatepass")  # as text it may only be compared where it is ASCII
            found = next((known for known in self._tickets if hmac.compare_digest(known.encode(), shown)), None)
            if found is None or self._tickets.pop(found) < now:
                raise Refusal("not-now", "this link was used, or is older than ten minutes; `homespun device open`")
            return _issued(self._sessions, now + SESSION_SECONDS, now)

    def admits(self, shown: str) -> bool:
        """Whether `shown` is the key of this device or a session that is open."""
        content = shown.encode()
        if hmac.compare_digest(content, self.key.encode()):
            return True
        with self._lock:
            now = self._clock()
            for known, until in self._sessions.items():
                if hmac.compare_digest(content, known.encode()) and until > now:
                    self._sessions[known] = now + SESSION_SECONDS
                    return True
        return False

    def _name(self) -> str:
        """Which key is in force: a random name, so that no earlier key comes back when this file is erased."""
        path = self._home.folder / FILE
        with suppress(FileExistsError):
            if not path.exists():
                write_private_file(path, _new_name())
        try:
            return str(json.loads(path.read_bytes())["key"])
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(f"{path}: damaged; `homespun device serve --new-key` makes another key") from None


def _new_name() -> bytes:
    return json.dumps({"key": secrets.token_hex(16)}).encode()


def _issued(kept: dict[str, float], until: float, now: float) -> str:
    for old in [name for name, end in kept.items() if end < now]:
        del kept[old]
    while len(kept) >= MOST_OPEN:
        del kept[next(iter(kept))]
    made = secrets.token_urlsafe(32)
    kept[made] = until
    return made
