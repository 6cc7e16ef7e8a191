"""`homespun audit report`: files, exit codes, and what a privacy officer's machine does not have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import homespun
from common.evidence import read_evidence

ROOT = Path(__file__).parents[2]
ABSENT = ("torch", "flwr", "transformers", "peft", "safetensors", "grpc", "pandas", "pyarrow", "datasets", "ray")
NOT_INSTALLED = f"""
class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT!r}:
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, NotInstalled())
"""


def test_a_report_is_written_and_its_verdict_is_the_exit_code(run, tmp_path, capsys):
    out = tmp_path / "report"
    assert homespun.main(["audit", "report", str(run), "--out", str(out)]) == 0
    assert "verdict: holds" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"audit.html", "audit.json", "registry-record.json"}
    assert homespun.main(["audit", "report", str(run), "--out", str(out), "--budget", "0.5", "--json"]) == 4
    assert json.loads(capsys.readouterr().out)["verdict"] == "contradicted"
    assert homespun.main(["audit", "report", str(run), "--out", str(out), "--since", str(out / "audit.json")]) == 0
    assert homespun.main(["audit", "report", str(run), "--since", str(run / "spec.json")]) == 1
    for number, nonsense in enumerate(('{"ledgers":[3]}', '{"ledgers":[],"claims":[1]}', "[" * 100_000, "[]", "\x00")):
        earlier = tmp_path / f"earlier-{number}.json"
        earlier.write_text(nonsense)
        capsys.readouterr()
        assert homespun.main(["audit", "report", str(run), "--out", str(out), "--since", str(earlier)]) == 1
        assert f"{earlier}: not the audit.json of an earlier audit" in capsys.readouterr().err


def test_with_two_ledgers_and_keys_alone_no_model_no_torch_no_network(fleet_zips, tmp_path):
    """What a plain install lacks is made impossible to import, and a socket impossible to open."""
    server, devices = fleet_zips("central")
    key = [read_evidence(path).manifest["public_key"] for path in (server, devices[0])]
    bare = []
    for number, path in enumerate((server, devices[0])):
        bare.append(tmp_path / f"{number}.jsonl")
        bare[-1].write_bytes(read_evidence(path).ledger)
    keys = [word for one in key for word in ("--key", one)]
    out = tmp_path / "out"
    commands = [
        ["verify", *map(str, bare), *keys],
        ["recompute", *map(str, bare)],
        ["reconcile", *map(str, bare)],
        ["report", *map(str, bare), *keys, "--out", str(out)],
        ["report", str(server), *map(str, devices), "--out", str(tmp_path / "zips")],
        ["sign", str(out / "audit.html"), "--name", "A privacy officer"],
        ["verify", str(out / "audit.html")],
    ]
    code = (
        "import json, socket, sys\n"
        f"{NOT_INSTALLED}"
        "def no_network(*arguments, **words): raise AssertionError('a socket was opened')\n"
        "socket.socket = no_network\n"
        "import homespun\n"
        "print([homespun.main(['audit', *words]) for words in json.loads(sys.argv[1])])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 0, 0, 0, 0]", done.stderr


@pytest.mark.parametrize(
    "module", ["audit", "audit_page", "audit_cli", "registry_record", "reconciliation", "signatures"]
)
def test_no_module_of_the_audit_imports_what_a_plain_install_lacks(module):
    code = f"import sys\n{NOT_INSTALLED}import simulations.{module}"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
