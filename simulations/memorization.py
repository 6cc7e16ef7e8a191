"""What models remember: who was in the training data, and what they wrote, from the models alone.

The global adapter is attacked by its losses, user by user. Private adapters are attacked as well, although they never
leave: they are expected to leak, and the numbers show why the boundary around them matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from client.trainer import Example
from common.adapters import Vector
from common.config import BUILT_IN
from simulations.attack_result import AttackResult, Outcome, Ranking, bound_from_scores, mean_interval, ranking
from simulations.canaries import REFERENCES, Secret, expected_exposure, exposure, random_secret
from simulations.hosts import Host
from simulations.lower_bounds import LowerBound, clopper_pearson
from simulations.population import open_population

__all__ = ["extract_from_private", "infer_global_membership", "infer_private_membership"]

RECORDS = 8
"""Records per user that are scored at most."""

SHADOW_PAIRS = 2
"""Pairs of shadow adapters per user, each trained on half of the records, the other on the other half."""

PRIVATE = "private adapters, which never leave"


def infer_global_membership(
    host: Host, vector: Vector, users: int, delta: float, claimed: float, generator: np.random.Generator
) -> AttackResult:
    """Tell enrolled users from others by how much better the global adapter does on their records than the base.

    The built-in world has more people of the same kind, who were never enrolled: the attack is on users. For users of
    a file there are none; then records that were trained on are told from held-out ones, which are later in time, so
    that part of any difference is age.

    Source: Yeom et al. (2018), arXiv:1709.01604; the difference to a reference model as Watson et al. (2022),
    arXiv:2111.08440.
    """
    count = len(host.population)
    members = [str(name) for name in generator.permutation(count)[:users]]
    if host.config.data == BUILT_IN:
        wider = open_population(host.config.model_copy(update={"users": count + users}), host.population.encoder)
        inside = [host.population.encoded(name).train[:RECORDS] for name in members]
        outside = [wider.encoded(str(count + index)).train[:RECORDS] for index in range(users)]
        what = "users who were never enrolled"
    else:
        inside = [host.population.encoded(name).train[-RECORDS:] for name in members]
        outside = [host.population.encoded(name).test[:RECORDS] for name in members]
        what = "the same users' held-out records, which are newer"
    one, other = _user_gains(host, inside, vector), _user_gains(host, outside, vector)
    found = ranking(one, other)
    bound = bound_from_scores(one, other, delta)
    over = bound.epsilon > claimed and host.config.data == BUILT_IN
    why = f"at least epsilon {bound.epsilon:.2f} was lost, {claimed:.2f} claimed" if over else f"told from {what}"
    return _told_apart(
        "membership inference by loss",
        "the global adapter",
        found,
        one.size + other.size,
        "contradicted" if over else "holds" if math.isfinite(claimed) else "not shown",
        why,
        (bound,),
        claimed,
    )


def infer_private_membership(host: Host, users: int, generator: np.random.Generator) -> AttackResult:
    """Tell which of a person's records a private adapter was trained on, by the likelihood ratio of shadow adapters.

    Half of each user's records train the attacked adapter. Shadow adapters, trained on other halves, say how each
    record scores when it was in and when it was not.

    Source: Carlini et al. (2022), arXiv:2112.03570 (LiRA), offline variances pooled over records since shadows are few.
    """
    pools = _pools(host, users, generator)
    halves: list[NDArray[np.bool_]] = []
    sets: list[Sequence[Example]] = []
    for pool in pools:
        own = [_half(len(pool), generator)]
        for _ in range(SHADOW_PAIRS):
            half = _half(len(pool), generator)
            own += [half, ~half]
        halves.append(np.stack(own))
        sets += [[record for record, taken in zip(pool, half, strict=True) if taken] for half in own]
    trained = host.personal.fit(
        host.personal_start, sets, host.recipe, [np.random.default_rng(generator.integers(2**63)) for _ in sets]
    )
    kinds = 1 + 2 * SHADOW_PAIRS
    members: list[float] = []
    others: list[float] = []
    for index, (pool, taken) in enumerate(zip(pools, halves, strict=True)):
        losses = np.stack([_losses(host, pool, trained[index * kinds + kind]) for kind in range(kinds)])
        scores = -losses
        target, shadows, within = scores[0], scores[1:], taken[1:]
        inside = np.where(within, shadows, 0.0).sum(axis=0) / within.sum(axis=0)
        outside = np.where(within, 0.0, shadows).sum(axis=0) / (~within).sum(axis=0)
        spread = np.where(within, shadows - inside, shadows - outside).var() + 1e-12
        ratio = ((target - outside) ** 2 - (target - inside) ** 2) / (2.0 * spread)
        members += ratio[taken[0]].tolist()
        others += ratio[~taken[0]].tolist()
    found = ranking(members, others)
    return _told_apart(
        "membership inference by likelihood ratio",
        PRIVATE,
        found,
        len(members) + len(others),
        "leaks, as expected" if found.auc[1] > 0.5 else "not shown",
        f"{len(pools)} users, {2 * SHADOW_PAIRS} shadow adapters each; nothing is claimed about these",
    )


def extract_from_private(host: Host, users: int, repeats: int, generator: np.random.Generator) -> AttackResult:
    """Plant one secret in each user's records, `repeats` times, and read it from the private adapter.

    The same secrets are sought in the adapter of the next user, where they must not be.
    """
    pools = _pools(host, users, generator)
    secrets = [random_secret(host, generator) for _ in pools]
    references = [random_secret(host, generator) for _ in range(REFERENCES)]
    sets: list[Sequence[Example]] = [[*pool, *[secret] * repeats] for pool, secret in zip(pools, secrets, strict=True)]
    orders = [np.random.default_rng(generator.integers(2**63)) for _ in sets]
    trained = host.personal.fit(host.personal_start, sets, host.recipe, orders)
    own: list[float] = []
    peer: list[float] = []
    said = 0
    base = host.personal.score([*references, *secrets])
    before = base.nats / base.tokens
    for index, secret in enumerate(secrets):
        wanted: list[Secret] = [*references, secret, secrets[index - 1]]
        with_it = _losses(host, wanted, trained[index])
        gains = np.concatenate([before[:REFERENCES], before[[REFERENCES + index, REFERENCES + index - 1]]]) - with_it
        found = exposure(gains[REFERENCES:], gains[:REFERENCES])
        own.append(float(found[0]))
        peer.append(float(found[1]))
        scores = host.personal.score([secret], adapters=trained[index : index + 1], owner=np.zeros(1, np.intp))
        said += int(scores.exact[0])
    value, low, high = mean_interval(own)
    elsewhere = mean_interval(peer)
    _, most = clopper_pearson(said, len(secrets))
    chance = expected_exposure(REFERENCES)
    return AttackResult(
        name="extraction of planted secrets",
        target=PRIVATE,
        measure="mean exposure in bits",
        value=value,
        low=low,
        high=high,
        chance=chance,
        saturation=math.log2(REFERENCES + 1),
        samples=len(secrets),
        verdict="leaks, as expected" if low > chance else "not shown",
        why=(
            f"a record that occurs {repeats} times: {said} of {len(secrets)} came out word for word (at most "
            f"{most:.0%}); in another user's adapter the exposure is {elsewhere[0]:.2f}"
        ),
        details={"verbatim": said / len(secrets), "exposure_elsewhere": elsewhere[0], "repeats": repeats},
    )


def _told_apart(
    name: str,
    target: str,
    found: Ranking,
    samples: int,
    verdict: Outcome,
    why: str,
    bounds: tuple[LowerBound, ...] = (),
    claimed: float | None = None,
) -> AttackResult:
    value, low, high = found.auc
    caught, least, most = found.caught
    return AttackResult(
        name=name,
        target=target,
        measure="AUC",
        value=value,
        low=low,
        high=high,
        chance=0.5,
        saturation=1.0,
        samples=samples,
        verdict=verdict,
        why=why,
        bounds=bounds,
        claimed_epsilon=claimed,
        details={
            "true_positive_rate_at_1_percent": caught,
            "true_positive_rate_low": least,
            "true_positive_rate_high": most,
            "largest_low_these_samples_could_show": found.most_caught,
        },
    )


def _user_gains(host: Host, users: Sequence[Sequence[Example]], vector: Vector) -> NDArray[np.float64]:
    """Mean loss that the global adapter takes off each user's records, in nats per token; users without are dropped."""
    users = [own for own in users if own]
    flat = [record for own in users for record in own]
    owner = np.repeat(np.arange(len(users)), [len(own) for own in users])
    base = host.trainer.score(flat)
    tuned = host.trainer.score(flat, under=host.shared_adapter(vector))
    tokens = np.bincount(owner, base.tokens)
    return np.bincount(owner, base.nats - tuned.nats) / np.maximum(tokens, 1)


def _losses(host: Host, records: Sequence[Example], adapter: Vector) -> NDArray[np.float64]:
    scores = host.personal.score(records, adapters=adapter[np.newaxis], owner=np.zeros(len(records), np.intp))
    return scores.nats / np.maximum(scores.tokens, 1)


def _pools(host: Host, users: int, generator: np.random.Generator) -> list[list[Example]]:
    """Records of `users` users who have at least four, an even number of up to sixteen each."""
    pools: list[list[Example]] = []
    for name in generator.permutation(len(host.population)):
        own = host.population.encoded(str(name))
        records: list[Example] = [*own.train, *own.validation, *own.test]
        if len(records) >= 4:
            pools.append(records[: min(len(records), 2 * RECORDS) // 2 * 2])
        if len(pools) == users:
            break
    return pools


def _half(count: int, generator: np.random.Generator) -> NDArray[np.bool_]:
    chosen = np.zeros(count, dtype=bool)
    chosen[generator.permutation(count)[: count // 2]] = True
    return chosen
