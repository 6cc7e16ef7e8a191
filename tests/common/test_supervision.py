"""Processes under supervision: started again when they end, taken along when their supervisor is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.supervision import Supervised, bound, process_start, program

ROOT = Path(__file__).resolve().parents[2]
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def supervised(tmp_path):
    made = []

    def make(command=SLEEP, **options):
        made.append(Supervised(command, tmp_path / "log", **options))
        return made[-1]

    yield make
    for one in made:
        one.stop(5.0)


def until(condition):
    for _ in range(4000):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not happen")


def killed(one):
    pid = one.pid
    os.kill(pid, signal.SIGKILL)
    until(lambda: one.pid is None)
    return pid


def test_what_was_killed_is_started_again_after_its_delay(supervised):
    clock = Clock()
    one = supervised(delay=5.0, clock=clock)
    assert one.pid is None
    assert one.tend()
    assert one.tend()
    assert one.starts == 1
    first = killed(one)
    assert not one.tend()
    clock.now = 4.9
    assert not one.tend()
    clock.now = 5.1
    assert one.tend()
    assert (one.starts, one.last_exit, one.pid != first) == (2, -signal.SIGKILL, True)


def test_what_ends_again_and_again_is_started_more_and_more_rarely(supervised):
    clock = Clock()
    one = supervised(delay=1.0, slowest_delay=8.0, clock=clock)
    waits = []
    one.tend()
    for _ in range(6):
        killed(one)
        one.tend()
        ended = clock.now
        while not one.tend():
            clock.now += 0.5
        waits.append(clock.now - ended)
    assert waits == [1.0, 2.0, 4.0, 8.0, 8.0, 8.0]


def test_what_ran_for_long_is_started_again_soon(supervised):
    clock = Clock()
    one = supervised(delay=1.0, slowest_delay=8.0, clock=clock)
    one.tend()
    for _ in range(4):
        killed(one)
        one.tend()
        clock.now += 10.0
        assert one.tend()
    clock.now += 100.0
    killed(one)
    one.tend()
    clock.now += 1.0
    assert one.tend()


def test_stopping_ends_it_and_insists(supervised, tmp_path):
    stubborn = (
        "import pathlib, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\ntime.sleep(600)"
    )
    one = supervised([sys.executable, "-c", stubborn])
    one.tend()
    until((tmp_path / "ready").exists)
    pid = one.pid
    one.stop(0.2)
    assert process_start(pid) == ""
    one.stop()  # twice is no harm


def test_a_child_ends_with_a_supervisor_that_was_killed(tmp_path):
    code = (
        f"import sys, time; sys.path.insert(0, {str(ROOT)!r})\n"
        "from pathlib import Path\nfrom common.supervision import Supervised\n"
        f"one = Supervised({SLEEP!r}, Path({str(tmp_path / 'log')!r})); one.tend()\n"
        "print(one.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as supervisor:
        child = int(supervisor.stdout.readline())
        until(lambda: b"sleep(600)" in Path(f"/proc/{child}/cmdline").read_bytes())
        supervisor.kill()
        supervisor.wait()
        until(lambda: process_start(child) == "")


def test_output_goes_to_a_log_that_nobody_else_reads_and_that_does_not_grow(supervised, tmp_path, monkeypatch):
    monkeypatch.setattr("common.supervision.MOST_LOG_BYTES", 10)
    clock = Clock()
    one = supervised([sys.executable, "-c", "print('twelve bytes')"], clock=clock)
    one.tend()
    until(lambda: one.pid is None)
    assert (tmp_path / "log").read_text() == "twelve bytes\n"
    assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600
    one.tend()
    clock.now = 100.0
    one.tend()
    until(lambda: one.pid is None)
    assert (tmp_path / "log.old").read_text() == (tmp_path / "log").read_text() == "twelve bytes\n"


def test_a_process_is_told_from_another_one_with_its_number():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert process_start(process.pid) == process_start(process.pid) != ""
    process.communicate(b"\n")
    assert process_start(process.pid) == ""


def test_a_command_is_found_beside_this_python_or_not_at_all():
    assert Path(program("flower-supernode")).exists()
    with pytest.raises(FileNotFoundError):
        program("flower-superfluous")
    assert bound(["/bin/true"])[-1] == "/bin/true"
