"""The compiled kernels against torch, at every size that a vector's width could trip over; and doing without them."""

from __future__ import annotations

import subprocess
import threading
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from client import compiled_code, native

needs_kernels = pytest.mark.skipif(native.kernels() is None, reason=f"no kernels here: {native.why_no_kernels()}")
SIZES = [(1, 1), (2, 15), (3, 16), (4, 17), (5, 33), (7, 128), (2, 344)]


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found, wanted):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2e-6, atol=2e-6)


def gradient(result, leaf, back):
    return torch.autograd.grad(result, leaf, back)[0]


@needs_kernels
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_the_norm_and_its_gradient(rows, width):
    x, weight, back, beside = random(rows, width), random(width), random(rows, width + 1)[:, 1:].contiguous(), 1.0
    beside = random(rows + 1, width)[1:].contiguous()
    inner, scale = native.kernels().norm(x, weight, 1e-5)
    leaf = x.double().requires_grad_()
    wanted = F.rms_norm(leaf, (width,), weight.double(), 1e-5)
    close(inner, wanted)
    close(native.kernels().norm_back(back, x, scale, weight, beside), gradient(wanted, leaf, back.double()) + beside)


@needs_kernels
@pytest.mark.parametrize(("rows", "width"), SIZES)
def test_the_gated_activation_and_its_gradient(rows, width):
    both, back = 4 * random(rows, 2 * width), random(rows, width)
    leaf = both.double().requires_grad_()
    gates, ups = leaf.split(width, dim=1)
    wanted = F.silu(gates) * ups
    found = native.kernels().gate(both)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-5)
    slope = gradient(wanted, leaf, back.double())
    torch.testing.assert_close(native.kernels().gate_back(back, both).double(), slope, rtol=2e-6, atol=2e-5)


@needs_kernels
def test_gates_far_from_zero_are_shut_or_open():
    gates = torch.tensor([[-1e30, -200.0, -88.0, -87.0, -20.0, 0.0, 20.0, 88.0, 1e30]])
    found = native.kernels().gate(torch.cat([gates, torch.ones_like(gates)], dim=1))
    torch.testing.assert_close(found, F.silu(gates), rtol=2e-6, atol=1e-30)


@needs_kernels
@pytest.mark.parametrize("width", [2, 15, 16, 31, 97, 2048])
def test_the_gradient_of_cross_entropy(width):
    logits, weights = 30 * random(6, width), random(6).abs()
    targets = torch.randint(0, width, (6,), generator=torch.Generator().manual_seed(1))
    leaf = logits.double().requires_grad_()
    wanted = gradient((F.cross_entropy(leaf, targets, reduction="none") * weights).sum(), leaf, None)
    close(native.kernels().loss_back(logits, targets, weights), wanted)


@needs_kernels
@pytest.mark.parametrize("lengths", [[1], [2, 1, 3], [16], [17, 64, 5], [63, 65], [64, 130], [300]])
@pytest.mark.parametrize(("heads", "share", "width"), [(2, 1, 32), (1, 3, 8), (2, 2, 12), (1, 1, 80)])
def test_attention_and_its_gradient(lengths, heads, share, width):
    tokens, across = sum(lengths), heads * share * width
    qkv, back = random(tokens, across + 2 * heads * width), random(tokens, across)
    starts = torch.tensor([0, *lengths]).cumsum(0)
    angles = torch.outer(torch.arange(float(max(lengths))), 0.7 ** torch.arange(width / 2))
    leaf = qkv.double().requires_grad_()
    wanted = plain_attention(leaf, starts.tolist(), angles.double(), heads, share, width)
    turns = (angles.cos(), angles.sin())
    found, logs = native.kernels().attention(qkv, starts, *turns, heads, share, width)
    close(found, wanted)
    slope = gradient(wanted, leaf, back.double())
    arguments = (back, qkv, logs, starts, *turns, heads, share, width)
    torch.testing.assert_close(
        native.kernels().attention_back(*arguments, keyed=True).double(), slope, rtol=1e-5, atol=1e-5
    )
    unkeyed = native.kernels().attention_back(*arguments, keyed=False).double()
    slope[:, across : across + heads * width] = 0
    torch.testing.assert_close(unkeyed, slope, rtol=1e-5, atol=1e-5)


def plain_attention(qkv, starts, angles, heads, share, width):
    def turned(x, angle):
        first, second = x.chunk(2, dim=-1)
        cosine, sine = angle.cos(), angle.sin()
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)

    outs = []
    for start, stop in pairwise(starts):
        length = stop - start
        parts = qkv[start:stop].split([heads * share * width, heads * width, heads * width], dim=1)
        q, k, v = (part.view(length, -1, width).transpose(0, 1) for part in parts)
        q, k = turned(q, angles[:length]), turned(k, angles[:length])
        k, v = k.repeat_interleave(share, 0), v.repeat_interleave(share, 0)
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1).reshape(length, -1))
    return torch.cat(outs)


@needs_kernels
@pytest.mark.parametrize("rank", [1, 3, 8, 17])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 32), (48, 16), (128, 384)])
def test_low_rank_products_of_many_users_and_the_factors_gradients(rank, inputs, outputs):
    made = native.kernels()
    records = [1, 5, 4, 30, 2, 9]
    starts = [0, *torch.tensor(records).cumsum(0).tolist()]
    users, runs = torch.tensor([0, 6, 51]), torch.tensor(starts)
    a, b = random(2, rank, inputs), random(2, outputs + 1, rank)[:, 1:]  # one user's factors need not touch the next's
    assert made.takes_factors(a, b)
    x, wide = random(51, inputs), random(51, outputs + 16)
    y, back, toward = wide[:, 16:], random(51, outputs), random(51, inputs)
    before, through = y.double(), toward.double()
    low = made.factors(x, a, b, y, users)
    close_to_sums(y, before + by_user(lambda u, rows: rows @ a[u].double().t() @ b[u].double().t(), x, users))
    assert torch.equal(wide[:, :16], random(51, outputs + 16)[:, :16])
    for wanted_runs in (users, runs):
        moved = toward.clone()
        to_a, to_b = made.factors_back(back, x, low, a, b, moved, users, wanted_runs)
        wanted = by_user(lambda u, rows: rows @ b[u].double() @ a[u].double(), back, users)
        close_to_sums(moved, through + wanted)
        owner = [0 if stop <= 6 else 1 for stop in wanted_runs[1:].tolist()]
        for run, (start, stop) in enumerate(pairwise(wanted_runs.tolist())):
            one, own = slice(start, stop), owner[run]
            close_to_sums(to_a[run], (back[one].double() @ b[own].double()).t() @ x[one].double())
            close_to_sums(to_b[run], back[one].double().t() @ (x[one].double() @ a[own].double().t()))
    alone, _ = made.factors_back(back, x, low, a, b, None, users, runs)
    assert torch.equal(alone, to_a)


def by_user(product, rows, users):
    return torch.cat(
        [product(u, rows[start:stop].double()) for u, (start, stop) in enumerate(pairwise(users.tolist()))]
    )


def close_to_sums(found, wanted):
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-6 * max(1.0, float(wanted.abs().max())))


@needs_kernels
def test_factors_of_odd_widths_go_another_way():
    assert not native.kernels().takes_factors(random(2, 3, 33), random(2, 32, 3))
    assert not native.kernels().takes_factors(random(2, 3, 32), random(2, 33, 3))
    assert not native.kernels().takes_factors(random(2, 32, 3).transpose(1, 2), random(2, 32, 3))


@needs_kernels
def test_what_is_not_a_number_stays_none():
    made = native.kernels()
    for bad in (float("nan"), float("inf")):
        x = random(2, 40)
        x[0, 3] = bad
        assert not made.norm(x, torch.ones(40), 1e-5)[0][0].isfinite().all()
        assert not made.gate(x)[0].isfinite().all()
        assert not made.loss_back(x.clone(), torch.tensor([1, 1]), torch.ones(2))[0].isfinite().all()
        qkv, angles = random(20, 24), torch.zeros(20, 4)
        qkv[3, 2] = bad
        mixed, _ = made.attention(qkv, torch.tensor([0, 10, 20]), angles.cos(), angles.sin(), 1, 1, 8)
        assert not mixed[3].isfinite().any()
        assert mixed[10:].isfinite().all()


@needs_kernels
def test_threads_do_not_disturb_each_other():
    qkv, angles, starts = random(200, 96), random(64, 16), torch.tensor([0, 60, 124, 150, 200])
    turns = (angles.cos(), angles.sin())
    wanted, _ = native.kernels().attention(qkv, starts, *turns, 1, 1, 32)
    same = []

    def work():
        for _ in range(50):
            same.append(bool(torch.equal(native.kernels().attention(qkv, starts, *turns, 1, 1, 32)[0], wanted)))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(same) == 200
    assert all(same)


@pytest.fixture
def afresh(monkeypatch):
    """Look for kernels again, in the test and after it."""
    monkeypatch.delenv("HOMESPUN_KERNELS", raising=False)
    native._made.cache_clear()
    yield
    native._made.cache_clear()


@pytest.mark.usefixtures("afresh")
def test_they_can_be_switched_off(monkeypatch):
    monkeypatch.setenv("HOMESPUN_KERNELS", "0")
    assert native.kernels() is None
    assert "HOMESPUN_KERNELS" in native.why_no_kernels()


@pytest.mark.usefixtures("afresh")
def test_without_a_compiler_there_are_none_and_the_reason_is_said(monkeypatch):
    monkeypatch.setattr(compiled_code.shutil, "which", lambda name: None)
    assert native.kernels() is None
    assert native.why_no_kernels() == "there is no C compiler"


@pytest.mark.usefixtures("afresh")
@pytest.mark.parametrize("compiler", ["/bin/false", "/bin/true"])
def test_a_compiler_that_makes_nothing_leaves_nothing_behind(monkeypatch, tmp_path, compiler):
    monkeypatch.setattr(compiled_code.shutil, "which", lambda name: compiler)
    monkeypatch.setattr(compiled_code, "cache_home", lambda: tmp_path / "cache")
    monkeypatch.setattr(native, "SOURCE", copied(tmp_path))
    assert native.kernels() is None
    assert "could not be compiled" in native.why_no_kernels()
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "kernels.c"]


@needs_kernels
@pytest.mark.usefixtures("afresh")
def test_kernels_that_disagree_with_torch_are_not_used(monkeypatch, tmp_path):
    source = copied(tmp_path)
    text = source.read_text(encoding="utf-8")
    assert "1.66666654" in text
    source.write_text(text.replace("1.66666654", "1.67666654"), encoding="utf-8")
    monkeypatch.setattr(native, "SOURCE", source)
    assert native.kernels() is None
    assert "disagree" in native.why_no_kernels()


@needs_kernels
@pytest.mark.usefixtures("afresh")
def test_a_library_that_others_can_write_is_compiled_again(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "SOURCE", copied(tmp_path))
    assert native.kernels() is not None
    (made,) = tmp_path.rglob("kernels-*.so")
    made.unlink()  # in place, it would change under the process that has it mapped
    made.write_bytes(b"not ours")
    made.chmod(0o777)
    native._made.cache_clear()
    assert native.kernels() is not None
    assert made.read_bytes() != b"not ours"


@needs_kernels
@pytest.mark.usefixtures("afresh")
def test_where_the_source_cannot_be_written_beside_they_lie_in_the_cache(monkeypatch, tmp_path):
    source = copied(tmp_path)
    source.with_name("__pycache__").write_text("a file where a folder would be")
    monkeypatch.setattr(native, "SOURCE", source)
    monkeypatch.setattr(compiled_code, "cache_home", lambda: tmp_path / "cache")
    assert native.kernels() is not None
    assert len(list((tmp_path / "cache").rglob("kernels-*.so"))) == 1
    native._made.cache_clear()
    monkeypatch.setattr(subprocess, "run", None)  # what is there is not compiled again
    assert native.kernels() is not None


def copied(folder):
    source = folder / "kernels.c"
    source.write_bytes(native.SOURCE.read_bytes())
    return source


def test_they_serve_float32_on_a_cpu_with_few_threads(monkeypatch):
    assert native.kernels_for(torch.empty(0, dtype=torch.float64)) is None
    assert native.kernels_for(torch.empty(0, dtype=torch.bfloat16)) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: native.FEW_THREADS + 1)
    assert native.kernels_for(torch.empty(0)) is None
