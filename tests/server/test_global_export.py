"""The global adapter of a run leaves as stock PEFT loads it, whole or not at all."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

import homespun
from common.config import RunConfig
from common.errors import DataError
from server import fleet_runs, run_folder
from server.checkpoint import Checkpoint
from server.global_export import write_global_adapter


@pytest.fixture
def make(tmp_path, monkeypatch, tiny_base_folder):
    monkeypatch.setenv("HOMESPUN_HOME", str(tmp_path / "home"))

    def run(method="dual", **options):
        fields = {"model": str(tiny_base_folder), "cohort": 2, "rounds": 3, "epsilon": 8.0, "max_tokens": 16}
        config = RunConfig(**(fields | {"method": method} | options))
        opened = fleet_runs.prepare(tmp_path / f"run-{method}", config, ["ab" * 16, "cd" * 16])
        opened.ledger.close()
        vector = np.random.default_rng(0).standard_normal(opened.start.size).astype(np.float32)
        Checkpoint(2, vector, np.zeros_like(vector), "", opened.layout.digest).save(opened.path / run_folder.CHECKPOINT)
        return opened, vector

    return run


def test_stock_peft_loads_what_the_run_has_reached(make, tmp_path, tiny_base_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    opened, vector = make()
    written = write_global_adapter(opened.path, tmp_path / "out")
    assert (written.round, written.base) == (2, opened.spec.model)
    rows = torch.arange(3, 13)[None]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
        tensors = opened.layout.split(vector)
        naive = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
        for name in [name for name in tensors if ".lora_A." in name]:
            layer = naive.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            product = tensors[name.replace(".lora_A.", ".lora_B.")] @ tensors[name]
            layer.weight.data += torch.from_numpy(opened.config.scaling * product)
        by_peft = PeftModel.from_pretrained(base, str(tmp_path / "out"))(input_ids=rows).logits
        assert torch.allclose(by_peft, naive(input_ids=rows).logits, atol=1e-4)
    promise = json.loads((tmp_path / "out" / "homespun.json").read_text())
    assert (promise["epsilon"], promise["unit"], promise["noise"]) == ("8.0", "user", "central")
    assert promise["delta"] == opened.spec.delta


def test_a_method_that_shares_a_half_is_written_with_the_public_other_half(make, tmp_path):
    opened, _ = make("ffa")
    write_global_adapter(opened.path, tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_nothing_is_left_where_it_cannot_be_done(make, tmp_path):
    opened, _ = make()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").touch()
    for run, target, says in (
        (tmp_path / "absent", tmp_path / "out", "no run"),
        (opened.path, tmp_path / "taken", "already holds"),
    ):
        with pytest.raises(DataError, match=says):
            write_global_adapter(run, target)
    (opened.path / run_folder.SPEC).write_text("{")
    with pytest.raises(DataError, match="missing or damaged"):
        write_global_adapter(opened.path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_says_where_and_after_which_round(make, tmp_path, monkeypatch, capsys):
    opened, _ = make()
    monkeypatch.chdir(tmp_path)
    assert homespun.main(["server", "export", str(opened.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["path"], said["round"]) == ("run-dual-global", 2)
    assert homespun.main(["server", "export", str(opened.path), "--out", "other"]) == 0
    assert "after round 2" in capsys.readouterr().out
    assert homespun.main(["server", "export", str(opened.path)]) == 1
