"""The mechanism test: the release path itself, driven many times with and without a worst-case user or record.

Nothing is imitated. A planted update goes through the vault's clipping, the gate, the server's running sum and
whoever's noise is promised, as in a round; only what is learned is replaced, by a direction that the attacker chose.
Who knows everything but that one unit sees Gaussian noise of the promised size around one of two points, and nothing
better. What the points are is what adjacency says:

- central: the user's update, or zeros; noise by the server, on the sum;
- local: the user's update, or its opposite; noise by the gate, on what leaves;
- silo: the record's gradient, or none, in one step of DP-SGD at rate 1; noise by the trainer;
- distributed: the user's update, or zeros, as integers with a share of the noise by the gate, filled up by the server
  to the level that is published, and decoded.

Noise that is too small, a clip that is too wide or one per tensor, and noise that repeats are all seen here, and only
here: the ledger says what was charged, not what the code did.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.base_model import BaseModel
from client.round_progress import PartProgress
from client.trainer import Example, ExamplePromise, Recipe, Trainer
from client.vault import EncodedUser, Vault
from common.adapters import Layout, Vector
from common.config import RunConfig
from common.errors import Refusal
from common.methods import method_named
from common.promise import promise_of
from common.secure_sum import SecureSum
from common.split import split_of
from common.wire import Assignment, Release, ReleaseSpec, receipt_digest
from server import rounds as server_rounds
from server import secure_sums
from server.aggregation import ModularSum, RunningSum
from server.cohort import Roster
from simulations.attack_result import AttackResult
from simulations.lower_bounds import (
    CONFIDENCE,
    LowerBound,
    clopper_pearson_bound,
    epsilon_of_mu,
    gaussian_bound,
)

__all__ = ["PlantedUpdate", "PlantingTrainer", "probe_mechanism", "probe_sampling"]

CANARY, EMPTY = "canary", "nobody"
CHUNK = 200
"""Trials with one direction; the next have another."""

LEAST_NOISE = 0.999
"""Of the promised standard deviation, on the average over all numbers and trials."""

CERTAIN = 1e-6
"""A check of the code itself says "contradicted" only if an honest code fails it less often than this."""


@dataclass(frozen=True)
class PlantedUpdate:
    """Stands for a record; a user who has it "learns" `update`, shape `(dim,)`, whatever the model is."""

    update: NDArray[np.float32]
    ids: NDArray[np.int32]
    first_label: int = 1


class PlantingTrainer(Trainer):
    """Trains users as ever, but gives those with a planted update exactly that."""

    def __init__(self, base: BaseModel, *, rank: int, scaling: float) -> None:
        """Lay adapters over `base`, as `Trainer` does."""
        super().__init__(base, rank=rank, scaling=scaling)

    def fit(
        self,
        start: NDArray[np.float32],
        examples: Sequence[Sequence[Example]],
        recipe: Recipe,
        orders: Sequence[np.random.Generator],
        *,
        under: tuple[Vector, Layout, float] | None = None,
        trainable: NDArray[np.bool_] | None = None,
        anchor: tuple[Vector, float] | None = None,
        steps: Sequence[int] | None = None,
        progress: PartProgress | None = None,
    ) -> NDArray[np.float32]:
        """Train one adapter per user, shape `(users, size)`; planted ones are not trained."""
        starts = np.broadcast_to(np.asarray(start, np.float32), (len(examples), self.layout.size))
        trained = starts.copy()
        real = [index for index, own in enumerate(examples) if not isinstance(own[0], PlantedUpdate)]
        for index, own in enumerate(examples):
            planted = own[0]
            if isinstance(planted, PlantedUpdate):
                trained[index] += planted.update
        if real:
            options: dict[str, Any] = {"under": under, "trainable": trainable, "anchor": anchor, "progress": progress}
            options["steps"] = None if steps is None else [steps[index] for index in real]
            trained[real] = super().fit(
                starts[real], [examples[index] for index in real], recipe, [orders[index] for index in real], **options
            )
        return trained

    def example_gradients(self, vector: Vector, examples: Sequence[Example]) -> NDArray[np.float64]:
        """Gradient of each example's loss, shape `(examples, size)`; a planted one is what was planted."""
        if not examples or not isinstance(examples[0], PlantedUpdate):
            return super().example_gradients(vector, examples)
        return np.stack([one.update for one in examples if isinstance(one, PlantedUpdate)]).astype(np.float64)


def planted_user(update: NDArray[np.float32]) -> EncodedUser:
    """A user whose only record is a planted update."""
    return EncodedUser([PlantedUpdate(update, np.zeros(2, np.int32))], (), ())


@dataclass(frozen=True)
class _Seen:
    """What one trial's release looks like to the attacker, in clips, and the noise in it."""

    value: NDArray[np.float64]
    noise: NDArray[np.float64]


class _Path:
    """The release path of one spec, for one planted unit at a time."""

    def __init__(self, config: RunConfig, spec: ReleaseSpec, base: BaseModel) -> None:
        self.config = config
        self.spec = spec
        self.layout = Layout.from_json([[name, shape] for name, shape in zip(spec.names, spec.shapes, strict=True)])
        self.longest = 0.0
        trainer = PlantingTrainer(base, rank=config.rank, scaling=config.scaling)
        self._split = split_of(method_named(spec.method), trainer.layout, spec.recipe)
        self._trainer = trainer.at_rank(self._split.trained.tensors[0].shape[0])
        self._users: dict[str, EncodedUser] = {}
        self._vault = Vault(trainer, self._users.__getitem__, seed=config.seed, rehearsal=config.rehearsal)
        self._start = np.zeros(spec.model_dim, np.float32)
        self._clear: dict[str, Release] = {}

    def plant(self, direction: NDArray[np.float64]) -> None:
        """Let the canary be a unit far longer than the clip, in `direction`; measure what gets through the door."""
        update = np.zeros(self._split.trained.size, np.float32)
        update[self._split.shared] = 1e3 * self.spec.clip * direction
        other = planted_user(-update) if self.spec.noise == "local" else EncodedUser((), (), ())
        self._users |= {CANARY: planted_user(update), EMPTY: other}
        # What leaves without noise, as the same door lets it through: the attacker knows it, and it is measured.
        clear = replace(self.spec, noise_multiplier=0.0)
        if self.spec.noise == "distributed":
            clear = replace(clear, noise="central", secure_sum=None)
        if self.spec.unit == "user":
            self._clear = {name: self._vault.train(Assignment(clear, 1, (name,), self._start)) for name in self._users}
            clear_totals = [one.total.astype(np.float64) for one in self._clear.values()]
            self.longest = max(self.longest, *(float(np.linalg.norm(total)) for total in clear_totals))

    def release(self, name: str, number: int) -> _Seen | str:
        """Release once with the canary or without; a reason where the server rejects it."""
        spec = self.spec
        if spec.unit == "example":
            return self._step(name, number)
        if spec.noise == "distributed":
            return self._sum(name, number)
        local = spec.noise == "local"
        release = self._vault.train(Assignment(spec, number, (name,), self._start)) if local else self._clear[name]
        if not local:  # the same bytes leave each time; they are bound to the round that they leave in
            release = replace(release, receipt=receipt_digest(release.total, spec, number, release.users))
        total = RunningSum(spec, number)
        if not total.add(release, 1):
            return next(iter(total.rejected))
        noise = server_rounds.round_randomness(self.config, number).child("noise")
        released = server_rounds.add_central_noise(total.total, spec, noise)
        return _Seen(released[: spec.model_dim] / spec.clip, (released - self._clear[name].total) / spec.clip)

    def _sum(self, name: str, number: int) -> _Seen | str:
        """A sum of one device, filled up to the level of all: everybody else sent zeros, and the server their noise."""
        spec, sums = self.spec, SecureSum.of(self.spec)
        devices = sums.largest_cohort
        noise = sums.noise(spec, devices)
        total = ModularSum(spec, number, noise, devices)
        if not total.add(self._vault.train(Assignment(spec, number, (name,), self._start, devices)), 1):
            return next(iter(total.rejected))
        randomness = server_rounds.round_randomness(self.config, number).child("noise")
        place = sums.terms(spec, number).digest
        released = secure_sums.fill_up(total.words, noise, total.users, place, randomness)
        return _Seen(released[: spec.model_dim] / spec.clip, (released - self._clear[name].total) / spec.clip)

    def _step(self, name: str, number: int) -> _Seen:
        """One step of DP-SGD in which every record takes part, so that nothing hides behind the sampling."""
        spec = self.spec
        promise = ExamplePromise(spec.clip, spec.noise_multiplier * spec.extrapolation, 1.0)
        recipe = Recipe(steps=1, batch=1, learning_rate=1.0)
        randomness = server_rounds.round_randomness(self.config, number).child("step")
        split, own = self._split, self._users[name].train
        start, moves = np.zeros(split.trained.size, np.float32), split.moved | split.own
        trained = self._trainer.fit_example_dp(start, own, recipe, promise, randomness, trainable=moves)
        # Plain descent by 1 over a batch of 1: what was learned is the noised sum of clipped gradients, negated.
        summed = -trained.astype(np.float64)[split.shared]
        clear = self._trainer.clipped_gradient_sum(start, own, spec.clip, trainable=moves)[split.shared]
        self.longest = max(self.longest, float(np.linalg.norm(clear)))
        return _Seen(summed / spec.clip, (summed - clear) / spec.clip)


def probe_mechanism(
    config: RunConfig, spec: ReleaseSpec, base: BaseModel, *, trials: int, generator: np.random.Generator
) -> AttackResult:
    """Drive clip, gate, sum and noise `trials` times, half of them with a canary, and bound epsilon of one release.

    Args:
        config: The run's configuration; a rehearsal's noise is the seeded one.
        spec: What devices are asked for.
        base: The base, for the vault.
        trials: How often; 20,000 prove 3.6 of 4 and 7.3 of 8.
        generator: Draws the canary's directions; the noise is the code's own.
    """
    path = _Path(config, spec, base)
    # Sensitivity in clips: replacing one user by another moves what leaves by two.
    reach = promise_of(spec).noise_scale(1.0, 1.0)
    scores: dict[str, list[float]] = {CANARY: [], EMPTY: []}
    squares: NDArray[np.float64] = np.zeros(1)
    seen: set[bytes] = set()
    repeated = 0
    direction = np.zeros(spec.model_dim)
    try:
        for trial in range(trials):
            if trial % CHUNK == 0:
                # The same length in every tensor: clipping each by itself would let all of them through.
                direction = _spread_direction(path.layout, generator)
                path.plant(direction)
            name = CANARY if trial % 2 else EMPTY
            found = path.release(name, trial + 1)
            if isinstance(found, str):
                return _unusable(spec, f"the server rejected it: {found}")
            scores[name].append(float(found.value @ direction) / reach)
            noise = found.noise / reach
            squares = squares + noise * noise
            digest = hashlib.blake2b(np.round(noise[:64], 3).tobytes(), digest_size=16).digest()
            repeated += digest in seen
            seen.add(digest)
    except Refusal as refusal:
        return _unusable(spec, str(refusal))
    secure = server_rounds.round_randomness(config, 1).is_secure
    faults = _faults(config, spec, squares, trials, path.longest, secure, repeated)
    return _judged(spec, np.array(scores[CANARY]), np.array(scores[EMPTY]), faults, squares, trials, path.longest)


def _judged(
    spec: ReleaseSpec,
    present: NDArray[np.float64],
    absent: NDArray[np.float64],
    faults: list[str],
    squares: NDArray[np.float64],
    trials: int,
    longest: float,
) -> AttackResult:
    claimed_mu = _claimed_mu(spec)
    claimed = epsilon_of_mu(claimed_mu, spec.delta)
    gaussian = gaussian_bound(present, absent, spec.delta)
    bounds = (gaussian, *_counted(present, absent, claimed_mu, spec.delta))
    certain = gaussian_bound(present, absent, spec.delta, confidence=1 - CERTAIN).epsilon
    if certain > claimed:
        faults.append(f"one release loses at least epsilon {certain:.2f}; {claimed:.2f} was charged")
    spread = math.sqrt(float(squares.mean()) / trials)
    measured = float(present.mean() - absent.mean()) / float(
        np.concatenate([present - present.mean(), absent]).std() or 1
    )
    verdict = "contradicted" if faults else "holds"
    why = "; ".join(faults) or (
        f"noise of {spread:.4f} times the sensitivity where {spec.noise_multiplier:.4f} was promised; the longest "
        f"contribution through the door had {longest / spec.clip:.4f} clips"
    )
    return AttackResult(
        name="mechanism test",
        target="the mechanism: clip, gate, sum and noise as they are in the code",
        measure="epsilon of one release, at least",
        value=gaussian.epsilon,
        low=gaussian.epsilon,
        high=math.inf,
        chance=0.0,
        saturation=bounds[1].saturation,
        samples=trials,
        verdict="not shown" if math.isinf(claimed) and not faults else verdict,
        why=why if math.isfinite(claimed) or faults else "nothing is claimed",
        bounds=bounds,
        claimed_epsilon=claimed,
        details={
            "noise_multiplier": spread,
            "promised_noise_multiplier": spec.noise_multiplier,
            "longest_over_clip": longest / spec.clip,
            "separation": measured,
        },
    )


def _faults(
    config: RunConfig,
    spec: ReleaseSpec,
    squares: NDArray[np.float64],
    trials: int,
    longest: float,
    secure: bool,
    repeated: int,
) -> list[str]:
    """What can be read off the releases without any statistics of attacks."""
    from scipy.stats import chi2

    faults: list[str] = []
    if longest > spec.clip * (1 + 1e-6):
        faults.append(f"a contribution of {longest / spec.clip:.3f} clips got through the door")
    promised = spec.noise_multiplier**2 * trials
    if math.isfinite(_claimed_mu(spec)):
        share = math.sqrt(float(squares.mean()) / promised)
        if share < min(LEAST_NOISE, 1 - 5 / math.sqrt(2 * trials * squares.size)):
            faults.append(f"the noise has {share:.3f} of the standard deviation that was promised")
        least = float(chi2.ppf(CERTAIN / squares.size, trials)) / trials
        quiet = int((squares / promised < least).sum())
        if quiet:
            faults.append(f"{quiet} of {squares.size} numbers have less noise than was promised")
    if repeated and spec.noise_multiplier > 0:
        faults.append(f"the same noise was drawn {repeated + 1} times: it comes from a fixed seed")
    if not secure and not config.rehearsal:
        faults.append("noise that is claimed to protect comes from a seeded stream")
    return faults


def _counted(
    present: NDArray[np.float64], absent: NDArray[np.float64], claimed_mu: float, delta: float
) -> tuple[LowerBound, LowerBound]:
    """Bounds that take no normal distribution for granted; their thresholds follow the claim, not the scores."""
    from scipy.special import ndtr

    mu = min(claimed_mu, 20.0)

    def expected(threshold: float) -> float:
        # In units of the promised noise, at the promised separation.
        hits, alarms = int(present.size * ndtr(mu - threshold)), int(absent.size * ndtr(-threshold))
        return clopper_pearson_bound(hits, present.size, alarms, absent.size, delta).epsilon

    def bound(threshold: float, *, as_gaussian: bool) -> LowerBound:
        hits, alarms = int((present > threshold / mu).sum()), int((absent > threshold / mu).sum())
        return clopper_pearson_bound(
            hits, present.size, alarms, absent.size, delta, as_gaussian=as_gaussian, confidence=CONFIDENCE
        )

    best = max(np.linspace(0.0, mu + 2.5, 26), key=lambda threshold: expected(float(threshold)))
    return bound(mu / 2.0, as_gaussian=True), bound(float(best), as_gaussian=False)


def _claimed_mu(spec: ReleaseSpec) -> float:
    """Separation that one release is charged for; infinite where noise is absent or scaled down for a study."""
    if spec.noise_multiplier == 0 or spec.extrapolation != 1.0:
        return math.inf
    return 1.0 / spec.noise_multiplier


def _spread_direction(layout: Layout, generator: np.random.Generator) -> NDArray[np.float64]:
    """A unit vector with the same length in every tensor."""
    parts = [generator.standard_normal(tensor.size) for tensor in layout.tensors]
    return np.concatenate([part / np.linalg.norm(part) for part in parts]) / math.sqrt(len(parts))


def _unusable(spec: ReleaseSpec, why: str) -> AttackResult:
    return AttackResult(
        name="mechanism test",
        target="the mechanism: clip, gate, sum and noise as they are in the code",
        measure="epsilon of one release, at least",
        value=0.0,
        low=0.0,
        high=math.inf,
        chance=0.0,
        saturation=0.0,
        samples=0,
        verdict="contradicted",
        why=f"the release path refuses what it made itself: {why}",
        claimed_epsilon=epsilon_of_mu(_claimed_mu(spec), spec.delta),
    )


def probe_sampling(config: RunConfig, spec: ReleaseSpec, *, rounds: int) -> AttackResult:
    """Draw `rounds` cohorts as the server does and test that each user came by a coin of their own.

    Sizes must spread as a binomial does: a fixed size does not spread at all. Users must come equally often, and
    whether one came must not depend on whether they came the round before.
    """
    from scipy.stats import chi2

    roster = Roster.of_hellos({2: ()}, spec.population)
    rate, users = spec.sampling_rate, spec.population
    sizes, counts, both = np.zeros(rounds), np.zeros(users), 0
    before: set[int] = set()
    for number in range(rounds):
        cohort = {
            int(name)
            for name in roster.cohort(rate, server_rounds.round_randomness(config, number + 1).child("cohort"))
        }
        sizes[number] = len(cohort)
        counts[list(cohort)] += 1
        both += len(cohort & before)
        before = cohort
    faults: list[str] = []
    if rate == 1.0:
        dispersion, low, high = 1.0, 1.0, 1.0
        if (sizes != users).any():
            faults.append("everyone was to take part in every round, and did not")
    else:
        spread = float(((sizes - rate * users) ** 2).sum() / (rate * (1 - rate) * users))
        dispersion = spread / rounds
        low, high = (spread / float(chi2.ppf(level, rounds)) for level in (0.975, 0.025))
        if not CERTAIN < chi2.sf(spread, rounds) < 1 - CERTAIN:
            faults.append(f"the sizes of cohorts spread {dispersion:.2f} times as far as Poisson cohorts do")
        uneven = float(((counts - rate * rounds) ** 2).sum() / (rate * (1 - rate) * rounds))
        if not CERTAIN < chi2.sf(uneven, users) < 1 - CERTAIN:
            faults.append("some users come more often than others, or all come equally often by arrangement")
        pairs = rate * rate * users * (rounds - 1)
        if rounds > 1 and abs(both - pairs) > 5 * math.sqrt(pairs) + 5:
            faults.append("who comes depends on who came the round before")
    return AttackResult(
        name="sampling test",
        target="the mechanism: how cohorts are drawn",
        measure="spread of cohort sizes over that of Poisson cohorts",
        value=dispersion,
        low=low,
        high=high,
        chance=1.0,
        saturation=0.0,
        samples=rounds,
        verdict="contradicted" if faults else "holds",
        why="; ".join(faults) or f"mean size {sizes.mean():.1f} where {rate * users:.1f} is expected",
    )
