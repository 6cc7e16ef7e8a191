"""What tests of the audit share: one finished run on the tiny base, and ledgers that a liar wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.keys import SigningKey
from common.ledger import Ledger
from common.ledger_format import verify


def _write_notes(path: Path) -> None:
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        for user in range(24):
            own = generator.integers(3, 128, size=6)
            texts = [" ".join(f"w{w}" for w in generator.choice(own, size=8)) for _ in range(12)]
            file.write(json.dumps({"user": f"secret-name-{user}", "texts": texts}) + "\n")


@pytest.fixture(scope="session")
def audited_base(tmp_path_factory, tiny_base_folder):
    """A finished run that claims epsilon 8, and the home that signed its ledger; nobody writes here."""
    from common.config import RunConfig
    from simulations.run import Progress, start

    folder = tmp_path_factory.mktemp("audited")
    _write_notes(folder / "notes.jsonl")
    config = RunConfig(
        model=str(tiny_base_folder),
        data=str(folder / "notes.jsonl"),
        cohort=6,
        rounds=3,
        local_batch=2,
        personal_steps=6,
        personal_batch=2,
        evaluation_users=4,
        workers=0,
        max_tokens=32,
        levels=(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOMESPUN_HOME", str(folder / "home"))
        assert start(config, folder / "run", Progress()).finished
    return folder


@pytest.fixture
def run(audited_base, tmp_path, monkeypatch) -> Path:
    """A copy of the finished run, to be tampered with."""
    monkeypatch.setenv("HOMESPUN_HOME", str(audited_base / "home"))
    shutil.copytree(audited_base / "run", tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def forge(tmp_path):
    """A function that writes an honest run's ledger again, well signed, with what `change` makes of each entry.

    `change(kind, body)` returns the body that is written, a list of (kind, body), or None for nothing at all.
    """
    made = []

    def write(source: Path, change=lambda _, body: body, header=None) -> Path:
        entries = verify((source / "ledger.jsonl").read_bytes()).entries
        opened = {name: value for name, value in entries[0].body.items() if name != "salt"} | (header or {})
        path = tmp_path / f"forged-{len(made)}" / "ledger.jsonl"
        made.append(path)
        with Ledger.create(path, SigningKey.generate(), opened) as ledger:
            moved: dict[int, int] = {}
            for entry in entries[1:]:
                body = dict(entry.body)
                for field in ("reservation", "debit"):
                    if field in body:
                        body[field] = moved.get(body[field], body[field])
                changed = change(entry.kind, body)
                items = changed if isinstance(changed, list) else [] if changed is None else [(entry.kind, changed)]
                for kind, item in items:
                    moved[entry.index] = ledger.append(kind, item).index
        return path

    return write
