"""The whole layer, forward and backward, in every form that its kernels have: for a GPU, or an emulated one.

    pytest --emulate sm_90 tests/ops/test_configurations.py

In Triton's interpreter, which compiles nothing, the other tests go through the same options.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import interpreter
from tests.ops.helpers import DEVICE, compare_layer, layer_of, use_gemm

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(interpreter.INTERPRETED, reason="what is compiled is tested: on a GPU, or with --emulate"),
]

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
MASK = torch.rand(1, 101, generator=torch.Generator().manual_seed(5)) < 0.7
MASKED: dict[str, Any] = {"length": 101, "HW": (10, 10), "mask": MASK, "num_prefix_tokens": 1}
PACKED: dict[str, Any] = {
    "length": 119, "HW": [(2, 3), (0, 0), (10, 11)], "cu_seqlens": [0, 7, 8, 119], "num_prefix_tokens": 1,
}  # fmt: skip
DENOMINATOR: dict[str, Any] = {"normalization": "denominator"}
TRAINED: dict[str, Any] = {"router_gradient": "straight_through"}
ARGUMENTS = ("HW", "mask", "cu_seqlens", "rotary_pairing")
"""Of a call; all else but d, length and batch is of the layer."""

FUSED: dict[str, dict[str, Any]] = {
    "heads of 64": {"d": 128, "num_heads": 2, "length": 110, "HW": (10, 11)},
    "heads of 64, fp32": {"d": 128, "num_heads": 2, "length": 70, "HW": (7, 10), "dtype": F32},
    "heads of 64, fp16": {"d": 128, "num_heads": 2, "length": 70, "HW": (7, 10), "dtype": F16},
    "heads of 32": {"batch": 2, "length": 77, "HW": (7, 11)},
    "heads of 24": {"d": 72, "num_heads": 3},
    "heads of 16, off, none": {"num_heads": 4, "differential": "off", "normalization": "none"},
    "heads of 12": {"d": 36, "num_heads": 3, "length": 61, "HW": (6, 10), "num_prefix_tokens": 1},
    "heads of 72": {"d": 72, "num_heads": 1},
    "heads of 80": {"d": 160, "length": 70, "HW": (7, 10)},
    "heads of 128": {"d": 128, "num_heads": 1},
    "heads of 128, fp32": {"d": 128, "num_heads": 1, "length": 50, "HW": (5, 10), "dtype": F32},
    "heads of 9, fp32": {"d": 9, "num_heads": 1, "length": 30, "HW": (5, 6), "dtype": F32},
    "heads of 40, fp16": {"d": 40, "num_heads": 1, "length": 60, "HW": (6, 10), "dtype": F16},
    "denominator": DENOMINATOR,
    "denominator, fp16": {**DENOMINATOR, "dtype": F16},
    "map": {"differential": "map"},
    "off, denominator, trained, fp32": {**DENOMINATOR, **TRAINED, "differential": "off", "dtype": F32},
    "map, denominator, trained": {**DENOMINATOR, **TRAINED, "differential": "map"},
    "map, trained, fp32": {**TRAINED, "differential": "map", "dtype": F32},
    "trained": {**TRAINED, "d": 128, "length": 70, "HW": (7, 10)},
    "trained, fp32": {**TRAINED, "d": 128, "length": 70, "HW": (7, 10), "dtype": F32},
    "trained, fp16": {**TRAINED, "dtype": F16},
    "trained, heads of 96": {**TRAINED, "d": 96, "num_heads": 1, "length": 70, "HW": (7, 10)},
    "trained, heads of 128": {**TRAINED, "d": 128, "num_heads": 1},
    "masked": MASKED,
    "masked, denominator, fp16": {**MASKED, **DENOMINATOR, "dtype": F16},
    "packed": PACKED,
    "packed, denominator, fp32": {**PACKED, **DENOMINATOR, "dtype": F32},
    "one projector, no convolution": {"num_projectors": 1, "dwc_branches": (), "length": 77, "HW": (7, 11)},
    "five projectors": {"d": 96, "num_heads": 3, "length": 300, "HW": (15, 20), "num_projectors": 5,
                        "num_kernel_factors": 20, "num_differential_factors": 17},
    "one token": {"length": 1, "HW": (1, 1)},
}  # fmt: skip
"""Heads of at most 128 channels.  Where nothing is said: bf16, d = 64, two heads, an image of 9 x 10 tokens."""

STATES: dict[str, Any] = {"d": 144, "num_heads": 1, "length": 150, "HW": (10, 15)}
SCORES: dict[str, Any] = {"d": 144, "num_heads": 1, "length": 72, "HW": (8, 9)}
WIDE: dict[str, dict[str, Any]] = {
    "states": STATES,
    "states, fp32": {**STATES, "dtype": F32},
    "states, denominator": {**STATES, **DENOMINATOR},
    "states, map": {**STATES, "differential": "map"},
    "states, map, denominator": {**STATES, **DENOMINATOR, "differential": "map"},
    "states, trained": {**STATES, **TRAINED},
    "states, masked": {**STATES, **MASKED},
    "states, packed": {**STATES, **PACKED},
    "scores": SCORES,
    "scores, denominator": {**SCORES, **DENOMINATOR},
    "scores, map, fp16": {**SCORES, "differential": "map", "dtype": F16},
}
"""Wider heads, whose products are GEMMs."""

NEIGHBOURS, HALVES = {"rotary_pairing": "interleaved"}, {"rotary_pairing": "halves"}
ROTARY: dict[str, dict[str, Any]] = {
    "rotary, heads of 24": {**NEIGHBOURS, "d": 72, "num_heads": 3, "length": 30, "HW": (5, 6)},
    "rotary, heads of 72, trained": {**HALVES, **TRAINED, "d": 144},
    "rotary, heads of 4": {**HALVES, "d": 32, "num_heads": 8},
    "rotary, fp32": {**NEIGHBOURS, "dtype": F32},
    "rotary, masked, denominator, fp16": {**HALVES, **MASKED, **DENOMINATOR, "dtype": F16},
    "rotary, packed, map": {**NEIGHBOURS, **PACKED, "differential": "map"},
    "rotary, one head": {**HALVES, **SCORES},
}
"""Of heads of any width."""

SELECTED = {"heads of 32", "denominator, fp16", "map, trained, fp32", "rotary, heads of 24"}
"""What the normal suite runs on emulated GPUs."""


def cases(table: dict[str, dict[str, Any]]) -> list[Any]:
    return [
        pytest.param(case, id=name, marks=[pytest.mark.emulated] * (name in SELECTED)) for name, case in table.items()
    ]


def compare(case: dict[str, Any]) -> None:
    case = {"d": 64, "num_heads": 2, "length": 90, "batch": 1, "HW": (9, 10), "dtype": BF16, **case}
    d, length, batch = (case.pop(name) for name in ("d", "length", "batch"))
    arguments = {name: case.pop(name) for name in ARGUMENTS if name in case}
    torch.manual_seed(0)
    if "rotary_pairing" in arguments:
        angles = torch.randn(length, d // case["num_heads"])
        arguments["rotary"] = [t.to(DEVICE) for t in (angles.cos(), angles.sin())]
    compare_layer(layer_of(d, **case), length, batch=batch, seeds=1, **arguments)


@pytest.mark.parametrize("case", cases(FUSED))
def test_fused(case: dict[str, Any]) -> None:
    compare(case)


@pytest.mark.parametrize("case", cases(ROTARY))
def test_rotary_embeddings(case: dict[str, Any]) -> None:
    compare(case)


@pytest.mark.parametrize("case", cases(WIDE))
def test_wide_heads(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    use_gemm(monkeypatch)
    compare(case)
