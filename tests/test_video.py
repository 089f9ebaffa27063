"""Videos: all tokens attend to each other, and the convolution is that of each frame."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tests.interpreter as interpreter  # before the package, which may import Triton
from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import assert_agree, call_layer, layer_inputs, output_and_gradients, relative_error
from dydila_kernels.torch_backend import blocks
from tests.battery import (
    assert_gradcheck,
    assert_is_its_equations,
    assert_keeps_the_2x_rule,
    assert_packed_is_one_by_one,
    assert_transforms,
    compilations,
    spread,
)
from tests.ranks import on_ranks

OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 2, "num_prefix_tokens": 2},
    {"normalization": "denominator", "router_gradient": "straight_through", "dwc_branches": ("3x1", "identity")},
    {"differential": "off", "num_projectors": 0, "dwc_branches": ()},
]


def layer(dim: int = 8, **options: Any) -> DyDiLAttention:
    return spread(DyDiLAttention(dim, **{"dtype": torch.float64, **options}))


def tokens(attn: DyDiLAttention, HW: tuple[int, ...], batch: int = 2) -> Tensor:
    length = attn.num_prefix_tokens + math.prod(HW)
    return torch.randn(batch, length, attn.dim, dtype=attn.proj.weight.dtype)


def test_each_frame_is_convolved_on_its_own() -> None:
    """Against torch's convolution of each frame, added to the attention of a layer without one."""
    attn = layer(num_prefix_tokens=1)
    alone = DyDiLAttention(8, num_prefix_tokens=1, dwc_branches=(), dtype=torch.float64)
    alone.load_state_dict(attn.state_dict(), strict=False)
    x = tokens(attn, (3, 4, 5))
    weight, _ = attn.dwc.fused_weight()
    frames = attn.qkv(x)[:, 1:, 16:].reshape(2, 3, 4, 5, 8)
    convolved = [F.conv2d(frame.permute(0, 3, 1, 2), weight, padding=1, groups=8) for frame in frames.unbind(1)]
    values = torch.stack(convolved, 1).permute(0, 1, 3, 4, 2).reshape(2, 60, 8)
    expected = alone(x) + F.pad(values, (0, 0, 1, 0)) @ attn.proj.weight.T
    assert relative_error(attn(x, HW=(3, 4, 5)), expected) < 1e-12
    assert relative_error(attn(x, HW=(12, 5)), expected) > 1e-3


def test_a_video_of_one_frame_is_an_image() -> None:
    attn = layer(num_heads=2)
    x = tokens(attn, (4, 5))
    assert torch.equal(attn(x, HW=(1, 4, 5)), attn(x, HW=(4, 5)))
    with torch.no_grad():
        assert torch.equal(attn(x, HW=(1, 4, 5)), attn(x, HW=(4, 5)))


@pytest.mark.parametrize("elements", [2**19, 8 * 7, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option(options: dict[str, Any], elements: int, block_of: Callable[[int], None]) -> None:
    """In blocks that end within a row, between rows, between frames."""
    block_of(elements)
    attn = layer(**options)
    for HW in ((3, 2, 4), (2, 3, 1), (5, 1, 1), (1, 4, 4), (0, 2, 2), (2, 0, 3), (2, 3, 0)):
        assert_is_its_equations(attn, tokens(attn, HW), HW=HW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_2x_rule(dtype: torch.dtype) -> None:
    assert_keeps_the_2x_rule(dtype, (2, 36, 24), {"num_heads": 3}, arguments=lambda: {"HW": (3, 4, 3)})


def test_gradcheck(block_of: Callable[[int], None]) -> None:
    block_of(12)
    attn = layer(4, num_kernel_factors=1, num_differential_factors=1)
    assert_gradcheck(attn, tokens(attn, (2, 2, 2), 1), ["dwc.branches.3x3", "dwc.branches.1x3"], HW=(2, 2, 2))


def test_transforms() -> None:
    attn = layer(num_heads=2)
    assert_transforms(attn, tokens(attn, (3, 2, 2)), HW=(3, 2, 2))


sizes = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 4)) | st.tuples(
    st.integers(0, 4), st.integers(0, 4)
)


@settings(max_examples=80)
@given(st.lists(sizes, min_size=1, max_size=3), st.sampled_from(["batch", "mask", "packed"]),
       st.sampled_from([8, 30, 200, 2**20]), st.sampled_from(OPTIONS), st.integers(0, 2**16))  # fmt: skip
def test_of_any_size(
    grids: list[tuple[int, ...]], kind: str, elements: int, options: dict[str, Any], seed: int
) -> None:
    """Images and clips, alone, masked and packed, in blocks that cut them anywhere."""
    torch.manual_seed(seed)
    attn = layer(**options)
    arguments: dict[str, Any] = {"HW": grids[0]}
    x = tokens(attn, grids[0], batch=3)
    if kind == "packed":
        bounds = [0]
        for grid in grids:
            bounds.append(bounds[-1] + attn.num_prefix_tokens + math.prod(grid))
        arguments = {"HW": grids, "cu_seqlens": bounds}
        x = torch.randn(1, bounds[-1], 8, dtype=torch.float64)
    elif kind == "mask":
        arguments["mask"] = torch.rand(x.shape[:2]) < 0.6
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK", elements)
        assert_is_its_equations(attn, x, **arguments)


@pytest.mark.parametrize("elements", [2**19, 40])
def test_packed_clips_are_the_clips(elements: int, block_of: Callable[[int], None]) -> None:
    block_of(elements)
    attn, bounds = layer(num_prefix_tokens=1), [0, 13, 15, 26, 35]
    grids: list[tuple[int, ...]] = [(2, 3, 2), (1, 1, 1), (5, 2), (2, 2, 2)]
    assert_packed_is_one_by_one(attn, torch.randn(1, 35, 8, dtype=torch.float64), grids, bounds)


def test_hidden_tokens_are_zeros_to_the_convolution() -> None:
    attn = layer()
    x, mask = tokens(attn, (3, 2, 4)), torch.rand(2, 24) < 0.6
    spoilt = torch.where(mask[..., None], x, torch.inf)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            assert torch.equal(attn(spoilt, mask, HW=(3, 2, 4)), attn(x, mask, HW=(3, 2, 4)))


@pytest.mark.slow
def test_compiles_at_most_twice_for_any_number_of_frames() -> None:
    attn = layer(num_heads=2)
    sizes = [(2, 3, 3, 4), (3, 5, 4, 2), (4, 7, 2, 6), (2, 4, 5, 3)]
    counts = compilations(attn, [(tokens(attn, HW, b), {"HW": tuple(HW)}) for b, *HW in sizes])
    assert counts[-1] == counts[1] <= 2, counts


class OnVideo(nn.Module):
    """Takes (B, frames, rows, columns, d), so that the grid is known from a shape."""

    def __init__(self, attn: DyDiLAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x.flatten(1, 3), HW=x.shape[1:4]).view(x.shape)


def test_an_exported_layer_takes_videos_of_any_size() -> None:
    model = OnVideo(layer(num_heads=2))
    dims = {i: torch.export.Dim(name, min=1, max=64) for i, name in enumerate(("batch", "frames", "rows", "columns"))}
    x = torch.randn(2, 3, 4, 5, 8, dtype=torch.float64)
    program = torch.export.export(model, (x,), dynamic_shapes=(dims,), strict=False)
    for shape in ((3, 6, 2, 7), (1, 4, 8, 3)):
        x = torch.randn(*shape, 8, dtype=torch.float64)
        assert relative_error(program.module()(x), model(x)) < 1e-12


def test_meta_device() -> None:
    attn = DyDiLAttention(8, device="meta")
    x = torch.empty(2, 24, 8, device="meta")
    assert attn(x, HW=(3, 2, 4)).shape == x.shape
    with torch.no_grad():
        assert attn(x, HW=(3, 2, 4)).shape == x.shape


@pytest.mark.skipif(not interpreter.AVAILABLE, reason="Triton is not installed")
@pytest.mark.parametrize("kind", ["batch", "mask", "packed"])
def test_beside_the_kernels(kind: str) -> None:
    attn = layer(16, num_heads=2, dtype=torch.float32, num_prefix_tokens=1)
    arguments: dict[str, Any] = {"HW": (2, 2, 3)}
    x = tokens(attn, (2, 2, 3))
    if kind == "mask":
        arguments["mask"] = torch.rand(2, 13) < 0.7
    elif kind == "packed":
        x, arguments = x.reshape(1, 26, 16), {"HW": [(2, 2, 3), (3, 4)], "cu_seqlens": [0, 13, 26]}
    results = []
    for backend in ("triton", "torch"):
        attn.backend = backend
        results.append(output_and_gradients(lambda t: call_layer(attn, t, **arguments), layer_inputs(attn, x)))
        with torch.no_grad():
            assert relative_error(attn(x, **arguments), results[-1]["output"]) < 1e-5
    assert_agree(*results, tolerance=2e-5)


def spread_over_ranks() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from tests.test_distributed import assert_same

    mesh = init_device_mesh("cpu", (3,))
    attn = layer(num_prefix_tokens=1)
    cuts = {
        (3, 2, 3): [(7, 6, 6), (8, 3, 8), (0, 19, 0), (2, 3, 14), (19, 0, 0), (1, 0, 18)],
        (4, 1, 3): [(4, 4, 5), (6, 1, 6)],
        (2, 3, 1): [(1, 3, 3), (5, 1, 1)],
        (5, 1, 1): [(2, 2, 2)],
        (1, 4, 3): [(3, 5, 5)],
        (0, 2, 2): [(1, 0, 0)],
    }
    for HW, every in cuts.items():
        for lengths in every:
            assert_same(attn, mesh, HW, list(lengths), masked=lengths[0] % 2 == 0, batch=2)
    dist.destroy_process_group()


def test_tokens_on_three_ranks() -> None:
    on_ranks(3, spread_over_ranks)
