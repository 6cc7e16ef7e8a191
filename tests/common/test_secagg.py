"""Tests of the secure sum from the devices' side: it is exact, and a hostile coordinator gets a no."""

import math
import struct
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from common.errors import Refusal
from common.keys import SigningKey
from common.masks import add_streams, packed_bytes, unpack_words
from common.privacy import Randomness
from common.secagg_messages import AggregationPolicy, Leg, MessageReader, write_message
from common.secagg_roster import Member, Roster
from common.shamir import SHARE_BYTES, join_shares

LEGS = (Leg.KEYS, Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK)
HEAD = 17 + 1 + 32  # what every message begins with
SIGNED = 64


def code_of(action) -> str:
    with pytest.raises(Refusal) as refusal:
        action()
    return refusal.value.code


def body(message: bytes) -> bytes:
    """What a device's answer says, without head, name and signature."""
    return message[HEAD + 32 : -SIGNED]


def index_of(game, name) -> int:
    return sorted(game.names).index(name) + 1


# The sum


@st.composite
def dropouts(draw, most: int):
    """How many devices, and at which leg each of them is gone; None stays."""
    count = draw(st.integers(3, most))
    # Few, some or many, so that both outcomes are common.
    share = draw(st.sampled_from([0, 1, 3]))
    stays = st.none()
    return draw(st.lists(st.one_of(*[stays] * (9 - 2 * share), *map(st.just, LEGS)), min_size=count, max_size=count))


def check_any_pattern(secure_round, terms_with, pattern, seed):
    game = secure_round(len(pattern), terms=terms_with(dim=70, bits=13), seed=seed)
    dropped = {leg: [name for name, at in zip(game.names, pattern, strict=True) if at is leg] for leg in LEGS}
    left = [sum(at is None or at > leg for at in pattern) for leg in LEGS]
    needed = max(left[0] // 2 + 1, math.ceil(Fraction(2, 3) * left[0]))
    if left[0] >= 3 and left[-1] >= needed:
        game.play(dropped)
        assert (game.coordinator.total() == game.expected()).all()
    else:

        def play():
            game.play(dropped)
            game.coordinator.total()

        assert code_of(play) in {"small-cohort", "too-few"}
        assert game.coordinator.leg is None
    assert not game.refusals


@settings(max_examples=30, deadline=None)
@given(pattern=dropouts(16), seed=st.integers(0, 2**32))
def test_the_unmasked_sum_is_exact_for_any_dropouts_within_the_threshold(secure_round, terms_with, pattern, seed):
    check_any_pattern(secure_round, terms_with, pattern, seed)


@pytest.mark.parametrize("seed", [1, 2])
def test_forty_devices_of_which_some_drop_at_every_leg_sum_exactly(secure_round, terms_with, seed):
    order = Randomness.rehearsal(seed).permutation(40).tolist()
    pattern = [None] * 40
    for place, at in enumerate(order[:11]):  # three at the first leg, two at each later one
        pattern[at] = LEGS[max(0, place - 1) // 2]
    check_any_pattern(secure_round, terms_with, pattern, seed)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(pattern=dropouts(110), seed=st.integers(0, 2**32))
def test_many_devices_sum_exactly_for_any_dropouts(secure_round, terms_with, pattern, seed):
    check_any_pattern(secure_round, terms_with, pattern, seed)


@pytest.mark.slow
@pytest.mark.parametrize("leg", [Leg.MASKED, Leg.UNMASK])
def test_two_hundred_devices_in_a_graph_with_gaps_sum_exactly(secure_round, terms_with, leg):
    game = secure_round(200, terms=terms_with(dim=200, bits=17))
    game.play({leg: game.names[:20]})
    assert (game.coordinator.total() == game.expected()).all()


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_graph_with_gaps_sums_exactly_with_dropouts(secure_round, terms_with, monkeypatch, seed):
    monkeypatch.setattr("common.secagg_roster.neighbours", lambda *_: 12)
    game = secure_round(24, terms=terms_with(dim=64), seed=seed)
    gone = [game.names[at] for at in Randomness.rehearsal(seed, "gone").permutation(24)]
    game.play({Leg.SHARES: gone[:1], Leg.MASKED: gone[1:3], Leg.UNMASK: gone[3:4]})
    assert (game.coordinator.total() == game.expected()).all()
    assert len(body(game.sent[Leg.SHARES, gone[4]])) == 32 + 12 * 97


# One masked vector


def masked_vector(game, name) -> np.ndarray:
    message = game.sent[Leg.MASKED, name]
    packed = body(message)[SIGNED:]
    return unpack_words(packed, game.terms.dim, game.terms.bits)


@pytest.fixture(scope="module")
def large(secure_round, terms_with):
    """One masked vector of zeros: whatever structure it has is the masks'."""
    terms = terms_with(dim=1 << 17, bits=16)
    zeros = np.zeros(terms.dim, dtype=np.uint32)
    game = secure_round(3, terms=terms, seed=5)
    game.vectors = dict.fromkeys(game.names, zeros)
    game.play(until=Leg.MASKED)
    return masked_vector(game, game.names[0]).astype(np.int64)


# Each test fails a sound generator once in a million times; the vector is a rehearsal's, so the outcome is fixed.
LEAST_P = 1e-6


def test_a_masked_vector_passes_every_test_of_uniformity(large):
    # Frequencies of whole values, in 256 classes; of both bytes; of every single bit.
    for values in (large >> 8, large & 255):
        assert stats.chisquare(np.bincount(values, minlength=256)).pvalue > LEAST_P
    for bit in range(16):
        assert stats.binomtest(int((large >> bit & 1).sum()), large.size).pvalue > LEAST_P
    # Equidistribution over the whole range.
    assert stats.kstest((large + 0.5) / 65536, "uniform").pvalue > LEAST_P
    # Pairs of neighbours, in 16 x 16 classes: serial dependence of any kind.
    high = large >> 12
    pairs = np.bincount(high[:-1:2] * 16 + high[1::2], minlength=256)
    assert stats.chisquare(pairs).pvalue > LEAST_P
    # Serial correlation at many lags, among them those of blocks, of lanes of the packing, and of AES.
    centred = (large - 32767.5) / (65536 / 12**0.5)
    for lag in (1, 2, 3, 4, 8, 16, 64, 2048, 65536):
        correlation = float(centred[:-lag] @ centred[lag:]) / math.sqrt(large.size - lag)
        assert 2 * stats.norm.sf(abs(correlation)) > LEAST_P
    # Runs above and below the middle (Wald and Wolfowitz 1940).
    above = large > 32767
    ones = int(above.sum())
    zeros = large.size - ones
    runs = 1 + int((above[1:] != above[:-1]).sum())
    mean = 1 + 2 * ones * zeros / large.size
    spread = math.sqrt((mean - 1) * (mean - 2) / (large.size - 1))
    assert 2 * stats.norm.sf(abs(runs - mean) / spread) > LEAST_P


def test_the_battery_notices_masks_of_which_a_bit_is_stuck_or_that_repeat(large):
    for broken in (large & ~1, large | 0x0100, np.tile(large[: large.size // 2], 2), np.sort(large), large // 2):
        with pytest.raises(AssertionError):
            test_a_masked_vector_passes_every_test_of_uniformity(broken)


@pytest.mark.parametrize("change", [{"run": "ac"}, {"round": 2}, {"spec": "1" * 64}])
def test_a_masked_vector_changes_completely_with_run_and_round(secure_round, terms_with, change):
    masked = []
    for facts in ({}, change):
        # The very same keys, choices and vectors: only the terms differ.
        game = secure_round(3, terms=terms_with(dim=1 << 12, **facts), seed=7)
        game.play(until=Leg.MASKED)
        masked.append(masked_vector(game, game.names[0]))
    assert (masked[0] == masked[1]).sum() < 6  # 4,096 values of 16 bits agree 0.06 times


def test_a_masked_vector_changes_completely_with_one_other_device(secure_round, terms_with):
    terms = terms_with(dim=1 << 12)
    small, large_game = (secure_round(count, terms=terms, seed=7) for count in (3, 4))
    for game in (small, large_game):
        game.play(until=Leg.MASKED)
    name = small.names[0]
    assert (masked_vector(small, name) == masked_vector(large_game, name)).sum() < 6


# A hostile coordinator


def test_a_device_listed_as_active_and_dead_is_protected(secure_round):
    """Flower 1.41's SecAgg+ gives the victim's vector away to a coordinator that lists it twice."""
    game = secure_round(5)
    game.play(until=Leg.MASKED)
    honest = game.coordinator.advance()
    victim = index_of(game, game.names[0])
    everyone = list(range(1, 6))
    views = next(iter(honest.values()))[-5 * SIGNED :]
    both = write_message(Leg.SURVIVORS, game.terms, everyone, [victim], views)
    assert {code_of(lambda name=name: game.ask(Leg.CONSENT, name, both)) for name in game.names} == {"bad-lists"}
    # Whoever refused has forgotten its shares, and answers not even honest requests.
    assert {code_of(lambda name=name: game.ask(Leg.CONSENT, name, honest[name])) for name in game.names} == {"repeated"}
    assert {code_of(lambda name=name: game.ask(Leg.UNMASK, name, b"")) for name in game.names} == {"closed"}


@pytest.mark.parametrize("lists", ["missing", "invented", "itself dropped", "too few"])
def test_lists_that_are_not_a_partition_of_the_sharers_are_refused(secure_round, lists):
    game = secure_round(6)
    game.play({Leg.SHARES: game.names[:1]}, until=Leg.MASKED)
    game.coordinator.advance()
    gone, this = index_of(game, game.names[0]), index_of(game, game.names[1])
    sharers = [at for at in range(1, 7) if at != gone]
    others = [at for at in sharers if at != this]
    alive, dropped, code = {
        "missing": (sorted([this, *others[:3]]), [], "bad-lists"),
        "invented": (list(range(1, 7)), [], "bad-lists"),
        "itself dropped": (others, [this], "bad-lists"),
        "too few": (sorted([this, *others[:2]]), others[2:], "too-few"),
    }[lists]
    message = write_message(Leg.SURVIVORS, game.terms, alive, dropped, bytes(SIGNED) * len(alive))
    assert code_of(lambda: game.ask(Leg.CONSENT, game.names[1], message)) == code


def consents_for(game, lists):
    """Tell each device its own survivors, and return the consents that come back, by name."""
    game.play(until=Leg.MASKED)
    game.coordinator.advance()
    views = {index_of(game, name): body(game.sent[Leg.MASKED, name])[:SIGNED] for name in game.names}
    consents = {}
    for name in game.names:
        alive = lists(name)
        dropped = [at for at in views if at not in alive]
        signatures = b"".join(views[at] for at in alive)
        message = write_message(Leg.SURVIVORS, game.terms, alive, sorted(dropped), signatures)
        consents[name] = body(game.ask(Leg.CONSENT, name, message))
    return consents


def write_consents(game, consents) -> bytes:
    rows = sorted((index_of(game, name), signature) for name, signature in consents.items())
    return write_message(Leg.CONSENTS, game.terms, b"".join(struct.pack("<H", at) + row for at, row in rows))


def test_devices_that_were_told_different_survivors_do_not_unmask(secure_round):
    """The victim is dead to one half and alive to the other, so that each half would reveal one of its secrets."""
    game = secure_round(9)
    victim = index_of(game, game.names[0])
    everyone = list(range(1, 10))
    others = [at for at in everyone if at != victim]
    told = {name: everyone if at < 5 else others for at, name in enumerate(game.names)}
    consents = consents_for(game, told.__getitem__)
    for name in game.names:
        same = {other: consents[other] for other in game.names if told[other] == told[name]}
        mixed = {other: consents[other] for other in game.names if index_of(game, other) in told[name]}
        message = write_consents(game, mixed if index_of(game, name) % 2 else same)
        assert code_of(lambda name=name, message=message: game.ask(Leg.UNMASK, name, message)) in {
            "bad-signature",
            "too-few",
        }


def test_consents_that_are_too_few_forged_or_by_others_are_refused(secure_round):
    def unmask(change) -> str:
        game = secure_round(6)
        game.play({Leg.MASKED: game.names[:1]}, until=Leg.CONSENT)
        consents = {name: body(game.sent[Leg.CONSENT, name]) for name in game.names[1:]}
        change(game, consents)
        return code_of(lambda: game.ask(Leg.UNMASK, game.names[1], write_consents(game, consents)))

    def forge(game, consents):
        consents[game.names[2]] = consents[game.names[3]]

    assert unmask(lambda game, consents: [consents.pop(name) for name in game.names[2:4]]) == "too-few"
    assert unmask(lambda game, consents: consents.update({game.names[0]: bytes(SIGNED)})) == "bad-lists"
    assert unmask(forge) == "bad-signature"


def test_a_device_that_masked_for_other_sharers_stops_the_round(secure_round):
    """The victim is shown only few who shared; were it believed, it would be masked by those alone, who then drop."""
    game = secure_round(9)
    game.play(until=Leg.SHARES)
    requests = game.coordinator.advance()
    victim = game.names[0]
    index = index_of(game, victim)
    reader = MessageReader(requests[victim], Leg.DELIVERY, game.terms)
    reader.indices(9)
    boxes = reader.indexed(95, 9)
    few = sorted({index, *sorted(boxes)[:5]})
    kept = b"".join(struct.pack("<H", at) + boxes[at] for at in few if at != index)
    requests[victim] = write_message(Leg.DELIVERY, game.terms, few, kept)
    answers = {name: game.ask(Leg.MASKED, name, requests[name]) for name in game.names}
    views = b"".join(body(answers[name])[:SIGNED] for name in sorted(game.names))
    message = write_message(Leg.SURVIVORS, game.terms, list(range(1, 10)), [], views)
    codes = {name: code_of(lambda name=name: game.ask(Leg.CONSENT, name, message)) for name in game.names}
    # The victim sees sharers it was not told of; all others see a signature that is not over what they saw.
    assert codes.pop(victim) == "bad-lists"
    assert set(codes.values()) == {"bad-signature"}


@pytest.mark.parametrize("held_back", ["a share", "too many", "its own name", "an unknown sender"])
def test_shares_that_do_not_match_who_shared_are_refused(secure_round, held_back):
    game = secure_round(5)
    game.play(until=Leg.SHARES)
    request = game.coordinator.advance()[game.names[0]]
    index = index_of(game, game.names[0])
    reader = MessageReader(request, Leg.DELIVERY, game.terms)
    sharers = list(reader.indices(5))
    boxes = reader.indexed(95, 5)
    other = next(iter(boxes))
    if held_back == "a share":
        boxes.pop(other)
    elif held_back == "too many":
        sharers = [index, other]
        boxes = {other: boxes[other]}
    elif held_back == "its own name":
        sharers.remove(index)
    else:
        sharers.remove(other)
    rows = b"".join(struct.pack("<H", at) + box for at, box in sorted(boxes.items()))
    message = write_message(Leg.DELIVERY, game.terms, sorted(sharers), rows)
    code = code_of(lambda: game.ask(Leg.MASKED, game.names[0], message))
    assert code == ("too-few" if held_back == "too many" else "bad-lists")


def test_a_share_that_was_changed_or_sent_to_another_is_refused(secure_round):
    for swap in (False, True):
        game = secure_round(4)
        game.play(until=Leg.SHARES)
        requests = game.coordinator.advance()
        message = bytearray(requests[game.names[0]])
        if swap:  # the shares that were sealed for another device
            message[-95:] = requests[game.names[1]][-95:]
        else:
            message[-1] ^= 1
        assert code_of(lambda game=game, message=message: game.ask(Leg.MASKED, game.names[0], bytes(message))) == (
            "bad-share"
        )


def attack_roster(game, change) -> set[str]:
    game.leg(Leg.KEYS)
    roster = Roster.from_message(game.coordinator.advance()[game.names[0]], game.terms)
    members = {member.name.hex: member for member in roster.members}
    change(members)
    listed = tuple(sorted(members.values(), key=lambda member: member.name.raw))
    message = Roster(game.terms, listed).to_message()
    return {code_of(lambda name=name: game.ask(Leg.SHARES, name, message)) for name in game.names}


def own_key() -> bytes:
    return X25519PrivateKey.generate().public_key().public_bytes_raw()


def test_swapped_keys_are_refused(secure_round):
    """The coordinator puts keys of its own in everybody's place, to read the shares and take off the masks."""

    def swap(members):
        for name, member in members.items():
            members[name] = replace(member, mask_key=own_key(), box_key=own_key())

    assert attack_roster(secure_round(4), swap) == {"bad-signature"}


def test_keys_that_the_coordinator_signed_itself_are_refused(secure_round):
    game = secure_round(4)

    def invent(members):
        mine = SigningKey.generate()
        member = Member(mine.verify_key, own_key(), own_key())
        members[mine.verify_key.hex] = replace(member, signature=mine.sign(member.statement(game.terms)))

    assert attack_roster(game, invent) == {"unknown-key"}


def test_keys_of_another_round_are_refused(secure_round, terms_with):
    old = secure_round(4, terms=terms_with(round=2))
    old.leg(Leg.KEYS)
    before = Roster.from_message(old.coordinator.advance()[old.names[0]], old.terms)
    game = secure_round(4)

    def replay(members):
        members[before[1].name.hex] = before[1]

    assert attack_roster(game, replay) == {"bad-signature"}


def test_a_roster_without_the_device_or_with_other_keys_of_its_own_is_refused(secure_round):
    game = secure_round(5)
    game.leg(Leg.KEYS)
    roster = Roster.from_message(game.coordinator.advance()[game.names[0]], game.terms)
    gone = tuple(member for member in roster.members if member.name.hex != game.names[0])
    message = Roster(game.terms, gone).to_message()
    assert code_of(lambda: game.ask(Leg.SHARES, game.names[0], message)) == "bad-lists"


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_cohort_below_the_minimum_is_refused(secure_round, terms_with, count):
    game = secure_round(5, terms=terms_with(smallest_cohort=5), policy=AggregationPolicy(smallest_cohort=5))

    def thin(members):
        for name in list(members)[count:]:
            del members[name]

    assert attack_roster(game, thin) == {"small-cohort"}


def test_devices_that_were_shown_different_rosters_do_not_accept_each_others_shares(secure_round):
    game = secure_round(4)
    game.leg(Leg.KEYS)
    whole = game.coordinator.advance()
    members = Roster.from_message(whole[game.names[0]], game.terms).members
    names = [member.name.hex for member in members]
    shorter = Roster(game.terms, members[:3]).to_message()  # the same indices, but for the last
    shares = [game.ask(Leg.SHARES, name, shorter if at == 2 else whole[name]) for at, name in enumerate(names[:3])]
    rows = b""
    for at in (0, 1):
        boxes = body(shares[at])[32:]
        rows += struct.pack("<H", at + 1) + boxes[97 + 2 : 2 * 97]  # of each of the two, what is sealed for the third
    message = write_message(Leg.DELIVERY, game.terms, [1, 2, 3], rows)
    assert code_of(lambda: game.ask(Leg.MASKED, names[2], message)) == "bad-share"


# Once, and in order


def test_a_second_request_to_unmask_is_refused(secure_round):
    game = secure_round(4)
    game.play()
    for name in game.names:
        request = game.requests[Leg.UNMASK][name]
        assert code_of(lambda name=name, request=request: game.ask(Leg.UNMASK, name, request)) == "repeated"
    assert (game.coordinator.total() == game.expected()).all()


@pytest.mark.parametrize("leg", LEGS)
def test_no_leg_is_answered_twice_and_a_repeated_request_does_no_harm(secure_round, leg):
    game = secure_round(4)
    game.play(until=leg)
    for name in game.names:
        request = game.requests[leg][name]
        assert code_of(lambda name=name, request=request: game.ask(leg, name, request)) == "repeated"
    for later in LEGS[LEGS.index(leg) + 1 :]:
        game.leg(later)
    assert (game.coordinator.total() == game.expected()).all()


def test_no_leg_is_answered_before_its_time(secure_round):
    game = secure_round(4)
    game.play(until=Leg.SHARES)
    for leg in (Leg.CONSENT, Leg.UNMASK):
        assert code_of(lambda leg=leg: game.ask(leg, game.names[0], b"")) == "out-of-order"


def secrets_in(device) -> set[bytes]:
    """Every secret of the round that a device holds: keys, self mask, and the others' shares."""
    held = {value for value in vars(device).values() if isinstance(value, bytes) and len(value) == 32}
    held |= {key.private_bytes_raw() for key in vars(device).values() if isinstance(key, X25519PrivateKey)}
    return (held | set(device._held.values())) - {bytes(32), device._consented}  # a public digest, and no key


@pytest.mark.parametrize("ends", ["refused", "done"])
def test_a_device_forgets_its_secrets_when_the_round_ends_for_it(secure_round, ends):
    game = secure_round(4)
    game.play(until=Leg.CONSENT)
    device = game.devices[game.names[0]]
    assert len(secrets_in(device)) == 3 + 4
    request = game.coordinator.advance()[game.names[0]]
    if ends == "refused":
        assert code_of(lambda: device.unmask(request[:-1])) == "bad-message"
    else:
        device.unmask(request)
    assert secrets_in(device) == set()


def test_a_round_that_was_answered_is_refused_even_if_it_came_to_nothing(secure_round):
    game = secure_round(4)
    answered = set()
    game.join(game.names[0], answered=answered)
    assert answered == {("ab", 1)}
    assert code_of(lambda: game.join(game.names[0], answered=answered)) == "round-answered"


def test_terms_below_the_policy_are_refused_before_anything_is_sent_and_cost_no_round(secure_round):
    game = secure_round(4)
    answered = set()
    policy = AggregationPolicy(smallest_cohort=4)
    assert code_of(lambda: game.join(game.names[0], answered=answered, policy=policy)) == "small-cohort"
    assert not answered


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_damage_to_any_request_is_refused_or_changes_nothing(secure_round, data):
    leg = data.draw(st.sampled_from(LEGS[1:]))
    game = secure_round(4, seed=11)
    game.play(until=LEGS[LEGS.index(leg) - 1])
    request = bytearray(game.coordinator.advance()[game.names[0]])
    request[data.draw(st.integers(0, len(request) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(Refusal):
        game.ask(leg, game.names[0], bytes(request))


def test_a_refusal_says_a_code_and_nothing_of_the_data(secure_round, terms_with):
    terms = terms_with(dim=64, bits=32)
    game = secure_round(4, terms=terms)
    game.vectors = dict.fromkeys(game.names, np.full(64, 0xC0FFEE, dtype=np.uint32))
    game.play(until=Leg.MASKED)
    message = write_message(Leg.SURVIVORS, terms, [1], [1], bytes(SIGNED))
    with pytest.raises(Refusal) as refusal:
        game.ask(Leg.CONSENT, game.names[0], message)
    text = f"{refusal.value!r} {refusal.value} {vars(refusal.value)}"
    assert "c0ffee" not in text.lower()
    assert str(0xC0FFEE) not in text
    assert not any(name in text for name in game.names)


def test_a_vector_of_another_shape_is_the_callers_mistake_and_ends_nothing(secure_round):
    game = secure_round(4)
    game.play(until=Leg.SHARES)
    requests = game.coordinator.advance()
    for wrong in (np.zeros(63, dtype=np.uint32), np.zeros(64, dtype=np.int64)):
        with pytest.raises(ValueError, match="dimension and type"):
            game.devices[game.names[0]].mask(requests[game.names[0]], wrong)
    assert game.ask(Leg.MASKED, game.names[0], requests[game.names[0]])


# What is learned


def unmask_what_can_be(game) -> np.ndarray:
    """Take off every mask that the shares a coordinator has been given allow, knowing the protocol."""
    index = {at: name for at, name in enumerate(sorted(game.names), 1)}
    total = np.zeros(game.terms.dim, dtype=np.uint32)
    for (leg, _), message in game.sent.items():
        if leg is Leg.MASKED:
            total += unpack_words(body(message)[SIGNED:], game.terms.dim, game.terms.bits)
    shares: dict[int, dict[int, bytes]] = {}
    for (leg, name), message in game.sent.items():
        if leg is Leg.UNMASK:
            rows = body(message)
            for start in range(0, len(rows), 2 + SHARE_BYTES):
                owner = struct.unpack("<H", rows[start : start + 2])[0]
                place = next(at for at, other in index.items() if other == name)
                shares.setdefault(owner, {})[place] = rows[start + 2 : start + 2 + SHARE_BYTES]
    roster = Roster.from_message(game.requests[Leg.SHARES][game.names[0]], game.terms)
    for owner, given_shares in shares.items():
        secret = join_shares(given_shares)
        if secret is not None and (Leg.MASKED, index[owner]) in game.sent:
            add_streams(total, [(roster.self_seed(secret), False)])
    return total % 2**game.terms.bits


def test_the_attacker_of_the_next_test_succeeds_when_enough_devices_unmask(secure_round, terms_with):
    game = secure_round(6, terms=terms_with(dim=1 << 12))
    game.play({Leg.UNMASK: game.names[:2]})
    assert (unmask_what_can_be(game) == game.expected()).all()


def test_nothing_is_learned_beyond_the_threshold(secure_round, terms_with):
    game = secure_round(6, terms=terms_with(dim=1 << 12))
    game.play({Leg.UNMASK: game.names[:3]})  # 4 of 6 are needed
    assert code_of(game.coordinator.total) == "too-few"
    rest = (unmask_what_can_be(game) - game.expected()) % 2**16
    assert stats.kstest((rest + 0.5) / 65536, "uniform").pvalue > LEAST_P
    assert (rest == 0).sum() < 6


@pytest.mark.parametrize(("share", "recovers"), [(0.3, True), (0.5, False)])
@pytest.mark.parametrize("leg", LEGS[1:])
def test_dropouts_of_a_third_recover_and_of_a_half_abort_at_every_leg(secure_round, leg, share, recovers):
    game = secure_round(10)
    dropped = {leg: game.names[: int(10 * share)]}
    if recovers:
        game.play(dropped)
        assert (game.coordinator.total() == game.expected()).all()
    else:

        def play():
            game.play(dropped)
            game.coordinator.total()

        assert code_of(play) == "too-few"
        assert sum(leg_sent is Leg.UNMASK for leg_sent, _ in game.sent) in {0, 5}


def test_made_up_devices_learn_what_their_number_allows_and_no_more(secure_round, terms_with):
    """All but one device are the coordinator's: the sum less theirs is the victim's vector. It is the stated limit."""
    game = secure_round(5, terms=terms_with(dim=1 << 10))
    game.play()
    victim = game.names[0]
    theirs = sum(game.vectors[name] for name in game.names[1:])
    assert ((game.coordinator.total() - theirs) % 2**16 == game.vectors[victim]).all()


def test_what_leaves_is_of_the_size_that_is_stated(secure_round, terms_with):
    terms = terms_with(dim=1 << 10, bits=17)
    game = secure_round(10, terms=terms)
    game.play()
    name = game.names[0]
    sizes = {leg: len(game.sent[leg, name]) for leg in LEGS}
    head = HEAD + 32 + SIGNED
    assert sizes == {
        Leg.KEYS: head + 128,
        Leg.SHARES: head + 32 + 9 * 97,
        Leg.MASKED: head + 64 + packed_bytes(1 << 10, 17),
        Leg.CONSENT: head + 64,
        Leg.UNMASK: head + 10 * 35,
    }
