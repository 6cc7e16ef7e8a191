"""What stands before a question: earlier records of the user as earlier turns, and lines about the user.

The context goes in behind the tokens that open a record and before the record's own prompt; labels stay where they
are, on the response. With a chat template, a shown record is an earlier turn and the lines are the system's turn, or
the beginning of the first turn where the template knows no system. Without one, both are paragraphs above the prompt.
Plain text, which has no prompt, is shown and continued as plain text.

The budget is in tokens and covers lines and records together, so a question costs at most the budget more than alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.user_data import Encoded, Encoder, Record
from common.errors import ConfigError

__all__ = ["Context", "ContextEncoder"]

Ids = NDArray[np.int32]
PROMPT, NEXT, RESPONSE, LINES = "HOMESPUNPROMPT", "HOMESPUNNEXT", "HOMESPUNRESPONSE", "HOMESPUNLINES"


@dataclass(frozen=True)
class Context:
    """What was put before one question.

    Attributes:
        ids: Its tokens behind what opens the question, int32, shape (tokens,).
        opening: What opens the question instead, where lines are a system's turn; None leaves the opening as it is.
        shown: Which of the offered records stand in it, in the order in which they do; the best stands last.
        lines: How many of the offered lines stand in it.
    """

    ids: Ids = field(repr=False)
    opening: Ids | None = field(default=None, repr=False)
    shown: tuple[int, ...] = ()
    lines: int = 0


@dataclass(frozen=True)
class _Turns:
    """The texts around turns, rendered once."""

    answer: str
    """Between a shown prompt and its response."""
    link: str
    """Between a shown response and the next prompt."""
    system: tuple[str, str] | None
    """From the start to the lines, and from the lines to the first prompt; None where a template has no place."""


class ContextEncoder:
    """Puts records and lines before a question, within a budget.

    Attributes:
        budget: Most tokens of a context.
    """

    def __init__(self, tokenizer: Any, encoder: Encoder, budget: int, *, longest: int | None = None) -> None:
        """Learn how the tokenizer's template writes a conversation.

        Args:
            tokenizer: A transformers tokenizer.
            encoder: Encodes records by the same tokenizer.
            budget: Most tokens of a context, at least 1.
            longest: Most tokens the base can read, where it says so.

        Raises:
            ConfigError: Context and question together are longer than the base can read.
        """
        if budget < 1:
            raise ValueError("a budget of at least one token is expected")
        if longest is not None and budget + encoder.max_tokens > longest:
            raise ConfigError(
                f"context_tokens: {budget} and max_tokens {encoder.max_tokens} are more than the {longest} tokens that "
                "the base model reads"
            )
        self.budget = budget
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._turns = _render_turns(tokenizer) if encoder.uses_chat_template else None

    def piece(self, record: Record, *, plain: bool = False) -> Ids:
        """Encode a record as it is shown; `plain` where the question is plain text, which knows no turns."""
        if plain:
            return self._ids(f"{record.prompt}\n{record.response}\n" if record.prompt else f"{record.response}\n")
        if self._turns is None:
            return self._ids(f"{record.prompt}\n{record.response}\n\n")
        return self._ids(f"{record.prompt.strip()}{self._turns.answer}{record.response.strip()}{self._turns.link}")

    def context(
        self,
        question: Record,
        pieces: Sequence[Ids] = (),
        ranked: Sequence[int] = (),
        lines: Sequence[str] = (),
        *,
        most: int | None = None,
    ) -> Context:
        """Fit lines and records into the budget, lines first, each whole or not at all.

        Args:
            question: What is asked.
            pieces: The records that may be shown, encoded by `piece`.
            ranked: Positions in `pieces`, best first; one that does not fit is passed over.
            lines: About the user, most telling first.
            most: Tokens, where that is less than the budget.
        """
        budget = self.budget if most is None else min(most, self.budget)
        opening, head, used = self._lines(question, lines, budget)
        left = budget - len(head)
        if opening is not None:
            left -= max(len(opening) - self._encoder.opening_tokens(question), 0)
        shown: list[int] = []
        for position in ranked:
            if len(pieces[position]) <= left:
                shown.append(position)
                left -= len(pieces[position])
        shown.reverse()
        ids = np.concatenate([head, *(pieces[position] for position in shown)]).astype(np.int32)
        return Context(ids, opening, tuple(shown), used)

    def put_before(self, question: Record, example: Encoded, context: Context) -> Encoded:
        """Put `context` into an encoded question, and into the other answer of a pair.

        Guarantee: the labelled tokens are those of `example`, and no token of the context is a label.
        """
        own = min(self._encoder.opening_tokens(question), example.first_label)
        opening = example.ids[:own] if context.opening is None else context.opening
        ids = np.concatenate([opening, context.ids, example.ids[own:]]).astype(np.int32)
        rejected = example.rejected
        if rejected is not None:
            rejected = self.put_before(question, rejected, context)
        return replace(
            example, ids=ids, first_label=example.first_label + len(ids) - len(example.ids), rejected=rejected
        )

    def _lines(self, question: Record, lines: Sequence[str], budget: int) -> tuple[Ids | None, Ids, int]:
        """Encode as many lines as fit: as another opening, or behind the opening; and count them."""
        nothing = np.zeros(0, np.int32)
        own = self._encoder.opening_tokens(question)
        for count in range(len(lines), 0, -1):
            text = " ".join(lines[:count])
            if self._turns is not None and self._turns.system is not None and question.prompt:
                before, behind = self._turns.system
                opening = self._ids(f"{before}{text}{behind}")
                if len(opening) - own <= budget:
                    return opening, nothing, count
            else:
                ids = self._ids(f"{text}\n\n")
                if len(ids) <= budget:
                    return None, ids, count
        return None, nothing, 0

    def _ids(self, text: str) -> Ids:
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int32)


def _render_turns(tokenizer: Any) -> _Turns:
    """Render a conversation of two turns, and one that begins with the system's, and cut them at the stand-ins."""

    def render(*turns: tuple[str, str]) -> str:
        conversation = [{"role": role, "content": content} for role, content in turns]
        return tokenizer.apply_chat_template(conversation, tokenize=False, date_string="26 Jul 2024")

    question = ("user", PROMPT)
    whole = render(question, ("assistant", RESPONSE), ("user", NEXT), ("assistant", "x"))
    _, _, rest = whole.partition(PROMPT)
    answer, found, rest = rest.partition(RESPONSE)
    link, found_next, _ = rest.partition(NEXT)
    if not (found and found_next):  # a template that keeps no history: turns are paragraphs of the prompt
        answer, link = "\n", "\n\n"
    return _Turns(answer, link, _system(render))


def _system(render: Callable[..., str]) -> tuple[str, str] | None:
    """Find what stands before and behind the lines when they are a system's turn."""
    try:
        text = render(("system", LINES), ("user", PROMPT), ("assistant", RESPONSE))
    except Exception:  # templates are code from the model's author and may raise anything
        return None
    before, found, rest = text.partition(LINES)
    behind, found_prompt, _ = rest.partition(PROMPT)
    return (before, behind) if found and found_prompt else None
