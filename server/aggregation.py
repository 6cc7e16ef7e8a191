"""Adapter algebra on the server, streaming: a running sum, never a list of replies.

The sum is divided by the *expected* cohort, a public number, never by who answered: a lost phone costs utility, not
the guarantee.

Replies come in any order, and a float sum depends on its order. The sum here carries the error of every addition along
(Knuth, The Art of Computer Programming, volume 2, section 4.2.2, theorem B; Ogita, Rump and Oishi (2005), algorithm
4.3), so that the same replies give the same float64 whoever was first: it is the exact sum, rounded once, while the
numbers that meet in it are within a factor of some 2^80 of each other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.adapters import Vector
from common.config import RunConfig
from common.distributed_noise import DistributedNoise
from common.masks import Words
from common.noised_counts import NoisedCounts
from common.wire import Release, ReleaseSpec, receipt_digest

__all__ = ["ModularSum", "RunningSum", "ServerStep"]


BETA2 = 0.99
"""Weight of the running mean of squares of FedAdam."""


@dataclass
class RunningSum:
    """The sum of one round's releases.

    Attributes:
        users: Users in it.
        rejected: Users who were asked and are not in it, by reason.
        receipts: Of the releases in it.
    """

    spec: ReleaseSpec
    number: int
    users: int = 0
    rejected: dict[str, int] = field(default_factory=dict[str, int])
    receipts: list[str] = field(default_factory=list[str])
    _sum: NDArray[np.float64] = field(init=False)
    _error: NDArray[np.float64] = field(init=False)
    _counts: NoisedCounts | None = field(init=False)

    def __post_init__(self) -> None:
        self._sum = np.zeros(self.spec.dim)
        self._error = np.zeros(self.spec.dim)
        self._counts = NoisedCounts.of(self.spec)

    @property
    def total(self) -> NDArray[np.float64]:
        """Sum so far, shape `(dim,)`."""
        return self._sum + self._error

    def add(self, release: Release, asked: int) -> bool:
        """Add one release of at most `asked` users, or count why not.

        Guarantee: what is added has the spec's shape, is finite, and is no longer than its users' clips together: a
            broken or hostile node can neither poison the sum nor carry more weight than its users.
        """
        reason = self._fault(release, asked)
        if reason is not None:
            self.reject(reason, asked)
            return False
        added = release.total.astype(np.float64)
        after = self._sum + added
        part = after - self._sum
        self._error += (self._sum - (after - part)) + (added - part)
        self._sum = after
        self.users += release.users
        self.receipts.append(release.receipt)
        self.reject("unavailable", asked - release.users)
        return True

    def reject(self, reason: str, count: int) -> None:
        """Count users who are not in the sum."""
        if count:
            self.rejected[reason] = self.rejected.get(reason, 0) + count

    def _fault(self, release: Release, asked: int) -> str | None:
        total: NDArray[Any] = release.total
        if total.shape != (self.spec.dim,) or total.dtype not in (np.float64, np.dtype(self.spec.dtype)):
            return "misshapen"
        if not 0 < release.users <= asked:
            return "miscounted"
        exact = total.astype(np.float64)
        with np.errstate(over="ignore"):
            norm = float(np.sqrt(np.dot(exact, exact))) if np.isfinite(exact).all() else np.inf
        if not np.isfinite(norm):
            return "not-finite"
        if norm > self._longest(release.users):
            return "too-long"
        if self._counts is not None and self.spec.noise == "central":
            bound = release.users * self.spec.clip * math.sqrt(self._counts.share) * (1 + 1e-6)
            if np.abs(exact[self.spec.model_dim : self.spec.row_dim]).max() > bound:
                return "too-long"  # one user counts once, whatever room the rest of the row leaves
        if release.receipt != receipt_digest(total, self.spec, self.number, release.users):
            return "receipt"
        return None

    def _longest(self, users: int) -> float:
        """The longest sum that so many honest users can send; local noise exceeds its share once in 1e30 rounds."""
        spec = self.spec
        longest = users * spec.update_norm * (1 + 1e-6)
        if spec.noise == "local" and spec.unit == "user":
            scale = 2.0 * spec.noise_multiplier * spec.clip * math.sqrt(users)
            longest += scale * (math.sqrt(spec.dim) + 12.0)
            longest *= 1.001 if spec.dtype == "float16" else 1.0  # noised numbers are rounded once more
        return longest


@dataclass
class ModularSum:
    """The sum of one round's integers modulo 2^bits, where a simulation skips masks that would cancel.

    Attributes:
        noise: How they were encoded.
        devices: Users in the round.
        users: Users in the sum.
        rejected: Users who were asked and are not in it, by reason.
    """

    spec: ReleaseSpec
    number: int
    noise: DistributedNoise
    devices: int
    users: int = 0
    rejected: dict[str, int] = field(default_factory=dict[str, int])
    _sum: Words = field(init=False)

    def __post_init__(self) -> None:
        self._sum = np.zeros(self.noise.padded_dim, np.uint32)

    @property
    def words(self) -> Words:
        """Sum so far, shape `(padded_dim,)`."""
        return self._sum & np.uint32(2**self.noise.bits - 1)

    def add(self, release: Release, asked: int) -> bool:
        """Add one release of at most `asked` users, or count why not."""
        total: NDArray[Any] = release.total
        if total.shape != self._sum.shape or total.dtype != np.uint32:
            reason = "misshapen"
        elif not 0 < release.users <= asked:
            reason = "miscounted"
        elif release.receipt != receipt_digest(total, self.spec, self.number, release.users):
            reason = "receipt"
        else:
            self._sum += total.astype(np.uint32, copy=False)  # wraps at 2^32, of which 2^bits is a divisor
            self.users += release.users
            return True
        self.reject(reason, asked)
        return False

    def reject(self, reason: str, count: int) -> None:
        """Count users who are not in the sum."""
        if count:
            self.rejected[reason] = self.rejected.get(reason, 0) + count


class ServerStep:
    """What the server does with the noised mean: FedAvg, FedAvgM or FedAdam; post-processing, free of charge.

    Source: Reddi et al. (2021), arXiv:2003.00295: algorithm 2, with beta2 = 0.99 for FedAdam, and FedAvgM beside it.
    """

    def __init__(
        self, learning_rate: float, momentum: float, optimizer: str = "sgd", *, adaptivity: float = 1e-3
    ) -> None:
        """Step by `learning_rate` times a running mean with weight `momentum`.

        Args:
            learning_rate: Factor on the step.
            momentum: Of the running mean; beta1 of FedAdam.
            optimizer: "sgd", or "adam", which divides by the root of a running mean of squares.
            adaptivity: What is added to that root, and the root that it starts from.
        """
        self._rate = learning_rate
        self._momentum = momentum
        self._adaptive = optimizer == "adam"
        self._adaptivity = adaptivity

    @classmethod
    def of(cls, config: RunConfig) -> ServerStep:
        """What the server of a run does."""
        return cls(
            config.server_learning_rate,
            config.momentum,
            config.server_optimizer,
            adaptivity=config.server_adaptivity,
        )

    def start(self, dim: int) -> NDArray[np.float32]:
        """The state before round 1: shape `(dim,)`, or `(2, dim)` for FedAdam, means before mean squares."""
        if not self._adaptive:
            return np.zeros(dim, np.float32)
        return np.stack([np.zeros(dim, np.float32), np.full(dim, self._adaptivity**2, np.float32)])

    def apply(
        self, vector: Vector, state: NDArray[np.float32], mean: NDArray[np.float64]
    ) -> tuple[Vector, NDArray[np.float32]]:
        """Return the next shared vector, shape `(dim,)`, and the next state; a step that is not finite is not taken."""
        with np.errstate(over="ignore", invalid="ignore"):
            if self._adaptive:
                first = self._momentum * state[0].astype(np.float64) + (1 - self._momentum) * mean
                second = BETA2 * state[1].astype(np.float64) + (1 - BETA2) * mean**2
                after = np.stack([first, second]).astype(np.float32)
                stepped = (vector + self._rate * first / (np.sqrt(second) + self._adaptivity)).astype(np.float32)
            else:
                after = (self._momentum * state.astype(np.float64) + mean).astype(np.float32)
                stepped = (vector + self._rate * after).astype(np.float32)
        if not (np.isfinite(stepped).all() and np.isfinite(after).all()):
            return vector, self.start(vector.size)
        return stepped, after
