"""Tests of what is signed, agreed and derived from who is in a round."""

from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from common.errors import Refusal
from common.keys import SigningKey
from common.privacy import Randomness
from common.secagg_roster import Member, Roster

COUNT = 5


@pytest.fixture
def made(terms_with):
    """A roster of five devices, and their private keys by index."""
    terms = terms_with()
    signing = sorted(
        (SigningKey(Randomness.rehearsal(1, at).bytes(32)) for at in range(COUNT)), key=lambda key: key.verify_key.raw
    )
    masks = [X25519PrivateKey.from_private_bytes(Randomness.rehearsal(2, at).bytes(32)) for at in range(COUNT)]
    boxes = [X25519PrivateKey.from_private_bytes(Randomness.rehearsal(3, at).bytes(32)) for at in range(COUNT)]
    members = []
    for key, mask, box in zip(signing, masks, boxes, strict=True):
        member = Member(key.verify_key, mask.public_key().public_bytes_raw(), box.public_key().public_bytes_raw())
        members.append(replace(member, signature=key.sign(member.statement(terms))))
    return Roster(terms, tuple(members)), signing, masks, boxes


def everyone(roster) -> set[str]:
    return {member.name.hex for member in roster.members}


def code_of(roster, enrolled) -> str:
    with pytest.raises(Refusal) as refusal:
        roster.check(enrolled)
    return refusal.value.code


def test_a_roster_is_read_as_it_was_written_and_checks_out(made):
    roster = made[0]
    read = Roster.from_message(roster.to_message(), roster.terms)
    assert read == roster
    assert read.digest == roster.digest
    read.check(everyone(roster))


def test_a_roster_that_is_not_of_enrolled_devices_in_order_is_refused(made, terms_with):
    roster = made[0]
    enrolled = everyone(roster)
    members = roster.members
    assert code_of(replace(roster, members=members[:2]), enrolled) == "small-cohort"
    assert code_of(replace(roster, members=members[::-1]), enrolled) == "bad-lists"
    assert code_of(replace(roster, members=(members[0], *members)), enrolled) == "bad-lists"
    assert code_of(roster, enrolled - {members[3].name.hex}) == "unknown-key"
    assert code_of(replace(roster, terms=terms_with(largest_cohort=4)), enrolled) == "bad-lists"


@pytest.mark.parametrize("name", ["mask_key", "box_key", "signature"])
def test_a_changed_key_or_signature_is_refused(made, name):
    roster = made[0]
    was = getattr(roster[2], name)
    changed = replace(roster[2], **{name: was[:-1] + bytes([was[-1] ^ 1])})
    assert code_of(replace(roster, members=(roster[1], changed, *roster.members[2:])), everyone(roster)) == (
        "bad-signature"
    )


def test_keys_that_were_signed_for_another_round_are_refused(made, terms_with):
    roster = made[0]
    assert code_of(replace(roster, terms=terms_with(round=2)), everyone(roster)) == "bad-signature"


def test_both_sides_derive_the_same_seeds_and_boxes_and_no_two_pairs_do(made):
    roster, _, masks, boxes = made
    seeds = set()
    keys = set()
    for one in range(1, COUNT + 1):
        for two in range(1, COUNT + 1):
            if one == two:
                continue
            seed = roster.pair_seed(masks[one - 1], one, two)
            assert seed == roster.pair_seed(masks[two - 1], two, one)
            seeds.add(seed)
            sealed = roster.box_key(boxes[one - 1], one, one, two)
            assert sealed == roster.box_key(boxes[two - 1], two, one, two)
            keys.add(sealed)
    assert len(seeds) == COUNT * (COUNT - 1) / 2
    assert len(keys) == COUNT * (COUNT - 1)  # one key for each direction


def test_seeds_change_with_run_and_round(made, terms_with):
    roster, _, masks, _ = made
    others = [
        replace(roster, terms=terms_with(**change)) for change in ({"run": "ac"}, {"round": 2}, {"spec": "1" * 64})
    ]
    assert len({one.pair_seed(masks[0], 1, 2) for one in (roster, *others)}) == 4
    assert len({one.self_seed(bytes(32)) for one in (roster, *others)}) == 4


def test_a_device_without_a_usable_key_is_refused(made):
    roster, _, masks, boxes = made
    broken = replace(roster, members=(replace(roster[1], mask_key=bytes(32), box_key=bytes(32)), *roster.members[1:]))
    for agree in (lambda: broken.pair_seed(masks[1], 2, 1), lambda: broken.box_key(boxes[1], 2, 1, 2)):
        with pytest.raises(Refusal) as refusal:
            agree()
        assert refusal.value.code == "bad-key"


def test_what_is_signed_says_all_that_it_must(made):
    roster = made[0]
    fewer = replace(roster, members=roster.members[:4])
    said = [roster.view([1, 2, 3]), roster.view([1, 2]), fewer.view([1, 2, 3])]
    said += [roster.consent([1, 2, 3], [1, 2], [3]), roster.consent([1, 2, 3], [1], [2, 3])]
    said += [roster.consent([1, 2, 3, 4], [1, 2], [3]), roster.consent([1, 2, 3], [1, 2], []), roster.digest]
    said += [roster.commitment(1, bytes(32)), roster.commitment(2, bytes(32)), roster.commitment(1, b"1" * 32)]
    assert len(set(said)) == len(said)
