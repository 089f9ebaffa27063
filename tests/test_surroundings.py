"""Smallest cases of what surrounds a layer: offloading, sharding, wrappers, subclasses, patched classes, numbers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dydila_kernels import DyDiLAttention, replace_attention
from dydila_kernels.testing import assert_agree
from tests.layers import both_ways, layer_of
from tests.models import ViT

# routing() and balance_loss() read projections without calling them --------------------------------------------------


def offloaded(attn: DyDiLAttention) -> None:
    accelerate = pytest.importorskip("accelerate")
    accelerate.cpu_offload(nn.Sequential(attn), execution_device=torch.device("cpu"))


def test_routing_of_an_offloaded_layer() -> None:
    attn, x = layer_of()
    expected = attn.routing(x).indices
    offloaded(attn)
    assert_agree(attn.routing(x).indices, expected, 0)


def test_balance_loss_of_an_offloaded_layer() -> None:
    attn, x = layer_of(router_gradient="straight_through")
    expected = attn.balance_loss(x).detach()
    offloaded(attn)
    assert_agree({"loss": attn.balance_loss(x).detach()}, {"loss": expected}, 1e-12)


class Wrapper(nn.Module):
    """As LoRA tools put around a module; peft's for ``target_parameters`` is such a one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("method", ["routing", "balance_loss"])
def test_wrapped_projection(method: str) -> None:
    attn, x = layer_of(router_gradient="straight_through")
    attn.projection_q = Wrapper(attn.projection_q)  # type: ignore[assignment,arg-type]
    both_ways(attn, x)
    getattr(attn, method)(x)


def test_routing_follows_a_router_that_a_pre_hook_makes() -> None:
    attn, x = layer_of()
    assert attn.projection_q is not None
    nn.utils.weight_norm(attn.projection_q, "router", dim=1)
    with torch.no_grad():
        attn.projection_q.router_v.normal_()  # type: ignore[operator,union-attr]
    before = attn.routing(x).indices
    attn(x)
    assert_agree(before, attn.routing(x).indices, 0)


# Modules that return their parameters themselves ----------------------------------------------------------------------


@pytest.mark.parametrize(("name", "parameter"), [("measure", "gamma"), ("differential", "lam"), ("dwc", "weight")])
def test_parameters_may_go_away_after_the_forward_of_their_module(name: str, parameter: str) -> None:
    """As tools do that offload or shard: ``p.data`` is put in place before a module's forward, and taken away after."""
    attn, x = layer_of()
    attn.fuse()
    with torch.no_grad():
        expected = attn(x)
    p = getattr(getattr(attn, name), parameter)
    kept, gone = p.data, p.data.new_empty(0)
    p.data = gone

    def onload(module: nn.Module, args: tuple[Any, ...]) -> None:
        p.data = kept

    def offload(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        p.data = gone

    getattr(attn, name).register_forward_pre_hook(onload)
    getattr(attn, name).register_forward_hook(offload)
    with torch.no_grad():
        assert_agree({"y": attn(x)}, {"y": expected}, 1e-12)


SHARDED = """
import sys, tempfile, torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.layers import layer_of
dist.init_process_group("gloo", init_method=f"file://{tempfile.mkdtemp()}/init", rank=0, world_size=1)
attn, x = layer_of()
if sys.argv[2] == "fused":
    attn.fuse()
with torch.no_grad():
    expected = attn(x)
mesh = init_device_mesh("cpu", (1,))
fully_shard(attn.get_submodule(sys.argv[1]), mesh=mesh)
fully_shard(attn, mesh=mesh)
with torch.no_grad():
    assert torch.allclose(attn(x), expected)
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("name", "fused"),
    [("measure", "unfused"), ("measure", "fused"), ("differential", "unfused"), ("differential", "fused"),
     ("dwc", "fused")],
)  # fmt: skip
def test_sharded_sub_module_of_a_sharded_layer(name: str, fused: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, name, fused],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


# The rest of the layer ------------------------------------------------------------------------------------------------


def test_a_changed_forward_of_all_linears(monkeypatch: pytest.MonkeyPatch) -> None:
    attn, x = layer_of()
    plain = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, t: 2 * plain(self, t))
    both_ways(attn, x)


class Subclass(Tensor):
    pass


def test_tokens_of_a_tensor_subclass() -> None:
    attn, x = layer_of()
    expected = attn(x).detach()
    assert_agree({"y": attn(x.as_subclass(Subclass)).detach().as_subclass(Tensor)}, {"y": expected}, 1e-12)


@pytest.mark.parametrize("HW", [{"rows": 4, "columns": 4}, {4, 5}, torch.tensor(4), np.array(4), b"\x04\x04"])
def test_a_grid_that_is_no_pair(HW: Any) -> None:
    attn, x = layer_of()
    with pytest.raises(TypeError, match="HW must be"):
        attn(x, HW=HW)


def test_second_derivative_of_an_exported_layer() -> None:
    attn, x = layer_of()
    exported, leaf = torch.export.export(attn, (x,)).module(), x.clone().requires_grad_()

    def second(function: Any) -> Tensor:
        (grad,) = torch.autograd.grad(function(leaf).square().sum(), leaf, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), leaf)[0]

    assert_agree({"x": second(exported)}, {"x": second(attn)}, 1e-10)


# Swapped models -------------------------------------------------------------------------------------------------------


def images() -> Tensor:
    return torch.randn(2, 1, 16, 16)


def swapped_layers(model: nn.Module) -> list[DyDiLAttention]:
    return [m for m in model.modules() if isinstance(m, DyDiLAttention)]


@pytest.mark.parametrize("grid", [(4,), (2, 2, 4, 4), 4])
def test_a_function_that_returns_no_grid(grid: Any) -> None:
    model = ViT()
    replace_attention(model, HW=lambda *args, **kwargs: grid)
    with pytest.raises((TypeError, ValueError), match="HW"):
        model(images())


def test_numpy_heads_of_the_old_layer() -> None:
    model = ViT()
    for module in model.modules():
        if hasattr(module, "num_heads"):
            module.num_heads = np.int64(module.num_heads)  # type: ignore[assignment,call-overload]
    replace_attention(model)
    assert swapped_layers(model)


def test_numpy_prefix_tokens_of_the_model() -> None:
    model = ViT()
    model.num_prefix_tokens = np.int64(1)  # type: ignore[assignment]
    replace_attention(model)
    assert all(layer.num_prefix_tokens == 1 for layer in swapped_layers(model))


def test_a_failed_backward_pass_is_forgotten() -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, t: Tensor) -> Tensor:
            return t.view_as(t)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise ArithmeticError

    model = ViT()
    replace_attention(model)
    grid = swapped_layers(model)[0].grid
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            model(Fails.apply(images().requires_grad_())).sum().backward()
    model(images()).sum().backward()
    assert not grid.backward  # type: ignore[operator,union-attr]
