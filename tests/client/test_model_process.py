"""The model's process: answers while it works, ends and comes back, and says nothing of what was said."""

from __future__ import annotations

import os
import signal
import threading
import time
from multiprocessing import Pipe

import pytest

from client import model_process
from client.device_home import DeviceHome
from client.model_process import ModelProcess
from client.speaker import Speaker
from common.errors import DataError, Refusal


@pytest.fixture
def process(tmp_path, monkeypatch, tiny_base_folder):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    home = DeviceHome.open(create=True)
    begin = {"home": str(home.folder), "model": str(tiny_base_folder), "threads": 1}
    made = ModelProcess(lambda: begin)
    yield made
    made.end()


def ask(process, system="base", text="w5 w6", **sampling):
    asked = {"do": "answer", "system": system, "turns": [["user", text]], "sampling": {"max_tokens": 8, **sampling}}
    return process.talk(asked)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_questions_are_answered_cancelled_refused_and_asked_again_after_a_crash(process):
    given, *pieces = list(ask(process))
    assert given["system"]["is"] == "base"
    assert given["prompt_tokens"] == 2
    assert pieces[-1]["finish"] in ("stop", "length")
    assert "personal" in next(process.talk({"do": "systems"}))["systems"]

    with pytest.raises(DataError, match="not a model of this device"):
        list(ask(process, system="nobody"))

    with pytest.raises(Refusal) as refused:  # a bad request inside; its words do not come along
        list(process.talk({"do": "answer", "system": "base", "turns": [["user", 7]], "sampling": {}}))
    assert "answering failed" in str(refused.value)

    several = [ask(process, text=f"w{number}") for number in range(3, 9)]
    firsts = [next(one) for one in several]
    assert len(firsts) == 6
    assert process.idle_seconds == 0.0
    for one in several:
        one.close()
    assert process.idle_seconds >= 0.0
    assert len(list(ask(process))) > 1

    before, ended = process.pid, []

    def talk():
        try:
            while True:
                list(ask(process, temperature=9.0, max_tokens=60))
        except Refusal as refusal:
            ended.append(str(refusal))

    thread = threading.Thread(target=talk)
    thread.start()
    time.sleep(0.2)
    os.kill(before, signal.SIGKILL)
    thread.join(60)
    assert len(ended) == 1
    assert "ask again" in ended[0]
    assert len(list(ask(process))) > 1
    assert process.pid != before

    process.end()
    assert process.pid is None


def test_what_does_not_get_ready_is_not_idle_and_can_be_put_away_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(model_process, "_RUN_CHILD", "import time; time.sleep(1000)")
    made = ModelProcess(lambda: {"home": str(tmp_path), "model": str(tmp_path), "threads": 1})
    made.get_ready()
    deadline = time.monotonic() + 200.0
    while (pid := made.pid) is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert pid is not None
    made._used = float("-inf")  # nobody asked for long, and somebody waits for it to begin
    made.rest(300.0)
    assert made.pid == pid
    made.end()  # not after the ten minutes that it is given to start
    assert made.pid is None


def test_the_half_that_answers_opens_before_the_first_question_when_told_to():
    mine, theirs = Pipe()
    opened = threading.Event()

    class Model:
        def systems(self):
            opened.set()
            raise RuntimeError("which only the first question says")

    speaker = Speaker(Model, theirs, 1)  # pyright: ignore[reportArgumentType]
    serving = threading.Thread(target=speaker.serve)
    serving.start()
    assert not opened.is_set()
    speaker.get_ready()
    assert opened.wait(200.0)
    mine.close()
    serving.join(200.0)
    assert not serving.is_alive()
