"""What the owner says about personalization on this device: the profile as edited, and which levels are off.

Both lie in one sealed file of the device, each under a key of its own: deleting the profile destroys the key, not only
the lines. A level that is off is neither built nor put into a prompt, and no choice takes it.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from client.adapter_store import AdapterStore
from client.device_home import DeviceHome
from client.personalization.context import ContextEncoder
from client.personalization.memory import Memory
from client.personalization.profile import Profile, make_profile
from client.personalization.retrieval import Embed
from client.user_data import Record
from common.errors import ConfigError, StoreError

__all__ = ["LEVELS", "LevelStore"]

LEVELS = {
    "profile": "lines about you before a question",
    "retrieval": "your past records before a question",
    "soft-prompt": "a private prefix that was trained on your records",
    "steering": "a direction of your style added inside the model",
    "adapter": "your private adapter",
    "preference": "your private adapter tuned on what you preferred",
}
"""Every level that an owner can turn off, and what it puts into the model's way."""

FILE, PROFILE, SWITCHES = "levels.sqlite", "profile", "switches"
NO_BASE = "none"
"""A profile is text: it belongs to no base model."""


class LevelStore:
    """The owner's profile and switches, opened for a moment at a time so that commands work beside a vault."""

    def __init__(self, home: DeviceHome) -> None:
        """Find what this device keeps."""
        self._home = home

    def profile(self) -> Profile | None:
        """The profile as the owner left it; None where there is none."""
        with self._open() as store:
            if not store.versions(PROFILE, PROFILE):
                return None
            return Profile.from_bytes(store.get(PROFILE, PROFILE))

    def keep_profile(self, profile: Profile) -> None:
        """Put `profile` in force; the one before is not kept."""
        with self._open() as store:
            store.put(PROFILE, PROFILE, profile.to_bytes(), base_digest=NO_BASE)

    def renew_profile(self, records: Sequence[Record], removed: Sequence[Record] = ()) -> None:
        """Make the profile again from `records`, where one is kept, after some were added or `removed`.

        The owner's own words stay. Of the lines that the owner deleted, those that only a removed record says are not
        remembered any longer.
        """
        kept = self.profile()
        if kept is None:
            return
        unsaid = {line.text for record in removed for line in make_profile([record]).lines} & kept.deleted
        for record in records if unsaid else ():
            unsaid -= {line.text for line in make_profile([record]).lines}
        self.keep_profile(Profile(kept.lines, kept.deleted - unsaid).renewed(records))

    def profile_of(self, records: Sequence[Record]) -> Profile:
        """The profile as the owner left it, or one made from `records` where there is none yet."""
        kept = self.profile()
        return Profile().renewed(records) if kept is None else kept

    def delete_profile(self) -> bool:
        """Destroy the profile, and turn the level off so that it is not made again; say whether there was one.

        Guarantee: the key under which the lines were sealed is gone from the file; copies made before have it.
        """
        self.switch("profile", on=False)
        with self._open() as store:
            return store.erase(PROFILE)

    def off(self) -> frozenset[str]:
        """Which levels the owner turned off."""
        return frozenset(map(str, self._switches().get("off", ())))

    def use(self) -> str:
        """Which system the owner wants `personal` to be; empty where validation records decide."""
        return str(self._switches().get("use", ""))

    def switch(self, level: str, *, on: bool) -> None:
        """Turn one level on or off.

        Raises:
            ConfigError: There is no such level.
        """
        if level not in LEVELS:
            raise ConfigError(f"level: {level} is unknown; there are {', '.join(LEVELS)}")
        off = self.off() - {level} if on else self.off() | {level}
        self._keep_switches(off=sorted(off))

    def prefer(self, system: str) -> None:
        """Have `personal` be `system` whatever validation records say; an empty name lets them decide again."""
        self._keep_switches(use=system)

    def _switches(self) -> dict[str, Any]:
        with self._open() as store:
            if not store.versions(SWITCHES, SWITCHES):
                return {}
            content = store.get(SWITCHES, SWITCHES)
        try:
            return dict(json.loads(content))
        except (ValueError, TypeError):
            raise StoreError("not the bytes of switches") from None

    def _keep_switches(self, **changes: Any) -> None:
        content = json.dumps({**self._switches(), **changes}).encode()
        with self._open() as store:
            store.put(SWITCHES, SWITCHES, content, base_digest=NO_BASE)

    def memory(self, records: Sequence[Record], encoder: ContextEncoder, *, embed: Embed | None = None) -> Memory:
        """What may stand before a question on this device.

        Guarantee: with retrieval off no record is indexed, and with the profile off no line is told.
        """
        off = self.off()
        profile = Profile()
        if "profile" not in off:
            profile = self.profile_of(records)
        return Memory(() if "retrieval" in off else records, encoder, profile=profile, embed=embed)

    @contextmanager
    def _open(self) -> Generator[AdapterStore]:
        with self._home.open_store(FILE, "levels") as store:
            yield store
