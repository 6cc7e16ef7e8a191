"""Attack 6: end the process between the noise and the save. `simulations.bench.kill` does it at random instants."""

from __future__ import annotations

import pytest

from common.ledger import verify
from common.privacy import Randomness
from server import rounds
from server.checkpoint import Checkpoint
from simulations.run import Progress, resume

MODES = pytest.mark.parametrize("mode", [{}, {"noise": "local"}, {"unit": "example"}], ids=["central", "local", "silo"])


class PowerCutError(BaseException):
    """Not an error that anything may catch."""


def debits(path):
    return sum(entry.kind == "debit" for entry in verify((path / "ledger.jsonl").read_bytes()).entries)


@MODES
def test_attack_06_noise_is_never_drawn_before_its_debit_is_on_disk(study, monkeypatch, mode):
    """The file is read at the very moment at which noise is made, wherever it is made."""
    path = study.folder / "run"
    on_disk = []
    real = Randomness.normal

    def looked(self, size):
        on_disk.append(debits(path))
        return real(self, size)

    monkeypatch.setattr(Randomness, "normal", looked)
    study.start(rounds=2, rounds_only=True, preflight=False, cohort=16, **mode)  # preflight's noise is on zeros
    assert set(on_disk) == {1, 2}


@MODES
@pytest.mark.parametrize("instant", ["replies", "noise", "release", "checkpoint"])
def test_attack_06_a_crash_at_any_step_wastes_a_debit_at_most_and_never_uses_one_twice(
    study, monkeypatch, mode, instant
):
    path = study.folder / "run"
    with monkeypatch.context() as patch:

        def crash(*_, **__):
            raise PowerCutError

        if instant == "replies":
            study.tap.forge = crash
        elif instant == "noise":
            patch.setattr(rounds, "add_central_noise", crash)
        elif instant == "release":
            patch.setattr(rounds.Rounds, "_released", crash)
        else:
            real = Checkpoint.save
            patch.setattr(Checkpoint, "save", lambda self, to: crash() if self.round else real(self, to))
        with pytest.raises(PowerCutError):
            study.start(rounds=2, rounds_only=True, cohort=16, **mode)
        study.tap.forge = None
    before = debits(path)
    devices_made_the_noise = bool(mode)
    assert before == (1 if instant != "replies" or devices_made_the_noise else 0)
    with monkeypatch.context() as patch:
        patch.setattr("simulations.run._finish", lambda *_: None)
        assert resume(path, Progress()).finished
    entries = verify((path / "ledger.jsonl").read_bytes()).entries
    used = [entry.body["debit"] for entry in entries if entry.kind == "release"]
    # A release that was written down before the crash, and never broadcast, keeps its debit to itself.
    assert len(used) == len(set(used)) == 2 + (instant == "checkpoint")
    assert debits(path) == 2 + before
