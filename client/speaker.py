"""The part of the model's process that answers its owner, beside training and before it.

Questions come over a line of their own, each with a number; several are answered at once, token by token in turns.
Training has a lower priority than the threads here where the platform knows priorities of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from client.vault_child import Message, receive, send
from common.errors import DataError, HomespunError

if TYPE_CHECKING:
    from client.personal_model import Answer, PersonalModel, System

__all__ = ["Speaker", "answer_facts", "questions_of", "system_facts"]

AT_ONCE = 4
SMALL_WIDTH = 512
"""Below this hidden size one thread is as fast as several, which would only wait for each other."""


class Speaker:
    """Answers what comes over one line."""

    def __init__(self, model: Callable[[], PersonalModel], connection: Connection, threads: int) -> None:
        """Answer with `model`, which is made at the first question, using `threads` for each."""
        self._make = model
        self._model: PersonalModel | None = None
        self._connection = connection
        self._threads = threads
        self._making = threading.Lock()
        self._sending = threading.Lock()
        self._early = threading.Event()
        self._cancelled: dict[int, threading.Event] = {}

    def get_ready(self) -> None:
        """Open the model before anybody asks; returns at once, and what goes wrong the first question says."""
        self._early.set()

    def serve(self) -> None:
        """Answer until the other end is gone."""
        # A thread takes the priority of the one that starts it, so it is started here and waits.
        threading.Thread(target=self._open_early, name="speaker-early", daemon=True).start()
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="speaker") as pool:
            while True:
                try:
                    asked = receive(self._connection).facts
                except (EOFError, OSError):
                    break
                number = int(asked["id"])
                if asked["do"] == "cancel":
                    if number in self._cancelled:
                        self._cancelled[number].set()
                    continue
                self._cancelled[number] = threading.Event()
                pool.submit(self._answer, number, asked)
            for event in list(self._cancelled.values()):
                event.set()

    def _answer(self, number: int, asked: Mapping[str, Any]) -> None:
        cancelled = self._cancelled[number]
        try:
            for facts in self._facts(asked, cancelled.is_set):
                self._say(number, facts)
        except DataError as error:
            self._say(number, {"refusal": "unknown", "reason": str(error)})
        except HomespunError as error:
            self._say(number, {"refusal": "failed", "reason": str(error)})
        except Exception as error:  # whatever it is, its text may hold what was said
            self._say(number, {"refusal": "failed", "reason": f"answering failed: {type(error).__name__}"})
        finally:
            self._cancelled.pop(number, None)

    def _facts(self, asked: Mapping[str, Any], cancelled: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        import torch

        model = self._opened()
        torch.set_num_threads(self._threads)
        if asked["do"] == "systems":
            yield {"systems": {name: system_facts(one) for name, one in model.systems().items()}, "done": True}
            return
        yield from questions_of(model, asked, cancelled)

    def _open_early(self) -> None:
        self._early.wait()
        with suppress(Exception):
            self._opened().systems()

    def _opened(self) -> PersonalModel:
        with self._making:
            if self._model is None:
                self._model = self._make()
            return self._model

    def _say(self, number: int, facts: dict[str, Any]) -> None:
        with suppress(OSError, ValueError), self._sending:
            send(self._connection, Message({**facts, "id": number}))


def questions_of(
    model: PersonalModel, asked: Mapping[str, Any], cancelled: Callable[[], bool]
) -> Iterator[dict[str, Any]]:
    """Answer one question as JSON objects: first what the model was given, then pieces, the last of them `done`."""
    from dataclasses import replace

    from client.conversation import Turn

    given = {name: value for name, value in dict(asked["sampling"]).items() if value is not None}
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    sampling = replace(model.sampling(), **given)
    turns = [Turn(role, text) for role, text in asked["turns"]]
    answer = model.answer(str(asked["system"]), turns, sampling, cancelled=cancelled)
    yield answer_facts(answer)
    for piece in answer.pieces:
        facts: dict[str, Any] = {"text": piece.text, "tokens": piece.tokens}
        if piece.finish is not None:
            facts |= {"finish": piece.finish, "done": True}
        yield facts


def system_facts(system: System) -> dict[str, Any]:
    """Say what a system is, as a JSON object."""
    return {
        "is": system.name,
        "levels": sorted(system.levels),
        "adapters": [name for name, _ in system.vectors],
        "why": system.reason,
    }


def answer_facts(answer: Answer) -> dict[str, Any]:
    """Say what the model was given, as a JSON object."""
    prompt = answer.prompt
    return {
        "system": system_facts(answer.system),
        "prompt_tokens": len(prompt.ids),
        "records": [asdict(record) for record in answer.records],
        "profile": list(prompt.lines),
        "dropped_turns": prompt.dropped_turns,
        "cut": prompt.cut,
    }
