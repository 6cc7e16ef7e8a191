"""The Flower bundle holds what pyproject.toml and common/source.py say, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from common.source import bundle_files, source_digest

ROOT = Path(__file__).resolve().parent.parent
CLIENT_SHIM = {
    "client/__init__.py",
    "client/app.py",
    "client/vault_stub.py",
    "client/vault_pb2.py",
    "client/vault_pb2_grpc.py",
}
ADDED_BY_FLOWER = {"pyproject.toml", ".info/CONTENT"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy of the repository in a folder whose name Flower takes, with files around that must not ride along."""
    tree = tmp_path_factory.mktemp("copy") / "homespun"
    ignored = shutil.ignore_patterns(".*", "__pycache__", "runs", "dist", "build", "*.fab")
    shutil.copytree(ROOT, tree, ignore=ignored)
    for name in sorted({*CLIENT_SHIM, "server/app.py"}):
        if not (tree / name).exists():
            (tree / name).write_text("app = None\n")
    (tree / "client" / "secret_records.jsonl").write_text('{"user": "a"}\n')
    (tree / "client" / "common").mkdir()
    (tree / "client" / "common" / "decoy.py").write_text("")
    (tree / "simulations" / "server").mkdir(exist_ok=True)
    (tree / "simulations" / "server" / "decoy.py").write_text("")
    return tree


def build(tree: Path) -> Path:
    for old in tree.glob("*.fab"):
        old.unlink()
    environment = os.environ | {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    command = [sys.executable, "-c", "from flwr.cli.app import app; app()", "build", "--app", str(tree)]
    subprocess.run(command, cwd=tree, env=environment, check=True, capture_output=True)
    (bundle,) = tree.glob("*.fab")
    return bundle


@pytest.fixture(scope="module")
def bundle(tree, tmp_path_factory) -> Path:
    return Path(shutil.move(build(tree), tmp_path_factory.mktemp("first")))


def test_the_bundle_holds_exactly_the_allowlist(tree, bundle):
    expected = {
        path.relative_to(tree).as_posix() for role in ("common", "server") for path in (tree / role).rglob("*.py")
    }
    names = zipfile.ZipFile(bundle).namelist()
    assert set(names) == expected | CLIENT_SHIM | {"LICENSE"} | ADDED_BY_FLOWER
    assert len(names) == len(set(names))


def test_the_bundle_and_the_source_digest_are_about_the_same_files(tree, bundle):
    sources = {name for name in zipfile.ZipFile(bundle).namelist() if name.endswith(".py")}
    assert set(bundle_files(tree)) == sources


def test_an_unpacked_bundle_has_the_digest_of_the_tree_it_came_from(tree, bundle, tmp_path):
    zipfile.ZipFile(bundle).extractall(tmp_path)
    assert source_digest(tmp_path) == source_digest(tree)


def test_building_twice_gives_the_same_bytes_and_so_the_same_name(tree, bundle):
    again = build(tree)
    assert again.name == bundle.name
    assert again.read_bytes() == bundle.read_bytes()


def test_every_pattern_of_the_allowlist_is_anchored():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["fab-include"]
    assert all(pattern.startswith("/") for pattern in patterns)


def test_an_unpacked_bundle_imports_from_itself_and_without_the_wheel(bundle, tmp_path):
    zipfile.ZipFile(bundle).extractall(tmp_path)
    names = [name for name in zipfile.ZipFile(bundle).namelist() if name.endswith(".py")]
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    module = importlib.import_module(name)\n"
        "    assert module.__file__.startswith(sys.path[0]), module.__file__\n"
        "assert 'homespun' not in sys.modules\n"
        "assert 'torch' not in sys.modules\n"
    )
    code = f"import sys; sys.path[0] = {str(tmp_path)!r}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
