"""torch.compile without graph breaks or needless recompiles, torch.export, and the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from dydila_kernels import DyDiLAttention, dydila_attention
from dydila_kernels.testing import TOKENS, core_inputs, relative_error, with_distinct_factors

CONFIGURATIONS: list[dict[str, Any]] = [
    {"num_heads": 2},
    {"normalization": "denominator", "router_gradient": "straight_through", "num_prefix_tokens": 1},
    {"differential": "map", "num_heads": 2, "qkv_bias": True},
    {"differential": "off", "num_projectors": 0, "dwc_branches": ()},
]
pytestmark = pytest.mark.usefixtures("fresh_compiler")
every_kind = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)


def layer_of(configuration: dict[str, Any], dtype: torch.dtype = torch.float64) -> tuple[DyDiLAttention, Tensor]:
    attn = with_distinct_factors(DyDiLAttention(8, **configuration, dtype=dtype))
    return attn, torch.randn(2, 9 + attn.num_prefix_tokens, 8, dtype=dtype)


def assert_same(attn: nn.Module, compiled: Any, x: Tensor, tolerance: float, *arguments: Any, **keywords: Any) -> None:
    """Outputs and gradients, with gradients recorded and without."""
    parameters = [p for p in attn.parameters() if p.requires_grad]
    results = []
    for call in (compiled, attn):
        leaf = x.clone().requires_grad_()
        out = call(leaf, *arguments, **keywords)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, *parameters])])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < tolerance
    with torch.no_grad():
        assert relative_error(compiled(x, *arguments, **keywords), results[1][0]) < tolerance


@pytest.mark.slow
@every_kind
def test_compiles_in_one_graph(configuration: dict[str, Any]) -> None:
    attn, x = layer_of(configuration)
    assert_same(attn, torch.compile(attn, fullgraph=True, backend="aot_eager"), x, 1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mask", "HW", "cu_seqlens"])
def test_compiles_with_every_argument(kind: str) -> None:
    attn, x = layer_of({"num_prefix_tokens": 1})
    arguments: dict[str, dict[str, Any]] = {
        "mask": {"mask": torch.rand(2, 10) < 0.7},
        "HW": {"HW": (1, 9)},
        "cu_seqlens": {"HW": [(1, 2), (3, 2)], "cu_seqlens": [0, 3, 10]},
    }
    x = x[:1] if kind == "cu_seqlens" else x
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    assert_same(attn, compiled, x, 1e-11, **arguments[kind])


def test_compiles_fused_in_inference_mode() -> None:
    attn, x = layer_of({"num_heads": 2})
    attn.fuse()
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        assert relative_error(compiled(x), attn(x)) < 1e-12


def test_compiles_under_autocast() -> None:
    attn, x = layer_of({"num_heads": 2}, torch.float32)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(x), attn(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    assert relative_error(found.float(), expected.float()) < 0.02


def test_the_core_compiles() -> None:
    inputs = core_inputs(2, 9, 8)
    compiled = torch.compile(dydila_attention, fullgraph=True, backend="aot_eager")
    assert relative_error(compiled(**inputs, num_heads=2), dydila_attention(**inputs, num_heads=2)) < 1e-12


@pytest.mark.slow
def test_compiles_with_the_default_backend() -> None:
    attn, x = layer_of({"num_heads": 2}, torch.float32)
    results = []
    for call in (torch.compile(attn, fullgraph=True), attn):
        leaf = x.clone().requires_grad_()
        out = call(leaf)
        results.append([out, *torch.autograd.grad(out.square().sum(), [leaf, attn.qkv.weight, attn.measure.gamma])])
    for found, expected in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("given", ["HW", "square"])
def test_a_new_resolution_or_batch_size_compiles_once(given: str) -> None:
    """The second shape makes N and B symbols; every further one reuses that graph."""
    attn, _ = layer_of({"num_heads": 2})
    attn.requires_grad_(False)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attn, fullgraph=True, backend=counter)
    counts = []
    for batch, side in ((2, 4), (3, 5), (4, 6), (6, 9)):
        x = torch.randn(batch, side * side, 8, dtype=torch.float64)
        arguments = {"HW": (side, side)} if given == "HW" else {}
        assert relative_error(compiled(x, **arguments), attn(x)) < 1e-12
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 2, counts


@pytest.mark.slow
def test_the_core_compiles_once_for_all_lengths() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dydila_attention, fullgraph=True, backend=counter)
    tables = {name: t for name, t in core_inputs(1, 1, 8).items() if name not in TOKENS}
    counts = []
    for batch, length in ((2, 16), (3, 25), (4, 7), (5, 64)):
        tokens = {name: t for name, t in core_inputs(batch, length, 8).items() if name in TOKENS}
        expected = dydila_attention(**tokens, **tables, num_heads=2)
        assert relative_error(compiled(**tokens, **tables, num_heads=2), expected) < 1e-12
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 2, counts


@pytest.mark.parametrize(
    ("configuration", "strict"),
    [(configuration, strict) for i, configuration in enumerate(CONFIGURATIONS) for strict in (True, False)
     if strict or i < 2],
    ids=str,
)  # fmt: skip
def test_exports(configuration: dict[str, Any], strict: bool) -> None:
    attn, x = layer_of(configuration)
    program = torch.export.export(attn, (x,), strict=strict)
    assert relative_error(program.module()(x), attn(x)) < 1e-12


@pytest.mark.parametrize("strict", [True, False])
def test_exports_with_a_dynamic_batch(strict: bool) -> None:
    attn, x = layer_of({"num_heads": 2})
    program = torch.export.export(attn, (x,), dynamic_shapes=({0: torch.export.Dim("batch", max=64)},), strict=strict)
    other = torch.randn(5, 9, 8, dtype=torch.float64)
    assert relative_error(program.module()(other), attn(other)) < 1e-12


@every_kind
def test_meta_device(configuration: dict[str, Any]) -> None:
    """Built without memory, called for shapes, then given memory and the weights of another."""
    attn, x = layer_of(configuration)
    empty = DyDiLAttention(8, **configuration, device="meta", dtype=torch.float64)
    assert all(p.is_meta for p in empty.parameters())
    out = empty(torch.empty(x.shape, device="meta", dtype=torch.float64))
    assert out.is_meta and out.shape == x.shape and out.dtype == torch.float64
    routing, expected = empty.routing(torch.empty_like(x, device="meta")), attn.routing(x)
    for name, usage in routing.usage.items():
        assert usage.is_meta and usage.shape == expected.usage[name].shape
        assert routing.indices[name].shape == expected.indices[name].shape
    empty.to_empty(device="cpu").load_state_dict(attn.state_dict())
    assert torch.equal(empty(x), attn(x))
    with torch.device("meta"):
        assigned = DyDiLAttention(8, **configuration, dtype=torch.float64)
    assigned.load_state_dict(attn.state_dict(), assign=True)
    assert torch.equal(assigned(x), attn(x))


def test_reset_parameters_initialises_all_after_the_meta_device() -> None:
    attn = DyDiLAttention(8, router_gradient="straight_through", device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.fill_(float("nan"))
    for module in attn.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert all(p.isfinite().all() for p in attn.parameters())
    assert (attn.measure.gamma == 3).all()
    assert attn(torch.randn(2, 9, 8)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_another_dtype(dtype: torch.dtype) -> None:
    attn, x = layer_of({}, torch.float32)
    expected = attn(x)
    assert {p.dtype for p in attn.to(dtype).parameters()} == {dtype}
    assert relative_error(attn(x.to(dtype)), expected) < 20 * max(torch.finfo(dtype).eps, 1e-6)


def test_a_compiled_layer_multiplies_each_token_by_one_projector() -> None:
    """Where not the whole layer is an operator to the compiler (with norms, say), the routed projection is: with eight
    projectors no more work than with one."""
    products = []
    for projectors in (1, 8):
        attn = DyDiLAttention(16, num_projectors=projectors, qk_norm="rms")
        counted: list[int] = []

        def count(graph: torch.fx.GraphModule, _: Any, counted: list[int] = counted) -> Any:
            counted.append(sum("matmul" in str(node.target) or "mm" in str(node.target) for node in graph.graph.nodes))
            names = {str(node.target) for node in graph.graph.nodes}
            assert any("grouped_projection" in name for name in names), names
            return graph

        torch._dynamo.reset()
        x = torch.randn(2, 9, 16)
        assert relative_error(torch.compile(attn, fullgraph=True, backend=count)(x), attn(x)) < 1e-5
        products.append(counted)
    assert products[0] == products[1]
