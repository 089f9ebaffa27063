"""The core of the torch backend against the reference in float64, in one block and in many."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch

from dydila_kernels import dydila_attention, reference
from dydila_kernels.testing import Tensors, assert_agree, core_inputs, output_and_gradients, relative_error

#: elements of a block of d = 12: all images, one image, several ranges of an image, single rows
EVERY_BLOCK = pytest.mark.parametrize("elements", [2**19, 12 * 7, 12 * 3, 12])
EVERY_OPTION = pytest.mark.parametrize(
    "options",
    [
        {"normalization": normalization, "differential": differential, "router_gradient": router_gradient}
        for normalization, differential, router_gradient in product(
            ("length", "none", "denominator"), ("token", "map", "off"), ("none", "straight_through")
        )
    ],
    ids=lambda options: "-".join(options.values()),
)


def agree(inputs: Tensors, **options: Any) -> None:
    """Output and all gradients, with gradients recorded and without."""
    expected = output_and_gradients(lambda t: reference.dydila_attention(**t, **options), inputs)
    assert_agree(output_and_gradients(lambda t: dydila_attention(**t, **options, backend="torch"), inputs), expected)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            out = dydila_attention(**inputs, **options, backend="torch")
        assert relative_error(out, expected["output"]) <= 1e-12
        assert out.is_contiguous()


@EVERY_BLOCK
@EVERY_OPTION
@pytest.mark.parametrize("num_heads", [1, 3, 6])
def test_equals_the_reference(
    elements: int, num_heads: int, options: dict[str, str], block_of: Callable[[int], None]
) -> None:
    block_of(elements)
    inputs = core_inputs(3, 7, 12, differential=options["differential"], num_differential_factors=4)
    agree(inputs, num_heads=num_heads, **options)


@EVERY_BLOCK
@EVERY_OPTION
def test_equals_the_reference_with_a_mask(
    elements: int, options: dict[str, str], block_of: Callable[[int], None]
) -> None:
    """Images with gaps, without a gap, and without any token."""
    block_of(elements)
    mask = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [1] * 7, [0] * 7, [0, 0, 0, 0, 0, 0, 1]]).bool()
    agree(core_inputs(4, 7, 12, differential=options["differential"]), num_heads=3, mask=mask, **options)


@EVERY_BLOCK
@EVERY_OPTION
def test_equals_the_reference_with_packed_images(
    elements: int, options: dict[str, str], block_of: Callable[[int], None]
) -> None:
    """Also an image of one token and one of none."""
    block_of(elements)
    inputs = core_inputs(1, 17, 12, differential=options["differential"])
    agree(inputs, num_heads=3, cu_seqlens=[0, 7, 8, 8, 17], **options)


@pytest.mark.parametrize("wanted", [["q"], ["v"], ["k_redundant"], ["gamma"], ["lam"], ["q", "kernel_routers"]])
@pytest.mark.parametrize("elements", [2**19, 12])
def test_gradients_of_some_inputs_alone(wanted: list[str], elements: int, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    inputs = core_inputs(2, 7, 12)
    expected = output_and_gradients(lambda t: reference.dydila_attention(**t, num_heads=3), inputs)
    leaves = {name: t.clone().requires_grad_(name in wanted) for name, t in inputs.items()}
    found = output_and_gradients(
        lambda t: dydila_attention(**{**leaves, **{name: t[name] for name in wanted}}, num_heads=3), inputs, wanted
    )
    assert_agree(found, {name: t for name, t in expected.items() if name in ("output", *wanted)})


@pytest.mark.parametrize("normalization", ["length", "none"])
def test_heads_of_one_channel(normalization: str) -> None:
    agree(core_inputs(2, 7, 12), num_heads=12, normalization=normalization)


def test_more_factors_than_a_byte_counts() -> None:
    agree(core_inputs(1, 40, 12, num_kernel_factors=300, num_differential_factors=2), num_heads=3)


def test_a_packed_tensor_of_bounds_is_a_list_of_bounds() -> None:
    inputs = core_inputs(1, 9, 12)
    expected = dydila_attention(**inputs, cu_seqlens=[0, 4, 9])
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(dydila_attention(**inputs, cu_seqlens=torch.tensor([0, 4, 9], dtype=dtype)), expected)


@pytest.mark.parametrize("elements", [2**19, 12])
def test_repeats_are_equal_to_the_bit(elements: int, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    inputs = core_inputs(3, 20, 12, dtype=torch.float32)
    first, second = (
        output_and_gradients(lambda t: dydila_attention(**t, router_gradient="straight_through"), inputs)
        for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_straight_through_changes_no_bit_of_the_output() -> None:
    inputs = core_inputs(3, 20, 12, dtype=torch.float32)
    hard, soft = (dydila_attention(**inputs, router_gradient=kind) for kind in ("none", "straight_through"))
    assert torch.equal(hard, soft)
