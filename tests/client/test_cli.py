"""`homespun device up`: a vault as its owner starts it, and what it keeps in its home."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from client.cli import read_user
from client.device_home import DeviceHome
from client.policy import Policy
from client.vault_stub import SocketVault
from common.adapters import lora_layout
from common.errors import DataError, Refusal
from common.model_files import linear_modules, model_digest
from common.wire import Assignment

ROOT = Path(__file__).resolve().parents[2]
SECRET = "w3 w4 nobody-may-read-this w5"


@pytest.fixture
def notes(tmp_path):
    path = tmp_path / "notes.jsonl"
    lines = [
        {"user": "bela", "texts": ["w7 w8 w9"]},
        {"user": "ada", "texts": [SECRET] * 4, "examples": [{"prompt": "w3", "response": "w4 w5"}]},
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_the_owners_records_are_found_among_others(notes):
    records = read_user(notes, "ada").records
    assert [record.prompt for record in records] == ["", "", "", "", "w3"]
    assert records[0].response == SECRET


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '"ada"',
        '{"texts": ["?"]}',
        '{"user": "ada", "texts": 7}',
        '{"user": "ada", "texts": [["?"]]}',
        '{"user": "ada", "examples": [{"prompt": "?"}]}',
        '{"user": "ada", "examples": [{"prompt": "?", "response": 7}]}',
    ],
)
def test_a_broken_line_is_named_by_its_number_and_not_shown(tmp_path, line):
    path = tmp_path / "notes.jsonl"
    path.write_text(json.dumps({"user": "bela", "texts": [SECRET]}) + "\n" + line.replace("?", SECRET) + "\n")
    with pytest.raises(DataError, match="line 2") as wrong:
        read_user(path, "ada")
    assert SECRET not in str(wrong.value)


def test_a_file_or_person_that_is_not_there_is_said_so(notes, tmp_path):
    with pytest.raises(DataError, match="not in the file"):
        read_user(notes, "dear diary")
    with pytest.raises(DataError, match="FileNotFoundError"):
        read_user(tmp_path / "absent.jsonl", "ada")


def test_the_home_of_a_device_opens_again_as_the_same_subject(home):
    seen = []
    for _ in range(2):
        device = DeviceHome.open(create=True)
        with device.open_ledger() as ledger:
            seen.append((ledger.header["subject"], device.key.verify_key.hex))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) == 32


def test_what_the_owner_grants_is_signed_kept_and_replaced_only_by_the_owner(home):
    device = DeviceHome.open(create=True)
    assert not device.policy().trust_coordinator
    device.grant(Policy.parse(b"trust_coordinator = true\n"))
    assert DeviceHome.open().policy().trust_coordinator
    path = home / "device" / "policy.toml"
    path.write_text(path.read_text().replace("epsilon = 8.0", "epsilon = 800.0"))
    with pytest.raises(Refusal) as refused:
        device.policy()
    assert refused.value.code == "policy-not-signed"


def test_a_vault_serves_its_owner_alone_grants_nothing_unasked_and_stops_when_told(
    home, notes, tiny_base_folder, release_spec, tmp_path
):
    socket = tmp_path / "vault.sock"
    arguments = ["--data", str(notes), "--user", "ada", "--model", str(tiny_base_folder), "--socket", str(socket)]
    command = [sys.executable, str(ROOT / "homespun.py"), "device", "up", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while not socket.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        stub = SocketVault(str(socket), absent_seconds=0.0)
        (subject,) = stub.subjects()
        layout = lora_layout(linear_modules(tiny_base_folder, ("q_proj", "v_proj")), 2)
        spec = release_spec(
            names=tuple(tensor.name for tensor in layout.tensors),
            shapes=tuple(tensor.shape for tensor in layout.tensors),
            model=model_digest(tiny_base_folder),
        )
        for users, code in (((subject,), "policy-trust"), (("ada",), "not-here")):
            with pytest.raises(Refusal) as refused:
                stub.train(Assignment(spec, 1, users, np.zeros(layout.size, np.float32)))
            assert refused.value.code == code
    finally:
        process.send_signal(signal.SIGTERM)
        out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert not socket.exists()
    assert json.loads(out)["subject"] == subject
    assert "policy-trust" in errors
    assert "nobody-may-read-this" not in out + errors
    kept = [path for path in home.rglob("*") if path.is_file()]
    assert kept
    assert all(b"nobody-may-read-this" not in path.read_bytes() for path in kept)
