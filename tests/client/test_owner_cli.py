"""The owner's commands: what was sent, what is left, and what is granted."""

from __future__ import annotations

import json

import numpy as np
import pytest

import homespun
from client.budget_keeper import BudgetKeeper
from client.device_home import DeviceHome
from client.gate import Gate
from client.policy import Policy
from common.accounting import calibrate
from common.privacy import Adjacency, Randomness
from common.wire import ReleaseSpec, raw_bytes, receipt_of_bytes

SPEC = ReleaseSpec(
    run="ab" * 8,
    method="dual",
    names=("layer.lora_A.weight", "layer.lora_B.weight"),
    shapes=((2, 3), (4, 2)),
    dtype="float32",
    unit="user",
    noise="local",
    clip=1.0,
    noise_multiplier=calibrate(epsilon=4.0, delta=1e-5, rounds=5, adjacency=Adjacency.REPLACE_ONE),
    sampling_rate=0.5,
    rounds=5,
    epsilon="4.0",
    delta=1e-5,
    population=100,
    recipe={"local_steps": 1, "local_batch": 2, "learning_rate": 0.1, "optimizer": "sgd"},
    model="1" * 64,
    source="2" * 64,
    witnesses=4,
)


@pytest.fixture(autouse=True)
def device(tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    made = DeviceHome.open(create=True)
    made.grant(Policy.model_validate({"epsilon": 8.0, "smallest_cohort": 10}))
    return made


@pytest.fixture
def releases(device):
    with device.open_ledger() as ledger:
        keeper = BudgetKeeper(device, ledger)
        gate = Gate(keeper.record, keep=keeper.keep)
        update = np.arange(14, dtype=np.float32)[None] / 100
        return [gate.release(update, SPEC, number, Randomness.system()) for number in (1, 2)]


@pytest.fixture
def run(capsys):
    """A function `arguments -> (exit code, standard output, standard error)`."""

    def call(*arguments):
        code = homespun.main(["device", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_sent_lists_every_release_and_nothing_else(run, releases):
    code, text, _ = run("sent")
    assert code == 0
    assert [line.split("sha256 ")[1] for line in text.splitlines()] == [one.receipt[:16] for one in releases]
    rows = json.loads(run("sent", "--json")[1])
    assert [row["sha256"] for row in rows] == [one.receipt for one in releases]
    assert all(row["bytes"] == 72 for row in rows)


def test_sent_shows_exactly_what_left(run, releases, tmp_path):
    for wanted in (json.loads(run("sent", "--json")[1])[1]["id"], releases[1].receipt[:12]):
        code, text, _ = run("sent", str(wanted))
        assert code == 0
        for words in ("layer.lora_A.weight  2 x 3", "layer.lora_B.weight  4 x 2", "noise_witness  4", "72 bytes"):
            assert words in text
        assert f"{releases[1].total[0]:.6g}" in text
    file = tmp_path / "left.bin"
    run("sent", releases[0].receipt, "--out", str(file))
    assert file.read_bytes() == raw_bytes(releases[0].total)
    assert receipt_of_bytes(file.read_bytes(), SPEC.digest, 1, 1, "float32") == releases[0].receipt


def test_before_anything_was_sent_that_is_said(run):
    assert run("sent")[1] == "nothing ever left this device\n"
    assert "Nothing was released" in run("budget", "show")[1]


def test_an_unknown_release_is_one_line_and_an_exit_code(run, releases):
    code, _, error = run("sent", "ffff")
    assert code == 1
    assert error.count("\n") == 1


def test_the_budget_is_shown_with_unit_adjacency_and_delta(run, releases):
    code, text, _ = run("budget", "show")
    assert code == 0
    for words in ("epsilon 8.00 at delta 1e-05", "one user", "replace-one", "2 of 5 releases used"):
        assert words in text
    shown = json.loads(run("budget", "show", "--json")[1])
    assert (shown["limit"], shown["unit"], shown["runs"][0]["debited"]) == (8.0, "user", 2)


def test_a_refill_is_the_owners_word_and_needs_the_policy_too(run, releases):
    assert run("budget", "refill", "--epsilon", "12")[0] == 3
    assert run("budget", "refill", "--epsilon", "7")[0] == 2
    code, text, _ = run("policy", "set", "epsilon=12")
    assert code == 0
    assert "stays at epsilon 8" in text
    assert run("budget", "refill", "--epsilon", "12")[0] == 0
    assert "epsilon 12.00" in run("budget", "show")[1]


def test_a_refill_waits_for_no_running_vault(run, releases, device):
    with device.open_ledger():
        assert run("budget", "refill", "--epsilon", "12")[0] == 3
        assert run("sent")[0] == 0
        assert run("budget", "show")[0] == 0


def test_the_policy_is_shown_changed_and_signed(run, device):
    before = device.policy()
    assert 'units = ["user", "example"]' in run("policy", "show")[1]
    assert run("policy", "set", "epsilon=4", "trust_coordinator=true", 'hours=["22:00-06:00"]')[0] == 0
    after = device.policy()
    assert (after.epsilon, after.trust_coordinator, after.hours) == (4.0, True, ("22:00-06:00",))
    assert after.serial == before.serial + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["policy", "set"], "key=value"),
        (["policy", "set", "nonsense=1"], "nonsense"),
        (["policy", "set", "epsilon"], "key=value"),
        (["policy", "set", "epsilon=-1", "clip=0"], "clip"),
        (["policy", "set", "--file", "no-such.toml"], "no-such.toml"),
        (["policy", "check", "/dev/null"], "/dev/null: the release spec"),
    ],
)
def test_a_mistake_in_a_policy_changes_nothing(run, device, arguments, words):
    before = device.policy()
    code, _, error = run(*arguments)
    assert code == 2
    assert words in error
    assert device.policy() == before


def test_a_policy_that_somebody_else_changed_is_refused(run, device):
    path = device.folder / "policy.toml"
    path.write_text(path.read_text().replace("epsilon = 8.0", "epsilon = 80.0"))
    assert run("policy", "check")[0] == 3
    assert run("policy", "show")[0] == 3


def test_a_runs_spec_is_held_against_policy_and_budget(run, releases, tmp_path):
    file = tmp_path / "spec.json"
    file.write_text(SPEC.to_text())
    assert run("policy", "check", str(file))[1].endswith("granted\n")
    run("policy", "set", "epsilon=1")
    code, text, _ = run("policy", "check", str(file))
    assert code == 3
    assert "policy-epsilon" in text


def test_without_a_device_every_command_says_how_to_make_one(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "elsewhere"))
    for arguments in (["sent"], ["budget", "show"], ["policy", "show"], ["policy", "check"]):
        code, _, error = run(*arguments)
        assert code == 1
        assert "data add" in error
    assert not (tmp_path / "elsewhere").exists()


class TestAPassphrase:
    """A device that a program made with a passphrase: a terminal asks for it, and the background cannot."""

    @pytest.fixture(autouse=True)
    def device(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path))
        monkeypatch.setattr("common.keys._keyring", lambda: None)
        monkeypatch.setattr("common.keys.SCRYPT_COST", 1 << 4)
        return DeviceHome.open(create=True, ask_passphrase=lambda: "a passphrase of mine")

    @pytest.mark.parametrize("words", [["status"], ["data", "list"], ["pause"], ["up"], ["serve"]])
    def test_without_a_terminal_it_is_said_that_it_is_needed(self, words, capsys):
        assert homespun.main(["device", *words]) == 1
        assert "asked for at a terminal" in capsys.readouterr().err

    def test_at_a_terminal_commands_ask_and_what_stays_in_the_background_is_refused(
        self, tmp_path, monkeypatch, capsys
    ):
        monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
        monkeypatch.setattr("typer.prompt", lambda *words, **options: "a passphrase of mine")
        monkeypatch.setattr("typer.confirm", lambda *words, **options: True)
        (tmp_path / "a.txt").write_text("w1 w2 w3")
        for words in (["status"], ["data", "add", str(tmp_path / "a.txt")], ["data", "list"]):
            assert homespun.main(["device", *words]) == 0
        for words in (["up"], ["serve"]):
            assert homespun.main(["device", *words]) == 3
            assert "has a passphrase" in capsys.readouterr().err
