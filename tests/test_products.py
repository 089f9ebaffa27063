"""Matrix products of the torch backend: torch's and oneDNN's are as exact, and groups of rows lose none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dydila_kernels import DyDiLAttention, torch_backend
from dydila_kernels.linear import linear
from dydila_kernels.torch_backend import products
from dydila_kernels.torch_backend.blocks import Workspace
from dydila_kernels.torch_backend.products import add_product, group_tile, multiply, takes_onednn
from dydila_kernels.torch_backend.projection import Groups

needs_onednn = pytest.mark.skipif(not products.HAS_ONEDNN, reason="a CPU with AVX-512, and a torch with oneDNN")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of any size are oneDNN's."""
    monkeypatch.setattr(products, "SMALLEST", 1)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda t: t,
    "columns": lambda t: t.T.contiguous().T,
    "a part of wider rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "every other row": lambda t: t.repeat_interleave(2, 0)[::2],
    "one row": lambda t: t[:1].expand_as(t),
}


@needs_onednn
@given(
    st.integers(1, 70), st.integers(1, 500), st.integers(1, 70), st.sampled_from(sorted(LAYOUTS)),
    st.sampled_from(sorted(LAYOUTS)), st.booleans(),
)  # fmt: skip
def test_onednn_is_as_exact_as_torch(n: int, k: int, m: int, left: str, right: str, has_bias: bool) -> None:
    torch.manual_seed(n * k * m)
    a, b = LAYOUTS[left](torch.randn(n, k)), LAYOUTS[right](torch.randn(k, m))
    bias, out = torch.randn(m) if has_bias else None, torch.full((n, m), float("nan"))
    plain = a @ b if bias is None else torch.addmm(bias, a, b)
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "SMALLEST", 1)
        assert multiply(a, b, out, bias) is out
        error, theirs = (out - exact).norm(), (plain - exact).norm()
        assert error <= 2 * theirs + 1e-7 * exact.norm()
        add_product(out, a, b)
        assert (out - exact - a.double() @ b.double()).norm() <= 4 * theirs + 2e-7 * exact.norm() + 1e-6


@needs_onednn
def test_what_is_left_to_torch(small: None) -> None:
    a = torch.randn(64, 64)
    assert takes_onednn(a, a.numel() * 64)
    assert not takes_onednn(a.double(), a.numel() * 64)
    assert not takes_onednn(a.to("meta"), a.numel() * 64)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not takes_onednn(a, a.numel() * 64)
    with FlopCounterMode(display=False) as counter:
        multiply(a, a, torch.empty(64, 64))
        add_product(torch.zeros(64, 64), a, a)
    assert counter.get_total_flops() == 2 * 2 * 64**3


@given(st.integers(0, 300), st.integers(1, 12), st.sampled_from([1, 8, 32]), st.randoms(use_true_random=False))
def test_every_row_has_a_place_in_the_group_of_its_projector(rows: int, choices: int, tile: int, draw: Random) -> None:
    index = torch.tensor([draw.choice([0, draw.randrange(choices)]) for _ in range(rows)], dtype=torch.int64)
    groups = Groups.of(index, choices, tile)
    assert len(groups.sizes) == choices and all(size % tile == 0 for size in groups.sizes)
    assert sum(groups.sizes) == len(groups.rows) < rows + choices * tile + 1
    ends = torch.tensor(list(accumulate(groups.sizes)))
    assert torch.equal(torch.searchsorted(ends, groups.places, right=True), index)
    assert sorted([*groups.places.tolist(), *groups.spare.tolist()]) == list(range(len(groups.rows)))
    tokens = torch.randn(rows, 3)
    there = groups.gather(tokens, Workspace(), "rows")
    assert torch.equal(groups.scatter(there, torch.empty_like(tokens)), tokens)


@needs_onednn
def test_rows_that_fill_a_group_up_add_nothing(small: None) -> None:
    """Not even where the row they repeat is not a number."""
    torch.manual_seed(0)
    x, weight, index = torch.randn(1, 40, 64), torch.randn(3, 64, 64), torch.arange(40)[None] % 2
    x[0, 0] = float("nan")
    assert group_tile(x[0], weight) == products.TILE
    weight.requires_grad_()
    torch_backend.project(x, weight, index).sum().backward()
    assert weight.grad is not None
    assert weight.grad[0].isnan().all() and weight.grad[1].isfinite().all() and not weight.grad[2].any()
    torch.testing.assert_close(weight.grad[1], x[0, 1::2].sum(0)[:, None].expand(64, 64))


@needs_onednn
def test_onednn_gets_few_numbers_of_rows(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It compiles for each, and keeps what it has compiled."""
    seen, onednn = set(), products.onednn

    def watched(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
        seen.add(left.shape)
        return onednn(left, right, bias)

    monkeypatch.setattr(products, "onednn", watched)
    weight, gradient = torch.randn(40, 40), torch.zeros(40, 40)
    for rows in range(1, 1100, 3):
        x = torch.ones(rows, 40)
        multiply(x, weight, torch.empty(rows, 40))
        add_product(gradient, x.T, x)
    assert {n for n, k in seen} <= {*range(32, 1025, 32)}
    assert torch.equal(gradient, torch.full((40, 40), sum(range(1, 1100, 3))))
    assert len(seen) <= 32 + 1100 // 32


@needs_onednn
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_linear_module_and_its_derivatives(has_bias: bool, small: None) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(40, 72, bias=has_bias), torch.randn(2, 35, 40).div_(32).requires_grad_()
    leaves = [x, *module.parameters()]

    def derivatives(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = call(x)
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        return [y, *torch.autograd.grad(call(x).sum(), leaves), *first, *second]

    y = linear(module, x)
    assert y.grad_fn is not None and "LinearProduct" in y.grad_fn.name()
    for ours, plain in zip(derivatives(lambda x: linear(module, x)), derivatives(module), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-4)
    module.weight.requires_grad_(False)
    (dx,) = torch.autograd.grad(linear(module, x).sum(), x)
    torch.testing.assert_close(dx, module.weight.sum(0).expand_as(x))


@needs_onednn
def test_a_module_that_is_more_than_its_product_is_called(small: None) -> None:
    x, seen = torch.randn(3, 8), []

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled, hooked, low = Doubled(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
    hooked.register_forward_hook(lambda *_: seen.append(True))
    assert torch.equal(linear(doubled, x), doubled(x))
    linear(hooked, x)
    assert seen == [True]
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(low, x).dtype == torch.bfloat16
    assert linear(low.double(), x.double()).dtype == torch.float64


@needs_onednn
@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_a_layer_is_as_exact_as_with_the_products_of_torch(num_heads: int, normalization: str, small: None) -> None:
    torch.manual_seed(0)
    attn = DyDiLAttention(256, num_heads, normalization=normalization)
    exact = DyDiLAttention(256, num_heads, normalization=normalization).double()
    exact.load_state_dict(attn.state_dict())
    x, grad = torch.randn(2, 144, 256), torch.randn(2, 144, 256)

    def gradients(layer: DyDiLAttention, onednn: bool) -> list[Tensor]:
        given = x.to(layer.qkv.weight.dtype).requires_grad_()
        with torch.backends.mkldnn.flags(enabled=onednn):
            y = layer(given)
            wanted = [given, *(p for name, p in layer.named_parameters() if name.endswith("weight"))]
            return [y, *torch.autograd.grad(y, wanted, grad.to(y.dtype))]

    ours, plain = gradients(attn, True), gradients(attn, False)
    assert any(not torch.equal(a, b) for a, b in zip(ours, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients(attn, True), strict=True))
    for a, b, right in zip(ours, plain, gradients(exact, False), strict=True):
        assert (a - right).norm() <= 2 * (b - right).norm()
