"""The wheel: one top-level name, everything it needs, and extras that bring what they say and no more."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest

import homespun
from common.source import source_digest

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("common", "client", "server", "simulations")


def run(*command, folder, **environment) -> str:
    """Run `command` in `folder` and return what it prints; what it says on stderr is in the failure."""
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(kind, source, target) -> Path:
    run(sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", target, folder=source)
    (made,) = target.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder to put on PYTHONPATH that holds what the wheel installs."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site]
    run(*pip, wheel, folder=site)
    return site


@pytest.fixture(scope="module")
def crowded(tmp_path_factory) -> Path:
    """A folder of somebody who has modules named like ours."""
    folder = tmp_path_factory.mktemp("crowded")
    broken = "raise RuntimeError('not the one you want')\n"
    for name in ("client.py", "common/__init__.py", "server/__init__.py", "simulations.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(broken)
    return folder


def test_the_wheel_installs_one_top_level_name(wheel):
    tops = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert tops == {"homespun", f"homespun-{homespun.__version__}.dist-info"}


def test_the_wheel_holds_every_file_of_the_roles_and_nothing_else(wheel):
    ours = {
        path.relative_to(ROOT).as_posix()
        for role in ROLES
        for path in (ROOT / role).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("homespun/")}
    assert names == {f"homespun/{name}" for name in ours} | {"homespun/__init__.py", "homespun/_run/__main__.py"}


def test_a_wheel_made_from_the_source_distribution_is_the_same(wheel, tmp_path):
    with tarfile.open(build("sdist", ROOT, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    again = build("wheel", source, tmp_path / "wheel")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.parametrize("command", [["-m", "homespun"], ["bin/homespun"], ["-P", "homespun/__init__.py"]])
def test_the_installed_command_runs_beside_modules_named_like_ours(installed, crowded, command):
    *option, last = command
    words = [*option, last if last == "homespun" else installed / last]
    shown = run(sys.executable, *words, "version", "--json", folder=crowded, PYTHONPATH=str(installed))
    facts = json.loads(shown)
    assert facts["homespun"] == homespun.__version__
    assert facts["source"] == source_digest(ROOT)


def test_no_module_of_the_wheel_can_be_imported_under_two_names(installed):
    code = (
        "import importlib.util, homespun\n"
        f"for role in {ROLES!r}:\n"
        "    assert importlib.util.find_spec(f'homespun.{role}') is None, role\n"
        "assert importlib.util.find_spec('homespun.__main__') is not None\n"
    )
    run(sys.executable, "-P", "-c", code, folder="/", PYTHONPATH=str(installed))


def test_spawned_workers_find_the_installed_code(installed, crowded):
    script = crowded / "work.py"
    script.write_text(
        "import multiprocessing\n"
        "import homespun\n"
        "if __name__ == '__main__':\n"
        "    homespun._use_own_folders()\n"
        "    from common.source import source_digest\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.apply(source_digest))\n"
    )
    shown = run(sys.executable, script, folder=crowded, PYTHONPATH=str(installed))
    assert shown.strip() == source_digest(ROOT)


def test_importing_the_front_door_leaves_the_callers_own_modules_in_place(installed, tmp_path):
    (tmp_path / "common.py").write_text("mine = True\n")
    code = "import homespun, common; assert common.mine"
    run(sys.executable, "-c", code, folder=tmp_path, PYTHONPATH=str(installed))


EXTRAS = {
    # extra: (what is there, what is not, the roles whose modules can all be imported)
    "": (["dp-accounting"], ["torch", "flwr", "transformers", "grpcio"], ["common"]),
    "server": (["flwr", "safetensors"], ["torch", "transformers", "ray"], ["common", "server"]),
    "device": (["flwr", "torch", "peft", "grpcio"], ["ray", "pandas"], ["common", "client"]),
    "sim": (["flwr", "torch", "peft", "pandas"], ["ray"], ROLES),
}


def test_every_extra_is_tried_but_ray_which_is_sim_and_one_package_more():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {*EXTRAS, "ray"} == {*extras, ""}


@pytest.mark.install
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_what_it_says_and_no_more(wheel, tmp_path, extra):
    there, absent, roles = EXTRAS[extra]
    python = tmp_path / "environment/bin/python"
    run(sys.executable, "-m", "venv", tmp_path / "environment", folder=tmp_path)
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
    if "torch" in there:  # first and alone, as the Makefile does
        index = os.environ.get("TORCH_INDEX")
        run(*pip, "torch==2.13.0", *(["--index-url", index] if index else []), folder=tmp_path)
    run(*pip, f"{wheel}[{extra}]" if extra else wheel, folder=tmp_path)
    run(python, "-m", "pip", "check", folder=tmp_path)
    packages = json.loads(run(python, "-m", "pip", "list", "--format", "json", folder=tmp_path))
    names = {package["name"].lower().replace("_", "-") for package in packages}
    assert set(there) <= names
    assert not set(absent) & names
    facts = json.loads(run(python.parent / "homespun", "version", "--json", folder=tmp_path))
    assert facts["source"] == source_digest(ROOT)
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for role in roles
        for path in (ROOT / role).rglob("*.py")
    ]
    code = (
        "import importlib, homespun\nhomespun._use_own_folders()\n"
        f"for name in {modules!r}:\n    importlib.import_module(name)\n"
    )
    run(python, "-c", code, folder=tmp_path)


PLAN = """\
users = 2
model = "built-in"
method = "dual"
rounds = 1
spare_rounds = 0
cohort = 2
epsilon = 16.0
max_tokens = 32
round_timeout = 900
"""
GRANT = (
    "trust_coordinator = true\nsmallest_cohort = 2\nepsilon = 20.0\nmains_power_only = false\nminutes_per_day = 1000\n"
)


@pytest.mark.install
@pytest.mark.timeout(1500)
def test_the_wheel_alone_makes_a_device_and_a_federation(wheel, tmp_path):
    """As README says, without a clone: a device by itself, a coordinator, an invite, two devices, one round."""
    environment = os.environ.get("HOMESPUN_INSTALLED")  # of somebody who installed this very wheel already
    if environment is None:
        environment = tmp_path / "environment"
        run(sys.executable, "-m", "venv", environment, folder=tmp_path)
        pip = [environment / "bin/python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt"]
        index = os.environ.get("TORCH_INDEX")
        run(*pip, "torch==2.13.0", *(["--index-url", index] if index else []), folder=tmp_path)
        run(*pip, f"{wheel}[device,server]", folder=tmp_path)
    program, root = Path(environment) / "bin/homespun", Path(tempfile.mkdtemp(prefix="hw-"))  # a socket's path is short

    def homespun(who, *words) -> str:
        own = {"HOMESPUN_HOME": str(root / who), "XDG_CONFIG_HOME": str(root / "config"), "OMP_NUM_THREADS": "1"}
        own |= {"HF_HUB_OFFLINE": "1", "HOMESPUN_STANDING_SECONDS": "5", "HOMESPUN_NICE": "0", "PYTHONPATH": ""}
        return run(program, *words, folder=root, **own)

    def status(who) -> dict:
        return json.loads(homespun(who, "device", "status", "--json"))

    def wait_for(condition, seconds) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, homespun("server", "server", "runs")
            time.sleep(2.0)

    (root / "plan.toml").write_text(PLAN)
    (root / "policy.toml").write_text(GRANT)
    lines = [{"user": name, "texts": [f"{name} saw the {n} boats and went home."] * 6} for n, name in enumerate("ab")]
    (root / "people.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{one.getsockname()[1]}"
    try:
        assert "Example: " in homespun("a", "demo", "--help")
        homespun("alone", "device", "up", "--detach")
        assert status("alone")["up"]
        assert status("alone")["joined"] is None
        homespun("alone", "device", "down")
        homespun("server", "server", "up", "--address", address, "--detach")
        homespun("server", "server", "invite", "--uses", "2", "--config", "plan.toml", "--out", "invite.json")
        for who in "ab":
            data = ("--data", "people.jsonl", "--user", who)
            homespun(who, "device", "join", "invite.json", *data, "--policy", "policy.toml", "--yes")
            homespun(who, "device", "up", "--detach")
        homespun("server", "server", "run", "plan.toml")

        def state() -> str:
            return json.loads(homespun("server", "server", "runs", "--json"))[-1]["state"]

        wait_for(lambda: state() in ("finished", "failed"), 900)
        assert state() == "finished"
        wait_for(lambda: all(status(who)["runs"][0]["global_adapter_of_round"] == 1 for who in "ab"), 120)
    finally:
        for who, *words in (("a", "device"), ("b", "device"), ("alone", "device"), ("server", "server")):
            with suppress(AssertionError):
                homespun(who, *words, "down")
        shutil.rmtree(root, ignore_errors=True)
