"""Canaries in a run of their own: the whole federation, small, with users whose part in it is known to the auditor.

The run has the audited run's clip, rate, budget and code: Flower messages, vault, gate, sum, noise, ledger. Beside
real users it enrols two kinds of canary, each of which takes part by a coin that the auditor tossed:

- canary users, who "learn" a random direction: what one person can do at most (Andrew et al. 2024);
- canary examples, users with a single made-up record that they really train on: what a person's text does.

Who was left out answers with zeros, which is what zero-out adjacency compares with. The attacker sees every shared
vector, as each device does.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.app import build
from client.vault import EncodedUser, Vault
from common.accountants import epsilon_of, equivalent_mu
from common.adapters import Vector
from common.promise import promise_of
from common.wire import ReleaseSpec
from server import run_folder
from server.rounds import Round, Rounds
from simulations.attack_result import AttackResult, mean_interval, ranking
from simulations.grid import InProcessGrid, submit_here
from simulations.hosts import Host
from simulations.lower_bounds import LowerBound, clopper_pearson, cosine_bound
from simulations.mechanism import PlantingTrainer, planted_user
from simulations.one_run import best_guesses, count_correct, one_run_bound, one_run_gaussian_bound
from simulations.planning import base_of

__all__ = ["CanaryRun", "Secret", "judge_canary_examples", "judge_canary_users", "judge_extraction", "run_canaries"]

PROMPT_TOKENS, SECRET_TOKENS = 6, 6
REFERENCES = 511
"""Secrets that nobody has: a planted one is ranked among them, so that exposure is at most log2(512) = 9."""


@dataclass(frozen=True)
class Secret:
    """A made-up record: a prompt of random tokens, and random tokens to be kept secret."""

    ids: NDArray[np.int32]
    first_label: int


@dataclass(frozen=True)
class CanaryRun:
    """What the auditor put in and what came out.

    Attributes:
        spec: What was asked for; its promise is the audited run's.
        directions: The canary users' updates, unit length, shape `(canary users, dim)`.
        users_in: Which of them took part, bool.
        secrets: The canary examples.
        secrets_in: Which of them took part, bool.
        references: Secrets that nobody had.
        vectors: The shared vector before round 1 and after every round, shape `(rounds + 1, dim)`.
        step: Server learning rate and momentum.
        spent: Epsilon of the rounds that were run.
    """

    spec: ReleaseSpec
    directions: NDArray[np.float32]
    users_in: NDArray[np.bool_]
    secrets: tuple[Secret, ...]
    secrets_in: NDArray[np.bool_]
    references: tuple[Secret, ...]
    vectors: NDArray[np.float32]
    step: tuple[float, float]
    spent: float

    def means(self) -> NDArray[np.float64]:
        """The noised means of the rounds as anybody recovers them from the vectors, shape `(rounds, dim)`."""
        rate, momentum = self.step
        moved = np.diff(self.vectors.astype(np.float64), axis=0) / rate
        moved[1:] -= momentum * moved[:-1].copy()
        return moved


def run_canaries(
    host: Host,
    *,
    rounds: int,
    canary_users: int,
    canary_examples: int,
    real_users: int,
    generator: np.random.Generator,
) -> CanaryRun:
    """Run a small federation with canaries, through the whole stack.

    Args:
        host: The audited run's base, data and configuration.
        rounds: Rounds of the small run; its noise is calibrated to the audited budget over these.
        canary_users: Users with a planted update; at least four.
        canary_examples: Users with one made-up record; at least four.
        real_users: Users of the audited data beside them, at most as many as it has.
        generator: Tosses the coins, draws directions and secrets. Cohorts and noise are the code's own.

    Raises:
        ValueError: Too few canaries.
    """
    if min(canary_users, canary_examples) < 4:
        raise ValueError("at least four canaries of each kind")
    real_users = min(real_users, len(host.population))
    population = canary_users + canary_examples + real_users
    rate = min(1.0, host.config.cohort / len(host.population))
    config = host.config.model_copy(
        update={
            "users": population,
            "cohort": max(1, round(rate * population)),
            "rounds": rounds,
            "workers": 0,
            "init_adapter": host.config.init_adapter,
            "as_if_population": None,
            "secagg": "skip",
            "participation_cap": None,
            "server_optimizer": "sgd",  # whatever the server does with the mean is post-processing
        }
    )
    trainer, split = PlantingTrainer(host.base, rank=config.rank, scaling=config.scaling), host.split
    directions = generator.standard_normal((canary_users, split.sent.size))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    users_in, secrets_in = _coins(canary_users, generator), _coins(canary_examples, generator)
    secrets = tuple(random_secret(host, generator) for _ in range(canary_examples))
    references = tuple(random_secret(host, generator) for _ in range(REFERENCES))
    users: dict[str, EncodedUser] = {}
    for index in range(canary_users):
        update = np.zeros(split.trained.size, np.float32)
        update[split.shared] = 1e3 * config.clip * directions[index]
        users[str(index)] = planted_user(update) if users_in[index] else EncodedUser((), (), ())
    for index, secret in enumerate(secrets):
        users[str(canary_users + index)] = EncodedUser([secret] if secrets_in[index] else [], (), ())
    first = canary_users + canary_examples
    names = generator.permutation(len(host.population))[:real_users]
    users |= {str(first + index): host.population.encoded(str(name)) for index, name in enumerate(names)}
    vault = Vault(trainer, users.__getitem__, seed=config.seed, rehearsal=config.rehearsal)
    with tempfile.TemporaryDirectory(prefix="homespun-audit-") as folder:
        opened = run_folder.create(
            Path(folder) / "run",
            config,
            population=population,
            model=base_of(config),
            digest=host.base.digest,
            data=hashlib.sha256(b"canaries").hexdigest(),
        )
        vectors: list[Vector] = [opened.start.copy()]

        def keep(finished: Round) -> None:
            vectors.append(finished.vector.copy())

        try:
            grid = InProcessGrid(submit_here(build(lambda context: vault), 1), 1)  # noqa: ARG005
            Rounds(config, opened.spec, opened.layout, opened.start, opened.path, opened.ledger).run(grid, keep)
        finally:
            opened.ledger.close()
    spec = opened.spec
    promise = promise_of(spec)
    event = promise.schedule(spec.noise_multiplier, rounds)
    return CanaryRun(
        spec=spec,
        directions=directions.astype(np.float32),
        users_in=users_in,
        secrets=secrets,
        secrets_in=secrets_in,
        references=references,
        vectors=np.stack(vectors),
        step=(config.server_learning_rate, config.momentum),
        spent=epsilon_of(event, spec.delta, adjacency=promise.adjacency),
    )


def _coins(count: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Toss a fair coin per canary; again where all but one fell alike, which leaves nothing to compare."""
    while True:
        coins = generator.random(count) < 0.5
        if min(coins.sum(), (~coins).sum()) >= 2:
            return coins


def random_secret(host: Host, generator: np.random.Generator) -> Secret:
    """Draw a record of random tokens of the base's vocabulary, none of them a special one."""
    special = set(host.base.tokenizer.all_special_ids)
    plain = np.array([token for token in range(host.base.model.config.vocab_size) if token not in special])
    ids = generator.choice(plain, PROMPT_TOKENS + SECRET_TOKENS).astype(np.int32)
    return Secret(ids, PROMPT_TOKENS)


def judge_canary_users(found: CanaryRun) -> tuple[AttackResult, AttackResult]:
    """Bound epsilon from the canary users: by their cosines with the final vector, and by guessing who took part."""
    spec = found.spec
    moved = found.vectors[-1].astype(np.float64) - found.vectors[0]
    length = float(np.linalg.norm(moved))
    cosines = found.directions[found.users_in] @ moved / length if length else np.zeros(int(found.users_in.sum()))
    cosine = cosine_bound(cosines, spec.model_dim, spec.delta)
    projections = found.means() @ found.directions.T * (spec.sampling_rate * spec.population / spec.clip)
    scores = _likelihood_ratios(projections, spec)
    guessed = _one_run(scores, found.users_in, found)
    return (
        _judged("canary users, one shot", "the shared updates as the final vector shows them", found, (cosine,), {}),
        _judged(
            "canary users, one run",
            "the shared updates as every round shows them",
            found,
            guessed,
            {"auc": ranking(scores[found.users_in], scores[~found.users_in]).auc[0]},
        ),
    )


def judge_canary_examples(host: Host, found: CanaryRun) -> AttackResult:
    """Bound epsilon by guessing from the losses on made-up records which were trained on."""
    gains = loss_drops(host, found.secrets, found.vectors[0], found.vectors[-1])
    auc = ranking(gains[found.secrets_in], gains[~found.secrets_in]).auc[0]
    return _judged(
        "canary examples, one run",
        "the global adapter",
        found,
        _one_run(gains, found.secrets_in, found),
        {"auc": auc, "mean_loss_drop_of_members": float(gains[found.secrets_in].mean())},
    )


def judge_extraction(host: Host, found: CanaryRun) -> AttackResult:
    """Try to get planted secrets back from the global adapter: their rank among others, and word by word."""
    under = host.shared_adapter(found.vectors[-1])
    planted = [secret for secret, present in zip(found.secrets, found.secrets_in, strict=True) if present]
    gains = loss_drops(host, found.references, found.vectors[0], found.vectors[-1])
    exposures = exposure(loss_drops(host, planted, found.vectors[0], found.vectors[-1]), gains)
    said = int(host.trainer.score(planted, under=under).exact.sum())
    value, low, high = mean_interval(exposures)
    chance = expected_exposure(len(found.references))
    _, most_said = clopper_pearson(said, len(planted))
    return AttackResult(
        name="extraction of planted secrets",
        target="the global adapter",
        measure="mean exposure in bits",
        value=value,
        low=low,
        high=high,
        chance=chance,
        saturation=math.log2(len(found.references) + 1),
        samples=len(planted),
        verdict="holds" if math.isfinite(found.spent) else "not shown",
        why=f"{said} of {len(planted)} secrets came out word for word, at most {most_said:.1%} with 95 % confidence",
        details={"verbatim": said / len(planted)},
    )


def exposure(gains: NDArray[np.float64], references: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exposure of secrets: the bits that the model saves who guesses them; shape `(secrets,)`.

    Source: Carlini et al. (2019), arXiv:1802.08232, section 4.2, with the rank taken among sampled secrets.
    """
    ranks = 1 + (references[np.newaxis] >= gains[:, np.newaxis]).sum(axis=1)
    return math.log2(references.size + 1) - np.log2(ranks)


def expected_exposure(references: int) -> float:
    """Mean exposure of secrets that the model knows nothing of: every rank is as likely."""
    return math.log2(references + 1) - float(np.log2(np.arange(1, references + 2)).mean())


def loss_drops(
    host: Host, secrets: tuple[Secret, ...] | list[Secret], before: Vector, after: Vector
) -> NDArray[np.float64]:
    """How much smaller the loss on each record is under `after` than under `before`, in nats per token."""
    losses = [
        (scores := host.trainer.score(secrets, under=host.shared_adapter(vector))).nats / scores.tokens
        for vector in (before, after)
    ]
    return losses[0] - losses[1]


def _likelihood_ratios(projections: NDArray[np.float64], spec: ReleaseSpec) -> NDArray[np.float64]:
    """Score each canary by the likelihood that it took part in some rounds, shape `(canaries,)`.

    Per round the projection is N(0, z^2), or N(1, z^2) with the probability of the sampling.
    """
    if spec.noise_multiplier == 0:
        return projections.sum(axis=0)
    gains = (projections - 0.5) / spec.noise_multiplier**2
    rate = spec.sampling_rate
    with np.errstate(divide="ignore"):
        return np.logaddexp(np.log1p(-rate), np.log(rate) + gains).sum(axis=0)


def _one_run(scores: NDArray[np.float64], included: NDArray[np.bool_], found: CanaryRun) -> tuple[LowerBound, ...]:
    mu = equivalent_mu(found.spent, found.spec.delta) if math.isfinite(found.spent) else 10.0
    bounds: list[LowerBound] = []
    for bound in (one_run_bound, one_run_gaussian_bound):
        guesses = best_guesses(scores.size, round(mu, 3), found.spec.delta, bound)
        bounds.append(bound(count_correct(scores, included, guesses), guesses, scores.size, found.spec.delta))
    return tuple(bounds)


def _judged(
    name: str, target: str, found: CanaryRun, bounds: tuple[LowerBound, ...], details: Mapping[str, float | str]
) -> AttackResult:
    # A sampled run is not exactly mu-GDP; a contradiction rests on the bound that assumes nothing, where there is one.
    over = bounds[0].epsilon > found.spent
    best = bounds[0] if over else bounds[-1]  # fixed beforehand: the larger of two would be wrong more often than one
    claimed = math.isfinite(found.spent)
    if over:
        why = f"at least epsilon {bounds[0].epsilon:.2f} was lost, {found.spent:.2f} was charged"
    elif claimed and best.saturation < found.spent:
        why = (
            f"this test can show at most {best.saturation:.2f}, less than the {found.spent:.2f} claimed: it cannot fail"
        )
    else:
        why = f"{found.spent:.2f} is claimed for these rounds" if claimed else "nothing is claimed"
    return AttackResult(
        name=name,
        target=target,
        measure="epsilon, at least",
        value=best.epsilon,
        low=best.epsilon,
        high=math.inf,
        chance=0.0,
        saturation=best.saturation,
        samples=best.samples,
        verdict="contradicted" if over else "holds" if claimed and best.saturation > found.spent else "not shown",
        why=why,
        bounds=bounds,
        claimed_epsilon=found.spent,
        details=details,
    )
