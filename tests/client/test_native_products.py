"""Compiled products against torch in float64, at every size that a tile, a panel or a block could trip over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from client import native, native_products
from client.native_products import Products


@pytest.fixture
def products(monkeypatch) -> Products:
    """Those of this machine, as with one thread."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    found = native_products.products_for(torch.empty(0))
    if found is None:
        pytest.skip("no compiled products here")
    return found


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def close(found, wanted):
    wanted = wanted.detach()
    assert (found - wanted).abs().max() <= 4e-6 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("rows", [1, 5, 6, 13, 14, 15, 112, 119, 300])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (16, 32), (37, 31), (256, 33), (257, 70)])
def test_a_product_and_what_it_is_added_onto(products, rows, depth, columns):
    left, matrix, onto = random(rows, depth + 3)[:, :depth], random(depth, columns), random(rows, columns)
    laid = products.laid(matrix)
    wanted = left.double() @ matrix.double()
    close(products.product(left, laid), wanted)
    close(products.product(left, laid, onto), wanted + onto)


@pytest.mark.parametrize("columns", [32, 50])
@pytest.mark.parametrize("rows", [1, 14, 130])
def test_nothing_is_written_or_read_beyond_the_rows(products, rows, columns):
    """Beyond the rows lies NaN: it must neither come in nor be gone afterwards."""
    matrix, laid = random(24, columns), products.laid(random(24, columns))
    around, out = torch.full((rows + 20, 24), torch.nan), torch.full((rows + 20, columns), torch.nan)
    around[:rows] = random(rows, 24)
    code = products._library.product(
        around.data_ptr(), 24, laid.panels.data_ptr(), None, out.data_ptr(), columns, rows, 24, columns
    )
    assert code == 0
    close(out[:rows], around[:rows].double() @ matrix.double())
    assert out[rows:].isnan().all()


@pytest.mark.parametrize("rows", [1, 14, 113, 230])
@pytest.mark.parametrize(("width", "inner"), [(8, 5), (32, 64), (40, 53), (128, 344)])
def test_a_gated_mlp_with_its_norm_and_its_gradient(products, rows, width, inner):
    shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
    matrices = tuple(random(*shape, i + 1)[:, :, 0] / shape[1] ** 0.5 for i, shape in enumerate(shapes))
    laid = products.layer(matrices)
    x, weight, back = random(rows, width), random(width), random(rows, width + 1)[:, 1:].contiguous()
    result, scale = products.mlp(x, weight, 1e-5, laid)
    qkv, inside, other = products.norm_product(x, weight, 1e-5, laid.qkv, keep=True)
    leaf = x.double().requires_grad_()
    normed = F.rms_norm(leaf, (width,), weight.double(), 1e-5)
    gate, up, down = (each.double() for each in matrices[4:])
    wanted = leaf + (F.silu(normed @ gate.t()) * (normed @ up.t())) @ down.t()
    close(result, wanted)
    close(products.mlp_back(back, x, scale, weight, laid), torch.autograd.grad(wanted, leaf, back.double())[0])
    close(inside, normed)
    close(qkv, normed @ torch.cat(matrices[:3]).double().t())
    torch.testing.assert_close(other, scale)


@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 8, 2), (15, 40, 33), (120, 16, 700)])
def test_the_gradient_of_cross_entropy_at_the_hidden_states(products, rows, width, vocabulary):
    hidden, head, weights = random(rows, width), random(vocabulary, width), random(rows).abs()
    targets = torch.arange(rows) % vocabulary
    for _ in range(2):  # a matrix that was changed in place is laid out anew
        leaf = hidden.double().requires_grad_()
        losses = F.cross_entropy(leaf @ head.double().t(), targets, reduction="none") * weights
        close(products.loss_back(hidden, head, targets, weights), torch.autograd.grad(losses.sum(), leaf)[0])
        head.mul_(-0.5)


def test_a_large_output_layer_is_not_copied(products, monkeypatch):
    monkeypatch.setattr(native_products, "LARGEST_HEAD", 31)
    assert products.loss_back(random(2, 4), random(8, 4), torch.tensor([0, 1]), torch.ones(2)) is None


def test_not_a_number_stays_in_its_row(products):
    matrices = tuple(random(8, 8) for _ in range(7))
    x = random(20, 8)
    x[3, 2] = torch.nan
    result, _ = products.mlp(x, torch.ones(8), 1e-5, products.layer(matrices))
    assert result.isnan().any(dim=1).tolist() == [row == 3 for row in range(20)]


def test_they_are_for_one_thread_and_where_the_kernels_are(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert native_products.products_for(torch.empty(0)) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(native, "kernels", lambda: None)
    assert native_products.products_for(torch.empty(0)) is None


def test_products_that_disagree_with_torch_are_not_used(products, monkeypatch):
    real = Products.mlp_back
    monkeypatch.setattr(Products, "mlp_back", lambda *given: real(*given) * 1.0001)
    assert not native_products._agree(products)
