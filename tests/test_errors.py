"""Bad arguments: an error that names the argument, its value and what was expected, before any work."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import numpy
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dydila_kernels import DyDiLAttention, dydila_attention, functional
from dydila_kernels.testing import core_inputs

X = torch.zeros(2, 16, 8)
ROW = torch.zeros(1, 16, 8)
MASK = torch.ones(2, 16, dtype=torch.bool)

CONSTRUCTION: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"dim": 0}, ValueError, ["dim", "at least 1", "got 0"]),
    ({"dim": 8.0}, TypeError, ["dim", "int", "8.0"]),
    ({"dim": True}, TypeError, ["dim", "int", "True"]),
    ({"num_heads": 3}, ValueError, ["dim", "divisible by num_heads", "dim=8", "num_heads=3"]),
    ({"num_heads": 16}, ValueError, ["divisible", "num_heads=16"]),
    ({"num_heads": 0}, ValueError, ["num_heads", "at least 1", "0"]),
    ({"num_heads": "2"}, TypeError, ["num_heads", "int", "'2'"]),
    ({"qkv_bias": 1}, TypeError, ["qkv_bias", "True or False", "1"]),
    ({"proj_bias": None}, TypeError, ["proj_bias", "True or False", "None"]),
    ({"proj_drop": 1.0}, ValueError, ["proj_drop", "[0, 1)", "1.0"]),
    ({"proj_drop": -0.1}, ValueError, ["proj_drop", "[0, 1)", "-0.1"]),
    ({"proj_drop": math.nan}, ValueError, ["proj_drop", "finite", "nan"]),
    ({"num_projectors": 0}, ValueError, ["num_projectors", "at least 1", "0"]),
    ({"num_projectors": -1, "differential": "off"}, ValueError, ["num_projectors", "at least 0", "-1"]),
    ({"num_kernel_factors": 0}, ValueError, ["num_kernel_factors", "at least 1", "0"]),
    ({"num_differential_factors": 2.5}, TypeError, ["num_differential_factors", "int", "2.5"]),
    ({"gamma_init": math.inf}, ValueError, ["gamma_init", "finite", "inf"]),
    ({"gamma_init": math.nan}, ValueError, ["gamma_init", "finite", "nan"]),
    ({"gamma_init": 0.0}, ValueError, ["gamma_init", "greater than 0", "0"]),
    ({"gamma_init": "3"}, TypeError, ["gamma_init", "number", "'3'"]),
    ({"lambda_init": -math.inf}, ValueError, ["lambda_init", "finite", "-inf"]),
    ({"normalization": "softmax"}, ValueError, ["normalization", "'length', 'none', 'denominator'", "'softmax'"]),
    ({"normalization": None}, ValueError, ["normalization", "'length'", "None"]),
    ({"router_gradient": True}, ValueError, ["router_gradient", "'none', 'straight_through'", "True"]),
    ({"differential": "tokens"}, ValueError, ["differential", "'token', 'map', 'off'", "'tokens'"]),
    ({"dwc_branches": ("3x3", "5x5")}, ValueError, ["dwc_branches", "'3x3', '1x3'", "'5x5'"]),
    ({"dwc_branches": "3x3"}, TypeError, ["dwc_branches", "tuple", "'3x3'"]),
    ({"dwc_branches": None}, TypeError, ["dwc_branches", "tuple", "None"]),
    ({"dwc_branches": ("1x3", "1x3")}, ValueError, ["dwc_branches", "repeat", "'1x3'"]),
    ({"dwc_branches": ("identity",)}, ValueError, ["dwc_branches", "kernel", "'identity'"]),
    ({"num_prefix_tokens": -1}, ValueError, ["num_prefix_tokens", "at least 0", "-1"]),
    ({"backend": "cuda"}, ValueError, ["backend", "'auto', 'triton', 'torch'", "'cuda'"]),
]

CALL: list[tuple[dict[str, Any], dict[str, Any], type[Exception], list[str]]] = [
    ({}, {"x": X[0]}, ValueError, ["x", "(B, N, d)", "(16, 8)"]),
    ({}, {"x": X[None]}, ValueError, ["x", "(B, N, d)", "(1, 2, 16, 8)"]),
    ({}, {"x": torch.zeros(2, 16, 9)}, ValueError, ["x", "d = 8", "(2, 16, 9)"]),
    ({}, {"x": X.long()}, TypeError, ["x", "float32", "int64"]),
    ({}, {"x": X.to(torch.complex64)}, TypeError, ["x", "float32", "complex64"]),
    ({}, {"x": X.tolist()}, TypeError, ["x", "tensor", "list"]),
    ({}, {"x": None}, TypeError, ["x", "tensor", "NoneType"]),
    ({}, {"x": X.double()}, TypeError, ["x", "float32", "float64"]),
    ({}, {"x": X[:, :15]}, ValueError, ["HW=(rows, columns)", "square", "N = 15"]),
    ({"num_prefix_tokens": 1}, {"x": X}, ValueError, ["HW", "square", "N = 15", "after 1 prefix tokens"]),
    ({"num_prefix_tokens": 17}, {"x": X}, ValueError, ["num_prefix_tokens = 17", "at least", "N = 16"]),
    ({}, {"HW": (3, 5)}, ValueError, ["HW", "N = 16", "3 x 5 = 15"]),
    ({"dwc_branches": ()}, {"HW": (3, 5)}, ValueError, ["HW", "N = 16", "3 x 5 = 15"]),
    ({}, {"HW": (-4, -4)}, ValueError, ["HW[0]", "at least 0", "-4"]),
    ({}, {"HW": (4.0, 4)}, TypeError, ["HW[0]", "int", "4.0"]),
    ({}, {"HW": 4}, TypeError, ["HW", "(rows, columns)", "4"]),
    ({}, {"HW": (4, 2, 2, 1)}, TypeError, ["HW", "(rows, columns)", "(frames, rows, columns)", "(4, 2, 2, 1)"]),
    ({}, {"HW": (16,)}, TypeError, ["HW", "(rows, columns)", "(16,)"]),
    ({}, {"HW": (2, 4, 3)}, ValueError, ["HW", "N = 16", "2 x 4 x 3 = 24"]),
    ({}, {"HW": (4, 2, 2.0)}, TypeError, ["HW[2]", "int", "2.0"]),
    ({}, {"HW": (4, -2, -2)}, ValueError, ["HW[1]", "at least 0", "-2"]),
    ({}, {"HW": "44"}, TypeError, ["HW", "(rows, columns)", "'44'"]),
    ({}, {"mask": MASK[0]}, ValueError, ["mask", "(B, N) = (2, 16)", "(16,)"]),
    ({}, {"mask": MASK[:, :15]}, ValueError, ["mask", "(B, N) = (2, 16)", "(2, 15)"]),
    ({}, {"mask": MASK[:1]}, ValueError, ["mask", "(B, N) = (2, 16)", "(1, 16)"]),
    ({}, {"mask": MASK.float()}, TypeError, ["mask", "bool", "float32"]),
    ({}, {"mask": MASK.long()}, TypeError, ["mask", "bool", "int64"]),
    ({}, {"mask": MASK.tolist()}, TypeError, ["mask", "bool tensor", "list"]),
    ({}, {"mask": MASK.to("meta")}, ValueError, ["mask", "cpu", "meta"]),
    ({}, {"attn_mask": MASK.float()}, TypeError, ["mask", "bool", "float32"]),
    ({}, {"mask": MASK, "attn_mask": MASK}, ValueError, ["attn_mask", "mask", "both"]),
    ({}, {"is_causal": True}, ValueError, ["is_causal", "False", "True"]),
    ({}, {"cu_seqlens": [0, 16]}, ValueError, ["cu_seqlens", "batch size", "1", "2"]),
    ({}, {"x": ROW, "cu_seqlens": [0, 4, 15]}, ValueError, ["cu_seqlens", "0 to N = 16", "[0, 4, 15]"]),
    ({}, {"x": ROW, "cu_seqlens": [0, 4, 17]}, ValueError, ["cu_seqlens", "0 to N = 16", "[0, 4, 17]"]),
    ({}, {"x": ROW, "cu_seqlens": [1, 16]}, ValueError, ["cu_seqlens", "0 to N = 16", "[1, 16]"]),
    ({}, {"x": ROW, "cu_seqlens": [0, 9, 4, 16]}, ValueError, ["cu_seqlens", "rise", "[0, 9, 4, 16]"]),
    ({}, {"x": ROW, "cu_seqlens": [0]}, ValueError, ["cu_seqlens", "0 to N = 16", "[0]"]),
    ({}, {"x": ROW, "cu_seqlens": []}, ValueError, ["cu_seqlens", "0 to N = 16", "[]"]),
    ({}, {"x": ROW, "cu_seqlens": [0, -4, 16]}, ValueError, ["cu_seqlens", "-4"]),
    ({}, {"x": ROW, "cu_seqlens": [0, 4.0, 16]}, TypeError, ["cu_seqlens", "int", "4.0"]),
    ({}, {"x": ROW, "cu_seqlens": 16}, TypeError, ["cu_seqlens", "list of ints", "16"]),
    ({}, {"x": ROW, "cu_seqlens": torch.tensor([0.0, 16.0])}, TypeError, ["cu_seqlens", "int32 or int64", "float32"]),
    ({}, {"x": ROW, "cu_seqlens": torch.tensor([[0, 16]])}, TypeError, ["cu_seqlens", "one-dimensional", "(1, 2)"]),
    ({}, {"x": ROW, "cu_seqlens": [0, 4, 16]}, ValueError, ["HW", "square", "N = 12", "image 1"]),
    ({}, {"x": ROW, "cu_seqlens": [0, 4, 8, 16], "HW": (1, 4, 4)}, ValueError, ["HW", "list of 3", "(1, 4, 4)"]),
    ({}, {"x": ROW, "cu_seqlens": [0, 4, 16], "HW": (4, 4)}, ValueError, ["HW", "list of 2", "(4, 4)"]),
    ({}, {"x": ROW, "cu_seqlens": [0, 4, 16], "HW": [(2, 2)]}, ValueError, ["HW", "list of 2", "[(2, 2)]"]),
    (
        {},
        {"x": ROW, "cu_seqlens": [0, 4, 16], "HW": [(2, 2), (3, 3)]},
        ValueError,
        ["HW", "N = 12", "image 1", "3 x 3"],
    ),
    ({"backend": "triton"}, {"x": X}, RuntimeError, ["backend='triton'", "cpu", "float32", "backend='torch'"]),
    ({}, {"x": torch.nested.nested_tensor([X[0], X[1]])}, TypeError, ["x", "dense", "nested", "cu_seqlens"]),
    (
        {},
        {"x": torch.nested.nested_tensor([X[0], X[1, :9]], layout=torch.jagged)},
        TypeError,
        ["x", "dense", "nested", "cu_seqlens"],
    ),
    ({}, {"mask": X}, TypeError, ["mask", "one tensor x", "queries, keys and values", "float32", "(2, 16, 8)"]),
    ({}, {"mask": (4, 4)}, TypeError, ["mask", "HW=(4, 4)"]),
    ({}, {"x": torch.zeros(1, 257, 8)}, ValueError, ["HW", "N = 257", "16 x 16", "num_prefix_tokens=1"]),
    ({}, {"x": torch.zeros(1, 261, 8)}, ValueError, ["HW", "N = 261", "16 x 16", "num_prefix_tokens=5"]),
    ({}, {"need_weights": True}, TypeError, ["need_weights", "no matrix of weights", "bool"]),
    ({}, {"key_padding_mask": MASK}, TypeError, ["key_padding_mask", "mask=~key_padding_mask", "Tensor"]),
    ({}, {"rope": X}, TypeError, ["rope", "rotary=(cos, sin)"]),
    ({}, {"image_rotary_emb": (X, X)}, TypeError, ["image_rotary_emb", "rotary=(cos, sin)", "tuple"]),
    ({}, {"encoder_hidden_states": X}, TypeError, ["encoder_hidden_states", "own tokens", "Tensor"]),
    ({}, {"temperature": 2.0}, TypeError, ["temperature", "no such argument", "float"]),
]


def test_other_names_that_ask_for_nothing() -> None:
    attn = DyDiLAttention(8)
    asked = attn(X, image_rotary_emb=None, encoder_hidden_states=None, need_weights=False, rope=None)
    assert torch.equal(asked, attn(X))


def test_integers_of_any_kind() -> None:
    """numpy's, and those of a tensor, wherever a number of something is asked for."""
    attn = DyDiLAttention(
        numpy.int64(8),
        num_heads=numpy.int32(2),
        num_projectors=numpy.int16(2),
        num_kernel_factors=torch.tensor(3),
        num_differential_factors=numpy.uint8(4),
        num_prefix_tokens=numpy.int64(1),
    )
    assert all(type(n) is int for n in (attn.dim, attn.num_heads, attn.num_prefix_tokens))
    x = torch.randn(2, 13, 8)
    expected = attn(x, HW=(3, 4))
    for HW in ((numpy.int64(3), numpy.int64(4)), numpy.array([3, 4]), torch.Size((3, 4)), torch.tensor([3, 4])):
        assert torch.equal(attn(x, HW=HW), expected)
    bounds = [0, 13]
    packed = attn(x[:1], HW=[(3, 4)], cu_seqlens=bounds)
    assert torch.equal(attn(x[:1], HW=numpy.array([[3, 4]]), cu_seqlens=numpy.array(bounds).tolist()), packed)
    assert torch.equal(attn(x[:1], HW=[(3, 4)], cu_seqlens=list(numpy.array(bounds))), packed)
    inputs = core_inputs(1, 4, 8)
    assert torch.equal(dydila_attention(**inputs, num_heads=numpy.int64(2)), dydila_attention(**inputs, num_heads=2))
    for wrong in (True, numpy.bool_(True), 2.0, numpy.float64(2.0), "2"):
        with pytest.raises(TypeError, match="num_heads must be an int"):
            DyDiLAttention(8, num_heads=wrong)


def test_a_layer_cannot_be_scripted() -> None:
    for module in (DyDiLAttention(8), nn.Sequential(DyDiLAttention(8))):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script is not supported; use torch\.compile"):
            torch.jit.script(module)


CORE: list[tuple[dict[str, Any], type[Exception], list[str]]] = [
    ({"q": torch.zeros(16, 8)}, ValueError, ["q", "(B, N, d)", "(16, 8)"]),
    ({"q": torch.zeros(2, 16, 8).int()}, TypeError, ["q", "float32", "int32"]),
    ({"k": torch.zeros(2, 15, 8)}, ValueError, ["k", "that of q", "(2, 16, 8)", "(2, 15, 8)"]),
    ({"v": torch.zeros(2, 16, 4)}, ValueError, ["v", "that of q", "(2, 16, 4)"]),
    ({"v": torch.zeros(2, 16, 8).bfloat16()}, ValueError, ["v", "one dtype", "bfloat16", "float32"]),
    ({"k": torch.zeros(2, 16, 8, device="meta")}, ValueError, ["k", "one device", "meta", "cpu"]),
    ({"gamma": torch.ones(3, device="meta")}, ValueError, ["gamma", "one device", "meta", "cpu"]),
    ({"q_redundant": None}, TypeError, ["q_redundant", "tensor", "NoneType"]),
    ({"k_redundant": torch.zeros(1, 16, 8)}, ValueError, ["k_redundant", "that of q", "(1, 16, 8)"]),
    ({"gamma": 3.0}, TypeError, ["gamma", "tensor", "float"]),
    ({"gamma": torch.zeros(0)}, ValueError, ["gamma", "(n_F,)", ">= 1", "(0,)"]),
    ({"gamma": torch.ones(1, 3)}, ValueError, ["gamma", "(n_F,)", "(1, 3)"]),
    ({"gamma": torch.ones(3).int()}, TypeError, ["gamma", "float32", "int32"]),
    ({"lam": None}, TypeError, ["lam", "tensor", "NoneType"]),
    ({"lam": torch.ones(())}, ValueError, ["lam", "(n_D,)", "()"]),
    ({"kernel_routers": torch.zeros(2, 8, 3)}, ValueError, ["kernel_routers", "(4, 8, 3)", "(2, 8, 3)"]),
    ({"kernel_routers": torch.zeros(4, 8, 5)}, ValueError, ["kernel_routers", "(routers, d, n_F)", "(4, 8, 5)"]),
    ({"differential_routers": torch.zeros(2, 8, 3)}, ValueError, ["differential_routers", "(2, 16, 3)", "(2, 8, 3)"]),
    ({"differential_routers": None}, TypeError, ["differential_routers", "tensor", "NoneType"]),
    ({"num_heads": 3}, ValueError, ["d", "divisible", "d=8", "num_heads=3"]),
    ({"num_heads": 2.0}, TypeError, ["num_heads", "int", "2.0"]),
    ({"normalization": "mean"}, ValueError, ["normalization", "'length'", "'mean'"]),
    ({"router_gradient": "gumbel"}, ValueError, ["router_gradient", "'straight_through'", "'gumbel'"]),
    ({"differential": None}, ValueError, ["differential", "'token'", "None"]),
    ({"differential": "map"}, ValueError, ["differential_routers", "(1, 16, 3)", "(2, 16, 3)"]),
    ({"differential": "off", "kernel_routers": torch.zeros(2, 8, 3)}, ValueError, ["q_redundant", "None", "'off'"]),
    ({"mask": MASK.int()}, TypeError, ["mask", "bool", "int32"]),
    ({"mask": MASK.t()}, ValueError, ["mask", "(2, 16)", "(16, 2)"]),
    ({"cu_seqlens": [0, 16]}, ValueError, ["cu_seqlens", "batch size", "2"]),
    ({"backend": "cpu"}, ValueError, ["backend", "'torch'", "'cpu'"]),
    ({"backend": "triton"}, RuntimeError, ["backend='triton'", "cpu", "float32"]),
]


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton interprets, its kernels run on a CPU too."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def assert_says(error: pytest.ExceptionInfo[Exception], parts: list[str]) -> None:
    for part in parts:
        assert re.search(rf"(?<!\w){re.escape(part)}(?!\w)", str(error.value)), f"{part!r} is not in {error.value}"


@pytest.mark.parametrize(("arguments", "kind", "parts"), CONSTRUCTION, ids=lambda value: str(value)[:60])
def test_construction(arguments: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as error:
        DyDiLAttention(**{"dim": 8, **arguments})
    assert_says(error, parts)


class Products(TorchDispatchMode):
    """Sees the work that a call begins with: products of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("mm", "matmul", "linear", "conv")):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def test_work_is_seen() -> None:
    with Products() as products:
        DyDiLAttention(8)(X)
    assert products.seen


@pytest.mark.parametrize(
    ("configuration", "arguments", "kind", "parts"), CALL, ids=[f"{i} {parts[0]}" for i, (*_, parts) in enumerate(CALL)]
)
def test_call(
    configuration: dict[str, Any],
    arguments: dict[str, Any],
    kind: type[Exception],
    parts: list[str],
) -> None:
    attn = DyDiLAttention(8, **configuration)
    with pytest.raises(kind) as error, Products() as products:
        attn(**{"x": X, **arguments})
    assert_says(error, parts)
    assert not products.seen


@pytest.mark.parametrize(("arguments", "kind", "parts"), CORE, ids=lambda value: str(value)[:60])
def test_core(arguments: dict[str, Any], kind: type[Exception], parts: list[str]) -> None:
    with pytest.raises(kind) as error:
        dydila_attention(**{**core_inputs(2, 16, 8, dtype=torch.float32), **arguments})
    assert_says(error, parts)


@pytest.mark.parametrize("method", ["routing", "balance_loss"])
@pytest.mark.parametrize(("arguments", "part"), [({"x": X.long()}, "int64"), ({"x": X, "mask": MASK.int()}, "int32")])
def test_statistics_check_as_the_call_does(method: str, arguments: dict[str, Any], part: str) -> None:
    attn = DyDiLAttention(8, router_gradient="straight_through")
    with pytest.raises(TypeError, match=part):
        getattr(attn, method)(**arguments)


def test_auto_says_once_why_it_takes_torch_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "_said", set())
    monkeypatch.setattr(functional, "TRITON", functional.OLDEST_TRITON)
    gpu = torch.device("cuda", 0)
    with pytest.warns(UserWarning, match="torch backend on cuda:0: the kernels .*float64"):
        assert functional.choose_backend("auto", gpu, torch.float64) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert functional.choose_backend("auto", gpu, torch.float64) == "torch"
    with pytest.warns(UserWarning, match="128 factors"):
        assert functional.choose_backend("auto", gpu, torch.float32, 129) == "torch"


@pytest.mark.parametrize(("version", "words"), [(None, "not installed"), ((3, 5), "3.6 or newer is needed; 3.5")])
def test_triton_missing_or_too_old(
    version: tuple[int, int] | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(functional, "TRITON", version)
    with pytest.raises(RuntimeError, match=words):
        functional.choose_backend("triton", torch.device("cuda"), torch.bfloat16)
