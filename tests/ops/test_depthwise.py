"""DWC of Eq. 9 and its gradients: the kernels against the reference in float64, dense and packed."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dydila_kernels import reference
from dydila_kernels.ops import depthwise as ops
from dydila_kernels.testing import Tensors, assert_within_twice_plain, relative_error
from dydila_kernels.types import Grid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Case:
    """``grids`` of images within rows of ``length`` tokens; several in a batch of one row are packed."""

    grids: tuple[Grid, ...]
    length: int
    d: int = 24
    batch: int = 2
    masked: bool = False

    @property
    def geometry(self) -> ops.Geometry:
        return ops.Geometry.of(self.grids, DEVICE)

    def mask(self) -> Tensor | None:
        return torch.rand(self.batch, self.length, device=DEVICE) < 0.7 if self.masked else None

    def inputs(self, dtype: torch.dtype = torch.float32) -> Tensors:
        """Tokens rounded to ``dtype``, with the convolution about as large as what it is added to."""
        inputs = {name: torch.randn(self.batch, self.length, self.d, device=DEVICE) for name in ("out", "v", "grad")}
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
        return {
            **inputs,
            "weight": torch.randn(9, self.d, device=DEVICE) / 3,
            "bias": torch.randn(self.d, device=DEVICE) / 3,
        }


PACKED = (Grid(1, 4, 3), Grid(14, 10, 13), Grid(144, 0, 5), Grid(145, 1, 1), Grid(146, 5, 1))
"""With a prefix token before each, one image of several strips and one without pixels."""

CASES = {
    "square": Case((Grid(0, 4, 4),), 16),
    "prefix tokens, tokens after, four strips": Case((Grid(2, 19, 7),), 140),
    "three strips below each other": Case((Grid(0, 33, 2),), 66),
    "mask": Case((Grid(1, 5, 7),), 36, masked=True),
    "one row": Case((Grid(0, 1, 9),), 9),
    "one column": Case((Grid(0, 9, 1),), 9),
    "one pixel": Case((Grid(0, 1, 1),), 1),
    "d of 5": Case((Grid(0, 5, 3),), 15, d=5),
    "d of 72": Case((Grid(0, 4, 3),), 12, d=72),
    "two blocks of channels": Case((Grid(0, 4, 9),), 36, d=136),
    "whole blocks of channels": Case((Grid(0, 3, 5),), 15, d=128),
    "packed": Case(PACKED, 153, batch=1),
    "packed, mask": Case(PACKED, 153, batch=1, masked=True),
}


def convolution(v: Tensor, weight: Tensor, bias: Tensor | None, case: Case, mask: Tensor | None) -> Tensor:
    """The equation, in any dtype: (B, N, d)."""
    if mask is not None:
        v = v.masked_fill(~mask[..., None], 0)
    parts, position = [], 0
    for grid in case.grids:
        if grid.start < grid.stop:
            image = v[:, grid.start : grid.stop]
            image = reference.depthwise(image, weight.t().unflatten(1, (1, 3, 3)), bias, (grid.rows, grid.columns))
            parts += [torch.zeros_like(v[:, position : grid.start]), image]
            position = grid.stop
    y = torch.cat([*parts, torch.zeros_like(v[:, position:])], 1)
    return y if mask is None else y.masked_fill(~mask[..., None], 0)


def expected(inputs: Tensors, case: Case, mask: Tensor | None, dtype: torch.dtype) -> Tensors:
    """In plain PyTorch, everything in ``dtype``; ``out`` is also what the gradient of v is added to."""
    t = {name: tensor.to(dtype) for name, tensor in inputs.items()}
    leaves = [t[name].requires_grad_() for name in ("v", "weight", "bias")]
    y = convolution(*leaves, case, mask)
    dv, dweight, dbias = torch.autograd.grad(y, leaves, t["grad"], allow_unused=True, materialize_grads=True)
    return {"output": (t["out"] + y).detach(), "v": t["out"] + dv, "weight": dweight, "bias": dbias}


def ours(t: Tensors, geometry: ops.Geometry, mask: Tensor | None) -> Tensors:
    out, dv = t["out"].clone(), t["out"].clone()
    ops.depthwise(out, t["v"], t["weight"], t["bias"], geometry, mask)
    dweight, dbias = ops.depthwise_gradients(dv, t["v"], t["grad"], t["weight"], geometry, mask)
    assert dweight.dtype == dbias.dtype == torch.float32
    return {"output": out, "v": dv, "weight": dweight, "bias": dbias}


def assert_same(found: Tensors, same: Tensors) -> None:
    for name, t in found.items():
        assert torch.equal(t, same[name]), name


def check(case: Case, dtype: torch.dtype) -> None:
    found, plain, oracle = [], [], []
    for _ in range(2):
        inputs, mask = case.inputs(dtype), case.mask()
        found.append(ours(inputs, case.geometry, mask))
        plain.append(expected(inputs, case, mask, dtype))
        oracle.append(expected(inputs, case, mask, torch.float64))
    assert_within_twice_plain(found, plain, oracle)


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str) -> None:
    check(CASES[name], torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mask", "packed"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    check(CASES[name], dtype)


def test_without_bias() -> None:
    case = CASES["square"]
    t = case.inputs()
    out = t["out"].clone()
    ops.depthwise(out, t["v"], t["weight"], None, case.geometry)
    oracle = t["out"].double() + convolution(t["v"].double(), t["weight"].double(), None, case, None)
    assert relative_error(out, oracle) < 1e-6


@pytest.mark.parametrize("name", ["mask", "packed"])
def test_the_input_gradient_is_the_adjoint(name: str) -> None:
    case = CASES[name]
    t, mask = case.inputs(), case.mask()
    y, dv = torch.zeros_like(t["v"]), torch.zeros_like(t["v"])
    ops.depthwise(y, t["v"], t["weight"], None, case.geometry, mask)
    ops.depthwise_gradients(dv, t["v"], t["grad"], t["weight"], case.geometry, mask)
    forward, backward = (y.double() * t["grad"]).sum(), (t["v"].double() * dv).sum()
    assert abs(forward - backward) < 1e-6 * y.double().norm() * t["grad"].double().norm()


def test_tokens_outside_of_the_grids_and_masked_ones_keep_their_value() -> None:
    case = CASES["packed, mask"]
    t, mask = case.inputs(), case.mask()
    found = ours(t, case.geometry, mask)
    assert mask is not None
    idle = ~mask[0]
    idle[[0, 13, 144, 151, 152]] = True
    for name in ("output", "v"):
        assert torch.equal(found[name][0, idle], t["out"][0, idle])


@pytest.mark.parametrize("name", ["square", "mask", "packed, mask"])
def test_nothing_reads_what_is_masked_or_uninitialised(name: str, poisoned: None) -> None:
    case = CASES[name]
    t, mask = case.inputs(), case.mask()
    found = ours(t, case.geometry, mask)
    if mask is not None:
        t["v"][~mask] = t["grad"][~mask] = torch.nan
    assert_same(ours(t, case.geometry, mask), found)  # which also shows that a repeat is equal to the bit


def test_any_stride() -> None:
    case = Case((Grid(1, 5, 3),), 17, masked=True)
    t, mask = case.inputs(), case.mask()
    assert mask is not None
    found = ours(t, case.geometry, mask)
    t["out"] = torch.cat([t["out"]] * 2, -1).chunk(2, -1)[1]
    t["v"] = torch.cat([t["v"]] * 3, -1).chunk(3, -1)[1]
    t["grad"] = t["grad"].transpose(1, 2).contiguous().transpose(1, 2)  # tokens next to each other
    t["weight"] = t["weight"].t().contiguous().t()
    assert_same(ours(t, case.geometry, mask.t().contiguous().t()), found)


@pytest.mark.parametrize("strides", [(2**30, 8), (8, 2**30)])
def test_offsets_beyond_32_bits(strides: tuple[int, int]) -> None:
    case = Case((Grid(0, 3, 1),), 3, d=8, batch=3)
    t = case.inputs(torch.float16)
    found = ours(t, case.geometry, None)
    memory = torch.empty(2**31 + 24, dtype=torch.float16, device=DEVICE)  # of which a few pages are touched
    t["v"] = memory.as_strided((3, 3, 8), (*strides, 1)).copy_(t["v"])
    assert_same(ours(t, case.geometry, None), found)


@pytest.mark.parametrize(
    "case",
    [
        Case((Grid(0, 2, 2),), 4, batch=0),
        Case((Grid(0, 0, 3),), 4),
        Case((Grid(2, 3, 0),), 4),
        Case((), 0, batch=1),
        Case((Grid(1, 0, 3), Grid(3, 0, 0)), 3, batch=1),
    ],
)
def test_nothing_to_do(case: Case, poisoned: None) -> None:
    t = case.inputs()
    zeros = {"weight": torch.zeros(9, case.d, device=DEVICE), "bias": torch.zeros(case.d, device=DEVICE)}
    assert_same(ours(t, case.geometry, None), {"output": t["out"], "v": t["out"], **zeros})


def test_parts_of_several_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case((Grid(0, 19, 7),), 133, d=8, batch=3)  # twelve strips
    t = case.inputs()
    one_each = ours(t, case.geometry, None)
    monkeypatch.setattr(ops, "PROGRAMS", 5)  # four parts of three
    for name, found in ours(t, case.geometry, None).items():
        assert relative_error(found, one_each[name]) < 1e-6
