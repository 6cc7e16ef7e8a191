"""Prompts of conversations: as training wrote them, within the window, oldest turns dropped first."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from client.conversation import LEAST_QUESTION, PromptWriter, Turn
from client.personalization.memory import Memory
from client.user_data import Encoder, Record
from common.model_files import base_folder


@pytest.fixture(scope="module")
def chat():
    """The built-in base's tokenizer, which has a chat template."""
    return AutoTokenizer.from_pretrained(base_folder("built-in"), local_files_only=True)


@pytest.fixture(scope="module")
def plain(tiny_base_folder):
    """A tokenizer without a chat template."""
    return AutoTokenizer.from_pretrained(tiny_base_folder, local_files_only=True)


def talk(*texts):
    return [Turn("user" if index % 2 == 0 else "assistant", text) for index, text in enumerate(texts)]


def test_one_question_is_written_as_training_wrote_it(chat):
    prompt = PromptWriter(chat, 512).write(talk("where is my dog?"), room=40)
    assert prompt.ids.tolist() == Encoder(chat, 512).encode_prompt("where is my dog?").tolist()
    assert not prompt.cut
    assert prompt.dropped_turns == 0


def test_a_conversation_is_what_the_template_makes_of_it(chat):
    turns = talk("where is my dog?", "in the garden.", "and my cat?")
    said = [{"role": turn.role, "content": turn.text} for turn in turns]
    whole = chat.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert chat.decode(PromptWriter(chat, 512).write(turns, room=40).ids) == whole


def test_what_a_system_says_and_own_lines_are_the_systems_turn(chat):
    turns = [Turn("system", "Be brief."), *talk("hello")]
    prompt = PromptWriter(chat, 512).write(turns, room=40, lines=("My dog is called Rufus.",))
    assert chat.decode(prompt.ids) == "<s><|system|>Be brief. My dog is called Rufus.<|user|>hello<|assistant|>"
    assert prompt.lines == ("My dog is called Rufus.",)


def test_without_a_template_turns_are_paragraphs(plain):
    prompt = PromptWriter(plain, 64).write(talk("w5 w6", "w7", "w8"), room=8)
    assert plain.decode(prompt.ids, skip_special_tokens=True) == "w5 w6 w7 w8"


def test_what_one_side_says_twice_is_one_turn(chat):
    twice = [Turn("user", "one"), Turn("user", "two")]
    assert (
        PromptWriter(chat, 512).write(twice, room=9).ids.tolist()
        == PromptWriter(chat, 512).write(talk("one\ntwo"), room=9).ids.tolist()
    )


def test_the_oldest_turns_go_first(chat):
    turns = talk(*[f"turn number {index} of many" for index in range(61)])
    prompt = PromptWriter(chat, 256).write(turns, room=64)
    text = chat.decode(prompt.ids)
    assert len(prompt.ids) <= 256 - 64
    assert prompt.dropped_turns > 0
    assert "number 60 of" in text
    assert "number 58 of" in text
    assert "number 0 of" not in text


def test_a_question_that_is_too_long_loses_its_beginning(chat):
    prompt = PromptWriter(chat, 128).write(talk("start " + "middle " * 200 + "finish"), room=64)
    text = chat.decode(prompt.ids)
    assert prompt.cut
    assert len(prompt.ids) <= 64
    assert text.endswith("finish<|assistant|>")
    assert "start" not in text


def test_retrieved_records_stand_before_the_conversation_and_are_told(chat):
    writer = PromptWriter(chat, 512)
    records = [Record("what is my dog called?", "Biscuit", task="reply"), Record("a b", "c", task="reply")]
    memory = Memory(records, writer.context)
    turns = talk("hi", "hello", "tell me what my dog is called")
    prompt = writer.write(turns, room=40, memory=memory, levels=("retrieval",))
    text = chat.decode(prompt.ids)
    assert prompt.found[0].position == 0
    assert text.index("Biscuit") < text.index("hello") < text.index("tell me")


@pytest.mark.parametrize("turns", [[], [Turn("assistant", "x")], [Turn("user", "a"), Turn("assistant", "b")]])
def test_a_conversation_ends_with_the_user(chat, turns):
    with pytest.raises(ValueError, match="ends with"):
        PromptWriter(chat, 512).write(turns, room=40)


@settings(max_examples=60)
@given(
    texts=st.lists(st.integers(0, 60), min_size=1, max_size=12),
    system=st.integers(0, 40),
    room=st.integers(1, 300),
    window=st.integers(48, 200),
)
def test_prompt_and_room_fit_into_the_window(plain, texts, system, room, window):
    said = [" ".join(["w9"] * count) or "w3" for count in texts]
    said = said if len(said) % 2 else said[1:] or ["w3"]
    turns = talk(*said)
    turns = turns if turns[-1].role == "user" else turns[:-1]
    turns = [Turn("system", " ".join(["w4"] * system)), *turns]
    prompt = PromptWriter(plain, window).write(turns, room=room)
    assert 1 <= len(prompt.ids) <= max(window - room, LEAST_QUESTION)
    assert prompt.ids.dtype == np.int32


@pytest.mark.parametrize("writer", ["chat", "plain"])
def test_half_a_character_in_a_question_is_read_as_something(writer, request):
    writer = PromptWriter(request.getfixturevalue(writer), 256)
    cut = writer.write([Turn("system", "\udc00"), Turn("user", "w5 \ud83d")], room=4)
    whole = writer.write([Turn("system", "\ufffd"), Turn("user", "w5 \ufffd")], room=4)
    assert cut.ids.tolist() == whole.ids.tolist()
