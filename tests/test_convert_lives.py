"""A stranger's life with a swapped model of each kind: training, checkpointing, EMA, DDP, threads, saving, loading."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from dydila_kernels import DyDiLAttention, repeat_replacement, replace_attention
from tests.natives import LightningDiT, NativeSana
from tests.ranks import on_ranks
from tests.test_convert_models import ROWS
from tests.zoo import MODELS, Model

SWAPPED = [name for name in MODELS if ROWS[name][0] != "-"]
QUICK = {"diffusers `SanaTransformer2DModel`, Sana 1.5", "diffusers `SanaVideoTransformer3DModel`", "LightningDiT"}
ALIKE = (
    "Sana 1.0",
    "ControlNet",
    "UNetMotion",
    "UNetSpatio",
    "UNet3D",
    "DiTTransformer",
    "PixArtTransformer",
    "DiT, timm",
)
"""Of a kind with others that are trained here, or in test_convert_calls.py."""
KINDS = [name for name in SWAPPED if not any(part in name for part in ALIKE)]


def each(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


def swapped(entry: Model) -> tuple[nn.Module, Any]:
    model = entry.make()
    report = replace_attention(model)
    for layer in report.swapped:
        assert layer.new.dwc is not None
        layer.new.dwc.reset_parameters()
    return model, report


def target_of(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(2))


def loss_of(entry: Model, model: nn.Module, x: Tensor) -> Tensor:
    y = entry.run(model, x)
    return F.mse_loss(y, target_of(y))


def recomputing(model: nn.Module, report: Any) -> None:
    """Activation checkpointing of each block that holds a new layer, as a stranger adds it."""
    for block in {model.get_submodule(layer.name.rpartition(".")[0]) for layer in report.swapped}:

        def forward(*args: Any, inner: Any = block.forward, **kwargs: Any) -> Any:
            return checkpoint(inner, *args, use_reentrant=False, **kwargs)

        block.forward = forward


@pytest.mark.parametrize("name", each(KINDS))
def test_a_swapped_model_trains_averages_saves_and_loads(name: str, tmp_path: Path) -> None:
    """A hundred steps under activation checkpointing, with a moving average of the weights."""
    entry = MODELS[name]
    model, report = swapped(entry)
    x = entry.latents()
    plain = copy.deepcopy(model)
    recomputing(model, report)
    loss_of(entry, model.eval(), x).backward()
    loss_of(entry, plain.eval(), x).backward()
    for (key, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, key=key: f"{key}: {text}")

    average = AveragedModel(plain, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = loss_of(entry, model, x)
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10]), losses[::10]
    for layer in report.swapped:
        for key, p in layer.new.named_parameters():
            assert p.isfinite().all() and (p.grad is not None or not p.requires_grad), key

    torch.save({"model": average.module.state_dict(), "recipe": report.recipe()}, tmp_path / "model.pt")
    saved = torch.load(tmp_path / "model.pt", weights_only=True)
    fresh = entry.build().eval()
    repeat_replacement(fresh, saved["recipe"])
    fresh.load_state_dict(saved["model"])
    with torch.no_grad():
        out = entry.run(average.module, x)
        assert torch.equal(entry.run(fresh, x), out)
        assert F.mse_loss(out, target_of(out)) < losses[0]


@pytest.mark.parametrize("name", SWAPPED)
def test_two_threads_share_a_swapped_model(name: str) -> None:
    """Each with a size of its own, unless the model has one size, or keeps that of its last call."""
    entry = MODELS[name]
    model, _ = swapped(entry)
    model.eval()
    x = entry.latents()
    inputs = [x, -x if isinstance(model, LightningDiT | NativeSana) else x.mT.contiguous()]
    start = Barrier(2)

    def repeated(x: Tensor) -> list[Tensor]:
        start.wait()
        with torch.no_grad():
            return [entry.run(model, x) for _ in range(3)]

    with torch.no_grad():
        expected = [entry.run(model, x) for x in inputs]
    with ThreadPoolExecutor(2) as pool:
        for outs, out in zip(pool.map(repeated, inputs), expected, strict=True):
            assert all(torch.equal(one, out) for one in outs)


def train_on_ranks(names: list[str]) -> None:
    """Half of a batch on each rank gives the gradients of the whole, and the same weights after a step."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for name in names:
        torch.manual_seed(0)
        entry = MODELS[name]
        model, _ = swapped(entry)
        model = model.double().eval()
        x = torch.cat([entry.latents(), entry.latents().roll(1, -1)])[:: entry.shape[0]].double()
        whole = copy.deepcopy(model)
        entry.run(whole, x[:1]).square().sum().backward()
        entry.run(whole, x[1:]).square().sum().backward()
        # Not all parameters of the networks have a part in every call; those of the new layers have.
        ranks = DistributedDataParallel(model, find_unused_parameters=True)
        entry.run(ranks, x[rank : rank + 1]).square().sum().backward()
        for p, q in zip(model.parameters(), whole.parameters(), strict=True):
            if q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad / 2, rtol=1e-5, atol=1e-6)
        assert any(isinstance(m, DyDiLAttention) for m in model.modules())
    dist.destroy_process_group()


@pytest.mark.slow
def test_data_parallel_gradients_are_those_of_one_process() -> None:
    on_ranks(2, train_on_ranks, KINDS)
