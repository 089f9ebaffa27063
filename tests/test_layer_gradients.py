"""The layer as a whole, block by block: the same as module by module, in values, gradients, and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import away_from_kinks, relative_error, with_distinct_factors
from dydila_kernels.torch_backend import blocks
from dydila_kernels.torch_backend.layer_gradients import Call, LayerTensors
from dydila_kernels.torch_backend.layer_operators import flat
from tests.test_inference import arguments_of_grid, calls

Tensors = dict[str, Tensor]


def is_whole(attn: DyDiLAttention, x: Tensor, arguments: dict[str, Any]) -> bool:
    return attn._plain_weights(attn._checked(x, None, **arguments_of_grid(arguments))) is not None


def gradients(attn: DyDiLAttention, x: Tensor, arguments: dict[str, Any], **options: bool) -> Tensors:
    """The output, and the gradients of x and of the parameters that have one."""
    leaves = {"x": x.clone().requires_grad_(x.requires_grad)}
    leaves |= {name: p for name, p in attn.named_parameters()}
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    y = attn(leaves.get("x", x), **arguments)
    weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
    found = torch.autograd.grad((y * weights).sum(), list(leaves.values()), allow_unused=True, **options)
    return {"output": y.detach()} | {name: g for name, g in zip(leaves, found, strict=True) if g is not None}


def module_by_module(attn: DyDiLAttention, x: Tensor, arguments: dict[str, Any]) -> Tensors:
    hook = attn.qkv.register_forward_hook(lambda *_: None)
    try:
        assert not is_whole(attn, x, arguments)
        return gradients(attn, x, arguments)
    finally:
        hook.remove()


def assert_close(found: Tensors, expected: Tensors) -> None:
    # A layer that is one function has gradients of zero for weights that no output depends on, and autograd none.
    assert {name for name, t in found.items() if t.any()} <= expected.keys() <= found.keys()
    for name, t in expected.items():
        torch.testing.assert_close(found[name], t, rtol=1e-8, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


@settings(max_examples=120)
@given(
    calls(),
    st.sampled_from([64, 300, 1000, 2**20]),
    st.sets(st.sampled_from(["qkv", "projection_q", "projection_k", "measure", "differential", "dwc", "proj", "x"])),
)
def test_the_same_as_module_by_module(
    call: tuple[DyDiLAttention, Tensor, dict[str, Any]], elements: int, frozen: set[str]
) -> None:
    """In blocks of any size, and whatever has no gradient."""
    attn, x, arguments = call
    with_distinct_factors(attn)
    for name, p in attn.named_parameters():
        p.requires_grad_(p.requires_grad and name.split(".")[0] not in frozen)
    x.requires_grad_("x" not in frozen)
    if not x.requires_grad and not any(p.requires_grad for p in attn.parameters()):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK", elements)
        assert is_whole(attn, x, arguments)
        found, again = gradients(attn, x, arguments), gradients(attn, x, arguments)
        assert all(torch.equal(found[name], again[name]) for name in found)
        assert_close(found, module_by_module(attn, x, arguments))


CONFIGURATIONS: list[dict[str, Any]] = [
    {"num_heads": 2},
    {"num_heads": 2, "normalization": "denominator"},
    {"differential": "map", "qkv_bias": True},
    {"differential": "off"},
    {"differential": "off", "num_projectors": 0, "dwc_branches": (), "proj_bias": False},
]


def differentiable(configuration: dict[str, Any]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A small layer as a function of its tokens and parameters, and these."""
    attn = with_distinct_factors(DyDiLAttention(4, **configuration, dtype=torch.float64))
    parameters = {name: p for name, p in attn.named_parameters() if p.requires_grad}
    x = away_from_kinks({"x": torch.randn(1, 4, 4, dtype=torch.float64)})["x"].requires_grad_()

    def function(x: Tensor, *tensors: Tensor) -> Tensor:
        return functional_call(attn, dict(zip(parameters, tensors, strict=True)), (x,))

    return function, [x, *parameters.values()]


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)
def test_gradcheck(configuration: dict[str, Any], block_of: Callable[[int], None]) -> None:
    block_of(8)
    function, leaves = differentiable(configuration)
    assert gradcheck(function, leaves)


@pytest.mark.slow
@pytest.mark.parametrize("configuration", CONFIGURATIONS[:2], ids=str)
def test_second_derivatives(configuration: dict[str, Any]) -> None:
    function, leaves = differentiable(configuration)
    assert gradgradcheck(function, leaves)


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    attn, x = DyDiLAttention(16, 2), torch.randn(2, 16, 16, requires_grad=True)
    y = attn(x).sum()
    first, second = (torch.autograd.grad(y, [x, attn.qkv.weight], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_a_backward_pass_under_autocast_has_the_dtype_of_its_forward_pass() -> None:
    attn, x = DyDiLAttention(16, 2), torch.randn(2, 16, 16, requires_grad=True)
    y = attn(x).sum()
    expected = torch.autograd.grad(y, [x, attn.qkv.weight], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, [x, attn.qkv.weight])
    assert all(map(torch.equal, found, expected))


def test_every_product_is_counted() -> None:
    """By FlopCounterMode: a backward pass multiplies twice as much as a forward pass, the routers left out."""
    attn, x = DyDiLAttention(16, 2, dwc_branches=()), torch.randn(2, 64, 16, requires_grad=True)
    with FlopCounterMode(display=False) as inference, torch.no_grad():
        attn(x)
    with FlopCounterMode(display=False) as training:
        attn(x).sum().backward()
    routers = 2 * x.numel() * (2 * 3 + 4 * 9 + 2 * 2 * 9)
    forward, both = inference.get_total_flops(), training.get_total_flops()
    assert both - forward == 2 * (forward - routers)


def test_recomputation_changes_nothing() -> None:
    attn, x = DyDiLAttention(16, 2), torch.randn(2, 16, 16, requires_grad=True)
    expected = gradients(attn, x, {})
    y = checkpoint(attn, x, use_reentrant=False)
    weights = torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()
    assert torch.equal(torch.autograd.grad((y * weights).sum(), x)[0], expected["x"])


def test_what_has_no_gradients_here_goes_module_by_module() -> None:
    x = torch.randn(1, 16, 16)
    for configuration in ({"qk_norm": "rms"}, {"router_gradient": "straight_through"}):
        attn = DyDiLAttention(16, **configuration)  # type: ignore[arg-type]
        assert not is_whole(attn, x, {})
        with torch.no_grad():
            assert is_whole(attn, x, {})
    attn = DyDiLAttention(16)
    assert is_whole(attn, x, {}) and not is_whole(attn.bfloat16(), x.bfloat16(), {})


# Compiled -------------------------------------------------------------------------------------------------------------

compiled = pytest.mark.usefixtures("fresh_compiler")


def arguments_of(kind: str, x: Tensor) -> dict[str, Any]:
    every: dict[str, dict[str, Any]] = {
        "plain": {},
        "mask": {"mask": torch.arange(x.shape[1]).expand(x.shape[:2]) % 3 != 1},
        "packed": {"HW": [(1, 2), (7, 2)], "cu_seqlens": [0, 2, 16]},
        "rotary": {"rotary": torch.polar(torch.ones(16, 4), torch.randn(16, 4))},
    }
    return every[kind]


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("normalization", ["length", "denominator"])
@pytest.mark.parametrize("kind", ["plain", "mask", "packed"])
def test_a_compiled_layer_is_one_operator_and_equal_to_the_bit(kind: str, normalization: str) -> None:
    attn = with_distinct_factors(DyDiLAttention(16, 2, normalization=normalization))
    x = torch.randn(1 if kind == "packed" else 2, 16, 16, requires_grad=True)
    arguments, seen = arguments_of(kind, x), []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append({str(node.target) for node in graph.graph.nodes})
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    layer = torch.compile(attn, fullgraph=True, backend=look)
    found, expected = gradients(layer, x, arguments), gradients(attn, x, arguments)
    assert any("dydila_kernels.layer" in name for name in seen[0])
    assert found.keys() == {name if name in ("output", "x") else f"_orig_mod.{name}" for name in expected}
    assert all(map(torch.equal, found.values(), expected.values()))
    with torch.no_grad():
        assert torch.equal(layer(x, **arguments), attn(x, **arguments))
    assert any("dydila_kernels.layer_inference" in name for name in seen[1])


@compiled
@pytest.mark.slow
def test_what_a_compiled_layer_takes_the_equations_for() -> None:
    """Norms, which are no tensors of the operators, and routers that are trained."""
    x = torch.randn(2, 16, 16)
    for configuration in ({"qk_norm": "rms"}, {"router_gradient": "straight_through"}):
        attn = with_distinct_factors(DyDiLAttention(16, 2, **configuration))  # type: ignore[arg-type]
        layer = torch.compile(attn, fullgraph=True, backend="aot_eager")
        assert relative_error(layer(x), attn(x)) < 1e-5
        with torch.no_grad():
            assert relative_error(layer(x), attn(x)) < 1e-5


@compiled
@pytest.mark.slow
def test_a_new_size_compiles_once_in_training() -> None:
    """Images with states and images without, each of any number and size."""
    attn = DyDiLAttention(16, 1, dtype=torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    layer = torch.compile(attn, fullgraph=True, backend=counter)
    counts = []
    for batch, side in ((2, 4), (3, 5), (4, 2), (4, 6), (6, 9), (2, 3)):
        x = torch.randn(batch, side * side, 16, dtype=torch.float64, requires_grad=True)
        found, expected = gradients(layer, x, {}), gradients(attn, x, {})
        assert all(map(torch.equal, found.values(), expected.values()))
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 2, counts


@pytest.mark.parametrize("kind", ["plain", "mask", "packed", "rotary"])
@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_operators(kind: str, normalization: str) -> None:
    attn = with_distinct_factors(DyDiLAttention(16, 2, qkv_bias=True, normalization=normalization))
    x = torch.randn(1 if kind == "packed" else 2, 16, 16)
    arguments = arguments_of(kind, x)
    checked = attn._checked(x, **{"mask": None, **arguments})
    weights = attn._plain_weights(checked)
    assert weights is not None
    call = Call(attn._options(checked), checked.mask, checked.cu_seqlens, checked.grids)
    given = LayerTensors.of(checked.x, weights)
    detached = [None if t is None else t.detach().clone() for t in given]
    ops = torch.ops.dydila_kernels
    opcheck(ops.layer_inference, (*detached, *flat(call)))
    y, *saved = ops.layer(*detached, *flat(call))
    assert relative_error(checked.visible(y), attn(x, **arguments).detach()) < 1e-6
    tests = ("test_schema", "test_faketensor")
    opcheck(ops.layer, (*detached, *flat(call)), test_utils=tests)
    if kind != "rotary":  # what a compiled layer takes its gradients of
        needed = [t is not None and t.requires_grad for t in given]
        opcheck(ops.layer_backward, (torch.randn_like(y), saved, needed, *detached, *flat(call)), test_utils=tests)
        leaves = [t if t is None or not need else t.requires_grad_() for t, need in zip(detached, needed, strict=True)]
        opcheck(ops.layer, (*leaves, *flat(call)))
