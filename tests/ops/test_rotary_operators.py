"""Rotary embeddings by the kernels under torch's own tools: operators, compilation, export, autocast, meta, ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

from dydila_kernels import DyDiLAttention, dydila_attention
from dydila_kernels.checks import PAIRINGS
from dydila_kernels.ops import autograd, core
from dydila_kernels.testing import relative_error
from tests.battery import compilations
from tests.ops.helpers import DEVICE, DTYPES, assert_same_bits, inputs_of, layer_of, operator_arguments, tokens
from tests.ops.test_operators import by_operator, layer_gradients
from tests.ops.test_rotary import on_device
from tests.ranks import on_ranks
from tests.test_rotary import spread_over_ranks

CALLS: dict[str, dict[str, Any]] = {
    "learned": {"learned": True, "rotary_pairing": "halves", "num_heads": 2},
    "given, denominator": {"normalization": "denominator", "num_heads": 3},
    "map, mask": {"differential": "map", "mask": torch.arange(12).view(2, 6).to(DEVICE) % 3 != 0},
    "scores, packed": {"batch": 1, "length": 9, "cu_seqlens": [0, 1, 1, 9], "learned": True},
}
pytestmark = pytest.mark.usefixtures("fresh_compiler")
every_call = pytest.mark.parametrize("name", list(CALLS))


def arguments_of(
    *, batch: int = 2, length: int = 6, learned: bool = False, num_heads: int = 1, **options: Any
) -> tuple[Any, ...]:
    """Those of the operator ``attention``, in need of gradients; tables that images share, and that may be learned."""
    inputs = inputs_of(batch, length, 12, differential=options.get("differential", "token"))
    leaves = {name: t.requires_grad_() for name, t in inputs.items()}
    rotary = [t.requires_grad_(learned) for t in on_device(length, 12 // num_heads)]
    given, settings = operator_arguments(leaves, rotary=rotary, num_heads=num_heads, **options)
    assert settings.rotary_gradient == learned
    return (*(None if t is None else t.detach().requires_grad_(t.requires_grad) for t in given), *settings)


@every_call
def test_is_registered_right(name: str) -> None:
    arguments = arguments_of(**CALLS[name])
    torch.library.opcheck(torch.ops.dydila_kernels.attention.default, arguments)
    detached = [t.detach() if isinstance(t, Tensor) else t for t in arguments]
    out, *saved = autograd.attention_forward(*detached)
    torch.library.opcheck(
        torch.ops.dydila_kernels.attention_backward.default,
        (torch.randn_like(out), *detached, *saved),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("complex_tables", [False, True])
def test_operators_and_compiled_graphs_give_the_bits_of_an_eager_call(complex_tables: bool, pairing: str) -> None:
    attn, x = layer_of(12, num_heads=2, normalization="denominator"), tokens(2, 9, 12)
    rotary: Any = on_device(2, 9, 6)
    if complex_tables:
        rotary = torch.polar(torch.ones(9, 3), torch.randn(9, 3)).to(DEVICE)
    arguments = {"rotary": rotary, "rotary_pairing": pairing}
    expected = layer_gradients(attn, attn, x, **arguments)
    assert_same_bits(by_operator(layer_gradients)(attn, attn, x, **arguments), expected)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    assert_same_bits(layer_gradients(attn, compiled, x, **arguments), expected)
    with torch.no_grad():
        assert torch.equal(compiled(x, **arguments), expected["output"])
        assert torch.equal(attn(x, **arguments), expected["output"])


def test_learned_tables_compile() -> None:
    attn, x, angles = layer_of(12, num_heads=2), tokens(2, 9, 12), torch.randn(9, 6).to(DEVICE).requires_grad_()
    found = []
    for call in (attn, torch.compile(attn, fullgraph=True, backend="aot_eager")):
        y = call(x, rotary=(angles.cos(), angles.sin()))
        found.append({"output": y.detach(), "angles": torch.autograd.grad(y.square().sum(), angles)[0]})
    assert found[0]["angles"].any()
    assert_same_bits(*found)


@pytest.mark.slow
def test_compiles_at_most_twice() -> None:
    attn = layer_of(8, num_heads=2)
    calls = []
    for batch, rows, columns in ((2, 3, 4), (3, 5, 2), (4, 6, 7)):
        arguments = {"HW": (rows, columns), "rotary": on_device(rows * columns, 4)}
        calls.append((tokens(batch, rows * columns, 8), arguments))
    counts = compilations(attn, calls)
    assert counts[-1] == counts[1] <= 2, counts


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict: bool) -> None:
    attn = layer_of(12, num_heads=2, dwc_branches=()).eval()
    cos, sin = on_device(9, 6)
    sizes: Any = {"x": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "rotary": ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})}
    program = torch.export.export(
        attn, (tokens(2, 9, 12),), {"rotary": (cos, sin)}, dynamic_shapes=sizes, strict=strict
    )
    called = {str(node.target) for node in program.graph.nodes}
    assert "dydila_kernels.attention.default" in called
    x, rotary = tokens(3, 14, 12), on_device(14, 6)
    assert relative_error(program.module()(x, rotary=rotary), attn(x, rotary=rotary)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    attn, x, rotary = layer_of(24, num_heads=2), tokens(2, 9, 24), on_device(9, 12)
    with torch.autocast(DEVICE, dtype):
        found = layer_gradients(attn, attn, x, rotary=rotary)
        assert attn(x, rotary=rotary).dtype == dtype
        attn.backend = "torch"
        expected = layer_gradients(attn, attn, x, rotary=rotary)
    for name, t in found.items():
        assert t.dtype == expected[name].dtype
        assert relative_error(t, expected[name]) < 8 * torch.finfo(dtype).eps, name


def test_second_derivatives_and_transforms(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error, and the torch backend."""
    q = (inputs := inputs_of(1, 5, 8))["q"].requires_grad_()
    rotary = on_device(5, 8)
    with pytest.raises(RuntimeError, match=r"no second derivatives .*; use backend='torch'"):
        y = dydila_attention(**inputs, rotary=rotary, backend="triton")
        torch.autograd.grad(y.square().sum(), q, create_graph=True)
    monkeypatch.setattr(core, "forward", lambda *_: pytest.fail("a kernel was called"))
    attn, x, rotary = layer_of(24, num_heads=2), tokens(2, 9, 24), on_device(9, 12)
    found = torch.func.jvp(lambda t: attn(t, rotary=rotary), (x,), (x,))[1]
    attn.backend = "torch"
    assert torch.equal(found, torch.func.jvp(lambda t: attn(t, rotary=rotary), (x,), (x,))[1]) and found.any()


@pytest.mark.parametrize("learned", [False, True])
def test_meta_device(learned: bool) -> None:
    attn = DyDiLAttention(24, 2, backend="triton", device="meta")
    x = torch.empty(2, 9, 24, device="meta", requires_grad=True)
    rotary = tuple(torch.empty(9, 12, device="meta", requires_grad=learned) for _ in range(2))
    y = attn(x, rotary=rotary)
    assert y.is_meta and y.shape == x.shape
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert all((t.grad is not None) == learned for t in rotary)


@pytest.mark.parametrize("length", [16, 40], ids=["scores", "states"])
def test_flops_are_those_of_wide_heads(length: int) -> None:
    """What rotates is not counted; the kernels and the meta device count alike."""
    x, rotary = tokens(2, length, 24).requires_grad_(), on_device(length, 24)
    counts = []
    for device in (DEVICE, "meta"):
        attn = DyDiLAttention(24, num_projectors=1, dwc_branches=(), backend="triton", device=device)
        t = x.detach().to(device).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            attn(t, rotary=[table.to(device) for table in rotary]).sum().backward()
        counts.append(counter.get_total_flops())
    attn = DyDiLAttention(24, num_projectors=1, dwc_branches=(), backend="torch", device="meta")
    with FlopCounterMode(display=False) as counter:
        attn(t, rotary=[table.to("meta") for table in rotary]).sum().backward()
    assert counts[0] == counts[1]
    assert length < 24 or counts[0] == counter.get_total_flops()


@pytest.mark.skipif(DEVICE != "cpu", reason="the ranks are processes on a CPU")
def test_tokens_on_two_ranks() -> None:
    on_ranks(2, spread_over_ranks, "triton")
