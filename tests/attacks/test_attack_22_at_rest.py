"""Attacks 22 and 23: read the disk, copy it to another host; hand in files that run code when they are read."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import stat
import zipfile

import numpy as np
import pytest

from client.adapter_store import pack_vectors, unpack_vectors
from client.base_model import load_base
from common.adapters import read_peft, write_peft
from common.errors import DataError, HomespunError, StoreError
from common.keys import MasterKey
from server import run_folder
from server.checkpoint import Checkpoint
from simulations.personal import ALONE, open_store
from simulations.worlds.loaders import load_users


def test_attack_22_the_disk_holds_no_adapter_in_clear_and_keys_lie_elsewhere_for_their_owner_only(study, home):
    path = study.start(method="dual", rounds=1, evaluation_users=20)
    with open_store(path) as store:
        users = store.subjects()
        vectors = [unpack_vectors(store.get(user, ALONE))["vector"] for user in users]
    written = b"".join(file.read_bytes() for file in path.rglob("*") if file.is_file())
    for vector in vectors:
        moved = vector[np.flatnonzero(vector)[:8]]
        assert not any(moved.astype(kind).tobytes()[:24] in written for kind in ("<f4", "<f2", "<f8"))
    private = [file for file in (*home.rglob("*"), path / "private.sqlite", path / "ledger.jsonl") if file.is_file()]
    assert len(private) > 2
    assert all(stat.S_IMODE(file.stat().st_mode) & 0o077 == 0 for file in private), private
    secrets = [file.read_bytes() for file in home.rglob("*") if file.is_file()]
    assert not any(secret in written for secret in secrets if len(secret) >= 32)


def test_attack_22_a_copy_on_another_host_opens_nothing(study, home, tmp_path, monkeypatch):
    path = study.start(method="dual", rounds=1, evaluation_users=4)
    stolen = tmp_path / "stolen"
    shutil.copytree(path, stolen)
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "thief"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "thief-config"))
    with pytest.raises(StoreError):
        open_store(stolen)
    with pytest.raises(StoreError, match="may not write"):
        run_folder.reopen(stolen)


def test_attack_22_what_a_device_keeps_to_send_again_is_sealed_and_a_changed_one_is_never_sent(study):
    host = study.host()
    device = study.device(host, trust_coordinator=True)
    spec = study.spec(host)
    release = device.ask(study.assignment(spec))
    (kept,) = (study.folder / "device" / "outbox").glob("*.sealed")
    assert release.total.tobytes()[:32] not in kept.read_bytes()
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    damaged = bytearray(kept.read_bytes())
    damaged[40] ^= 1
    kept.write_bytes(bytes(damaged))
    with pytest.raises(HomespunError):
        device.ask(study.assignment(spec))
    assert device.count("debit") == 1
    device.close()


def test_attack_22_a_store_under_another_master_key_is_refused(tmp_path, study):
    path = study.start(method="dual", rounds=1, evaluation_users=4)
    from client.adapter_store import AdapterStore

    other = MasterKey.open(tmp_path / "other", key_file=tmp_path / "other.key").subkey("simulation adapters")
    with pytest.raises(StoreError):
        AdapterStore(path / "private.sqlite", other)


class Bomb:
    """Runs code where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.fixture
def marker(tmp_path):
    return tmp_path / "the-code-ran"


def bombs(marker):
    """Pickles as torch, numpy and plain pickle write them."""
    plain = pickle.dumps(Bomb(marker))
    torch_like = io.BytesIO()
    with zipfile.ZipFile(torch_like, "w") as archive:
        archive.writestr("archive/data.pkl", plain)
        archive.writestr("archive/version", "3\n")
    numpy_like = io.BytesIO()
    np.save(numpy_like, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    return {"pickle": plain, "torch": torch_like.getvalue(), "numpy": numpy_like.getvalue()}


def test_attack_23_the_bombs_work(marker):
    pickle.loads(bombs(marker)["pickle"]).close()  # noqa: S301 - it is the test of the attack
    assert marker.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
def test_attack_23_no_file_that_is_handed_in_is_unpickled(study, tmp_path, marker, kind):
    bomb = bombs(marker)[kind]
    layout = study.host().trainer.layout
    adapter = tmp_path / "adapter"
    write_peft(adapter, np.zeros(layout.size, np.float32), layout, 2.0, "base")
    (adapter / "adapter_model.safetensors").write_bytes(bomb)
    (adapter / "adapter_model.bin").write_bytes(bomb)
    with pytest.raises(DataError):
        read_peft(adapter, layout, 2.0)
    with pytest.raises(DataError):
        study.start("adapter-run", rounds=1, init_adapter=str(adapter))
    checkpoint = tmp_path / "checkpoint.safetensors"
    checkpoint.write_bytes(bomb)
    with pytest.raises(DataError):
        Checkpoint.load(checkpoint)
    with pytest.raises(StoreError):
        unpack_vectors(bomb)
    for name in ("notes.jsonl", "notes.parquet", "notes.csv", "notes.pkl", "notes.npy"):
        (tmp_path / name).write_bytes(bomb)
        with pytest.raises(HomespunError):
            list(load_users(str(tmp_path / name)))
    assert not marker.exists()
    assert unpack_vectors(pack_vectors({"vector": np.zeros(3, np.float32)}))["vector"].size == 3


def test_attack_23_a_base_of_pickles_or_with_code_of_its_own_is_refused(study, tmp_path, marker):
    shutil.copytree(study.base, tmp_path / "pickled")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(bombs(marker)["torch"])
    with pytest.raises(HomespunError):
        load_base(tmp_path / "pickled", ("q_proj", "v_proj"))
    remote = tmp_path / "remote"
    shutil.copytree(study.base, remote)
    (remote / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    config = json.loads((remote / "config.json").read_text())
    auto_map = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (remote / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": auto_map}))
    with pytest.raises(HomespunError):
        load_base(remote, ("q_proj", "v_proj"))
    assert not marker.exists()


def test_attack_23_nothing_of_ours_reads_a_pickle():
    """By the source too: no call that unpickles, and no model of somebody else's code."""
    import ast
    from pathlib import Path

    root = Path(__file__).parents[2]
    calls = {"pickle.load", "pickle.loads", "torch.load", "joblib.load", "np.load", "numpy.load", "pd.read_pickle"}
    for role in ("common", "client", "server", "simulations"):
        for file in (root / role).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call):
                    assert ast.unparse(node.func) not in calls, file
                    for keyword in node.keywords:
                        is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                        assert not (keyword.arg in {"trust_remote_code", "allow_pickle"} and is_true), file
