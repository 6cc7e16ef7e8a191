"""What this device learned, at rest: the newest global adapter, the private ones, and which system is used.

Private adapters belong to the records that they were trained on. Each notes how often records had been removed by
then; after a removal it is stale, is not handed out any more, and is erased.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.adapter_store import AdapterStore, NewVersion, pack_vectors, unpack_vectors
from client.device_home import DeviceHome
from client.personalization.lifelong import Belonging
from client.record_store import RecordStore
from common.adapters import Layout, lora_layout
from common.errors import Refusal, StoreError
from common.model_files import LinearModule

__all__ = ["ADAPTERS", "Learned", "LearnedStore"]

ADAPTERS = "adapters.sqlite"
"""What this device keeps for its owner: the newest global adapter, and the private one over it."""

GLOBAL, PRIVATE, OTHER, BELONGS = "global", "private", "other.", "belongs"
Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Learned:
    """Adapters of one base, and what they were worth to their owner.

    Attributes:
        base: Digest of the base model.
        targets: Layers that carry an adapter, by the last part of their names.
        scaling: LoRA's alpha / rank, of all of them.
        rank: Of the global adapter; 0 where there is none.
        rank_alone: Of the private adapter over the base.
        rank_over_global: Of the private adapter over the global one; 0 where there is none.
        shared: The global adapter, whole.
        alone: The private adapter that was trained over the base.
        over_global: The private adapter that was trained over the global one.
        in_context: The private adapter trained further with what retrieval shows: over the global one where there is
            one, else over the base.
        others: Further private vectors, such as one tuned on preferences or a soft prompt, by name.
        max_tokens: Where records were cut.
        run: The run that the global adapter is of; empty where there is none.
        round: Its round.
        chosen: The system that the owner's own validation records are surely best under.
        losses: Nats per token on the owner's validation records, by system.
        test_losses: Likewise on test records, which nothing was chosen by.
        report: What else is known of the choice, as JSON: gains, bounds, how many records it rests on.
        removals: How often records had been removed when the private adapters were trained.
        trained: Marks of the records that the private adapters were trained on.
    """

    base: str
    targets: tuple[str, ...]
    scaling: float
    rank: int = 0
    rank_alone: int = 0
    rank_over_global: int = 0
    shared: Vector | None = field(default=None, repr=False)
    alone: Vector | None = field(default=None, repr=False)
    over_global: Vector | None = field(default=None, repr=False)
    in_context: Vector | None = field(default=None, repr=False)
    others: dict[str, Vector] = field(default_factory=dict[str, Vector], repr=False)
    max_tokens: int = 64
    run: str = ""
    round: int = 0
    chosen: str = ""
    losses: dict[str, float] = field(default_factory=dict[str, float])
    test_losses: dict[str, float] = field(default_factory=dict[str, float])
    report: dict[str, Any] = field(default_factory=dict[str, Any])
    removals: int = 0
    trained: tuple[str, ...] = ()

    def layout(self, modules: tuple[LinearModule, ...], name: str) -> Layout:
        """Lay out one of the vectors, by its name here, on the base's target layers."""
        over = self.rank_over_global if self.shared is not None else self.rank_alone
        return lora_layout(modules, {"shared": self.rank, "alone": self.rank_alone}.get(name, over))


class LearnedStore:
    """The adapters of this device, opened for a moment at a time."""

    def __init__(self, home: DeviceHome) -> None:
        """Find what this device keeps."""
        self._home = home
        self._records = RecordStore(home)
        self._subject = str(home.read_ledger().header["subject"])

    def load(self, base: str | None = None) -> Learned | None:
        """Return what was learned for the base with this digest, or for whatever base it was; None where nothing was.

        Guarantee: no private adapter is returned that was trained before a record was removed; it is erased instead.
            Nor is one that was trained over another shared adapter than the one that is returned with it.

        Raises:
            StoreError: What is stored was changed.
        """
        removals = self._records.removals
        with self._open() as store:
            shared = self._of(store, GLOBAL, base)
            private = self._of(store, PRIVATE, base)
        if private is not None and int(private[0].get("removals", 0)) != removals:
            self.erase_private()
            private = None
        if private is not None and not _belongs(private[0], private[2], _vector_of(shared, private[2])):
            private = None  # trained over another shared adapter than the one that is here: fitted again before use
        newest = private or shared
        return None if newest is None else _learned(newest[2], newest[0], shared, private)

    def keep(self, learned: Learned) -> None:
        """Keep what was learned, all of it at once.

        Raises:
            Refusal: A record was removed since training began.
        """
        if learned.removals != self._records.removals:
            raise Refusal("not-now", "a record was removed while the private adapter was trained; it is trained again")
        note, of_global = (_note(learned, names) for names in (_FACTS, _OF_GLOBAL))
        note[BELONGS] = Belonging.over(learned.base, learned.shared, run=learned.run, round=learned.round).to_text()
        items: list[NewVersion] = []
        if learned.shared is not None:
            items.append(self._item(GLOBAL, {"vector": learned.shared}, learned.base, json.dumps(of_global)))
        vectors = {"alone": learned.alone, "over_global": learned.over_global, "in_context": learned.in_context}
        found = {name: vector for name, vector in vectors.items() if vector is not None}
        found |= {f"{OTHER}{name}": np.ravel(vector) for name, vector in learned.others.items()}
        if found:
            items.append(self._item(PRIVATE, found, learned.base, json.dumps(note)))
        with self._open() as store:
            store.put_many(items)

    def erase_private(self) -> bool:
        """Destroy the key of everything that was learned, put the global adapter back, and say if any was private."""
        with self._open() as store:
            names = store.names(self._subject) if self._subject in store.subjects() else ()
            if PRIVATE not in names:
                return False
            shared = self._of(store, GLOBAL, None)
            store.erase(self._subject)
            if shared is not None:
                note = json.dumps({name: shared[0][name] for name in _OF_GLOBAL if name in shared[0]})
                store.put_many([self._item(GLOBAL, shared[1], shared[2], note)])
        return True

    def _of(
        self, store: AdapterStore, name: str, base: str | None
    ) -> tuple[dict[str, Any], dict[str, Vector], str] | None:
        current = next((one for one in store.versions(self._subject, name) if one.is_current), None)
        if current is None or (base is not None and current.base_digest != base):
            return None
        try:
            facts: dict[str, Any] = dict(json.loads(current.version_note))
        except (ValueError, TypeError):
            raise StoreError("not the note of an adapter") from None
        return facts, unpack_vectors(store.get(self._subject, name)), current.base_digest

    def _item(self, name: str, vectors: dict[str, Vector], base: str, note: str) -> NewVersion:
        return NewVersion(self._subject, name, pack_vectors(vectors), base, note)

    def _open(self) -> AdapterStore:
        return self._home.open_store(ADAPTERS, "adapters", versions=2)


_OF_GLOBAL = ("run", "round", "targets", "rank", "scaling", "max_tokens")
_FACTS = (
    *_OF_GLOBAL,
    "rank_alone",
    "rank_over_global",
    "chosen",
    "losses",
    "test_losses",
    "report",
    "removals",
    "trained",
)


def _note(learned: Learned, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(learned, name) for name in names}


def _belongs(facts: dict[str, Any], base: str, shared: Vector | None) -> bool:
    """Whether private adapters were trained over this base and this shared adapter; what is older does not say."""
    if BELONGS not in facts:
        return True
    try:
        Belonging.from_text(facts[BELONGS]).check(base, shared)
    except StoreError:
        return False
    return True


def _vector_of(shared: tuple[dict[str, Any], dict[str, Vector], str] | None, base: str) -> Vector | None:
    return shared[1]["vector"] if shared is not None and shared[2] == base else None


def _learned(
    base: str,
    facts: dict[str, Any],
    shared: tuple[dict[str, Any], dict[str, Vector], str] | None,
    private: tuple[dict[str, Any], dict[str, Vector], str] | None,
) -> Learned:
    vectors = private[1] if private is not None else {}
    if shared is not None and shared[2] != base:
        shared = None  # of another base than the private adapters
    try:
        known: dict[str, Any] = {name: facts[name] for name in _FACTS if name in facts}
        known |= {"targets": tuple(map(str, facts["targets"])), "scaling": float(facts["scaling"])}
        known |= {"trained": tuple(map(str, facts.get("trained", ())))}
        known |= {name: vectors.get(name) for name in ("alone", "over_global", "in_context")}
        others = {name.removeprefix(OTHER): vector for name, vector in vectors.items() if name.startswith(OTHER)}
        return Learned(base, shared=None if shared is None else shared[1]["vector"], others=others, **known)
    except (KeyError, TypeError, ValueError):
        raise StoreError("not the note of an adapter") from None
