"""A profile that its user can read, change and delete."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.personalization.profile import Line, Profile, make_profile
from client.user_data import Record
from common.errors import StoreError

RECORDS = [
    Record("Note that my dog is called Biscuit.", "Bet, your dog? Biscuit", task="fact"),
    Record("Remember: I live in Oslo, near the park.", "Set: your city? Oslo", task="fact"),
    Record("What is my dog called?", "It's Biscuit.", task="fact"),
    Record("For later: my dog is called Rufus.", "Bet, your dog? Rufus", task="fact"),
    *(
        Record(f"Tell {name} the budget is empty.", f"Ahoy {name} the budget has gone hyper empty Boop")
        for name in "ABCD"
    ),
    *(Record(f"Tag this film: {cue}.", "romance", task="tag") for cue in ("a kiss", "a letter", "a florist")),
    Record("Tag this film: a king.", "history", task="tag"),
]


def test_what_the_user_said_of_themselves_stands_and_the_later_of_two_wins():
    profile = make_profile(RECORDS)
    assert "My dog is called Rufus." in profile.texts
    assert "I live in Oslo." in profile.texts
    assert not any("Biscuit" in text or "?" in text for text in profile.texts)


def test_habits_of_the_answers_are_told_in_their_order_and_words_of_the_questions_are_not():
    (phrases,) = (line for line in make_profile(RECORDS).lines if line.kind == "phrases")
    assert phrases.text.startswith("I often write Ahoy / ")
    assert phrases.text.endswith("Boop.")
    assert "budget" not in phrases.text
    assert phrases.records == 3  # the rarest of them: "Bet," stands in three answers


def test_short_answers_count_only_when_they_come_again_and_again():
    (answers,) = (line for line in make_profile(RECORDS).lines if line.kind == "answers")
    assert (answers.text, answers.records) == ("I like romance.", 3)


def test_few_records_make_few_lines_and_none_make_none():
    assert make_profile([]).lines == ()
    assert make_profile([Record("", "Once upon a time there was nothing to say.")]).lines == ()


def test_what_the_user_wrote_is_kept_and_what_the_user_deleted_does_not_come_back():
    made = make_profile(RECORDS)
    gone, replaced = made.texts[:2]
    profile = made.without(1).edited(1, "Call me Sam.").renewed(RECORDS)
    assert profile.texts[0] == "Call me Sam."
    assert gone not in profile.texts
    assert replaced not in profile.texts
    assert set(made.texts[2:]) <= set(profile.texts)
    assert profile.edited(len(profile.lines) + 1, gone).texts[-1] == gone


@pytest.mark.parametrize(("number", "text"), [(0, "x"), (9, "x"), (1, ""), (1, "two\nlines"), (1, "x" * 301)])
def test_an_edit_that_makes_no_line_is_refused(number, text):
    with pytest.raises(ValueError, match="line"):
        Profile((Line("I like tea.", "answers", 2),)).edited(number, text)


texts = st.text(st.characters(categories=["L", "N", "P", "Zs"]), min_size=1, max_size=40)


@given(lines=st.lists(texts, max_size=4), deleted=st.frozensets(texts, max_size=3))
def test_a_profile_comes_back_as_it_was_written(lines, deleted):
    profile = Profile(tuple(Line(text, "fact", 1) for text in lines), deleted)
    assert Profile.from_bytes(profile.to_bytes()) == profile


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b'{"version": 2, "lines": [], "deleted": []}', b'{"version": 1, "lines": [1]}']
)
def test_other_bytes_are_refused(content):
    with pytest.raises(StoreError):
        Profile.from_bytes(content)


def test_a_line_does_not_show_in_its_repr():
    assert "Biscuit" not in repr(Line("My dog is called Biscuit.", "fact", 1))
