"""What many tests share: no network, and a tiny base with random weights, saved as an ordinary model folder."""

from __future__ import annotations

import ipaddress
import itertools
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(FLWR_TELEMETRY_ENABLED="0", FLWR_DISABLE_UPDATE_CHECK="1", RAY_USAGE_STATS_ENABLED="0")

# The same examples everywhere, so that a red run is about the change; HYPOTHESIS_PROFILE=search looks for new ones.
hypothesis.settings.register_profile("same", derandomize=True, deadline=None)
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


class NetworkTouchedError(RuntimeError):
    """A test reached for the network. Not an OSError, which code under test might take for being offline."""


def _refuse_network(event, arguments):
    """Audit hook: let sockets reach this machine only. `make test` cuts the network off as well where it can."""
    if event in {"socket.connect", "socket.sendto"}:
        address = arguments[1]
    elif event == "socket.getaddrinfo":
        address = arguments
    else:
        return
    host = address[0] if isinstance(address, tuple) else None  # a Unix socket's address is its path
    if host is not None and not _is_local(host):
        raise NetworkTouchedError(f"a test reached for the network: {event} {host}")


def _is_local(host) -> bool:
    name = host.decode() if isinstance(host, bytes) else str(host)
    if name in {"", "localhost"}:
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


sys.addaudithook(_refuse_network)


@pytest.fixture(scope="session", autouse=True)
def _keys_of_tests(tmp_path_factory):
    """Keep keys and state that tests make out of the folders of whoever runs them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("configuration")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def slower() -> float:
    """How many times slower this machine is than that which limits of processor time were written on; 1 at least.

    What is told apart by such a limit, as an import of torch, is ten times over it there and here.
    """
    command = [sys.executable, "-c", "import time, numpy, typer; print(time.process_time())"]
    seconds = [float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(3)]
    return max(1.0, min(seconds) / 0.12)


@pytest.fixture
def same_run(monkeypatch):
    """Every run has one name, from which a rehearsal takes its noise: what is measured on it is the same each time."""
    from types import SimpleNamespace

    from server import run_folder

    monkeypatch.setattr(run_folder, "secrets", SimpleNamespace(token_hex=lambda count: "ab" * count))


@dataclass(frozen=True)
class TokenExample:
    ids: np.ndarray
    first_label: int


def _random_examples(generator, count, *, vocabulary=128, shortest=4, longest=20):
    """Records of random tokens and unequal length, with a random prompt length."""
    examples = []
    for _ in range(count):
        length = int(generator.integers(shortest, longest + 1))
        ids = generator.integers(3, vocabulary, size=length).astype(np.int32)
        examples.append(TokenExample(ids, int(generator.integers(1, length - 1))))
    return examples


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory) -> Path:
    """A Llama of hidden size 32 and two layers with random weights and a word-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, 128)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_examples():
    """A function `(generator, count) -> records` of random tokens."""
    return _random_examples


def _release_spec(**changes):
    """A sound release spec of six shared numbers and no witnesses; `changes` replace fields."""
    from common.wire import ReleaseSpec

    fields = {
        "run": "ab" * 16,
        "method": "dual",
        "names": ("layer.lora_A.weight", "layer.lora_B.weight"),
        "shapes": ((1, 4), (2, 1)),
        "dtype": "float32",
        "unit": "user",
        "noise": "central",
        "clip": 1.0,
        "noise_multiplier": 1.0,
        "sampling_rate": 0.5,
        "rounds": 4,
        "epsilon": "8.0",
        "delta": 1e-5,
        "population": 10,
        "recipe": {
            "local_steps": 1,
            "local_batch": 2,
            "learning_rate": 0.5,
            "optimizer": "sgd",
            "scaling": 2.0,
            "example_records": 20,
        },
        "model": "cd" * 32,
        "source": "ef" * 32,
    }
    return ReleaseSpec(**(fields | changes))


@pytest.fixture(scope="session")
def release_spec():
    """A function `(**changes) -> ReleaseSpec` of six shared numbers."""
    return _release_spec


@dataclass(frozen=True)
class Fleet:
    """A finished run of real devices that trained nothing but keep real budgets: its folder, and their homes."""

    run: Path
    home: Path
    devices: tuple[Path, ...]


def _device_vault(home, keeper):
    """What a device's vault is but for the training: the keeper, the gate and the ledger are those of production."""
    from client.gate import Gate
    from common.privacy import Randomness, clip_rows

    class DeviceVault:
        def subjects(self):
            return [keeper.subject]

        def train(self, assignment):
            keeper.check(assignment.spec, assignment.round)
            generator = np.random.default_rng([int(keeper.subject[:8], 16), assignment.round])
            update = generator.normal(size=(1, assignment.spec.model_dim))
            gate = Gate(keeper.record, keep=keeper.keep)
            clipped = clip_rows(update, assignment.spec.clip)
            return gate.release(clipped, assignment.spec, assignment.round, Randomness.system())

    return DeviceVault()


@pytest.fixture(scope="session")
def make_fleet(tmp_path_factory):
    """A function `(noise, count) -> Fleet`: a federation of real device folders, in this process; made once each."""
    from contextlib import ExitStack

    made: dict[tuple[str, int], Fleet] = {}

    def make(noise: str = "local", count: int = 4) -> Fleet:
        from safetensors.numpy import save_file

        from client.app import build
        from client.budget_keeper import BudgetKeeper
        from client.device_home import DeviceHome
        from client.policy import Policy
        from common.config import RunConfig
        from server import run_folder
        from server.cohort import Roster
        from server.rounds import Rounds
        from simulations.grid import InProcessGrid, submit_here

        if (noise, count) in made:
            return made[noise, count]
        root = tmp_path_factory.mktemp(f"fleet-{noise}")
        names = [f"model.layers.0.self_attn.{target}.weight" for target in ("q_proj", "v_proj")]
        (root / "base").mkdir()
        save_file({name: np.zeros((4, 6), np.float32) for name in names}, root / "base" / "model.safetensors")
        (root / "base" / "config.json").write_text("{}")
        config = RunConfig(model=str(root / "base"), users=count, cohort=count - 1, rounds=3, noise=noise, epsilon=16.0)
        granted = {"epsilon": 20.0, "trust_coordinator": True, "smallest_cohort": 1, "smallest_noise_multiplier": 0.1}
        homes, turns = [], itertools.count()

        def all_but_one_in_turn(roster, rate, randomness):
            absent = next(turns) % len(roster.subjects)
            return [subject for index, subject in enumerate(roster.subjects) if index != absent]

        with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
            patch.setenv("HOMESPUN_HOME", str(root / "home"))
            # Coins would leave one of four devices out of all three rounds in every sixteenth run.
            patch.setattr(Roster, "cohort", all_but_one_in_turn)
            for number in range(count):
                home = DeviceHome.open(root / f"device-{number}", create=True)
                home.grant(Policy.model_validate(granted))
                homes.append(home)
            opened = run_folder.create(
                root / "run",
                config,
                population=count,
                model=root / "base",
                digest="cd" * 32,
                data="ef" * 32,
            )
            vaults = {}
            for node, home in enumerate(homes, start=2):
                vaults[node] = _device_vault(home, BudgetKeeper(home, stack.enter_context(home.open_ledger())))
            grid = InProcessGrid(submit_here(build(lambda context: vaults[context.node_id]), count), count)
            log = opened.path / run_folder.LOG

            def on_round(finished):
                line = {"round": finished.number, "seconds": finished.seconds, "rejected": finished.rejected}
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")

            Rounds(config, opened.spec, opened.layout, opened.start, opened.path, opened.ledger).run(grid, on_round)
            opened.ledger.close()
        made[noise, count] = Fleet(root / "run", root / "home", tuple(home.folder for home in homes))
        return made[noise, count]

    return make


@pytest.fixture
def fleet_zips(make_fleet, tmp_path, monkeypatch):
    """A function `(noise, receipts) -> (server's zip, devices' zips)` of a finished run."""

    def write(noise: str = "local", *, receipts: bool = True, count: int = 4):
        from client.device_evidence import write_device_evidence
        from client.device_home import DeviceHome
        from server.run_evidence import write_run_evidence
        from server.run_folder import signing_key

        fleet = make_fleet(noise, count)
        monkeypatch.setenv("HOMESPUN_HOME", str(fleet.home))
        made = "2026-01-31T12:00:00Z"
        server = tmp_path / f"server-{noise}.zip"
        write_run_evidence(fleet.run, server, signing_key(), time=made, receipts=receipts)
        zips = []
        for folder in fleet.devices:
            zips.append(tmp_path / f"{folder.name}-{noise}.zip")
            write_device_evidence(DeviceHome.open(folder), zips[-1], time=made)
        return server, zips

    return write
