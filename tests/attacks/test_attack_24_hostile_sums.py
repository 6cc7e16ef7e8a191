"""Attacks 24, 25 and 27: a coordinator that cheats in a secure sum, against devices as they ship.

Every device here has its own home, key, policy, ledger and vault; the coordinator is the tests'. What it must never get
is a vector without its mask, or shares of both masks of one device.
"""

from __future__ import annotations

import json
import math
import struct

import numpy as np
import pytest
from scipy import stats

from common.errors import Refusal, VerificationError
from common.keys import SIGNATURE_BYTES, SigningKey
from common.masks import add_streams, packed_bytes, unpack_words
from common.secagg_messages import Leg, MessageReader, write_message
from common.secagg_roster import Member, Roster
from common.secure_sum import SecureSum
from common.shamir import SHARE_BYTES, join_shares

HEAD = 17 + 1 + 32 + 32  # magic, leg, digest of the terms, name of the sender


def code_of(action) -> str:
    with pytest.raises(Refusal) as refusal:
        action()
    return refusal.value.code


def vector_of(fleet, answer: bytes, number=1) -> np.ndarray:
    """The masked vector in a device's answer."""
    terms = fleet.terms(number)
    packed = answer[HEAD + SIGNATURE_BYTES : HEAD + SIGNATURE_BYTES + packed_bytes(terms.dim, terms.bits)]
    return unpack_words(packed, terms.dim, terms.bits)


def to_masked(fleet, coordinator, without=()):
    """Play the first three legs; returns the masked answers."""
    fleet.join(coordinator)
    fleet.leg(coordinator, Leg.SHARES)
    answers, codes = fleet.leg(coordinator, Leg.MASKED, without=without)
    assert not codes
    return answers


# The active/dead attack of Flower's SecAgg+, against our devices


def test_attack_24_a_device_listed_as_active_and_as_dead_keeps_one_of_its_masks(sum_fleet):
    """The coordinator asks all holders for both shares of a victim, once as a survivor and once as a dropped device."""
    fleet = sum_fleet(5)
    coordinator = fleet.coordinator()
    answers = to_masked(fleet, coordinator)
    victim = sorted(answers).index(fleet.devices[0].name) + 1
    terms = fleet.terms()
    everybody = tuple(range(1, 6))
    signatures = [
        answers[name][HEAD : HEAD + SIGNATURE_BYTES] for name in sorted(answers, key=lambda name: bytes.fromhex(name))
    ]
    overlapping = write_message(Leg.SURVIVORS, terms, everybody, (victim,), *signatures)
    for device in fleet.devices:
        assert code_of(lambda device=device: device.answer(fleet.spec, 1, Leg.CONSENT, overlapping)) == "bad-lists"
        # It refused, and forgot: asking again in any other way gets nothing.
        assert code_of(lambda device=device: device.answer(fleet.spec, 1, Leg.UNMASK, b"")) == "closed"


def test_attack_24_two_lists_for_two_halves_of_the_devices_reveal_nothing(sum_fleet):
    """Half is told that the victim survived and half that it dropped; together they would reveal both masks."""
    fleet = sum_fleet(5)
    coordinator = fleet.coordinator()
    answers = to_masked(fleet, coordinator)
    order = sorted(answers, key=bytes.fromhex)
    victim = 1
    terms = fleet.terms()
    signatures = [answers[name][HEAD : HEAD + SIGNATURE_BYTES] for name in order]
    alive = write_message(Leg.SURVIVORS, terms, (1, 2, 3, 4, 5), (), *signatures)
    dead = write_message(Leg.SURVIVORS, terms, (2, 3, 4, 5), (victim,), *signatures[1:])
    consents: dict[str, dict[int, bytes]] = {"alive": {}, "dead": {}}
    for index, name in enumerate(order, 1):
        told = "alive" if index <= 3 else "dead"
        answer = fleet.names[name].answer(fleet.spec, 1, Leg.CONSENT, alive if told == "alive" else dead)
        consents[told][index] = answer[HEAD : HEAD + SIGNATURE_BYTES]
    for index, name in enumerate(order, 1):
        mine = consents["alive" if index <= 3 else "dead"]
        for offered in (mine, {**consents["alive"], **consents["dead"]}):
            records = [struct.pack("<H", at) + offered[at] for at in sorted(offered)]
            request = write_message(Leg.CONSENTS, terms, *records)
            code = code_of(
                lambda name=name, request=request: fleet.names[name].answer(fleet.spec, 1, Leg.UNMASK, request)
            )
            assert code in {"too-few", "bad-signature", "bad-lists", "closed"}


def test_attack_24_a_second_request_to_unmask_is_refused_and_so_is_a_second_list(sum_fleet):
    fleet = sum_fleet(5)
    coordinator = fleet.coordinator()
    to_masked(fleet, coordinator, without={fleet.devices[4].name})
    fleet.leg(coordinator, Leg.CONSENT)
    requests = coordinator.advance()
    for name, message in requests.items():
        device = fleet.names[name]
        assert device.answer(fleet.spec, 1, Leg.UNMASK, message)
        for leg in (Leg.UNMASK, Leg.CONSENT, Leg.MASKED, Leg.SHARES):
            again = [device, leg, message]
            assert code_of(lambda again=again: again[0].answer(fleet.spec, 1, *again[1:])) == "closed"


# Keys


def test_attack_24_keys_that_the_coordinator_swapped_are_refused(sum_fleet):
    """The coordinator puts keys of its own in the place of a device's, to read what others seal to it."""
    fleet = sum_fleet(5)
    coordinator = fleet.coordinator()
    fleet.join(coordinator)
    requests = coordinator.advance()
    terms = fleet.terms()
    roster = Roster.from_message(next(iter(requests.values())), terms)
    stranger = SigningKey.generate()
    ours = Member(roster.members[0].name, bytes(range(32)), bytes(range(1, 33)))
    hostile = {
        # Its own keys under the victim's old signature, under its own signature, and under its own name.
        "bad-signature": Member(ours.name, ours.mask_key, ours.box_key, roster.members[0].signature),
        "unknown-key": Member(
            stranger.verify_key,
            ours.mask_key,
            ours.box_key,
            stranger.sign(Member(stranger.verify_key, ours.mask_key, ours.box_key).statement(terms)),
        ),
    }
    targets = [device for device in fleet.devices if device.name != roster.members[0].name.hex]
    for device, (code, member) in zip(targets, hostile.items(), strict=False):
        members = sorted([member, *roster.members[1:]], key=lambda one: one.name.raw)
        message = Roster(terms, tuple(members)).to_message()
        assert code_of(lambda device=device, message=message: device.answer(fleet.spec, 1, Leg.SHARES, message)) == code


def test_attack_24_devices_that_were_shown_different_rosters_do_not_unmask(sum_fleet):
    """Each half is shown a roster without the other half's last device: shares do not fit, and nobody goes on."""
    fleet = sum_fleet(7)
    coordinator = fleet.coordinator()
    fleet.join(coordinator)
    terms = fleet.terms()
    whole = Roster.from_message(next(iter(coordinator.advance().values())), terms)
    first, second = Roster(terms, whole.members[:6]), Roster(terms, whole.members[1:])
    boxes = {}
    for roster, members in ((first, whole.members[:4]), (second, whole.members[4:])):
        for member in members:
            device = fleet.names[member.name.hex]
            boxes[member.name.hex] = device.answer(fleet.spec, 1, Leg.SHARES, roster.to_message())
    # The coordinator mixes both halves into one delivery to the first device: boxes sealed under another roster.

    def reader(name):
        return MessageReader(boxes[name][:-SIGNATURE_BYTES], Leg.SHARES, terms)

    target = whole.members[0].name.hex
    parts = []
    for at, member in enumerate(whole.members[1:6], 2):
        own = reader(member.name.hex)
        own.take(32 + 32)
        held = own.indexed(2 * SHARE_BYTES + 29, 7)
        index = 1  # of the target, in the first roster
        if index in held:
            parts.append(struct.pack("<H", at) + held[index])
    delivery = write_message(Leg.DELIVERY, terms, (1, 2, 3, 4, 5, 6), *parts)
    code = code_of(lambda: fleet.names[target].answer(fleet.spec, 1, Leg.MASKED, delivery))
    assert code in {"bad-share", "bad-lists"}
    assert fleet.names[target].count("debit") == 0  # nothing left, and nothing was charged


# Cohorts and rounds


def test_attack_24_a_sum_of_two_and_one_below_the_owners_smallest_are_refused(sum_fleet):
    fleet = sum_fleet(5)
    coordinator = fleet.coordinator()
    fleet.join(coordinator)
    terms = fleet.terms()
    roster = Roster.from_message(next(iter(coordinator.advance().values())), terms)
    for count, device in ((2, 0), (1, 1)):
        own = fleet.devices[device]
        member = next(one for one in roster.members if one.name.hex == own.name)
        others = [one for one in roster.members if one is not member][: count - 1]
        few = Roster(terms, tuple(sorted([member, *others], key=lambda one: one.name.raw)))
        code = code_of(lambda own=own, few=few: own.answer(fleet.spec, 1, Leg.SHARES, few.to_message()))
        assert code == "small-cohort"


def test_attack_24_an_owner_who_asks_for_larger_cohorts_is_not_in_a_small_one(sum_fleet):
    fleet = sum_fleet(5, smallest_cohort=5)
    # A round may fall to three of five, which this owner does not accept.
    assert code_of(lambda: fleet.devices[0].join(fleet.spec, 1)) == "small-cohort"
    assert fleet.devices[0].count("debit") == 0


def test_attack_24_a_server_that_states_a_larger_noise_than_devices_bring_is_refused(sum_fleet):
    fleet = sum_fleet(5)
    sums = dict(fleet.spec.secure_sum)
    weak = fleet.replace(fleet.spec, secure_sum={**sums, "noise_multiplier": 0.05, "epsilon": "8.0"})
    assert code_of(lambda: fleet.devices[0].join(weak, 1)) == "policy-noise"
    # Within the owner's least noise, but more rounds than its budget holds: priced by what would run.
    often = fleet.replace(
        fleet.spec, rounds=200, secure_sum={**sums, "participation_cap": 200, "noise_multiplier": 0.6, "epsilon": "8.0"}
    )
    assert code_of(lambda: fleet.devices[1].join(often, 1)) == "budget-spent"


def test_attack_24_an_update_never_leaves_a_device_without_a_mask(sum_fleet):
    """The bundle asks the vault for the sum that simulations take, in which masks are skipped."""
    from common.wire import Assignment

    fleet = sum_fleet(5)
    device = fleet.devices[0]
    start = np.zeros(fleet.spec.model_dim, np.float32)
    vault = device.service._vault
    for devices in (0, 5):
        hostile = Assignment(fleet.spec, 1, (device.subject,), start, devices)
        assert code_of(lambda hostile=hostile: vault.train(hostile)) == "bad-request"
    other = fleet.replace(fleet.spec, noise="central")
    assert code_of(lambda: vault.train(Assignment(other, 1, (device.subject,), start))) == "policy-trust"
    assert device.count("debit") == 0


def test_attack_25_a_round_that_was_begun_is_refused_also_after_a_restart(sum_fleet):
    fleet = sum_fleet(5)
    device = fleet.devices[0]
    keys = device.join(fleet.spec, 1)
    assert device.join(fleet.spec, 1) == keys  # asked again: the same keys, of the same secrets
    device.close()
    again = fleet.devices[0] = fleet.open(0)
    assert code_of(lambda: again.join(fleet.spec, 1)) == "round-answered"
    assert code_of(lambda: again.answer(fleet.spec, 1, Leg.SHARES, b"")) == "closed"
    assert again.join(fleet.spec, 2) != keys
    # Nor does another spec under the same run and round begin it again.
    other = fleet.replace(fleet.spec, clip=0.5 * fleet.spec.clip)
    assert code_of(lambda: again.join(other, 1)) == "round-answered"


def test_attack_25_nobody_is_known_to_a_device_without_a_roster(sum_fleet):
    fleet = sum_fleet(3)
    fleet.roster.write_text("{}")
    assert code_of(lambda: fleet.devices[0].join(fleet.spec, 1)) == "unknown-key"
    fleet.roster.unlink()
    assert code_of(lambda: fleet.devices[1].join(fleet.spec, 1)) == "unknown-key"


# Masks


def test_attack_25_one_captured_vector_is_uniform_and_changes_completely_with_the_round(sum_fleet):
    fleet = sum_fleet(5)
    captured = []
    for number in (1, 2):
        coordinator = fleet.coordinator(number)
        fleet.join(coordinator, number)
        fleet.leg(coordinator, Leg.SHARES, number)
        answers, _ = fleet.leg(coordinator, Leg.MASKED, number)
        captured.append(vector_of(fleet, answers[fleet.devices[0].name], number))
    bits = fleet.terms().bits
    for vector in captured:
        counts = np.bincount(vector >> (bits - 6), minlength=64)
        assert stats.chisquare(counts).pvalue > 1e-6  # the upper bits, where an update and its noise would show
        counts = np.bincount(vector & 63, minlength=64)
        assert stats.chisquare(counts).pvalue > 1e-6
        serial = np.corrcoef(vector[:-1].astype(float), vector[1:].astype(float))[0, 1]
        assert abs(serial) < 6 / math.sqrt(vector.size)
    first, second = captured
    assert abs(np.corrcoef(first.astype(float), second.astype(float))[0, 1]) < 6 / math.sqrt(first.size)
    assert (first == second).mean() < 6 / math.sqrt(first.size) + 2.0**-bits


def test_attack_25_all_the_devices_but_one_and_the_coordinator_together_do_not_take_its_mask_off(sum_fleet):
    """Whoever knows every other seed of the round is left with a self mask of which too few shares were revealed."""
    fleet = sum_fleet(5)
    coordinator = fleet.coordinator()
    answers = to_masked(fleet, coordinator)
    victim = fleet.devices[0].name
    vector = vector_of(fleet, answers[victim])
    # Pair masks cancel in the sum, so the colluding side subtracts all of them; what it knows ends at the self mask.
    part = fleet.devices[0].service._vault._sums._parts[fleet.devices[0].subject, fleet.spec.run, 1].participant
    seeds = [
        (part._roster.pair_seed(part._mask_key, part._index, other), part._index > other)
        for other in range(1, 6)
        if other != part._index
    ]
    stripped = vector.copy()
    add_streams(stripped, seeds)
    stripped &= np.uint32(2 ** fleet.terms().bits - 1)
    counts = np.bincount(stripped >> (fleet.terms().bits - 6), minlength=64)
    assert stats.chisquare(counts).pvalue > 1e-6
    # The attack can succeed: with the self mask too, what is left is small, centred numbers and not uniform at all.
    add_streams(stripped, [(part._roster.self_seed(part._self_secret), False)])
    bare = stripped & np.uint32(2 ** fleet.terms().bits - 1)
    assert stats.chisquare(np.bincount(bare >> (fleet.terms().bits - 6), minlength=64)).pvalue < 1e-12


def test_attack_25_shares_below_the_threshold_do_not_join_to_a_mask(sum_fleet):
    fleet = sum_fleet(5)
    coordinator = fleet.coordinator()
    to_masked(fleet, coordinator)
    fleet.leg(coordinator, Leg.CONSENT)
    answers = {}
    for name, message in list(coordinator.advance().items())[:3]:  # four of five are needed
        answers[name] = fleet.names[name].answer(fleet.spec, 1, Leg.UNMASK, message)
        coordinator.receive(answers[name])
    assert code_of(coordinator.total) == "too-few"
    order = sorted(fleet.names, key=bytes.fromhex)
    shares = {}
    for name, answer in answers.items():
        reader = MessageReader(answer[:-SIGNATURE_BYTES], Leg.UNMASK, fleet.terms())
        reader.take(32)
        shares[order.index(name) + 1] = reader.indexed(SHARE_BYTES, 5)[1]
    target = fleet.names[order[0]]
    secret = target.service._vault._sums
    assert not any(key[0] == target.subject and order[0] in answers for key in secret._parts)
    try:
        joined = join_shares(shares)
    except ValueError:
        return
    assert joined != b""


# Sybils


def test_attack_27_a_device_that_is_alone_among_made_up_ones_is_behind_its_share_and_the_statement_says_so(sum_fleet):
    """The coordinator enrols four devices of its own; what it gets is one vector with one share of the noise."""
    from common.distributed_claims import distributed_claims
    from common.privacy import Randomness
    from common.secagg import Participant
    from common.secagg_coordinator import Coordinator
    from common.secagg_messages import AggregationPolicy

    fleet = sum_fleet(5)
    victim = fleet.devices[0]
    sybils = [SigningKey.generate() for _ in range(4)]
    fleet.enrol(victim.name, *(key.verify_key.hex for key in sybils))
    enrolled = {victim.name, *(key.verify_key.hex for key in sybils)}
    terms = fleet.terms()
    coordinator = Coordinator(terms, enrolled=enrolled)
    puppets = {
        key.verify_key.hex: Participant(
            terms,
            policy=AggregationPolicy(smallest_cohort=3),
            signing_key=key,
            enrolled=enrolled,
            answered=set(),
            randomness=Randomness.system(),
        )
        for key in sybils
    }
    coordinator.receive(victim.join(fleet.spec, 1))
    for puppet in puppets.values():
        coordinator.receive(puppet.keys())
    zeros = np.zeros(terms.dim, np.uint32)
    for leg in (Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK):
        for name, message in coordinator.advance().items():
            if name == victim.name:
                coordinator.receive(victim.answer(fleet.spec, 1, leg, message))
                continue
            puppet = puppets[name]
            answers = {
                Leg.SHARES: puppet.share,
                Leg.MASKED: lambda m, p=puppet: p.mask(m, zeros),
                Leg.CONSENT: puppet.consent,
                Leg.UNMASK: puppet.unmask,
            }
            coordinator.receive(answers[leg](message))
    alone = coordinator.total().astype(np.int64)
    alone[alone >= 2 ** (terms.bits - 1)] -= 2**terms.bits
    noise = SecureSum.of(fleet.spec).noise(fleet.spec, 5)
    # One share of noise is there, and no more: this is the stated limit.
    spread = math.sqrt(float(np.mean(alone.astype(float) ** 2)))
    assert 0.9 * noise.share_scale < spread < 1.1 * math.sqrt(noise.share_scale**2 + noise.sensitivity**2 / terms.dim)
    claims = distributed_claims(fleet.spec, fleet.spec.rounds)
    honest, statement = claims.collusion[-1]
    assert honest == 1
    assert statement.epsilon > 2 * claims.coordinator.epsilon
    assert "enrols devices of its own" in claims.outsiders.sentence()
    # It is charged like every other release, at the device's own count.
    assert (victim.count("debit"), victim.count("release")) == (1, 1)


def test_attack_27_devices_that_nobody_enrolled_are_refused_by_every_device(sum_fleet):
    fleet = sum_fleet(5)
    known = [device.name for device in fleet.devices[:3]]
    fleet.enrol(*known)  # the owners know three of the five
    coordinator = fleet.coordinator()
    fleet.join(coordinator)
    _, codes = fleet.leg(coordinator, Leg.SHARES)
    assert set(codes.values()) == {"unknown-key"}
    assert all(device.count("debit") == 0 for device in fleet.devices)


def test_attack_24_what_a_coordinator_changed_on_the_way_is_no_answer(sum_fleet):
    fleet = sum_fleet(3)
    coordinator = fleet.coordinator()
    keys = fleet.devices[0].join(fleet.spec, 1)
    with pytest.raises(VerificationError):
        coordinator.receive(keys[:-1] + bytes([keys[-1] ^ 1]))
    with pytest.raises(VerificationError):
        coordinator.receive(json.dumps({"keys": "none"}).encode() + bytes(100))
