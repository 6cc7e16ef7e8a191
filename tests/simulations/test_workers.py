"""Tests for simulations.workers: who starts a worker, what it is told, and when it ends.

What workers do for a run is tested with runs; here they open no base, which takes long on a busy machine.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from simulations import workers as module

ROOT = Path(__file__).resolve().parent.parent.parent
PRELOADED = list(module.PRELOADED)
MOST_SECONDS = 250.0
"""After which something is wrong; nothing here is measured."""

DRIVER = """
import os, sys, time
from concurrent.futures import ProcessPoolExecutor
from simulations import workers

def found():
    return os.getpid(), sys.modules["client"].__file__ if "client" in sys.modules else None

if __name__ == "__main__":
    workers.PRELOADED[:] = ["client"]
    workers.expect_workers(1)
    with ProcessPoolExecutor(1, workers._context(), initializer=workers._settle, initargs=(dict(os.environ),)) as pool:
        print(*pool.submit(found).result(), flush=True)
        time.sleep(float(sys.argv[1]))
"""


@pytest.fixture(autouse=True)
def little_is_imported(monkeypatch):
    """So that these tests are quick where none before them has a run with workers."""
    monkeypatch.setattr(module, "PRELOADED", ["client"])


def told(name: str) -> str | None:
    """What the process that this runs in was told."""
    return os.environ.get(name)


def ends(pid: int) -> bool:
    """Whether a process is gone, or goes in time."""
    deadline = time.monotonic() + MOST_SECONDS
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            state = (
                Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
            )
        except OSError:
            return True
        if state in "ZX":
            return True
        time.sleep(0.05)
    return False


def one_worker() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, module._context(), initializer=module._settle, initargs=(dict(os.environ),))


@pytest.mark.skipif(sys.platform != "linux", reason="looks at processes under /proc")
@pytest.mark.parametrize("how", ["", "spawn"])
def test_a_worker_ends_with_a_driver_that_was_killed(how, tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), module.HOW: how}
    driver = subprocess.Popen([sys.executable, script, "1000"], stdout=subprocess.PIPE, text=True, env=environment)
    assert driver.stdout is not None
    try:
        worker = int(driver.stdout.readline().split()[0])
        os.kill(worker, 0)  # it is there
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
        driver.stdout.close()
    assert ends(worker)


def test_code_of_the_working_folder_is_not_taken_for_ours(tmp_path):
    (tmp_path / "client.py").write_text("raise SystemExit('not this one')", encoding="utf-8")
    script = tmp_path / "elsewhere" / "driver.py"
    script.parent.mkdir()
    script.write_text(DRIVER, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    found = subprocess.run(
        [sys.executable, script, "0"], cwd=tmp_path, capture_output=True, text=True, env=environment, check=False
    )
    assert found.returncode == 0, found.stderr
    if module._can_fork():
        assert found.stdout.split()[1] == str(ROOT / "client" / "__init__.py")


def test_a_worker_is_told_the_drivers_variables_of_now(monkeypatch):
    for value in ("first", "second"):  # the process that they are forked from began before the second was said
        monkeypatch.setenv("HOMESPUN_TEST_TOLD", value)
        before = os.environ.get("PYTHONSAFEPATH")
        module.expect_workers(1)
        with one_worker() as pool:
            assert pool.submit(told, "HOMESPUN_TEST_TOLD").result() == value
            assert pool.submit(told, "PYTHONSAFEPATH").result() == before
        assert os.environ.get("PYTHONSAFEPATH") == before


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks at a process under /proc")
def test_what_workers_need_is_imported_without_a_second_thread():
    lines = [f"import {name}" for name in PRELOADED]
    lines.append("print(open('/proc/self/status').read().partition('Threads:')[2].split()[0])")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    shown = subprocess.check_output([sys.executable, "-c", "\n".join(lines)], text=True, env=environment)
    assert shown.strip() == "1"


def test_where_workers_cannot_be_forked_they_are_started_anew(monkeypatch, tmp_path):
    monkeypatch.setenv(module.HOW, "spawn")
    assert module._context().get_start_method() == "spawn"
    monkeypatch.delenv(module.HOW)
    gpu = tmp_path / "gpu"
    gpu.touch()
    monkeypatch.setattr(module, "GPUS", (gpu,))
    assert module._context().get_start_method() == "spawn"
    monkeypatch.setattr(module, "GPUS", ())
    monkeypatch.setattr(sys, "platform", "darwin")
    assert module._context().get_start_method() == "spawn"


def test_nobody_waits_for_workers_that_nobody_wants(monkeypatch):
    monkeypatch.setattr(module.multiprocessing.forkserver, "ensure_running", lambda: pytest.fail("one was started"))
    module.expect_workers(0)
    monkeypatch.setenv(module.HOW, "spawn")
    module.expect_workers(2)
