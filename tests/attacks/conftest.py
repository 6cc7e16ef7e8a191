"""What the attacks share: a small population, runs of it over the real apps, and a tap on everything that is sent."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

USERS = 20
PROMPT = "w101 w102 w103 w104 w105 w106"
"""What one user wrote, and nobody else."""


@dataclass
class Tap:
    """Everything that went over the grid, as the bytes that Flower would put on a wire.

    `forge`, where set, is given every reply to a training message with its question, and returns the replies that
    arrive instead.
    """

    asked: list[Any] = field(default_factory=list)
    answered: list[Any] = field(default_factory=list)
    forge: Any = None

    def wire(self, messages) -> list[bytes]:
        from flwr.common.serde import message_to_proto

        return [message_to_proto(message).SerializeToString() for message in messages]

    def train(self):
        """Assignments and the releases that answered them, in pairs."""
        from common.wire import Assignment, Release

        answers = {message.metadata.reply_to_message_id: message for message in self.answered}
        for message in self.asked:
            if message.metadata.message_type == "train":
                answer = answers[message.metadata.message_id]
                yield Assignment.from_records(message.content), Release.from_records(answer.content)


@dataclass
class Device:
    """One device whose owner is not the server's friend."""

    ledger: Any
    vault: Any
    service: Any

    def ask(self, assignment):
        """What the bundle gets: a release, or a refusal with its code."""
        from client import vault_pb2 as messages
        from common.errors import Refusal
        from common.wire import WIRE_FORMAT, Release, from_raw_bytes, raw_bytes

        accepted = self.service.Train(
            messages.TrainRequest(
                format=WIRE_FORMAT,
                spec=assignment.spec.to_text(),
                round=assignment.round,
                subjects=assignment.users,
                vector=raw_bytes(assignment.vector),
                clip_scale=assignment.clip_scale,
            ),
            None,
        )
        if accepted.refusal:
            raise Refusal(accepted.refusal, "refused")
        reply = self.service.Collect(messages.CollectRequest(ticket=accepted.ticket, wait_seconds=20.0), None)
        if reply.refusal:
            raise Refusal(reply.refusal, "refused")
        total = from_raw_bytes(reply.release.total, reply.release.dtype)
        return Release(total, reply.release.users, reply.release.receipt)

    def count(self, kind: str) -> int:
        return sum(entry.kind == kind for entry in self.ledger.entries())

    def close(self) -> None:
        self.service.close()
        self.ledger.close()


@dataclass
class Study:
    """Runs of one small population over the real server app, client app, vault and gate."""

    base: Path
    notes: Path
    folder: Path
    tap: Tap

    def config(self, **changes):
        from common.config import RunConfig

        values = {
            "model": str(self.base),
            "data": str(self.notes),
            "cohort": 8,
            "rounds": 2,
            "local_batch": 2,
            "personal_steps": 2,
            "personal_batch": 2,
            "evaluation_users": 2,
            "method": "fedavg",
            "workers": 0,
            "learning_rate": 0.05,
            "max_tokens": 32,
        }
        return RunConfig(**{**values, **changes})

    def start(self, name="run", progress=None, *, rounds_only=False, preflight=None, **changes) -> Path:
        """Run to the end, or the rounds alone, without preflight, personal models and report; returns the folder."""
        from simulations import run

        with pytest.MonkeyPatch.context() as patch:
            if rounds_only:
                patch.setattr(run, "_finish", lambda *_: None)
            if not (preflight if preflight is not None else not rounds_only):
                patch.setattr(run, "_preflight", lambda *_: None)
            return run.start(self.config(**changes), self.folder / name, progress or run.Progress()).path

    def resume(self, path) -> None:
        """Go on with the rounds of a run that was stopped."""
        from simulations import run

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "_finish", lambda *_: None)
            patch.setattr(run, "_try_out", lambda *_: None)
            run.resume(path, run.Progress())

    def opened_spec(self, path):
        """The spec of a run."""
        from common.wire import ReleaseSpec

        return ReleaseSpec.from_text((path / "spec.json").read_text())

    def host(self, **changes):
        from simulations import hosts

        return hosts.host_of(self.config(**changes))

    def device(self, host, subject="3", name="device", **policy):
        """A device of one subject: its vault, gate, ledger, policy, outbox and service, without the socket."""
        from client.budget_keeper import BudgetKeeper
        from client.device_home import DeviceHome
        from client.gate import Gate
        from client.policy import Policy
        from client.vault import Vault
        from client.vault_service import FleetService, Outbox

        home = DeviceHome.open(self.folder / name, create=True)
        home.grant(Policy(**{"smallest_cohort": 2, **policy}))
        ledger = home.open_ledger()
        keeper = BudgetKeeper(home, ledger)
        vault = Vault(
            host.trainer,
            host.population.encoded,
            seed=1,
            residents=[subject],
            gate=Gate(keeper.record, keep=keeper.keep),
            grants=keeper.check,
        )
        service = FleetService(vault, Outbox(home.folder / "outbox", bytes(32)), model=host.base.digest)
        return Device(ledger, vault, service)

    def assignment(self, spec, number=1, users=("3",), vector=None):
        """What a server asks of a device."""
        from common.adapters import Layout, initial_vector
        from common.wire import Assignment

        layout = Layout.from_json([[name, shape] for name, shape in zip(spec.names, spec.shapes, strict=True)])
        start = initial_vector(layout, np.random.default_rng(0)) if vector is None else vector
        return Assignment(spec, number, users, start)

    def spec(self, host, **changes):
        """The spec that a server prepares, with `changes` that a hostile one makes."""
        from dataclasses import replace

        from server.run_folder import prepare_spec

        fields = {"method", "clip", "epsilon", "noise", "unit", "rounds", "cohort"}
        config = host.config.model_copy(update={k: v for k, v in changes.items() if k in fields})
        spec, _ = prepare_spec(
            config,
            population=len(host.population),
            model=self.base,
            digest=host.base.digest,
            run="ab" * 16,
        )
        return replace(spec, **{k: v for k, v in changes.items() if k not in fields})


@pytest.fixture(scope="session")
def notes(tmp_path_factory) -> Path:
    """Twenty users with words of their own; user 3 alone wrote `PROMPT`."""
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    with path.open("w") as file:
        for user in range(USERS):
            own = generator.integers(3, 100, size=6)
            texts = [" ".join(f"w{w}" for w in generator.choice(own, size=8)) for _ in range(9)]
            if user == 3:
                texts = [PROMPT] * 9
            file.write(json.dumps({"user": f"secret-name-{user}", "texts": texts}) + "\n")
    return path


@pytest.fixture(scope="session")
def canary() -> str:
    return PROMPT


def _proven_epsilon(without, present, *, delta, confidence=0.999):
    """A lower bound on the epsilon of what made two samples of scores: of runs without a unit, and with it.

    The threshold is half way between their means, found on the first third; exact intervals (Clopper and Pearson, 1934)
    on both error rates of the rest; then the Gaussian mechanism with those rates.
    """
    from scipy import stats

    from common.accounting import Gaussian, epsilon_of

    first = len(without) // 3
    threshold = 0.5 * (np.mean(without[:first]) + np.mean(present[:first]))
    false, true = np.sum(without[first:] > threshold), np.sum(present[first:] > threshold)
    count, tail = len(without) - first, (1 - confidence) / 2
    highest = stats.beta.ppf(1 - tail, false + 1, count - false) if false < count else 1.0
    lowest = stats.beta.ppf(tail, true, count - true + 1) if true else 0.0
    mu = stats.norm.ppf(lowest) - stats.norm.ppf(highest)
    return epsilon_of(Gaussian(1.0 / mu), delta) if mu > 1e-3 else 0.0


@pytest.fixture(scope="session")
def proven_epsilon():
    return _proven_epsilon


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def study(tiny_base_folder, notes, tmp_path, monkeypatch) -> Study:
    """A place to run, with a tap on the grid."""
    from simulations import grid, run

    tap = Tap()

    class TappedGrid(grid.InProcessGrid):
        def push_messages(self, messages):
            listed = list(messages)
            tap.asked += listed
            return super().push_messages(listed)

        def pull_messages(self, message_ids):
            replies = list(super().pull_messages(message_ids))
            tap.answered += copy.deepcopy(replies)
            if tap.forge is None:
                return replies
            questions = {message.metadata.message_id: message for message in tap.asked}
            return [
                forged
                for reply in replies
                for forged in (
                    tap.forge(reply, questions[reply.metadata.reply_to_message_id])
                    if questions[reply.metadata.reply_to_message_id].metadata.message_type == "train"
                    else [reply]
                )
            ]

    monkeypatch.setattr(run, "InProcessGrid", TappedGrid)
    return Study(tiny_base_folder, notes, tmp_path, tap)


@pytest.fixture(scope="session")
def trainer(tiny_base_folder):
    from client.base_model import load_base
    from client.trainer import Trainer

    return Trainer(load_base(tiny_base_folder, ("q_proj", "v_proj")), rank=2, scaling=2.0)


@dataclass
class SumDevice:
    """A device that takes part in secure sums: its own home, key, ledger and vault, without the socket."""

    home: Any
    ledger: Any
    service: Any
    subject: str
    name: str

    def join(self, spec, number) -> bytes:
        """Train under `spec` and begin round `number`: its signed keys."""
        from client import vault_pb2 as messages
        from common.adapters import Layout, initial_vector
        from common.errors import Refusal
        from common.wire import WIRE_FORMAT, raw_bytes

        layout = Layout.from_json([[name, shape] for name, shape in zip(spec.names, spec.shapes, strict=True)])
        accepted = self.service.Train(
            messages.TrainRequest(
                format=WIRE_FORMAT,
                spec=spec.to_text(),
                round=number,
                subjects=[self.subject],
                vector=raw_bytes(initial_vector(layout, np.random.default_rng(0))),
            ),
            None,
        )
        reply = self.service.Collect(messages.CollectRequest(ticket=accepted.ticket, wait_seconds=20.0), None)
        refusal = accepted.refusal or reply.refusal
        if refusal:
            raise Refusal(refusal, "refused")
        return reply.keys

    def answer(self, spec, number, leg, message) -> bytes:
        """Its answer to the request of a later leg."""
        from client import vault_pb2 as messages
        from common.errors import Refusal
        from common.wire import WIRE_FORMAT

        reply = self.service.Sum(
            messages.SumRequest(
                format=WIRE_FORMAT, run=spec.run, round=number, leg=int(leg), subject=self.subject, message=message
            ),
            None,
        )
        if reply.refusal:
            raise Refusal(reply.refusal, "refused")
        return reply.answer

    def count(self, kind: str) -> int:
        return sum(entry.kind == kind for entry in self.ledger.entries())

    def close(self) -> None:
        self.service.close()
        self.ledger.close()


class SumFleet:
    """Some devices, each of its own owner, and what a coordinator needs to run a round among them or to cheat."""

    def __init__(self, study, count: int, **policy) -> None:
        from dataclasses import replace

        from server.run_folder import prepare_spec

        self.study, self.policy = study, {"smallest_cohort": 3, **policy}
        self.host = study.host(epsilon=8.0)
        config = self.host.config.model_copy(
            update={"noise": "distributed", "coordinator_epsilon": 8.0, "cohort": count, "users": count}
        )
        spec, _ = prepare_spec(
            config,
            population=count,
            model=study.base,
            digest=self.host.base.digest,
            run="ab" * 16,
        )
        self.spec = spec
        self.roster = study.folder / "devices.json"
        self.devices = [self.open(index) for index in range(count)]
        self.enrol(*(device.name for device in self.devices))
        self.replace = replace

    def open(self, index: int) -> SumDevice:
        """Open the device of one subject, or open it again as after a restart."""
        from client.budget_keeper import BudgetKeeper
        from client.device_home import DeviceHome
        from client.gate import Gate
        from client.policy import Policy
        from client.secure_sums import sums_of_device
        from client.vault import Vault
        from client.vault_service import FleetService, Outbox

        home = DeviceHome.open(self.study.folder / f"device-{index}", create=True)
        home.grant(Policy(**self.policy))
        ledger = home.open_ledger()
        keeper = BudgetKeeper(home, ledger)
        vault = Vault(
            self.host.trainer,
            self.host.population.encoded,
            seed=1,
            residents=[str(index)],
            gate=Gate(keeper.record, keep=keeper.keep),
            grants=keeper.check,
            sums=sums_of_device(home, keeper, self.roster),
        )
        service = FleetService(vault, Outbox(home.folder / "outbox", bytes(32)), model=self.host.base.digest)
        return SumDevice(home, ledger, service, str(index), home.key.verify_key.hex)

    def enrol(self, *names: str) -> None:
        """Write whose keys the owners of all devices know."""
        self.roster.write_text(json.dumps(sorted(names)))

    @property
    def names(self) -> dict[str, SumDevice]:
        return {device.name: device for device in self.devices}

    def coordinator(self, number=1):
        from common.secagg_coordinator import Coordinator
        from common.secure_sum import SecureSum

        return Coordinator(SecureSum.of(self.spec).terms(self.spec, number), enrolled=set(self.names))

    def terms(self, number=1):
        from common.secure_sum import SecureSum

        return SecureSum.of(self.spec).terms(self.spec, number)

    def join(self, coordinator, number=1, without=()):
        for device in self.devices:
            if device.name not in without:
                coordinator.receive(device.join(self.spec, number))

    def leg(self, coordinator, leg, number=1, without=(), change=lambda name, message: message):
        """Play one leg; returns answers and codes by name, and hands the answers in."""
        from common.errors import Refusal

        answers, codes = {}, {}
        for name, message in coordinator.advance().items():
            if name in without:
                continue
            try:
                answers[name] = self.names[name].answer(self.spec, number, leg, change(name, message))
            except Refusal as refusal:
                codes[name] = refusal.code
                continue
            coordinator.receive(answers[name])
        return answers, codes

    def close(self) -> None:
        for device in self.devices:
            device.close()


@pytest.fixture
def sum_fleet(study):
    """A function `(count, **policy) -> SumFleet`."""
    opened = []

    def sum_fleet(count=5, **policy) -> SumFleet:
        opened.append(SumFleet(study, count, **policy))
        return opened[-1]

    yield sum_fleet
    for fleet in opened:
        fleet.close()
