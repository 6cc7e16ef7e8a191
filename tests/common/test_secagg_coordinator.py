"""Tests of the coordinator's side: what it takes from devices that are late, mistaken or hostile."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import Refusal, VerificationError
from common.keys import SigningKey
from common.privacy import Randomness
from common.secagg import Participant
from common.secagg_messages import AggregationPolicy, Leg, digest
from common.shamir import SHARE_BYTES

LEGS = (Leg.KEYS, Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK)
SIGNED = 64


def resign(game, name, message: bytes) -> bytes:
    """Sign a changed answer, as a hostile device would."""
    message = message[:-SIGNED]
    return message + game.signing[name].sign(digest("answer", message))


def answers(game, leg) -> dict[str, bytes]:
    """Play to just before `leg` is handed in, and return its answers."""
    if leg is not Leg.KEYS:
        game.play(until=LEGS[LEGS.index(leg) - 1])
    requests = dict.fromkeys(game.names, b"") if leg is Leg.KEYS else game.coordinator.advance()
    return {name: game.ask(leg, name, requests[name]) for name in requests}


def finish(game, leg) -> np.ndarray:
    for later in LEGS[LEGS.index(leg) + 1 :]:
        game.leg(later)
    return game.coordinator.total()


@pytest.mark.parametrize("leg", LEGS)
def test_whoever_answers_twice_or_for_another_is_not_counted_again(secure_round, leg):
    game = secure_round(4)
    given_answers = answers(game, leg)
    name, other = game.names[:2]
    assert game.coordinator.receive(given_answers[name]) == name
    with pytest.raises(VerificationError, match="already"):
        game.coordinator.receive(given_answers[name])
    # The first one's answer under the second one's name, signed by the first.
    forged = bytearray(given_answers[name])
    forged[50:82] = bytes.fromhex(other)
    with pytest.raises(VerificationError, match="not a signature"):
        game.coordinator.receive(resign(game, name, bytes(forged)))
    for rest in game.names[1:]:
        game.coordinator.receive(given_answers[rest])
    vectors = sum(game.vectors.values()) % np.uint32(2**16)
    assert (finish(game, leg) == vectors).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_answers_are_as_if_they_had_not_come(secure_round, data):
    leg = data.draw(st.sampled_from(LEGS))
    game = secure_round(4, seed=3)
    name, answer = next(iter(answers(game, leg).items()))
    damaged = bytearray(answer)
    damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(VerificationError):
        game.coordinator.receive(bytes(damaged[: data.draw(st.sampled_from([len(damaged), 40, 0]))]))
    assert game.coordinator.receive(answer) == name


def test_a_device_that_is_not_enrolled_or_comes_too_late_is_not_in_the_round(secure_round):
    game = secure_round(4)
    stranger = Participant(
        game.terms,
        policy=AggregationPolicy(smallest_cohort=3),
        signing_key=SigningKey.generate(),
        enrolled=game.enrolled,
        answered=set(),
        randomness=Randomness.rehearsal(9),
    )
    with pytest.raises(VerificationError, match="owes an answer"):
        game.coordinator.receive(stranger.keys())
    late = game.join(game.names[0]).keys()
    game.leg(Leg.KEYS, without=game.names[:1])
    game.leg(Leg.SHARES)
    with pytest.raises(VerificationError, match="leg shares"):
        game.coordinator.receive(late)
    assert game.coordinator.waiting_for == frozenset()


def test_waiting_for_names_those_that_have_not_answered(secure_round):
    game = secure_round(4)
    assert game.coordinator.waiting_for == frozenset()
    game.play(until=Leg.KEYS)
    game.leg(Leg.SHARES, without=game.names[2:])
    assert game.coordinator.leg is Leg.SHARES
    assert game.coordinator.waiting_for == set(game.names[2:])


def test_a_device_that_shares_with_too_few_or_itself_is_not_counted(secure_round):
    game = secure_round(5)
    name, answer = next(iter(answers(game, Leg.SHARES).items()))
    with pytest.raises(VerificationError, match="as many others"):
        game.coordinator.receive(resign(game, name, answer[: -SIGNED - 97] + bytes(SIGNED)))
    mine = (sorted(game.names).index(name) + 1).to_bytes(2, "little")
    boxes = answer[82 + 32 : -SIGNED]
    rows = sorted(
        [mine + boxes[2:97], *(boxes[at : at + 97] for at in range(97, len(boxes), 97))],
        key=lambda row: int.from_bytes(row[:2], "little"),
    )
    with pytest.raises(VerificationError):
        game.coordinator.receive(resign(game, name, answer[: 82 + 32] + b"".join(rows) + bytes(SIGNED)))


def test_a_device_that_reveals_other_shares_than_it_holds_is_not_counted(secure_round):
    game = secure_round(5)
    name, answer = next(iter(answers(game, Leg.UNMASK).items()))
    with pytest.raises(VerificationError, match="exactly the shares"):
        game.coordinator.receive(resign(game, name, answer[: -SIGNED - 35] + bytes(SIGNED)))


@pytest.mark.parametrize("target", ["self mask", "mask key"])
def test_a_false_share_is_noticed_and_no_wrong_sum_comes_out(secure_round, target):
    game = secure_round(5)
    dropped = game.names[:1] if target == "mask key" else []
    game.play({Leg.MASKED: dropped}, until=Leg.CONSENT)
    requests = game.coordinator.advance()
    wanted = sorted(game.names).index(game.names[0]) + 1
    for name in requests:
        answer = bytearray(game.ask(Leg.UNMASK, name, requests[name]))
        for start in range(82, len(answer) - SIGNED, 2 + SHARE_BYTES):
            if int.from_bytes(answer[start : start + 2], "little") == wanted:
                answer[start + 2 + SHARE_BYTES - 1] ^= 1
        game.coordinator.receive(resign(game, name, bytes(answer)))
    with pytest.raises(VerificationError, match=f"shares of a {target}|shares do not join"):
        game.coordinator.total()


def test_too_few_or_too_many_devices_end_the_round(secure_round, terms_with):
    few = secure_round(3, terms=terms_with(smallest_cohort=4))
    few.leg(Leg.KEYS)
    with pytest.raises(Refusal) as refusal:
        few.coordinator.advance()
    assert refusal.value.code == "small-cohort"
    many = secure_round(5, terms=terms_with(largest_cohort=4))
    many.leg(Leg.KEYS)
    with pytest.raises(Refusal) as refusal:
        many.coordinator.advance()
    assert refusal.value.code == "bad-lists"


def test_a_leg_that_is_not_there_is_the_callers_mistake_and_ends_nothing(secure_round):
    game = secure_round(3)
    with pytest.raises(ValueError, match="not come to its end"):
        game.coordinator.total()
    game.play()
    with pytest.raises(ValueError, match="no leg after"):
        game.coordinator.advance()
    assert (game.coordinator.total() == game.expected()).all()


def test_an_ended_round_takes_and_gives_nothing_more(secure_round):
    game = secure_round(3)
    game.play()
    game.coordinator.total()
    assert game.coordinator.leg is None
    for again in (game.coordinator.total, game.coordinator.advance):
        with pytest.raises(ValueError, match=r"."):
            again()
    with pytest.raises(VerificationError, match="over"):
        game.coordinator.receive(game.sent[Leg.UNMASK, game.names[0]])
