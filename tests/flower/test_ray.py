"""The same two apps on Flower's own engine: what a Ray actor computes is what the in-process grid computes."""

from __future__ import annotations

import gc
import json

import numpy as np
import pytest

from client.app import build as build_client
from client.base_model import model_digest
from common.config import RunConfig
from server import app as server_app
from server import run_folder
from server.checkpoint import Checkpoint
from simulations import hosts
from simulations.grid import InProcessGrid, submit_here
from simulations.ray_engine import QUIET, run_on_ray
from simulations.run import empty_context

pytestmark = [
    pytest.mark.flower,
    # Ray leaves its own files and processes to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

DIARY = "dear diary, today I told nobody"


@pytest.fixture
def config(tiny_base_folder, tmp_path):
    """Thirty people who write a few words each, and a rehearsal, whose cohorts and noise can be repeated."""
    generator = np.random.default_rng(7)
    lines = [
        {"user": f"person {number}", "texts": [words(generator) for _ in range(6)]}
        for number in range(30)
    ]  # fmt: skip
    data = tmp_path / "people.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunConfig(
        model=str(tiny_base_folder),
        data=str(data),
        users=30,
        cohort=12,
        rounds=3,
        epsilon=8.0,
        rehearsal=True,
        seed=3,
        chunk=4,
        max_tokens=16,
        local_batch=2,
    )


@pytest.fixture(autouse=True)
def _collect_what_ray_leaves():
    yield
    gc.collect()


def words(generator) -> str:
    return " ".join(f"w{number}" for number in generator.integers(3, 128, size=8))


def always(opened):
    return lambda _: opened


def prepared(config, path, monkeypatch, tmp_path):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))
    folder = hosts.base_of(config)
    return run_folder.create(path, config, population=30, model=folder, digest=model_digest(folder), data="d" * 64)


def test_ray_actors_and_the_in_process_grid_give_the_same_global_adapter(config, tmp_path, monkeypatch):
    # A folder of somebody's own work, with names that are also ours: actors must not import from it.
    (tmp_path / "work" / "common").mkdir(parents=True)
    for name in ("client.py", "server.py", "common/__init__.py"):
        (tmp_path / "work" / name).write_text("raise SystemExit('not ours')\n")
    monkeypatch.chdir(tmp_path / "work")
    text = config.to_toml()
    seen = {"grid": [], "ray": []}

    here = prepared(config, tmp_path / "grid", monkeypatch, tmp_path)
    app = server_app.build(always(here), seen["grid"].append)
    app(InProcessGrid(submit_here(hosts.client_app(text), 4), 4), empty_context())
    there = prepared(config, tmp_path / "ray", monkeypatch, tmp_path)
    app = server_app.build(always(there), seen["ray"].append)
    run_on_ray(app, hosts.client_app(text), 2)

    grid, ray = (Checkpoint.load(tmp_path / name / run_folder.CHECKPOINT) for name in ("grid", "ray"))
    assert (grid.round, ray.round) == (3, 3)
    assert np.abs(grid.vector - here.start).max() > 1e-3
    np.testing.assert_allclose(ray.vector, grid.vector, rtol=0, atol=1e-5)
    assert [(one.number, one.spent, one.rejected) for one in seen["ray"]] == [(n, n, {}) for n in (1, 2, 3)]
    assert [one.number for one in seen["grid"]] == [1, 2, 3]


class _Noting:
    """The simulation's own vault, which also notes the node of the cluster that it ran on."""

    def __init__(self, text, notes):
        self._connect, self._notes = hosts._Connect(text), notes

    def __call__(self, context):
        import ray

        (self._notes / ray.get_runtime_context().get_node_id()).touch()
        return self._connect(context)


@pytest.fixture
def two_nodes(monkeypatch):
    """A cluster of two raylets on this machine, one processor each; gives its address."""
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes(timeout=120)
    yield cluster.address
    cluster.shutdown()


def test_chunks_of_users_run_on_both_nodes_of_a_cluster(config, two_nodes, tmp_path, monkeypatch):
    notes = tmp_path / "notes"
    notes.mkdir()
    text = config.to_toml()
    here = prepared(config, tmp_path / "grid", monkeypatch, tmp_path)
    server_app.build(always(here), lambda _: None)(
        InProcessGrid(submit_here(hosts.client_app(text), 4), 4), empty_context()
    )
    there = prepared(config, tmp_path / "ray", monkeypatch, tmp_path)
    seen = []
    run_on_ray(server_app.build(always(there), seen.append), build_client(_Noting(text, notes)), 2, two_nodes)

    grid, ray = (Checkpoint.load(tmp_path / name / run_folder.CHECKPOINT) for name in ("grid", "ray"))
    assert ray.round == 3
    assert [one.rejected for one in seen] == [{}, {}, {}]
    np.testing.assert_allclose(ray.vector, grid.vector, rtol=0, atol=1e-5)
    assert len(list(notes.iterdir())) == 2


def test_what_goes_wrong_in_an_actor_says_nothing_of_a_user(config, tmp_path, monkeypatch, capfd):
    def connect(_):
        class Broken:
            def subjects(self):
                return ()

            def train(self, _):
                raise RuntimeError(DIARY)

        return Broken()

    opened = prepared(config.model_copy(update={"rounds": 1}), tmp_path / "run", monkeypatch, tmp_path)
    seen = []
    run_on_ray(server_app.build(always(opened), seen.append), build_client(connect), 1)

    (finished,) = seen
    assert set(finished.rejected) == {"failed"}
    captured = capfd.readouterr()
    assert DIARY not in captured.out + captured.err
