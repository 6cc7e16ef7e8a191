"""Five real SuperNodes complete rounds of a secure sum, with one of them killed between any two legs.

Everything is as shipped: SuperLink, SuperNodes, bundle, vaults with their own homes, keys and ledgers. One vault, that
of the device whose SuperNode is killed, is served from this process, so that it can be killed between two legs.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from common.config import RunConfig
from common.ledger import verify
from common.secagg_messages import Leg
from server import run_folder
from server.checkpoint import Checkpoint

pytestmark = [pytest.mark.flower, pytest.mark.fleet, pytest.mark.timeout(900)]

PEOPLE = ("ada", "bela", "cleo", "dora", "emil")
VICTIM = "emil"
POLICY = "smallest_cohort = 3\nclip = 1.0\nepsilon = 1000.0\nmains_power_only = false\n"


def superlink():
    """The federation of tests/flower/test_superlink.py, for five people; test files are no modules."""
    path = Path(__file__).with_name("test_superlink.py")
    spec = importlib.util.spec_from_file_location("superlink_of_five", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.PEOPLE, module.POLICY = PEOPLE, POLICY
    return module


SUPERLINK = superlink()


class Victim:
    """The device whose SuperNode is killed: its vault lives here, and strikes when a leg is asked for.

    Attributes:
        strike_at: The leg whose request comes too late; None lets the device live.
        legs: Legs that it was asked for and answered.
    """

    def __init__(self, federation, stack: ExitStack) -> None:
        from client.base_model import load_base
        from client.budget_keeper import BudgetKeeper
        from client.cli import read_user
        from client.device_home import DeviceHome
        from client.gate import Gate
        from client.policy import Policy
        from client.secure_sums import sums_of_device
        from client.trainer import Trainer
        from client.user_data import Encoder
        from client.vault import Vault, encode_user
        from client.vault_service import FleetService, Outbox, serving

        self.federation, self.strike_at, self.legs, self.node = federation, None, [], None
        home = DeviceHome.open(federation.home(VICTIM) / "device", create=True)
        home.grant(Policy.parse(POLICY.encode()))
        self.ledger = stack.enter_context(home.open_ledger())
        keeper = BudgetKeeper(home, self.ledger)
        base = load_base(federation.model, ("q_proj", "v_proj"))
        trainer = Trainer(base, rank=2, scaling=2.0)
        user = read_user(federation.root / f"{VICTIM}.jsonl", VICTIM)
        vault = Vault(
            trainer,
            {keeper.subject: encode_user(user, Encoder(base.tokenizer, 16))}.__getitem__,
            seed=1,
            residents=[keeper.subject],
            gate=Gate(keeper.record, keep=keeper.keep),
            grants=keeper.check,
            sums=sums_of_device(home, keeper, federation.root / "devices.json"),
        )
        outer = self

        class Striking(FleetService):
            def Sum(self, request, context):
                if outer.strike_at == request.leg:
                    outer.kill()
                reply = super().Sum(request, context)
                outer.legs.append(Leg(request.leg))
                return reply

        service = Striking(vault, Outbox(home.folder / "outbox", bytes(32)), model=base.digest)
        stack.enter_context(serving(service, federation.root / f"{VICTIM}.sock", dim=trainer.layout.size))
        self.key = home.key.verify_key.hex

    def kill(self) -> None:
        """End the SuperNode and what it started, at once."""
        if self.node is not None and self.node.poll() is None:
            os.killpg(self.node.pid, signal.SIGKILL)
            self.node.wait()


class FederationOfFive(SUPERLINK.Federation):
    """Four vaults in processes of their own, one here; five SuperNodes."""

    def up(self) -> None:
        import sys

        link = ("--insecure", "--host", "127.0.0.1", "--port", str(self.port))
        self.start("superlink", "flower-superlink", *link, "--database", str(self.root / "state.db"))
        vaults = {}
        for person in PEOPLE:
            data = self.root / f"{person}.jsonl"
            data.write_text(json.dumps({"user": person, "texts": SUPERLINK.diary(person)}) + "\n")
            if person == VICTIM:
                continue
            arguments = ("--data", str(data), "--user", person, "--model", str(self.model), "--max-tokens", "16")
            place = ("--socket", str(self.root / f"{person}.sock"), "--policy", str(self.root / "policy.toml"))
            roster = ("--roster", str(self.root / "devices.json"))
            command = (sys.executable, str(SUPERLINK.ROOT / "homespun.py"), "device", "up", *arguments, *place, *roster)
            home = {"HOMESPUN_HOME": str(self.home(person)), "OMP_NUM_THREADS": "1"}
            vaults[person] = self.start(f"vault-{person}", *command, **home)
        self.victim = Victim(self, self._stack)
        for person in vaults:
            SUPERLINK.wait_for(
                lambda person=person: '"key"' in self.log(f"vault-{person}"), 240, f"the vault of {person}"
            )
        keys = [json.loads(self.log(f"vault-{person}").splitlines()[-1])["key"] for person in vaults]
        (self.root / "devices.json").write_text(json.dumps([*keys, self.victim.key]))
        for person, port in zip(PEOPLE, self.node_ports, strict=True):
            if person != VICTIM:
                self.start(f"node-{person}", *self.node_command(person, port))

    def node_command(self, person: str, port: int):
        where = ("--superlink", f"127.0.0.1:{self.port}", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        config = f'vault="{self.root / f"{person}.sock"}"'
        return ("flower-supernode", *where, "--node-config", config)

    def revive(self) -> None:
        """Start the victim's SuperNode, in a process group of its own, so that all of it can be killed at once."""
        log = self._stack.enter_context((self.root / f"node-{VICTIM}.log").open("ab"))
        port = SUPERLINK.free_ports(1)[0]
        self.victim.node = subprocess.Popen(
            self.node_command(VICTIM, port),
            cwd=self.root,
            env=self.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._stack.callback(self.victim.kill)

    def prepare(self, name: str, rounds: int = 1) -> Path:
        config = RunConfig(
            model=str(self.model),
            users=5,
            cohort=5,
            rounds=rounds,
            spare_rounds=1,
            max_tokens=16,
            local_batch=2,
            noise="distributed",
            epsilon=8.0,
            coordinator_epsilon=8.0,
            round_timeout=240.0,
        )
        opened = run_folder.create(
            self.root / name,
            config,
            population=5,
            model=self.model,
            digest=SUPERLINK.model_digest(self.model),
            data="d" * 64,
        )
        opened.ledger.close()
        shutil.copy(self.root / "devices.json", opened.path / "devices.json")
        return opened.path


@pytest.fixture(scope="module")
def federation(tiny_base_folder):
    root = Path(tempfile.mkdtemp(prefix="hs-"))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HOMESPUN_HOME", str(root / "server"))
    try:
        with ExitStack() as stack:
            federation = FederationOfFive(root, tiny_base_folder, stack)
            federation.up()
            yield federation
    finally:
        monkeypatch.undo()
        shutil.rmtree(root, ignore_errors=True)


def bodies(path: Path, kind: str) -> list[dict]:
    return [entry.body for entry in verify(path.read_bytes()).entries if entry.kind == kind]


def run_to_its_end(federation, name: str) -> Path:
    folder = federation.prepare(name)
    process = federation.run(folder)

    def done() -> bool:
        # `flwr run --stream` may lose its stream on a busy machine; the run goes on without it.
        if "raised an exception" in federation.log(f"run-{name}"):
            return True
        return Checkpoint.load(folder / run_folder.CHECKPOINT).round == 1

    SUPERLINK.wait_for(done, 600, "a round")
    assert Checkpoint.load(folder / run_folder.CHECKPOINT).round == 1, federation.log(f"run-{name}")
    SUPERLINK.end(process)
    return folder


def test_five_devices_complete_a_round_of_a_secure_sum(federation):
    federation.revive()
    folder = run_to_its_end(federation, "all")
    kinds = [entry.kind for entry in verify((folder / run_folder.LEDGER).read_bytes()).entries]
    assert kinds == ["open", "reserve", "coordinator", "debit", "release"]
    assert federation.victim.legs == [Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK]
    run = bodies(folder / run_folder.LEDGER, "debit")[0]["run"]
    for person in PEOPLE:
        own = federation.home(person) / "device" / "ledger.jsonl"
        assert [one["round"] for one in bodies(own, "join") if one["run"] == run] == [1]
        (release,) = [one for one in bodies(own, "release") if one["run"] == run]
        assert release["dtype"] == "uint8"  # what left is a masked vector, byte by byte
    # What five clipped updates move the adapter by is bounded, and noise is in it.
    before = run_folder.reopen(federation.prepare("fresh"))
    before.ledger.close()
    after = Checkpoint.load(folder / run_folder.CHECKPOINT).vector
    assert np.abs(after - before.start).max() > 1e-3
    # One receipt per device is committed to, and each device's own ledger has it.
    receipts = json.loads((folder / "receipts.jsonl").read_text().splitlines()[0])["receipts"]
    own = {
        one["sha256"]
        for person in PEOPLE
        for one in bodies(federation.home(person) / "device" / "ledger.jsonl", "release")
    }
    assert len(receipts) == 5
    assert set(receipts) <= own


@pytest.mark.parametrize("leg", [Leg.SHARES, Leg.MASKED, Leg.CONSENT, Leg.UNMASK])
def test_a_supernode_that_is_killed_between_two_legs_costs_itself_and_not_the_round(federation, leg):
    """Killed when the request of `leg` has come: it answered the leg before, and not this one."""
    victim = federation.victim
    victim.kill()
    federation.revive()
    victim.legs.clear()
    victim.strike_at = leg
    try:
        folder = run_to_its_end(federation, f"killed-{leg.name.lower()}")
    finally:
        victim.strike_at = None
    kinds = [entry.kind for entry in verify((folder / run_folder.LEDGER).read_bytes()).entries]
    assert kinds == ["open", "reserve", "coordinator", "debit", "release"]
    run = bodies(folder / run_folder.LEDGER, "debit")[0]["run"]
    charged = [one for one in bodies(federation.home(VICTIM) / "device" / "ledger.jsonl", "debit") if one["run"] == run]
    # Its vector left, or was about to, from the masked leg on; then it stays charged.
    assert len(charged) == (0 if leg is Leg.SHARES else 1)
    assert victim.node.poll() is not None
