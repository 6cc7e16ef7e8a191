"""Generation, token by token, with the keys and values of what was read kept.

Text comes out as soon as it is certain: bytes that are half a character wait for the other half, and text that may be
the beginning of a stop word waits until it is or is not.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.base_model import BaseModel

__all__ = ["Piece", "Sampling", "default_sampling", "generate"]

UNFINISHED = "\ufffd"
Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when it is enough.

    Attributes:
        max_tokens: Longest answer.
        temperature: 0 takes the likeliest token.
        top_p: Only the likeliest tokens that together have this probability are drawn from.
        seed: Makes the draw repeatable; the operating system's numbers when absent.
        stop: Texts that end the answer and are no part of it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Piece:
    """Some more of the answer.

    Attributes:
        text: What was added; may be empty.
        tokens: Tokens of the answer so far.
        finish: Why it ended; None while it goes on.
    """

    text: str = field(repr=False)
    tokens: int
    finish: Finish | None = None


def default_sampling(base: BaseModel) -> Sampling:
    """What the model's own generation settings ask for; the likeliest token where they ask for no sampling."""
    settings = getattr(base.model, "generation_config", None)
    if settings is None or not getattr(settings, "do_sample", False):
        return Sampling()
    temperature, top_p = getattr(settings, "temperature", None), getattr(settings, "top_p", None)
    return Sampling(
        temperature=1.0 if temperature is None else float(temperature), top_p=1.0 if top_p is None else float(top_p)
    )


def generate(
    base: BaseModel,
    prompt: NDArray[np.int32],
    sampling: Sampling,
    *,
    laid_over: Callable[[], AbstractContextManager[None]] = nullcontext,
    prefix: NDArray[np.float32] | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Piece]:
    """Answer `prompt`; the last piece, and only it, says why the answer ended.

    Args:
        base: The model.
        prompt: Token ids, shape (tokens,), at least one.
        sampling: How.
        laid_over: Entered around each pass: lays adapters over the model, so that several answers can take turns.
        prefix: A soft prompt before everything, shape (vectors, hidden).
        cancelled: Asked before every token; once true, the answer ends where it is.
    """
    writer = _Writer(base.tokenizer, sampling.stop)
    ends = _end_tokens(base)
    count = 0
    for token in _tokens(base, prompt, sampling, laid_over, prefix):
        if token in ends:
            yield Piece(writer.finish(), count, "stop")
            return
        count += 1
        text = writer.add(token)
        if writer.stopped:
            yield Piece(text, count, "stop")
            return
        if count >= sampling.max_tokens or cancelled():
            yield Piece(text + writer.finish(), count, "length")
            return
        if text:
            yield Piece(text, count)
    yield Piece(writer.finish(), count, "length")


def _tokens(
    base: BaseModel,
    prompt: NDArray[np.int32],
    sampling: Sampling,
    laid_over: Callable[[], AbstractContextManager[None]],
    prefix: NDArray[np.float32] | None,
) -> Iterator[int]:
    """Draw tokens until the base can read no more."""
    generator = torch.Generator(device="cpu")
    generator.manual_seed(secrets.randbits(63) if sampling.seed is None else sampling.seed)
    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", None)
    ids = torch.from_numpy(np.asarray(prompt, dtype=np.int64))[None].to(base.device)
    read = ids.shape[1] + (0 if prefix is None else len(prefix))
    past: Any = None
    with torch.inference_mode(), laid_over():
        hidden, past = _read(base, ids, past, prefix)
    while True:
        with torch.inference_mode():
            token = _drawn(base.logits(hidden)[0].float().cpu(), sampling, generator)
        yield token
        read += 1
        if longest is not None and read > int(longest):
            return
        with torch.inference_mode(), laid_over():
            hidden, past = _read(base, torch.tensor([[token]], device=base.device), past, None)


def _read(base: BaseModel, ids: Tensor, past: Any, prefix: NDArray[np.float32] | None) -> tuple[Tensor, Any]:
    """Read some tokens; return the last hidden state, shape (1, hidden), and what is kept of all that was read."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if prefix is not None:
        embedded = base.model.get_input_embeddings()(ids)
        before = torch.as_tensor(prefix, device=base.device, dtype=embedded.dtype)[None]
        inputs = {"inputs_embeds": torch.cat([before, embedded], dim=1)}
    found = base.model.base_model(**inputs, past_key_values=past, use_cache=True)
    return found.last_hidden_state[:, -1], found.past_key_values


def _drawn(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw one token from logits of shape (vocabulary,)."""
    if sampling.temperature <= 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits / sampling.temperature, 0)
    if sampling.top_p < 1:
        ranked, order = probabilities.sort(descending=True)
        beyond = ranked.cumsum(0) - ranked >= sampling.top_p  # the likeliest is never beyond
        probabilities[order[beyond]] = 0.0
        if not bool(probabilities.sum() > 0):
            return int(logits.argmax())
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _end_tokens(base: BaseModel) -> frozenset[int]:
    ends = getattr(getattr(base.model, "generation_config", None), "eos_token_id", None)
    listed: Sequence[Any] = ends if isinstance(ends, list) else [ends]
    return frozenset(int(token) for token in (*listed, base.tokenizer.eos_token_id) if token is not None)


class _Writer:
    """Turns tokens into text as they come.

    Attributes:
        stopped: Whether a stop text was written.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(text for text in stop if text)
        self._tokens: list[int] = []
        self._settled = 0
        """Tokens whose text cannot change any more; decoding begins there, not at the start each time."""
        self._shown = 0
        self._held = ""
        self._begun = False
        self.stopped = False

    def add(self, token: int) -> str:
        """Take one token and return the text that is certain now."""
        self._tokens.append(token)
        before = self._decode(self._settled, self._shown)
        now = self._decode(self._settled, len(self._tokens))
        if now.endswith(UNFINISHED) and len(self._tokens) - self._shown < 8:
            return ""
        self._settled, self._shown = self._shown, len(self._tokens)
        return self._released(now[len(before) :])

    def finish(self) -> str:
        """Return what was held back and is certain because nothing more comes."""
        before = self._decode(self._settled, self._shown)
        rest = self._decode(self._settled, len(self._tokens))[len(before) :]
        self._shown = self._settled = len(self._tokens)
        text = self._released(rest)
        held, self._held = self._held, ""
        return text if self.stopped else text + held

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._tokens[start:end], skip_special_tokens=True) if end > start else ""

    def _released(self, text: str) -> str:
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        text = self._held + text
        self._held = ""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        held = max((_overlap(text, stop) for stop in self._stop), default=0)
        if held:
            text, self._held = text[:-held], text[-held:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Count the characters at the end of `text` that may be the beginning of `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
