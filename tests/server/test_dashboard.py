"""The live page's state and its small server: read while the run goes on, on loopback, and of nobody in particular."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from common.errors import ConfigError, DataError
from server.dashboard import run_state, serving

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(make_fleet, tmp_path):
    shutil.copytree(make_fleet("central").run, tmp_path / "run")
    return tmp_path / "run"


def get(address, path="/", host=None):
    place = urlsplit(address)
    connection = http.client.HTTPConnection(place.hostname, place.port, timeout=20)
    connection.request("GET", path, headers={"Host": host or place.netloc})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), dict(answer.getheaders())
    connection.close()
    return found


def test_a_finished_run_says_what_it_spent_and_everyone_spent_alike(run):
    state = run_state(run)
    assert (state["state"], state["rounds_done"], state["rounds_planned"]) == ("finished", 3, 3)
    assert state["debits"] == 3
    counts, spent = zip(*state["spent"], strict=True)
    assert counts == (1, 2, 3)
    assert list(spent) == sorted(spent)
    assert spent[-1] < state["budget"] == 16.0
    assert state["seen_without_noise"] == "the coordinator"


def test_it_reads_a_run_in_progress_with_lines_half_written(run):
    ledger = (run / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (run / "ledger.jsonl").write_bytes(b"".join(ledger[:-2]) + ledger[-2][:40])
    lines = (run / "rounds.jsonl").read_text().splitlines(keepends=True)
    (run / "rounds.jsonl").write_text("".join(lines[:2]) + '{"round": 3, "sec')
    state = run_state(run)
    assert (state["state"], state["rounds_done"], len(state["last_rounds"])) == ("running", 2, 2)
    old = (run / "ledger.jsonl").stat().st_mtime + 3600
    assert run_state(run, now=old)["state"] == "waiting"


def test_refusals_are_added_up_over_rounds_and_name_nobody(run):
    rows = [{"round": n, "rejected": {"busy": 2, "policy-epsilon": n}} for n in (1, 2)]
    (run / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    state = run_state(run)
    assert state["refusals"] == [["busy", 4], ["policy-epsilon", 3]]
    (run / "measures.json").write_text(json.dumps({"format": 1, "round": 2, "refused": {"busy": 9}}))
    assert run_state(run)["refusals"] == [["busy", 9]]  # a coordinator's own totals come first
    whole = json.dumps(state)
    for subject in json.loads((run / "enrolled.json").read_text()):
        assert subject not in whole
    for line in (run / "receipts.jsonl").read_text().splitlines():
        assert not any(receipt in whole for receipt in json.loads(line)["receipts"])


def test_the_page_and_the_state_are_served_and_nothing_else(run):
    with serving(run) as address:
        code, page, headers = get(address)
        assert code == 200
        assert "<script nonce=" in page
        assert "NONCE" not in page
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert json.loads(get(address, "/state.json")[1])["rounds_done"] == 3
        assert get(address, "/../config.toml")[0] == get(address, "/config.toml")[0] == 404


def test_it_answers_to_no_name_but_this_machines(run):
    with serving(run) as address:
        assert address.startswith("http://127.0.0.1:")
        port = urlsplit(address).port
        assert get(address, "/state.json", host=f"evil.example:{port}")[0] == 403
        assert get(address, "/state.json", host=f"localhost:{port}")[0] == 200


def test_a_ledger_that_breaks_meanwhile_is_said_and_shown_again_when_it_is_mended(run):
    whole = (run / "ledger.jsonl").read_bytes()
    with serving(run) as address:
        (run / "ledger.jsonl").write_bytes(whole.replace(b"round", b"rouND", 1))
        assert "error" in json.loads(get(address, "/state.json")[1])
        (run / "ledger.jsonl").write_bytes(whole)
        assert "error" not in json.loads(get(address, "/state.json")[1])


def test_where_there_is_no_run_nothing_is_served(tmp_path, run):
    with pytest.raises(DataError, match="no run"), serving(tmp_path):
        pass
    with serving(run) as address, pytest.raises(ConfigError, match="port"), serving(run, urlsplit(address).port):
        pass


def test_the_command_says_where_and_ends_when_it_is_told(run):
    command = [sys.executable, "homespun.py", "server", "dashboard", str(run), "--port", "0"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        address = process.stdout.readline().split()[-1]
        assert get(address)[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
