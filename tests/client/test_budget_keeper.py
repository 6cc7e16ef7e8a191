"""A subject's budget on its device: asked before the work, on disk before bytes leave, refilled by the owner alone."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.budget_keeper import BudgetKeeper, account_of, sent_bytes
from client.device_home import HEAD, KEY, LEDGER, POLICY, DeviceHome
from client.gate import Gate
from client.policy import Policy
from common.accounting import Repeated, calibrate, epsilon_of, event_from_json
from common.errors import BudgetSpent, ClaimRefused, DataError, Refusal, StoreError, VerificationError
from common.ledger import debits, verify
from common.privacy import Adjacency, Randomness
from common.promise import promise_of
from common.wire import ReleaseSpec, raw_bytes, receipt_digest

ROUNDS = 5
EPSILON = 4.0

LOCAL = ReleaseSpec(
    run="ab" * 8,
    method="dual",
    names=("layer.lora_A.weight", "layer.lora_B.weight"),
    shapes=((2, 3), (4, 2)),
    dtype="float32",
    unit="user",
    noise="local",
    clip=1.0,
    noise_multiplier=calibrate(epsilon=EPSILON, delta=1e-5, rounds=ROUNDS, adjacency=Adjacency.REPLACE_ONE),
    sampling_rate=0.5,
    rounds=ROUNDS,
    epsilon=repr(EPSILON),
    delta=1e-5,
    population=100,
    recipe={"local_steps": 1, "local_batch": 2, "learning_rate": 0.1, "optimizer": "sgd", "example_records": 1000},
    model="1" * 64,
    source="2" * 64,
    witnesses=4,
)
CENTRAL = replace(LOCAL, noise="central", noise_multiplier=1.5, rounds=3)
SILO = replace(LOCAL, unit="example", noise_multiplier=2.0, witnesses=0)


@pytest.fixture
def home(tmp_path):
    made = DeviceHome.open(tmp_path / "device", create=True)
    made.grant(Policy.model_validate({"epsilon": 7.0, "smallest_cohort": 10}))
    return made


@pytest.fixture
def opened(home):
    """A function that opens the keeper, as after a restart."""
    ledgers = []

    def open_keeper():
        while ledgers:
            ledgers.pop().close()
        ledgers.append(home.open_ledger())
        return BudgetKeeper(home, ledgers[0])

    yield open_keeper
    while ledgers:
        ledgers.pop().close()


def send(keeper, spec, number, *, seed=None):
    """Ask, and if granted let a zero update out through the gate; returns the release."""
    keeper.check(spec, number)
    randomness = Randomness.system() if seed is None else Randomness.rehearsal(seed)
    gate = Gate(keeper.record, keep=keeper.keep)
    return gate.release(np.zeros((1, spec.model_dim), np.float32), spec, number, randomness)


def kinds(home):
    return [entry.kind for entry in home.read_ledger().entries]


def test_the_first_release_reserves_the_whole_run_and_every_one_is_debited(home, opened):
    keeper = opened()
    for number in (1, 2):
        send(keeper, LOCAL, number)
    assert kinds(home) == ["open", "refill", "reserve", "debit", "release", "debit", "release"]
    account = keeper.account()
    assert [(run.run, run.rounds, run.debited) for run in account.runs] == [(LOCAL.run, ROUNDS, 2)]
    assert account.reserved == pytest.approx(EPSILON, rel=2e-3)
    assert account.released < account.reserved


def test_the_debit_is_on_disk_before_the_gate_hands_anything_over(home, opened):
    keeper = opened()
    on_disk = []

    def record(spec, receipt):
        keeper.record(spec, receipt)
        on_disk.append((home.folder / LEDGER).read_bytes())
        raise OSError("the power fails here")

    with pytest.raises(OSError, match="power"):
        Gate(record).release(np.zeros((1, 14), np.float32), LOCAL, 1, Randomness.system())
    assert [entry.kind for entry in verify(on_disk[0]).entries][-2:] == ["debit", "release"]
    assert opened().account().runs[0].debited == 1


def test_asking_writes_nothing_and_holds_nothing(home, opened):
    before = (home.folder / LEDGER).read_bytes()
    keeper = opened()
    for number in range(1, 50):
        keeper.check(replace(LOCAL, run=f"{number:08x}"), 1)
    assert (home.folder / LEDGER).read_bytes() == before


def test_a_run_that_does_not_fit_is_refused_before_the_work(opened):
    keeper = opened()
    send(keeper, LOCAL, 1)
    send(keeper, replace(LOCAL, run="cd" * 8), 1)
    with pytest.raises(BudgetSpent) as caught:
        keeper.check(replace(LOCAL, run="ef" * 8), 1)
    assert caught.value.code == "budget-spent"
    send(keeper, LOCAL, 2)  # what was reserved goes on


def test_the_price_is_that_of_what_runs_not_of_what_the_server_says_it_costs(opened):
    lying = replace(LOCAL, noise_multiplier=0.5, epsilon="0.1")
    with pytest.raises(BudgetSpent):
        opened().check(lying, 1)


@pytest.mark.parametrize(
    "change",
    [
        {"run": "01" * 8},
        {"source": "3" * 64},
        {"recipe": {**LOCAL.recipe, "local_steps": 2}},
        {"population": 101},
        {"epsilon": "3.9"},
    ],
)
def test_no_new_name_buys_a_second_budget(opened, change):
    keeper = opened()
    send(keeper, LOCAL, 1)
    send(keeper, replace(LOCAL, run="cd" * 8), 1)
    with pytest.raises(BudgetSpent):
        keeper.check(replace(LOCAL, **change), 1)


def test_a_restart_and_another_enrolment_go_on_where_the_budget_stood(home, opened):
    for run in ("ab" * 8, "cd" * 8):
        send(opened(), replace(LOCAL, run=run), 1)
    before = opened().account()
    again = DeviceHome.open(home.folder, create=True)  # `up` with other records, another server, another day
    assert again.read_ledger().header == home.read_ledger().header
    assert opened().account() == before
    with pytest.raises(BudgetSpent):
        opened().check(replace(LOCAL, run="ef" * 8), 1)


def test_forget_erases_copies_and_keeps_the_name_and_the_spent_budget(home, opened):
    keeper = opened()
    subject = keeper.subject
    release = send(keeper, LOCAL, 1)
    assert sent_bytes(home, release.receipt) == raw_bytes(release.total)
    before = keeper.account()
    keeper.forget()
    assert kinds(home)[-2:] == ["forget", "tombstone"]
    assert sent_bytes(home, release.receipt) is None
    assert opened().account() == before
    assert opened().subject == subject


def test_a_run_sends_no_more_than_it_reserved(opened):
    keeper = opened()
    for number in range(1, ROUNDS + 1):
        send(keeper, LOCAL, number)
    with pytest.raises(BudgetSpent, match="used"):
        keeper.check(LOCAL, ROUNDS + 1)
    with pytest.raises(BudgetSpent, match="used"):
        keeper.record(LOCAL, receipt_of(LOCAL, ROUNDS + 1))


def receipt_of(spec, number, fill=0.0):
    total = np.full(spec.dim, fill, np.float32)
    return {
        "run": spec.run,
        "round": number,
        "spec": spec.digest,
        "names": list(spec.names),
        "shapes": [list(shape) for shape in spec.shapes],
        "dtype": "float32",
        "bytes": total.nbytes,
        "sha256": receipt_digest(total, spec, number, 1),
    }


def test_of_two_runs_in_flight_the_second_at_the_door_is_refused(home, opened):
    home.grant(Policy.model_validate({"epsilon": 5.0, "smallest_cohort": 10}))
    keeper = opened()
    other = replace(LOCAL, run="cd" * 8)
    keeper.check(LOCAL, 1)
    keeper.check(other, 1)  # both fit while neither has sent
    keeper.record(LOCAL, receipt_of(LOCAL, 1))
    before = (home.folder / LEDGER).read_bytes()
    with pytest.raises(BudgetSpent):
        keeper.record(other, receipt_of(other, 1))
    assert (home.folder / LEDGER).read_bytes() == before


def test_the_same_bytes_again_are_the_same_release(home, opened):
    keeper = opened()
    grant_central(home)
    keeper.record(CENTRAL, receipt_of(CENTRAL, 1))
    before = (home.folder / LEDGER).read_bytes()
    keeper.record(CENTRAL, receipt_of(CENTRAL, 1))
    assert (home.folder / LEDGER).read_bytes() == before


def grant_central(home):
    home.grant(Policy.model_validate({"epsilon": 8.0, "smallest_cohort": 10, "trust_coordinator": True}))


def test_one_cohort_gives_one_release_where_sampling_is_claimed(home, opened):
    keeper = opened()
    grant_central(home)
    keeper.record(CENTRAL, receipt_of(CENTRAL, 1))
    with pytest.raises(Refusal, match="one cohort"):
        keeper.record(CENTRAL, receipt_of(CENTRAL, 1, fill=1.0))
    other = replace(CENTRAL, epsilon="7.0")
    with pytest.raises(Refusal, match="one cohort"):
        keeper.record(other, receipt_of(other, 1))


def test_with_local_noise_a_second_answer_is_a_second_debit(opened):
    keeper = opened()
    send(keeper, LOCAL, 1)
    send(keeper, LOCAL, 1)
    assert keeper.account().runs[0].debited == 2


def test_units_of_privacy_do_not_add_up_and_are_not_mixed(opened):
    keeper = opened()
    send(keeper, LOCAL, 1)
    with pytest.raises(Refusal) as caught:
        keeper.check(SILO, 1)
    assert caught.value.code == "policy-unit"


def test_silo_is_priced_by_records_and_steps(opened):
    keeper = opened()
    spec = replace(SILO, recipe={**SILO.recipe, "local_steps": 3})
    send(keeper, spec, 1)
    account = keeper.account()
    promise = promise_of(spec)
    assert account.runs[0].rounds == ROUNDS
    assert account.adjacency is Adjacency.ADD_REMOVE
    expected = epsilon_of([promise.schedule(2.0, ROUNDS)], 1e-5, "pld", Adjacency.ADD_REMOVE)
    assert account.reserved == pytest.approx(expected)


def test_prices_under_different_adjacencies_are_added_up(home, opened):
    keeper = opened()
    grant_central(home)
    keeper.record(CENTRAL, receipt_of(CENTRAL, 1))
    alone = keeper.account().reserved
    keeper.record(replace(LOCAL, run="cd" * 8), receipt_of(replace(LOCAL, run="cd" * 8), 1))
    account = keeper.account()
    assert account.adjacency is Adjacency.ZERO_OUT
    assert account.reserved > max(alone, EPSILON)


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"noise": "central"}, "policy-trust"),
        ({"clip": 1.5}, "policy-clip"),
        ({"epsilon": "7.5"}, "policy-epsilon"),
        ({"epsilon": "inf", "noise_multiplier": 0.0}, "policy-noise"),
        ({"sampling_rate": 0.05}, "policy-cohort"),
        ({"delta": 1e-3}, "policy-delta"),
        ({"rounds": 2000}, "policy-rounds"),
    ],
)
def test_what_the_owner_does_not_grant_is_refused_with_the_policys_code(home, opened, change, code):
    with pytest.raises(Refusal) as caught:
        opened().check(replace(LOCAL, **change), 1)
    assert caught.value.code == code
    assert kinds(home) == ["open"]


def test_without_a_limit_everything_is_still_written_down(home, opened):
    home.grant(Policy.model_validate({"epsilon": "inf", "smallest_noise_multiplier": 0.0, "smallest_cohort": 10}))
    keeper = opened()
    send(keeper, replace(LOCAL, noise_multiplier=0.0, epsilon="inf"), 1)
    assert kinds(home) == ["open", "refill", "reserve", "debit", "release"]
    assert "infinite" in keeper.account().sentence()


def test_scaled_down_noise_and_no_noise_are_refused(home, opened):
    keeper = opened()
    with pytest.raises(ClaimRefused):
        keeper.check(replace(LOCAL, extrapolation=0.5), 1)
    home.grant(Policy.model_validate({"smallest_noise_multiplier": 0.0, "smallest_cohort": 10}))
    with pytest.raises(BudgetSpent):
        keeper.check(replace(LOCAL, noise_multiplier=0.0), 1)


def test_a_policy_that_was_tightened_meanwhile_holds_at_the_door(home, opened):
    keeper = opened()
    keeper.check(LOCAL, 1)
    home.grant(Policy.model_validate({"epsilon": 1.0, "smallest_cohort": 10}))
    with pytest.raises(Refusal) as caught:
        keeper.record(LOCAL, receipt_of(LOCAL, 1))
    assert caught.value.code == "policy-epsilon"
    assert kinds(home) == ["open"]


def test_a_lowered_budget_stops_what_it_does_not_cover_any_more(home, opened):
    keeper = opened()
    send(keeper, replace(LOCAL, epsilon="0.5"), 1)
    home.grant(Policy.model_validate({"epsilon": 1.0, "smallest_cohort": 10}))
    with pytest.raises(BudgetSpent):
        keeper.check(replace(LOCAL, epsilon="0.5"), 2)
    assert keeper.account().limit == 1.0


def test_raising_the_policy_alone_refills_nothing(home, opened):
    keeper = opened()
    for run in ("ab" * 8, "cd" * 8):
        send(keeper, replace(LOCAL, run=run), 1)
    home.grant(Policy.model_validate({"epsilon": 100.0, "smallest_cohort": 10}))
    with pytest.raises(BudgetSpent):
        keeper.check(replace(LOCAL, run="ef" * 8), 1)
    assert keeper.account().limit == 7.0


def test_only_the_owners_word_refills_and_everything_sent_before_still_counts(home, opened):
    keeper = opened()
    for run in ("ab" * 8, "cd" * 8):
        send(keeper, replace(LOCAL, run=run), 1)
    with pytest.raises(Refusal) as caught:
        keeper.refill(20.0)
    assert caught.value.code == "policy-epsilon"
    home.grant(Policy.model_validate({"epsilon": 20.0, "smallest_cohort": 10}))
    for no_refill in (7.0, 6.0, float("nan")):
        with pytest.raises(ValueError, match="raises"):
            keeper.refill(no_refill)
    before = keeper.account()
    after = keeper.refill(12.0)
    assert (after.limit, after.refills, after.reserved) == (12.0, 1, before.reserved)
    assert kinds(home)[-1] == "refill"
    send(keeper, replace(LOCAL, run="ef" * 8), 1)
    assert opened().account().limit == 12.0


def test_an_old_signed_policy_does_not_come_back(home, opened):
    keeper = opened()
    old = {name: (home.folder / name).read_bytes() for name in (POLICY, f"{POLICY}.sig")}
    home.grant(Policy.model_validate({"epsilon": 1.0, "smallest_cohort": 10}))
    with pytest.raises(Refusal):
        keeper.check(LOCAL, 1)
    for name, content in old.items():
        (home.folder / name).write_bytes(content)
    with pytest.raises(Refusal) as caught:
        keeper.check(LOCAL, 1)
    assert caught.value.code == "policy-not-signed"


def test_an_old_copy_of_the_ledger_is_found_and_nothing_is_sent(home, opened):
    send(opened(), LOCAL, 1)
    old = (home.folder / LEDGER).read_bytes()
    send(opened(), LOCAL, 2)
    (home.folder / LEDGER).write_bytes(old)
    with pytest.raises(VerificationError, match="missing"):
        opened()
    with pytest.raises(VerificationError, match="missing"):
        home.read_ledger()


@pytest.mark.parametrize("name", [LEDGER, KEY])
def test_a_lost_ledger_or_key_never_means_a_new_budget(home, opened, name):
    keeper = opened()
    send(keeper, LOCAL, 1)
    (home.folder / name).unlink()
    with pytest.raises(StoreError, match="stays spent"):
        DeviceHome.open(home.folder, create=True).open_ledger()


def test_a_lost_policy_grants_nothing_once_something_was_sent(home, opened):
    keeper = opened()
    send(keeper, LOCAL, 1)
    (home.folder / POLICY).unlink()
    with pytest.raises(Refusal) as caught:
        keeper.check(LOCAL, 2)
    assert caught.value.code == "policy-not-signed"


def test_a_failed_disk_lets_nothing_out(home, opened, monkeypatch):
    keeper = opened()
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises((OSError, StoreError)):
        send(keeper, LOCAL, 1)


def fail(descriptor):
    raise OSError(28, "no space left")


def test_what_left_is_kept_sealed_and_only_there(home, opened):
    release = send(opened(), LOCAL, 1)
    content = raw_bytes(release.total)
    assert sent_bytes(home, release.receipt) == content
    assert sent_bytes(home, hashlib.sha256(b"another").hexdigest()) is None
    for path in home.folder.rglob("*"):
        if path.is_file():
            assert content not in path.read_bytes()


def test_of_many_releases_the_newest_are_kept(home, opened, monkeypatch):
    monkeypatch.setattr("client.device_home.KEPT_RELEASES", 2)
    keeper = opened()
    receipts = [send(keeper, LOCAL, number).receipt for number in (1, 2, 3)]
    assert [sent_bytes(home, receipt) is not None for receipt in receipts] == [False, True, True]


def test_a_device_that_is_not_there_is_said_and_not_made(tmp_path):
    with pytest.raises(DataError, match="data add"):
        DeviceHome.open(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_the_owner_is_told_once_where_the_key_lies_and_what_losing_it_costs(tmp_path):
    said = []
    for _ in range(2):
        DeviceHome.open(tmp_path / "device", create=True, say=said.append)
    assert len(said) == 1
    assert "lost for good" in said[0]
    assert "key-file" in said[0]


def test_a_crash_before_the_key_was_saved_is_begun_again(tmp_path):
    first = DeviceHome.open(tmp_path / "device", create=True)
    (first.folder / KEY).unlink()
    (first.folder / HEAD).unlink(missing_ok=True)
    second = DeviceHome.open(tmp_path / "device", create=True)
    second.open_ledger().close()


specs = st.builds(
    lambda run, z, rounds, noise: replace(
        LOCAL, run=f"{run:08x}", noise_multiplier=z, rounds=rounds, noise=noise, epsilon="1.0"
    ),
    st.integers(0, 3),
    st.sampled_from([0.9, 1.5, 3.0]),
    st.integers(1, 4),
    st.just("local"),
)


@settings(max_examples=12, deadline=None)
@given(asked=st.lists(st.tuples(specs, st.integers(1, 6), st.booleans()), max_size=8))
def test_whatever_is_asked_in_whatever_order_the_budget_is_never_exceeded(tmp_path_factory, asked):
    folder = tmp_path_factory.mktemp("device")
    made = DeviceHome.open(folder, create=True)
    made.grant(Policy.model_validate({"epsilon": 6.0, "smallest_cohort": 10}))
    ledger = made.open_ledger()
    for position, (spec, number, restarts) in enumerate(asked):
        if restarts:
            ledger.close()
            ledger = made.open_ledger()
        keeper = BudgetKeeper(made, ledger)
        try:
            keeper.check(spec, number)
            keeper.record(spec, receipt_of(spec, number, fill=float(position)))
        except Refusal:
            continue
    entries = made.read_ledger().entries
    released = [event_from_json(entry.body["event"]) for entry in entries if entry.kind == "debit"]
    charged = [Repeated(event_from_json(one.event), one.count) for one in debits(entries)]
    assert epsilon_of(released, 1e-5) <= epsilon_of(charged, 1e-5) <= 6.0
    assert sum(entry.kind == "release" for entry in entries) == len(released)
    assert account_of(entries, made.policy()).reserved <= 6.0
    ledger.close()
