"""A record that is removed leaves everything that was made from it.

Retrieval reads the records themselves. The profile is made again from those that stay. Private adapters, and what a
method keeps on this device from round to round, were trained on it: they are erased, and trained again at the next
refit, before their next use. What was sent is not undone by any of this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from client.device_home import DeviceHome
from client.learned_store import LearnedStore
from client.level_store import LevelStore
from client.membership import Membership
from client.record_store import RecordStore
from common.errors import DataError

__all__ = ["Removed", "remove_records"]


@dataclass(frozen=True)
class Removed:
    """What a removal did: how many records went, and whether a private adapter was erased with them."""

    records: int
    private_adapter: bool


def remove_records(home: DeviceHome, ids: Sequence[str]) -> Removed:
    """Remove records, and what was made from them.

    What was made goes first, so that a crash in between leaves records that can be removed once more; and again
    afterwards, for a refit that ran meanwhile.
    """
    store, levels = RecordStore(home), LevelStore(home)
    going = set(ids)
    before = store.records()
    staying = [one.record for one in before if one.id not in going]
    gone = [one.record for one in before if one.id in going]
    if not gone:
        return Removed(0, private_adapter=False)
    levels.renew_profile(staying, gone)
    erased = _erase_trained(home)
    count = store.remove(ids)
    levels.renew_profile([one.record for one in store.records()], gone)
    return Removed(count, _erase_trained(home) or erased)


def _erase_trained(home: DeviceHome) -> bool:
    erased = LearnedStore(home).erase_private()
    with home.open_kept() as kept:
        kept.erase(str(home.read_ledger().header["subject"]))
    try:
        joined = Membership.load(home)
    except DataError:
        return erased
    joined.note_standing(personal={}, refit="a record was removed; the private adapter is trained again without it")
    return erased
