"""A joined device in secure sums: which roster it believes, what outlives its child, and that nothing happens twice."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest

import homespun
from client.budget_keeper import BudgetKeeper
from client.coordinator_calls import REFUSALS, Calls, verdict_on
from client.device_home import DeviceHome
from client.joined_sums import JoinedSums, has_roster, keep_roster
from client.membership import Membership
from client.vault_child import Message
from client.vault_host import ChildVault
from common.errors import BudgetSpent, Refusal
from common.keys import SigningKey
from common.privacy import Randomness, clip_rows
from common.secagg import Participant
from common.secagg_coordinator import Coordinator
from common.secagg_messages import AggregationPolicy, Leg
from common.secure_sum import SecureSum
from common.sum_wire import SumLetters
from common.vouched_roster import Grant, Vouched, VouchedRoster, federation_of, invite_key
from common.wire import Assignment, ReleaseSpec, from_raw_bytes, raw_bytes, receipt_of_bytes
from server import fleet_runs

LEGS = (Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK)
POLICY = "smallest_cohort = 3\nepsilon = 1000.0\nmains_power_only = false\n"


class World:
    """One joined device, four peers of which there are only keys, and a run of secure sums over the five."""

    def __init__(self, coordinator, tmp_path, monkeypatch):
        self.coordinator = coordinator
        invite = coordinator.invite(uses=5)
        self.token = json.loads(invite.read_text())["token"]
        (tmp_path / "policy.toml").write_text(POLICY)
        monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
        data = ("--data", str(tmp_path / "people.jsonl"), "--user", "ada", "--policy", str(tmp_path / "policy.toml"))
        assert homespun.main(["device", "join", str(invite), *data, "--yes"]) == 0
        self.joined = Membership.load(DeviceHome.open())
        self.home = self.joined.home
        self.subject = str(self.home.read_ledger().header["subject"])
        self.peers = [coordinator.peer(self.token, number) for number in range(1, 5)]
        subjects = [self.subject, *(subject for _, subject in self.peers)]
        monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "operator"))
        options = {"noise": "distributed", "cohort": 5, "coordinator_epsilon": 8.0}
        self.run = coordinator.run("sums", subjects, **options)
        self.spec = self.run.spec
        self.roster = VouchedRoster.from_bytes((self.run.path / fleet_runs.ROSTER).read_bytes())
        self.calls = Calls(self.joined)

    def assignment(self, number=1):
        return Assignment(self.spec, number, (self.subject,), self.run.start)

    def kinds(self):
        return [entry.kind for entry in self.home.read_ledger().entries]


@pytest.fixture
def world(coordinator, tmp_path, monkeypatch):
    return World(coordinator, tmp_path, monkeypatch)


class Child:
    """The production seam: does what the vault's child does, without a model; the ledger and the keeper are real."""

    def __init__(self, world):
        self.world, self.asked, self.fail_at = world, [], None

    def __call__(self, message):
        task = message.facts["do"]
        self.asked.append(task)
        if task == self.fail_at:
            raise Refusal("failed", "the process that trains ended in the middle of its work")
        spec, number = ReleaseSpec.from_text(message.facts["spec"]), message.facts["round"]
        with self.world.home.open_ledger() as ledger:
            keeper = BudgetKeeper(self.world.home, ledger)
            if task == "check":
                keeper.check(spec, number)
            elif task == "join":
                keeper.note_join(spec.run, number)
            elif task == "record":
                receipt = dict(message.facts["receipt"])
                keeper.keep(receipt, from_raw_bytes(message.content, receipt["dtype"]))
                keeper.record(spec, receipt)
            elif task == "hold":
                row = np.random.default_rng(number).normal(size=(1, spec.model_dim))
                return Message({}, raw_bytes(clip_rows(row, spec.clip).astype(np.float32).reshape(-1)))
        return Message({})


def device(world, child=None):
    return JoinedSums(world.home, world.subject, child or Child(world), world.calls.fetch_roster)


class Round:
    """The coordinator and the four peers of one round; the device under test answers through `sums`."""

    def __init__(self, world, number=1):
        self.world, self.number = world, number
        terms = SecureSum.of(world.spec).terms(world.spec, number)
        self.noise = SecureSum.of(world.spec).noise(world.spec, 5)
        self.terms = terms
        keys = world.roster.keys
        self.coordinator = Coordinator(terms, enrolled=keys)
        policy = AggregationPolicy(smallest_cohort=3)
        self.peers = {
            key.verify_key.hex: Participant(
                terms, policy=policy, signing_key=key, enrolled=keys, answered=set(), randomness=Randomness.system()
            )
            for key, _ in world.peers
        }
        self.own = world.home.key.verify_key.hex

    def play(self, sums, before=lambda leg: None, until=Leg.UNMASK):
        """Play the legs; the codes that the device answered with instead of letters."""
        codes, row = [], np.zeros(self.world.spec.dim)
        keys = sums.join(self.world.assignment(self.number)).letters[self.world.subject]
        self.coordinator.receive(keys)
        for peer in self.peers.values():
            self.coordinator.receive(peer.keys())
        for leg in LEGS:
            if leg > until:
                break
            before(leg)
            for name, message in self.coordinator.advance().items():
                if name == self.own:
                    asked = SumLetters(self.world.spec.run, self.number, leg, {self.world.subject: message}, {})
                    answered = sums.answer(asked)
                    answered = answered[0] if isinstance(answered, tuple) else answered
                    codes += answered.refused.values()
                    for letter in answered.letters.values():
                        self.coordinator.receive(letter)
                    continue
                peer = self.peers[name]
                if leg is Leg.MASKED:
                    encoded = self.noise.encode(row, self.terms.digest, Randomness.system())
                    self.coordinator.receive(peer.mask(message, encoded))
                else:
                    steps = {Leg.SHARES: peer.share, Leg.CONSENT: peer.consent, Leg.UNMASK: peer.unmask}
                    self.coordinator.receive(steps[leg](message))
        return codes


def refused(action):
    with pytest.raises(Refusal) as refusal:
        action()
    return refusal.value.code


def test_a_joined_device_takes_part_in_all_five_legs_and_the_debit_is_there_before_the_vector_leaves(world):
    sums, child, game = device(world, child := Child(world)), child, Round(world)
    assert game.play(sums) == []
    assert child.asked == ["check", "join", "hold", "record"]
    assert world.kinds()[-5:] == ["join", "refill", "reserve", "debit", "release"]
    total = game.noise.decode(game.coordinator.total(), game.terms.digest)[: world.spec.model_dim]
    row = np.random.default_rng(1).normal(size=(1, world.spec.model_dim))
    expected = clip_rows(row, world.spec.clip)[0]
    assert np.abs(total - expected).max() < 6 * game.noise.standard_deviation(5)
    (release,) = [entry.body for entry in world.home.read_ledger().entries if entry.kind == "release"]
    assert release["dtype"] == "uint8"
    assert not sums.is_under_way


def test_what_left_is_what_the_ledger_lists(world):
    sums, game, letters = device(world), Round(world), []
    receive = game.coordinator.receive

    def listening(letter):
        letters.append(letter)
        return receive(letter)

    game.coordinator.receive = listening
    game.play(sums)
    (release,) = [entry.body for entry in world.home.read_ledger().entries if entry.kind == "release"]
    digests = {receipt_of_bytes(letter, world.spec.digest, 1, 1, "uint8") for letter in letters}
    assert release["sha256"] in digests


def test_a_vault_that_restarts_between_two_legs_is_out_of_the_round_and_never_masks_or_answers_again(world):
    for number, leg in enumerate(LEGS, start=1):
        before, game = device(world), Round(world, number)
        game.play(before, until=Leg(leg - 1) if leg is not Leg.SHARES else Leg.KEYS)
        after = device(world)  # everything that was in memory is gone
        for later in LEGS:
            asked = SumLetters(world.spec.run, number, later, {world.subject: b"any"}, {})
            letters, why = after.answer(asked)
            assert letters.letters == {}
            assert [refusal.code for refusal in why] == ["closed"]
        assert refused(lambda number=number, after=after: after.join(world.assignment(number))) == "round-answered"
    kinds = world.kinds()
    assert kinds.count("join") == len(LEGS)
    assert kinds.count("debit") == kinds.count("release") == 2  # two had reached the masked leg


def test_a_letter_that_comes_twice_is_answered_once(world):
    sums, game = device(world), Round(world)
    seen = {}
    answer = sums.answer
    sums.answer = lambda asked: seen.setdefault(asked.leg, asked) and answer(asked)
    assert game.play(sums) == []
    for asked in seen.values():
        letters, (why,) = answer(asked)
        assert letters.letters == {}
        assert why.code == "closed"


def test_a_child_that_is_gone_at_the_door_lets_nothing_out(world):
    child = Child(world)
    child.fail_at = "record"
    game, sums = Round(world), device(world, child)
    assert game.play(sums, until=Leg.MASKED) == ["failed"]
    assert "release" not in world.kinds()
    child.fail_at = None
    asked = SumLetters(world.spec.run, 1, Leg.MASKED, {world.subject: b""}, {})
    assert [one.code for one in sums.answer(asked)[1]] == ["repeated"]


def test_a_round_that_is_not_granted_is_not_begun(world):
    world.home.grant(world.home.policy().model_copy(update={"epsilon": 0.5}))
    assert refused(lambda: device(world).join(world.assignment())) == "policy-epsilon"
    assert "join" not in world.kinds()


def test_a_round_of_a_spent_budget_is_not_begun(world):
    world.home.grant(world.home.policy().model_copy(update={"epsilon": 9.0}))
    other = replace(world.spec, run="ef" * 16)
    with world.home.open_ledger() as ledger:
        keeper = BudgetKeeper(world.home, ledger)
        facts = {"run": other.run, "round": 1, "spec": other.digest, "names": [], "shapes": [], "dtype": "uint8"}
        keeper.record(other, {**facts, "bytes": 1, "sha256": "00" * 32})
    with pytest.raises(BudgetSpent):
        device(world).join(world.assignment())
    assert "join" not in world.kinds()


def forged(world, roster, **changes):
    """The run's spec with another roster's digest, as a coordinator would write it."""
    sums = {**world.spec.secure_sum, "roster": roster.digest}
    return replace(world.spec, secure_sum=sums, **changes)


def test_a_roster_of_devices_that_the_coordinator_made_up_is_not_believed(world):
    federation = federation_of(world.joined.invite.authority)
    own = next(one for one in world.roster.devices if one.key == world.home.key.verify_key.hex)
    grants = {one.invite: one for one in world.roster.grants}
    token, enroller = "made-up-by-the-coordinator-who-has-no-enroller", SigningKey(bytes([99]) * 32)
    invite = invite_key(token).verify_key.hex
    made_up = {
        (one := Vouched.sign(token, federation, SigningKey(bytes([50 + number]) * 32))).key: one for number in range(4)
    }
    for grant in (Grant.sign(enroller, federation, invite, 5), Grant(invite, 5, "00" * 64)):
        false = VouchedRoster.of({**grants, invite: grant}, {own.key: own, **made_up})
        spec = forged(world, false)
        assert refused(lambda false=false, spec=spec: keep_roster(world.joined, spec, false.to_bytes())) == (
            "unknown-key"
        )
        assert not has_roster(world.home, spec)
        assert refused(
            lambda spec=spec: device(world).join(Assignment(spec, 1, (world.subject,), world.run.start))
        ) == ("unknown-key")


def test_a_roster_other_than_the_specs_is_not_believed_and_one_in_place_of_it_is_noticed(world):
    smaller = VouchedRoster(world.roster.grants, world.roster.devices[:4])
    assert refused(lambda: keep_roster(world.joined, world.spec, smaller.to_bytes())) == "unknown-key"
    assert refused(lambda: keep_roster(world.joined, world.spec, b"{}")) == "unknown-key"
    keep_roster(world.joined, world.spec, world.roster.to_bytes())
    assert has_roster(world.home, world.spec)
    (path,) = world.home.folder.glob("roster-*.json")
    path.write_bytes(smaller.to_bytes())
    assert not has_roster(world.home, world.spec)


@pytest.mark.parametrize("other", ["enroller", "authority"])
def test_a_roster_that_passed_for_one_federation_is_none_for_the_next(world, other, monkeypatch):
    """A coordinator that names the run and the roster of a federation that this device left."""
    keep_roster(world.joined, world.spec, world.roster.to_bytes())
    assert has_roster(world.home, world.spec)
    changed = {"enroller": SigningKey(bytes([98]) * 32).verify_key.hex, "authority": "another certificate"}
    invite = world.joined.invite.model_copy(update={other: changed[other]})
    monkeypatch.setattr(Membership, "load", classmethod(lambda cls, home: replace(world.joined, invite=invite)))
    assert not has_roster(world.home, world.spec)


def test_a_device_that_joined_without_an_enroller_takes_part_in_no_secure_sum(world):
    old = replace(world.joined, invite=world.joined.invite.model_copy(update={"enroller": ""}))
    assert refused(lambda: keep_roster(old, world.spec, world.roster.to_bytes())) == "unknown-key"


def test_the_roster_comes_with_the_devices_call_and_the_owner_sees_where_it_does_not_check_out(world):
    class Vault:
        def personalize(self, *_):
            raise AssertionError

    assert verdict_on(world.home, world.spec).code == "unknown-key"
    world.calls.keep_up(Vault())
    assert has_roster(world.home, world.spec)
    assert verdict_on(world.home, world.spec) is None
    for path in world.home.folder.glob("roster-*.json"):
        path.unlink()
    (world.run.path / fleet_runs.ROSTER).write_bytes(b"{}")
    world.calls.keep_up(Vault())
    world.calls.keep_up(Vault())
    seen = json.loads((world.home.folder / REFUSALS).read_text())["refusals"]
    assert [one["code"] for one in seen] == ["unknown-key"]  # told once
    assert verdict_on(world.home, world.spec).code == "unknown-key"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("leg", LEGS)
def test_a_child_that_is_killed_between_two_legs_costs_nothing(world, leg, monkeypatch):
    """The real child, with a model: killed and put away, while the resident part holds the secrets."""
    monkeypatch.setenv("HOMESPUN_NICE", "0")
    noted = []
    vault = ChildVault(
        world.joined,
        idle_seconds=600.0,
        note_refusal=lambda *it: noted.append(it),
        fetch_roster=world.calls.fetch_roster,
    )

    def kill(now):
        if now is leg:
            os.kill(vault.process.pid, signal.SIGKILL)
            assert refused(lambda: vault.personalize(world.spec, 1, world.run.start)) == "not-now"

    try:
        game = Round(world)
        assert game.play(vault, before=kill) == []
        assert np.abs(game.noise.decode(game.coordinator.total(), game.terms.digest)).max() > 0
        assert refused(lambda: vault.join(world.assignment())) == "round-answered"
        assert [code for code, _ in noted] == ["round-answered"]
    finally:
        vault.close()
    kinds = world.kinds()
    assert (kinds.count("join"), kinds.count("debit"), kinds.count("release")) == (1, 1, 1)
