"""Eqs. 5-10 in registers, heads of up to 128 channels: the 2x rule, whatever the options and the sizes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dydila_kernels.ops import context
from tests.ops.helpers import (
    DEVICE,
    DTYPES,
    assert_repeats,
    combinations,
    compare_core,
    inputs_of,
    results,
    use_tiles,
)

HEADS = [(16, 1), (48, 2), (96, 3), (64, 1), (72, 1), (96, 1), (128, 1)]
"""d and H: heads of 16, 24, 32, 64, 72, 96 and 128 channels."""


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("i", "options"), list(enumerate(combinations(0))), ids=str)
def test_error_is_that_of_plain_pytorch(
    i: int, options: dict[str, Any], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each option in float32, and in bfloat16 or float16, which the next in its row and column has not."""
    use_tiles(monkeypatch, columns=32)
    # Of few seeds one can be ill-conditioned: a head whose sum is a small difference.
    compare_core(DTYPES[1 + i % 2] if half else torch.float32, 1, 21, 32, seeds=5, num_heads=2, **options)


@pytest.mark.parametrize(("i", "dim", "num_heads"), [(i, *size) for i, size in enumerate(HEADS)])
def test_heads_of_every_size(i: int, dim: int, num_heads: int) -> None:
    kinds = combinations(1)
    compare_core(DTYPES[i % 3], 1, 19, dim, num_heads=num_heads, **kinds[(4 * i) % len(kinds)])


@pytest.mark.slow
@pytest.mark.parametrize(("dim", "num_heads"), [(1152, 16), (1152, 1)])
def test_real_widths(dim: int, num_heads: int) -> None:
    """DiT-XL is 1152 wide with heads of 72."""
    compare_core(torch.bfloat16, 1, 9, dim, seeds=1, num_heads=num_heads)


@pytest.mark.parametrize("length", [1, 2])
def test_short_images(length: int) -> None:
    compare_core(torch.float32, 2, length, 16, seeds=12, normalization="denominator")


@pytest.mark.parametrize(("gamma", "dtype"), [((0.5, 1.0), torch.bfloat16), ((8.0, 64.0), torch.float32)], ids=str)
def test_extreme_factors(gamma: tuple[float, float], dtype: torch.dtype) -> None:
    compare_core(dtype, 1, 19, 24, seeds=12, gamma=gamma)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"router_gradient": "straight_through"}),
        (torch.bfloat16, {"normalization": "denominator"}),
        (torch.float16, {"normalization": "none", "differential": "map"}),
    ],
    ids=str,
)
def test_masks(dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second image has no token at all."""
    use_tiles(monkeypatch)
    mask = torch.rand(2, 35, device=DEVICE) < 0.6
    mask[1] = False
    compare_core(dtype, 2, 35, 16, mask=mask, **options)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"normalization": "denominator", "router_gradient": "straight_through"}),
        (torch.bfloat16, {}),
        (torch.float16, {"normalization": "none", "differential": "map"}),
    ],
    ids=str,
)
def test_packed_images(dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Among them one without tokens, one of a token and one of two tiles; under "length" each has its own."""
    use_tiles(monkeypatch)
    compare_core(dtype, 1, 33, 32, num_heads=2, cu_seqlens=[0, 5, 5, 6, 33], **options)


@pytest.mark.parametrize(("packed", "normalization"), [(False, "length"), (True, "denominator")])
def test_sums_split_over_programs(packed: bool, normalization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split need not have tokens: of the short image in a packed row it has none."""
    use_tiles(monkeypatch)
    monkeypatch.setattr(context, "processors", lambda _: 12)
    made = []
    splits = context.LaunchContext.splits
    monkeypatch.setattr(context.LaunchContext, "splits", lambda *a: made.append(splits(*a)) or made[-1])
    bounds = {"cu_seqlens": [0, 3, 133]} if packed else {}
    compare_core(torch.float32, 1, 133, 16, seeds=1, normalization=normalization, **bounds)
    assert set(made) == {2}


@pytest.mark.parametrize(
    ("segments", "heads", "length", "expected"),
    [(8, 12, 4096, 4), (8, 16, 4096, 2), (1, 12, 65536, 22), (512, 12, 256, 1)],
)
def test_multiprocessors_have_as_much_to_do(
    segments: int, heads: int, length: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 132: three programs each, but for 12; two, but for 8; two; many."""
    monkeypatch.setattr(context, "processors", lambda _: 264)
    call = SimpleNamespace(segments=segments, heads=heads, longest=length, device=DEVICE)
    assert context.LaunchContext.splits(cast(Any, call), 64) == expected


@pytest.mark.usefixtures("poisoned")
def test_splits_do_not_depend_on_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Zeros and NaN in one image leave the bits of another."""
    use_tiles(monkeypatch)
    monkeypatch.setattr(context, "processors", lambda _: 12)
    inputs = inputs_of(2, 133, 16)
    out = results(inputs)["output"]
    for value in (0.0, torch.nan):
        inputs["k"][1] = value
        assert torch.equal(results(inputs)["output"][0], out[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_twice_is_equal_to_the_bit_in_poisoned_memory(
    dtype: torch.dtype, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_tiles(monkeypatch)
    options: dict[str, Any] = combinations(1)[(3 * DTYPES.index(dtype) + 1) % 9]
    inputs = inputs_of(1, 19, 24, dtype, differential=options["differential"])
    assert_repeats(inputs, request, mask=torch.rand(1, 19, device=DEVICE) < 0.7, **options)
