"""Tests of a device's part in secure sums: what is remembered, what waits, and when the door opens."""

from types import SimpleNamespace

import numpy as np
import pytest

from client.gate import Gate, Shares
from client.secure_sums import Joined, SecureSums, SumIdentity, after, share_randomness, sums_of_simulation
from common.errors import BudgetSpent, Refusal
from common.keys import SigningKey
from common.privacy import Randomness
from common.secagg_coordinator import Coordinator
from common.secagg_messages import AggregationPolicy, Leg
from common.secure_sum import SecureSum, with_secure_sums
from common.sum_wire import simulated_identity

LEGS = (Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK)


@pytest.fixture(scope="module")
def spec(release_spec):
    plain = release_spec(noise="distributed", sampling_rate=1.0, population=5, rounds=3)
    return with_secure_sums(plain, epsilon=8.0, coordinator_epsilon=None, participation_cap=None)


def code_of(action):
    with pytest.raises(Refusal) as refusal:
        action()
    return refusal.value.code


class Round:
    """Five simulated devices in one process; `doors` counts what left whose gate."""

    def __init__(self, spec, number=1, record=lambda *_: None):
        self.spec, self.number = spec, number
        self.names = [str(one) for one in range(5)]
        self.sums = sums_of_simulation(self.names, share_randomness(7))
        self.left: list[str] = []
        self.record = record
        keys = {simulated_identity(spec.run, name).verify_key.hex: name for name in self.names}
        self.subjects = keys
        self.coordinator = Coordinator(SecureSum.of(spec).terms(spec, number), enrolled=set(keys))

    def begin(self, name):
        row = np.full((1, self.spec.model_dim), 0.1, np.float32)

        def leave(shares: Shares):
            release = Gate(lambda *_: self.record(name)).release(row, self.spec, self.number, shares=shares)
            self.left.append(name)
            return release

        self.sums.begin(self.spec, self.number, name)
        return self.sums.keys(self.spec, self.number, name, leave)

    def play(self, until=Leg.UNMASK):
        for name in self.names:
            self.coordinator.receive(self.begin(name))
        for leg in LEGS:
            if leg > until:
                return
            for key, message in self.coordinator.advance().items():
                self.coordinator.receive(self.sums.answer(self.spec.run, self.number, self.subjects[key], leg, message))


def test_five_devices_play_a_round_and_the_sum_is_theirs(spec):
    game = Round(spec)
    game.play()
    noise = SecureSum.of(spec).noise(spec, 5)
    total = noise.decode(game.coordinator.total(), SecureSum.of(spec).terms(spec, 1).digest)
    # Five updates of 0.1 in each of six numbers, and noise of five shares.
    assert np.abs(total - 0.5).max() < 6 * noise.standard_deviation(5)
    assert sorted(game.left) == game.names


def test_nothing_passes_the_gate_before_the_vector_is_asked_for(spec):
    game = Round(spec)
    game.play(until=Leg.SHARES)
    assert game.left == []


def test_a_door_that_says_no_lets_nothing_out_and_ends_the_round_for_this_device(spec):
    def no(name):
        raise BudgetSpent("spent")

    game = Round(spec, record=no)
    game.play(until=Leg.SHARES)
    for key, message in game.coordinator.advance().items():
        name = game.subjects[key]
        assert code_of(lambda name=name, message=message: game.sums.answer(spec.run, 1, name, Leg.MASKED, message)) == (
            "budget-spent"
        )
        again = [spec.run, 1, name, Leg.MASKED, message]
        assert code_of(lambda again=again: game.sums.answer(*again)) == "repeated"
    assert game.left == []


def test_a_round_is_begun_once_and_a_round_that_was_not_begun_is_not_answered(spec):
    game = Round(spec)
    game.begin("0")
    assert code_of(lambda: game.sums.begin(spec, 1, "0")) == "round-answered"
    assert code_of(lambda: game.sums.answer(spec.run, 2, "0", Leg.SHARES, b"")) == "closed"
    assert code_of(lambda: game.sums.answer(spec.run, 1, "0", Leg.KEYS, b"")) == "out-of-order"


def test_a_bundle_that_begins_round_after_round_does_not_fill_the_memory(spec):
    game = Round(spec)
    for number in range(1, 12):
        game.sums.begin(spec, number, "0")
    assert len(game.sums._parts) == 4
    assert code_of(lambda: game.sums.answer(spec.run, 1, "0", Leg.SHARES, b"")) == "closed"


def test_what_was_begun_is_read_back_from_the_ledger_and_written_before_anything_happens():
    written = []
    entries = [
        SimpleNamespace(kind="join", body={"run": "aa", "round": 1}),
        SimpleNamespace(kind="debit", body={"run": "aa", "round": 2}),
        SimpleNamespace(
            kind="compact",
            body={"totals": [{"kind": "join", "body": {"run": "bb", "round": 7}}, {"kind": "debit", "body": {}}]},
        ),
    ]
    joined = Joined(entries, lambda run, number: written.append((run, number)))
    assert set(joined) == {("aa", 1), ("bb", 7)}
    joined.add(("aa", 2))
    assert written == [("aa", 2)]
    assert ("aa", 2) in joined
    with pytest.raises(TypeError, match="not forgotten"):
        joined.discard(("aa", 1))

    def broken(run, number):
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        Joined([], broken).add(("aa", 3))


def test_a_device_that_cannot_write_down_that_it_begins_does_not_begin(spec):
    def broken(run, number):
        raise OSError("the disk is full")

    identity = SumIdentity(
        SigningKey.generate(), lambda: set(), lambda: AggregationPolicy(smallest_cohort=3), Joined([], broken)
    )
    sums = SecureSums(lambda *_: identity, lambda *_: Randomness.system())
    with pytest.raises(OSError, match="full"):
        sums.begin(spec, 1, "me")
    assert code_of(lambda: sums.answer(spec.run, 1, "me", Leg.SHARES, b"")) == "closed"


def test_what_stays_is_kept_when_the_last_update_left():
    calls = []
    count = after(3, lambda: calls.append(1))
    count()
    count()
    assert calls == []
    count()
    assert calls == [1]


def test_shares_of_a_rehearsal_depend_on_round_and_user_alone_and_those_of_the_system_never_repeat():
    seeded = share_randomness(3)
    assert seeded(1, "a").bytes(16) == seeded(1, "a").bytes(16)
    assert seeded(1, "a").bytes(16) != seeded(2, "a").bytes(16) != seeded(1, "b").bytes(16)
    system = share_randomness(None)
    assert system(1, "a").is_secure
    assert system(1, "a").bytes(16) != system(1, "a").bytes(16)
