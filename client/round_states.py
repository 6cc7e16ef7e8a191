"""What a method keeps on a device from round to round: the part of an adapter that never leaves.

A round is answered once; where it is answered again (a server that crashed, a run that was resumed), training starts
again from what was kept *before* that round. So two versions are kept, and the round that the newer one is of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from client.adapter_store import AdapterStore, NewVersion, pack_vectors, unpack_vectors
from common.adapters import Vector

__all__ = ["RoundStates", "ShortMemory", "StoredStates"]


class RoundStates(Protocol):
    """Keeps a vector per user and run."""

    def before(self, run: str, number: int, users: Sequence[str]) -> list[Vector | None]:
        """What each user kept before round `number`; None where there is nothing."""
        ...

    def keep(self, run: str, number: int, users: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Keep what each user has after round `number`, shape `(users, size)`."""
        ...


class ShortMemory:
    """In memory, for as long as the process lives."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._kept: dict[tuple[str, str], list[tuple[int, Vector]]] = {}

    def before(self, run: str, number: int, users: Sequence[str]) -> list[Vector | None]:
        """As `RoundStates.before`."""
        return [_newest(self._kept.get((run, user), []), number) for user in users]

    def keep(self, run: str, number: int, users: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """As `RoundStates.keep`."""
        for user, vector in zip(users, vectors, strict=True):
            self._kept[run, user] = _with(self._kept.get((run, user), []), number, vector)


class StoredStates:
    """On a device: in the store of private adapters, which `forget` erases with the subject's key."""

    def __init__(self, open_store: Callable[[], AdapterStore], base: str) -> None:
        """Keep versions in the store that `open_store` opens for a moment, for the base model with digest `base`."""
        self._open = open_store
        self._base = base

    def before(self, run: str, number: int, users: Sequence[str]) -> list[Vector | None]:
        """As `RoundStates.before`."""
        with self._open() as store:
            return [self._before(store, run, number, user) for user in users]

    def keep(self, run: str, number: int, users: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """As `RoundStates.keep`; on disk when it returns."""
        versions = [
            NewVersion(user, _name(run), pack_vectors({"kept": vector}), self._base, str(number))
            for user, vector in zip(users, vectors, strict=True)
        ]
        with self._open() as store:
            store.put_many(versions)

    def _before(self, store: AdapterStore, run: str, number: int, user: str) -> Vector | None:
        for version in reversed(store.versions(user, _name(run))):
            if int(version.version_note) < number:
                payload = store.get(user, _name(run), base_digest=self._base, version=version.version)
                return unpack_vectors(payload)["kept"]
        return None


def _with(entries: Sequence[tuple[int, Vector]], number: int, vector: Vector) -> list[tuple[int, Vector]]:
    """Add what is kept after round `number`, and drop all but the newest from before it."""
    earlier = [entry for entry in entries if entry[0] < number]
    return [*earlier[-1:], (number, np.array(vector, np.float32))]


def _newest(entries: Sequence[tuple[int, Vector]], number: int) -> Vector | None:
    earlier = [vector for one, vector in entries if one < number]
    return earlier[-1] if earlier else None


def _name(run: str) -> str:
    return f"kept in the rounds of {run}"
