"""DyDiLAttention on the kernels: every option, the convolution, routing, and what it keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_map_only

from dydila_kernels import DyDiLAttention
from dydila_kernels.ops import core
from dydila_kernels.testing import relative_error
from tests.ops.helpers import (
    DEVICE,
    DTYPES,
    assert_same_bits,
    compare_layer,
    layer_of,
    layer_results,
    tokens,
    use_gemm,
    use_tiles,
)

OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 2, "qkv_bias": True, "proj_bias": False},
    {"router_gradient": "straight_through", "num_projectors": 1, "dwc_branches": ("3x3", "identity")},
    {"normalization": "denominator", "num_heads": 2, "dwc_branches": ()},
    {"differential": "map", "num_heads": 2, "router_gradient": "straight_through", "num_prefix_tokens": 2},
    {"differential": "off", "num_projectors": 0, "normalization": "none", "dwc_branches": ("1x3", "1x1")},
    {"differential": "off", "router_gradient": "straight_through", "num_kernel_factors": 1},
]


@pytest.mark.parametrize("form", ["fused", "gemm"])
@pytest.mark.parametrize("i", range(len(OPTIONS)))
def test_error_is_that_of_plain_pytorch(i: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a grid that is not square; each option in one format with either form."""
    if form == "gemm":
        use_gemm(monkeypatch)
    attn = layer_of(24, dtype=DTYPES[(i + (form == "gemm")) % 3], **OPTIONS[i])
    compare_layer(attn, 15 + attn.num_prefix_tokens, HW=(3, 5))


PACKED: dict[str, Any] = {"HW": [(2, 3), (0, 0), (4, 5)], "cu_seqlens": [0, 7, 8, 29]}


@pytest.mark.parametrize("form", ["fused", "gemm"])
@pytest.mark.parametrize("kind", ["mask", "packed"])
def test_the_convolution_of_masked_and_packed_images(kind: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a prefix token; a packed image may be nothing but that."""
    use_tiles(monkeypatch)
    if form == "gemm":
        use_gemm(monkeypatch)
    attn = layer_of(16, dtype=torch.float16 if kind == "mask" else torch.bfloat16, num_prefix_tokens=1)
    if kind == "mask":
        compare_layer(attn, 19, HW=(3, 6), mask=torch.rand(1, 19, device=DEVICE) < 0.7)
    else:
        compare_layer(attn, 29, **PACKED)


def both(attn: DyDiLAttention, x: Tensor, **arguments: Any) -> None:
    """The torch backend, where it decides alike, gives the same to rounding."""
    found, routing = layer_results(attn, x, **arguments), attn.routing(x, arguments.get("mask"))
    attn.backend = "torch"
    expected, other = layer_results(attn, x, **arguments), attn.routing(x, arguments.get("mask"))
    assert_same_bits(routing.indices, other.indices)
    assert_same_bits(routing.usage, other.usage)
    assert found.keys() == expected.keys()
    for name, t in found.items():
        assert t.shape == expected[name].shape and t.dtype == expected[name].dtype
        assert relative_error(t, expected[name]) < 2e-5, name


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_equals_the_torch_backend(options: dict[str, Any]) -> None:
    attn = layer_of(24, **options)
    both(attn, tokens(2, 9 + attn.num_prefix_tokens, 24))


@pytest.mark.parametrize(
    "arguments",
    [{"mask": torch.arange(58).view(2, 29).to(DEVICE) % 4 != 1, "HW": (4, 7)}, PACKED],
    ids=["mask", "packed"],
)
def test_equals_the_torch_backend_for_masked_and_packed_images(arguments: dict[str, Any]) -> None:
    both(layer_of(24, num_prefix_tokens=1), tokens(2 if "mask" in arguments else 1, 29, 24), **arguments)


@pytest.mark.parametrize(("dim", "num_heads"), [(144, 2), (136, 1)])
def test_heads_of_72_and_of_136_channels(dim: int, num_heads: int) -> None:
    both(layer_of(dim, num_heads=num_heads), tokens(1, 9, dim))


def test_large_images_in_float16() -> None:
    """With "none" the output grows with N, not what is on the way to it."""
    attn = layer_of(16, dtype=torch.float16, normalization="none")
    compare_layer(attn, 144, seeds=1)


@pytest.mark.parametrize("form", ["fused", "gemm"])
@pytest.mark.parametrize("differential", ["token", "map", "off"])
def test_routing_names_the_decisions_taken(differential: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "gemm":
        use_gemm(monkeypatch)
    used: list[Tensor] = []
    forward = core.forward

    def spy(*arguments: Any) -> Any:
        out, saved = forward(*arguments)
        used.append(saved.indices)
        return out, saved

    monkeypatch.setattr(core, "forward", spy)
    attn, x = layer_of(24, differential=differential, dtype=torch.bfloat16), tokens(2, 16, 24, dtype=torch.bfloat16)
    attn(x)
    indices = attn.routing(x).indices
    (decided, _) = used
    for i, side in enumerate("qk"):
        names = [f"measure_{side}", f"measure_{side}_redundant", f"differential_{side}"]
        for j, name in enumerate(names):
            if name in indices:
                assert torch.equal(decided[i, j].view(2, 16).long(), indices[name]), name
    assert len(indices) == {"token": 8, "map": 7, "off": 4}[differential]


def test_balance_loss() -> None:
    attn, x = layer_of(24, router_gradient="straight_through"), tokens(2, 16, 24)
    losses = []
    for backend in ("triton", "torch"):
        attn.backend = backend
        attn.zero_grad()
        loss = attn.balance_loss(x)
        loss.backward()
        grads = [p.grad for name, p in attn.named_parameters() if "router" in name]
        losses.append([loss.detach(), *grads])
    assert all(g is not None and g.any() for g in losses[0])
    for found, expected in zip(*losses, strict=True):
        assert relative_error(found, expected) < 1e-4


def test_hooks_on_the_convolution_fire() -> None:
    """And then it runs by itself, with the same result."""
    attn, x = layer_of(24), tokens(2, 16, 24)
    expected = layer_results(attn, x)
    calls = []
    assert attn.dwc is not None
    for handle in (
        attn.dwc.register_forward_hook(lambda *_: calls.append("after")),
        attn.dwc.register_forward_pre_hook(lambda *_: calls.append("before")),
    ):
        found = layer_results(attn, x)
        handle.remove()
        for name, t in found.items():
            assert relative_error(t, expected[name]) < 1e-5, name
    assert sorted(set(calls)) == ["after", "before"]
    assert_same_bits(layer_results(attn, x), expected)


def test_keeps_x_the_projections_and_the_attention() -> None:
    """Tensors as large as x: x itself, q, k and v in one, q', k', and the input of the output projection."""
    attn, x = layer_of(16, dtype=torch.bfloat16), tokens(4, 64, 16, dtype=torch.bfloat16).requires_grad_()
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        attn(x)
    known = {p.untyped_storage()._cdata for p in attn.parameters()}
    large = [size for storage, size in saved.items() if storage not in known and size >= x.nbytes]
    rows = 4 * 64
    statistics = rows * 2 * 2 * 3 * 4  # in float32, and as large as x where d is 16
    assert sorted(large) == sorted([x.nbytes] * 4 + [3 * x.nbytes] + [statistics])


@pytest.mark.parametrize("form", ["fused", "gemm"])
@pytest.mark.parametrize("options", [{}, {"differential": "map"}, {"differential": "off", "num_projectors": 0}])
def test_the_gradient_of_qkv_is_not_copied(options: dict[str, Any], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless qkv is hooked: then it has memory of its own."""
    if form == "gemm":
        use_gemm(monkeypatch)
    attn, x = layer_of(16, num_heads=2, **options), tokens(2, 9, 16).requires_grad_()
    y, found = attn(x).sum(), []
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        y.backward()
    assert "aten::cat" not in {event.name for event in profiler.events()}
    plain = attn.qkv.weight.grad.clone()
    attn.zero_grad()
    attn.qkv.register_full_backward_hook(lambda module, inputs, outputs: found.append(outputs[0]))
    attn(x).sum().backward()
    assert [t.is_contiguous() for t in found] == [True]
    assert torch.equal(attn.qkv.weight.grad, plain)


def test_no_gradient_stays_none() -> None:
    class Nothing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, y: Tensor) -> Tensor:
            return y.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> None:
            return None

    attn, x = layer_of(16, num_heads=2), tokens(2, 9, 16).requires_grad_()
    Nothing.apply(attn(x)).sum().backward()
    given = {name for name, p in attn.named_parameters() if p.grad is not None}
    assert not {name for name in given if not name.startswith("proj.")}


def replaced(attn: DyDiLAttention) -> None:
    weight, bias = attn.dwc()
    attn.dwc.forward = lambda: (weight, bias)  # type: ignore[method-assign]


class Unwrapped(Tensor):
    """A parameter without memory, which is made when an operation asks for it."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Unwrapped:
        made = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*tree_map_only(Unwrapped, lambda t: t.inner, args), **(kwargs or {}))
        return Unwrapped(found) if function is torch.ops.aten.detach.default else found


CHANGES = {
    "a smaller kernel by a hook": lambda attn: attn.dwc.branches.register_forward_hook(
        lambda module, inputs, kernels: {**kernels, "1x3": kernels["1x3"][:1]}
    ),
    "a smaller first kernel by a hook": lambda attn: attn.dwc.branches.register_forward_hook(
        lambda module, inputs, kernels: {**kernels, "3x3": kernels["3x3"][:1]}
    ),
    "another forward": replaced,
    "a hook that takes no argument": lambda attn: attn.dwc.register_forward_pre_hook(
        lambda module, inputs: None if not inputs else inputs[0].no_such_attribute
    ),
    "a kernel that is made when asked for": lambda attn: attn.dwc.branches.__setitem__(
        "3x3", torch.nn.Parameter(Unwrapped(attn.dwc.branches["3x3"].detach()), requires_grad=False)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_convolutions_that_are_not_as_they_were(change: str) -> None:
    attn, x = layer_of(16), tokens(2, 9, 16)
    CHANGES[change](attn)
    found, attn.backend = attn(x), "torch"
    assert relative_error(found, attn(x)) < 1e-5


def test_the_backward_pass_is_compiled() -> None:
    """By compiled autograd, which traces what no operator hides."""
    attn, x = layer_of(16), tokens(2, 9, 16)
    attn(x).sum().backward()
    expected = {name: p.grad.clone() for name, p in attn.named_parameters() if p.grad is not None}
    attn.zero_grad()
    y = attn(x).sum()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        y.backward()
    for name, grad in expected.items():
        assert relative_error(attn.get_parameter(name).grad, grad) < 1e-5, name


@pytest.mark.usefixtures("poisoned")
def test_nothing_reads_uninitialised_memory() -> None:
    for arguments in ({"mask": torch.rand(1, 29, device=DEVICE) < 0.7, "HW": (4, 7)}, PACKED):
        attn, x = layer_of(24, num_prefix_tokens=1), tokens(1, 29, 24)
        found = layer_results(attn, x, **arguments)
        assert all(t.isfinite().all() for t in found.values())
        assert_same_bits(layer_results(attn, x, **arguments), found)


def test_what_cannot_run_says_why() -> None:
    with pytest.raises(RuntimeError, match="not 129"):
        layer_of(8, num_projectors=129)(tokens(1, 4, 8))
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        layer_of(8, dtype=torch.float64)(tokens(1, 4, 8, dtype=torch.float64))
