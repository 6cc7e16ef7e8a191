"""The shapes of OpenAI's chat completions: what is asked, what is answered, and how it is said that it cannot be.

What clients send and no small model can do (tools, log-probabilities, ...) is passed over, as long as the answer is
still an answer to what was asked.

Source: OpenAI API reference, Chat Completions and Models, as the `openai` package of 2026 speaks it.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

__all__ = ["ChatRequest", "Completion", "RequestError", "models_list", "read_request"]

MOST_STOPS = 16
MOST_MESSAGES = 2000
DEFAULT_TOKENS = 256
LONGEST_ANSWER = 4096
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class RequestError(Exception):
    """A request that cannot be answered as it is.

    Attributes:
        status: Of HTTP.
    """

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: int = 400,
        kind: str = "invalid_request_error",
        code: str | None = None,
    ) -> None:
        """Say what is wrong, with which field."""
        super().__init__(message)
        self.status = status
        self._facts = {"message": message, "type": kind, "param": param, "code": code}

    def to_json(self) -> dict[str, Any]:
        """The body of the answer."""
        return {"error": self._facts}


@dataclass(frozen=True)
class ChatRequest:
    """What a client asked for.

    Attributes:
        model: System that shall answer.
        turns: Pairs of role and text.
        sampling: Of `client.generation.Sampling`, what was given.
        stream: Whether the answer comes in pieces.
        usage: Whether the last piece counts tokens.
    """

    model: str
    turns: tuple[tuple[str, str], ...] = field(repr=False)
    sampling: dict[str, Any]
    stream: bool = False
    usage: bool = False


def read_request(body: bytes) -> ChatRequest:
    """Read the body of a request.

    Raises:
        RequestError: It is no such request; names the field, never what stands there.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("the body is not JSON") from None
    if not isinstance(found, dict):
        raise RequestError("the body is not a JSON object")
    values = {name: value for name, value in cast("dict[str, Any]", found).items() if value is not None}
    model = values.get("model")
    if not isinstance(model, str) or not model:
        raise RequestError("model: names base, global or personal", param="model")
    messages = values.get("messages")
    if not isinstance(messages, list) or not messages or len(cast("list[Any]", messages)) > MOST_MESSAGES:
        raise RequestError(f"messages: a list of 1 to {MOST_MESSAGES} messages", param="messages")
    turns = [_turn(index, one) for index, one in enumerate(cast("list[Any]", messages))]
    if turns[-1][0] != "user":
        raise RequestError("messages: the last one is not the user's", param="messages")
    options = values.get("stream_options", {})
    usage = isinstance(options, dict) and bool(cast("dict[str, Any]", options).get("include_usage", False))
    if values.get("n", 1) != 1:
        raise RequestError("n: one answer at a time", param="n")
    form = values.get("response_format", {})
    if isinstance(form, dict) and cast("dict[str, Any]", form).get("type", "text") != "text":
        raise RequestError(
            "response_format: only text; nothing here holds a small model to JSON", param="response_format"
        )
    return ChatRequest(model, tuple(turns), _sampling(values), values.get("stream") is True, usage)


def _turn(index: int, message: Any) -> tuple[str, str]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise RequestError(f"{where}: not an object", param=where)
    fields = cast("dict[str, Any]", message)
    role = ROLES.get(str(fields.get("role")))
    if role is None:
        raise RequestError(f"{where}.role: one of {', '.join(ROLES)}", param=f"{where}.role")
    content = fields.get("content")
    if isinstance(content, list):
        parts = cast("list[Any]", content)
        texts: list[str] = []
        for part in parts:
            text = cast("dict[str, Any]", part).get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or cast("dict[str, Any]", part).get("type") != "text":
                raise RequestError(f"{where}.content: text parts only", param=f"{where}.content")
            texts.append(text)
        content = "".join(texts)
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise RequestError(f"{where}.content: text", param=f"{where}.content")
    return role, content


def _sampling(values: Mapping[str, Any]) -> dict[str, Any]:
    given: dict[str, Any] = {"max_tokens": DEFAULT_TOKENS}
    for name in ("max_tokens", "max_completion_tokens"):
        if name in values:
            given["max_tokens"] = min(_integer(values, name, 1, 1 << 31), LONGEST_ANSWER)
    for name, most in (("temperature", 2.0), ("top_p", 1.0)):
        if name in values:
            given[name] = _number(values, name, most)
    if "seed" in values:
        given["seed"] = _integer(values, "seed", -(1 << 63), (1 << 63) - 1) & ((1 << 63) - 1)
    if "stop" in values:
        stop = values["stop"]
        texts: Sequence[Any] = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else [None]
        if len(texts) > MOST_STOPS or not all(isinstance(text, str) for text in texts):
            raise RequestError(f"stop: a text, or a list of at most {MOST_STOPS}", param="stop")
        given["stop"] = [text for text in texts if text]
    return given


def _integer(values: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = values[name]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise RequestError(f"{name}: a whole number from {least}", param=name)
    return value


def _number(values: Mapping[str, Any], name: str, most: float) -> float:
    value = values[name]
    if (
        not isinstance(value, int | float)
        or isinstance(value, bool)
        or not (math.isfinite(value) and 0 <= value <= most)
    ):
        raise RequestError(f"{name}: a number from 0 to {most:g}", param=name)
    return float(value)


class Completion:
    """One answer on its way, in OpenAI's words.

    Attributes:
        model: What was asked for.
    """

    def __init__(self, model: str, given: Mapping[str, Any]) -> None:
        """Begin the answer of `model`, which was given what `client.speaker.answer_facts` says."""
        self.model = model
        self._id = f"chatcmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._prompt_tokens = int(given["prompt_tokens"])
        self._used = {
            "system": given["system"]["is"],
            "why": given["system"]["why"],
            "records": [one["id"] for one in given["records"]],
            "profile_lines": len(given["profile"]),
            "dropped_turns": given["dropped_turns"],
            "question_cut": given["cut"],
        }
        self._text: list[str] = []
        self._tokens = 0
        self._finish: str | None = None

    def add(self, piece: Mapping[str, Any]) -> dict[str, Any]:
        """Take a piece, and return it as a chunk."""
        self._tokens = int(piece["tokens"])
        self._finish = piece.get("finish")
        self._text.append(str(piece["text"]))
        return self._chunk([{"index": 0, "delta": {"content": piece["text"]}, "finish_reason": self._finish}])

    def opening(self) -> dict[str, Any]:
        """The chunk before the first piece."""
        delta = {"role": "assistant", "content": ""}
        return {**self._chunk([{"index": 0, "delta": delta, "finish_reason": None}]), "homespun": self._used}

    def counts(self) -> dict[str, Any]:
        """The chunk that counts tokens."""
        return {**self._chunk([]), "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The answer at once."""
        message = {"role": "assistant", "content": "".join(self._text), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": self._finish or "stop"}
        head = {"id": self._id, "object": "chat.completion", "created": self._created, "model": self.model}
        return {**head, "choices": [choice], "usage": self._usage(), "homespun": self._used}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = {"id": self._id, "object": "chat.completion.chunk", "created": self._created, "model": self.model}
        return {**head, "choices": choices}

    def _usage(self) -> dict[str, int]:
        both = self._prompt_tokens + self._tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": self._tokens, "total_tokens": both}


def models_list(names: Sequence[str], created: int) -> dict[str, Any]:
    """What there is to ask, in OpenAI's words."""
    return {"object": "list", "data": [model_entry(name, created) for name in names]}


def model_entry(name: str, created: int) -> dict[str, Any]:
    """One model, in OpenAI's words."""
    return {"id": name, "object": "model", "created": created, "owned_by": "you"}
