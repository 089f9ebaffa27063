"""Sequence parallelism in a group of one process: the layer itself, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dydila_kernels import DyDiLAttention
from dydila_kernels.distributed import gather_tokens, sequence_parallel, shard_tokens


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("alone")
class TestOneRank:
    def test_is_the_layer(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), DyDiLAttention(8, num_prefix_tokens=2))
        x = torch.randn(2, 14, 8)
        y = model(x[:, :11]), model[1](x, HW=(3, 4))
        names = model.state_dict().keys()
        assert sequence_parallel(model) is model is sequence_parallel(model)
        assert model.state_dict().keys() == names
        assert isinstance(model[1], DyDiLAttention) and "on 1 ranks" in repr(model[1])
        torch.testing.assert_close((model(x[:, :11]), copy.deepcopy(model)[1](x, HW=(3, 4))), y)

    def test_compiles_around_it(self) -> None:
        model = nn.Sequential(nn.Linear(8, 8), sequence_parallel(DyDiLAttention(8)), nn.ReLU())
        x = torch.randn(2, 9, 8)
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), model(x))

    def test_shards_and_gathers(self) -> None:
        x = torch.randn(2, 5, 3, requires_grad=True)
        assert shard_tokens(x, lengths=[5]).shape == x.shape
        gathered = gather_tokens(shard_tokens(x))
        gathered.backward(x)
        assert torch.equal(gathered, x) and torch.equal(x.grad, x)

    @pytest.mark.parametrize(
        ("error", "message", "arguments"),
        [
            (ValueError, "cu_seqlens must be None", {"cu_seqlens": [0, 9]}),
            (ValueError, "is_causal must be False", {"is_causal": True}),
            (ValueError, r"HW must multiply to N = 9; got 2 x 4 = 8", {"HW": (2, 4)}),
            (ValueError, r"lengths must hold one number for each of 1 ranks; got \[4, 5\]", {"lengths": [4, 5]}),
            (ValueError, r"lengths must say 9 for rank 0, .* got \[8\]", {"lengths": [8]}),
            (TypeError, "lengths must be an int; got float", {"lengths": [9.0]}),
            (TypeError, "mask must be bool", {"mask": torch.ones(2, 9)}),
        ],
    )
    def test_refuses(self, error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
        with pytest.raises(error, match=message):
            sequence_parallel(DyDiLAttention(8))(torch.randn(2, 9, 8), **arguments)

    def test_refuses_what_it_cannot_differentiate(self) -> None:
        layer, x = sequence_parallel(DyDiLAttention(8)), torch.randn(2, 9, 8, requires_grad=True)
        with pytest.raises(RuntimeError, match=r"no torch\.func"):
            torch.func.jvp(layer, (x,), (x,))
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="balance_loss needs all tokens"):
            layer.balance_loss(x)

    def test_refuses_other_modules_and_groups(self) -> None:
        layer = DyDiLAttention(8)
        with pytest.raises(ValueError, match="must hold a DyDiLAttention; got a Linear without"):
            sequence_parallel(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"as mesh\['sp'\] is; got 2 dimensions"):
            sequence_parallel(layer, init_device_mesh("cpu", (1, 1)))
        with pytest.raises(TypeError, match="group must be a ProcessGroup or DeviceMesh"):
            sequence_parallel(layer, dist.GroupMember.NON_GROUP_MEMBER)
        with pytest.raises(ValueError, match="lengths must sum to N = 5"):
            shard_tokens(torch.randn(1, 5, 2), lengths=[4])
        with pytest.raises(TypeError, match="fully_shard comes after sequence_parallel; got FSDPDyDiLAttention"):
            sequence_parallel(fully_shard(layer))
