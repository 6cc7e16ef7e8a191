"""Rules about the code itself: who imports what, what modules are called, how much each shows, where its tests are."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import homespun

ROOT = Path(__file__).resolve().parent.parent
ROLES = ("common", "client", "server", "simulations")

# Files that know Flower; pyproject.toml has the same list for import-linter, which sees indirect imports too.
FLOWER = {
    "client.app",
    "client.supernode",
    "common.sum_wire",
    "common.wire",
    "server.app",
    "server.exchange",
    "server.rounds",
    "server.superlink",
    "simulations.grid",
    "simulations.hosts",
    "simulations.ray_engine",
    "simulations.run",
}

# Files that may import torch, or what imports it, as they are imported themselves. Others do it inside a function.
TORCH_AT_MODULE_LEVEL = {
    "client.base_model",
    "client.generation",
    "client.greedy_answers",
    "client.int8_linear",
    "client.label_loss",
    "client.llama_attention",
    "client.llama_layer",
    "client.llama_native",
    "client.llama_pass",
    "client.lora",
    "client.native",
    "client.native_layers",
    "client.native_products",
    "client.optimizers",
    "client.packing",
    "client.pass_size",
    "client.personal_model",
    "client.shared_weights",
    "client.personalization.preference",
    "client.personalization.soft_prompt",
    "client.personalization.steering",
    "client.preflight",
    "client.trainer",
    "simulations.hosts",
    "simulations.personal",
    "simulations.worlds.pretrain",
}
TORCH = {"torch", "transformers", "peft", "opacus", "accelerate", "safetensors.torch"}

FORBIDDEN_NAMES = {
    "base",
    "common",
    "core",
    "helper",
    "helpers",
    "manager",
    "managers",
    "misc",
    "tools",
    "util",
    "utils",
}

MOST_LINES = 450
MOST_NAMES = 7
# Larger on purpose; the numbers are ceilings, and each has its reason.
LARGER = {
    "simulations.cli": (500, 7),  # the commands of `homespun sim` beside each other, each a few lines
    "client.agent": (450, 8),  # who is up here, who starts it, and what it does then
    "client.trainer": (480, 7),  # one trainer, for every way in which an adapter is trained
    "client.vault": (510, 7),  # all that a server can ask of a device, behind one door
    "client.preflight": (510, 7),  # one check per assumption of the proofs
    "common.accountants": (510, 13),  # what three accountants say, and searches over it
    "common.accounting": (450, 23),  # the one import of whoever accounts: gathers four modules, defines little
    "common.adapters": (450, 9),  # one layout, its pieces, and the way in and out of PEFT's files
    "common.model_files": (450, 10),  # one name per question about a model's files
    "common.errors": (450, 12),  # the whole error tree
    "common.evaluation": (510, 16),  # one name per statistic that the report prints
    "common.events": (450, 8),  # one name per event
    "common.keys": (500, 8),
    "common.privacy": (580, 9),
    "common.wire": (490, 7),  # all that crosses the network, read as if it were hostile
    "server.rounds": (550, 7),  # one round in its order, whoever adds the noise
    "simulations.sweep": (450, 8),  # one name per part of what a grid found
    "simulations.hosts": (450, 8),  # what a driver submits to workers, one name each
    "simulations.charts": (450, 9),  # one name per form of chart, and per thing that is drawn
    "simulations.worlds.lexicon": (450, 11),  # vocabulary, one name per list of words
}

# Modules whose tests stand elsewhere, and where.
TESTED_ELSEWHERE = {
    "client.llama_layer": "tests/client/test_llama_pass.py",
    "common.ledger_format": "tests/common/test_ledger.py",
    "common.ledger_kinds": "tests/common/test_ledger.py",
    "client.compiled_code": "tests/client/test_native.py",
    "common.model_files": "tests/client/test_base_model.py",
    "simulations.audit_claims": "tests/simulations/test_audit.py",
    "simulations.hosts": "tests/simulations/test_run.py",
    "simulations.options": "tests/simulations/test_cli.py",
    "simulations.personal": "tests/simulations/test_run.py",
    "simulations.planning": "tests/simulations/test_cli.py",
    "simulations.population": "tests/simulations/test_run.py",
    "simulations.time_cli": "tests/simulations/test_newcomers.py",  # and test_lifelong.py
    "simulations.worlds.files": "tests/simulations/test_loaders.py",
    "simulations.worlds.hub": "tests/simulations/test_loaders.py",
    "simulations.worlds.lamp": "tests/simulations/test_loaders.py",
    "simulations.worlds.lexicon": "tests/simulations/test_built_in.py",
    "client.doctor_cli": "tests/client/test_doctor.py",  # what the command prints of the checks
    "client.record_shapes": "tests/simulations/test_loaders.py",  # what every loader reads
    "simulations.worlds.tables": "tests/simulations/test_loaders.py",
    "simulations.shown_evidence": "tests/simulations/test_audit.py",
    "simulations.terminal": "tests/simulations/test_cli.py",
    "client.personalization.levels": "tests/simulations/test_levels.py",  # many users side by side
    "client.personalization.systems": "tests/simulations/test_levels.py",
    "client.level_store": "tests/client/test_levels_cli.py",  # what the commands keep
    "client.coordinator_link": "tests/client/test_fleet_cli.py",  # a line is tested with somebody at its other end
    "client.owner_desk": "tests/client/test_owner_server.py",  # what the page asks, asked as it does
    "client.owner_host": "tests/client/test_owner_server.py",
    "client.owner_line": "tests/client/test_owner_server.py",  # both ends of one socket
    "client.speaker": "tests/client/test_model_process.py",  # both ends of one line
    "client.vault_child": "tests/client/test_vault_host.py",  # parent and child
    "server.coordinator": "tests/flower/test_fleet.py",
    "server.door_watch": "tests/server/test_measures.py",
    "server.superlink": "tests/flower/test_fleet.py",  # asks a real SuperLink
    "client.device_home": "tests/client/test_budget_keeper.py",  # a home is tested by the budget that it keeps
    "client.llama_attention": "tests/client/test_llama_pass.py",  # one layer's half, tested with the other
    "client.lora": "tests/client/test_trainer.py",  # stacked adapters are tested by training with them
    "client.vault_stub": "tests/client/test_vault_service.py",  # both ends of one socket
    "common.errors": "tests/test_homespun.py",  # exit codes and messages, as a person meets them
    "simulations.ray_engine": "tests/flower/test_ray.py",  # starts Ray
    "simulations.bench.engines": "tests/simulations/test_suite.py",
    "simulations.bench.gpu": "tests/simulations/test_suite.py",
    "simulations.bench.overhead": "tests/simulations/test_suite.py",
    "simulations.bench.pfl_rounds": "tests/simulations/test_suite.py",  # runs where pfl is; its turns are one part
    "simulations.bench.population": "tests/simulations/test_suite.py",
    "simulations.bench.workloads": "tests/simulations/test_suite.py",
    "server.exchange": "tests/server/test_rounds.py",  # messages and replies are tested by the rounds that need them
    "simulations.bench.kill": "tests/attacks/test_attack_06_kill.py",  # its short form is a test by itself
}


@cache
def modules() -> dict[str, Path]:
    """Every module of the four packages by its dotted name; generated code is none of ours."""
    found: dict[str, Path] = {}
    for role in ROLES:
        for path in sorted((ROOT / role).rglob("*.py")):
            if not re.search(r"_pb2(_grpc)?\.py$", path.name):
                parts = path.relative_to(ROOT).with_suffix("").parts
                found[".".join(parts).removesuffix(".__init__")] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text(encoding="utf-8"))


def imports(nodes: list[ast.stmt], *, deep: bool) -> Iterator[str]:
    """Name what `nodes` import: in functions too when `deep`, never what only a type checker sees."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports have two names for one module"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}:
            yield from imports(node.orelse, deep=deep)
        elif deep or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from imports(getattr(node, field, []), deep=deep)
            for part in (*getattr(node, "handlers", []), *getattr(node, "cases", [])):
                yield from imports(part.body, deep=deep)


def is_any_of(imported: str, packages: set[str]) -> bool:
    return any(imported == package or imported.startswith(f"{package}.") for package in packages)


def public_names(name: str) -> list[str]:
    for node in tree(name).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in tree(name).body if isinstance(node, kinds) and not node.name.startswith("_")]


def test_the_reader_of_imports_sees_what_it_should():
    code = (
        "import a\nfrom b import c\nif TYPE_CHECKING:\n    import hidden\nelse:\n    import d\n"
        "try:\n    import e\nexcept ImportError:\n    import f\n"
        "class C:\n    import g\n    def method(self):\n        import late\n"
    )
    assert list(imports(ast.parse(code).body, deep=False)) == ["a", "b.c", "d", "e", "f", "g"]
    assert "late" in list(imports(ast.parse(code).body, deep=True))


@pytest.mark.parametrize("name", modules())
def test_only_the_files_at_the_edges_know_flower(name):
    knows = any(is_any_of(imported, {"flwr"}) for imported in imports(tree(name).body, deep=True))
    assert not knows or name in FLOWER


def test_import_linter_has_the_same_list_of_files_that_know_flower():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (listed,) = (contract["ignore_imports"] for contract in contracts if contract["name"] == "Flower only at the edges")
    assert {line.removesuffix(" -> flwr") for line in listed} == FLOWER


@pytest.mark.parametrize("name", modules())
def test_torch_is_imported_at_module_level_only_where_it_is_the_point(name):
    heavy = [imported for imported in imports(tree(name).body, deep=False) if is_any_of(imported, TORCH)]
    assert not heavy or name in TORCH_AT_MODULE_LEVEL


def brought_by(*extras: str) -> set[str]:
    """Names of the distributions that the wheel asks for, alone or with `extras`; an extra may name another."""
    lines = list(project()["dependencies"])
    for extra in extras:
        for line in project()["optional-dependencies"][extra]:
            inner = re.match(r"homespun\[(.+)\]", line)
            lines += brought_by(*inner[1].split(",")) if inner else [line]
    return {re.match(r"[\w-]+", line)[0] for line in lines}


owners_of_modules = cache(importlib.metadata.packages_distributions)


def undeclared(name: str, declared: set[str], *, deep: bool) -> set[str]:
    owners = owners_of_modules()
    tops = {imported.partition(".")[0] for imported in imports(tree(name).body, deep=deep)}
    return {top for top in tops if top in owners and not declared & {_normal(owner) for owner in owners[top]}}


def _normal(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("name", [name for name in modules() if name.startswith("common")])
def test_common_is_imported_with_what_an_auditor_has(name):
    assert undeclared(name, brought_by(), deep=False) == set()


@pytest.mark.parametrize("name", modules())
def test_what_a_role_imports_is_declared_in_its_extra(name):
    extras = {"client": ["device"], "server": ["server"], "simulations": ["ray"], "common": ["device", "server"]}
    assert undeclared(name, brought_by(*extras[name.partition(".")[0]]), deep=True) == set()


@pytest.mark.parametrize("name", modules())
def test_no_role_imports_the_front_door(name):
    assert not any(is_any_of(imported, {"homespun"}) for imported in imports(tree(name).body, deep=True))


@pytest.mark.parametrize("name", modules())
def test_a_module_is_named_after_what_it_hides(name):
    parts = name.split(".")[1:]
    assert not FORBIDDEN_NAMES & set(parts)
    assert all(re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", part) for part in parts)


@pytest.mark.parametrize("name", modules())
def test_a_module_is_small_and_shows_little(name):
    lines, names = LARGER.get(name, (MOST_LINES, MOST_NAMES))
    assert len(modules()[name].read_text(encoding="utf-8").splitlines()) <= lines
    assert len(public_names(name)) <= names


@pytest.mark.parametrize("name", modules())
def test_a_module_says_what_it_is(name):
    assert ast.get_docstring(tree(name))


@pytest.mark.parametrize("name", modules())
def test_input_is_never_checked_by_assert(name):
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree(name)))


def test_every_module_has_its_tests():
    tested = {
        name
        for name in modules()
        if list((ROOT / "tests" / name.partition(".")[0]).rglob(f"test_{name.rpartition('.')[2]}.py"))
    }
    code = {name for name, path in modules().items() if path.name != "__init__.py"}
    assert code - tested - TESTED_ELSEWHERE.keys() == set()
    assert not tested & TESTED_ELSEWHERE.keys()
    assert all((ROOT / where).exists() for where in TESTED_ELSEWHERE.values())


@pytest.mark.parametrize("role", ROLES)
def test_every_test_file_tests_a_module(role):
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests" / role).rglob("test_*.py")}
    assert tested <= {part for name in modules() if name.startswith(role) for part in name.split(".")[1:]}


def test_no_package_under_tests_takes_the_name_of_a_role():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_no_installed_package_owns_one_of_our_names():
    owners = owners_of_modules()
    assert {role: owners[role] for role in ROLES if role in owners} == {}


def test_the_version_is_stated_once_to_people_and_once_to_packagers():
    assert project()["version"] == homespun.__version__


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
