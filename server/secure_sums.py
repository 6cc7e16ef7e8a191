"""Rounds with distributed noise, as the server sees them: who may come, when a round is called off, what is published.

What is published of a round is its sum, filled up to the one level of noise that every round has (`published`). A round
with too few devices or too many is called off; its debit stays, because that it was called off is seen.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Container, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.distributed_noise import DistributedNoise
from common.errors import DataError, Refusal, VerificationError
from common.files import write_private_file
from common.mask_graph import needed
from common.masks import Words
from common.privacy import Randomness
from common.secagg_coordinator import Coordinator
from common.secagg_messages import Leg
from common.secure_sum import THRESHOLD, SecureSum
from common.sum_wire import SumLetters, simulated_identity
from common.wire import ReleaseSpec, receipt_of_bytes
from server.aggregation import ModularSum

__all__ = ["CalledOff", "MaskedSum", "Participation", "fill_up", "modular_sum", "published", "simulated_keys"]

TAKEN_PART = "participation.json"


class CalledOff(Exception):
    """A round of another size than the run allows, or with too few left in it; nothing of it is published."""


class Participation:
    """How often each simulated user took part; a device counts for itself, in its ledger."""

    def __init__(self, path: Path, cap: int, counts: Counter[str]) -> None:
        """Keep `counts` in `path`; use `open`."""
        self._path, self._cap, self._counts = path, cap, counts

    @classmethod
    def open(cls, folder: Path, spec: ReleaseSpec) -> Participation:
        """Go on counting where a run stands; counts nothing where no noise is distributed.

        Raises:
            DataError: The file is damaged, so that nobody knows who took part how often.
        """
        cap = SecureSum.of(spec).participation_cap if spec.secure_sum is not None else 0
        path = folder / TAKEN_PART
        try:
            counts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            return cls(path, cap, Counter({str(name): int(count) for name, count in counts.items()}))
        except (OSError, ValueError, AttributeError, TypeError):
            raise DataError(f"{path}: not the count of who took part; the run cannot be continued") from None

    def admit(self, cohort: Sequence[str]) -> tuple[list[str], int]:
        """Return who of `cohort` is below the cap, and how many are not; who comes is counted, on disk."""
        admitted = [name for name in cohort if self._counts[name] < self._cap]
        self._counts.update(admitted)
        write_private_file(self._path, json.dumps(dict(self._counts)).encode() + b"\n", replace=True)
        return admitted, len(cohort) - len(admitted)


class MaskedSum:
    """One round of a secure sum from the coordinator's side: which letters go to whom, and what came of it.

    Nothing here knows the network: whoever drives it sends `letters` of a leg, hands in what comes back and says when
    the leg is over.
    """

    def __init__(self, spec: ReleaseSpec, number: int, enrolled: Container[str]) -> None:
        """Open round `number` for devices whose keys are in `enrolled`."""
        self.spec = spec
        self.number = number
        self.rejected: dict[str, int] = {}
        self.receipts: list[str] = []
        self._sums = SecureSum.of(spec)
        self._terms = self._sums.terms(spec, number)
        self._coordinator = Coordinator(self._terms, enrolled=enrolled)
        self._homes: dict[str, tuple[int, str]] = {}
        self._names: dict[tuple[int, str], str] = {}

    def take(self, node: int, answered: SumLetters, asked: Collection[str], leg: Leg) -> None:
        """Take the answers of the subjects `asked` of a node in one leg; whatever else comes is as if it had not."""
        if (answered.run, answered.round, answered.leg) != (self.spec.run, self.number, leg):
            self.reject("wrong-round", len(asked))
            return
        for subject in asked:
            letter = answered.letters.get(subject)
            if letter is None:
                self.reject(answered.refused.get(subject, "silent"), 1)
                continue
            try:
                name = self._coordinator.receive(letter)
            except VerificationError:
                self.reject("bad-reply", 1)
                continue
            if self._names.setdefault((node, subject), name) != name:
                self.reject("bad-reply", 1)
                continue
            self._homes[name] = (node, subject)
            if leg is Leg.MASKED:
                self.receipts.append(receipt_of_bytes(letter, self.spec.digest, self.number, 1, "uint8"))

    def letters(self) -> dict[int, dict[str, bytes]]:
        """End a leg and return the next one's letters: by node, by subject.

        Raises:
            CalledOff: Too few devices are left, or too many came; nothing was learned.
        """
        try:
            requests = self._coordinator.advance()
        except Refusal:
            raise CalledOff from None
        by_node: dict[int, dict[str, bytes]] = {}
        for name, message in requests.items():
            node, subject = self._homes[name]
            by_node.setdefault(node, {})[subject] = message
        return by_node

    def published(self, randomness: Randomness) -> NDArray[np.float64]:
        """Take the masks off and return what is published of the round, shape `(dim,)`.

        Raises:
            CalledOff: Too few shares of masks came, or false ones; nothing was learned.
        """
        try:
            total = self._coordinator.total()
        except (Refusal, VerificationError):
            raise CalledOff from None
        noise = self._sums.noise(self.spec, self._coordinator.devices)
        return fill_up(total, noise, self._coordinator.survivors, self._terms.digest, randomness)

    def reject(self, reason: str, count: int) -> None:
        """Count users who were asked and did not answer a leg, by reason."""
        if count:
            self.rejected[reason] = self.rejected.get(reason, 0) + count


def simulated_keys(run: str, subjects: Sequence[str]) -> frozenset[str]:
    """Return the enrolment keys of simulated users, as hex."""
    return frozenset(simulated_identity(run, subject).verify_key.hex for subject in subjects)


def modular_sum(spec: ReleaseSpec, number: int, devices: int) -> ModularSum:
    """Begin the sum of a round of `devices` without masks.

    Raises:
        CalledOff: The run allows no round of this size.
    """
    try:
        return ModularSum(spec, number, SecureSum.of(spec).noise(spec, devices), devices)
    except ValueError:
        raise CalledOff from None


def published(total: ModularSum, randomness: Randomness) -> NDArray[np.float64]:
    """Return what a sum without masks becomes before anything is made of it, shape `(dim,)`.

    Raises:
        CalledOff: So few of the round's devices are in it that masks could not have been taken off.
    """
    if total.users < needed(total.devices, THRESHOLD):
        raise CalledOff
    place = SecureSum.of(total.spec).terms(total.spec, total.number).digest
    return fill_up(total.words, total.noise, total.users, place, randomness)


def fill_up(
    total: Words, noise: DistributedNoise, survivors: int, place: bytes, randomness: Randomness
) -> NDArray[np.float64]:
    """Fill the noise in `total`, the sum of `survivors`, up to its level, and decode it, shape `(dim,)`.

    Guarantee: what comes out has noise of one level, whoever took part; see `common.distributed_noise`, step 5.

    Raises:
        ClaimRefused: What was drawn is not such noise; nothing is released.
    """
    filled = total + noise.top_up(survivors, randomness)
    return np.asarray(noise.decode(filled & np.uint32(2**noise.bits - 1), place), np.float64)
