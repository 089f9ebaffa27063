"""The kernels as operators of torch: registration, compilation, export, autocast, and other derivatives."""

from __future__ import annotations

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import fresh_cache
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dydila_kernels import DyDiLAttention
from dydila_kernels.ops import autograd, backend, core, operators, projection
from dydila_kernels.testing import Tensors, relative_error
from dydila_kernels.types import Grid
from tests.ops.helpers import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    attend,
    inputs_of,
    layer_of,
    operator_arguments,
    tokens,
    use_gemm,
)
from tests.test_export import OnImage

CONFIGURATIONS: list[dict[str, Any]] = [
    {"num_heads": 2},
    {"normalization": "denominator", "router_gradient": "straight_through", "num_prefix_tokens": 1},
    {"differential": "map", "qkv_bias": True, "router_gradient": "straight_through"},
    {"differential": "off", "num_projectors": 0, "dwc_branches": ()},
]
pytestmark = pytest.mark.usefixtures("fresh_compiler")
every_kind = pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=str)


def arguments_of(
    *, batch: int = 2, length: int = 6, dtype: torch.dtype = torch.float32, convolved: bool = True, **options: Any
) -> tuple[Any, ...]:
    """Those of the operator ``attention``, all floating-point tensors in need of a gradient."""
    inputs = inputs_of(batch, length, 12, dtype, differential=options.get("differential", "token"))
    convolution = (torch.randn(12, 1, 3, 3, device=DEVICE), torch.randn(12, device=DEVICE)) if convolved else None
    grids = [Grid(0, 2, length // 2)] if convolved else []
    given, settings = operator_arguments(inputs, convolution=convolution, grids=grids, **options)
    return (*(None if t is None else t.detach().requires_grad_() for t in given), *settings)


CALLS: dict[str, dict[str, Any]] = {
    "token": {},
    "denominator, straight through": {"normalization": "denominator", "router_gradient": "straight_through"},
    "map, mask": {"differential": "map", "convolved": False, "mask": torch.arange(12).view(2, 6).to(DEVICE) % 3 != 0},
    "off, bfloat16": {"differential": "off", "normalization": "none", "dtype": torch.bfloat16},
    "packed": {"batch": 1, "length": 14, "cu_seqlens": [0, 1, 1, 14], "convolved": False},
}
every_call = pytest.mark.parametrize(
    ("name", "by_gemm"), [(name, False) for name in CALLS] + [("token", True), ("map, mask", True)]
)


@every_call
def test_attention_is_registered_right(name: str, by_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_gemm:
        use_gemm(monkeypatch)
    torch.library.opcheck(torch.ops.dydila_kernels.attention.default, arguments_of(**CALLS[name]))


@every_call
def test_attention_backward_is_registered_right(name: str, by_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if by_gemm:
        use_gemm(monkeypatch)
    arguments = [t.detach() if isinstance(t, Tensor) else t for t in arguments_of(**CALLS[name])]
    out, *saved = autograd.attention_forward(*arguments)
    torch.library.opcheck(
        torch.ops.dydila_kernels.attention_backward.default,
        (torch.randn_like(out), *arguments, *saved),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_projection_is_registered_right() -> None:
    x, weight = tokens(2, 6, 12).requires_grad_(), tokens(3, 12, 8).requires_grad_()
    ops = torch.ops.dydila_kernels
    torch.library.opcheck(ops.route.default, (x.detach(), [tokens(12, 3), tokens(12, 5)]))
    index = backend.route(x.detach(), [tokens(12, 3)] * 2)
    torch.library.opcheck(ops.plan.default, (index, 3))
    plan = backend.plan(index, 3)[1]
    torch.library.opcheck(ops.projection.default, (x, weight, *plan))
    grad = tokens(2, 6, 8)
    torch.library.opcheck(ops.projection_backward.default, (grad, x.detach(), weight.detach(), *plan))


def by_operator(function: Any) -> Any:
    """With the dispatcher in between, which an eager call bypasses."""

    def call(*arguments: Any, **keywords: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            for module in (operators, autograd):
                patch.setattr(module, "can_bypass_dispatcher", lambda _: False)
            return function(*arguments, **keywords)

    return call


def layer_gradients(attn: DyDiLAttention, call: Any, x: Tensor, *arguments: Any, **keywords: Any) -> Tensors:
    """The output, and the gradients of x and of all trainable parameters."""
    leaf = x.clone().requires_grad_()
    trainable = {name: p for name, p in attn.named_parameters() if p.requires_grad}
    out = call(leaf, *arguments, **keywords)
    found = torch.autograd.grad(out.float().square().sum(), [leaf, *trainable.values()])
    return {"output": out.detach(), **dict(zip(["x", *trainable], found, strict=True))}


@pytest.mark.parametrize(("i", "by_gemm"), [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True)])
def test_operators_and_compiled_graphs_give_the_bits_of_an_eager_call(
    i: int, by_gemm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by_gemm:
        use_gemm(monkeypatch)
    attn = layer_of(12, **CONFIGURATIONS[i])
    x = tokens(2, 9 + attn.num_prefix_tokens, 12)
    expected = layer_gradients(attn, attn, x)
    assert_same_bits(by_operator(layer_gradients)(attn, attn, x), expected)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    found = layer_gradients(attn, compiled, x)
    if attn.router_gradient == "straight_through":  # the routers of the projections are torch's: sums in another order
        for name in [name for name in found if name == "x" or name.startswith("projection")]:
            assert relative_error(found[name], expected.pop(name)) < 1e-6, name
            del found[name]
    assert_same_bits(found, expected)
    with torch.no_grad():
        assert torch.equal(compiled(x), expected["output"])


@pytest.mark.parametrize(
    "arguments",
    [{"mask": torch.arange(20).view(2, 10).to(DEVICE) % 3 != 0}, {"HW": [(1, 2), (3, 2)], "cu_seqlens": [0, 3, 10]}],
    ids=["mask", "packed"],
)
def test_compiles_with_masks_and_packed_images(arguments: dict[str, Any]) -> None:
    attn = layer_of(24, num_prefix_tokens=1)
    x = tokens(1 if "HW" in arguments else 2, 10, 24)
    compiled = torch.compile(attn, fullgraph=True, backend="aot_eager")
    assert_same_bits(layer_gradients(attn, compiled, x, **arguments), layer_gradients(attn, attn, x, **arguments))


@pytest.mark.slow
@pytest.mark.parametrize("by_gemm", [False, True])
def test_a_new_length_or_batch_size_compiles_once(by_gemm: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward; for wide heads also where N passes d, and the products change their order."""
    if by_gemm:
        use_gemm(monkeypatch)
    attn = layer_of(12)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(attn, fullgraph=True, backend=counter)
    counts = []
    for batch, side in ((2, 2), (3, 3), (2, 4), (4, 3)):
        x = tokens(batch, side * side, 12)
        found = layer_gradients(attn, compiled, x, HW=(side, side))
        for name, t in layer_gradients(attn, attn, x, HW=(side, side)).items():
            assert relative_error(found[name], t) < 1e-6, name
        counts.append(counter.frame_count)
    assert counts[-1] == counts[1] <= 2, counts


@pytest.mark.slow
def test_compiles_with_the_default_backend() -> None:
    attn, x = layer_of(24, num_heads=2), tokens(2, 9, 24)
    with fresh_cache():  # the cache knows operators by name, not by what they are at present
        found = layer_gradients(attn, torch.compile(attn, fullgraph=True), x)
    for name, t in layer_gradients(attn, attn, x).items():
        assert relative_error(found[name], t) < 1e-5, name


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict: bool) -> None:
    """For any batch and any grid; a saved program finds the operators again."""
    attn = layer_of(24, num_heads=2).eval()
    model = OnImage(attn.fuse() if strict else attn)
    sizes = ({0: Dim.DYNAMIC, 1: Dim.DYNAMIC, 2: Dim.DYNAMIC},)
    program = torch.export.export(model, (tokens(2, 3, 4, 24),), dynamic_shapes=sizes, strict=strict)
    called = {str(node.target) for node in program.graph.nodes}
    assert {"dydila_kernels.attention.default", "dydila_kernels.projection.default"} <= called
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    for call, size in ((program.module(), (3, 5, 2)), (loaded.module(), (1, 2, 4))):
        x = tokens(*size, 24)
        assert relative_error(call(x), model(x)) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_under_autocast(dtype: torch.dtype) -> None:
    """As the torch backend, eager and compiled."""
    attn, x = layer_of(24), tokens(2, 9, 24)
    with torch.autocast(DEVICE, dtype):
        found = layer_gradients(attn, attn, x)
        compiled = layer_gradients(attn, torch.compile(attn, fullgraph=True, backend="aot_eager"), x)
        assert attn(x).dtype == dtype
        attn.backend = "torch"
        expected = layer_gradients(attn, attn, x)
    for name, t in found.items():
        assert t.dtype == expected[name].dtype
        assert relative_error(t, expected[name]) < 8 * torch.finfo(dtype).eps, name
        assert relative_error(compiled[name], t) < 4 * torch.finfo(dtype).eps, name


@every_kind
def test_without_gradients_the_same_bits(configuration: dict[str, Any]) -> None:
    """Under no_grad, in inference mode, in a copy, and fused but for the sum of the convolution."""
    attn = layer_of(24, **configuration)
    x = tokens(2, 9 + attn.num_prefix_tokens, 24)
    expected = attn(x).detach()
    with torch.no_grad():
        assert torch.equal(attn(x), expected)
    with torch.inference_mode():
        assert torch.equal(attn(x), expected)
        assert relative_error(copy.deepcopy(attn).fuse()(x), expected) < 1e-6


def test_checkpoints_and_copies_give_the_same_bits() -> None:
    attn, x = layer_of(24, router_gradient="straight_through"), tokens(2, 9, 24)
    expected = layer_gradients(attn, attn, x)
    assert_same_bits(layer_gradients(attn, lambda t: checkpoint(attn, t, use_reentrant=False), x), expected)
    twin = copy.deepcopy(attn)
    assert_same_bits(layer_gradients(twin, twin, x), expected)


def test_a_selective_checkpoint_keeps_the_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run once, and the gradients are the same to the bit."""
    attn, x = layer_of(24), tokens(2, 9, 24)
    expected = layer_gradients(attn, attn, x)
    calls = []
    forward = core.forward
    monkeypatch.setattr(core, "forward", lambda *arguments: calls.append(1) or forward(*arguments))
    kept = partial(create_selective_checkpoint_contexts, [torch.ops.dydila_kernels.attention.default])
    for context, count in ((kept, 1), (None, 2)):
        calls.clear()
        options = {} if context is None else {"context_fn": context}
        found = layer_gradients(attn, lambda t, o=options: checkpoint(attn, t, use_reentrant=False, **o), x)
        assert_same_bits(found, expected)
        assert len(calls) == count


# Other derivatives


@pytest.mark.parametrize("around", [True, False])
def test_a_second_derivative_is_a_clear_error(around: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (operators, autograd):
        monkeypatch.setattr(module, "can_bypass_dispatcher", lambda _: around)
    message = "no second derivatives .*; use backend='torch'"
    q = (inputs := inputs_of(1, 5, 8))["q"].requires_grad_()
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(attend(inputs).square().sum(), q, create_graph=True)
    x = tokens(1, 5, 8).requires_grad_()
    (plan,) = backend.plan(backend.route(x.detach(), [tokens(8, 3)]), 3)
    projected = backend.project(x, tokens(3, 8, 8), plan)
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(projected.square().sum(), x, create_graph=True)


def test_transforms_take_the_torch_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """jvp, dual numbers, vmap and grad: right numbers, without a kernel."""
    attn, x, tangent = layer_of(24), tokens(2, 9, 24), tokens(2, 9, 24)
    by_kernels = layer_gradients(attn, attn, x)
    monkeypatch.setattr(core, "forward", lambda *_: pytest.fail("a kernel was called"))
    monkeypatch.setattr(projection, "route", lambda *_: pytest.fail("a kernel was called"))
    twin = copy.deepcopy(attn)
    twin.backend = "torch"
    primal, expected = torch.func.jvp(twin, (x,), (tangent,))
    assert expected.norm() > 0.1
    for found in (torch.func.jvp(attn, (x,), (tangent,)), dual(attn, x, tangent)):
        assert relative_error(found[0], primal) < 1e-6 and relative_error(found[1], expected) < 1e-6
    assert relative_error(torch.func.vmap(attn)(x[:, None])[:, 0], primal) < 1e-5
    assert relative_error(torch.func.grad(lambda t: attn(t).square().sum())(x), by_kernels["x"]) < 1e-4


def dual(attn: DyDiLAttention, x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(attn(forward_ad.make_dual(x, tangent)))
        assert found.tangent is not None
        return found.primal, found.tangent


@pytest.mark.parametrize("name", ["v", "gamma", "kernel_routers"])
def test_a_tangent_of_one_argument_alone_is_not_lost(name: str) -> None:
    inputs = inputs_of(1, 5, 8)

    def call(t: Tensor, backend: str = "triton") -> Tensor:
        return attend({**inputs, name: t}) if backend == "triton" else dydila_torch({**inputs, name: t})

    direction = torch.randn_like(inputs[name])
    found = torch.func.jvp(call, (inputs[name],), (direction,))[1]
    expected = torch.func.jvp(lambda t: call(t, "torch"), (inputs[name],), (direction,))[1]
    assert torch.equal(found, expected) and found.any() == (name != "kernel_routers")


def dydila_torch(inputs: Tensors) -> Tensor:
    from dydila_kernels import dydila_attention

    return dydila_attention(**inputs, backend="torch")
