"""Records that arrive over time: what refitting brings, what it forgets, and how often it is taken back.

Each user's records are cut by time into periods. What a period brings is asked before it is learned, under what every
policy had by then, so that all scores are of the future; and the last records of the first period, which nobody ever
trains on, are asked again in the end, to see what was forgotten. Half-way the shared adapter moves: until then users
have the base alone, as a device does before it joins, and from then on the adapter of the run.

=============  ====================================================================================================
`once`         fitted in the first period, and again only because the shared adapter moved
`newest`       each period's adapter goes on training on the new records alone
`rehearsal`    likewise, with a sample of old records beside the new
`everything`   fitted afresh on all records in every period
`guarded`      what a device does: `rehearsal` where a refit is due, taken back where validation records are worse
=============  ====================================================================================================
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.table import Table

from client.personalization.lifelong import DRIFT_LEVEL, Belonging, drift_p_value, keep_refit, refit_reason, rehearsal
from client.trainer import Scores
from client.user_data import Encoded
from common import evaluation
from common.adapters import Layout, Vector
from common.config import load_config, read_config_file
from common.errors import ConfigError, DataError
from common.evaluation import NATS, Interval
from server import run_folder
from server.checkpoint import Checkpoint
from simulations import hosts

__all__ = ["FILE", "POLICIES", "Lifelong", "lifelong_of", "write_lifelong"]

FILE = "lifelong.json"
POLICIES = ("once", "newest", "rehearsal", "everything", "guarded")
VALIDATION = 0.25
"""Share of a period's records that a device sets aside, the last ones, at least one."""
PER_PERIOD = 6
"""Fewest records of a user in a period."""

Under = tuple[Vector, Layout, float] | None
People = list[list[Encoded]]


@dataclass(frozen=True)
class Lifelong:
    """What came of each policy.

    Attributes:
        periods: How many periods were learned from.
        users: How many users.
        moved_at: The period in which the shared adapter came.
        drifted_at: The period from which on everybody's records were another person's; None where nobody changed.
        future: For each policy the mean gain over what stands below the adapter, one per period asked.
        remembered: For each policy the gain on the first period's records in the end.
        refits: For each policy, refits per user.
        taken_back: Share of the guarded refits that were taken back.
        alarms: Share of users whose drift test spoke, by period asked.
    """

    periods: int
    users: int
    moved_at: int
    drifted_at: int | None
    future: dict[str, tuple[Interval, ...]]
    remembered: dict[str, Interval]
    refits: dict[str, float]
    taken_back: float
    alarms: tuple[float, ...]

    def sentence(self) -> str:
        """Say what was done to whom."""
        drift = "nobody changed" if self.drifted_at is None else f"everybody changed in period {self.drifted_at}"
        alarms = ", ".join(f"{share:.0%}" for share in self.alarms)
        return (
            f"{self.users} users over {self.periods} periods; the shared adapter came in period {self.moved_at}; "
            f"{drift}; the drift test spoke for {alarms} of users; {self.taken_back:.0%} of refits were taken back"
        )

    def table(self) -> Table:
        """Lay the policies out for a terminal."""
        table = Table(title=f"Over time: {self.sentence()}", title_justify="left", box=SIMPLE_HEAD)
        table.add_column("policy", no_wrap=True)
        for period in range(1, self.periods):
            table.add_column(f"gain in\nperiod {period + 1}", justify="right")
        table.add_column("on the first\nperiod, at the end", justify="right")
        table.add_column("refits", justify="right")
        for policy, gains in self.future.items():
            cells = [f"{gain.estimate:+.3f}" for gain in gains]
            table.add_row(policy, *cells, f"{self.remembered[policy].estimate:+.3f}", f"{self.refits[policy]:.1f}")
        return table

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `from_json` reads them."""
        return {
            "version": 1,
            "sentence": self.sentence(),
            "unit": NATS.unit,
            "periods": self.periods,
            "users": self.users,
            "moved_at": self.moved_at,
            "drifted_at": self.drifted_at,
            "future": {policy: [gain.to_json() for gain in gains] for policy, gains in self.future.items()},
            "remembered": {policy: gain.to_json() for policy, gain in self.remembered.items()},
            "refits": self.refits,
            "taken_back": self.taken_back,
            "alarms": list(self.alarms),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Lifelong:
        """Read what `to_json` wrote."""
        return cls(
            value["periods"],
            value["users"],
            value["moved_at"],
            value["drifted_at"],
            {policy: tuple(map(Interval.from_json, gains)) for policy, gains in value["future"].items()},
            {policy: Interval.from_json(gain) for policy, gain in value["remembered"].items()},
            value["refits"],
            value["taken_back"],
            tuple(value["alarms"]),
        )


@dataclass
class _Kept:
    """One policy's adapters so far, and what each user's belongs to."""

    adapters: NDArray[np.float32]
    unders: list[Under]
    belonging: list[Belonging | None]
    refits: int = 0


class _Study:
    """Users' records period by period, and the trainer that fits over the base or over the shared adapter."""

    def __init__(self, host: hosts.Host, people: list[list[People]], shared: Under) -> None:
        self.host = host
        self.people = people  # [period][0 train, 1 validation][user]
        self.shared = shared

    def learned(self, user: int, period: int) -> list[Encoded]:
        """A user's training records up to a period, the oldest first."""
        return [one for before in range(period + 1) for one in self.people[before][0][user]]

    def fit(self, users: Sequence[int], starts: NDArray[np.float32], rows: People, under: Under, salt: int) -> Any:
        """Train some users' adapters over one shared adapter."""
        orders = [np.random.default_rng([self.host.config.seed, salt, user]) for user in users]
        return self.host.personal.fit(starts, rows, self.host.recipe, orders, under=under)

    def scores(self, kept: _Kept | None, rows: People, under: Under) -> list[Scores]:
        """Scores of each user's rows under the user's own pair, or under `under` alone."""
        found: list[Scores | None] = [None] * len(rows)
        unders = [under] * len(rows) if kept is None else kept.unders
        for below in (None, self.shared):
            users = [user for user, own in enumerate(unders) if own is below]
            flat = [one for user in users for one in rows[user]]
            if not flat:
                continue
            owner = np.repeat(users, [len(rows[user]) for user in users]).astype(np.intp)
            adapters = None if kept is None else kept.adapters
            whose = None if kept is None else owner
            scores = self.host.personal.score(flat, adapters=adapters, owner=whose, under=below)
            for user in users:
                own = owner == user
                found[user] = Scores(scores.nats[own], scores.tokens[own], scores.correct[own])
        nothing = Scores(np.zeros(0), np.zeros(0, np.int64), np.zeros(0, np.int64))
        return [nothing if one is None else one for one in found]


def lifelong_of(
    run: Path,
    periods: int,
    users: int,
    *,
    drift: bool = False,
    say: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> Lifelong:
    """Let the records of some users of a finished run arrive over time.

    Args:
        run: Its folder.
        periods: In how many periods, at least 3.
        users: How many users at most.
        drift: Let everybody become another person half-way, who writes otherwise.
        say: Told a line per period.

    Raises:
        ConfigError: Too few periods, or the run's method shares nothing that could move.
        DataError: Nobody has enough records.
    """
    if periods < 3:
        raise ConfigError("periods: at least 3 are needed, so that something is there before the shared adapter moves")
    config = load_config(read_config_file(run / run_folder.CONFIG))
    host = hosts.host_of(config)
    if not host.split.method.shared:
        raise ConfigError(f"method {config.method} shares nothing, so no shared adapter moves")
    moved = (periods + 1) // 2
    vector = Checkpoint.load(run / run_folder.CHECKPOINT).vector
    study = _Study(host, _periods(host, periods, users, moved if drift else None), host.shared_adapter(vector))
    count = len(study.people[0][0])
    policies = {name: _first(study, count) for name in POLICIES}
    future: dict[str, list[Interval]] = {name: [] for name in POLICIES}
    alarms: list[float] = []
    taken_back = tried = 0
    for period in range(1, periods):
        say(f"period {period + 1} of {periods}")
        under = study.shared if period >= moved else None
        asked = [[*train, *valid] for train, valid in zip(*study.people[period], strict=True)]
        below = study.scores(None, asked, under)
        for name, kept in policies.items():
            future[name].append(_gain(study.scores(kept, asked, under), below))
        drifts = _drifts(study, policies["guarded"], period, under)
        alarms.append(float(np.mean([p <= DRIFT_LEVEL for p in drifts])))
        for name in ("once", "newest", "rehearsal", "everything"):
            _refit(study, policies[name], name, period, under)
        back, due = _guarded(study, policies["guarded"], period, under, drifts)
        taken_back, tried = taken_back + back, tried + due
    first = study.people[0][1]
    below = study.scores(None, first, study.shared)
    remembered = {name: _gain(study.scores(kept, first, study.shared), below) for name, kept in policies.items()}
    return Lifelong(
        periods,
        count,
        moved + 1,
        moved + 1 if drift else None,
        {name: tuple(gains) for name, gains in future.items()},
        remembered,
        {name: kept.refits / count for name, kept in policies.items()},
        taken_back / max(tried, 1),
        tuple(alarms),
    )


def _periods(host: hosts.Host, periods: int, users: int, changed: int | None) -> list[list[People]]:
    """Cut users' records by time; from period `changed` on they are another person's."""
    found: list[list[Encoded]] = []
    need = PER_PERIOD * periods
    names = [str(number) for number in range(len(host.population))]
    for name in names:
        records = [record for record in host.population.user(name).records if not record.empty]
        if len(records) < need or len(found) >= 2 * users:
            continue
        if all(record.time is not None for record in records):
            records = sorted(records, key=lambda record: record.time or 0.0)
        own = [one for one in host.population.encoder.encode_batch(records[: 4 * need]) if one is not None]
        if len(own) >= need:
            found.append(own)
    if changed is not None:
        found = [
            [*one[: len(one) * changed // periods], *other[len(other) * changed // periods :]]
            for one, other in zip(found[::2], found[1::2], strict=False)
        ]
    found = found[:users]
    if not found:
        raise DataError(f"{host.config.data}: nobody has the {need} records that {periods} periods need")
    cut: list[list[People]] = []
    for period in range(periods):
        train: People = []
        valid: People = []
        for own in found:
            here = own[len(own) * period // periods : len(own) * (period + 1) // periods]
            aside = max(1, int(VALIDATION * len(here)))
            train.append(here[:-aside])
            valid.append(here[-aside:])
        cut.append([train, valid])
    return cut


def _first(study: _Study, count: int) -> _Kept:
    rows = [study.learned(user, 0) for user in range(count)]
    starts = np.repeat(study.host.personal_start[np.newaxis], count, axis=0)
    adapters = study.fit(range(count), starts, rows, None, 0)
    belonging = [Belonging.over(study.host.base.digest, None, records=len(own)) for own in rows]
    return _Kept(adapters, [None] * count, list(belonging))


def _refit(
    study: _Study, kept: _Kept, policy: str, period: int, under: Under, whose: Sequence[int] | None = None
) -> None:
    """Fit again over `under`: going on from the adapter that is there, or afresh where that lay over another one."""
    users = list(range(len(kept.unders)) if whose is None else whose)
    if policy == "once":
        users = [user for user in users if kept.unders[user] is not under]
    if not users:
        return
    rows: People = []
    starts: list[NDArray[np.float32]] = []
    for user in users:
        known, new = study.learned(user, period), study.people[period][0][user]
        goes_on = kept.unders[user] is under and policy in ("newest", "rehearsal")
        starts.append(kept.adapters[user] if goes_on else study.host.personal_start)
        if policy == "newest":
            rows.append(new)
        elif goes_on:
            picked = rehearsal([f"{user}/{place}" for place in range(len(known))], len(new))
            rows.append([known[place] for place in picked])
        else:
            rows.append(known)
    kept.adapters[users] = study.fit(users, np.stack(starts), rows, under, period)
    for user in users:
        kept.unders[user] = under
        kept.belonging[user] = _belongs(study, under, len(study.learned(user, period)), period)
    kept.refits += len(users)


def _guarded(study: _Study, kept: _Kept, period: int, under: Under, drifts: Sequence[float]) -> tuple[int, int]:
    """Refit who is due, and take back what is worse on the period's validation records; returns how many of each."""
    shared = None if under is None else under[0]
    base = study.host.base.digest
    due = [
        user
        for user, drift in enumerate(drifts)
        if refit_reason(
            kept.belonging[user], base=base, shared=shared, records=len(study.learned(user, period)), drift=drift
        )
    ]
    if not due:
        return 0, 0
    before = _Kept(kept.adapters.copy(), list(kept.unders), list(kept.belonging))
    _refit(study, kept, "rehearsal", period, under, due)
    valid = study.people[period][1]
    old, new = study.scores(before, valid, under), study.scores(kept, valid, under)
    back = [user for user in due if not keep_refit(old[user].nats, new[user].nats, old[user].tokens)]
    for user in back:
        kept.adapters[user], kept.unders[user] = before.adapters[user], before.unders[user]
        kept.belonging[user] = before.belonging[user]
    return len(back), len(due)


def _belongs(study: _Study, under: Under, records: int, period: int) -> Belonging:
    shared = None if under is None else under[0]
    return Belonging.over(study.host.base.digest, shared, round=period, records=records)


def _drifts(study: _Study, kept: _Kept, period: int, under: Under) -> list[float]:
    """P-values of the drift test: gains on the period's records against those on earlier validation records."""
    found: list[float] = []
    older = [
        [one for before in range(period) for one in study.people[before][1][user]] for user in range(len(kept.unders))
    ]
    newer = [[*train, *valid] for train, valid in zip(*study.people[period], strict=True)]
    gains: list[list[NDArray[np.float64]]] = []
    for rows in (older, newer):
        below, own = study.scores(None, rows, under), study.scores(kept, rows, under)
        gains.append(
            [(one.nats - other.nats) / np.maximum(one.tokens, 1) for one, other in zip(below, own, strict=True)]
        )
    for before, after in zip(*gains, strict=True):
        found.append(drift_p_value(before, after))
    return found


def _gain(scores: list[Scores], below: list[Scores]) -> Interval:
    own, reference = (np.array([one.nats.sum() / max(one.tokens.sum(), 1) for one in of]) for of in (scores, below))
    return evaluation.compare(own, reference, NATS, np.random.default_rng(0)).gain


def write_lifelong(run: Path, found: Lifelong) -> None:
    """Keep what was found beside its run, whose page shows it."""
    temporary = run / f".{FILE}.writing"
    temporary.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    temporary.replace(run / FILE)
