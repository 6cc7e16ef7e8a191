"""A user's records: what they are, how they are split, and how they become tokens.

A record is read once, by whoever holds it, and never leaves: nothing here has a text in its `repr` or in an error.

How a record becomes tokens, with `|` where the labels begin:

- plain text (no prompt)::

    bos text|...          every token after the first is a label; bos and eos as the tokenizer itself adds them

- prompt and response, where the tokenizer has a chat template: the template with one user and one assistant turn.
  Labels are the assistant's turn up to its end-of-turn token, without the white space that a template puts after it.
- prompt and response, where it has none::

    bos prompt newline | response eos

This module imports neither torch nor transformers; the tokenizer is an argument.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.errors import DataError

__all__ = ["HELD_OUT", "Encoded", "Encoder", "Record", "Split", "User", "split"]

HELD_OUT = "held-out"
"""`Record.kind` of a record that the data set itself sets aside: `split` tests on these and on no others."""

SMALLEST_SPLIT = 3
"""Records a user needs to be scored: one to train on, one to choose with, one to test on."""

BATCH = 2048
"""Records tokenized at a time; bounds memory, and is enough to keep a fast tokenizer's threads busy."""


@dataclass(frozen=True, slots=True)
class Record:
    """One thing a user wrote, was answered, or preferred.

    Attributes:
        prompt: What came before; empty for plain text.
        response: What is learned: the text itself, the answer, or the preferred answer.
        time: Seconds since 1970 UTC, or any number that grows with time; None where unknown.
        task: What is asked, and so how it is scored: "text", "reply", "preference", or a data set's own name.
        rejected: The answer that was not preferred; None outside preference pairs.
        kind: A data set's own label for the record, or `HELD_OUT`.
    """

    prompt: str = field(repr=False)
    response: str = field(repr=False)
    time: float | None = field(default=None, repr=False)
    task: str = "text"
    rejected: str | None = field(default=None, repr=False)
    kind: str | None = None

    def __post_init__(self) -> None:
        """Replace halves of characters, so that whatever is made of a record can be written and tokenized."""
        for name in ("prompt", "response", "rejected"):
            text = getattr(self, name)
            object.__setattr__(self, name, text and whole_characters(text))

    @property
    def empty(self) -> bool:
        """Whether there is nothing to learn: no response, or an answer of a pair is missing."""
        return not self.response.strip() or (self.rejected is not None and not self.rejected.strip())


@dataclass(frozen=True, slots=True)
class User:
    """A person and what is theirs.

    Attributes:
        id: The data set's own name for the person. Opaque: never a file name, never in a message.
        records: In the order of the source.
        profile: Short statements about the person, in the order of the source.
    """

    id: str = field(repr=False)
    records: tuple[Record, ...] = field(repr=False)
    profile: tuple[str, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Split:
    """A user's records in three parts, or none and the reason.

    Attributes:
        train: The earliest.
        validation: The next, to choose with.
        test: The last.
        reason: Why the user has no parts and is not scored; None where there are parts.
        dropped: How many records are in no part because they are empty.
    """

    train: tuple[Record, ...] = field(default=(), repr=False)
    validation: tuple[Record, ...] = field(default=(), repr=False)
    test: tuple[Record, ...] = field(default=(), repr=False)
    reason: str | None = None
    dropped: int = 0


def split(user: User, validation: float = 0.2, test: float = 0.2, *, by_record: bool = False) -> Split:
    """Split a user's records: the last to test, those before to choose with, the rest to train.

    By time where every record has one (stable, so equal times keep their order), else by the order of the source:
    a random split would leak topic from the test into the training. Each part gets its share rounded down, and
    at least one record. Where records are marked `HELD_OUT`, they are the test part whatever `test` says. Empty
    records are left out and counted.

    Args:
        user: Whose records.
        validation: Share of the records that are not held out by the data set, in (0, 1).
        test: Share of the records, in (0, 1).
        by_record: Let a digest of each record decide its part, in whatever shares come of it. Counting moves other
            records between the parts when one is added or removed; where a record is the unit of privacy, none may.

    Guarantee:
        Every record that is not empty is in exactly one part, or there is a `reason` and no part. With `by_record` a
        record's part depends on nothing but that record.

    Raises:
        ValueError: The shares are not positive or leave nothing to train on.
    """
    if not (validation > 0 and test > 0 and validation + test < 1):
        raise ValueError("validation and test must be positive shares with a sum below 1")
    records = tuple(record for record in user.records if not record.empty)
    dropped = len(user.records) - len(records)
    if by_record:
        parts: tuple[list[Record], ...] = ([], [], [])
        for record in records:
            parts[_part_of(record, validation, test)].append(record)
        return Split(tuple(parts[0]), tuple(parts[1]), tuple(parts[2]), dropped=dropped)
    if all(record.time is not None for record in records):
        records = tuple(sorted(records, key=_time_of))
    held_out = tuple(record for record in records if record.kind == HELD_OUT)
    rest = tuple(record for record in records if record.kind != HELD_OUT)
    if len(rest) < (2 if held_out else SMALLEST_SPLIT):
        return Split(reason=f"{len(records)} usable records, too few for three parts", dropped=dropped)
    test_count = 0 if held_out else min(max(1, math.floor(len(rest) * test)), len(rest) - 2)
    left = len(rest) - test_count
    validation_count = min(max(1, math.floor(len(rest) * validation)), left - 1)
    return Split(
        train=rest[: left - validation_count],
        validation=rest[left - validation_count : left],
        test=held_out or rest[left:],
        dropped=dropped,
    )


def _part_of(record: Record, validation: float, test: float) -> int:
    """Say from a record alone whether it is for training (0), validation (1) or test (2)."""
    text = repr((record.prompt, record.response, record.rejected, record.time, record.task))
    coin = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) / 2.0**64
    return 2 if record.kind == HELD_OUT or coin < test else int(coin < test + validation)


def _time_of(record: Record) -> float:
    return 0.0 if record.time is None else record.time


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """A record as the model sees it; never padded.

    Attributes:
        ids: int32, shape (tokens,).
        first_label: Position of the first token that counts in the loss, at least 1: the token at position p is
            predicted from those before p, so labels are the positions >= first_label.
        truncated: Whether anything was cut, prompt or response.
        response_cut: Whether the response itself was cut, and so has no end token.
        rejected: The other answer of a preference pair, after the very same prompt tokens.
        uncut_tokens: What the record would have been without a limit, in tokens.
    """

    ids: NDArray[np.int32] = field(repr=False)
    first_label: int
    truncated: bool = False
    response_cut: bool = False
    rejected: Encoded | None = None
    uncut_tokens: int = 0

    @property
    def labels(self) -> NDArray[np.bool_]:
        """The loss mask, bool, shape (tokens,)."""
        return np.arange(len(self.ids)) >= self.first_label


class _Frame(NamedTuple):
    """A chat template, rendered once: what stands before, between and after a prompt and its response."""

    before: str
    between: str
    opening: str
    """What the template puts before the response and the model has to say itself, such as an empty thought."""
    end: str
    strips_prompt: bool
    strips_response: bool


class Encoder:
    """Turns records into tokens and labels for one tokenizer.

    Attributes:
        max_tokens: Longest sequence made.
        pad_id: What to pad with: the tokenizer's pad token, else its end token, else 0. Padding is the caller's, and
            is no label: labels are positions of `Encoded.ids`, which has none.
        uses_chat_template: Whether prompts and responses go through the tokenizer's chat template.
    """

    def __init__(self, tokenizer: Any, max_tokens: int) -> None:
        """Learn the tokenizer's habits; `tokenizer` is a transformers tokenizer, fast ones are much faster.

        Raises:
            ValueError: `max_tokens` is below 2: nothing could be predicted from anything.
            DataError: The tokenizer's chat template cannot render a prompt and a response.
        """
        if max_tokens < 2:
            raise ValueError("max_tokens must be at least 2")
        self._tokenizer = tokenizer
        self.max_tokens = max_tokens
        self._bos: int | None = tokenizer.bos_token_id
        eos: int | None = tokenizer.eos_token_id
        self._head, self._tail = self._special_tokens()
        self._end = self._tail or ([] if eos is None else [eos])
        self.pad_id: int = next((token for token in (tokenizer.pad_token_id, eos) if token is not None), 0)
        self._frame = _render_once(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        self.uses_chat_template = self._frame is not None
        self._before = len(self._head)
        self._smallest_frame = self._before + 1
        if self._frame is not None:
            before, between = self._tokenize([self._frame.before, self._frame.between])
            self._before = len(before)
            self._smallest_frame = len(before) + len(between)

    def opening_tokens(self, record: Record) -> int:
        """Count the tokens that open every record of this one's kind, behind which other text may be put."""
        return self._before if record.prompt else len(self._head)

    def encode(self, record: Record) -> Encoded | None:
        """Encode one record; None where its response, or either answer of a pair, is empty."""
        return self.encode_batch([record])[0]

    def encode_batch(self, records: Iterable[Record]) -> list[Encoded | None]:
        """Encode many records, in order; None stands for one that was dropped because it has nothing to learn.

        The end of a prompt is worth more than its beginning: where a record is too long, the response is kept and
        the prompt loses tokens from the left, behind the tokens that open it. Only a response that fills
        `max_tokens` alone is cut, at its end. Plain text is cut at its end.

        Guarantee:
            Of every result: 2 <= tokens <= `max_tokens`, 1 <= first_label < tokens, and no label belongs to the prompt.
        """
        source = iter(records)
        result: list[Encoded | None] = []
        while batch := list(islice(source, BATCH)):
            result.extend(self._encode(batch))
        return result

    def encode_prompt(self, prompt: str, room: int = 0) -> NDArray[np.int32]:
        """Encode a prompt as training did, ready for the model to answer.

        Args:
            prompt: What the user says; empty for a text that begins from nothing.
            room: Tokens to leave free below `max_tokens` for the answer.

        Returns:
            int32, shape (tokens,), at least one token where the tokenizer or the prompt gives any.
        """
        prefix = self._tokenize_prefixes([whole_characters(prompt)])[0] if prompt else self._head
        return np.asarray(self._cut_prefix(prefix, max(self.max_tokens - room, 1)), dtype=np.int32)

    def _encode(self, records: Sequence[Record]) -> list[Encoded | None]:
        """Tokenize a batch in one call for whole texts and one for prompts, then assemble record by record."""
        said = [record for record in records if not record.empty]
        pairs = [(one.prompt, answer) for one in said for answer in (one.response, one.rejected) if answer is not None]
        parts = iter(self._parts([prompt for prompt, _ in pairs], [answer for _, answer in pairs]))
        result: list[Encoded | None] = []
        for record in records:
            if record.empty:
                result.append(None)
                continue
            prefix, answer = next(parts)
            if record.rejected is None:
                result.append(self._assemble(prefix, answer, len(answer)))
                continue
            _, rejected = next(parts)
            longest = max(len(answer), len(rejected))  # one cut for both, so that they answer the same prompt
            chosen_encoded = self._assemble(prefix, answer, longest)
            rejected_encoded = self._assemble(prefix, rejected, longest)
            if chosen_encoded is None or rejected_encoded is None:
                result.append(None)
                continue
            result.append(replace(chosen_encoded, rejected=rejected_encoded))
        return result

    def _parts(self, prompts: list[str], answers: list[str]) -> list[tuple[list[int], list[int]]]:
        """Tokenize prompt and answer so that the prompt's tokens are those the model will be given at use.

        A whole text is tokenized at once, as text is; where that does not begin with the prompt's own tokens (a
        token would span both), the two are tokenized on their own.
        """
        frame = self._frame
        prefixes = iter(self._tokenize_prefixes([prompt for prompt in prompts if prompt]))
        wholes: list[str] = []
        targets: list[str] = []
        for prompt, answer in zip(prompts, answers, strict=True):
            if not prompt or frame is None:
                target = answer
            else:
                target = frame.opening + (answer.strip() if frame.strips_response else answer) + frame.end
            targets.append(target)
            wholes.append(self._prefix_text(prompt) + target if prompt else target)
        end = self._end if frame is None or not frame.end else []
        parts: list[tuple[list[int], list[int]]] = []
        apart: list[int] = []
        for index, (prompt, tokens) in enumerate(zip(prompts, self._tokenize(wholes), strict=True)):
            if not prompt:
                parts.append((self._head, tokens + self._tail))
                continue
            prefix = next(prefixes)
            skip = 0 if frame is not None else len(self._head)
            own = prefix[skip:]
            if tokens[: len(own)] == own:
                parts.append((prefix, tokens[len(own) :] + end))
            else:
                apart.append(index)
                parts.append((prefix, []))
        for index, tokens in zip(apart, self._tokenize([targets[index] for index in apart]), strict=True):
            parts[index] = (parts[index][0], tokens + end)
        return parts

    def _assemble(self, prefix: list[int], answer: list[int], longest: int) -> Encoded | None:
        """Join prompt and answer within `max_tokens`, with the room left by an answer of `longest` tokens."""
        context = self._cut_prefix(prefix, max(self.max_tokens - longest, 1))
        ids = np.asarray((context + answer)[: self.max_tokens], dtype=np.int32)
        first_label = max(1, len(context))  # without bos, nothing predicts the first token of a plain text
        if first_label >= len(ids):
            return None
        uncut = len(prefix) + len(answer)
        return Encoded(
            ids,
            first_label,
            truncated=len(ids) < uncut,
            response_cut=len(context) + len(answer) > self.max_tokens,
            uncut_tokens=uncut,
        )

    def _cut_prefix(self, prefix: list[int], room: int) -> list[int]:
        """Keep what opens the prompt and its last tokens, `room` in all; where too tight, bos and the last."""
        if len(prefix) <= room:
            return prefix
        begins_with_bos = bool(prefix) and prefix[0] == self._bos
        keep = self._before if room >= self._smallest_frame else int(begins_with_bos)
        return prefix[:keep] + prefix[len(prefix) - (room - keep) :]

    def _prefix_text(self, prompt: str) -> str:
        if self._frame is None:
            return f"{prompt}\n"
        stripped = prompt.strip() if self._frame.strips_prompt else prompt
        return self._frame.before + stripped + self._frame.between

    def _tokenize_prefixes(self, prompts: list[str]) -> list[list[int]]:
        head = self._head if self._frame is None else []  # a template writes its own bos
        return [head + tokens for tokens in self._tokenize([self._prefix_text(prompt) for prompt in prompts])]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None and backend.truncation is None and backend.padding is None:
            # half the time of the call below, which builds what is not needed here
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        encoding = self._tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return encoding["input_ids"]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Find what the tokenizer itself puts before and after a text."""
        bare = self._tokenize(["a"])[0]
        dressed: list[int] = self._tokenizer(["a"], verbose=False)["input_ids"][0]
        for start in range(len(dressed) - len(bare) + 1):
            if bare and dressed[start : start + len(bare)] == bare:
                return dressed[:start], dressed[start + len(bare) :]
        return [token for token in dressed[:1] if token == self._bos], []


def whole_characters(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can hold, and no tokenizer and no UTF-8 takes."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _render_once(tokenizer: Any) -> _Frame:
    """Render the chat template with stand-ins, so that each record costs a concatenation and not a rendering.

    Llama 3's template writes today's date unless it is given one; the fixed date keeps a run the same tomorrow.

    Raises:
        DataError: The template fails, or repeats, drops or reorders the turns.
    """
    prompt, response = "HOMESPUNPROMPT", "HOMESPUNRESPONSE"

    def render(said: str, answered: str | None, generation: bool = False) -> str:
        turns = [{"role": "user", "content": said}]
        if answered is not None:
            turns.append({"role": "assistant", "content": answered})
        text: str = tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=generation, date_string="26 Jul 2024"
        )
        return text

    try:
        whole = render(prompt, response)
        asked = render(prompt, None, generation=True)
        invites = asked != render(prompt, None)
        padded = render(f"\t{prompt}\t", f"\t{response}\t")
    except Exception as error:  # templates are code from the model's author and may raise anything
        raise DataError(
            f"the tokenizer's chat template cannot render a prompt and a response ({type(error).__name__})"
        ) from None
    before, found_prompt, rest = whole.partition(prompt)
    between, found_response, after = rest.partition(response)
    if not (found_prompt and found_response) or prompt in rest or response in before + after:
        raise DataError("the tokenizer's chat template repeats, drops or reorders the prompt and the response")
    invitation = asked.removeprefix(before + prompt)
    if not invites or not asked.startswith(before + prompt) or not between.startswith(invitation):
        # the template does not say where the model begins; a space belongs to the word after it
        invitation = between.rstrip(" ")
    between, opening = invitation, between[len(invitation) :]
    return _Frame(
        before=before,
        between=between,
        opening=opening,
        end=after.rstrip(),
        strips_prompt=f"\t{prompt}" not in padded,
        strips_response=f"\t{response}" not in padded,
    )
