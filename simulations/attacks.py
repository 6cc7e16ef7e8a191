"""The attacks that fit a simulated run, one after the other: what the claims are worth against somebody who tries.

Each tells a number, its interval, what chance gives and the most that it could have shown, so that "nothing found" is
not mistaken for "safe". The mechanism is attacked as it stands in the installed code; the global adapter and the
private adapters are those of the run, or made as the run makes them.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.accountants import epsilon_of
from common.config import load_config, read_config_file
from common.errors import DataError, VerificationError
from common.ledger_format import verify
from common.methods import method_named
from common.source import source_digest
from common.wire import ReleaseSpec
from server import run_folder
from server.checkpoint import Checkpoint
from simulations.attack_result import AttackResult
from simulations.canaries import judge_canary_examples, judge_canary_users, judge_extraction, run_canaries
from simulations.hosts import Host, host_of
from simulations.inversion import invert_updates
from simulations.mechanism import probe_mechanism, probe_sampling
from simulations.memorization import extract_from_private, infer_global_membership, infer_private_membership
from simulations.recomputation import price_ledger

__all__ = ["ATTACKS", "Effort", "attack_run"]

ATTACKS = "attacks.json"
FORMAT = 1


@dataclass(frozen=True)
class Effort:
    """How much each attack may cost; the defaults take about a minute and a half on two cores.

    Attributes:
        trials: Of the mechanism test.
        cohorts: Of the sampling test.
        rounds: Of the small run with canaries.
        canary_users: Users with a planted direction in it.
        canary_examples: Users with a planted record in it.
        real_users: Users of the audited data in it.
        members: Enrolled users whose membership is inferred, and as many others.
        owners: Users whose private adapters are attacked.
        repeats: How often a planted secret occurs among its owner's records.
        captured: Users whose update is inverted.
    """

    trials: int = 20_000
    cohorts: int = 2_000
    rounds: int = 12
    canary_users: int = 500
    canary_examples: int = 128
    real_users: int = 160
    members: int = 150
    owners: int = 8
    repeats: int = 4
    captured: int = 12


@dataclass(frozen=True)
class _Target:
    host: Host
    spec: ReleaseSpec
    checkpoint: Checkpoint
    claimed: float
    shared: bool
    private: bool


def attack_run(
    folder: Path,
    *,
    effort: Effort | None = None,
    seed: int | None = None,
    say: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> dict[str, Any]:
    """Attack the run in `folder`, write `attacks.json` into it and return what stands there.

    Args:
        folder: The run.
        effort: How much each attack may cost.
        seed: Repeats an attack's coins and canaries; drawn when absent. The code's own noise is never seeded here.
        say: Told one line per attack.

    Raises:
        DataError: There is no run here, or it has no ledger or spec.
        VerificationError: Its ledger does not check out, so there is no claim to attack.
    """
    effort = effort or Effort()
    seed = secrets.randbits(48) if seed is None else seed
    began = time.monotonic()
    target = _open(folder)
    results: list[AttackResult] = []
    for number, attack in enumerate(_fitting(target, effort)):
        for found in attack(np.random.default_rng([seed, number])):
            results.append(found)
            say(found.line())
    report: dict[str, Any] = {
        "format": FORMAT,
        "run": target.spec.run,
        "claimed_epsilon": target.claimed if math.isfinite(target.claimed) else "inf",
        "delta": target.spec.delta,
        "rehearsal": target.host.config.rehearsal,
        "code": source_digest(),
        "code_is_that_of_the_run": source_digest() == target.spec.source,
        "seed": seed,
        "seconds": round(time.monotonic() - began, 1),
        "verdict": "contradicted" if any(one.verdict == "contradicted" for one in results) else "holds",
        "results": [one.to_json() for one in results],
    }
    temporary = folder / f".{ATTACKS}.writing"
    temporary.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / ATTACKS)
    return report


def _open(folder: Path) -> _Target:
    if not (folder / run_folder.CONFIG).is_file():
        raise DataError(f"{folder}: no run in this folder; attacks need the whole run, not only its ledger")
    config = load_config(read_config_file(folder / run_folder.CONFIG))
    try:
        spec = ReleaseSpec.from_text((folder / run_folder.SPEC).read_text(encoding="utf-8"))
        verified = verify((folder / run_folder.LEDGER).read_bytes())
    except OSError:
        raise DataError(f"{folder}: the run lacks its ledger or its release spec") from None
    price = price_ledger(verified, str(folder))
    host = host_of(config)
    if host.base.digest != spec.model:
        raise VerificationError("the base model here is not the one that the run names")
    claimed = epsilon_of(price.spent, price.delta, "pld", price.adjacency) if price.spent else 0.0
    method = method_named(config.method)
    shared = bool(method.shared) and bool(price.spent)
    checkpoint = Checkpoint.load(folder / run_folder.CHECKPOINT)
    return _Target(host, spec, checkpoint, claimed, shared, method.private)


def _fitting(target: _Target, effort: Effort) -> list[Callable[[np.random.Generator], tuple[AttackResult, ...]]]:
    """The attacks that there is something for."""
    host, spec, vector = target.host, target.spec, target.checkpoint.vector

    def with_canaries(generator: np.random.Generator) -> tuple[AttackResult, ...]:
        found = run_canaries(
            host,
            rounds=effort.rounds,
            canary_users=effort.canary_users,
            canary_examples=effort.canary_examples,
            real_users=effort.real_users,
            generator=generator,
        )
        return (*judge_canary_users(found), judge_canary_examples(host, found), judge_extraction(host, found))

    # Where devices add the noise, each update is seen for itself: the mechanism test covers it, canaries add nothing.
    # What is planted is planted in factors: no canary is built for products, and no factor of them is captured.
    factors = host.split.method.sends != "products"
    captured = factors and any(".lora_A." in tensor.name for tensor in host.split.sent.tensors)
    central = spec.unit == "user" and spec.noise == "central" and factors
    on_shared: list[Callable[[np.random.Generator], tuple[AttackResult, ...]]] = [
        lambda generator: (
            *(
                [probe_mechanism(host.config, spec, host.base, trials=effort.trials, generator=generator)]
                if factors
                else []
            ),
            probe_sampling(host.config, spec, rounds=effort.cohorts),
        ),
        *([with_canaries] if central else []),
        lambda generator: (
            infer_global_membership(host, vector, effort.members, spec.delta, target.claimed, generator),
        ),
        *([lambda generator: (invert_updates(host, spec, vector, effort.captured, generator),)] if captured else []),
    ]
    on_private: list[Callable[[np.random.Generator], tuple[AttackResult, ...]]] = [
        lambda generator: (infer_private_membership(host, effort.owners, generator),),
        lambda generator: (extract_from_private(host, effort.owners, effort.repeats, generator),),
    ]
    return (on_shared if target.shared else []) + (on_private if target.private else [])
