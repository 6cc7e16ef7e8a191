"""The live page's state and its small server: read while the run goes on, on loopback, and of nobody in particular."""

from __future__ import annotations

import http.client
import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from common.errors import ConfigError, DataError
from common.keys import SigningKey
from common.ledger import Ledger, verify
from common.wire import REFUSAL_CODES, ReleaseSpec, canonical
from server.dashboard import REASONS, run_state, serving
from server.released_counts import digest_of

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
    assert state["refusals"] == [
        ["busy", 4, "busy with something else"],
        ["policy-epsilon", 3, "the owner's policy: epsilon"],
    ]
    (run / "measures.json").write_text(json.dumps({"format": 1, "round": 2, "refused": {"busy": 9}}))
    assert run_state(run)["refusals"] == [
        ["busy", 9, "busy with something else"]
    ]  # a coordinator's own totals come first
    whole = json.dumps(state)
    for subject in json.loads((run / "enrolled.json").read_text()):
        assert subject not in whole
    for line in (run / "receipts.jsonl").read_text().splitlines():
        assert not any(receipt in whole for receipt in json.loads(line)["receipts"])


def test_every_code_that_is_put_into_words_is_one_that_can_be_met():
    text = "".join((ROOT / "server" / name).read_text() for name in ("aggregation.py", "rounds.py", "secure_sums.py"))
    assert all(code in REFUSAL_CODES or f'"{code}"' in text for code in REASONS)


@pytest.fixture
def counted(run):
    """The run, had it released a noised gain: its spec says so, and each release names the counts of its round."""
    spec = ReleaseSpec.from_text((run / "spec.json").read_text())
    counts = {"metrics": "gain,loss", "share": 0.02}
    (run / "spec.json").write_text(replace(spec, counts=counts).to_text())
    entries = verify((run / "ledger.jsonl").read_bytes()).entries
    (run / "ledger.jsonl").unlink()
    lines = []
    with Ledger.create(run / "ledger.jsonl", SigningKey.generate(), without_salt(entries[0].body)) as ledger:
        for entry in entries[1:]:
            body = dict(entry.body)
            if entry.kind == "release":
                number = body["round"]
                noised = {"round": number, "clip": 1.0, "measured": 3.0, "gain": 0.1 * number, "gain_noise": 0.02}
                noised |= {"loss": None, "loss_noise": None}
                lines.append(canonical(noised))
                body["counts"] = digest_of(noised)
            ledger.append(entry.kind, body)
    (run / "counts.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return run


def without_salt(header):
    return {name: value for name, value in header.items() if name != "salt"}


def test_gains_that_were_released_noised_are_shown_with_their_noise(counted):
    found = run_state(counted)["noised"]
    assert [row["round"] for row in found] == [3, 2, 1]
    assert found[0]["metrics"]["gain"] == [pytest.approx(0.3), 0.02]
    assert found[0]["metrics"]["loss"] == [None, None]  # too few were measured to tell


def test_a_gain_that_the_ledger_does_not_name_is_not_shown(counted):
    text = (counted / "counts.jsonl").read_text()
    (counted / "counts.jsonl").write_text(
        text.replace('"round":2', '"round": 2') + '{"gain":0.9,"round":4}\n{"gain":0.'
    )
    assert [row["round"] for row in run_state(counted)["noised"]] == [3, 1]
    (counted / "counts.jsonl").unlink()
    assert run_state(counted)["noised"] == []


def test_a_run_that_releases_no_metric_shows_none(run):
    (run / "counts.jsonl").write_text('{"gain":0.9,"round":1}\n')
    assert run_state(run)["noised"] is None


@pytest.mark.parametrize(("noise", "who"), [("central", "the coordinator"), ("local", "nobody")])
def test_it_says_who_sees_an_update_without_noise(make_fleet, noise, who):
    assert run_state(make_fleet(noise).run)["seen_without_noise"] == who


def test_the_page_and_the_state_are_served_and_nothing_else(run):
    with serving(run) as address:
        code, page, headers = get(address)
        assert code == 200
        assert "<script nonce=" in page
        assert "NONCE" not in page
        assert "default-src 'none'" in headers["Content-Security-Policy"]
        assert json.loads(get(address, "/state.json")[1])["rounds_done"] == 3
        assert get(address, "/../config.toml")[0] == get(address, "/config.toml")[0] == 404


def test_a_browser_that_leaves_before_the_answer_leaves_no_traceback(run, capfd):
    with serving(run) as address:
        place = urlsplit(address)
        for _ in range(5):
            with socket.create_connection((place.hostname, place.port)) as line:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets it
                line.sendall(f"GET /state.json HTTP/1.1\r\nHost: {place.netloc}\r\n\r\n".encode())
        assert get(address)[0] == 200
    assert "Traceback" not in capfd.readouterr().err


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
