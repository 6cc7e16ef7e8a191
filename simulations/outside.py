"""Methods and metrics from outside: `--method my.module:METHOD`, `--metric my.module:score`.

They run in a simulation only: a device imports nothing that a server names. Where anything is promised, a row passes
the sensitivity trials first, and a metric the same in small: bounded, and of one user alone. What does not pass runs
at `--epsilon inf` and nowhere else.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from common.config import RunConfig
from common.errors import ClaimRefused, ConfigError, Refusal
from common.methods import METHODS, Method, method_named

if TYPE_CHECKING:
    from client.trainer import Trainer

__all__ = ["Score", "check_outside", "method_of", "metric_of"]

Score = Callable[[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]], float]
"""A metric: a user's summed negative log-likelihoods, tokens and first-choice hits, each shape `(records,)`, to a
number between its attributes `low` and `high`, 0 and 1 when it has none."""

TRIALS = 12


def method_of(config: RunConfig) -> Method:
    """The row that a configuration names; one from outside is entered into the table of this process.

    Raises:
        ConfigError: There is no such row, or what is there is none.
    """
    if ":" not in config.method:
        return method_named(config.method)
    if config.method not in METHODS:
        row = _found(config.method, "method")
        if not isinstance(row, Method):
            raise ConfigError(f"method: {config.method} is {type(row).__name__}, not a row of the method table")
        METHODS[config.method] = replace(row, name=config.method)
    return METHODS[config.method]


def metric_of(config: RunConfig) -> Score | None:
    """The metric that a configuration names, or None.

    Raises:
        ConfigError: There is no such function.
    """
    if config.metric is None:
        return None
    score = _found(config.metric, "metric")
    if not callable(score):
        raise ConfigError(f"metric: {config.metric} is {type(score).__name__}, not a function")
    return cast(Score, score)


def check_outside(config: RunConfig, trainer: Trainer) -> list[str]:
    """Try what comes from outside before anything is promised of it; returns what was found, in words.

    Raises:
        ConfigError: A metric gives no number, or a row fails where it is tried.
        ClaimRefused: One unit moves what is released by more than the stated sensitivity, or what leaves cannot be
            told.
    """
    from simulations.sensitivity import TOLERANCE, check_rows

    found: list[str] = []
    score = metric_of(config)
    if score is not None:  # a metric that gives no number would end a run after all of its rounds
        _told(str(config.metric), score, *_made_up(1)[0])
    if not config.private:
        return found
    if ":" in config.method and method_of(config).shared:
        try:
            moved = check_rows(config.method, trainer, unit=config.unit, trials=TRIALS)
        except Refusal as refusal:
            raise ClaimRefused(f"method {config.method}: {refusal}; --epsilon inf runs it without a promise") from None
        except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"method: {config.method} fails on made-up people ({type(error).__name__}); its transform takes an "
                "update of shape (1, numbers sent) and returns one of the same shape"
            ) from None
        if not moved <= 1 + TOLERANCE:
            raise ClaimRefused(
                f"method {config.method}: one {config.unit} moved what is released by {moved:.3g} times the stated "
                "sensitivity, so its epsilon would be false; --epsilon inf runs it without a promise"
            )
        found.append(f"{config.method}: one {config.unit} moves what is released by {moved:.3f} clips at most, tried")
    if score is not None:
        found.append(_check_metric(str(config.metric), score))
    return found


def _made_up(count: int) -> list[tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]]:
    """Users of one to five records each: nats, tokens and first-choice hits."""
    generator = np.random.default_rng(0)
    users: list[Any] = []
    for _ in range(count):
        tokens = generator.integers(1, 40, size=int(generator.integers(1, 6)))
        users.append((generator.exponential(3.0, tokens.size) * tokens, tokens, generator.binomial(tokens, 0.4)))
    return users


def _told(name: str, score: Score, *user: NDArray[Any]) -> float:
    """One user's score.

    Raises:
        ConfigError: The metric fails on a made-up user, or gives no number; what it said is not repeated.
    """
    try:
        return float(score(*(part.copy() for part in user)))
    except Exception as error:
        raise ConfigError(
            f"metric: {name} gives no number for a user's nats, tokens and hits ({type(error).__name__})"
        ) from None


def _check_metric(name: str, score: Score) -> str:
    """Score made-up users alone, again, and in another order: bounded, and of nobody else."""
    low, high = float(getattr(score, "low", 0.0)), float(getattr(score, "high", 1.0))
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ClaimRefused(f"metric {name}: its bounds are no interval; --epsilon inf scores it without a promise")
    users = _made_up(TRIALS)
    first = [_told(name, score, *user) for user in users]
    again = [_told(name, score, *users[index]) for index in np.random.default_rng(1).permutation(TRIALS)]
    if not all(math.isfinite(one) and low <= one <= high for one in first):
        raise ClaimRefused(
            f"metric {name}: a user's score is not between {low:g} and {high:g}, so one user may move the mean by "
            "more than is stated; --epsilon inf scores it without a promise"
        )
    if sorted(first) != sorted(again):
        raise ClaimRefused(
            f"metric {name}: a user's score depends on who was scored before; --epsilon inf scores it without a promise"
        )
    return f"{name}: a user's score is the user's own and moves a sum by at most {high - low:g}, tried"


def _found(place: str, key: str) -> Any:
    """Import `module:name` with the folder that the command was called in on the path.

    Raises:
        ConfigError: There is no such module or name, or the module fails.
    """
    module, _, name = place.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # it is somebody's program, and may do anything
        raise ConfigError(f"{key}: {place} cannot be imported ({type(error).__name__})") from None
