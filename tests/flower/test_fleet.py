"""A federation as its owners run it: `homespun server` and `homespun device`, in processes of their own, over TLS.

One coordinator and five devices, each with its own home, keys and processes, train together on the built-in base.
During the run a SuperNode and a vault are killed. Nothing is faked; everything that is started here is ended here.
HOMESPUN_FLEET_ROUNDS=5 makes it the long form; tests/flower/chaos.py is the whole matrix of what may be killed. With
HOMESPUN_FLEET_DATA=users.jsonl and HOMESPUN_FLEET_MODEL=folder the five are real people: the first with 60 records.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

import httpx
import numpy as np
import pytest

from common.ledger import verify
from common.supervision import process_start
from common.wire import from_raw_bytes, receipt_of_bytes
from server.forwarder import read_capture

pytestmark = [pytest.mark.flower, pytest.mark.fleet, pytest.mark.timeout(2400)]

ROOT = Path(__file__).resolve().parents[2]
DEVICES = 5
ROUNDS = int(os.environ.get("HOMESPUN_FLEET_ROUNDS", "2"))
DATA, MODEL = os.environ.get("HOMESPUN_FLEET_DATA"), os.environ.get("HOMESPUN_FLEET_MODEL", "built-in")
FEWEST_RECORDS = 60
POLICY = (
    "trust_coordinator = true\nsmallest_cohort = 2\nepsilon = 20.0\nclip = 1.0\nmains_power_only = false\n"
    "minutes_per_day = 1000\n"
)
RUN = f"""\
model = "{MODEL}"
method = "dual"
rounds = {ROUNDS}
cohort = 4
epsilon = 8.0
max_tokens = 32
round_timeout = 900
"""
TOPICS = (
    ("garden", "roses", "prune", "the soil was wet"),
    ("boat", "harbour", "sail", "the tide was low"),
    ("oven", "bread", "knead", "the crust was dark"),
    ("train", "station", "depart", "the clock was slow"),
    ("violin", "strings", "tune", "the hall was cold"),
)


def diary(number: int) -> list[str]:
    """What one person writes: in a manner of their own, about things of their own."""
    thing, other, verb, mood = TOPICS[number]
    generator = np.random.default_rng(number)
    ends = (f"and {mood}", f"so I had to {verb} again", f"near the {other}", "which took all day")
    return [
        f"secret-of-{number} today the {thing} and the {other} {ends[generator.integers(4)]}, "
        f"then I went to {verb} the {thing} {ends[generator.integers(4)]}."
        for _ in range(40)
    ]


def people() -> list[dict]:
    """Five people, as JSON lines hold them: made up, or the first of a file that wrote enough."""
    if DATA is None:
        return [{"user": f"person {number}", "texts": diary(number)} for number in range(DEVICES)]
    with Path(DATA).open(encoding="utf-8") as lines:
        all_of_them = (json.loads(line) for line in lines)
        enough = (one for one in all_of_them if len(one.get("examples", one.get("texts", ()))) >= FEWEST_RECORDS)
        return [one for one, _ in zip(enough, range(DEVICES), strict=False)]


PEOPLE = people()


def written_by(number: int) -> list[str]:
    """Stretches of what one person wrote, long enough to be nobody else's."""
    person = PEOPLE[number]
    texts = person.get("texts") or [part for one in person["examples"] for part in one.values()]
    return [text[20:60] for text in texts if len(text) >= 60]


class Fleet:
    def __init__(self, root: Path, *, policy: str = POLICY, run: str = RUN) -> None:
        self.root = root
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            self.port, self.metrics = one.getsockname()[1], other.getsockname()[1]
        self.environment = os.environ | {
            "XDG_CONFIG_HOME": str(root / "config"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "HOMESPUN_STANDING_SECONDS": "5",
            "HOMESPUN_NICE": "0",
        }
        (root / "policy.toml").write_text(policy)
        (root / "run.toml").write_text(run)
        (root / "plan.toml").write_text(f"users = {DEVICES}\n{run}")
        (root / "people.jsonl").write_text("".join(json.dumps(line) + "\n" for line in PEOPLE))

    def home(self, who) -> Path:
        return self.root / (who if isinstance(who, str) else f"device-{who}")

    def call(self, who, *words, fails: bool = False) -> str:
        command = [sys.executable, str(ROOT / "homespun.py"), *map(str, words)]
        environment = self.environment | {"HOMESPUN_HOME": str(self.home(who))}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=self.root)
        assert (done.returncode != 0) == fails, done.stdout + done.stderr
        return done.stdout + (done.stderr if fails else "")

    def server(self, *words, **options):
        return self.call("server", "server", *words, **options)

    def device(self, number, *words, **options):
        return self.call(number, "device", *words, **options)

    def status(self, number) -> dict:
        return json.loads(self.device(number, "status", "--json"))

    def up(self) -> None:
        address = f"127.0.0.1:{self.port}"
        watch = ("--metrics", f"127.0.0.1:{self.metrics}", "--capture", self.root / "capture")
        self.server("up", "--address", address, *watch, "--detach")

    def join(self, number) -> None:
        data = ("--data", self.root / "people.jsonl", "--user", PEOPLE[number]["user"])
        self.device(number, "join", self.root / "invite.json", *data, "--policy", self.root / "policy.toml", "--yes")
        self.device(number, "up", "--detach")

    def run_row(self) -> dict:
        return json.loads(self.server("runs", "--json"))[-1]

    def run_folder(self) -> Path:
        return self.home("server") / "server" / "runs" / self.run_row()["name"]

    def processes(self, *parts: str) -> list[int]:
        """Processes whose command line, or that of their parents, holds all of `parts`."""
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if all(part in line for part in parts):
                    found.append(int(place.name))
        return found

    def kill(self, *parts: str) -> int:
        pids = self.processes(*parts)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(pids)

    def ledger(self, number):
        return verify((self.home(number) / "device" / "ledger.jsonl").read_bytes()).entries

    def end(self) -> None:
        for number in range(DEVICES):
            with suppress(AssertionError, subprocess.TimeoutExpired):
                self.device(number, "down")
        with suppress(AssertionError, subprocess.TimeoutExpired):
            self.server("down")
        for pid in self.processes(str(self.root)):
            if pid != os.getpid():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def wait_for(condition, seconds, what, pause=1.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s"
        time.sleep(pause)


@pytest.fixture(scope="module")
def fleet():
    root = Path(tempfile.mkdtemp(prefix="hs-"))  # not pytest's own folder: a socket's path is short
    fleet = Fleet(root)
    try:
        fleet.up()
        fleet.server("invite", "--uses", DEVICES, "--config", root / "plan.toml", "--out", root / "invite.json")
        for number in range(DEVICES):
            fleet.join(number)
        yield fleet
    finally:
        fleet.end()
        if os.environ.get("HOMESPUN_KEEP") != "1":
            shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def finished(fleet):
    """The whole run; in its middle a SuperNode and a vault are killed."""
    fleet.server("run", fleet.root / "run.toml")
    wait_for(lambda: fleet.run_row()["state"] == "running", 180, "the run's beginning")
    assert fleet.kill("flower-supernode", str(fleet.home(1))) >= 1
    assert fleet.kill("import reside", str(fleet.home(2))) >= 1
    wait_for(lambda: fleet.run_row()["state"] in ("finished", "failed"), 1500, "the run's end", pause=5.0)
    wait_for(
        lambda: all((fleet.status(number)["personal"] or {}).get("round") == ROUNDS for number in range(DEVICES)),
        1200,
        "every device's refit over the last global adapter",
        pause=10.0,  # each look is five processes of two seconds
    )
    return fleet.run_folder()


def test_a_run_over_five_devices_ends_though_a_supernode_and_a_vault_were_killed(fleet, finished):
    row = fleet.run_row()
    assert (row["state"], row["round"]) == ("finished", ROUNDS)
    assert row["spent"] <= row["reserved"]
    log = (fleet.home("server") / "server" / "coordinator.log").read_text()
    events = [json.loads(line)["event"] for line in log.splitlines() if line.startswith("{")]
    assert events.count("registered") == DEVICES
    assert "run-ended" in events


def test_personal_models_beat_the_global_one_for_their_owners(fleet, finished):
    losses = [fleet.status(number)["personal"]["losses"] for number in range(DEVICES)]
    better = [one["both"] < one["global"] for one in losses]
    print(json.dumps(losses))
    assert sum(better) >= 4, losses


def test_the_ledgers_of_both_sides_agree(fleet, finished):
    server = verify((finished / "ledger.jsonl").read_bytes()).entries
    rounds = [entry.body["round"] for entry in server if entry.kind == "release"]
    assert rounds == list(range(1, ROUNDS + 1))
    receipts = {
        receipt
        for line in (finished / "receipts.jsonl").read_text().splitlines()
        for receipt in json.loads(line)["receipts"]
    }
    sent = {}
    for number in range(DEVICES):
        entries = fleet.ledger(number)
        own = [entry for entry in entries if entry.kind == "release"]
        assert len(own) == sum(1 for entry in entries if entry.kind == "debit")
        assert len({entry.body["round"] for entry in own}) == len(own)  # one release per round
        sent |= {entry.body["sha256"]: entry for entry in own}
    assert receipts <= sent.keys()
    assert len(receipts) >= ROUNDS  # somebody was in it


def uploads(seen):
    """What SuperNodes sent, taken apart as Flower puts it together: kind, body and children by object id."""
    from flwr.proto.message_pb2 import PushObjectRequest

    objects = {}
    for way, path, body in seen:
        if (way, path) == (">", "/v1/fleet/push-object"):
            pushed = PushObjectRequest.FromString(body)
            head, _, content = pushed.object_content.partition(b"\0")
            kind, children, _ = head.decode().split(" ")
            objects[pushed.object_id] = (kind, content, [one for one in children.split(",") if one])
    return objects


def sent_by(fleet, number, run):
    """What a device's own ledger and store say it sent in a run: bytes by receipt."""
    contents = {}
    for entry in fleet.ledger(number):
        if entry.kind == "release" and entry.body["run"] == run:
            out = fleet.root / "sent.bin"
            fleet.device(number, "sent", entry.index, "--out", out)
            contents[entry.body["sha256"]] = (entry.body, out.read_bytes())
    return contents


def private_parts(fleet, number):
    """Stretches of what a device keeps to itself, in the clear: of private adapters, and of its records."""
    from client.adapter_store import AdapterStore, unpack_vectors
    from client.device_home import DeviceHome
    from client.vault_child import ADAPTERS

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", fleet.environment["XDG_CONFIG_HOME"])
        home = DeviceHome.open(fleet.home(number) / "device")
        with AdapterStore(home.folder / ADAPTERS, home.master.subkey("adapters")) as store:
            vectors = unpack_vectors(store.get(str(home.read_ledger().header["subject"]), "private"))
    assert {"alone", "over_global"} <= set(vectors)  # and those of the levels that were trained
    for vector in vectors.values():
        for number_type in ("<f4", "<f2"):  # as it is kept, and as updates leave
            content = vector.astype(number_type).tobytes()
            step = max(4, len(content) // 64 // 4 * 4)
            stretches = [content[start : start + 32] for start in range(0, len(content) - 32, step)]
            yield from (one for one in stretches if one.count(0) < 8)
    yield from (f"secret-of-{number}".encode() for _ in range(DATA is None))
    yield from (line.encode() for line in written_by(number))


UPLOADED_KINDS = {"Message", "RecordDict", "ArrayRecord", "Array", "ArrayChunk", "ConfigRecord"}
CALL_KEYS = {
    "enrol": {"format", "enrolment", "version", "subject"},
    "standing": {"format", "version", "verdict", "ledger", "proofs"},
    "adapter": {"format", "run"},
    "base": {"format", "digest"},
    "base-file": {"format", "digest", "name", "offset"},
}


def test_the_wire_carried_what_the_receipts_list_and_nothing_else(fleet, finished):
    from flwr.app import ConfigRecord

    seen = read_capture(fleet.root / "capture")
    spec = json.loads((finished / "spec.json").read_text())
    numbers = sum(int(np.prod(shape)) for shape in spec["shapes"]) + spec["witnesses"]
    assert spec["dtype"] == "float16"  # the smallest that is honest is what a run asks for by itself
    objects = uploads(seen)
    assert {kind for kind, _, _ in objects.values()} <= UPLOADED_KINDS  # no metric has a kind of its own here
    # Every array that came up is one release, whole, that its device's ledger lists and was debited for.
    sent = {}
    for number in range(DEVICES):
        sent |= sent_by(fleet, number, spec["run"])
    for body, content in sent.values():
        assert body["bytes"] == len(content) == 2 * numbers
        assert receipt_of_bytes(content, body["spec"], body["round"], 1, spec["dtype"]) == body["sha256"]
        assert np.isfinite(from_raw_bytes(content, spec["dtype"])).all()
    arrays = [
        b"".join(objects[child][1] for child in children) for kind, _, children in objects.values() if kind == "Array"
    ]
    assert len(arrays) >= ROUNDS
    assert set(arrays) <= {content for _, content in sent.values()}
    # Beside them came up: a format, a count of one, the digest, or the code of a refusal.
    for kind, content, _ in objects.values():
        if kind == "ConfigRecord":
            record = dict(ConfigRecord.inflate(b"ConfigRecord  %d\0" % len(content) + content, {}))
            if "code" in record:
                assert set(record) <= {"format", "code"}
                continue
            assert set(record) == {"format", "users", "sha256"}
            assert record["users"] == 1
            assert record["sha256"] in sent
    # What the server counts is what was seen.
    counted = {
        receipt
        for line in (finished / "receipts.jsonl").read_text().splitlines()
        for receipt in json.loads(line)["receipts"]
    }
    assert {sent[receipt][1] for receipt in counted} <= set(arrays)
    # The devices' own calls say what every device says, chosen or not.
    for way, path, body in seen:
        name = path.removeprefix("/v1/homespun/")
        if way == ">" and name != path:
            assert set(json.loads(body)) == CALL_KEYS[name], name


def found_in(parts, everything):
    """Those of `parts` that occur in `everything`: by their first eight bytes at every offset, then as a whole.

    One search for each would take an hour, for a base with many numbers.
    """
    short = {part for part in parts if len(part) < 8 and part in everything}
    heads = np.unique(np.frombuffer(b"".join(part[:8] for part in parts if len(part) >= 8), "<u8"))
    seen = set()
    for offset in range(8):
        words = np.frombuffer(everything, "<u8", (len(everything) - offset) // 8, offset)
        places = np.minimum(np.searchsorted(heads, words), len(heads) - 1)
        seen |= set(heads[places[heads[places] == words]].tolist())
    return short | {
        part for part in parts if len(part) >= 8 and int.from_bytes(part[:8], "little") in seen and part in everything
    }


def test_nothing_private_crossed_the_wire_either_way(fleet, finished):
    everything = b"".join(body for _, _, body in read_capture(fleet.root / "capture"))
    start = len(everything) // 3
    planted = {everything[start : start + 32], everything[start + 5 : start + 37]}
    assert found_in({*planted, b"x" * 31}, everything) == planted  # the search finds what is there
    for number in range(DEVICES):
        parts = set(private_parts(fleet, number))
        assert len(parts) > 100
        assert found_in(parts, everything) == set()


def test_what_flower_kept_of_updates_is_wiped(fleet, finished):
    flower = fleet.home("server") / "server" / "flower"
    wait_for(lambda: not (flower / "dirty").exists(), 60, "the wiping")
    kept = b"".join(path.read_bytes() for path in flower.glob("superlink.sqlite*"))
    for number in range(DEVICES):
        for entry in fleet.ledger(number):
            if entry.kind == "release":
                fleet.device(number, "sent", entry.index, "--out", fleet.root / "sent.bin")
                content = (fleet.root / "sent.bin").read_bytes()
                assert content[:64] not in kept
    with closing(sqlite3.connect(flower / "superlink.sqlite")) as database:
        assert database.execute("SELECT count(*) FROM message_ins").fetchone() == (0,)


def test_the_door_lets_only_the_fleet_through_and_measures_name_nobody(fleet):
    trust = ssl.create_default_context(cafile=fleet.home("server") / "server" / "tls" / "ca.pem")
    with httpx.Client(verify=trust, base_url=f"https://127.0.0.1:{fleet.port}") as client:
        assert client.get("/health").status_code == 200
        for path in ("/v1/control/list-runs", "/v1/control/start-run", "/v1/runtime/acquire-task", "/openapi.json"):
            assert client.post(path, content=b"").status_code == 403
        assert client.post("/v1/fleet/pull-messages", content=b"").status_code == 401
    text = httpx.get(f"http://127.0.0.1:{fleet.metrics}/metrics").text
    assert "homespun_devices_online " in text
    for number in range(DEVICES):
        status = fleet.status(number)
        assert status["device"] not in text
        assert fleet.ledger(number)[0].body["subject"] not in text


def test_every_process_goes_with_its_supervisor(fleet, finished):
    supervisor = fleet.status(4)["process"]
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not fleet.processes(str(fleet.home(4)) + "/"), 60, "the end of what it had started")
    assert process_start(supervisor) == ""
    assert fleet.status(4)["up"] is False
    fleet.device(4, "up", "--detach")
    wait_for(lambda: fleet.processes("flower-supernode", str(fleet.home(4))), 60, "the device's return")


def test_a_revoked_device_is_cut_off_and_told(fleet, finished):
    status = fleet.status(3)
    fleet.server("revoke", status["device"])
    wait_for(lambda: fleet.status(3)["state"] == "revoked", 60, "the word to the device")
    assert any(one["code"] in ("revoked", "left") for one in fleet.status(3)["refusals"])
    wait_for(lambda: not fleet.processes("flower-supernode", str(fleet.home(3)) + "/"), 60, "the end of its SuperNode")
    assert json.loads(fleet.server("status", "--json"))["refused"]["revoked"] >= 1


def test_a_certificate_is_renewed_under_the_devices_feet(fleet):
    before = ssl.get_server_certificate(("127.0.0.1", fleet.port))
    fleet.server("renew")
    wait_for(lambda: ssl.get_server_certificate(("127.0.0.1", fleet.port)) != before, 60, "the new certificate")
    called = fleet.status(0)["called"]
    wait_for(lambda: fleet.status(0)["called"] != called, 60, "a device's next call")


def test_an_auditor_reconciles_both_sides_and_sees_no_rollback(fleet, finished):
    """From the zips alone: what devices sent is what the server counted, and no ledger lost what another had seen."""
    time.sleep(6.0)  # one more call of every device: it brings the newest heads either way
    zips = [fleet.root / "server.zip"]
    fleet.server("evidence", finished, "--out", zips[0], "--receipts")
    for number in range(DEVICES):
        zips.append(fleet.root / f"device-{number}.zip")
        fleet.device(number, "evidence", "--out", zips[-1])
    said = json.loads(fleet.call("server", "audit", "reconcile", *zips, "--json"))
    verdicts = {one["claim"]: one["verdict"] for one in said["findings"]}
    print(json.dumps(verdicts))
    assert "contradicted" not in verdicts.values()
    assert verdicts["no ledger lost an entry that another side had seen"] == "holds"
