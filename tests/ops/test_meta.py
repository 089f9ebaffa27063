"""The operators on the meta device: shapes and dtypes without a kernel, where Triton is asked for by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dydila_kernels import DyDiLAttention, dydila_attention
from dydila_kernels.ops import backward, core, projection
from dydila_kernels.testing import decisions
from tests.ops.helpers import DTYPES, inputs_of, use_gemm

CONFIGURATIONS: list[dict[str, Any]] = [
    {"num_heads": 2, "qkv_bias": True},
    {"normalization": "denominator", "router_gradient": "straight_through", "num_prefix_tokens": 1},
    {"differential": "map", "router_gradient": "straight_through", "dwc_branches": ()},
    {"differential": "off", "num_projectors": 0},
]
every_kind = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)


@pytest.fixture(autouse=True)
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, name in ((core, "forward"), (backward, "backward"), (projection, "route"), (projection, "project")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a kernel was called"))


def empty_layer(dim: int = 24, dtype: torch.dtype = torch.float32, **configuration: Any) -> DyDiLAttention:
    return DyDiLAttention(dim, backend="triton", device="meta", dtype=dtype, **configuration)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)


def assert_like(found: Tensor | None, expected: Tensor) -> None:
    assert found is not None and found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


@every_kind
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_gemm", [False, True], ids=["fused", "wide"])
def test_layer(
    configuration: dict[str, Any], dtype: torch.dtype, by_gemm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output, eager and without gradients, and every gradient."""
    if by_gemm:
        use_gemm(monkeypatch)
    attn = empty_layer(dtype=dtype, **configuration)
    x = empty(2, 9 + attn.num_prefix_tokens, 24, dtype=dtype)
    with torch.no_grad():
        assert_like(attn(x), x)
    out = attn(x)
    assert_like(out, x)
    out.sum().backward()
    trained = [p for p in attn.parameters() if p.requires_grad]
    assert len(trained) > 4
    for t in (x, *trained):
        assert_like(t.grad, t)
    with torch.no_grad():
        assert_like(attn.fuse()(x), x)


@pytest.mark.parametrize("packed", [False, True], ids=["mask", "packed"])
def test_masks_and_packed_images(packed: bool) -> None:
    attn, x = empty_layer(), empty(1, 25, 24)
    mask = empty(1, 25, dtype=torch.bool)
    arguments: dict[str, Any] = {"cu_seqlens": [0, 9, 25], "HW": [(3, 3), (4, 4)]} if packed else {"mask": mask}
    out = attn(x, **arguments)
    assert_like(out, x)
    out.sum().backward()
    assert_like(x.grad, x)


def test_core() -> None:
    inputs = {name: t.to("meta").requires_grad_() for name, t in inputs_of(2, 7, 12).items()}
    out = dydila_attention(**inputs, backend="triton")
    assert_like(out, inputs["q"])
    wanted = [t for name, t in inputs.items() if "routers" not in name]
    for found, t in zip(torch.autograd.grad(out, wanted, torch.empty_like(out)), wanted, strict=True):
        assert_like(found, t)
    assert all(index.is_meta and index.shape == (2, 7) for index in decisions(inputs, backend="triton").values())


def test_float64_is_refused_as_on_a_device() -> None:
    with pytest.raises(RuntimeError, match=r"backend='triton' cannot run on meta with torch\.float64"):
        empty_layer(dtype=torch.float64)(empty(2, 9, 24, dtype=torch.float64))


def test_auto_takes_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, x = empty_layer(), empty(2, 9, 24)
    attn.backend = "auto"
    monkeypatch.setattr("dydila_kernels.ops.operators.attention", lambda *_: pytest.fail("an operator was called"))
    assert_like(attn(x), x)
