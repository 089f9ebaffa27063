"""A layer whose sub-modules are hooked, replaced, cast, quantised, offloaded or sharded: as with any torch module."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from accelerate import cpu_offload, disk_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from diffusers.hooks import apply_layerwise_casting
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import assert_agree, relative_error
from tests.layers import SUB_MODULES, both_ways, layer_of

OPTIONS: list[dict[str, Any]] = [
    {"num_heads": 2},
    {"normalization": "denominator", "num_heads": 2, "router_gradient": "straight_through"},
    {"differential": "off", "dwc_branches": ("3x3", "identity")},
]
every_kind = pytest.mark.parametrize("options", OPTIONS, ids=str)


# Replaced forwards ----------------------------------------------------------------------------------------------------


def doubled(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return tuple(None if t is None else 2 * t for t in out) if isinstance(out, tuple) else 2 * out

    return call


@every_kind
@pytest.mark.parametrize("name", SUB_MODULES)
def test_a_replaced_forward_is_called(name: str, options: dict[str, Any]) -> None:
    attn, x = layer_of(**options)
    module = getattr(attn, name)
    if module is None:
        pytest.skip("this layer has no such module")
    before = both_ways(attn, x)
    module.forward = doubled(module.forward)
    assert relative_error(both_ways(attn, x), before) > 1e-4


@pytest.mark.parametrize("name", ["projection_q", "projection_k", "qkv", "proj"])
def test_a_replaced_forward_may_take_the_tokens_alone(name: str) -> None:
    attn, x = layer_of()
    module = getattr(attn, name)
    plain, before = module.forward, both_ways(attn, x)
    module.forward = lambda t: 2 * plain(t)
    if name == "proj":
        torch.testing.assert_close(both_ways(attn, x), 2 * before)
    else:
        assert relative_error(both_ways(attn, x), before) > 1e-4


class Casting(nn.Linear):
    """Keeps its weight in another dtype than it computes in."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


@pytest.mark.parametrize("names", [("qkv",), ("proj",), ("qkv", "proj")])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_linear_that_casts(names: tuple[str, ...], stored: torch.dtype) -> None:
    attn, x = layer_of()
    for name in names:
        linear = getattr(attn, name)
        casting = Casting(linear.in_features, linear.out_features, linear.bias is not None, dtype=torch.float64)
        casting.load_state_dict(linear.state_dict())
        casting.requires_grad_(False).to(stored)
        setattr(attn, name, casting)
        linear.weight.data = casting.weight.detach().double()
    twin = copy.deepcopy(attn)
    for name in names:
        setattr(twin, name, nn.Linear(8, getattr(attn, name).out_features, name == "proj", dtype=torch.float64))
        getattr(twin, name).load_state_dict({n: t.double() for n, t in getattr(attn, name).state_dict().items()})
    assert_agree({"y": both_ways(attn, x)}, {"y": both_ways(twin, x)}, 1e-12)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn])
def test_layerwise_casting_of_diffusers(storage: torch.dtype) -> None:
    attn, x = DyDiLAttention(8, 2).eval(), torch.randn(2, 16, 8)
    with torch.no_grad():
        for linear in (attn.qkv, attn.proj):  # what the storage holds exactly
            for parameter in linear.parameters():
                parameter.copy_(parameter.to(storage))
        expected = attn(x)
        apply_layerwise_casting(attn, storage_dtype=storage, compute_dtype=torch.float32)
        assert attn.proj.weight.dtype == storage
        assert_agree({"y": attn(x)}, {"y": expected}, 1e-6)
    assert_agree({"y": attn(x).detach()}, {"y": expected}, 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dynamic_quantisation() -> None:
    attn, x = DyDiLAttention(16, 2).eval(), torch.randn(2, 16, 16)
    with torch.no_grad():
        expected = attn(x)
        quantised = torch.ao.quantization.quantize_dynamic(attn, {nn.Linear}, dtype=torch.qint8)
        assert not isinstance(quantised.proj.weight, Tensor)
        assert relative_error(quantised(x), expected) < 0.1
        assert quantised.routing(x).usage.keys() == attn.routing(x).usage.keys()


class Adapted(nn.Module):
    """A low-rank update around a Linear, which has no weight of its own, as some LoRA tools wrap it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


def test_a_wrapper_without_a_weight() -> None:
    attn, x = layer_of()
    merged = copy.deepcopy(attn)
    for name in ("qkv", "proj"):
        setattr(attn, name, Adapted(getattr(attn, name)))
        adapted = getattr(attn, name)
        getattr(merged, name).weight.data += adapted.up.weight.data @ adapted.down.weight.data
    assert_agree({"y": both_ways(attn, x)}, {"y": both_ways(merged, x)}, 1e-11)
    attn(x).sum().backward()
    assert attn.proj.up.weight.grad is not None


# Hooks ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def global_hook(register: Callable[[Any], Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@every_kind
@pytest.mark.parametrize("name", SUB_MODULES)
def test_hooks_of_every_kind_fire(name: str, options: dict[str, Any]) -> None:
    attn, x = layer_of(**options)
    module = getattr(attn, name)
    if module is None:
        pytest.skip("this layer has no such module")
    expected = both_ways(attn, x)
    seen: list[str] = []
    module.register_forward_pre_hook(lambda *_: seen.append("before"))
    module.register_forward_hook(lambda *_: seen.append("after"))
    module.register_full_backward_hook(lambda *_: seen.append("backward"))
    module.register_full_backward_pre_hook(lambda *_: seen.append("before backward"))
    with torch.no_grad():
        assert_agree({"y": attn(x)}, {"y": expected}, 1e-11)
    assert seen == ["before", "after"]
    leaf = x.clone().requires_grad_()
    out = attn(leaf)
    assert_agree({"y": out.detach()}, {"y": expected}, 1e-11)
    out.sum().backward()
    assert seen.count("before") == seen.count("after") == 2
    assert seen.count("backward") == seen.count("before backward") == 1
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_a_hook_may_change_what_it_sees() -> None:
    attn, x = layer_of()
    before = both_ways(attn, x)
    attn.proj.register_forward_hook(lambda module, args, out: 2 * out)
    torch.testing.assert_close(both_ways(attn, x), 2 * before)


def test_global_hooks_fire() -> None:
    attn, x = layer_of()
    expected, seen = both_ways(attn, x), []
    register = torch.nn.modules.module.register_module_forward_hook
    with global_hook(register, lambda module, args, out: seen.append(module)), torch.no_grad():
        assert_agree({"y": attn(x)}, {"y": expected}, 1e-11)
    assert {type(module) for module in seen} >= {type(getattr(attn, name)) for name in SUB_MODULES}
    with global_hook(register, lambda module, args, out: 2 * out if module is attn.qkv else None):
        assert relative_error(both_ways(attn, x), expected) > 1e-4


def test_global_backward_hooks() -> None:
    attn, x = layer_of()
    x.requires_grad_()
    (expected,) = torch.autograd.grad(attn(x).square().sum(), x)
    seen: list[nn.Module] = []
    register = torch.nn.modules.module.register_module_full_backward_hook
    with global_hook(register, lambda module, *_: seen.append(module)):
        attn(x).square().sum().backward()
    assert x.grad is not None
    assert_agree({"dx": x.grad}, {"dx": expected}, 1e-11)
    assert attn.dwc in seen and attn.proj in seen


@pytest.mark.parametrize("mask", [False, True])
def test_a_hooked_convolution_has_the_same_gradients(mask: bool) -> None:
    attn, x = layer_of(num_heads=1)
    arguments = {"mask": torch.rand(2, 16) < 0.7} if mask else {}
    parameters = [p for p in attn.parameters() if p.requires_grad]

    def gradients() -> dict[str, Tensor]:
        leaf = x.clone().requires_grad_()
        found = torch.autograd.grad(attn(leaf, **arguments).square().sum(), [leaf, *parameters])
        return {str(i): t for i, t in enumerate(found)}

    expected = gradients()
    attn.dwc.register_full_backward_hook(lambda *_: None)
    attn.dwc.branches.register_full_backward_hook(lambda *_: None)
    assert_agree(gradients(), expected, 1e-11)


def test_sub_modules_may_be_sharded(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        attn, x = DyDiLAttention(8, 2), torch.randn(2, 16, 8)
        expected = attn(x).detach()
        for name in SUB_MODULES:
            sharded = copy.deepcopy(attn)
            fully_shard(getattr(sharded, name))
            out = sharded(x)
            assert_agree({name: out.detach()}, {name: expected}, 1e-6)
            out.sum().backward()
            with torch.no_grad():
                assert_agree({name: sharded(x)}, {name: expected}, 1e-6)
    finally:
        dist.destroy_process_group()


# Offloading -----------------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_cpu_offload(options: dict[str, Any], fused: bool, offload_buffers: bool) -> None:
    attn, x = layer_of(**options)
    attn = attn.fuse() if fused else attn.eval()
    with torch.no_grad():
        expected = attn(x)
        cpu_offload(attn, execution_device=torch.device("cpu"), offload_buffers=offload_buffers)
        assert all(p.is_meta for p in attn.parameters())
        assert_agree({"y": attn(x)}, {"y": expected}, 1e-11)
        assert all(p.is_meta for p in attn.parameters())


def test_disk_offload(tmp_path: Path) -> None:
    attn, x = layer_of()
    with torch.no_grad():
        expected = attn(x)
        disk_offload(attn, str(tmp_path), execution_device=torch.device("cpu"), offload_buffers=True)
        assert_agree({"y": attn(x)}, {"y": expected}, 1e-11)


def test_offload_of_the_layer_as_a_whole() -> None:
    """As diffusers' model offload does: one hook that also places the sub-modules."""
    attn, x = layer_of()
    expected = both_ways(attn, x)
    weights = {name: t.detach().clone() for name, t in attn.state_dict().items()}
    hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
    add_hook_to_module(attn, hook)
    with torch.no_grad():
        assert_agree({"y": attn(x)}, {"y": expected}, 1e-11)


def test_fuse_under_inference_mode() -> None:
    attn, x = layer_of()
    other, _ = layer_of()
    with torch.inference_mode():
        attn.fuse()
    attn.load_state_dict(other.state_dict())
    with torch.no_grad():
        assert_agree({"y": attn(x)}, {"y": other(x)}, 1e-11)
