"""Sequence parallelism of swapped models: two ranks give what one process gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint

from dydila_kernels import replace_attention
from dydila_kernels.distributed import SequenceParallelAttention, gather_tokens, sequence_parallel, shard_tokens
from tests.models import ViT, call, dit, image, new_layers, random_convolutions
from tests.ranks import CLOSE, gradients, on_ranks

ROWS, COLUMNS = 6, 4


def blocks_of(model: nn.Module) -> nn.ModuleList:
    return model.blocks if isinstance(model, ViT) else model.transformer_blocks


def spread(model: nn.Module, group: DeviceMesh, lengths: list[int]) -> nn.Module:
    """The tokens are cut before the first block and gathered behind the last."""
    sequence_parallel(model, group)
    assert all(isinstance(layer, SequenceParallelAttention) for layer in new_layers(model))
    blocks = blocks_of(model)

    def shard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return (shard_tokens(args[0], group, lengths=lengths), *args[1:]), kwargs

    blocks[0].register_forward_pre_hook(shard, with_kwargs=True)
    blocks[-1].register_forward_hook(lambda module, args, out: gather_tokens(out, group, lengths=lengths))
    return model


def step(model: nn.Module, x: Tensor, share: float) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    y = call(model, x)
    (y.square().sum() * share).backward()
    return y.detach(), gradients(model)


def equal_one_process(make: Callable[[], nn.Module], checkpointed: bool) -> None:
    group = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    whole = make().double().eval()
    report = replace_attention(whole)
    assert report.swapped and not report.kept
    random_convolutions(whole)
    for parameter in whole.parameters():  # adaLN starts at zero, and hides the attention
        nn.init.normal_(parameter, std=0.2) if not parameter.any() else None
    x = image(whole, 2 * ROWS, 2 * COLUMNS).double()
    expected, truth = step(whole, x, 1.0)
    tokens = ROWS * COLUMNS + (whole.num_prefix_tokens if isinstance(whole, ViT) else 0)
    for lengths in ([tokens // 2, tokens - tokens // 2], [5, tokens - 5], [tokens, 0]):
        model = spread(copy.deepcopy(whole), group, lengths)
        if checkpointed:
            for block in blocks_of(model):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        found, shares = step(model, x, 1 / group.size())
        torch.testing.assert_close(found, expected, **CLOSE)
        assert shares.keys() == truth.keys()
        for name, grad in shares.items():
            dist.all_reduce(grad, group=group.get_group())
            torch.testing.assert_close(grad, truth[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
        with torch.no_grad():
            torch.testing.assert_close(call(model, x), expected, **CLOSE)


def everything() -> None:
    for make in (dit, ViT):
        for checkpointed in (False, True):
            equal_one_process(make, checkpointed)


@pytest.mark.slow
def test_two_ranks_on_a_swapped_model_give_what_one_process_gives() -> None:
    on_ranks(2, everything)
