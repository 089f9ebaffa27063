"""What a mask promises: hidden tokens change nothing, get zeros, and get zero gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import DyDiLAttention, dydila_attention, reference
from dydila_kernels.testing import core_inputs, output_and_gradients, relative_error, with_distinct_factors

MASK = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0], [0] * 9]).bool()
GARBAGE = [float("nan"), float("inf"), -float("inf"), 1e30]

every_kind = pytest.mark.parametrize(
    "options",
    [
        {"normalization": normalization, "differential": differential, "router_gradient": router_gradient}
        for normalization in ("length", "none", "denominator")
        for differential in ("token", "map", "off")
        for router_gradient in ("none", "straight_through")
    ],
    ids=lambda options: "-".join(options.values()),
)
blocks = pytest.mark.parametrize("elements", [2**19, 24])


def garbled(t: Tensor) -> Tensor:
    """With every kind of garbage in the hidden tokens."""
    garbage = torch.tensor(GARBAGE, dtype=t.dtype).repeat(t.numel())[: t.numel()].view_as(t)
    return torch.where(MASK[..., None], t, garbage)


@blocks
@every_kind
def test_core_never_looks_at_hidden_tokens(
    options: dict[str, str], elements: int, block_of: Callable[[int], None]
) -> None:
    block_of(elements)
    clean = core_inputs(3, 9, 8, differential=options["differential"])
    dirty = {name: garbled(t) if t.shape[:2] == MASK.shape else t for name, t in clean.items()}
    found, expected = (
        output_and_gradients(lambda t: dydila_attention(**t, mask=MASK, num_heads=2, **options), inputs)
        for inputs in (dirty, clean)
    )
    for name, t in found.items():
        assert torch.equal(t, expected[name]), name
        if t.shape[:2] == MASK.shape:
            assert not t[~MASK].any(), name


@blocks
@every_kind
def test_layer_never_looks_at_hidden_tokens(
    options: dict[str, str], elements: int, block_of: Callable[[int], None]
) -> None:
    block_of(elements)
    attn = DyDiLAttention(8, 2, **options, dtype=torch.float64)
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    with_distinct_factors(attn)
    results = []
    for tokens in (garbled(x), x):
        leaf = tokens.requires_grad_()
        out = attn(leaf, MASK)
        parameters = [p for p in attn.parameters() if p.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *parameters])])
        assert not out[~MASK].any() and not results[-1][1][~MASK].any()
    assert all(torch.equal(found, expected) for found, expected in zip(*results, strict=True))


@every_kind
def test_masked_is_the_shorter_image(options: dict[str, str]) -> None:
    attn = DyDiLAttention(8, 2, dwc_branches=(), **options, dtype=torch.float64)
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    out = attn(x, MASK)
    for b in range(2):
        assert relative_error(out[b, MASK[b]], attn(x[b : b + 1, MASK[b]])[0]) < 1e-13


def test_convolution_takes_hidden_tokens_as_zeros() -> None:
    """Through the convolution alone a hidden token would reach its neighbours as a bias of qkv."""
    attn = DyDiLAttention(8, qkv_bias=True, dtype=torch.float64)
    plain = DyDiLAttention(8, qkv_bias=True, dwc_branches=(), proj_bias=False, dtype=torch.float64)
    plain.load_state_dict({name: t for name, t in attn.state_dict().items() if name in plain.state_dict()})
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    values = attn.qkv(x)[..., 16:].masked_fill(~MASK[..., None], 0)
    assert attn.dwc is not None
    convolved = reference.depthwise(values, *attn.dwc.fused_weight(), (3, 3))
    expected = plain(x, MASK) + attn.proj(convolved)
    assert relative_error(attn(x, MASK)[MASK], expected[MASK]) < 1e-13


def test_full_mask_is_no_mask() -> None:
    attn = DyDiLAttention(8, 2, dtype=torch.float64)
    x = torch.randn(3, 9, 8, dtype=torch.float64)
    assert relative_error(attn(x, torch.ones(3, 9, dtype=torch.bool)), attn(x)) < 1e-14


def test_attn_mask_is_another_name() -> None:
    attn = DyDiLAttention(8, 2)
    x = torch.randn(3, 9, 8)
    assert torch.equal(attn(x, attn_mask=MASK), attn(x, MASK))


@pytest.mark.parametrize("arguments", [{"num_prefix_tokens": 2}, {"num_prefix_tokens": 9}], ids=str)
def test_prefix_tokens_can_be_hidden(arguments: dict[str, Any]) -> None:
    attn = DyDiLAttention(8, **arguments, dtype=torch.float64)
    prefix = attn.num_prefix_tokens
    x = torch.randn(1, prefix + 4, 8, dtype=torch.float64)
    mask = torch.arange(prefix + 4)[None] >= prefix
    plain = DyDiLAttention(8, dtype=torch.float64)
    plain.load_state_dict(attn.state_dict())
    assert relative_error(attn(x, mask)[:, prefix:], plain(x[:, prefix:])) < 1e-14


def test_non_contiguous_mask() -> None:
    attn = DyDiLAttention(8)
    x = torch.randn(3, 9, 8)
    transposed = MASK.t().contiguous().t()
    expanded = MASK[:1].expand(3, 9)
    assert torch.equal(attn(x, transposed), attn(x, MASK))
    assert torch.equal(attn(x, expanded), attn(x, expanded.clone()))
