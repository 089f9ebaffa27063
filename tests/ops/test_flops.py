"""The formulas of the operators for FlopCounterMode, against what the interpreter and torch see multiplied."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dydila_kernels import DyDiLAttention, reference
from dydila_kernels.ops import autograd, flops
from dydila_kernels.types import Grid
from tests.interpreter import INTERPRETED
from tests.ops.helpers import DEVICE, inputs_of, layer_of, operator_arguments, tokens, use_gemm, use_tiles

NUM_OPTIONS = 16
"""Of every router: what kernels pad to, so that no padding is multiplied."""


def arguments_of(batch: int, length: int, dim: int, *, grids: tuple[Grid, ...] = (), **options: Any) -> tuple[Any, ...]:
    """Those of the operator ``attention``; with ``grids`` a convolution."""
    inputs = inputs_of(
        batch, length, dim, differential=options.get("differential", "token"), num_kernel_factors=NUM_OPTIONS,
        num_differential_factors=NUM_OPTIONS,
    )  # fmt: skip
    convolution = (tokens(dim, 1, 3, 3), None) if grids else None
    given, settings = operator_arguments(inputs, convolution=convolution, grids=grids, **options)
    return (*given, *settings)


def flops_of(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.fixture
def multiplied(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], int]:
    """FLOPs of the products that a call really makes: of the kernels in the interpreter, and of torch."""
    if not INTERPRETED:
        pytest.skip("only the interpreter shows what a kernel multiplies")
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    dot, made = builder.create_dot, [0]

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        made[0] += 2 * prod(a.data.shape) * b.data.shape[1]
        return dot(self, a, b, *rest)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    use_tiles(monkeypatch)

    def count(call: Callable[[], Any]) -> int:
        made[0] = 0
        by_torch = flops_of(call)
        return made[0] + by_torch

    return count


def check(arguments: tuple[Any, ...], multiplied: Callable[[Callable[[], Any]], int]) -> None:
    """Both formulas of the core: beside the operators, which count by them, run the functions that they call."""
    out, *saved = autograd.attention_forward(*arguments)
    operators = torch.ops.dydila_kernels
    expected = multiplied(lambda: autograd.attention_forward(*arguments))
    assert expected > 0 and flops_of(lambda: operators.attention(*arguments)) == expected
    expected = multiplied(lambda: autograd.attention_backward(out, *arguments, *saved))
    assert flops_of(lambda: operators.attention_backward(out, *arguments, *saved)) == expected


@pytest.mark.parametrize("router_gradient", ["none", "straight_through"])
@pytest.mark.parametrize("differential", ["token", "map", "off"])
@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_fused_form(multiplied: Any, differential: str, router_gradient: str, normalization: str) -> None:
    options = {"differential": differential, "router_gradient": router_gradient, "normalization": normalization}
    check(arguments_of(2, 16, 32, num_heads=2, **options), multiplied)


@pytest.mark.parametrize(("length", "dim"), [(16, 32), (32, 16)], ids=["scores", "states"])
@pytest.mark.parametrize("options", [{}, {"differential": "map", "router_gradient": "straight_through"}], ids=str)
def test_wide_heads(
    multiplied: Any, length: int, dim: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use_gemm(monkeypatch)
    check(arguments_of(2, length, dim, **options), multiplied)


@pytest.mark.parametrize("bounds", [[0, 16, 48], [0, 0, 16, 32, 48]], ids=["states", "scores"])
@pytest.mark.parametrize("by_gemm", [False, True], ids=["fused", "wide"])
def test_packed_images(multiplied: Any, bounds: list[int], by_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide heads take each image's own length, and the order that suits the longest."""
    if by_gemm:
        use_gemm(monkeypatch)
    check(arguments_of(1, 48, 32, cu_seqlens=bounds), multiplied)


def test_masked_tokens_count(multiplied: Any) -> None:
    mask = (torch.arange(32).view(2, 16) % 3 != 0).to(DEVICE)
    check(arguments_of(2, 16, 16, mask=mask), multiplied)
    assert flops.attention(*shapes(arguments_of(2, 16, 16, mask=mask))) == flops.attention(
        *shapes(arguments_of(2, 16, 16))
    )


def shapes(arguments: tuple[Any, ...]) -> list[Any]:
    return [t.shape if isinstance(t, Tensor) else t for t in arguments]


def test_convolution() -> None:
    """Beside the prefix token and in packed images: as a product of nine shifted images with nine weights."""
    grids = (Grid(1, 3, 5), Grid(16, 4, 4))
    arguments = arguments_of(1, 32, 16, cu_seqlens=[0, 16, 32], grids=grids)
    out, *saved = autograd.attention_forward(*arguments)
    without = shapes(arguments_of(1, 32, 16, cu_seqlens=[0, 16, 32]))

    expected = [0, 0]
    for grid in grids:
        image = tokens(1, 16, grid.rows, grid.columns).requires_grad_()
        weight = tokens(16, 1, 9).requires_grad_()
        convolved: list[Tensor] = []
        expected[0] += flops_of(
            lambda image=image, weight=weight, convolved=convolved: convolved.append(
                weight @ F.unfold(image, 3, padding=1).view(16, 9, -1)
            )
        )
        expected[1] += flops_of(convolved[0].sum().backward)
    assert flops.attention(*shapes(arguments)) - flops.attention(*without) == expected[0]
    backward = [
        flops.attention_backward(out.shape, *given, *shapes((*saved,))) for given in (shapes(arguments), without)
    ]
    assert backward[0] - backward[1] == expected[1]


def test_routed_projection_is_one_product_for_each_token() -> None:
    x, index = tokens(2, 9, 12), torch.zeros(1, 2, 9, dtype=torch.int8, device=DEVICE)
    ops, one, three = torch.ops.dydila_kernels, tokens(1, 12, 8), tokens(3, 12, 8)
    leaf, weight = x.clone().requires_grad_(), one[0].clone().requires_grad_()
    forward = flops_of(lambda: leaf @ weight)
    plans = [[t[0] for t in ops.plan(index, count)] for count in (1, 3)]
    for projectors, plan in zip((one, three), plans, strict=True):
        assert flops_of(lambda projectors=projectors, plan=plan: ops.projection(x, projectors, *plan)) == forward
    out = leaf @ weight
    assert flops_of(lambda: ops.projection_backward(out.detach(), x, three, *plans[1])) == flops_of(out.sum().backward)
    routers = [tokens(12, 3), tokens(12, 5)]
    assert flops_of(lambda: ops.route(x, routers)) == flops_of(lambda: [x @ router for router in routers])


# Whole calls


def step(attn: DyDiLAttention, x: Tensor) -> None:
    attn(x).sum().backward()


LAYERS: list[dict[str, Any]] = [
    {"num_heads": 2, "num_prefix_tokens": 1},
    {"differential": "map", "normalization": "denominator", "dwc_branches": ("1x3",)},
    {"differential": "off"},
]


@pytest.mark.parametrize("configuration", LAYERS, ids=str)
def test_a_layer_multiplies_what_the_equations_say(configuration: dict[str, Any]) -> None:
    """With one projector the torch backend multiplies nothing in vain."""
    attn = DyDiLAttention(24, num_projectors=1, backend="triton", device="meta", **configuration)
    x = torch.empty(2, 16 + attn.num_prefix_tokens, 24, device="meta")
    found = flops_of(lambda: attn(x))
    attn.backend = "torch"
    assert found == flops_of(lambda: attn(x))


def test_a_training_step_of_wide_heads_is_that_of_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a state, nothing is multiplied twice."""
    use_gemm(monkeypatch)
    attn = DyDiLAttention(12, num_projectors=1, dwc_branches=(), backend="triton", device="meta")
    x = torch.empty(2, 16, 12, device="meta", requires_grad=True)
    found = flops_of(lambda: step(attn, x))
    attn.backend = "torch"
    assert found == flops_of(lambda: step(attn, x))


@pytest.mark.parametrize("configuration", [*LAYERS, {"router_gradient": "straight_through"}], ids=str)
def test_a_training_step_counts_the_same_with_numbers_and_without(configuration: dict[str, Any]) -> None:
    """Where the kernels run, the counter must not see as well the products that torch makes for them."""
    attn = layer_of(24, **configuration)
    x = tokens(2, 9 + attn.num_prefix_tokens, 24).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        step(attn, x)
    assert x.grad is not None and x.grad.any()
    operators = {str(name).removeprefix("dydila_kernels.") for name in counter.get_flop_counts()["Global"]}
    assert operators >= set(flops.FORMULAS)

    empty = DyDiLAttention(24, backend="triton", device="meta", **configuration)
    shape = torch.empty_like(x, device="meta", requires_grad=True)
    assert counter.get_total_flops() == flops_of(lambda: step(empty, shape)) > 2 * flops_of(lambda: empty(shape)) > 0


def test_reference_agrees_with_the_formula_of_the_core() -> None:
    """Forward, with several heads, in float64 and without any operator of ours."""
    inputs = inputs_of(2, 9, 12, torch.float64)
    expected = flops_of(lambda: reference.dydila_attention(**inputs, num_heads=3))
    narrow = {name: t.float() for name, t in inputs.items()}
    given, settings = operator_arguments(narrow, num_heads=3)
    assert flops_of(lambda: torch.ops.dydila_kernels.attention(*given, *settings)) == expected
