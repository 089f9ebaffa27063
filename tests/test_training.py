"""What a training loop does to the parameters: optimizers, clipping, and averages of the weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import relative_error


def matrices_by_muon(attn: DyDiLAttention) -> list[torch.optim.Optimizer]:
    """The stacks of projectors (n_P, d, d) are no matrices."""
    matrices = [p for p in attn.parameters() if p.ndim == 2 and p.requires_grad]
    others = [p for p in attn.parameters() if p.ndim != 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=3e-3)]


OPTIMIZERS: dict[str, Callable[[DyDiLAttention], list[torch.optim.Optimizer]]] = {
    "SGD": lambda attn: [torch.optim.SGD(attn.parameters(), lr=0.3, momentum=0.9)],
    "AdamW": lambda attn: [torch.optim.AdamW(attn.parameters(), lr=3e-3, weight_decay=0.1)],
    "fused AdamW": lambda attn: [torch.optim.AdamW(attn.parameters(), lr=3e-3, fused=True)],
    "Adafactor": lambda attn: [torch.optim.Adafactor(attn.parameters(), lr=0.03)],
    "Muon": matrices_by_muon,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("router_gradient", ["none", "straight_through"])
def test_optimizers_train_what_is_trainable(name: str, router_gradient: str) -> None:
    """With clipped gradients; fixed routers stay as they are to the bit, whatever the weight decay."""
    if name == "Muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    attn = DyDiLAttention(16, 2, router_gradient=router_gradient)
    x, target = torch.randn(4, 16, 16), torch.randn(4, 16, 16)
    before = copy.deepcopy(dict(attn.named_parameters()))
    optimizers, losses = OPTIMIZERS[name](attn), []
    for _ in range(20):
        loss = (attn(x) - target).square().mean()
        attn.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(attn.parameters(), 0.1)
        grads = [p.grad for p in attn.parameters() if p.grad is not None]
        assert torch.stack([g.norm() for g in grads]).norm() <= min(0.1, norm.item()) * (1 + 1e-5)
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.97 * losses[0]
    for parameter_name, parameter in attn.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == parameter.requires_grad, parameter_name


def test_muon_refuses_the_stacked_projectors() -> None:
    """As the guide says."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    projection = DyDiLAttention(8).projection_q
    assert projection is not None
    with pytest.raises(ValueError, match="2D"):
        torch.optim.Muon([projection.weight])


@pytest.mark.parametrize("router_gradient", ["none", "straight_through"])
def test_averages_of_the_weights(router_gradient: str) -> None:
    """The mean is a layer: it can be fused and served, and the trained layer goes on."""
    attn, x = DyDiLAttention(8, 2, router_gradient=router_gradient), torch.randn(2, 16, 8)
    average = AveragedModel(attn, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    optimizer = torch.optim.AdamW(attn.parameters(), lr=0.1)
    wanted: dict[str, Any] = {}
    for step in range(3):
        attn.zero_grad()
        attn(x).square().mean().backward()
        optimizer.step()
        average.update_parameters(attn)
        for name, p in attn.named_parameters():
            now = p.detach().clone()
            wanted[name] = now if step == 0 else (wanted[name] + now) / 2
    served = copy.deepcopy(average.module)
    for name, p in served.named_parameters():
        assert p.equal(wanted[name]) if not p.requires_grad else relative_error(p, wanted[name]) < 1e-6, name
    expected: Tensor = average(x).detach()
    assert relative_error(served.fuse()(x), expected) < 1e-6
    assert not average.module.fused and relative_error(attn(x), expected) > 1e-3
