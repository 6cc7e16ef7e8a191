"""What each user uses, chosen on that user's own validation records; nothing of it leaves the device.

Every candidate is compared with the reference (the global model) on the same records. The gain per token is a ratio of
sums over records, and its spread is judged from how far single records fall from it. Users have few validation
records, often two to five, and a spread estimated from so few is worthless by itself; it is joined with a prior: a
public guess of the spread of one token's gain that counts as much as `PRIOR_RECORDS` records. The lower bound is
Student's, with the confidence divided over the candidates (Bonferroni), so that more candidates do not mean more lucky
ones. The candidate with the highest lower bound is used if that bound is above zero; else the reference stays.

Source: the ratio estimator and its linearized variance are Cochran (1977), Sampling Techniques, 6.4; the posterior of
a variance under a scaled inverse chi-squared prior is Gelman et al. (2013), Bayesian Data Analysis, 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.personalization.mixing import mix_of

__all__ = ["CONFIDENCE", "WEIGHTS", "Choice", "choose"]

CONFIDENCE = 0.95
PRIOR_RECORDS = 4.0
PRIOR_SPREAD = 0.8
"""Nats per square root of a token: how far a token's gain is guessed to lie from the mean gain."""


WEIGHTS = {
    "both+retrieval": 6.0,
    "private+retrieval": 6.0,
    "both": 2.0,
    "private": 2.0,
    "global+retrieval": 2.0,
}
"""Shares of the doubt, by candidate, as against 1 for any other; fixed before any user is looked at."""
MIXTURE_WEIGHT = 0.5
"""Of each mixture: they are many, and seldom far from what they are mixed from."""


@dataclass(frozen=True)
class Choice:
    """What one user uses, and why.

    Attributes:
        system: The candidate that is used.
        gains: Gain of each candidate over the reference in nats per token, positive is better; shape (candidates,).
        lower_bounds: What each gain is above, all of them at once with the confidence asked for; shape (candidates,).
        records: Validation records that it rests on.
    """

    system: str
    gains: NDArray[np.float64]
    lower_bounds: NDArray[np.float64]
    records: int


def choose(
    names: tuple[str, ...],
    nats: NDArray[np.float64],
    tokens: NDArray[np.int64],
    *,
    reference: str = "global",
    confidence: float = CONFIDENCE,
) -> Choice:
    """Choose for one user.

    Args:
        names: The candidates, the reference among them.
        nats: Summed negative log-likelihood of each validation record under each candidate, shape
            (candidates, records).
        tokens: Labelled tokens of each record, shape (records,).
        reference: What stays when nothing is surely better.
        confidence: Of all lower bounds together.

    Guarantee: where no candidate differs from the reference, or there are no records, the reference stays; a candidate
        that is not finite is never chosen.

    Raises:
        ValueError: Shapes do not fit, or the reference is no candidate.
    """
    from scipy.special import stdtrit

    if nats.shape != (len(names), len(tokens)) or reference not in names:
        raise ValueError("one row of nats per candidate, one column per record, and a reference among them")
    records, total = len(tokens), float(tokens.sum())
    if records == 0 or total <= 0:
        return Choice(reference, np.zeros(len(names)), np.full(len(names), -np.inf), 0)
    differences = nats[names.index(reference)] - nats  # (candidates, records), positive where the candidate is better
    usable = np.isfinite(differences).all(axis=1)
    differences = np.where(usable[:, None], differences, 0.0)
    gains = differences.sum(axis=1) / total
    weights = np.maximum(tokens, 1)
    spread = ((differences - gains[:, None] * tokens) ** 2 / weights).sum(axis=1)
    freedom = PRIOR_RECORDS + records - 1
    guesses = np.array([PRIOR_SPREAD * min(mix_of(name).private, 1.0) for name in names])
    variance = (PRIOR_RECORDS * guesses**2 + spread) / freedom
    weights = np.array([0.0 if name == reference else _weight(name) for name in names])
    shares = weights / max(float(weights.sum()), 1.0)
    quantiles = np.array([float(stdtrit(freedom, 1.0 - (1.0 - confidence) * share)) for share in shares])
    bounds = np.where(usable, gains - quantiles * np.sqrt(variance / total), -np.inf)
    bounds[names.index(reference)] = 0.0
    best = int(np.argmax(bounds))
    return Choice(names[best] if bounds[best] > 0 else reference, gains, bounds, records)


def _weight(name: str) -> float:
    return MIXTURE_WEIGHT if "@" in name else WEIGHTS.get(name, 1.0)
