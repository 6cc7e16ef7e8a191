"""The registry per data set: new names, crashes and other runs do not give a second budget on the same people."""

from __future__ import annotations

import json
import math
import threading

import pytest

from common.accounting import PoissonGaussian, Repeated, epsilon_of
from common.config import RunConfig
from common.errors import Refusal, VerificationError
from common.ledger import Ledger, verify
from common.promise import promise_of
from server import registry
from server.registry import SpentOnData, enter, registry_file, settle, spent_on_data
from server.run_folder import create, signing_key

DATA = "d" * 64
OTHER_DATA = "e" * 64


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))


@pytest.fixture
def new_run(tiny_base_folder, tmp_path):
    """A function `(name, ...) -> opened run folder` that trains nothing."""
    opened = []

    def make(name, *, data=DATA, **changes):
        config = RunConfig(model=str(tiny_base_folder), cohort=8, rounds=3, **changes)
        folder = create(
            tmp_path / name,
            config,
            population=20,
            model=tiny_base_folder,
            digest="1" * 64,
            data=data,
        )
        opened.append(folder)
        return folder

    yield make
    for folder in opened:
        folder.ledger.close()


def debit(folder, rounds):
    event = promise_of(folder.spec).event(folder.spec.noise_multiplier)
    for number in range(1, rounds + 1):
        folder.ledger.append("debit", {"event": event.to_json(), "reservation": 1, "round": number})


def finished(folder, rounds=3):
    assert enter(folder)
    debit(folder, rounds)
    settle(folder)
    return folder


def test_two_runs_under_two_names_cost_what_their_events_cost_together(new_run):
    one, other = finished(new_run("one")), finished(new_run("other", epsilon=4.0))
    found = spent_on_data(other.path)
    events = [Repeated(PoissonGaussian(0.4, folder.spec.noise_multiplier), 3) for folder in (one, other)]
    assert found["runs"] == 2
    assert found["run_epsilon"] == pytest.approx(epsilon_of([events[1]], found["delta"]))
    assert found["epsilon"] == pytest.approx(epsilon_of(events, found["delta"]))
    assert found["epsilon"] > 6 > 4 > found["run_epsilon"]


def test_the_sentence_says_both_numbers_with_unit_adjacency_and_delta(new_run):
    finished(new_run("one"))
    sentence = spent_on_data(finished(new_run("other")).path)["sentence"]
    assert sentence.startswith("This run, if released alone, epsilon ")
    for words in ("all 2 runs on this data, epsilon", "delta 1e-05", "per user", "zero-out"):
        assert words in sentence


def test_runs_on_other_data_are_another_sum(new_run):
    finished(new_run("one"))
    assert spent_on_data(finished(new_run("other", data=OTHER_DATA)).path)["runs"] == 1


@pytest.mark.parametrize("change", [{"rehearsal": True}, {"epsilon": math.inf}, {"as_if_population": 400}])
def test_what_promises_nothing_is_never_entered(new_run, change):
    folder = new_run("one", **change)
    assert not enter(folder)
    settle(folder)
    assert not registry_file(DATA).exists()
    assert spent_on_data(folder.path) is None
    finished(new_run("other"))
    found = spent_on_data(folder.path)
    assert (found["runs"], found["is_counted"], found["run_epsilon"]) == (1, False, "inf")
    assert found["sentence"].startswith("This run promises nothing")


def test_a_run_that_never_ended_counts_whole(new_run):
    folder = new_run("one")
    enter(folder)
    debit(folder, 1)
    whole = Repeated(PoissonGaussian(0.4, folder.spec.noise_multiplier), folder.spec.rounds)
    assert spent_on_data(folder.path)["epsilon"] == pytest.approx(epsilon_of([whole], folder.spec.delta))


def test_a_run_is_entered_and_settled_once_however_often_it_is_resumed(new_run):
    folder = finished(new_run("one"))
    before = registry_file(DATA).read_bytes()
    assert enter(folder)
    settle(folder)
    assert registry_file(DATA).read_bytes() == before
    assert [entry.kind for entry in verify(before).entries] == ["open", "reserve", "debit", "cancel"]


def test_settled_runs_cost_what_their_own_ledgers_debited_crashes_included(new_run):
    folder = finished(new_run("one"), rounds=4)
    four = Repeated(PoissonGaussian(0.4, folder.spec.noise_multiplier), 4)
    assert spent_on_data(folder.path)["epsilon"] == pytest.approx(epsilon_of([four], folder.spec.delta))


def test_units_are_summed_apart_and_adjacencies_under_the_one_that_holds_for_both(new_run):
    central, local = finished(new_run("one")), finished(new_run("two", noise="local"))
    silo = finished(new_run("three", unit="example", example_records=1000, local_batch=4))
    assert spent_on_data(silo.path)["runs"] == 1
    assert spent_on_data(silo.path)["unit"] == "example"
    found = spent_on_data(local.path)
    assert (found["runs"], found["adjacency"]) == (2, "zero-out")
    assert found["epsilon"] > spent_on_data(central.path)["run_epsilon"]


def test_what_was_stated_is_returned_where_nothing_was_entered_since(new_run, monkeypatch):
    folder = finished(new_run("one"))
    stated = spent_on_data(folder.path)
    (folder.path / registry.SPENT_ON_DATA).write_text(json.dumps(stated))
    monkeypatch.setattr(registry, "epsilon_of", None)
    assert spent_on_data(folder.path) == stated
    registry_file(DATA).unlink()  # as on the machine of someone who was handed the run
    assert spent_on_data(folder.path) == stated


def test_a_registry_that_was_edited_stops_the_next_run_and_is_named(new_run):
    finished(new_run("one"))
    path = registry_file(DATA)
    path.write_bytes(path.read_bytes().replace(b'"count":3', b'"count":1'))
    with pytest.raises(VerificationError, match=str(path)) as caught:
        enter(new_run("other"))
    assert caught.value.entry == 2


def test_a_run_waits_for_another_that_holds_the_registry_and_then_says_so(new_run, monkeypatch):
    folder = new_run("one")
    held = Ledger.create(registry_file(DATA), signing_key(), {"role": "registry", "data": DATA})
    timer = threading.Timer(0.2, held.close)
    timer.start()
    assert enter(folder)
    timer.join()
    monkeypatch.setattr(registry, "SECONDS_TO_WAIT", 0.0)
    with Ledger.open(registry_file(DATA), signing_key()), pytest.raises(Refusal) as caught:
        enter(new_run("other"))
    assert caught.value.code == "ledger-locked"


def test_the_sentence_never_shows_less_than_it_costs():
    found = SpentOnData(7.991, 41.201, 1e-5, "user", "zero-out", 14, True, "0" * 64)
    assert "epsilon 8.00; all 14 runs on this data, epsilon 41.21" in found.sentence()
