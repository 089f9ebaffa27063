"""What must hold for every option of the layer: it is its equations, in each mode, dtype and transform of torch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck
from torch.func import functional_call, jvp, vmap

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import (
    Tensors,
    assert_agree,
    assert_within_twice_plain,
    call_layer,
    cast,
    equations,
    layer_inputs,
    output_and_gradients,
    relative_error,
    with_distinct_factors,
)


def spread(attn: DyDiLAttention) -> DyDiLAttention:
    """The layer, its factors and the weights of its norms all different."""
    with torch.no_grad():
        for norm in (attn.q_norm, attn.k_norm):
            for parameter in () if norm is None else norm.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return with_distinct_factors(attn)


def assert_is_its_equations(attn: DyDiLAttention, x: Tensor, **arguments: Any) -> None:
    """Output and all gradients, the output without gradients and after ``fuse()``; repeats are equal to the bit."""
    inputs = layer_inputs(attn, x)
    found = output_and_gradients(lambda t: call_layer(attn, t, **arguments), inputs)
    again = output_and_gradients(lambda t: call_layer(attn, t, **arguments), inputs)
    assert all(torch.equal(t, again[name]) for name, t in found.items())
    assert_agree(found, output_and_gradients(lambda t: equations(attn, t, **arguments), inputs), 1e-11)
    fused = copy.deepcopy(attn).fuse()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert_agree({"y": attn(x, **arguments)}, {"y": found["output"]}, 1e-11)
            assert_agree({"y": fused(x, **arguments)}, {"y": found["output"]}, 1e-11)
            assert torch.equal(attn(x, **arguments), attn(x, **arguments))


def assert_packed_is_one_by_one(
    attn: DyDiLAttention, x: Tensor, grids: Sequence[tuple[int, ...]], bounds: Sequence[int]
) -> None:
    """Output and all gradients of images packed in one row x (1, N, d), and the output without gradients."""
    inputs = layer_inputs(attn, x)

    def one_by_one(t: Tensors) -> Tensor:
        cuts = zip(bounds[:-1], bounds[1:], grids, strict=True)
        return torch.cat([call_layer(attn, {**t, "x": t["x"][:, a:b]}, HW=grid) for a, b, grid in cuts], 1)

    packed = output_and_gradients(lambda t: call_layer(attn, t, HW=grids, cu_seqlens=bounds), inputs)
    assert_agree(packed, output_and_gradients(one_by_one, inputs))
    with torch.no_grad():
        assert relative_error(attn(x, HW=grids, cu_seqlens=bounds), packed["output"]) < 1e-12


def assert_keeps_the_2x_rule(
    dtype: torch.dtype, shape: tuple[int, int, int], configuration: dict[str, Any], seeds: Iterable[int] = range(24),
    arguments: Callable[[], dict[str, Any]] = dict,
) -> None:  # fmt: skip
    """Output and all gradients; ``arguments`` makes those of a call anew for each seed."""
    runs = []
    for seed in seeds:
        torch.manual_seed(seed)
        attn = spread(DyDiLAttention(shape[-1], dtype=dtype, **configuration))
        given, inputs = arguments(), layer_inputs(attn, torch.randn(shape).to(dtype))
        at = attn.routing(inputs["x"], given.get("mask")).indices

        def plain(t: Tensors, attn: Any = attn, given: Any = given, at: Any = at) -> Tensor:
            return equations(attn, t, indices=at, **given)

        def ours(t: Tensors, attn: Any = attn, given: Any = given) -> Tensor:
            return call_layer(attn, t, **given)

        runs.append(
            (
                output_and_gradients(ours, inputs),
                output_and_gradients(plain, inputs),
                output_and_gradients(plain, cast(inputs, torch.float64)),
            )
        )
    assert_within_twice_plain(*zip(*runs, strict=True))


def assert_gradcheck(attn: DyDiLAttention, x: Tensor, names: Iterable[str], **arguments: Any) -> None:
    """Finite differences of the output with respect to x and the parameters ``names``."""
    names = list(names)
    state = {name: p.detach() for name, p in attn.named_parameters()}
    leaves = [x.clone().requires_grad_(), *(state[name].clone().requires_grad_() for name in names)]

    def call(x: Tensor, *tensors: Tensor) -> Tensor:
        return functional_call(attn, {**state, **dict(zip(names, tensors, strict=True))}, (x,), arguments)

    assert gradcheck(call, leaves)


def assert_transforms(attn: DyDiLAttention, x: Tensor, **arguments: Any) -> None:
    """Forward-mode derivatives, a map over a batch, and second derivatives, in float64."""
    inputs = layer_inputs(attn, x)
    wanted = ["x", *(name for name, p in attn.named_parameters() if p.requires_grad)]
    tangents = {name: torch.randn_like(inputs[name]) for name in wanted}
    primals = {name: inputs[name] for name in wanted}
    out, tangent = jvp(lambda t: call_layer(attn, {**inputs, **t}, **arguments), (primals,), (tangents,))
    assert relative_error(out, attn(x, **arguments)) < 1e-12
    u = torch.randn_like(out)
    leaves = {name: inputs[name].clone().requires_grad_() for name in wanted}
    gradients = torch.autograd.grad(call_layer(attn, {**inputs, **leaves}, **arguments), list(leaves.values()), u)
    expected = sum((g * tangents[name]).sum() for name, g in zip(wanted, gradients, strict=True))
    assert isinstance(expected, Tensor) and relative_error((u * tangent).sum(), expected) < 1e-10

    stacked = torch.stack([x, x.flip(1)])
    mapped = vmap(lambda t: attn(t, **arguments))(stacked)
    assert relative_error(mapped, torch.stack([attn(t, **arguments) for t in stacked])) < 1e-12

    results = []
    for call in (call_layer, equations):
        leaves = {name: inputs[name].clone().requires_grad_() for name in wanted}
        y = call(attn, {**inputs, **leaves}, **arguments)
        (first,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
        second = torch.autograd.grad(first.square().sum(), list(leaves.values()), materialize_grads=True)
        results.append(dict(zip(["first", *wanted], [first.detach(), *second], strict=True)))
    assert_agree(*results, tolerance=1e-10)


def compilations(attn: DyDiLAttention, calls: Iterable[tuple[Tensor, dict[str, Any]]]) -> list[int]:
    """How many graphs there are after each call, with gradients, of the layer compiled as one graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled, counts = torch.compile(attn, fullgraph=True, backend=counter), []
    for x, arguments in calls:
        results = []
        for call in (compiled, attn):
            leaf = x.clone().requires_grad_()
            out = call(leaf, **arguments)
            results.append({"y": out.detach(), "dx": torch.autograd.grad(out.square().sum(), leaf)[0]})
        assert_agree(*results, tolerance=1e-10)
        counts.append(counter.frame_count)
    torch._dynamo.reset()
    return counts
