"""What lies on disk after a run and after a device has worked: nothing that a person wrote, in any form that is tried.

A marker is planted in records, and every file that was written is searched for it: under the home, the run's folder,
the configuration folder and the folder for temporary files, and also in what was deleted again, by watching writes.
"""

from __future__ import annotations

import base64
import json
import os
import stat
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
MARKER = "w101 w102 w103 w104 w105 w106"
"""Six words in a row that no other record has; as tokens they are 101 to 106."""

NAME = "zebediah-quince"

SIMULATION = """
import sys
sys.path.insert(0, sys.argv[1])
from common.config import RunConfig
from simulations.run import Progress, start
notes, model, out = sys.argv[2:5]
config = RunConfig(model=model, data=notes, cohort=4, rounds=2, local_batch=2, personal_steps=2, personal_batch=2,
                   evaluation_users=4, workers=0, max_tokens=32, learning_rate=0.05)
assert start(config, __import__("pathlib").Path(out), Progress()).finished
"""

DEVICE = """
import sys
sys.path.insert(0, sys.argv[1])
import numpy as np
from pathlib import Path
from client.adapter_store import AdapterStore, pack_vectors
from client.base_model import load_base
from client.budget_keeper import BudgetKeeper
from client.cli import read_user
from client.device_home import DeviceHome
from client.gate import Gate
from client.policy import Policy
from client.preflight import Preflight
from client.trainer import Recipe, Trainer
from client.user_data import Encoder
from client.vault import Vault, encode_user
from client.vault_service import Outbox
from common.adapters import initial_vector
from common.config import RunConfig
from common.wire import Assignment
from server.run_folder import prepare_spec
notes, model, name = sys.argv[2:5]
home = DeviceHome.open(create=True)
home.grant(Policy.model_validate({"smallest_cohort": 2, "epsilon": 50.0}))
base = load_base(Path(model), ("q_proj", "v_proj"))
trainer = Trainer(base, rank=2, scaling=2.0)
own = encode_user(read_user(Path(notes), name), Encoder(base.tokenizer, 32))
config = RunConfig(model=model, cohort=4, rounds=2, local_batch=2, noise="local")
spec, layout = prepare_spec(config, population=8, model=Path(model),
                            digest=base.digest, run="ab" * 16)
with home.open_ledger() as ledger:
    keeper, preflight = BudgetKeeper(home, ledger), Preflight(trainer)
    vault = Vault(trainer, {keeper.subject: own}.__getitem__, seed=0, residents=[keeper.subject],
                  gate=Gate(keeper.record, keep=keeper.keep),
                  grants=lambda spec, number: (keeper.check(spec, number), preflight.check(spec)))
    start = initial_vector(layout, np.random.default_rng(0))
    outbox = Outbox(home.folder / "outbox", home.master.subkey("outbox"))
    for number in (1, 2):
        outbox.put(f"{number:064x}", vault.train(Assignment(spec, number, (keeper.subject,), start)))
    private = vault.personalize([keeper.subject], start, start, Recipe(2, 2, 0.01), trainer)
    with AdapterStore(home.folder / "adapters.sqlite", home.master.subkey("adapters")) as store:
        store.put(keeper.subject, "alone", pack_vectors({"vector": private.alone[0]}), base_digest=base.digest)
        np.save(sys.argv[5], private.alone[0])
"""


@pytest.fixture(scope="module")
def notes(tmp_path_factory):
    generator = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("notes") / "notes.jsonl"
    with path.open("w") as file:
        for user in range(8):
            texts = [" ".join(f"w{w}" for w in generator.integers(3, 100, size=8)) for _ in range(9)]
            name = NAME if user == 3 else f"somebody-{user}"
            texts = [f"{MARKER} w{user + 3 + i}" for i in range(9)] if user == 3 else texts
            file.write(json.dumps({"user": name, "texts": texts}) + "\n")
    return path


def forms(text: str) -> dict[str, bytes]:
    """The ways that a text is looked for: as it is, as tokens, and as what wraps it."""
    plain = text.encode()
    found = {"utf-8": plain, "utf-16": text.encode("utf-16-le"), "hex": plain.hex().encode()}
    found |= {f"base64 at {skip}": base64.b64encode(plain[skip:])[:-4] for skip in range(3)}
    tokens = [int(word[1:]) for word in text.split() if word[1:].isdigit()]
    if len(tokens) > 2:
        found |= {
            f"tokens as {dtype.__name__}": np.array(tokens, dtype).tobytes() for dtype in (np.int16, np.int32, np.int64)
        }
        found["tokens as text"] = ", ".join(map(str, tokens)).encode()
        found["tokens as tight text"] = ",".join(map(str, tokens)).encode()
    return found


def traces(content: bytes, wanted: dict[str, bytes]) -> list[str]:
    """Name the forms of the marker in `content`, also where it is deflated."""
    opened = [content]
    for start in [i for i in range(len(content)) if content[i : i + 2] in (b"\x78\x9c", b"\x78\x01", b"\x78\xda")]:
        try:
            opened.append(zlib.decompressobj().decompress(content[start:], 1 << 22))
        except zlib.error:
            continue
    return [name for name, form in wanted.items() if any(form in one for one in opened)]


def run(script, *arguments, tmp_path):
    """Run in a process of its own whose every folder is ours; returns where it could write."""
    places = {name: tmp_path / name for name in ("home", "configuration", "temporary", "cache", "work")}
    for place in places.values():
        place.mkdir(exist_ok=True)
    watcher = tmp_path / "watcher"
    watcher.mkdir(exist_ok=True)
    (watcher / "sitecustomize.py").write_text(WATCHER)
    environment = os.environ | {
        "HOMESPUN_HOME": str(places["home"]),
        "XDG_CONFIG_HOME": str(places["configuration"]),
        "XDG_CACHE_HOME": str(places["cache"]),
        "TMPDIR": str(places["temporary"]),
        "HOME": str(places["work"]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(watcher),
        "KEPT_COPIES": str(tmp_path / "kept"),
    }
    (tmp_path / "kept").mkdir(exist_ok=True)
    finished = subprocess.run(
        [sys.executable, "-c", script, str(ROOT), *map(str, arguments)],
        cwd=places["work"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return [*places.values(), tmp_path / "kept"], finished.stdout + finished.stderr


WATCHER = '''
"""Keeps a copy of every file that is removed or replaced, so that what was on disk for a moment is searched too."""
import os, shutil, sys, uuid
_kept = os.environ["KEPT_COPIES"]
_busy = []
def _watch(event, arguments):
    if event in ("os.remove", "os.rename") and not _busy:
        _busy.append(1)
        try:
            paths = arguments[:2] if event == "os.rename" else arguments[:1]
            for path in paths:
                if isinstance(path, (str, bytes, os.PathLike)) and os.path.isfile(path):
                    shutil.copyfile(path, os.path.join(_kept, uuid.uuid4().hex))
        finally:
            _busy.pop()
sys.addaudithook(_watch)
'''


def files(places):
    return [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]


def assert_nowhere(places, output, *texts):
    for text in texts:
        wanted = forms(text)
        assert traces(output.encode(), wanted) == []
        for path in files(places):
            assert traces(path.read_bytes(), wanted) == [], path


def test_the_search_finds_what_it_looks_for():
    wanted = forms(MARKER)
    for hidden in (
        MARKER.encode(),
        b"x" + base64.b64encode(b"ab" + MARKER.encode() + b"cd"),
        b"....." + zlib.compress(b"before " + MARKER.encode()),
        np.arange(101, 107, dtype=np.int32).tobytes(),
        b"[100, 101, 102, 103, 104, 105, 106, 7]",
    ):
        assert traces(hidden, wanted), hidden
    assert traces(os.urandom(100_000), wanted) == []


def test_a_simulation_leaves_nothing_that_a_user_wrote_and_no_name(notes, tiny_base_folder, tmp_path):
    places, output = run(SIMULATION, notes, tiny_base_folder, tmp_path / "run", tmp_path=tmp_path)
    written = files([*places, tmp_path / "run"])
    assert {"ledger.jsonl", "private.sqlite", "report.html"} <= {path.name for path in written}
    assert_nowhere([*places, tmp_path / "run"], output, MARKER, NAME)


@pytest.fixture(scope="module")
def device(notes, tiny_base_folder, tmp_path_factory):
    """Two rounds and a private adapter on a device: where it could write, what it printed, and the adapter."""
    folder = tmp_path_factory.mktemp("device-run")
    places, output = run(DEVICE, notes, tiny_base_folder, NAME, folder / "private.npy", tmp_path=folder)
    return places, output, np.load(folder / "private.npy")


def test_a_device_leaves_nothing_that_its_owner_wrote(device):
    places, output, private = device
    home = places[0] / "device"
    names = {path.relative_to(home).parts[0] for path in files([home])}
    assert {"ledger.jsonl", "sent.sqlite", "adapters.sqlite", "device.key", "policy.toml", "outbox"} <= names
    assert_nowhere(places, output, MARKER, NAME)
    chunk = private[np.abs(private) > 0][:8].tobytes()
    assert len(chunk) == 32
    for path in files(places):
        assert chunk not in path.read_bytes(), f"{path} holds a private adapter in the clear"


LEARN_AND_FORGET = """
import json, sys
sys.path.insert(0, sys.argv[1])
import homespun
from pathlib import Path
root, mine, model, keep = sys.argv[1], *sys.argv[2:5]
def run(*words):
    assert homespun.main(["device", *words]) == 0, words
run("data", "add", mine, "--yes", "--json")
run("learn", "--model", model, "--steps", "2", "--max-tokens", "16")
from client.device_home import DeviceHome
from client.level_store import LevelStore
from client.record_store import RecordStore
home = DeviceHome.open()
LevelStore(home).keep_profile(LevelStore(home).profile_of([one.record for one in RecordStore(home).records()]))
sealed = [path.read_bytes() for path in home.folder.rglob("*.sqlite")]
Path(keep).write_bytes(b"".join(sealed))
run("forget", "--yes")
"""


def test_after_forgetting_no_file_of_home_temp_or_cache_holds_what_was_learned(tiny_base_folder, tmp_path):
    """Neither in the clear nor sealed: the sealed rows, and the keys beside them, are gone from every file."""
    mine = tmp_path / "mine.jsonl"
    mine.write_text("".join(json.dumps({"text": f"{MARKER} w{n + 3}"}) + "\n" for n in range(9)))
    places, _ = run(LEARN_AND_FORGET, mine, tiny_base_folder, tmp_path / "sealed.bin", tmp_path=tmp_path)
    sealed = (tmp_path / "sealed.bin").read_bytes()
    chunks = {sealed[start : start + 16] for start in range(0, len(sealed) - 15, 16)}
    chunks = {chunk for chunk in chunks if len(set(chunk)) > 8}  # ciphertext, not SQLite's own pages
    assert len(chunks) > 100
    for path in files(places):
        content = path.read_bytes()
        assert traces(content, forms(MARKER)) == [], path
        if places[-1] not in path.parents:  # what the watcher kept is the copy of an attacker who was there before
            assert not {content[start : start + 16] for start in range(0, len(content) - 15, 16)} & chunks, path


def test_a_device_keeps_its_files_to_itself(device):
    places, _, _ = device
    for path in files(places[:2]):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, f"{path} can be read by others"


def test_the_master_key_lies_outside_what_it_opens(device):
    places, _, _ = device
    (key_file,) = (places[1] / "homespun").glob("*.key")
    secret = key_file.read_text().split("\n")[1]
    for path in files([places[0]]):
        content = path.read_bytes()
        assert secret.encode() not in content
        assert bytes.fromhex(secret) not in content


def test_no_file_that_people_bring_is_unpickled_or_executed():
    """No pickle, no `torch.load`, no `numpy` object arrays and no code from model folders, anywhere in the code."""
    import ast

    for role in ("common", "client", "server", "simulations"):
        for path in (ROOT / role).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            for node in ast.walk(tree):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                    assert not {"pickle", "cPickle", "dill", "joblib", "marshal", "shelve"} & set(names), path
                if isinstance(node, ast.Call):
                    called = ast.unparse(node.func)
                    assert called != "torch.load", path
                    assert called not in {"eval", "exec"}, path
                    for keyword in node.keywords:
                        if keyword.arg in {"allow_pickle", "trust_remote_code"}:
                            assert ast.unparse(keyword.value) == "False", path
