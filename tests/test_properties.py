"""Hypothesis: whatever the shape, the layout and the scale of the input, the result is finite and right."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dydila_kernels import DyDiLAttention, dydila_attention, reference
from dydila_kernels.testing import (
    TOKENS,
    Tensors,
    assert_agree,
    call_layer,
    cast,
    core_inputs,
    decisions,
    equations,
    layer_inputs,
    output_and_gradients,
    relative_error,
    with_distinct_factors,
)
from dydila_kernels.torch_backend import blocks

DIMS = [1, 2, 3, 8, 24, 72, 100]

differentials = st.sampled_from(["token", "map", "off"])
normalizations = st.sampled_from(["length", "none", "denominator"])
seeds = st.integers(0, 2**16)


@st.composite
def cores(draw: st.DrawFn, **fixed: Any) -> tuple[Tensors, dict[str, Any]]:
    """Arguments of the core, some rows zero or all negative, and its options."""
    dim = draw(st.sampled_from(DIMS))
    heads = draw(st.sampled_from([h for h in range(1, dim + 1) if dim % h == 0]))
    options = {
        "num_heads": heads,
        "normalization": draw(normalizations),
        "differential": draw(differentials),
        "router_gradient": draw(st.sampled_from(["none", "straight_through"])),
    }
    inputs = core_inputs(
        draw(st.integers(0, 3)),
        draw(st.integers(0, 12)),
        dim,
        differential=options["differential"],
        num_kernel_factors=draw(st.integers(1, 4)),
        num_differential_factors=draw(st.integers(1, 4)),
        gamma=draw(st.tuples(st.floats(0.5, 64), st.floats(0.5, 64))),
        seed=draw(seeds),
        **fixed,
    )
    for name in TOKENS:
        if name in inputs and inputs[name].numel():
            rows = inputs[name].flatten(0, 1)
            row = draw(st.integers(0, len(rows) - 1))
            if name != "v":
                rows[row] = -rows[row].abs()
            rows[draw(st.integers(0, len(rows) - 1))] = 0
    return inputs, options


@settings(max_examples=80)
@given(cores(), st.sampled_from([1, 100, 2**19]))
def test_core_in_float64(case: tuple[Tensors, dict[str, Any]], elements: int) -> None:
    """Output and all gradients equal the reference to 1e-12, in blocks of any size."""
    inputs, options = case
    expected = output_and_gradients(lambda t: reference.dydila_attention(**t, **options), inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK", elements)
        found = output_and_gradients(lambda t: dydila_attention(**t, **options), inputs)
    # Where all terms cancel, as in the quotient of a head of one channel, what is left is rounding of the terms.
    largest = max((t.norm().item() for t in expected.values()), default=0.0)
    for name, t in found.items():
        assert t.shape == expected[name].shape and t.isfinite().all(), name
        assert (t - expected[name]).norm() <= 1e-12 * largest, name


def scale_rows(t: Tensor, low: int, high: int, seed: int) -> Tensor:
    """Each row times its own power of ten; entries below a thousandth of the row's largest become zero."""
    generator = torch.Generator().manual_seed(seed)
    exponent = low + (high - low) * torch.rand((*t.shape[:-1], 1), generator=generator, dtype=torch.float64)
    largest = t.abs().amax(-1, keepdim=True)
    return (torch.where(t.abs() < 1e-3 * largest, 0, t).double() * 10**exponent).float()


def reachable(inputs: Tensors, options: dict[str, Any], indices: Tensors) -> Tensor:
    """What the terms of the result add up to in absolute value (in float64): rounding errors are relative to this."""
    absolute = {**inputs, "v": inputs["v"].abs()}
    if "lam" in inputs:
        absolute["lam"] = -inputs["lam"].abs()
    return reference.dydila_attention(**cast(absolute, torch.float64), indices=indices, **options)


@settings(max_examples=80)
@given(
    cores(dtype=torch.float32),
    st.sampled_from(["q", "k", "v"]),
    st.sampled_from([(-30, -30), (30, 30), (-30, 30), (-30, 0), (0, 30)]),
    seeds,
)
def test_core_at_extreme_scales_in_float32(
    case: tuple[Tensors, dict[str, Any]], scaled: str, exponents: tuple[int, int], seed: int
) -> None:
    """Rows of q and q', of k and k', or of v, between 1e-30 and 1e30: right in every head, with finite gradients."""
    inputs, options = case
    if options["normalization"] == "denominator":
        # A head whose measured entries all underflow has a quotient of two numbers that float32 does not hold.
        inputs["gamma"] = inputs["gamma"].clamp(max=4)
    names = [name for name in inputs if name.split("_")[0] == scaled]
    inputs = {**inputs, **{name: scale_rows(inputs[name], *exponents, seed) for name in names}}
    indices = decisions(inputs, **options)
    found = output_and_gradients(lambda t: dydila_attention(**t, **options), inputs)
    for name, t in found.items():
        assert t.isfinite().all(), name
    expected = reference.dydila_attention(**cast(inputs, torch.float64), indices=indices, **options)
    terms = reachable(inputs, options, indices)
    # Without a gradient zeros are computed as powers of the smallest normal number: nothing, beside the row's largest.
    allowed = 1e-5 * terms + 1e-15 * terms.amax(-1, keepdim=True) + torch.finfo(torch.float32).tiny
    assert ((found["output"] - expected).abs() <= allowed).all()


@pytest.mark.parametrize("num_heads, gamma", [(1, 0.5), (1, 3.0), (1, 64.0), (4, 0.5), (4, 1.0), (4, 3.0), (4, 16.0)])
def test_denominator_is_right_for_every_factor_in_float32(num_heads: int, gamma: float) -> None:
    """The quotient is a mean of values, whatever the size of numerator and denominator."""
    inputs = core_inputs(1, 32, 16, gamma=(gamma, gamma), dtype=torch.float32)
    options: dict[str, Any] = {"normalization": "denominator", "num_heads": num_heads}
    indices = decisions(inputs, **options)
    found = dydila_attention(**inputs, **options)
    expected = reference.dydila_attention(**cast(inputs, torch.float64), indices=indices, **options)
    assert ((found - expected).abs() <= 1e-4 * reachable(inputs, options, indices)).all()


def test_denominator_where_whole_heads_underflow() -> None:
    """The documented limit, 0.2^64 being no float32: finite, and at most twice as far off as plain PyTorch."""
    inputs = core_inputs(1, 32, 16, gamma=(64.0, 64.0), dtype=torch.float32)
    options: dict[str, Any] = {"normalization": "denominator", "num_heads": 4}
    indices = decisions(inputs, **options)
    found = dydila_attention(**inputs, **options)
    plain = reference.dydila_attention(**inputs, indices=indices, **options)
    expected = reference.dydila_attention(**cast(inputs, torch.float64), indices=indices, **options)
    assert found.isfinite().all()
    assert (found - expected).norm() <= 2 * (plain - expected).norm()


@pytest.mark.parametrize("scale", [1e30, 1e-30])
def test_denominator_is_right_for_keys_and_values_of_one_extreme_scale(scale: float) -> None:
    """The quotient is of the size of the values; so must be what is computed, though keys times values overflow."""
    inputs = core_inputs(1, 8, 16, dtype=torch.float32)
    for name in ("k", "k_redundant", "v"):
        inputs[name] = inputs[name] * scale
    indices = decisions(inputs, normalization="denominator")
    found = dydila_attention(**inputs, normalization="denominator")
    expected = reference.dydila_attention(**cast(inputs, torch.float64), normalization="denominator", indices=indices)
    assert relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gamma", [0.5, 0.75, 1.0, 8.0, 64.0])
def test_gradients_of_the_power_are_finite_down_to_the_smallest_entries(gamma: float, dtype: torch.dtype) -> None:
    """Where r^(gamma - 1) is largest: one entry of 1 beside entries down to the smallest normal number."""
    smallest = math.log10(torch.finfo(dtype).tiny)
    tokens = 10 ** torch.linspace(smallest + 1, 0, 64, dtype=torch.float64)
    inputs = core_inputs(1, 64, 64, gamma=(gamma, gamma), dtype=dtype)
    inputs["q"] = torch.stack([tokens.roll(i) for i in range(64)])[None].to(dtype)
    inputs["k"] = inputs["q"].flip(-1)
    found = output_and_gradients(lambda t: dydila_attention(**t), inputs)
    assert all(t.isfinite().all() for t in found.values())


@st.composite
def layouts(draw: st.DrawFn) -> tuple[str, Tensor]:
    """(2, 6, 8) tokens that are not contiguous."""
    t = torch.randn(2, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(draw(seeds)))
    kind = draw(st.sampled_from(["transposed", "channels first", "sliced", "every other", "flipped", "expanded"]))
    return kind, {
        "transposed": t.transpose(0, 1).contiguous().transpose(0, 1),
        "channels first": t.mT.contiguous().mT,
        "sliced": torch.cat([t, t], -1)[..., 4:12],
        "every other": t.repeat_interleave(2, 1)[:, ::2],
        "flipped": torch.as_strided(t, t.shape, t.stride()).flip(1),
        "expanded": t[:1, :, :1].expand(2, 6, 8),
    }[kind]


@settings(max_examples=60)
@given(st.lists(layouts(), min_size=5, max_size=5), st.sampled_from([16, 2**19]), normalizations)
def test_core_of_any_layout(tokens: list[tuple[str, Tensor]], elements: int, normalization: str) -> None:
    tables = {name: t for name, t in core_inputs(2, 6, 8).items() if name not in TOKENS}
    strided = {**dict(zip(TOKENS, (t for _, t in tokens), strict=True)), **tables}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK", elements)
        found, expected = (
            output_and_gradients(lambda t: dydila_attention(**t, num_heads=2, normalization=normalization), inputs)
            for inputs in (strided, {name: t.contiguous() for name, t in strided.items()})
        )
    assert_agree(found, expected, 1e-13)


@settings(max_examples=40)
@given(layouts(), st.sampled_from([16, 2**19]))
def test_layer_and_its_stages_of_any_layout(tokens: tuple[str, Tensor], elements: int) -> None:
    x = tokens[1]
    attn = with_distinct_factors(DyDiLAttention(8, 2, dtype=torch.float64))
    assert attn.projection_q is not None
    stages = [lambda t: attn(t, HW=(2, 3)), attn.projection_q]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK", elements)
        for stage in stages:
            found, expected = (
                output_and_gradients(lambda t, stage=stage: stage(t["x"]), {"x": t}) for t in (x, x.contiguous())
            )
            assert_agree(found, expected, 1e-13)


@settings(max_examples=40)
@given(
    st.sampled_from(DIMS),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(1, 4),
    differentials,
    seeds,
)
def test_layer_of_any_size(
    dim: int, batch: int, rows: int, columns: int, choices: int, differential: str, seed: int
) -> None:
    torch.manual_seed(seed)
    attn = DyDiLAttention(
        dim,
        num_projectors=choices,
        num_kernel_factors=choices,
        num_differential_factors=choices,
        differential=differential,
        dtype=torch.float64,
    )
    inputs = layer_inputs(with_distinct_factors(attn), torch.randn(batch, rows * columns, dim, dtype=torch.float64))
    expected = output_and_gradients(lambda t: equations(attn, t, HW=(rows, columns)), inputs)
    assert_agree(output_and_gradients(lambda t: call_layer(attn, t, HW=(rows, columns)), inputs), expected)


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "num_heads"), [(1152, 16), (1152, 1), (100, 5), (72, 1)])
def test_layer_of_real_widths(dim: int, num_heads: int) -> None:
    """DiT-XL is 1152 wide with heads of 72; several blocks."""
    attn = with_distinct_factors(DyDiLAttention(dim, num_heads, dtype=torch.float64))
    inputs = layer_inputs(attn, torch.randn(1, 26 * 26, dim, dtype=torch.float64))
    wanted = [name for name in inputs if "router" not in name]
    expected = output_and_gradients(lambda t: equations(attn, t), inputs, wanted)
    assert_agree(output_and_gradients(lambda t: call_layer(attn, t), inputs, wanted), expected)
