"""What stands before a question: labels stay, budgets hold, templates are followed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from client.personalization.context import ContextEncoder
from client.user_data import Encoder, Record
from simulations.worlds.built_in import base_folder

SYSTEMLESS = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
DOG = Record("Note that my dog is called Biscuit.", "Bet, your dog? Biscuit")
QUESTION = Record("What is my dog called?", "It's Biscuit.")


def tokenizer_with(template="own"):
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    if template != "own":
        tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizers():
    return {template: tokenizer_with(template) for template in ("own", SYSTEMLESS, None)}


def ask(tokenizer, question, records=(), lines=(), budget=96):
    encoder = Encoder(tokenizer, 64)
    context_encoder = ContextEncoder(tokenizer, encoder, budget)
    alone = encoder.encode(question)
    pieces = [context_encoder.piece(record, plain=not question.prompt) for record in records]
    context = context_encoder.context(question, pieces, range(len(records)), lines)
    return alone, context, None if alone is None else context_encoder.put_before(question, alone, context)


def test_a_record_is_an_earlier_turn_and_lines_are_the_system_s(tokenizers):
    tokenizer = tokenizers["own"]
    _, _, asked = ask(tokenizer, QUESTION, [DOG], ["I like cozy."])
    rendered = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "I like cozy."},
            {"role": "user", "content": DOG.prompt},
            {"role": "assistant", "content": DOG.response},
            {"role": "user", "content": QUESTION.prompt},
            {"role": "assistant", "content": QUESTION.response},
        ],
        tokenize=False,
    )
    assert tokenizer.decode(asked.ids) == rendered
    assert tokenizer.decode(asked.ids[asked.first_label :]) == "It's Biscuit.</s>"


def test_a_template_without_a_system_gets_the_lines_in_the_first_turn(tokenizers):
    tokenizer = tokenizers[SYSTEMLESS]
    _, _, asked = ask(tokenizer, QUESTION, [DOG], ["I like cozy."])
    assert tokenizer.decode(asked.ids).startswith(
        f"<|user|>I like cozy.\n\n{DOG.prompt}<|assistant|>{DOG.response}</s>"
    )


def test_without_a_template_records_are_paragraphs(tokenizers):
    tokenizer = tokenizers[None]
    _, _, asked = ask(tokenizer, QUESTION, [DOG], ["I like cozy."])
    expected = f"I like cozy.\n\n{DOG.prompt}\n{DOG.response}\n\n{QUESTION.prompt}\n{QUESTION.response}"
    assert expected in tokenizer.decode(asked.ids)


def test_plain_text_is_continued_as_plain_text(tokenizers):
    tokenizer = tokenizers["own"]
    alone, _, asked = ask(
        tokenizer, Record("", "Ahoy Ben, the budget is empty."), [Record("", "Ahoy Mia, all is well.")]
    )
    assert "<|user|>" not in tokenizer.decode(asked.ids)
    assert "Ahoy Mia, all is well.\nAhoy Ben" in tokenizer.decode(asked.ids)
    assert (asked.ids[asked.first_label :] == alone.ids[alone.first_label :]).all()


def test_the_best_record_stands_next_to_the_question_and_one_that_does_not_fit_is_passed_over(tokenizers):
    tokenizer = tokenizers["own"]
    records = [DOG, Record("word " * 60, "long"), Record("Tag this film: a kiss and a king by the sea.", "romance")]
    _, context, asked = ask(tokenizer, QUESTION, records, budget=56)
    assert context.shown == (2, 0)
    text = tokenizer.decode(asked.ids)
    assert text.index("romance") < text.index("Note that my dog")


def test_both_answers_of_a_pair_get_the_same_context(tokenizers):
    pair = Record("Tell Ben the budget is empty.", "Ahoy Ben", None, "preference", "Dear Ben")
    _, _, asked = ask(tokenizers["own"], pair, [DOG])
    assert asked.first_label == asked.rejected.first_label
    assert (asked.ids[: asked.first_label] == asked.rejected.ids[: asked.first_label]).all()


def test_a_budget_of_nothing_is_a_mistake(tokenizers):
    with pytest.raises(ValueError, match="budget"):
        ContextEncoder(tokenizers["own"], Encoder(tokenizers["own"], 64), 0)


words = st.text(alphabet="abcdefgh .,?!", min_size=1, max_size=60).filter(str.strip)


@settings(max_examples=100, deadline=None)
@given(
    question=st.tuples(st.one_of(st.just(""), words), words),
    records=st.lists(st.tuples(words, words), max_size=6),
    lines=st.lists(words, max_size=4),
    budget=st.integers(1, 80),
    template=st.sampled_from(["own", SYSTEMLESS, None]),
)
def test_labels_are_the_question_s_own_and_the_budget_holds(tokenizers, question, records, lines, budget, template):
    shown = [Record(*one) for one in records]
    alone, context, asked = ask(tokenizers[template], Record(*question), shown, lines, budget)
    if alone is None:
        return
    assert (asked.ids[asked.first_label :] == alone.ids[alone.first_label :]).all()
    assert len(asked.ids) - len(alone.ids) <= budget
    assert asked.ids.dtype == np.int32
    assert context.lines <= len(lines)
    assert len(set(context.shown)) == len(context.shown)
