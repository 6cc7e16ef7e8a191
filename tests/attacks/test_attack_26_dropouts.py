"""Attack 26: devices drop out at any leg of a secure sum, or come too late; and masks on or off give one sum."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from client.app import build
from client.secure_sums import share_randomness, sums_of_simulation
from client.vault import Vault
from common.ledger_format import verify
from common.secagg_messages import Leg
from server import rounds as server_rounds
from server import run_folder
from server.rounds import Rounds
from simulations.grid import InProcessGrid, submit_here

LEGS = (Leg.KEYS, Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK)


class LossyGrid(InProcessGrid):
    """A grid of simulated devices, one per node, on which some are gone from some leg on.

    Attributes:
        gone: Leg from which on a node does not answer, by node.
        legs: Which leg a message asks for, in order.
    """

    def __init__(self, vault, count):
        super().__init__(submit_here(build(lambda context: vault), count), count)
        self.gone: dict[int, Leg] = {}
        self.legs: list[Leg] = []

    def push_messages(self, messages):
        kept = []
        for message in messages:
            kind = message.metadata.message_type
            if kind == "query.hello":
                kept.append(message)
                continue
            leg = Leg.KEYS if kind == "train" else Leg(message.content.config_records["sum"]["leg"])
            self.legs.append(leg)
            if leg < self.gone.get(message.metadata.dst_node_id, 99):
                kept.append(message)
        sent = set(super().push_messages(kept))
        return [one.metadata.message_id if one.metadata.message_id in sent else None for one in messages]


@pytest.fixture
def prepared(study):
    """A run of ten users who are all in every round, made once and opened as often as wanted."""

    def prepared(**changes):
        config = study.config(
            **{"noise": "distributed", "cohort": 10, "rounds": 1, "rehearsal": True, "chunk": 1, "users": 10} | changes
        )
        host = study.host(**config.model_dump(exclude_defaults=True))
        opened = run_folder.create(
            study.folder / "made",
            config,
            population=10,
            model=study.base,
            digest=host.base.digest,
            data="ef" * 32,
        )
        opened.ledger.close()
        return SimpleNamespace(config=config, host=host, path=opened.path, folder=study.folder)

    return prepared


def play(run, name, *, masks, gone=None, grid_class=LossyGrid, timeout=30.0):
    """Run a copy of a prepared run; returns its last checkpoint, the ledger's kinds and the grid."""
    path = run.folder / name
    shutil.copytree(run.path, path)
    config = run.config.model_copy(update={"secagg": "full" if masks else "skip", "round_timeout": timeout})
    draw = share_randomness(config.seed)
    sums = sums_of_simulation([str(one) for one in range(10)], draw)
    vault = Vault(run.host.trainer, run.host.population.encoded, seed=config.seed, rehearsal=True, sums=sums)
    grid = grid_class(vault, 10)
    grid.gone = gone or {}
    opened = run_folder.reopen(path)
    try:
        at_work = Rounds(config, opened.spec, opened.layout, opened.start, path, opened.ledger)
        finished = []
        try:
            state = at_work.run(grid, lambda one: finished.append(one))
        except Exception as error:
            state = error
    finally:
        opened.ledger.close()
    kinds = [entry.kind for entry in verify((path / "ledger.jsonl").read_bytes()).entries]
    return SimpleNamespace(state=state, kinds=kinds, grid=grid, finished=finished, path=path)


def test_masks_on_and_masks_skipped_give_the_same_sum_bit_for_bit(prepared, monkeypatch):
    run = prepared()
    seen: dict[str, list[np.ndarray]] = {"skip": [], "full": []}
    real = server_rounds.published

    def note(total, randomness):
        seen["skip"].append(total.words.copy())
        return real(total, randomness)

    monkeypatch.setattr(server_rounds, "published", note)
    skipped = play(run, "skip", masks=False)
    from common.secagg_coordinator import Coordinator

    total = Coordinator.total
    monkeypatch.setattr(Coordinator, "total", lambda self: seen["full"].append(total(self)) or seen["full"][-1])
    full = play(run, "full", masks=True)
    assert len(seen["skip"]) == len(seen["full"]) == 1
    for one, other in zip(seen["skip"], seen["full"], strict=True):
        assert (one == other).all()
        assert one.any()
    assert (skipped.state.vector == full.state.vector).all()
    assert skipped.kinds == full.kinds == ["open", "reserve", "coordinator", "debit", "release"]
    assert full.grid.legs == [leg for leg in LEGS for _ in range(10)]


@pytest.mark.parametrize("leg", [*(pytest.param(leg, marks=pytest.mark.slow) for leg in LEGS[:2] + LEGS[3:]), LEGS[2]])
def test_attack_26_with_a_third_gone_at_any_leg_the_round_goes_on_without_them(prepared, leg):
    run = prepared()
    found = play(run, "some", masks=True, gone={node: leg for node in range(2, 5)})  # three of ten
    assert found.kinds.count("release") == 1
    (finished,) = found.finished
    assert sum(finished.rejected.values()) >= 3
    assert np.isfinite(finished.vector).all()


@pytest.mark.slow
@pytest.mark.parametrize("leg", LEGS)
@pytest.mark.parametrize("count", [4, 5])
def test_attack_26_with_forty_or_fifty_percent_gone_a_round_recovers_or_is_called_off_and_charged(
    prepared, leg, count, monkeypatch
):
    run = prepared(spare_rounds=0)
    found = play(run, "many", masks=True, gone={node: leg for node in range(2, 2 + count)})
    recovers = leg is Leg.KEYS  # then the others are a round of their own: six, or five, of at least five
    assert found.kinds.count("debit") == 1
    assert found.kinds.count("release") == (1 if recovers else 0)
    if not recovers:
        # The debit stays, the reservation is used up, nothing hangs and nothing was published.
        assert type(found.state).__name__ == "BudgetSpent"
        assert not found.finished
        assert not (found.path / "witnesses.jsonl").exists()
        # The legs that would have revealed something were never asked for.
        assert max(found.grid.legs) <= leg


def test_attack_26_a_late_device_is_not_in_the_sum_and_holds_nobody_up(prepared, monkeypatch):
    """Its answers to the third leg come when the leg is over: nobody waits for them any more."""
    monkeypatch.setattr(server_rounds, "LEG_SECONDS", 1.0)
    run = prepared()

    class Late(LossyGrid):
        def pull_messages(self, message_ids):
            late = {identifier for identifier in message_ids if self.late(identifier)}
            return list(super().pull_messages([one for one in message_ids if one not in late]))

        def late(self, identifier):
            found = self._pending.get(identifier)
            reply = found.result() if found is not None else None
            if reply is None or reply.metadata.src_node_id != 3 or "sum" not in reply.content.config_records:
                return False
            return reply.content.config_records["sum"]["leg"] == int(Leg.MASKED)

    found = play(run, "late", masks=True, grid_class=Late, timeout=5.0)
    assert found.kinds.count("release") == 1
    assert found.finished[0].rejected.get("silent", 0) >= 1
