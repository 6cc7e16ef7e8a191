"""An export is taken in whole, checked byte by byte, and never over a newer federation."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from client.device_home import DeviceHome
from client.export import write_export
from client.exported import Exported, take_in
from client.learned_store import Learned, LearnedStore
from client.level_store import LevelStore
from client.personalization.profile import Line, Profile
from client.record_store import NewRecord, RecordStore
from client.user_data import Record
from common.adapters import lora_layout
from common.errors import DataError, Refusal
from common.model_files import linear_modules, model_digest

TARGETS = ("q_proj", "v_proj")


@pytest.fixture(autouse=True)
def keys(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def learned(tiny_base_folder):
    modules = linear_modules(tiny_base_folder, TARGETS)
    vectors = [np.full(lora_layout(modules, rank).size, rank / 10, np.float32) for rank in (1, 2, 3)]
    return Learned(
        model_digest(tiny_base_folder),
        TARGETS,
        2.0,
        rank=1,
        rank_alone=2,
        rank_over_global=3,
        shared=vectors[0],
        alone=vectors[1],
        over_global=vectors[2],
        others={"preference": vectors[2]},
        run="ab" * 16,
        round=4,
        chosen="both",
        losses={"both": 1.0},
        report={"records": 3},
    )


@pytest.fixture
def out(tmp_path, learned, tiny_base_folder):
    home = DeviceHome.open(tmp_path / "from", create=True)
    RecordStore(home).add([NewRecord(Record("", text), "x") for text in ("one", "two")])
    LevelStore(home).keep_profile(
        Profile((Line("I am Ada.", "own words"), Line("I like x.", "answers", 3)), frozenset({"gone"}))
    )
    LearnedStore(home).keep(learned)
    write_export(home, tmp_path / "out", tiny_base_folder)
    return tmp_path / "out"


@pytest.fixture
def here(tmp_path):
    return DeviceHome.open(tmp_path / "here", create=True)


def test_everything_comes_over(out, here, learned, tiny_base_folder):
    RecordStore(here).add([NewRecord(Record("", "two"), "y")])
    taken = take_in(here, Exported.read(out), tiny_base_folder)
    assert (len(taken.records.ids), taken.records.duplicates, taken.own_words) == (1, 1, 1)
    assert taken.adapters == ("shared", "alone", "over_global")
    assert {one.record.response for one in RecordStore(here).records()} == {"one", "two"}
    profile = LevelStore(here).profile()
    assert "I am Ada." in profile.texts
    assert profile.deleted == {"gone"}
    found = LearnedStore(here).load()
    for name in ("shared", "alone", "over_global"):
        assert np.array_equal(getattr(found, name), getattr(learned, name)), name
    assert np.array_equal(found.others["preference"], learned.others["preference"])
    assert (found.chosen, found.losses, found.report) == ("both", {"both": 1.0}, {"records": 3})
    again = take_in(here, Exported.read(out), tiny_base_folder)
    assert (again.records.ids, again.own_words) == ((), 0)


def test_the_adapter_of_a_federation_that_goes_on_here_is_not_replaced(out, here, learned, tiny_base_folder):
    newer = replace(learned, shared=learned.shared * 2, alone=None, over_global=None, others={}, round=9)
    LearnedStore(here).keep(newer)
    take_in(here, Exported.read(out), tiny_base_folder)
    found = LearnedStore(here).load()
    assert np.array_equal(found.shared, newer.shared)
    assert (found.round, found.over_global, found.chosen) == (9, None, "global")
    assert np.array_equal(found.alone, learned.alone)


def test_adapters_over_another_base_are_refused_before_anything_is_taken(out, here, tmp_path):
    (tmp_path / "base").mkdir()
    with pytest.raises(Refusal, match="another base"):
        take_in(here, Exported.read(out), tmp_path / "base")
    assert len(RecordStore(here)) == 0
    assert take_in(here, Exported.read(out), None).adapters == ()
    assert len(RecordStore(here)) == 2


@pytest.mark.parametrize("fault", ["changed", "added", "missing", "manifest", "format", "nothing"])
def test_a_file_that_is_not_as_it_was_exported_is_named(out, fault, tmp_path):
    path = out / "adapters" / "both" / "adapter_model.safetensors"
    if fault == "changed":
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    elif fault == "added":
        (out / "more.txt").write_text("x")
    elif fault == "missing":
        (out / "records.jsonl").unlink()
    elif fault == "manifest":
        (out / "manifest.json").write_text("[]")
    elif fault == "format":
        values = json.loads((out / "manifest.json").read_text())
        (out / "manifest.json").write_text(json.dumps({**values, "format": 9}))
    else:
        out = tmp_path / "absent"
    with pytest.raises(DataError):
        Exported.read(out)


def test_a_manifest_that_lies_about_its_adapters_is_refused(out, here, tiny_base_folder):
    values = json.loads((out / "manifest.json").read_text())
    for change in (
        {"parts": {"alone": 7}},
        {"parts": {"../../x": 1}},
        {"learned": {"base": values["learned"]["base"]}},
    ):
        (out / "manifest.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(DataError):
            take_in(here, Exported.read(out), tiny_base_folder)
        assert len(RecordStore(here)) == 0
