"""How far a device has got with training for a round: sealed on disk, so that a reboot costs seconds and not the round.

Nothing was released when a checkpoint is written, so nothing was debited: the debit comes at the door, once, whatever
was interrupted before it. What is kept is the adapter in training, the optimizer's state and the number of steps. The
order of the records is not kept, because it is drawn from the device's own key again.

Unit user: training is deterministic, so what comes out after an interruption is what would have come out without, to
the bit (same machine, same threads). A checkpoint of another start, spec, round, base or set of records is passed over.

Unit example (DP-SGD): a checkpoint holds a point of the noised path, never a seed. Steps in it are not taken again;
steps after it are taken with new coins and new noise from the operating system, as if they were the first. Proof
sketch: the released adapter is then the outcome of exactly the promised number of steps, each one Poisson-sampled
Gaussian mechanism applied to the outcome of the ones before it; which steps were tried and lost in between is in no
output, and depends on the records no more than when the power went out. So the composition that was charged is the
composition that ran. Test: `test_an_interrupted_silo_round_takes_each_step_once`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.adapter_store import AdapterStore, pack_vectors, unpack_vectors
from common.errors import Refusal, StoreError
from common.wire import Assignment, canonical, raw_bytes

if TYPE_CHECKING:
    from client.packing import Example

__all__ = ["PartProgress", "RoundProgress", "StepState"]

NAME = "training in progress"
RESERVED = 0.1
"""Share of the time that is left which is kept for what comes after the last step: the door and its fsyncs."""


@dataclass(frozen=True)
class StepState:
    """Where training stands: steps taken, and the arrays that the next one needs, float32, shape `(users, size)`."""

    steps: int
    arrays: Mapping[str, NDArray[np.float32]]


class RoundProgress:
    """Keeps how far one round's training is, and stops it before the time that the owner grants is over.

    Attributes:
        cut: Steps that were taken and steps that were asked for, where time allowed fewer; None otherwise.
    """

    def __init__(
        self,
        open_store: Callable[[], AdapterStore],
        subject: str,
        base: str,
        *,
        seconds: float,
        save_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep checkpoints in the store that `open_store` opens for a moment.

        Args:
            open_store: The store of what methods keep, which `forget` erases with the subject's key.
            subject: Whose training it is.
            base: Digest of the base model.
            seconds: What is left for training now, from this moment on.
            save_seconds: How far apart checkpoints are.
            clock: Seconds.
        """
        self._open = open_store
        self._subject = subject
        self._base = base
        self._save_seconds = save_seconds
        self._clock = clock
        self._deadline = clock() + seconds * (1.0 - RESERVED)
        self._of = ""
        self._found: tuple[int, StepState] | None = None
        self._written = False
        self.cut: tuple[int, int] | None = None

    def begin(
        self,
        assignment: Assignment,
        pass_tokens: int,
        starts: NDArray[np.float32],
        records: Sequence[Sequence[Example]],
    ) -> None:
        """Name what is trained by everything that decides its outcome, and look for a checkpoint of just that."""
        spec = assignment.spec
        named = [spec.run, assignment.round, spec.digest, list(assignment.users), assignment.clip_scale, pass_tokens]
        digest = hashlib.sha256(canonical(named))
        digest.update(raw_bytes(starts))
        for own in records:
            digest.update(len(own).to_bytes(8, "big"))
            for one in own:
                digest.update(canonical([len(one.ids), one.first_label]) + raw_bytes(one.ids))
        self._of, self._found = digest.hexdigest(), None
        try:
            with self._open() as store:
                versions = store.versions(self._subject, NAME)
                self._written = bool(versions)
                if not versions or not versions[-1].version_note:
                    return
                note = json.loads(versions[-1].version_note)
                if note["of"] != self._of:
                    return
                arrays = unpack_vectors(store.get(self._subject, NAME, base_digest=self._base))
        except (StoreError, ValueError, KeyError, TypeError):
            return  # a checkpoint that does not open costs time and nothing else
        self._found = int(note["part"]), StepState(int(note["steps"]), arrays)

    def part(self, index: int, parts: int, *, may_be_cut: bool) -> PartProgress:
        """Progress of one of several trainings in turn; each gets an equal share of the time that is left.

        Args:
            index: Which one, from 0.
            parts: Of how many.
            may_be_cut: Whether fewer steps still are what was promised.
        """
        now = self._clock()
        until = now + (self._deadline - now) / (parts - index)
        found = self._found if self._found is not None and self._found[0] >= index else None
        passed = found is not None and found[0] > index
        return PartProgress(self, index, None if found is None else found[1], passed, until, may_be_cut)

    def finish(self) -> None:
        """Forget the checkpoint: what it led to is on its way."""
        if self._written:
            with self._open() as store:
                store.put(self._subject, NAME, b"", base_digest=self._base)

    def save(self, part: int, state: StepState) -> None:
        """Keep a checkpoint, on disk when this returns."""
        note = json.dumps({"of": self._of, "part": part, "steps": state.steps})
        with self._open() as store:
            store.put(self._subject, NAME, pack_vectors(state.arrays), base_digest=self._base, version_note=note)
        self._written = True

    def now(self) -> float:
        """Seconds of the clock."""
        return self._clock()

    @property
    def save_seconds(self) -> float:
        """How far apart checkpoints are."""
        return self._save_seconds


class PartProgress:
    """What a trainer tells after every step, and asks before the first."""

    def __init__(
        self, whole: RoundProgress, index: int, found: StepState | None, passed: bool, until: float, may_be_cut: bool
    ) -> None:
        """Made by `RoundProgress.part`."""
        self._whole = whole
        self._index = index
        self._found = found
        self._passed = passed
        self._until = until
        self._may_be_cut = may_be_cut
        self._began = self._saved = whole.now()
        self._taken = 0

    def resume(self, steps: int) -> StepState | None:
        """Where an interrupted training of `steps` steps goes on; None at the beginning.

        Where a later part was under way already, this one is over; the later one brings its own state.
        """
        found = self._found
        if found is None or not found.steps > 0:
            return None
        return StepState(steps, found.arrays) if self._passed else found

    def after(self, step: int, steps: int, state: Callable[[], Mapping[str, NDArray[Any]]]) -> bool:
        """Take note of step `step` of `steps`; return whether there is time for another.

        Raises:
            Refusal: There is none, and with fewer steps it would not be what was promised; a checkpoint is kept.
        """
        self._taken += 1
        now = self._whole.now()
        seconds = (now - self._began) / self._taken
        late = step < steps and now + seconds > self._until
        if step < steps and (now - self._saved >= self._whole.save_seconds or (late and not self._may_be_cut)):
            arrays = {name: np.asarray(one, np.float32) for name, one in state().items()}
            self._whole.save(self._index, StepState(step, arrays))
            self._saved = self._whole.now()
        if late and not self._may_be_cut:
            raise Refusal("not-now", f"time for {step} of {steps} steps is left today; they are kept for a next try")
        if late:
            self._whole.cut = step, steps
        return not late
