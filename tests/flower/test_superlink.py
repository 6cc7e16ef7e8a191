"""A real federation on loopback: a SuperLink, two SuperNodes, two vaults, and the bundle that this repository makes.

Nothing is faked: the server's app and the shim run from the bundle in processes that Flower starts, each vault is
`homespun device up` in its own home, and every process that is started here is ended here.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from client.base_model import model_digest
from common.config import RunConfig
from common.ledger import verify
from server import run_folder
from server.checkpoint import Checkpoint
from simulations.bench.kill import Found, check_ledger, check_server

pytestmark = pytest.mark.flower

ROOT = Path(__file__).resolve().parent.parent.parent
BIN = Path(sys.executable).parent
PEOPLE = ("ada", "bela")
POLICY = "trust_coordinator = true\nsmallest_cohort = 2\nclip = 1.0\nepsilon = 100.0\n"


class Federation:
    """Processes on this machine, with everything that they write under one folder."""

    def __init__(self, root: Path, model: Path, stack: ExitStack) -> None:
        self.root, self.model, self._stack = root, model, stack
        self.devices, self.nodes = [], []
        self._commands: dict[str, tuple[str, ...]] = {}
        self.port, *self.node_ports = free_ports(1 + len(PEOPLE))
        self.environment = os.environ | {
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "FLWR_HOME": str(root / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "HOMESPUN_HOME": str(root / "server"),
            "XDG_CONFIG_HOME": str(root / "config"),
        }
        (root / "flower").mkdir()
        (root / "flower" / "config.toml").write_text(
            f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        )
        ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "build", "*.fab", "worlds")
        shutil.copytree(ROOT, root / "homespun", ignore=ignored)
        (root / "policy.toml").write_text(POLICY)

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        log = self._stack.enter_context((self.root / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command, cwd=self.root, env=self.environment | environment, stdout=log, stderr=subprocess.STDOUT
        )
        self._stack.callback(end, process)
        return process

    def log(self, name: str) -> str:
        return (self.root / f"{name}.log").read_text(errors="replace")

    def home(self, person: str) -> Path:
        return self.root / f"home-{person}"

    def up(self) -> None:
        """Start everything, and wait for the vaults; the server waits for the nodes itself."""
        link = ("--insecure", "--host", "127.0.0.1", "--port", str(self.port))
        self.start("superlink", "flower-superlink", *link, "--database", str(self.root / "state.db"))
        for person in PEOPLE:
            data = self.root / f"{person}.jsonl"
            data.write_text(json.dumps({"user": person, "texts": diary(person)}) + "\n")
            arguments = ("--data", str(data), "--user", person, "--model", str(self.model), "--max-tokens", "16")
            place = ("--socket", str(self.root / f"{person}.sock"), "--policy", str(self.root / "policy.toml"))
            self._commands[person] = (sys.executable, str(ROOT / "homespun.py"), "device", "up", *arguments, *place)
            self.devices.append(self.vault(person))
        for person in PEOPLE:
            wait_for(lambda person=person: (self.root / f"{person}.sock").exists(), 300, f"the vault of {person}")
            self.nodes.append(self.node(person))

    def vault(self, person: str) -> subprocess.Popen[bytes]:
        """Start a person's vault, again if need be."""
        home = {"HOMESPUN_HOME": str(self.home(person)), "OMP_NUM_THREADS": "1"}
        return self.start(f"vault-{person}", *self._commands[person], **home)

    def node(self, person: str) -> subprocess.Popen[bytes]:
        """Start a person's SuperNode, again if need be."""
        port = self.node_ports[PEOPLE.index(person)]
        where = ("--superlink", f"127.0.0.1:{self.port}", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        config = f'vault="{self.root / f"{person}.sock"}"'
        return self.start(f"node-{person}", "flower-supernode", *where, "--node-config", config)

    def prepare(self, name: str, rounds: int, **changes) -> Path:
        """Prepare a run's folder as a server's command does."""
        config = RunConfig(
            model=str(self.model),
            users=2,
            cohort=2,
            rounds=rounds,
            max_tokens=16,
            local_batch=2,
            epsilon=8.0,
            round_timeout=180.0,
            **changes,
        )
        opened = run_folder.create(
            self.root / name,
            config,
            population=2,
            model=self.model,
            digest=model_digest(self.model),
            data="d" * 64,
        )
        opened.ledger.close()
        return opened.path

    def run(self, folder: Path) -> subprocess.Popen[bytes]:
        """`flwr run .`, with the run's folder as the only thing that it is told."""
        command = ("flwr", "run", ".", "here", "--stream", "-c", f'folder="{folder}"')
        process = self.start(
            f"run-{folder.name}", "sh", "-c", 'cd "$0" && exec "$@"', str(self.root / "homespun"), *command
        )
        return process


def diary(person: str) -> list[str]:
    return [f"w{10 + index} w{20 + index} secret-of-{person} w{30 + index} w9 w8" for index in range(8)]


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def wait_for(condition, seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(0.2)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ask it to stop, so that it stops its own children; insist if it does not."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def rounds_done(folder: Path) -> int:
    return Checkpoint.load(folder / run_folder.CHECKPOINT).round


def kinds(path: Path) -> list[str]:
    return [entry.kind for entry in verify(path.read_bytes()).entries]


@pytest.fixture(scope="module")
def federation(tiny_base_folder):
    # Not pytest's own folder: the path of a Unix socket has at most 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="hs-"))
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HOMESPUN_HOME", str(root / "server"))
    try:
        with ExitStack() as stack:
            federation = Federation(root, tiny_base_folder, stack)
            federation.up()
            yield federation
    finally:
        monkeypatch.undo()
        shutil.rmtree(root, ignore_errors=True)


def test_two_devices_train_two_rounds_through_a_superlink(federation):
    folder = federation.prepare("first", rounds=2)
    started = time.monotonic()
    process = federation.run(folder)
    wait_for(lambda: rounds_done(folder) == 2 or process.poll() is not None, 400, "two rounds")
    assert rounds_done(folder) == 2, federation.log("run-first")
    assert process.wait(180) == 0, federation.log("run-first")
    print(f"two rounds in {time.monotonic() - started:.1f} s")

    assert kinds(folder / run_folder.LEDGER) == ["open", "reserve", "debit", "release", "debit", "release"]
    for person in PEOPLE:
        own = kinds(federation.home(person) / "device" / "ledger.jsonl")
        assert own == ["open", "refill", "reserve", "debit", "release", "debit", "release"]
    enrolled = json.loads((folder / "enrolled.json").read_text())
    assert len(enrolled) == 2
    before, after = (
        Checkpoint.load(path / run_folder.CHECKPOINT).vector for path in (federation.prepare("x", 1), folder)
    )
    assert np.abs(after - before).max() > 1e-3


def test_nothing_that_a_person_wrote_is_on_the_side_of_the_server(federation):
    enrolled = json.loads((federation.root / "first" / "enrolled.json").read_text())
    private = {f"{person}.jsonl" for person in PEOPLE}
    files = [path for path in federation.root.rglob("*") if path.is_file() and path.name not in private]
    contents = {}
    for path in files:
        with suppress(FileNotFoundError):  # what a process that still runs has put away meanwhile
            contents[path] = path.read_bytes()
    for person in PEOPLE:
        marked = [path for path, content in contents.items() if f"secret-of-{person}".encode() in content]
        assert marked == []
    # The same search finds what does cross: who is enrolled, under random names.
    assert any(
        enrolled[0].encode() in content for path, content in contents.items() if path.name.startswith("state.db")
    )


KILLS = 10
"""Instants at which a process is killed through a real SuperLink: the server's app seven times, a vault three times."""


def holder_of(path: Path) -> int | None:
    """The process that has a ledger open for writing."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if link.readlink() == path.resolve() and "w" in mode_of(link):
                return int(link.parts[2])
        except OSError:
            continue
    return None


def mode_of(link: Path) -> str:
    flags = next(line for line in (link.parents[1] / "fdinfo" / link.name).read_text().splitlines() if "flags" in line)
    return "w" if int(flags.split()[1], 8) & os.O_WRONLY else "r"


@pytest.mark.fleet
@pytest.mark.timeout(2400)
def test_attack_06_kill_9_through_a_real_superlink_never_lowers_what_was_spent_and_the_run_goes_on(federation):
    """Ten random instants of the server's app and of a vault; the checks are those of `simulations.bench.kill`."""
    generator, found = np.random.default_rng(), Found()
    folder = federation.prepare("killed", rounds=12, spare_rounds=2 * KILLS)
    ledger, device = folder / run_folder.LEDGER, federation.home(PEOPLE[0]) / "device" / "ledger.jsonl"
    process, before, at_device = federation.run(folder), (), ()
    wait_for(lambda: rounds_done(folder) >= 1 or process.poll() is not None, 180, "a first round")
    began = time.monotonic()
    wait_for(lambda: rounds_done(folder) >= 2 or process.poll() is not None, 180, "a second round")
    usual = time.monotonic() - began
    for number in range(KILLS):
        wait_for(lambda: holder_of(ledger) is not None or rounds_done(folder) == 12, 180, "the server's app")
        time.sleep(float(generator.uniform(0.0, 2.0 * usual)))
        of_vault = number % 3 == 2
        victim = holder_of(device if of_vault else ledger)
        if victim is not None:
            found.instants += 1
            os.kill(victim, signal.SIGKILL)
        if of_vault:
            end(federation.devices[0])
            (federation.root / f"{PEOPLE[0]}.sock").unlink(missing_ok=True)
            federation.devices[0] = federation.vault(PEOPLE[0])
        else:
            end(process)
            process = federation.run(folder)
        before = check_server(folder, folder / "no-log", before, found)
        at_device = check_ledger(device, at_device, found)
    print(json.dumps(found.__dict__))
    assert found.violations == []
    done = rounds_done(folder)
    wait_for(lambda: rounds_done(folder) > min(done, 11), 900, "a round after the last kill")
    done = rounds_done(folder)
    end(process)
    before = check_server(folder, folder / "no-log", before, found)
    check_ledger(device, at_device, found)
    found.debits = sum(entry.kind == "debit" for entry in before)
    print(json.dumps(found.__dict__))
    assert found.violations == []
    assert found.instants >= KILLS // 2  # the run may have ended before the last of them
    served = [entry.body["round"] for entry in before if entry.kind == "release"]
    assert served[:done] == sorted(set(served))[:done]
    assert set(range(1, done + 1)) <= set(served)
    assert found.debits >= done


def test_a_run_goes_on_without_a_device_that_leaves(federation):
    def debited():
        return [kinds(federation.home(person) / "device" / "ledger.jsonl").count("debit") for person in PEOPLE]

    folder, before = federation.prepare("second", rounds=2), debited()
    process = federation.run(folder)
    wait_for(lambda: rounds_done(folder) >= 1 or process.poll() is not None, 400, "a round")
    end(federation.nodes[1])
    wait_for(lambda: rounds_done(folder) == 2 or process.poll() is not None, 400, "two rounds")
    assert rounds_done(folder) == 2, federation.log("run-second")
    assert process.wait(180) == 0, federation.log("run-second")

    assert kinds(folder / run_folder.LEDGER).count("debit") == 2
    there, gone = (after - earlier for after, earlier in zip(debited(), before, strict=True))
    assert there == 2
    assert gone in (1, 2)  # the second round may have been asked for before it left
