"""Eqs. 5-8 of each token: the decisions, and inputs of any size, scale and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.ops import core
from dydila_kernels.testing import TOKENS, Tensors, cast, decisions, relative_error
from tests.ops.helpers import (
    DEVICE,
    DIFFERENTIALS,
    DTYPES,
    NORMALIZATIONS,
    ROUTER_GRADIENTS,
    assert_same_bits,
    attend,
    combinations,
    inputs_of,
    name_of,
    oracle,
    results,
    use_tiles,
)

# Decisions


def shortfall(tokens: Tensor, router: Tensor, index: Tensor) -> float:
    """By how much the logit chosen misses the largest, in units of |token| |router|; all in float64."""
    logits = tokens @ router
    missed = logits.amax(-1) - logits.gather(-1, index[..., None])[..., 0]
    return (missed / (tokens.norm(dim=-1) * router.norm(dim=0).amax()).clamp(min=1e-300)).max().item()


@pytest.mark.parametrize("differential", DIFFERENTIALS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "choices"), [(24, 9), (150, 17)])
def test_decides_as_float64_but_for_rounding(dim: int, choices: int, dtype: torch.dtype, differential: str) -> None:
    """Routers in float32, as under autocast; Eq. 7 for 16-bit tokens on bfloat16 tensor cores, to 2^-16."""
    inputs = inputs_of(
        2, 75, dim, differential=differential, num_kernel_factors=choices, num_differential_factors=choices
    )
    inputs.update({name: inputs[name].to(dtype) for name in TOKENS if name in inputs})
    at = decisions(inputs, differential=differential, backend="triton")
    t = cast(inputs, torch.float64)
    names = ["q", "k", "q_redundant", "k_redundant"][: len(inputs["kernel_routers"])]
    measured = {}
    for name, router in zip(names, t["kernel_routers"], strict=True):
        index = at[f"measure_{name}"]
        assert shortfall(t[name], router, index) < 1e-6
        assert len(index.unique()) == choices
        measured[name] = reference.power(t[name], t["gamma"][index])
    for side, router in zip("qk", t.get("differential_routers", ()), strict=False):
        pair = torch.cat([measured[side], measured[f"{side}_redundant"]], -1)
        assert shortfall(pair, router, at[f"differential_{side}"]) < (3e-5 if dtype == torch.bfloat16 else 2e-6)
    assert at.keys() == {f"measure_{name}" for name in names} | {
        "token": {"differential_q", "differential_k"}, "map": {"differential_q"}, "off": set()
    }[differential]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ties_go_to_the_lowest_index(dtype: torch.dtype) -> None:
    inputs = inputs_of(1, 20, 24, dtype, num_kernel_factors=5, num_differential_factors=4)
    for name in ("kernel_routers", "differential_routers"):
        inputs[name] = inputs[name][..., :1].expand_as(inputs[name])
    assert all(not index.any() for index in decisions(inputs, backend="triton").values())


def test_127_is_the_largest_index() -> None:
    inputs = inputs_of(1, 200, 16, num_kernel_factors=128, num_differential_factors=128)
    inputs["kernel_routers"][..., 127] = 100 * inputs["kernel_routers"][..., 0]
    at = decisions(inputs, backend="triton")
    assert at["measure_q"].max() == 127 and min(index.min() for index in at.values()) >= 0
    expected = oracle(inputs)["gamma"]
    assert relative_error(results(inputs)["gamma"], expected) < 1e-5


# Any input

SIZES = [(1, 1), (3, 1), (8, 2), (24, 3), (40, 1), (40, 2), (72, 1), (100, 5)]
"""d and H."""


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensors, dict[str, Any]]:
    """float32 arguments of the core, some rows zero or without a positive entry, and its options."""
    dim, heads = draw(st.sampled_from(SIZES))
    options = {
        "num_heads": heads,
        "normalization": draw(st.sampled_from(NORMALIZATIONS)),
        "differential": draw(st.sampled_from(DIFFERENTIALS)),
        "router_gradient": draw(st.sampled_from(ROUTER_GRADIENTS)),
    }
    batch, length = draw(st.tuples(st.integers(0, 2), st.integers(0, 20)))
    # A head whose measured entries all underflow has a quotient of two numbers that float32 does not hold.
    most = 4 if options["normalization"] == "denominator" and heads > 1 else 64
    inputs = inputs_of(
        batch, length, dim, differential=options["differential"], num_kernel_factors=draw(st.integers(1, 20)),
        num_differential_factors=draw(st.integers(1, 20)), gamma=draw(st.tuples(*[st.floats(0.5, most)] * 2)),
        seed=draw(st.integers(0, 99)),
    )  # fmt: skip
    for name in TOKENS:
        if name in inputs and inputs[name].numel():
            rows = inputs[name].flatten(0, 1)
            rows[draw(st.integers(0, len(rows) - 1))].abs_().neg_()
            rows[draw(st.integers(0, len(rows) - 1))] = 0
    if draw(st.booleans()):
        options["mask"] = torch.rand(batch, length, device=DEVICE) < 0.6
    return inputs, options


def scaled_rows(t: Tensor, low: float, high: float) -> Tensor:
    """Each row times its own power of ten; entries below a thousandth of the row's largest become zero."""
    exponent = low + (high - low) * torch.rand((*t.shape[:-1], 1), dtype=torch.float64, device=t.device)
    t = torch.where(t.abs() < 1e-3 * t.abs().amax(-1, keepdim=True), 0, t)
    return (t.double() * 10**exponent).to(t.dtype)


@pytest.mark.slow
@settings(max_examples=12)
@given(
    cases(),
    st.sampled_from(DTYPES[:2]),
    st.sampled_from(["q", "k", "v"]),
    st.sampled_from([(0, 0), (-30, -30), (30, 30), (-30, 30)]),
    st.booleans(),
)
def test_right_at_any_size_and_scale(
    case: tuple[Tensors, dict[str, Any]], dtype: torch.dtype, which: str, scale: tuple[int, int], by_gemm: bool
) -> None:
    """Never NaN, and the output right beside what its terms add up to in absolute value."""
    inputs, options = case
    torch.manual_seed(0)
    for name in [name for name in inputs if name.split("_")[0] == which]:
        inputs[name] = scaled_rows(inputs[name], *scale)
    inputs = cast(inputs, dtype)
    with pytest.MonkeyPatch.context() as patch:
        if by_gemm:
            patch.setattr(core, "LARGEST_HEAD", 0)
        found = results(inputs, **options)
        at = decisions(inputs, backend="triton", **options)
    assert all(t.isfinite().all() for t in found.values()), {n: t.isfinite().all() for n, t in found.items()}
    exact = cast(inputs, torch.float64)
    expected = reference.dydila_attention(**exact, indices=at, **options)
    exact.update(v=exact["v"].abs(), **({"lam": -exact["lam"].abs()} if "lam" in exact else {}))
    terms = reference.dydila_attention(**exact, indices=at, **options)
    # What is rounded to bfloat16 on the way to a product is rounded beside the others of its row.
    rounding = 1e-4 if dtype == torch.float32 else 0.02
    allowed = rounding * (terms + 1e-3 * terms.amax(-1, keepdim=True)) + torch.finfo(torch.float32).tiny
    assert ((found["output"] - expected).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("by_gemm", [False, True])
@pytest.mark.parametrize("normalization", ["length", "denominator"])
def test_large_activations_cost_no_more_than_rounding_the_output(
    normalization: str, by_gemm: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens of size 200, whose products pass the range of float16 on the way."""
    if by_gemm:
        monkeypatch.setattr(core, "LARGEST_HEAD", 0)
    inputs = inputs_of(1, 130, 32, dtype)
    for name in ("q", "k", "q_redundant", "k_redundant"):
        inputs[name] = inputs[name] * 200
    inputs["v"] = inputs["v"] / 200
    found, expected = (f(inputs, num_heads=2, normalization=normalization) for f in (results, oracle))
    for name, t in found.items():
        if name == "v" and normalization == "length":
            assert t.isinf().any() or relative_error(t, expected[name]) < 4 * torch.finfo(dtype).eps, name
        else:
            assert t.isfinite().all(), name
    assert relative_error(found["output"], expected["output"]) < 4 * torch.finfo(dtype).eps


# Layouts


def wider(t: Tensor) -> Tensor:
    """The same values as a chunk of a wider tensor, NaN around them."""
    return t.new_full((*t.shape[:-1], 3 * t.shape[-1]), torch.nan).chunk(3, -1)[1].copy_(t)


LAYOUTS = {
    "chunk": wider,
    "tokens first": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels first": lambda t: t.mT.contiguous().mT,
    "every other token": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "every other channel": lambda t: t.repeat_interleave(2, 2)[..., ::2],
}


@pytest.mark.slow
@settings(max_examples=6)
@given(
    st.lists(st.sampled_from(list(LAYOUTS)), min_size=7, max_size=7),
    st.sampled_from(combinations(0) + combinations(1)),
    st.booleans(),
)
def test_any_layout(layouts: list[str], options: dict[str, Any], by_gemm: bool) -> None:
    """The same bits, whatever the strides of tokens, routers, mask and incoming gradient."""
    torch.manual_seed(0)
    inputs = inputs_of(2, 21, 24, torch.bfloat16, differential=options["differential"])
    mask = torch.rand(2, 21, device=DEVICE) < 0.7
    incoming = torch.randn(2, 21, 24).to(inputs["q"])
    strided = {
        name: LAYOUTS[layout](t) if t.dim() == 3 else t
        for layout, (name, t) in zip(layouts, inputs.items(), strict=False)
    }
    with pytest.MonkeyPatch.context() as patch:
        if by_gemm:
            patch.setattr(core, "LARGEST_HEAD", 0)
        found, expected = (
            gradients(attend(leaves, mask=m, **options), leaves, grad)
            for m, grad, tensors in ((mask.t().contiguous().t(), LAYOUTS[layouts[-1]](incoming), {**inputs, **strided}),
                                     (mask, incoming, inputs))
            for leaves in [{name: t.detach().requires_grad_() for name, t in tensors.items()}]
        )  # fmt: skip
    assert_same_bits(found, expected)


def gradients(out: Tensor, leaves: Tensors, incoming: Tensor) -> Tensors:
    found = torch.autograd.grad(out, list(leaves.values()), incoming, materialize_grads=True)
    return {"output": out.detach(), **dict(zip(leaves, found, strict=True))}


def test_expanded_tokens() -> None:
    inputs = inputs_of(2, 21, 24)
    inputs.update({name: inputs[name][:1, :, :1].expand(2, 21, 24) for name in TOKENS})
    assert_same_bits(results(inputs), results({name: t.contiguous() for name, t in inputs.items()}))


# Masks

MASK = torch.tensor([[1, 0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1, 1, 1, 0], [0] * 9]).bool().to(DEVICE)


@pytest.mark.parametrize("by_gemm", [False, True])
@pytest.mark.parametrize("options", combinations(0), ids=name_of)
def test_never_looks_at_hidden_tokens(options: dict[str, Any], by_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the inputs, nor in the incoming gradient; output and gradients there are zero."""
    if by_gemm:
        monkeypatch.setattr(core, "LARGEST_HEAD", 0)
    use_tiles(monkeypatch)
    clean = inputs_of(3, 9, 16, differential=options["differential"])
    garbage = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30], device=DEVICE).repeat(108).view(3, 9, 16)
    incoming = torch.randn(3, 9, 16).to(DEVICE)
    found = []
    for dirty in (True, False):
        tensors = [*clean.items(), ("incoming", incoming)]
        leaves = {
            name: torch.where(MASK[..., None], t, garbage) if dirty and t.shape[:2] == MASK.shape else t.clone()
            for name, t in tensors
        }
        grad = leaves.pop("incoming")
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        found.append(gradients(attend(leaves, mask=MASK, num_heads=1, **options), leaves, grad))
    assert_same_bits(*found)
    for name, t in found[0].items():
        assert t.shape[:2] != MASK.shape or not t[~MASK].any(), name


def test_empty_batches_launch_nothing_and_have_gradients() -> None:
    for shape in ((0, 5), (2, 0)):
        for options in combinations(1):
            inputs = inputs_of(*shape, 8, differential=options["differential"])
            found = results(inputs, **options)
            assert found["output"].shape == (*shape, 8)
            assert all(t.shape == found[name].shape and not found[name].any() for name, t in inputs.items())


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("options", [{}, {"differential": "map"}, {"normalization": "denominator"}], ids=name_of)
def test_nan_in_a_token_is_not_lost(whole: bool, options: dict[str, Any]) -> None:
    """Of a key it reaches all outputs, of a query its own, as in plain PyTorch."""
    for name, lost in (("k", 12), ("q", 1)):
        inputs = inputs_of(1, 12, 24, **({"differential": "map"} if "differential" in options else {}))
        inputs[name][0, 5, slice(None) if whole else 7] = torch.nan
        out = attend(inputs, num_heads=2, **options)
        assert out.isnan().all(-1).sum() == lost and out[:, :5].isnan().any() == (name == "k")
