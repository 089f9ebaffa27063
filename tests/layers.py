"""Small layers, their outputs in every mode, and what tools do to a layer that leaves its function as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import assert_agree, with_distinct_factors

SUB_MODULES = ("qkv", "proj", "dwc", "projection_q", "projection_k", "measure", "differential")


def layer_of(**options: Any) -> tuple[DyDiLAttention, Tensor]:
    attn = with_distinct_factors(DyDiLAttention(8, **{"num_heads": 2, **options}, dtype=torch.float64))
    return attn, torch.randn(2, 16, 8, dtype=torch.float64)


def both_ways(attn: DyDiLAttention, x: Tensor, **arguments: Any) -> Tensor:
    """The output, which must be the same with gradients, without, and in inference mode."""
    out = attn(x, **arguments).detach()
    with torch.no_grad():
        assert_agree({"y": attn(x, **arguments)}, {"y": out}, 1e-11)
    with torch.inference_mode():
        assert_agree({"y": attn(x, **arguments)}, {"y": out}, 1e-11)
    return out


def gradients_of(attn: DyDiLAttention, x: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    out = attn(leaf)
    names = [name for name, p in attn.named_parameters() if p.requires_grad]
    wanted = [leaf, *(attn.get_parameter(name) for name in names)]
    found = torch.autograd.grad(out.square().sum(), wanted)
    return {"output": out.detach(), **dict(zip(["x", *names], found, strict=True))}


class CallsAnother(TorchDispatchMode):
    """Makes a call, say of another layer, once in so many operations of what is under it."""

    def __init__(self, call: Callable[[], object], every: int) -> None:
        super().__init__()
        self.call, self.every, self.count = call, every, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.count % self.every == 0:
            self.call()
        return func(*args, **(kwargs or {}))


# What leaves the function as it is: each takes a layer and the names of some sub-modules ------------------------------


def with_hooks(attn: DyDiLAttention, names: list[str]) -> None:
    for module in modules_of(attn, names):
        module.register_forward_pre_hook(lambda module, args: args)
        module.register_forward_hook(lambda module, args, out: out)
        module.register_full_backward_pre_hook(lambda module, grads: None)
        module.register_full_backward_hook(lambda module, *grads: None)


def with_wrapped_forwards(attn: DyDiLAttention, names: list[str]) -> None:
    def wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: forward(*args, **kwargs)

    for module in modules_of(attn, names):
        module.forward = wrapped(module.forward)


def with_nested_calls(attn: DyDiLAttention, names: list[str]) -> None:
    """Another layer of the same width is called before each of the modules, and in the backward pass."""
    other = DyDiLAttention(attn.dim, attn.num_heads, dtype=torch.float32)
    x = torch.randn(2, 9, attn.dim)

    def call(*_: Any) -> None:
        with torch.no_grad():
            other(x)
        with torch.inference_mode(False), torch.enable_grad():
            other(x).sum().backward()

    for module in modules_of(attn, names):
        module.register_forward_pre_hook(call)
        module.register_full_backward_hook(call)


def with_offloading(attn: DyDiLAttention, names: list[str]) -> None:
    """For inference alone, and of all parameters."""
    cpu_offload(attn, execution_device=torch.device("cpu"), offload_buffers=bool(names))


SURROUNDINGS: dict[str, Callable[[DyDiLAttention, list[str]], None]] = {
    "hooks": with_hooks,
    "wrapped forwards": with_wrapped_forwards,
    "nested calls": with_nested_calls,
    "offloading": with_offloading,
}


def modules_of(attn: DyDiLAttention, names: list[str]) -> list[nn.Module]:
    return [module for name in names if (module := getattr(attn, name)) is not None]
