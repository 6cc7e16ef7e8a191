"""The resident vault and its child: one debit whatever is killed, limits that hold, and no model while idle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

import homespun
from client import membership, vault_host
from client.adapter_store import AdapterStore, unpack_vectors
from client.coordinator_calls import Calls
from client.device_home import DeviceHome
from client.membership import Membership, UsageMeter
from client.round_progress import NAME
from client.vault_child import ADAPTERS, shape_of
from client.vault_host import ChildVault, resident_megabytes
from common.errors import Refusal
from common.traffic import traffic_of
from common.wire import Assignment, receipt_digest

STEPS_OF_A_LONG_ROUND = 400
SECRET = "w3 w4 nobody-may-read-this"


@pytest.fixture
def joined(coordinator, tmp_path, monkeypatch):
    invite = coordinator.invite()
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    data = ("--data", str(tmp_path / "people.jsonl"), "--user", "ada", "--policy", str(tmp_path / "policy.toml"))
    assert homespun.main(["device", "join", str(invite), *data, "--yes"]) == 0
    return Membership.load(DeviceHome.open())


@pytest.fixture
def run(coordinator, joined, tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "operator"))
    return coordinator.run("run-1", [joined.home.read_ledger().header["subject"], "cd" * 16])


@pytest.fixture
def host(joined, run):
    """A function that makes a resident vault, as after a reboot."""
    made = []

    def make(**options):
        noted = []
        made.append(
            ChildVault(
                joined,
                **{
                    "idle_seconds": 600.0,
                    "note_refusal": lambda *it: noted.append(it),
                    "fetch_roster": Calls(joined).fetch_roster,
                }
                | options,
            )
        )
        made[-1].noted = noted
        return made[-1]

    yield make
    for one in made:
        one.close()


def asked(joined, run, number=1, **changes):
    spec = replace(run.spec, **changes) if changes else run.spec
    return Assignment(spec, number, (joined.home.read_ledger().header["subject"],), run.start)


def kinds(joined):
    return [entry.kind for entry in joined.home.read_ledger().entries]


def refusal(vault, assignment):
    with pytest.raises(Refusal) as refused:
        vault.train(assignment)
    return refused.value.code


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_round_is_trained_once_whatever_is_killed_and_started_again(host, joined, run):
    first = host()
    release = first.train(asked(joined, run))
    assert release.receipt == receipt_digest(release.total, run.spec, 1, 1)
    assert np.abs(release.total[: run.spec.model_dim]).max() > 0
    os.kill(first.process.pid, signal.SIGKILL)
    again = first.train(asked(joined, run))  # the child is gone
    rebooted = host().train(asked(joined, run))  # and now everything is
    assert release.total.tobytes() == again.total.tobytes() == rebooted.total.tobytes()
    assert release.receipt == again.receipt == rebooted.receipt
    assert kinds(joined).count("debit") == kinds(joined).count("release") == 1
    first.train(asked(joined, run, 2))
    assert kinds(joined).count("debit") == 2


def in_the_middle(home, then, thread, least=3):
    """Call `then` when a checkpoint of at least so many steps is on disk; return how many it holds afterwards."""
    subject = home.read_ledger().header["subject"]

    def steps():
        with home.open_kept() as store:
            notes = [version.version_note for version in store.versions(subject, NAME)]
        return json.loads(notes[-1])["steps"] if notes and notes[-1] else 0

    while steps() < least:
        assert thread.is_alive(), "the round was over before it could be interrupted"
        time.sleep(0.01)
    then()
    return steps()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("killed", ["child", "all of the vault"])
def test_a_round_that_is_killed_in_the_middle_gives_the_bytes_of_one_that_was_not(
    host, joined, run, killed, tmp_path, monkeypatch
):
    long = {**run.spec.recipe, "local_steps": STEPS_OF_A_LONG_ROUND, "optimizer": "adam"}
    assignment = asked(joined, run, recipe=long)
    # The same device, to the last byte, in a house where nobody pulls plugs.
    shutil.copytree(joined.home.folder, tmp_path / "twin")
    twin = DeviceHome.open(tmp_path / "twin")
    calm = ChildVault(Membership.load(twin), idle_seconds=600.0, note_refusal=lambda *_: None, fetch_roster=None)
    whole = calm.train(assignment)
    calm.close()

    monkeypatch.setenv("HOMESPUN_CHECKPOINT_SECONDS", "0")
    vault, outcome = host(), []

    def work():
        try:
            outcome.append(vault.train(assignment))
        except Refusal as refusal:
            outcome.append(refusal)

    thread = threading.Thread(target=work)
    thread.start()
    if killed == "child":
        reached = in_the_middle(joined.home, lambda: os.kill(vault.process.pid, signal.SIGKILL), thread)
        thread.join()
        (release,) = outcome
    else:

        def off():
            raise Refusal("failed", "this vault is off")

        def reboot():
            monkeypatch.setattr(vault.process, "work", off)
            os.kill(vault.process.pid, signal.SIGKILL)
            thread.join()

        reached = in_the_middle(joined.home, reboot, thread)
        assert isinstance(outcome[0], Refusal)
        release = host().train(assignment)
    assert 3 <= reached < STEPS_OF_A_LONG_ROUND
    assert release.total.tobytes() == whole.total.tobytes()
    assert release.receipt == whole.receipt
    assert kinds(joined).count("debit") == kinds(joined).count("release") == kinds(joined).count("reserve") == 1


@pytest.mark.slow
def test_a_child_that_is_killed_at_its_start_is_started_again(host, joined, run):
    vault, outcome = host(), []
    thread = threading.Thread(target=lambda: outcome.append(vault.train(asked(joined, run))))
    thread.start()
    while vault.process.pid is None:
        time.sleep(0.01)
    os.kill(vault.process.pid, signal.SIGKILL)
    thread.join()
    assert outcome[0].users == 1
    assert kinds(joined).count("debit") == 1


@pytest.mark.slow
def test_a_child_that_dies_again_and_again_costs_a_refusal_and_no_debit(host, joined, run, monkeypatch):
    vault = host()
    work = vault.process.work

    def short_lived():
        connection = work()
        os.kill(vault.process.pid, signal.SIGKILL)
        return connection

    monkeypatch.setattr(vault.process, "work", short_lived)
    assert refusal(vault, asked(joined, run)) == "failed"
    assert "debit" not in kinds(joined)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("why", ["paused", "unplugged", "hours"])
def test_work_ends_as_soon_as_the_grant_does_and_goes_on_afterwards(host, joined, run, why, monkeypatch):
    monkeypatch.setenv("HOMESPUN_CHECKPOINT_SECONDS", "0")
    monkeypatch.setattr(vault_host, "CHECK_SECONDS", 0.0)
    assignment = asked(joined, run, recipe={**run.spec.recipe, "local_steps": STEPS_OF_A_LONG_ROUND})
    granted, vault, codes = joined.home.policy(), host(), []
    thread = threading.Thread(target=lambda: codes.append(refusal(vault, assignment)))
    thread.start()

    def end():
        if why == "paused":
            joined.save(status="paused")
        elif why == "unplugged":
            joined.home.grant(granted.model_copy(update={"mains_power_only": True}))
            monkeypatch.setattr(membership, "on_mains_power", lambda: False)
        else:
            joined.home.grant(granted.model_copy(update={"hours": ()}))
        thread.join()

    in_the_middle(joined.home, end, thread)
    assert codes == ["not-now"]  # and not a word more, whatever the reason was
    assert "debit" not in kinds(joined)
    joined.save(status="approved")
    joined.home.grant(granted)
    assert vault.train(assignment).users == 1


def test_a_round_that_moves_more_than_is_left_of_the_day_is_declined_before_it_begins(host, joined, run):
    moved = traffic_of(run.spec)
    needed = (moved.down + moved.up) / 1e6
    used = UsageMeter(joined.home.folder).today().megabytes_today
    joined.home.grant(joined.home.policy().model_copy(update={"megabytes_per_day": used + 2 * needed}))
    vault = host()
    UsageMeter(joined.home.folder).add(megabytes=1.5 * needed)
    assert refusal(vault, asked(joined, run)) == "not-now"
    assert "MB of today are left" in vault.noted[0][1]
    assert not vault.is_loaded


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_round_is_cut_to_the_minutes_that_are_left_and_the_owner_is_told(host, joined, run):
    vault = host()
    vault.train(asked(joined, run))  # the model is open
    used = UsageMeter(joined.home.folder).today().minutes_today
    joined.home.grant(joined.home.policy().model_copy(update={"minutes_per_day": used + 0.1}))
    release = vault.train(asked(joined, run, 2, recipe={**run.spec.recipe, "local_steps": 100_000}))
    assert release.users == 1
    assert "steps to fit the time" in UsageMeter(joined.home.folder).cut()


@pytest.mark.slow
def test_an_idle_vault_holds_no_model(host, joined, run):
    vault = host(idle_seconds=0.0)
    assert not vault.is_loaded
    vault.train(asked(joined, run))
    child = vault.process.pid
    assert resident_megabytes(child) > 50
    vault.rest()
    assert not vault.is_loaded
    assert resident_megabytes(child) == 0.0


@pytest.mark.parametrize(
    ("policy", "code"),
    [
        ({"minutes_per_day": 0.0}, "not-now"),
        ({"megabytes_per_day": 0.0}, "not-now"),
        pytest.param({"memory_megabytes": 64}, "not-now", marks=pytest.mark.slow),
        pytest.param({"trust_coordinator": False}, "policy-trust", marks=pytest.mark.slow),
        pytest.param({"smallest_cohort": 3}, "policy-cohort", marks=pytest.mark.slow),
        pytest.param({"clip": 0.5}, "policy-clip", marks=pytest.mark.slow),
    ],
)
def test_what_the_owner_does_not_grant_is_not_done(host, joined, run, policy, code):
    joined.home.grant(joined.home.policy().model_copy(update=policy))
    vault = host()
    assert refusal(vault, asked(joined, run)) == code
    assert "debit" not in kinds(joined)
    assert vault.noted[0][0] == code
    assert SECRET not in str(vault.noted)


@pytest.mark.slow
def test_minutes_that_end_in_the_middle_end_the_work(host, joined, run):
    joined.home.grant(joined.home.policy().model_copy(update={"minutes_per_day": 0.01}))
    vault = host()
    assert refusal(vault, asked(joined, run)) == "not-now"
    assert "debit" not in kinds(joined)
    assert UsageMeter(joined.home.folder).today().minutes_today > 0.005


def test_a_run_over_a_base_that_the_owner_holds_otherwise_is_refused(host, joined, run):
    joined.home.grant(joined.home.policy().model_copy(update={"base_precision": "int8"}))
    vault = host()
    assert refusal(vault, asked(joined, run)) == "model-mismatch"
    assert not vault.is_loaded


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_round_over_an_int8_base_is_trained_by_a_device(host, joined, coordinator, tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "operator"))
    subjects = [joined.home.read_ledger().header["subject"], "cd" * 16]
    held = coordinator.run("run-8", subjects, base_precision="int8")
    assert held.spec.model != joined.invite.base.digest
    release = host().train(asked(joined, held))
    assert np.abs(release.total[: held.spec.model_dim]).max() > 0


def test_a_paused_device_and_one_without_data_refuse_alike(host, joined, run):
    vault = host()
    joined.save(status="paused")
    assert refusal(vault, asked(joined, run)) == "not-now"
    assert not vault.is_loaded


def private(spec):
    names = tuple(name.replace("q_proj", "embed_tokens") for name in spec.names)
    return {"names": names}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "code"),
    [
        (private, "layout-mismatch"),
        (lambda spec: {"names": tuple(f"private.{name}" for name in spec.names)}, "layout-mismatch"),
        (lambda spec: {"names": spec.names[:-1], "shapes": spec.shapes[:-1]}, "layout-mismatch"),
        (lambda spec: {"names": spec.names[::-1], "shapes": spec.shapes[::-1]}, "layout-mismatch"),
        (lambda spec: {"recipe": {**spec.recipe, "scaling": 1e9}}, "layout-mismatch"),
        (lambda spec: {"recipe": {**spec.recipe, "max_tokens": 10**9}}, "bad-request"),
        (lambda spec: {"recipe": {**spec.recipe, "local_steps": 10**9}}, "bad-request"),
        (lambda spec: {"model": "00" * 32}, "model-mismatch"),
        (lambda spec: {"method": "everything"}, "bad-request"),
        (lambda spec: {"extrapolation": 0.5}, "claim-refused"),
    ],
    ids=[
        "another layer",
        "private",
        "a part",
        "another order",
        "scaling",
        "tokens",
        "steps",
        "model",
        "method",
        "noise",
    ],
)
def test_a_bundle_that_asks_for_anything_else_gets_a_refusal(host, joined, run, change, code):
    spec = replace(run.spec, **change(run.spec))
    vector = np.zeros(spec.model_dim, np.float32)
    subject = joined.home.read_ledger().header["subject"]
    vault = host()
    assert refusal(vault, Assignment(spec, 1, (subject,), vector)) == code
    assert "release" not in kinds(joined)


@pytest.mark.slow
def test_a_bundle_that_names_somebody_else_gets_a_refusal(host, joined, run):
    assert refusal(host(), Assignment(run.spec, 1, ("cd" * 16,), run.start)) == "not-here"


def test_a_shape_is_read_from_the_spec(joined, run):
    shape, layout = shape_of(run.spec, joined.model)
    assert (shape.targets, shape.rank, shape.max_tokens) == (("q_proj", "v_proj"), 2, 16)
    assert layout.size == run.spec.model_dim
    huge = tuple(
        (1000, two) if ".lora_A." in name else (two, 1000)
        for name, (_, two) in zip(run.spec.names, run.spec.shapes, strict=True)
    )
    with pytest.raises(Refusal):
        shape_of(replace(run.spec, shapes=huge), joined.model)


@pytest.mark.slow
def test_the_private_adapter_is_refitted_kept_sealed_and_costs_no_budget(host, joined, run):
    before = kinds(joined)
    found = host().personalize(run.spec, 3, run.start)
    assert {"base", "global", "private", "both", "steering"} <= set(found["losses"])
    assert all(value > 0 for value in found["losses"].values())
    assert kinds(joined) == before
    subject = joined.home.read_ledger().header["subject"]
    with AdapterStore(joined.home.folder / ADAPTERS, joined.home.master.subkey("adapters")) as store:
        vectors = unpack_vectors(store.get(subject, "private"))
        (version,) = store.versions(subject, "global")
    assert np.abs(vectors["over_global"]).max() > 0
    assert json.loads(version.version_note)["round"] == 3
    content = (joined.home.folder / ADAPTERS).read_bytes()
    assert vectors["over_global"].tobytes()[:64] not in content


@pytest.mark.slow
def test_nothing_of_the_owner_is_in_what_the_vault_says_or_logs(host, joined, run, capfd):
    from client.adapter_store import NewVersion
    from client.record_store import NO_BASE, RECORD, RECORDS

    with joined.home.open_store(RECORDS, "records") as store:  # a record that trips whoever reads it, with its text
        name = next(name for name in store.subjects() if store.get_many([(name, RECORD)])[0] is not None)
        (content,) = store.get_many([(name, RECORD)])
        broken = json.dumps(json.loads(content) | {"response": [SECRET]}).encode()
        store.put_many([NewVersion(name, RECORD, broken, NO_BASE)])
    vault = host()
    assert refusal(vault, asked(joined, run)) == "failed"
    written = capfd.readouterr()
    assert SECRET not in str(vault.noted) + written.out + written.err


@pytest.mark.slow
def test_a_refit_over_a_newer_global_adapter_is_taken_back_where_it_is_worse(joined, run, monkeypatch):
    import client.refit as module
    from client.base_model import SharedBase
    from client.budget_keeper import BudgetKeeper
    from client.learned_store import LearnedStore
    from client.vault_child import _Work

    with joined.home.open_ledger() as ledger:
        work = _Work(joined.home, BudgetKeeper(joined.home, ledger), SharedBase(joined.model))
        work._megabytes = 1000.0
        found = work._personalize(run.spec, 3, run.start).facts
        assert {"both", "soft-prompt", "steering"} <= set(found["losses"])
        assert "taken_back" not in found
        first = LearnedStore(joined.home).load()
        assert (first.round, bool(first.trained)) == (3, True)
        monkeypatch.setattr(module, "keep_refit", lambda *arguments: False)
        again = work._personalize(run.spec, 4, run.start + np.float32(0.01)).facts
    assert "before" in again["taken_back"]
    kept = LearnedStore(joined.home).load()
    assert kept.round == 3
    assert np.array_equal(kept.shared, first.shared)
