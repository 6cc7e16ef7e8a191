"""What is exported is what stock tools load, and it says nothing that the device does not hold."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest
import torch

from client.base_model import load_base
from client.device_home import DeviceHome
from client.export import adapter_of, digests_of, write_export
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.owner_files import read_paths
from client.personalization.profile import Line, Profile
from client.record_store import NewRecord, RecordStore
from client.trainer import Trainer
from client.user_data import Record
from common.adapters import lora_layout
from common.errors import ConfigError, DataError
from common.model_files import linear_modules, model_digest

TARGETS = ("q_proj", "v_proj")
RECORDS = (
    Record("", "plain text", 5.0),
    Record("asked", "answered", None, "reply"),
    Record("which", "this", 7.0, "preference", "that"),
)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return DeviceHome.open(tmp_path / "device", create=True)


@pytest.fixture
def modules(tiny_base_folder):
    return linear_modules(tiny_base_folder, TARGETS)


@pytest.fixture
def learned(tiny_base_folder, modules):
    generator = np.random.default_rng(0)

    def vector(rank):
        return (0.1 * generator.standard_normal(lora_layout(modules, rank).size)).astype(np.float32)

    return Learned(
        model_digest(tiny_base_folder),
        TARGETS,
        2.0,
        rank=2,
        rank_alone=1,
        rank_over_global=3,
        shared=vector(2),
        alone=vector(1),
        over_global=vector(3),
        in_context=vector(3),
        others={"preference": vector(3), "soft-prompt": np.ones(5, np.float32)},
        run="ab" * 16,
        round=4,
        chosen="both+retrieval@0.5/1.5",
        losses={"both": 1.0},
    )


@pytest.fixture
def full(home, learned):
    RecordStore(home).add([NewRecord(record, "x") for record in RECORDS])
    LevelStore(home).keep_profile(Profile((Line("I am called Ada.", "own words"),), frozenset({"I like noise."})))
    LearnedStore(home).keep(learned)
    return home


def logits(model):
    rows = torch.arange(3, 15)[None]
    with torch.no_grad():
        return model(input_ids=rows).logits


def ours(folder, *adapters):
    """The naive way: every adapter's product added into the weights of its layers."""
    base = load_base(folder, TARGETS)
    for vector, rank, strength in adapters:
        tensors = lora_layout(base.modules, rank).split(vector)
        for module in base.modules:
            a, b = (tensors[f"base_model.model.{module.name}.lora_{part}.weight"] for part in "AB")
            base.model.get_submodule(module.name).weight.data += torch.from_numpy(strength * 2.0 * (b @ a))
    return logits(base.model)


@pytest.mark.parametrize(
    ("system", "parts"),
    [
        ("global", [("shared", 2, 1.0)]),
        ("profile", [("shared", 2, 1.0)]),
        ("private", [("alone", 1, 1.0)]),
        ("both", [("shared", 2, 1.0), ("over_global", 3, 1.0)]),
        ("both+retrieval", [("shared", 2, 1.0), ("in_context", 3, 1.0)]),
        ("both@0.5/1.5", [("shared", 2, 0.5), ("over_global", 3, 1.5)]),
        ("preference", [("shared", 2, 1.0), ("preference", 3, 1.0)]),
        ("retrieval", []),
    ],
)
def test_each_system_is_one_adapter_that_adds_what_it_should(tiny_base_folder, modules, learned, system, parts):
    adapter = adapter_of(learned, modules, system)
    if not parts:
        assert adapter is None
        return
    naive = [(learned.others.get(name, getattr(learned, name, None)), *rest) for name, *rest in parts]
    base = load_base(tiny_base_folder, TARGETS)
    trainer = Trainer(base, rank=1, scaling=2.0)
    with trainer.over_base((adapter.vector, adapter.layout, adapter.scaling)):
        found = logits(base.model)
    assert torch.allclose(found, ours(tiny_base_folder, *naive), atol=1e-4)


def test_a_system_that_is_not_here_is_refused(modules, learned):
    from dataclasses import replace

    for system in ("nonsense", "private+retrieval@1/0.5/2", "private+memory"):
        with pytest.raises((ConfigError, ValueError)):
            adapter_of(learned, modules, system)
    with pytest.raises(ConfigError, match="no both"):
        adapter_of(replace(learned, over_global=None), modules, "both")
    alone = replace(learned, shared=None, over_global=None, in_context=learned.alone)
    assert np.array_equal(adapter_of(alone, modules, "private+retrieval").vector, learned.alone)
    with pytest.raises(ConfigError, match="no global"):
        adapter_of(alone, modules, "global")


def test_stock_peft_loads_what_is_exported_and_merged_weights_give_the_same_logits(full, tmp_path, tiny_base_folder):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target = tmp_path / "out"
    manifest = write_export(full, target, tiny_base_folder, merged="both")
    learned = LearnedStore(full).load()
    expected = ours(tiny_base_folder, (learned.shared, 2, 1.0), (learned.over_global, 3, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_pretrained(tiny_base_folder)
        by_peft = logits(PeftModel.from_pretrained(base, str(target / "adapters" / "both")))
        merged = logits(AutoModelForCausalLM.from_pretrained(target / "merged"))
    assert torch.allclose(by_peft, expected, atol=1e-4)
    assert torch.allclose(merged, by_peft, atol=1e-5)
    assert AutoTokenizer.from_pretrained(target / "merged")("w5")["input_ids"]
    assert {"global", "private", "both", "preference", "both+retrieval", learned.chosen} <= set(manifest["systems"])
    assert manifest["files"] == digests_of(target)


def test_records_and_profile_are_files_that_their_owner_can_read_and_bring_back(full, tmp_path, tiny_base_folder):
    target = tmp_path / "out"
    write_export(full, target, tiny_base_folder)
    assert tuple(one.record for one in read_paths([target / "records.jsonl"]).records) == RECORDS
    kept = {one.id for one in RecordStore(full).records()}
    assert {json.loads(line)["id"] for line in (target / "records.jsonl").read_text().splitlines()} == kept
    assert (target / "profile.txt").read_text() == "I am called Ada.\n"
    assert json.loads((target / "profile.json").read_text())["deleted"] == ["I like noise."]
    assert target.stat().st_mode & 0o077 == 0
    assert (target / "records.jsonl").stat().st_mode & 0o077 == 0


def test_a_device_that_learned_nothing_exports_its_records(home, tmp_path, tiny_base_folder):
    RecordStore(home).add([NewRecord(RECORDS[0], "x")])
    manifest = write_export(home, tmp_path / "out", tiny_base_folder)
    assert (manifest["systems"], manifest["records"]) == ([], 1)
    with pytest.raises(ConfigError, match="device learn"):
        write_export(home, tmp_path / "other", tiny_base_folder, merged="private")
    assert not (tmp_path / "other").exists()


def test_nothing_is_left_where_it_cannot_be_done(full, tmp_path, tiny_base_folder):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "x").write_text("x")
    with pytest.raises(DataError, match="already holds"):
        write_export(full, tmp_path / "taken", tiny_base_folder)
    other = tmp_path / "other-base"
    other.mkdir()
    (other / "config.json").write_text("{}")
    with pytest.raises(DataError, match="not the base model"):
        write_export(full, tmp_path / "out", other)
    with pytest.raises(ConfigError, match="retrieval puts nothing"):
        write_export(full, tmp_path / "out", tiny_base_folder, merged="retrieval")
    assert {path.name for path in tmp_path.iterdir()} == {"taken", "other-base", "device", "config"}
