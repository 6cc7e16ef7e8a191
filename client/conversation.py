"""How a conversation becomes the tokens that a model answers.

A turn is written as training wrote it. With a chat template, the template's own turns; a system's turn where it knows
one. Without, paragraphs, each question on a line of its own and its answer below it::

    bos system text

    earlier question
    earlier answer

    question
    |                          the model goes on here

Everything has to fit into what the base can read, with room left for the answer. The last question stays whole as long
as it fits alone; then what the levels put before it (see `client.personalization.memory`), within a budget of its own;
then earlier turns, the newest first, so that the oldest are dropped first.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from client.personalization.context import ContextEncoder
from client.personalization.memory import Memory
from client.personalization.retrieval import Found
from client.user_data import Encoder, Record, whole_characters

__all__ = ["Prompt", "PromptWriter", "Turn"]

Role = Literal["system", "user", "assistant"]

LONGEST_WINDOW = 4096
"""Tokens that are read at most, also where the base could read more: a small computer could not."""
MOST_CONTEXT = 512
SMALLEST_CONTEXT = 16
LEAST_QUESTION = 8
"""Tokens of the last question that are kept whatever room the answer asks for."""


@dataclass(frozen=True)
class Turn:
    """What one side said."""

    role: Role
    text: str = field(repr=False)

    def __post_init__(self) -> None:
        """Replace halves of characters, which a client's JSON can hold and no tokenizer takes."""
        object.__setattr__(self, "text", whole_characters(self.text))


@dataclass(frozen=True)
class Prompt:
    """What the model is given, and what was put into it or left out.

    Attributes:
        ids: int32, shape (tokens,).
        found: Past records that stand in it, the best first.
        lines: Lines about the user that stand in it.
        dropped_turns: Earlier turns that did not fit.
        cut: Whether the last question itself lost its beginning.
    """

    ids: NDArray[np.int32] = field(repr=False)
    found: tuple[Found, ...] = ()
    lines: tuple[str, ...] = field(default=(), repr=False)
    dropped_turns: int = 0
    cut: bool = False


class PromptWriter:
    """Writes prompts for one tokenizer and one base.

    Attributes:
        window: Tokens of prompt and answer together, at most.
        context: Puts lines and records before a question; None where the base reads too little for that.
        encoder: Encodes records and questions.
    """

    def __init__(self, tokenizer: Any, longest: int | None, *, context_tokens: int | None = None) -> None:
        """Learn how the tokenizer writes a conversation.

        Args:
            tokenizer: A transformers tokenizer.
            longest: Most tokens that the base reads, where it says so.
            context_tokens: Most tokens of lines and records together; a quarter of the window when absent.
        """
        self.window = min(longest or LONGEST_WINDOW, LONGEST_WINDOW)
        budget = min(self.window // 4, MOST_CONTEXT) if context_tokens is None else context_tokens
        budget = min(budget, self.window // 2)
        self.encoder = Encoder(tokenizer, self.window)
        asked = Encoder(tokenizer, self.window - budget)
        self.context = ContextEncoder(tokenizer, asked, budget) if budget >= SMALLEST_CONTEXT else None
        self._pieces = ContextEncoder(tokenizer, asked, self.window)

    def write(
        self,
        turns: Sequence[Turn],
        *,
        room: int,
        memory: Memory | None = None,
        levels: Collection[str] = (),
        lines: Sequence[str] = (),
    ) -> Prompt:
        """Write the prompt of a conversation that ends with a question.

        Args:
            turns: What was said so far; the last is the user's.
            room: Tokens that the answer should have; less where the window is smaller.
            memory: What the levels draw from.
            levels: Which of `profile` and `retrieval` stand before the question.
            lines: Lines about the user that stand there in any case.

        Guarantee: prompt and room together fit into the window, as far as `LEAST_QUESTION` tokens of the question do.

        Raises:
            ValueError: There is no turn, or the last one is not the user's.
        """
        if not turns or turns[-1].role != "user":
            raise ValueError("a conversation ends with what the user says")
        system, pairs, asked = _pairs(turns)
        question = Record(asked, "?", task="reply")
        space = max(self.window - room, LEAST_QUESTION)
        whole = self.encoder.encode_prompt(asked)
        ids = whole if len(whole) <= space else self.encoder.encode_prompt(asked, self.window - space)
        told = (*system, *lines)
        shown = None
        if self.context is not None and (told or levels) and len(ids) + SMALLEST_CONTEXT <= space:
            source = memory or Memory((), self.context)
            shown = source.recall(question, levels, lines=told, budget=space - len(ids))
        opening = min(self.encoder.opening_tokens(question), len(ids))
        head, before = ids[:opening], np.zeros(0, np.int32)
        if shown is not None:
            head = head if shown.context.opening is None else shown.context.opening
            before = shown.context.ids
        left = space - (len(head) + len(before) + len(ids) - opening)
        history: list[NDArray[np.int32]] = []
        for pair in reversed(pairs):
            piece = self._pieces.piece(pair)
            if len(piece) > left:
                break
            history.append(piece)
            left -= len(piece)
        parts = (head, before, *reversed(history), ids[opening:])
        return Prompt(
            np.concatenate(parts).astype(np.int32),
            shown.found if shown is not None else (),
            shown.lines[len(system) :] if shown is not None else (),
            len(pairs) - len(history),
            len(ids) < len(whole),
        )


def _pairs(turns: Sequence[Turn]) -> tuple[tuple[str, ...], list[Record], str]:
    """Cut a conversation into the system's words, earlier questions with their answers, and the last question.

    What one side says twice in a row is one turn of two paragraphs.
    """
    system = tuple(turn.text.strip() for turn in turns if turn.role == "system" and turn.text.strip())
    pairs: list[Record] = []
    asked, answered = list[str](), list[str]()
    for turn in turns:
        if turn.role == "user":
            if answered:
                pairs.append(Record("\n".join(asked), "\n".join(answered), task="reply"))
                asked, answered = [], []
            asked.append(turn.text)
        elif turn.role == "assistant":
            answered.append(turn.text)
    return system, pairs, "\n".join(asked)
