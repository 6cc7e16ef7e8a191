"""Attack 5: the budget ends in the middle of a run. It is asked before the work; nothing leaves; a limit is a limit."""

from __future__ import annotations

import pytest

from common.errors import BudgetSpent, Refusal
from common.ledger import verify
from common.promise import promise_of
from server import run_folder
from server.checkpoint import Checkpoint
from server.rounds import spent_epsilon
from simulations.run import Progress, resume


@pytest.mark.parametrize("mode", [{}, {"noise": "local"}, {"unit": "example"}], ids=["central", "local", "silo"])
def test_attack_05_a_server_whose_reservation_is_used_up_asks_nobody(study, mode):
    path = study.start(rounds=1, spare_rounds=1, rounds_only=True, **mode)
    opened = run_folder.reopen(path)
    body = [entry.body for entry in opened.ledger.entries() if entry.kind == "debit"][-1]
    opened.ledger.append("debit", {name: body[name] for name in ("event", "reservation", "run", "round", "spec")})
    opened.ledger.close()
    start = Checkpoint.load(path / run_folder.CHECKPOINT)
    Checkpoint(0, start.vector, start.velocity, "", start.layout).save(path / run_folder.CHECKPOINT)
    before = len([m for m in study.tap.asked if m.metadata.message_type == "train"])
    with pytest.raises(BudgetSpent):
        resume(path, Progress())
    assert len([m for m in study.tap.asked if m.metadata.message_type == "train"]) == before
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    assert sum(entry.kind == "debit" for entry in entries) == opened.spec.rounds == 2
    assert spent_epsilon(opened.spec, 2) <= float(opened.spec.epsilon)
    assert spent_epsilon(opened.spec, 3) > float(opened.spec.epsilon)


def test_attack_05_a_device_refuses_the_round_after_the_last_and_trains_nothing(study, monkeypatch):
    host = study.host()
    device = study.device(host)
    spec = study.spec(host, noise="local", rounds=2)
    for number in range(1, spec.rounds + 1):
        device.ask(study.assignment(spec, number))
    worked = []
    monkeypatch.setattr(type(host.trainer), "fit", lambda *_, **__: worked.append(1))
    with pytest.raises(Refusal) as refused:
        device.ask(study.assignment(spec, spec.rounds + 1))
    assert refused.value.code == "budget-spent"
    assert worked == []
    assert device.count("debit") == device.count("release") == spec.rounds
    device.close()


def test_attack_05_a_device_refuses_a_run_that_would_not_fit_whatever_the_server_says_it_costs(study):
    host = study.host()
    device = study.device(host, epsilon=8.0, smallest_noise_multiplier=0.01)
    honest = study.spec(host, noise="local", epsilon=8.0)
    # A quarter of the noise, still presented as epsilon 8.
    liar = study.spec(host, noise="local", epsilon=8.0, noise_multiplier=honest.noise_multiplier / 4, run="cd" * 16)
    with pytest.raises(Refusal) as refused:
        device.ask(study.assignment(liar))
    assert refused.value.code == "budget-spent"
    device.ask(study.assignment(honest))
    with pytest.raises(Refusal) as refused:
        device.ask(study.assignment(study.spec(host, noise="local", epsilon=8.0, run="ef" * 16)))
    assert refused.value.code == "budget-spent"
    (reserved,) = [entry.body for entry in device.ledger.entries() if entry.kind == "reserve"]
    assert reserved["event"] == promise_of(honest).schedule(honest.noise_multiplier, honest.rounds).to_json()
    device.close()
