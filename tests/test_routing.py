"""Routing statistics and the balance loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dydila_kernels import DyDiLAttention, Routing, reference
from dydila_kernels.testing import call_layer, equations, layer_inputs, relative_error, with_distinct_factors

NAMES = [
    *("projection_q", "projection_k"),
    *("measure_q", "measure_k", "measure_q_redundant", "measure_k_redundant"),
    *("differential_q", "differential_k"),
]


def layer_of(**configuration: Any) -> DyDiLAttention:
    configuration = {"num_kernel_factors": 4, "num_differential_factors": 5, **configuration}
    return with_distinct_factors(DyDiLAttention(8, **configuration, dtype=torch.float64))


@pytest.mark.parametrize(
    ("configuration", "names"),
    [
        ({}, NAMES),
        ({"differential": "map"}, NAMES[:7]),
        ({"differential": "off"}, NAMES[:4]),
        ({"differential": "off", "num_projectors": 0}, NAMES[2:4]),
    ],
    ids=str,
)
def test_names_shapes_and_usage(configuration: dict[str, Any], names: list[str]) -> None:
    attn = layer_of(**configuration)
    routing = attn.routing(torch.randn(3, 16, 8, dtype=torch.float64))
    assert isinstance(routing, Routing)
    assert set(routing.indices) == set(routing.usage) == set(names)
    for name in names:
        index, usage = routing.indices[name], routing.usage[name]
        choices = {"p": 3, "m": 4, "d": 5}[name[0]]
        assert index.shape == (3, 16) and index.dtype == torch.int64 and not index.requires_grad
        assert usage.shape == (choices,) and usage.dtype == torch.float32
        assert torch.equal(usage, index.flatten().bincount(minlength=choices).float() / 48)
        assert usage.sum().item() == pytest.approx(1)
        assert name in str(routing)


@pytest.mark.parametrize("elements", [2**19, 40])
@pytest.mark.parametrize("differential", ["token", "map", "off"])
def test_indices_are_those_of_the_forward_pass(
    differential: str, elements: int, block_of: Callable[[int], None]
) -> None:
    """Imposed on the equations they give the output; any one of them changed does not."""
    block_of(elements)
    attn = layer_of(differential=differential, num_heads=2)
    x = torch.randn(3, 16, 8, dtype=torch.float64)
    indices = attn.routing(x).indices
    inputs = layer_inputs(attn, x)
    found = call_layer(attn, inputs)
    assert relative_error(found, equations(attn, inputs, indices=indices)) < 1e-12
    for name in indices:
        choices = {"p": 3, "m": 4, "d": 5}[name[0]]
        changed = {**indices, name: (indices[name] + 1) % choices}
        assert relative_error(found, equations(attn, inputs, indices=changed)) > 1e-6, name


def test_usage_counts_unmasked_tokens_alone() -> None:
    attn = layer_of()
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    mask = torch.arange(16)[None].expand(2, 16) < torch.tensor([[5], [16]])
    masked, plain = attn.routing(x, mask), attn.routing(x)
    for name, usage in masked.usage.items():
        assert torch.equal(masked.indices[name][mask], plain.indices[name][mask])
        counts = plain.indices[name][mask].bincount(minlength=len(usage))
        assert torch.equal(usage, counts.float() / 21)


def test_no_tokens_no_usage() -> None:
    for usage in layer_of().routing(torch.zeros(2, 0, 8, dtype=torch.float64)).usage.values():
        assert not usage.any()


def test_balance_loss_of_no_tokens_is_zero() -> None:
    """Where all are masked, too: a NaN would end the training."""
    attn = layer_of(router_gradient="straight_through")
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    for loss in (attn.balance_loss(x, torch.zeros(2, 16, dtype=torch.bool)), attn.balance_loss(x[:0])):
        assert loss.item() == 0


def test_routing_needs_no_grid_and_leaves_no_graph() -> None:
    attn = layer_of(router_gradient="straight_through")
    routing = attn.routing(torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True))
    assert not any(usage.requires_grad for usage in routing.usage.values())


def test_balance_loss_is_one_at_even_usage() -> None:
    attn = layer_of(router_gradient="straight_through")
    with torch.no_grad():
        for name, parameter in attn.named_parameters():
            if "router" in name:
                parameter.zero_()
    assert attn.balance_loss(torch.randn(2, 16, 8, dtype=torch.float64)).item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_is_its_formula(masked: bool) -> None:
    attn = layer_of(router_gradient="straight_through", differential="off", num_projectors=0)
    x = torch.randn(2, 16, 8, dtype=torch.float64)
    mask = torch.rand(2, 16) < 0.6 if masked else None
    seen = torch.ones(2, 16, dtype=torch.bool) if mask is None else mask
    losses = []
    for tokens, router in zip(attn.qkv(x).chunk(3, -1), attn.measure()[1], strict=False):
        usage = reference.route(tokens, router)[seen].bincount(minlength=4) / seen.sum()
        losses.append(4 * (usage * (tokens @ router).softmax(-1)[seen].mean(0)).sum())
    assert attn.balance_loss(x, mask).item() == pytest.approx(sum(losses).item() / 2, rel=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_trains_every_router(masked: bool) -> None:
    attn = layer_of(router_gradient="straight_through")
    x = torch.randn(4, 16, 8, dtype=torch.float64)
    mask = torch.rand(4, 16) < 0.6 if masked else None
    if mask is not None:
        x[~mask] = float("nan")
    loss = attn.balance_loss(x, mask)
    assert loss.shape == () and 0 < loss.item() < 5
    loss.backward()
    for name, parameter in attn.named_parameters():
        if "router" in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_balance_loss_evens_the_usage() -> None:
    attn = layer_of(router_gradient="straight_through", num_projectors=4)
    x = torch.randn(8, 64, 8, dtype=torch.float64) + 1
    assert attn.projection_q is not None
    optimizer = torch.optim.Adam([p for n, p in attn.named_parameters() if "router" in n], lr=0.02)

    def most() -> float:
        return max(attn.routing(x).usage["projection_q"].tolist())

    before = most()
    for _ in range(60):
        optimizer.zero_grad()
        attn.balance_loss(x).backward()
        optimizer.step()
    assert most() < before and most() < 0.45


def test_balance_loss_under_autocast_and_of_fixed_routers() -> None:
    attn = DyDiLAttention(8, router_gradient="straight_through")
    with torch.autocast("cpu", torch.bfloat16):
        assert attn.balance_loss(torch.randn(2, 16, 8)).dtype == torch.float32
    with pytest.raises(RuntimeError, match="balance_loss needs router_gradient='straight_through'; got 'none'"):
        DyDiLAttention(8).balance_loss(torch.randn(2, 16, 8))
