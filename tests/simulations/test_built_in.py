import hashlib
import itertools
import json
import subprocess
import sys
import time
import tracemalloc
from dataclasses import astuple
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulations.worlds.built_in import WORLD_VERSION, base_folder, built_in_user, population, public_people
from simulations.worlds.lexicon import CUSTOMS, FACTS, GENRE_CUES, LATE_TAGS, REGISTERS, SLOTS, TAGS

ROOT = Path(__file__).parents[2]
PUBLISHED = {1: "754b1ad88f38692babb6eec64d5ad59d1815e8504fe056451e8f21072208a2cb"}
"""World version -> digest of its first users."""

NUMBERS = st.integers(min_value=0, max_value=2**40)


def digest(users):
    text = json.dumps([[user.id, [astuple(record) for record in user.records]] for user in users])
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.fixture(scope="module")
def users():
    return list(population(3, 400))


@pytest.fixture(scope="module")
def records(users):
    return [record for user in users for record in user.records]


@settings(max_examples=25, deadline=None)
@given(seed=NUMBERS, index=NUMBERS)
def test_a_seed_and_an_index_always_give_the_same_user(seed, index):
    assert built_in_user(seed, index) == built_in_user(seed, index)


def test_another_process_makes_the_users_that_this_version_published():
    code = (
        "import hashlib, json; from dataclasses import astuple; from simulations.worlds.built_in import population;"
        "users = population(0, 5);"
        "text = json.dumps([[user.id, [astuple(record) for record in user.records]] for user in users]);"
        "print(hashlib.sha256(text.encode()).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == digest(population(0, 5)) == PUBLISHED[WORLD_VERSION]


def test_a_user_does_not_depend_on_how_many_there_are():
    assert population(0, 10)[7] == population(0, 100_000)[7] == built_in_user(0, 7)


def test_users_of_other_seeds_and_indices_are_other_people():
    found = [built_in_user(seed, index) for seed in range(3) for index in range(30)]
    assert len({user.id for user in found}) == len({user.records for user in found}) == 90


def test_public_people_are_never_users():
    public = list(public_people(50))
    people = [built_in_user(seed, index) for seed in range(2) for index in range(50)]
    assert not {person.id for person in public} & {user.id for user in people}
    assert not {person.records for person in public} & {user.records for user in people}


def test_public_people_can_be_asked_for_in_parts():
    assert list(public_people(6))[4:] == list(public_people(2, first=4))


def test_a_population_is_a_sequence():
    some = population(5, 4)
    assert [user.id for user in some] == [f"user-5-{index}" for index in range(4)]
    assert len(some) == 4
    assert some[-1] == some[3] == some[2:][1]
    with pytest.raises(IndexError):
        some[4]


def test_a_large_population_takes_no_memory_until_users_are_asked_for():
    tracemalloc.start()
    crowd = population(0, 10_000_000)
    last = crowd[9_999_999]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert last.id == "user-0-9999999"
    assert peak < 2_000_000


def test_making_a_user_takes_about_half_a_millisecond(slower):
    began = time.process_time()
    for index in range(300):
        built_in_user(11, index)
    assert (time.process_time() - began) / 300 < 0.004 * slower


@pytest.mark.parametrize(
    "make", [built_in_user, population, lambda seed, count: list(public_people(count, first=seed))]
)
def test_negative_numbers_are_refused(make):
    with pytest.raises(ValueError, match="negative"):
        make(-1, 3)


def test_record_counts_run_from_10_to_500_with_a_heavy_tail(users):
    counts = sorted(len(user.records) for user in users)
    assert counts[0] == 10
    assert counts[-1] == 500
    assert 15 <= counts[200] <= 30
    assert sum(counts[-40:]) > 0.4 * sum(counts), "a tenth of the users has a good part of the records"


def test_records_are_dated_in_order(users):
    for user in users:
        times = [record.time for record in user.records]
        assert all(earlier < later for earlier, later in itertools.pairwise(times))


def test_users_live_later_than_public_people(users):
    assert max(record.time for person in public_people(100) for record in person.records) < min(
        record.time for user in users for record in user.records
    )


def test_records_have_the_shapes_of_the_field(records):
    assert {record.task for record in records} == {
        "note", "subject", "tag", "rating", "fact", "choice", "preference"
    }  # fmt: skip
    assert {record.kind for record in records} == {"extraction", "abstraction", "generalization"}
    for record in records:
        assert record.prompt
        assert record.response
        assert record.prompt == record.prompt.strip()
        assert record.response == record.response.strip()
        assert (record.rejected is not None) == (record.task == "preference")
        assert record.rejected != record.response
        assert (record.kind == "extraction") == (record.task == "fact")
        assert (record.kind == "generalization") == (record.task == "choice")
        if record.task == "tag":
            assert record.response in TAGS
        if record.task == "rating":
            assert record.response in {"1", "2", "3", "4", "5"}


def test_a_fact_that_is_asked_for_was_told_before(users):
    asked = 0
    for user in users[:100]:
        told = {}
        for record in user.records:
            if record.task != "fact":
                continue
            said = next((fact for fact in FACTS if f" {fact} " in record.prompt), None)
            if said is not None:
                told[said] = record.prompt.rsplit(" ", 1)[1].rstrip(".")
                assert told[said] in record.response
            else:
                fact = next(fact for fact, (questions, _, _) in FACTS.items() if record.prompt in questions)
                assert told[fact] in record.response
                asked += 1
    assert asked > 100


def share(records, test):
    found = [test(record) for record in records]
    return sum(found) / len(found)


def test_today_is_not_what_the_public_text_says(records):
    public = [record for person in public_people(400) for record in person.records]
    of = lambda where, task: [record for record in where if record.task == task]  # noqa: E731
    late_tag = lambda record: record.response in LATE_TAGS  # noqa: E731
    stamped = lambda record: CUSTOMS["stamp"][1] in record.response  # noqa: E731
    top = lambda record: record.response == "5"  # noqa: E731
    for task, sign in (("tag", late_tag), ("note", stamped), ("rating", top)):
        now, then = share(of(records, task), sign), share(of(public, task), sign)
        assert now > then + 0.15, task
        assert then > 0.01, "the base must have seen what it does not expect"


def test_people_keep_to_their_own_phrases(users):
    greetings = [
        [record.response.split()[0] for record in user.records if record.task == "note"]
        for user in users
        if len(user.records) >= 40
    ]
    favourites = [max(set(said), key=said.count) for said in greetings]
    faithful = sum(said.count(one) for said, one in zip(greetings, favourites, strict=True)) / sum(map(len, greetings))
    assert faithful > 0.75
    assert len(set(favourites)) >= 6, "and differ from one another"


def test_the_lexicon_is_complete_and_says_nothing_twice():
    for early, late in SLOTS.values():
        assert len(early) == len(late) == len(REGISTERS)
    for slot in SLOTS.keys() - {"mark"}:
        phrases = [phrase for era in SLOTS[slot] for pair in era for phrase in pair]
        assert len(phrases) == len(set(phrases)), slot
    cues = [cue for some in GENRE_CUES.values() for cue in some]
    assert len(cues) == len(set(cues))
    assert set(TAGS) > LATE_TAGS


def test_the_base_lies_beside_the_world():
    assert (base_folder() / "config.json").is_file()
