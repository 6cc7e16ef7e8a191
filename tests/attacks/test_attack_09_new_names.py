"""Attack 9: a new run name, another task or another spec, to get a fresh budget for the same data."""

from __future__ import annotations

import json
import shutil
import signal

import pytest

from common.accounting import epsilon_of, event_from_json
from common.errors import Refusal, VerificationError
from common.ledger import debits, verify
from simulations.run import Progress
from simulations.shown_evidence import check, read


def test_attack_09_a_devices_budget_belongs_to_its_subject_and_not_to_a_run(study):
    """The second run asks under another name, another seed of everything, and would cost no more than the first."""
    host = study.host()
    device = study.device(host, epsilon=8.0)
    first = study.spec(host, noise="local", epsilon=8.0)
    device.ask(study.assignment(first))
    for change in ({"run": "cd" * 16}, {"source": "ff" * 32}, {"recipe": {**first.recipe, "learning_rate": 0.1}}):
        with pytest.raises(Refusal) as refused:
            device.ask(study.assignment(study.spec(host, noise="local", epsilon=8.0, **change)))
        assert refused.value.code == "budget-spent"
    device.close()
    restarted = study.device(host, epsilon=8.0)
    with pytest.raises(Refusal):
        restarted.ask(study.assignment(study.spec(host, noise="local", epsilon=8.0, run="cd" * 16)))
    # What was paid for goes on.
    assert restarted.ask(study.assignment(first, 2)).users == 1
    restarted.close()


def test_attack_09_two_tasks_that_fit_together_are_priced_together(study):
    host = study.host()
    device = study.device(host, epsilon=8.0)
    asked = [study.assignment(study.spec(host, noise="local", epsilon=4.0, run=f"{n:032x}")) for n in range(10)]
    taken, code = 0, ""
    while not code:
        try:
            device.ask(asked[taken])
        except Refusal as refusal:
            code = refusal.code
        else:
            taken += 1
    assert code == "budget-spent"
    assert taken > 1
    charged = [event_from_json(debit.event) for debit in debits(device.ledger.entries())]
    assert len(charged) == taken
    assert epsilon_of(charged, 1e-5) <= 8.0 < epsilon_of([*charged, charged[0]], 1e-5)
    device.close()


def test_attack_09_every_run_on_one_data_set_is_bound_to_the_same_digest_and_their_ledgers_add_up(study):
    """Another name of the run, of the file and of its folder is the same data."""
    copy = study.folder / "elsewhere" / "renamed.jsonl"
    copy.parent.mkdir()
    shutil.copy(study.notes, copy)
    paths = [
        study.start(name, rounds=1, rounds_only=True, data=data)
        for name, data in (("a", str(study.notes)), ("b", str(study.notes)), ("c", str(copy)))
    ]
    verified = [verify((path / "ledger.jsonl").read_bytes()) for path in paths]
    assert len({one.header["data"] for one in verified}) == 1
    assert len({one.header["run"] for one in verified}) == 3
    charged = [event_from_json(debit.event) for one in verified for debit in debits(one.entries)]
    alone = epsilon_of(charged[:1], 1e-5)
    assert 7.9 < alone <= 8.0
    assert epsilon_of(charged, 1e-5) > 1.5 * alone


def test_attack_09_what_a_run_says_of_itself_stands_beside_what_all_runs_on_its_data_cost(study):
    """Each keeps to epsilon 8; the second is told that both together do not."""
    first = study.start("first", rounds=1)
    second = study.start("second-under-another-name", rounds=1, seed=5)
    alone, both = (json.loads((path / "spent_on_data.json").read_text()) for path in (first, second))
    assert alone["runs"] == 1
    assert both["runs"] == 2
    assert both["run_epsilon"] == pytest.approx(alone["epsilon"], rel=0.01)
    assert both["epsilon"] > 1.2 * alone["epsilon"]
    assert "all 2 runs on this data" in both["sentence"]
    rehearsed = study.start("rehearsal", rounds=1, rehearsal=True)
    assert json.loads((rehearsed / "spent_on_data.json").read_text())["runs"] == 2


def test_attack_09_a_changed_registry_stops_the_next_run(study, home):
    study.start("first", rounds=1, rounds_only=True)
    (registry,) = (home / "registry").glob("*.jsonl")
    lines = registry.read_bytes().splitlines(keepends=True)
    registry.write_bytes(b"".join([lines[0], *lines[2:]]) if len(lines) > 2 else lines[1])
    with pytest.raises(VerificationError):
        study.start("second", rounds=1, rounds_only=True)


def test_attack_09_a_run_whose_folder_was_copied_is_continued_in_one_place_only(study):
    """Two copies, each with the rounds that were left, would release twice under one reservation."""
    path = study.start(
        rounds=4, rounds_only=True, progress=Progress(round=lambda line: signal.raise_signal(signal.SIGINT))
    )
    shutil.copytree(path, study.folder / "copy")
    study.resume(path)
    with pytest.raises(VerificationError, match="in another copy of its folder"):
        study.resume(study.folder / "copy")
    entries = verify((study.folder / "copy" / "ledger.jsonl").read_bytes()).entries
    assert sum(entry.kind == "debit" for entry in entries) < 4


def test_attack_07_a_run_whose_folder_was_put_back_from_an_old_copy_is_not_continued_and_the_audit_says_why(study):
    path = study.start(
        rounds=4, rounds_only=True, progress=Progress(round=lambda line: signal.raise_signal(signal.SIGINT))
    )
    shutil.copytree(path, study.folder / "old")
    study.resume(path)
    shutil.rmtree(path)
    shutil.copytree(study.folder / "old", path)
    with pytest.raises(VerificationError, match="older"):
        study.resume(path)
    shown = check(*read(path), ())
    assert "in another copy" in shown.fault
