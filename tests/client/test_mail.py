"""Mail: only the owner's own words are learned, and what they answer stands before them."""

from __future__ import annotations

from collections import Counter

import pytest

from client.mail import own_words, read_mailbox
from common.errors import ConfigError, DataError

ME, ADA = "me@example.org", "ada@example.org"


def message(sender, body, *, name="", answers="", date="Mon, 02 Mar 2026 10:00:00 +0000", more=""):
    head = f"From x Mon Mar  2 10:00:00 2026\nFrom: Somebody <{sender}>\nDate: {date}\nSubject: x\n"
    head += f"Message-ID: {name}\n" if name else ""
    head += f"In-Reply-To: {answers}\n" if answers else ""
    return f"{head}{more}\n{body}\n\n"


@pytest.fixture
def write(tmp_path):
    def one(*messages):
        path = tmp_path / "mail.mbox"
        path.write_bytes("".join(messages).encode("utf-8"))
        return path

    return one


def test_an_answer_has_what_it_answers_before_it_and_nobody_else_is_learned(write):
    path = write(
        message(ADA, "Are you coming on Friday?", name="<1>"),
        message(
            ME, "Yes, with the dog.\n\nOn Monday Ada wrote:\n> Are you coming?\n-- \nMe", name="<2>", answers="<1>"
        ),
        message(ADA, "Good.", answers="<2>"),
    )
    left = Counter()
    (record,) = read_mailbox(path, [ME.upper()], left)
    assert (record.prompt, record.response, record.task) == ("Are you coming on Friday?", "Yes, with the dog.", "reply")
    assert record.time == 1772445600.0
    assert left == {"messages of others": 2}


def test_mail_of_one_sender_needs_no_address_and_of_several_it_does(write):
    path = write(message(ME, "one"), message(ME, "two"))
    assert [record.response for record in read_mailbox(path, [], Counter())] == ["one", "two"]
    path = write(message(ME, "one"), message(ADA, "a secret"))
    with pytest.raises(ConfigError, match="2 senders; --mine") as wrong:
        read_mailbox(path, [], Counter())
    assert ADA not in str(wrong.value)


def test_html_is_read_for_its_words_and_quotations_are_left_out(write):
    more = "MIME-Version: 1.0\nContent-Type: text/html; charset=utf-8\n"
    body = "<html><style>p{}</style><p>Gr&uuml;&szlig;e,</p><p>me</p><blockquote>not mine</blockquote></html>"
    (record,) = read_mailbox(write(message(ME, body, more=more)), [], Counter())
    assert record.response.split() == ["Grüße,", "me"]


def test_what_cannot_be_read_is_counted_and_the_rest_is_read(write):
    strange = "MIME-Version: 1.0\nContent-Type: text/plain; charset=no-such-code\n"
    left = Counter()
    records = read_mailbox(write(message(ME, "fine", date="nonsense"), message(ME, "x", more=strange)), [ME], left)
    assert [record.response for record in records if record.time is None] == ["fine"]
    assert left["messages that cannot be read"] + len(records) == 2


def test_a_file_that_is_no_mailbox_is_named(write, tmp_path):
    path = tmp_path / "x.mbox"
    path.write_text("dear diary")
    with pytest.raises(DataError, match="line 1") as wrong:
        read_mailbox(path, [], Counter())
    assert "diary" not in str(wrong.value)
    path.write_text("")
    assert read_mailbox(path, [], Counter()) == []


def test_own_words_end_where_others_begin():
    assert own_words("Mine.\n\n-----Original Message-----\nFrom: Ada\ntheirs") == "Mine."
    assert own_words("> theirs\nmine\n>> deeper\n\n\n\nmine too") == "mine\n\nmine too"
    assert own_words("I wrote:\nno quotation here") == "I wrote:\nno quotation here"
