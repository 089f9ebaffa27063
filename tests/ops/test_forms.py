"""The form in Gluon: that it is taken, that it answers as the other does, and why it is not taken elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dydila_kernels import reference
from dydila_kernels.ops import core, forms, tiles
from dydila_kernels.testing import TOKENS, Tensors, cast, decisions, relative_error
from tests.ops.helpers import (
    DEVICE,
    HALF,
    assert_repeats,
    assert_same_bits,
    attend,
    compare_core,
    compare_layer,
    inputs_of,
    layer_of,
    name_of,
    operator_arguments,
)
from tests.ops.test_tokens import shortfall

needs_gluon = pytest.mark.skipif(tiles.INTERPRETED, reason="Gluon has no interpreter: --emulate sm_90, or a GPU")


DENOMINATOR = {"normalization": "denominator"}
CASES: dict[str, dict[str, Any]] = {
    "whole tiles": {"batch": 2, "length": 64, "dim": 256, "num_heads": 4},
    "none": {"batch": 1, "length": 48, "dim": 128, "normalization": "none"},
    "the last tile has one token": {"batch": 2, "length": 33, "dim": 256, "num_heads": 2},
    "channels do not fill the warps": {"batch": 1, "length": 32, "dim": 40},
    "heads of 72": {"batch": 1, "length": 40, "dim": 144, "num_heads": 2},
    "heads of 96": {"batch": 1, "length": 40, "dim": 192, "num_heads": 2},
    "powers of one branch in shared memory": {"batch": 1, "length": 24, "dim": 800, "num_heads": 10},
    "one wide head": {"batch": 1, "length": 150, "dim": 136},
    "packed": {"batch": 1, "length": 60, "dim": 64, "num_heads": 2, "cu_seqlens": [0, 5, 5, 38, 60]},
    "negative powers": {"batch": 1, "length": 32, "dim": 64, "gamma": (-1.0, 2.0)},
    "denominators": {"batch": 2, "length": 33, "dim": 256, "num_heads": 4, **DENOMINATOR},
    "denominators of heads of 32": {"batch": 1, "length": 32, "dim": 96, "num_heads": 3, **DENOMINATOR},
    "denominators of heads of 72": {"batch": 1, "length": 40, "dim": 144, "num_heads": 2, **DENOMINATOR},
    "denominators of heads of 96": {"batch": 1, "length": 40, "dim": 192, "num_heads": 2, **DENOMINATOR},
    "denominators of one head": {"batch": 1, "length": 40, "dim": 128, **DENOMINATOR},
    "denominators of negative powers": {"batch": 1, "length": 32, "dim": 64, "gamma": (-1.0, 2.0), **DENOMINATOR},
    "denominators, packed": {
        "batch": 1, "length": 60, "dim": 64, "num_heads": 2, "cu_seqlens": [0, 5, 5, 38, 60], **DENOMINATOR
    },
}  # fmt: skip


@needs_gluon
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_is_that_of_plain_pytorch(case: str, dtype: torch.dtype, launched: set[str]) -> None:
    compare_core(dtype, **CASES[case])
    assert "gluon_tokens_kernel" in launched and "readout_kernel" not in launched


@needs_gluon
@pytest.mark.parametrize("length", [40, 150])
def test_denominators_of_one_wide_head(length: int, launched: set[str]) -> None:
    """By scores, and by states; float16 goes through torch's products in float32, and is left to the Triton form."""
    compare_core(torch.bfloat16, 1, length, 136, **DENOMINATOR)
    assert "gluon_tokens_kernel" in launched


@needs_gluon
@pytest.mark.parametrize("options", [{}, {"num_heads": 2, **DENOMINATOR}], ids=name_of)
def test_masks(options: dict[str, Any], launched: set[str]) -> None:
    mask = torch.rand(2, 37, device=DEVICE) < 0.6
    mask[1] = False
    compare_core(torch.bfloat16, 2, 37, 64, mask=mask, **options)
    assert "gluon_tokens_kernel" in launched


@needs_gluon
@pytest.mark.parametrize("options", [{}, {"num_heads": 2, **DENOMINATOR}], ids=name_of)
def test_masked_tokens_may_hold_anything(options: dict[str, Any], launched: set[str]) -> None:
    inputs = inputs_of(1, 40, 64, torch.bfloat16)
    mask = torch.arange(40, device=DEVICE)[None] % 3 > 0
    clean = attend(inputs, mask=mask, **options)
    for name in TOKENS:
        inputs[name] = inputs[name].masked_fill(~mask[..., None], torch.nan)
    assert_same_bits({"out": attend(inputs, mask=mask, **options)}, {"out": clean})
    assert "gluon_tokens_kernel" in launched


@needs_gluon
def test_convolution(launched: set[str]) -> None:
    compare_layer(layer_of(64, num_heads=2, dtype=torch.bfloat16), 36)
    assert {"gluon_tokens_kernel", "depthwise_kernel"} <= launched


@needs_gluon
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("dim", "factors", "differences"),
    [(256, 9, 9), (40, 21, 21), (64, 21, 9), (64, 9, 21), (64, 2, 4), (64, 10, 12), (64, 8, 18)],
)
def test_decides_as_float64_but_for_rounding(
    dim: int, factors: int, differences: int, dtype: torch.dtype, launched: set[str]
) -> None:
    """Routers in float32; the powers of Eq. 7 are rounded to float16 for bfloat16 tokens, and are in two parts else.

    Choices fill octets of a router, or fit into one together, or are left over for the octet of all parts.
    """
    inputs = inputs_of(2, 150, dim, num_kernel_factors=factors, num_differential_factors=differences)
    inputs.update({name: inputs[name].to(dtype) for name in TOKENS})
    at = decisions(inputs, backend="triton")
    assert "gluon_tokens_kernel" in launched
    t, measured = cast(inputs, torch.float64), {}
    for name, router in zip(("q", "k", "q_redundant", "k_redundant"), t["kernel_routers"], strict=True):
        index = at[f"measure_{name}"]
        assert shortfall(t[name], router, index) < 1e-6
        assert len(index.unique()) == factors
        measured[name] = reference.power(t[name], t["gamma"][index])
    for side, router in zip("qk", t["differential_routers"], strict=True):
        pair = torch.cat([measured[side], measured[f"{side}_redundant"]], -1)
        assert shortfall(pair, router, at[f"differential_{side}"]) < (3e-5 if dtype == torch.bfloat16 else 2e-6)


@needs_gluon
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_rows_of_any_scale(scale: float) -> None:
    """phi keeps the scale of a row, and with it that of the output."""
    inputs = inputs_of(1, 32, 64, torch.bfloat16)
    expected = attend(inputs)
    for name in ("q", "q_redundant"):
        inputs[name] = inputs[name] * 2.0 ** round(torch.tensor(scale).log2().item())
    found = attend(inputs).double() / 2.0 ** round(torch.tensor(scale).log2().item())
    torch.testing.assert_close(found, expected.double(), rtol=2e-2, atol=2e-2 * expected.abs().max().item())


@needs_gluon
@pytest.mark.parametrize(("dim", "heads"), [(64, 2), (128, 1)])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_denominators_of_tiny_powers(dtype: torch.dtype, dim: int, heads: int, launched: set[str]) -> None:
    """A denominator is relative: what float16 cannot hold beside the largest power of a row may be all of a head."""
    inputs = inputs_of(1, 32, dim, dtype, gamma=(6.0, 6.0))
    for name in ("q", "k", "q_redundant", "k_redundant"):
        inputs[name] = inputs[name] / 64
        inputs[name][..., 0] = 1
    options = {"num_heads": heads, **DENOMINATOR}
    found = attend(inputs, **options)
    truth = reference.dydila_attention(
        **cast(inputs, torch.float64), indices=decisions(inputs, backend="triton", **options), **options
    )
    assert "gluon_tokens_kernel" in launched
    for head, exact in zip(found.chunk(heads, -1), truth.chunk(heads, -1), strict=True):
        assert relative_error(head, exact) < 4 * torch.finfo(dtype).eps


@needs_gluon
@pytest.mark.parametrize("options", [{}, DENOMINATOR], ids=name_of)
def test_nan_stays_in_its_row(options: dict[str, Any]) -> None:
    inputs = inputs_of(1, 32, 64, torch.bfloat16)
    inputs["q"][0, 3, 5] = torch.nan
    lost = attend(inputs, **options).isnan().all(-1)[0]
    assert lost[3] and lost.sum() == 1


@needs_gluon
@pytest.mark.parametrize("options", [{}, {"num_heads": 2, **DENOMINATOR}, DENOMINATOR], ids=name_of)
def test_backward_twice_is_equal_to_the_bit_in_poisoned_memory(
    options: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    inputs = inputs_of(1, 40, 64, torch.bfloat16)
    assert_repeats(inputs, request, mask=torch.rand(1, 40, device=DEVICE) < 0.7, **options)


@needs_gluon
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize(
    ("dim", "options"), [(128, {"num_heads": 2}), (128, {"num_heads": 2, **DENOMINATOR}), (136, DENOMINATOR)], ids=str
)
def test_both_forms_save_the_same(
    dim: int, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the backward pass may take what it likes."""
    inputs = inputs_of(2, 48, dim, dtype)
    saved = {}
    for form in ("gluon", "triton"):
        monkeypatch.setenv(forms.VARIABLE, form)
        arguments = operator_arguments(inputs, **options)
        saved[form] = core.forward(*arguments)[1]
    found, expected = saved["gluon"], saved["triton"]
    assert torch.equal(found.indices, expected.indices)
    torch.testing.assert_close(found.statistics, expected.statistics, rtol=1e-4, atol=0)
    for name in ("means", "inverse"):  # of a mean the powers are rounded to the dtype of the tokens, each on its own
        if (exact := getattr(expected, name)) is not None:
            torch.testing.assert_close(getattr(found, name), exact, rtol=4 * torch.finfo(dtype).eps, atol=0)


# Which form


def reason(monkeypatch: pytest.MonkeyPatch, inputs: Tensors, **options: Any) -> str | None:
    """Why ``tokens`` of the queries takes the Triton form, on a GPU of NVIDIA's."""
    monkeypatch.setattr(tiles, "INTERPRETED", False)
    monkeypatch.setattr(tiles, "target", "cuda")
    arguments, settings = operator_arguments(inputs, **options)
    context = core.context_of(arguments, settings)
    queries, _ = core.operands_of(context, arguments, settings, core.empty_saved(arguments, settings))
    return forms.why_not_gluon_tokens(context, queries, decide=True)


@pytest.mark.parametrize(
    ("dim", "dtype", "options", "part"),
    [
        (64, torch.bfloat16, {}, None),
        (64, torch.float32, {}, "float32"),
        (64, torch.bfloat16, {"differential": "off"}, "no lambda"),
        (64, torch.bfloat16, DENOMINATOR, None),
        (36, torch.bfloat16, DENOMINATOR, "parts of 8 channels"),
        (64, torch.bfloat16, {"router_gradient": "straight_through"}, "trained"),
        (1536, torch.bfloat16, {}, "registers"),
        (25, torch.bfloat16, {}, "even"),
    ],
    ids=str,
)
def test_says_why_not(
    dim: int, dtype: torch.dtype, options: dict[str, Any], part: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(1, 4, dim, dtype, differential=options.get("differential", "token"))
    found = reason(monkeypatch, inputs, **options)
    assert found is None if part is None else part in (found or "")


@pytest.mark.parametrize(
    ("dim", "choices", "dtype", "options", "taken"),
    [
        (768, 16, torch.float16, {}, True),
        (768, 17, torch.float16, {}, False),
        (384, 64, torch.float16, {}, True),
        (384, 65, torch.float16, {}, False),
        (832, 21, torch.float16, {}, True),
        (832, 21, torch.float16, {"num_heads": 13, **DENOMINATOR}, False),
        (832, 16, torch.float16, {"num_heads": 13, **DENOMINATOR}, True),
        (832, 32, torch.bfloat16, {"num_heads": 13, **DENOMINATOR}, True),
        (832, 33, torch.bfloat16, {"num_heads": 13, **DENOMINATOR}, False),
    ],
)
def test_logits_of_many_choices_need_registers_and_shared_memory(
    dim: int, choices: int, dtype: torch.dtype, options: dict[str, Any], taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 33 choices, 832 channels with denominators would take 106 KiB: sm_86, sm_89 and sm_120 have 99."""
    inputs = inputs_of(1, 4, dim, dtype)
    inputs.update(
        gamma=torch.ones(choices), kernel_routers=torch.zeros(4, dim, choices)
    )  # fmt: skip
    assert (reason(monkeypatch, inputs, **options) is None) == taken


def test_the_environment_forces_the_portable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forms.VARIABLE, "triton")
    assert forms.VARIABLE in (reason(monkeypatch, inputs_of(1, 4, 64, torch.bfloat16)) or "")


@pytest.mark.skipif(not tiles.INTERPRETED, reason="Gluon is there")
def test_the_environment_cannot_force_what_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forms.VARIABLE, "gluon")
    with pytest.raises(RuntimeError, match="Gluon has no interpreter"):
        attend(inputs_of(1, 4, 64, torch.bfloat16))


def test_the_environment_names_a_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(forms.VARIABLE, "cuda")
    with pytest.raises(ValueError, match=r"DYDILA_KERNELS_FORM must be one of auto, gluon, triton; got 'cuda'"):
        forms.wanted()
