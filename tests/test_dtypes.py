"""Policies of mixed precision: autocast, tables in float32, master weights, FSDP2, and torch's default dtype.

A layer that is all in one dtype: ``test_precision.py``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.func import functional_call

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import (
    Tensors,
    assert_within_twice_plain,
    call_layer,
    cast,
    equations,
    layer_inputs,
    output_and_gradients,
    with_distinct_factors,
)
from tests.markdown import ROOT, named_block

SEEDS = range(16)
LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def layer_of(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[DyDiLAttention, Tensor]:
    torch.manual_seed(seed)
    attn = with_distinct_factors(DyDiLAttention(16, 2, router_gradient="straight_through", dtype=dtype))
    return attn, torch.randn(2, 36, 16, dtype=dtype)


def gradients(attn: DyDiLAttention) -> Tensors:
    return {name: p.grad for name, p in attn.named_parameters() if p.grad is not None}


@LOW
def test_autocast_keeps_the_2x_rule(dtype: torch.dtype) -> None:
    """Against the equations under the same autocast; oracle and inputs in full precision."""

    def under_autocast(function: Callable[[Tensors], Tensor]) -> Callable[[Tensors], Tensor]:
        def call(inputs: Tensors) -> Tensor:
            with torch.autocast("cpu", dtype):
                return function(inputs)

        return call

    found, plain, truth = [], [], []
    for seed in SEEDS:
        attn, x = layer_of(seed)
        inputs = layer_inputs(attn, x)
        with torch.autocast("cpu", dtype):
            at = attn.routing(x).indices
        found.append(output_and_gradients(under_autocast(lambda t, attn=attn: call_layer(attn, t)), inputs))
        written = lambda t, attn=attn, at=at: equations(attn, t, indices=at)  # noqa: E731
        plain.append(output_and_gradients(under_autocast(written), inputs))
        truth.append(output_and_gradients(written, cast(inputs, torch.float64)))
    assert found[0]["output"].dtype == dtype
    assert {name: t.dtype for name, t in found[0].items() if name != "output"} == {
        name: torch.float32 for name in found[0] if name != "output"
    }
    assert_within_twice_plain(found, plain, truth)


@LOW
def test_tables_in_float32_keep_the_2x_rule(dtype: torch.dtype) -> None:
    """gamma, lambda and their routers are not rounded, and their gradients are in float32."""
    found, plain, truth = [], [], []
    for seed in SEEDS:
        attn, x = layer_of(seed)
        attn.to(dtype)
        attn.measure.float()
        assert attn.differential is not None
        attn.differential.float()
        with_distinct_factors(attn)  # to values that the lower dtype does not have
        inputs = layer_inputs(attn, x.to(dtype))
        at = attn.routing(inputs["x"]).indices
        found.append(output_and_gradients(lambda t, attn=attn: call_layer(attn, t), inputs))
        for precision, kept in ((dtype, plain), (torch.float64, truth)):
            written = lambda t, attn=attn, at=at: equations(attn, t, indices=at)  # noqa: E731
            kept.append(output_and_gradients(written, cast(inputs, precision)))
    assert found[0]["measure.gamma"].dtype == found[0]["differential.router_q"].dtype == torch.float32
    assert found[0]["output"].dtype == found[0]["qkv.weight"].dtype == dtype
    assert_within_twice_plain(found, plain, truth)


def trained_in_bfloat16() -> tuple[Tensor, Tensors]:
    """Output and gradients of a layer that is bfloat16 throughout."""
    attn, x = layer_of()
    out = attn.bfloat16()(x.bfloat16())
    out.float().square().mean().backward()
    return out, {name: g.float() for name, g in gradients(attn).items()}


def test_master_weights_compute_what_a_low_copy_does() -> None:
    """float32 parameters, rounded for each call: the bits of the layer in bfloat16, and gradients in float32."""
    attn, x = layer_of()
    rounded = {name: p.bfloat16() for name, p in attn.named_parameters()}
    out = functional_call(attn, rounded, (x.bfloat16(),))
    out.float().square().mean().backward()
    expected, wanted = trained_in_bfloat16()
    assert torch.equal(out, expected)
    found = gradients(attn)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], g) for name, g in wanted.items())


@pytest.fixture
def group() -> Iterator[None]:
    """Of this process alone: what more of them do is in ``test_distributed.py`` and ``dydi_lit/test_parallel.py``."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_the_policy_of_fsdp2() -> None:
    """The block of the guide: as above; routing() and balance_loss() once FSDP2 knows of them."""
    attn, x = layer_of()
    whole = copy.deepcopy(attn)
    exec(named_block(ROOT / "docs" / "guides" / "recipes.md", "fsdp2-precision"), {"torch": torch, "attn": attn})
    register_fsdp_forward_method(attn, "balance_loss")
    out = attn(x)
    out.float().square().mean().backward()
    expected, wanted = trained_in_bfloat16()
    assert torch.equal(out, expected)
    found = gradients(attn)
    assert found.keys() == wanted.keys()
    for name, g in wanted.items():
        assert found[name].dtype == torch.float32 and torch.equal(found[name].full_tensor(), g), name

    low = whole.bfloat16()
    routing = attn.routing(x).indices
    assert all(torch.equal(index, routing[name]) for name, index in low.routing(x.bfloat16()).indices.items())
    attn.zero_grad()
    loss = attn.balance_loss(x)
    assert torch.equal(loss, low.balance_loss(x.bfloat16()))
    loss.backward()
    router = gradients(attn)["measure.router_q"]
    assert router.dtype == torch.float32 and router.full_tensor().any()


@pytest.fixture
def default_dtype() -> Iterator[Callable[[torch.dtype], None]]:
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_default_dtype_decides_of_new_parameters_alone(
    default: torch.dtype, dtype: torch.dtype, default_dtype: Callable[[torch.dtype], None]
) -> None:
    attn, x = layer_of(dtype=dtype)
    results = []
    for set_to in (torch.float32, default):
        default_dtype(set_to)
        for under_grad in (True, False):
            with torch.set_grad_enabled(under_grad):
                results.append([attn(x), *attn.routing(x).usage.values()])
        attn.zero_grad()
        results[-2][0].square().mean().backward()
        results[-1] += gradients(attn).values()
    assert {p.dtype for p in DyDiLAttention(8).parameters()} == {default}
    for found, expected in zip(results[2:], results[:2], strict=True):
        assert all(f.dtype == e.dtype and torch.equal(f, e) for f, e in zip(found, expected, strict=True))
