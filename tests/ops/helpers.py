"""What the tests of the kernels share: the device, small tiles, the 2x rule for the core and for the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import DyDiLAttention, dydila_attention, reference
from dydila_kernels.functional import validated
from dydila_kernels.ops import backend, configs, core
from dydila_kernels.ops.core import Inputs, Settings
from dydila_kernels.testing import (
    Tensors,
    call_layer,
    cast,
    core_inputs,
    decisions,
    equations,
    error_ratios,
    layer_inputs,
    output_and_gradients,
    with_distinct_factors,
)
from dydila_kernels.types import Convolution, Grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALF]
STAGES = ("tokens", "state", "readout", "gradients", "routed_gradients", "given_gradients", "rotary")
NORMALIZATIONS = ["length", "none", "denominator"]
DIFFERENTIALS = ["token", "map", "off"]
ROUTER_GRADIENTS = ["none", "straight_through"]


def combinations(first: int) -> list[dict[str, str]]:
    """All normalisations and differentials; the router gradients alternate, ``first`` at the beginning."""
    pairs = [(n, d) for n in NORMALIZATIONS for d in DIFFERENTIALS]
    return [
        {"normalization": n, "differential": d, "router_gradient": ROUTER_GRADIENTS[(i + first) % 2]}
        for i, (n, d) in enumerate(pairs)
    ]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(map(str, options.values()))


TALL = (64, 64)
"""Rows and columns of the largest tiles that every kernel compiles with: few programs, where numbers matter little."""


def use_tiles(patch: pytest.MonkeyPatch, rows: int = 16, columns: int = 16) -> None:
    """Tiles of the core's kernels so small that small images span several."""
    for stage, precision in list(configs.TABLE):
        if stage in STAGES:
            entry = configs.Entry(configs.ANY, configs.Config(rows, columns, 4))
            patch.setitem(configs.TABLE, (stage, precision), (entry,))


def use_gemm(patch: pytest.MonkeyPatch) -> None:
    """The form for heads of more than 128 channels, for those of more than 8."""
    patch.setattr(core, "LARGEST_HEAD", 8)


def inputs_of(batch: int, length: int, dim: int, dtype: torch.dtype = torch.float32, **options: Any) -> Tensors:
    return core_inputs(batch, length, dim, dtype=dtype, device=DEVICE, **options)


def operator_arguments(
    inputs: Tensors,
    *,
    convolution: tuple[Tensor, Tensor | None] | None = None,
    grids: Sequence[Grid] = (),
    **options: Any,
) -> tuple[Inputs, Settings]:
    """Those of the operator ``attention``; ``convolution``: weight (d, 1, 3, 3) and bias (d,)."""
    call = validated(**inputs, **options, backend="triton")
    given = None if convolution is None else Convolution(*convolution, grids)
    return backend.operator_arguments(call.inputs, call.options, call.mask, call.cu_seqlens, given)


def attend(inputs: Tensors, **options: Any) -> Tensor:
    return dydila_attention(**inputs, backend="triton", **options)


def results(inputs: Tensors, **options: Any) -> Tensors:
    """The output and all gradients."""
    return output_and_gradients(lambda t: attend(t, **options), inputs)


def oracle(inputs: Tensors, **options: Any) -> Tensors:
    """The same of the reference in float64, with the decisions of the kernels."""
    at = decisions(inputs, backend="triton", **options)
    return output_and_gradients(
        lambda t: reference.dydila_attention(**t, indices=at, **options), cast(inputs, torch.float64)
    )


def assert_core_within_twice_plain(runs: list[Tensors], **options: Any) -> None:
    """For several inputs of one kind."""
    found, plain, truth = [], [], []
    for inputs in runs:
        at = decisions(inputs, backend="triton", **options)
        found.append(results(inputs, **options))
        for dtype, runs_of in ((inputs["q"].dtype, plain), (torch.float64, truth)):
            runs_of.append(
                output_and_gradients(
                    lambda t, at=at: reference.dydila_attention(**t, indices=at, **options), cast(inputs, dtype)
                )
            )
    assert_right(found, plain, truth)


def assert_right(found: list[Tensors], plain: list[Tensors], truth: list[Tensors]) -> None:
    """The 2x rule; of few runs 4x for the gradients of the two tables, whose few numbers may be right by chance."""
    small = [name for name in truth[0] if len(found) < 12 and name.split(".")[-1] in ("gamma", "lam")]
    ratios = error_ratios(found, plain, truth)
    wrong = {name: round(ratio, 2) for name, ratio in ratios.items() if not ratio <= (4 if name in small else 2)}
    assert not wrong, f"error over that of plain PyTorch: {wrong}"


def compare_core(
    dtype: torch.dtype,
    batch: int,
    length: int,
    dim: int,
    *,
    seeds: int = 3,
    gamma: tuple[float, float] = (1.0, 4.0),
    **options: Any,
) -> None:
    """The 2x rule for random tokens of which one has no positive entry."""
    runs = []
    for seed in range(seeds):
        inputs = inputs_of(
            batch, length, dim, dtype, gamma=gamma, seed=seed, differential=options.get("differential", "token"),
            num_kernel_factors=9, num_differential_factors=7,
        )  # fmt: skip
        for name, row in (("q", length // 2), ("k", length // 3)):
            if length > 2:
                inputs[name][:, row] = -inputs[name][:, row].abs()
        runs.append(inputs)
    assert_core_within_twice_plain(runs, **options)


def layer_of(dim: int, *, dtype: torch.dtype = torch.float32, **configuration: Any) -> DyDiLAttention:
    return with_distinct_factors(DyDiLAttention(dim, backend="triton", device=DEVICE, dtype=dtype, **configuration))


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def layer_results(attn: DyDiLAttention, x: Tensor, **arguments: Any) -> Tensors:
    return output_and_gradients(lambda t: call_layer(attn, t, **arguments), layer_inputs(attn, x))


def compare_layer(attn: DyDiLAttention, length: int, *, batch: int = 1, seeds: int = 3, **arguments: Any) -> None:
    """The 2x rule for the layer, its weights drawn anew for each of the seeds."""
    found, plain, truth = [], [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        for module in attn.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        with_distinct_factors(attn)
        x = tokens(batch, length, attn.dim, dtype=attn.proj.weight.dtype)
        inputs = {name: t.clone() for name, t in layer_inputs(attn, x).items()}
        at = attn.routing(x, arguments.get("mask")).indices
        found.append(output_and_gradients(lambda t: call_layer(attn, t, **arguments), inputs))
        for dtype, runs_of in ((x.dtype, plain), (torch.float64, truth)):
            runs_of.append(
                output_and_gradients(lambda t, at=at: equations(attn, t, indices=at, **arguments), cast(inputs, dtype))
            )
    assert_right(found, plain, truth)


def assert_same_bits(found: Tensors, expected: Tensors) -> None:
    assert found.keys() == expected.keys()
    different = [name for name, t in found.items() if not torch.equal(t, expected[name])]
    assert not different, different


def assert_repeats(inputs: Tensors, request: pytest.FixtureRequest, **options: Any) -> None:
    """To the bit: two backward passes of one forward pass, and both again in memory full of NaN."""

    def twice() -> list[Tensors]:
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        out = attend(leaves, **options)
        incoming = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        wanted = list(leaves.values())
        return [
            {"output": out, **dict(zip(leaves, grads, strict=True))}
            for _ in range(2)
            for grads in [torch.autograd.grad(out, wanted, incoming, retain_graph=True, materialize_grads=True)]
        ]

    first, second = twice()
    assert all(t.isfinite().all() for t in first.values())
    assert_same_bits(second, first)
    request.getfixturevalue("poisoned")
    assert_same_bits(twice()[0], first)
