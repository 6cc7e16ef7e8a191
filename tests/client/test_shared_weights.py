"""Weights that are mapped are the same weights, are one copy for all processes, and never change the file."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch

from client.base_model import load_base
from client.shared_weights import share_weights
from common.model_files import model_digest

TARGETS = ("q_proj", "v_proj")


def weights(model):
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def test_mapped_weights_are_the_same_and_all_of_them(tiny_base_folder):
    base = load_base(tiny_base_folder, TARGETS)
    before = weights(base.model)
    shared = share_weights(base.model, tiny_base_folder)
    assert shared == sum(each.nbytes for each in before.values())
    for name, each in base.model.named_parameters():
        assert torch.equal(each, before[name])
        assert not each.requires_grad


def test_a_weight_of_another_type_or_content_stays_as_it_is(tiny_base_folder):
    base = load_base(tiny_base_folder, TARGETS, dtype=torch.float64)
    before = weights(base.model)
    assert share_weights(base.model, tiny_base_folder) == 0
    base = load_base(tiny_base_folder, TARGETS)
    changed = base.model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        changed.mul_(2.0)
    shared = share_weights(base.model, tiny_base_folder)
    assert shared == sum(each.nbytes for name, each in base.model.named_parameters() if each is not changed)
    assert torch.equal(changed.double(), 2.0 * before["model.layers.0.mlp.up_proj.weight"])


def test_who_writes_to_a_weight_writes_to_a_copy(tiny_base_folder, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(tiny_base_folder, folder)
    base = load_base(folder, TARGETS)
    share_weights(base.model, folder)
    with torch.no_grad():
        base.model.model.norm.weight.fill_(7.0)
    assert float(base.model.model.norm.weight[0]) == 7.0
    assert model_digest(folder) == base.digest


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}", b"\x09\0\0\0\0\0\0\0not JSON!"])
def test_a_file_that_is_none_maps_nothing(tiny_base_folder, tmp_path, content):
    base = load_base(tiny_base_folder, TARGETS)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert share_weights(base.model, tmp_path) == 0


def _proportional_bytes(folder, ready, go, told, leave):
    """In a process of its own: open a base, wait for the other, say how much of it this process is charged with."""
    import os

    model = torch.nn.Linear(2048, 2048, bias=False)
    model.weight.requires_grad_(False)
    from safetensors.torch import load_file

    model.weight.data = load_file(folder / "model.safetensors")["weight"].clone()
    share_weights(model, folder)
    float(model.weight.sum())
    ready.release()
    go.acquire()
    lines = Path(f"/proc/{os.getpid()}/smaps").read_text(encoding="utf-8").split("\n")
    own = [number for number, line in enumerate(lines) if line.endswith("model.safetensors")]
    told.put(sum(1024 * int(next(at for at in lines[n:] if at.startswith("Pss:")).split()[1]) for n in own))
    leave.acquire()  # whoever is alone is charged with the whole


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is counted as Linux counts it")
def test_two_processes_share_one_copy(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.randn(2048, 2048)}, tmp_path / "model.safetensors")
    context = multiprocessing.get_context("spawn")
    ready, go, leave, told = *(context.Semaphore(0) for _ in range(3)), context.Queue()
    both = [context.Process(target=_proportional_bytes, args=(tmp_path, ready, go, told, leave)) for _ in range(2)]
    for process in both:
        process.start()
    assert all(ready.acquire(timeout=240) for _ in both)
    go.release()
    go.release()
    charged = [told.get(timeout=240) for _ in both]
    leave.release()
    leave.release()
    for process in both:
        process.join(240)
    assert sum(charged) == pytest.approx(4 * 2048 * 2048, rel=0.1)  # each is charged with half of it
