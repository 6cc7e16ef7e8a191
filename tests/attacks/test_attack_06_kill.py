"""Attack 6 at random instants: the short form of `python -m simulations.bench.kill --instants 200`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_attack_06_kill_9_at_random_instants_never_lowers_what_was_spent_and_never_releases_undebited(home):
    """In a process of its own: it forks, which a process with many threads should not."""
    finished = subprocess.run(
        [sys.executable, "-m", "simulations.bench.kill", "--instants", "6"],
        cwd=ROOT,
        env=os.environ | {"HOMESPUN_HOME": str(home), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=560,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr[-2000:]
    found = json.loads(finished.stdout)
    assert found["violations"] == []
    assert found["instants"] >= 6
    assert found["runs"] >= 3
    assert found["debits"] >= found["attempts"] > 6
