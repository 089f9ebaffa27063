"""The layer without gradients, block by block, against the same layer with gradients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dydila_kernels import DyDiLAttention
from dydila_kernels.torch_backend import blocks

sizes = st.tuples(st.integers(0, 12), st.integers(1, 12))


@st.composite
def calls(draw: st.DrawFn) -> tuple[DyDiLAttention, Tensor, dict[str, Any]]:
    """A layer, tokens and the other arguments: a batch with or without a mask, or packed images."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    prefix, channels = draw(st.integers(0, 3)), draw(st.sampled_from([4, 8]))
    heads = draw(st.sampled_from([1, 2, 3]))
    attn = DyDiLAttention(
        heads * channels,
        heads,
        qkv_bias=draw(st.booleans()),
        num_prefix_tokens=prefix,
        differential=draw(st.sampled_from(["token", "map", "off"])),
        normalization=draw(st.sampled_from(["length", "none", "denominator"])),
        dwc_branches=draw(st.sampled_from([("3x3", "1x3", "3x1"), ("3x1", "identity"), ()])),
        dtype=torch.float64,
    )
    grids = draw(st.lists(sizes, min_size=1, max_size=3))
    arguments: dict[str, Any] = {"HW": grids[0]}
    batch, length = draw(st.integers(1, 4)), prefix + grids[0][0] * grids[0][1]
    if draw(st.booleans()):
        bounds = [0]
        for rows, columns in grids:
            bounds.append(bounds[-1] + prefix + rows * columns)
        arguments = {"HW": grids, "cu_seqlens": bounds}
        batch, length = 1, bounds[-1]
    elif draw(st.booleans()):
        arguments["mask"] = torch.rand(batch, length) < 0.7
    return attn, torch.randn(batch, length, attn.dim, dtype=torch.float64), arguments


def arguments_of_grid(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "mask"}


@settings(max_examples=150)
@given(calls(), st.sampled_from([64, 300, 1000, 2**20]))
def test_the_same_as_with_gradients(call: tuple[DyDiLAttention, Tensor, dict[str, Any]], elements: int) -> None:
    """In blocks of any size, which cut rows of the grid, prefix tokens and images anywhere."""
    attn, x, arguments = call
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "CPU_BLOCK", elements)
        with torch.no_grad():
            assert attn._plain_weights(attn._checked(x, None, **arguments_of_grid(arguments))) is not None
            found, again = attn(x, **arguments), attn(x, **arguments)
    assert torch.equal(found, again)
    torch.testing.assert_close(found, attn(x, **arguments).detach(), rtol=1e-9, atol=1e-11)


def kept_buffers() -> list[Tensor]:
    """What this thread keeps for a later call."""
    return [buffer for memory in blocks.idle.stack for buffer in memory.buffers.values()]


def test_no_call_sees_memory_of_another(block_of: Callable[[int], None]) -> None:
    """Kept memory is each thread's own, is taken by calls of other sizes and layers, and returned by none."""
    block_of(2000)
    layers = [DyDiLAttention(d, d // 8, dtype=torch.float64).requires_grad_(False) for d in (8, 24, 16)]
    inputs = [
        torch.randn(b, n * n, a.dim, dtype=torch.float64)
        for a, (b, n) in zip(layers, [(1, 20), (3, 9), (2, 2)], strict=True)
    ]
    with torch.inference_mode():  # what it makes must not be kept: it cannot be written outside
        expected = [attn(x) for attn, x in zip(layers, inputs, strict=True)]
    found: list[Tensor] = [torch.empty(0)] * 30

    def work(thread: int) -> None:
        for i in range(thread, len(found), 3):
            with torch.no_grad():
                found[i] = layers[i % 4 % 3](inputs[i % 4 % 3])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, y in enumerate(found):
        assert torch.equal(y, expected[i % 4 % 3])
    kept = {t.untyped_storage().data_ptr() for t in kept_buffers()}
    assert kept and not kept & {y.untyped_storage().data_ptr() for y in expected}


def test_a_window_larger_than_a_block_is_not_kept(block_of: Callable[[int], None]) -> None:
    """A grid of one row needs all of its values at once."""
    block_of(256)
    blocks.idle.stack.clear()
    attn, x = DyDiLAttention(8, dtype=torch.float64), torch.randn(1, 400, 8, dtype=torch.float64)
    with torch.no_grad():
        found = attn(x, HW=(1, 400))
    torch.testing.assert_close(found, attn(x, HW=(1, 400)))
    assert max(t.numel() for t in kept_buffers()) <= 2 * 256
