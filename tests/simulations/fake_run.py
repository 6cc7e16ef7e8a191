"""Writes a run folder with everything that a run leaves, without running anything: numbers are drawn, not trained."""

import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from common.config import RunConfig

STATEMENT = {
    "epsilon": 7.9931,
    "delta": 1e-5,
    "unit": "user",
    "adjacency": "zero-out",
    "mechanism": "Gaussian noise of multiplier 0.62 on the sum of updates of L2 norm at most 1, 27 releases",
    "sampling": "Poisson, rate 0.05; who takes part is secret",
    "trust": "the coordinator sees each clipped update without noise: against the coordinator epsilon is infinite",
    "accountant": "pld (dp-accounting 0.6.0)",
    "population": 4000,
    "covered": ["the shared updates", "the shared adapter after every round"],
    "not_covered": [
        "the private adapter, which never leaves but shapes what its owner's assistant says to others",
        "when a device is online and how long it computes",
        "anything outside this run that uses the same data",
    ],
    "assumptions": [
        "noise is drawn as floating-point numbers, not real ones (Mironov 2012)",
        "the parameters of the schedule were fixed before anything was released",
    ],
    "second_opinion": ["prv (prv-accountant 0.2.0)", 8.0102],
    "group": None,
    "equivalent_mu": 1.61,
    "attack_rate": 0.2364,
    "rehearsal": False,
    "extrapolated_population": None,
}

GAINS = {"global": (0.16, 0.07), "private": (0.21, 0.16), "both": (0.30, 0.14)}


def write_fake_run(
    folder, *, users=300, systems=("base", "global", "private", "both"), statement=STATEMENT, seed=0, **config
):
    """Write a run; leave a part out by passing None for `statement`, or no `systems`."""
    folder.mkdir(parents=True)
    settings = RunConfig(**({"users": 4000} | config))
    (folder / "config.toml").write_text(settings.to_toml(), encoding="utf-8")
    rounds = (
        [] if settings.method == "local" else [_round(settings, number) for number in range(1, settings.rounds + 1)]
    )
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds), encoding="utf-8")
    data = {
        "users": settings.users,
        "sampled_users": 500,
        "records_in_sample": 36_120,
        "records_per_user": 72.2,
        "token_percentiles": {"10": 12.0, "50": 24.0, "90": 41.0, "99": 58.0},
        "unscored_in_sample": 3,
        "max_tokens": settings.max_tokens,
    }
    (folder / "data.json").write_text(json.dumps(data), encoding="utf-8")
    (folder / "ledger.jsonl").write_text("".join(f'{{"index":{index}}}\n' for index in range(29)), encoding="utf-8")
    if statement is not None:
        (folder / "statement.json").write_text(json.dumps(statement), encoding="utf-8")
    if systems:
        pq.write_table(_users(systems, users, np.random.default_rng(seed)), folder / "users.parquet")
    return folder


def _round(settings, number):
    line = {
        "round": number,
        "epsilon_spent": 7.9931 * (0.28 + 0.72 * (number / settings.rounds) ** 0.62) if settings.private else "inf",
        "noise_over_clip": 0.198 if settings.private else 0.0,
        "seconds": 3.1 + 0.2 * (number % 3),
        "bytes_down_per_user": 16_384,
        "bytes_up_per_user": 16_384,
        "rejected": {"not finite": 1} if number == 2 else {},
    }
    if number in (1, settings.rounds) or number % settings.evaluate_every == 0:
        line["evaluation"] = {"base": 2.352, "global": 2.352 - 0.17 * (1 - math.exp(-number / 8))}
    return line


def _users(systems, users, generator):
    records = np.clip(generator.lognormal(4.0, 0.9, users), 10, 500).astype(int)
    base = generator.normal(2.35, 0.28, users)
    more = (np.log(records) - 4.0) * 0.06
    rows = {
        name: []
        for name in (
            "user",
            "system",
            "split",
            "nats_per_token",
            "accuracy",
            "exact",
            "tokens",
            "records",
            "train_records",
        )
    }
    for system in systems:
        mean, spread = GAINS.get(system, (0.0, 0.0))
        gain = generator.normal(mean, spread or 1e-9, users) + (more if system in ("private", "both") else 0.0)
        nats = base - (gain if system != "base" else 0.0)
        for split, shift in (("validation", 0.01), ("test", 0.0)):
            rows["user"] += [f"user-{index:04}" for index in range(users)]
            rows["system"] += [system] * users
            rows["split"] += [split] * users
            rows["nats_per_token"] += (nats + shift).tolist()
            rows["accuracy"] += np.clip(0.86 - 0.17 * nats, 0, 1).tolist()
            rows["exact"] += np.clip(0.6 - 0.2 * nats, 0, 1).tolist()
            rows["tokens"] += [400 if index else 0 for index in range(users)]
            rows["records"] += [12] * users
            rows["train_records"] += records.tolist()
    return pa.table(rows)
