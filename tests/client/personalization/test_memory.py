"""What a device remembers for the prompt: what it shows, and what it never shows."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from client.personalization.context import ContextEncoder
from client.personalization.memory import Memory
from client.user_data import Encoder, Record, split
from simulations.worlds.built_in import base_folder, built_in_user


@pytest.fixture(scope="module")
def encoders():
    tokenizer = AutoTokenizer.from_pretrained(base_folder())
    encoder = Encoder(tokenizer, 64)
    return tokenizer, encoder, ContextEncoder(tokenizer, encoder, 96)


def test_what_was_retrieved_is_what_stands_in_the_prompt_best_first(encoders):
    tokenizer, encoder, context_encoder = encoders
    parts = split(built_in_user(0, 3))
    memory = Memory(parts.train, context_encoder)
    for question in parts.test:
        shown = memory.retrieve(question)
        asked = memory.with_retrieval(question, encoder.encode(question))
        text = tokenizer.decode(asked.ids)
        assert shown.found
        assert [one.position for one in shown.found] == list(reversed(shown.context.shown))
        for one in shown.found:
            record = parts.train[one.position]
            assert f"{record.prompt}<|assistant|>{record.response}</s>" in text
        scores = [one.score for one in shown.found]
        assert scores == sorted(scores, reverse=True)


def test_the_answer_of_a_question_is_not_looked_at(encoders):
    context_encoder = encoders[2]
    parts = split(built_in_user(0, 3))
    memory = Memory(parts.train, context_encoder)
    for question in parts.test:
        other = Record(question.prompt, "something else entirely", question.time, question.task)
        assert memory.retrieve(question).found == memory.retrieve(other).found


def test_in_training_a_record_is_not_shown_itself(encoders):
    tokenizer, encoder, context_encoder = encoders
    records = [Record(f"Tell Ben number {n}.", f"Ahoy {n}") for n in range(5)]
    memory = Memory(records, context_encoder)
    for position, record in enumerate(records):
        asked = memory.with_retrieval(record, encoder.encode(record), own=position)
        assert f"Ahoy {position}" not in tokenizer.decode(asked.ids[: asked.first_label])
        assert all(one.position != position for one in memory.retrieve(record, own=position).found)


def test_plain_text_is_shown_only_what_came_before_it(encoders):
    _, _, context_encoder = encoders
    records = [Record("", f"line {n}") for n in range(5)]
    memory = Memory(records, context_encoder)
    assert [one.position for one in memory.retrieve(records[2], own=2).found] == [1, 0]
    assert memory.retrieve(records[0], own=0).found == ()


def test_the_profile_is_made_from_the_records_unless_one_is_given(encoders):
    tokenizer, encoder, context_encoder = encoders
    records = [Record("Note that my dog is called Biscuit.", "Noted.")]
    question = Record("What is my dog called?", "Biscuit")
    memory = Memory(records, context_encoder)
    asked = memory.with_profile(question, encoder.encode(question))
    assert "<|system|>My dog is called Biscuit.<|user|>" in tokenizer.decode(asked.ids)
    edited = Memory(records, context_encoder, profile=memory.profile.edited(1, "I have no dog."))
    asked = edited.with_profile(question, encoder.encode(question))
    assert "Biscuit" not in tokenizer.decode(asked.ids[: asked.first_label])
