"""Tokens on several ranks give what one process gives: values, gradients, training; and what is sent stays small."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import tests.interpreter as interpreter  # before the package, which may import Triton
from dydila_kernels import DyDiLAttention
from dydila_kernels.checks import DIFFERENTIALS, NORMALIZATIONS
from dydila_kernels.distributed import SequenceParallelAttention, gather_tokens, sequence_parallel, shard_tokens
from dydila_kernels.torch_backend import blocks
from tests.ranks import CLOSE, gradients, on_ranks

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "scaling.md"
RECIPES = dict(re.findall(r"```{code-block} python\n:name: (\w+)\n\n(.*?)```", GUIDE.read_text("utf-8"), re.DOTALL))
KEPT: dict[str, Any] = {}
"""What a recipe made, until its process ends: when DDP goes with the last of a group, gloo can wait for ever."""
ROUNDED = {"rtol": 1e-4, "atol": 1e-5}  # float32


def uneven(length: int, *given: int | None) -> list[int]:
    """Lengths, of which the one not given is the rest."""
    return [length - sum(n or 0 for n in given) if n is None else n for n in given]


def assert_same(
    attn: DyDiLAttention,
    group: DeviceMesh,
    HW: tuple[int, ...],
    lengths: list[int],
    *,
    masked: bool = False,
    batch: int = 3,
    close: dict[str, float] = CLOSE,
) -> None:
    """Outputs and all gradients of the layer on a group's ranks are those of the layer on one."""
    length = attn.num_prefix_tokens + math.prod(HW)
    x = torch.randn(batch, length, attn.dim, dtype=attn.proj.weight.dtype, requires_grad=True)
    mask = torch.rand(batch, length) > 0.3 if masked else None
    incoming = torch.randn_like(x)

    def part(t: Tensor | None) -> Tensor | None:
        return None if t is None else shard_tokens(t, group, lengths=lengths)

    attn.zero_grad()
    whole, spread = attn, sequence_parallel(copy.deepcopy(attn), group)
    assert spread.state_dict().keys() == whole.state_dict().keys()
    y = whole(x, mask, HW=HW)
    y.backward(incoming)
    mine = part(x).detach().requires_grad_()
    y_mine = spread(mine, part(mask), HW=HW)
    y_mine.backward(part(incoming))
    torch.testing.assert_close(y_mine, part(y), **close)
    torch.testing.assert_close(mine.grad, part(x.grad), **close)
    shares = gradients(spread)
    expected = gradients(whole)
    assert shares.keys() == expected.keys()  # on every rank, or DDP would stop
    for name, share in shares.items():
        dist.all_reduce(share, group=group.get_group())
        torch.testing.assert_close(share, expected[name], **close, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(spread(mine, part(mask), HW=HW, lengths=lengths), part(y), **close)


def options_and_cuts(four: DeviceMesh, two: DeviceMesh) -> None:
    """Each way to subtract with each way to normalise; the other options, and the cuts, take turns."""
    cuts = {
        4: [(5, 5, 5, None), (0, 1, None, 5), (2, None, 0, 7), (None, 0, 0, 0)],
        2: [(8, None), (0, None), (13, None), (None, 1)],
    }
    turn = 0
    for differential in DIFFERENTIALS:
        for normalization in NORMALIZATIONS:
            for small in (False, True):
                group, prefix = (four, two)[turn % 2], (0, 3)[turn // 2 % 2]
                attn = DyDiLAttention(
                    8, 1 + turn % 3 % 2, differential=differential, normalization=normalization, qkv_bias=True,
                    num_projectors=0 if differential == "off" and small else 3, num_prefix_tokens=prefix,
                    router_gradient=("none", "straight_through")[turn // 3 % 2], dtype=torch.float64,
                )  # fmt: skip
                before, blocks.CPU_BLOCK = blocks.CPU_BLOCK, 48 if small else blocks.CPU_BLOCK  # of two rows
                lengths = uneven(20 + prefix, *cuts[group.size()][turn % 4])
                assert_same(attn, group, (5, 4), lengths, masked=bool(turn // 2 % 2) ^ small)
                blocks.CPU_BLOCK = before
                turn += 1


def grids(four: DeviceMesh, two: DeviceMesh) -> None:
    """Rows and columns of one, fewer tokens than ranks, branches, none, nothing at all, and lower precision."""
    layer = DyDiLAttention(8, 2, dtype=torch.float64)
    for HW, cut in (((1, 9), (2, 3, 1, None)), ((9, 1), (2, 0, 1, None)), ((1, 2), (0, 1, 0, None)), ((3, 3), None)):
        lengths = uneven(HW[0] * HW[1], *(cut or (3, 3, 3, None)))
        assert_same(layer, four, HW, lengths)
    assert_same(DyDiLAttention(8, dwc_branches=("3x3", "identity"), dtype=torch.float64), two, (4, 3), [7, 5], batch=1)
    assert_same(DyDiLAttention(8, dwc_branches=(), dtype=torch.float64), four, (4, 4), [1, 2, 6, 7])
    assert_same(layer, two, (0, 4), [0, 0])
    assert_same(layer, two, (2, 2), [1, 3], batch=0)
    assert_same(DyDiLAttention(16, 2), four, (4, 4), [1, 2, 6, 7], masked=True, close=ROUNDED)


def low_precision(two: DeviceMesh) -> None:
    """In bfloat16 the ranks are as near to the truth as one process is; a fused layer without gradients too."""
    attn = DyDiLAttention(16, 2)
    x = torch.randn(2, 64, 16)
    truth = attn.double()(x.double())
    attn.float()
    with torch.autocast("cpu", torch.bfloat16):
        alone = attn(x)
        spread = sequence_parallel(copy.deepcopy(attn), two)(shard_tokens(x, two, lengths=[23, 41]))
    assert spread.dtype == torch.bfloat16
    error, floor = (spread - shard_tokens(truth, two, lengths=[23, 41])).norm(), (alone - truth).norm()
    assert error < 2 * floor
    fused = sequence_parallel(copy.deepcopy(attn).fuse(), two)
    with torch.no_grad():
        torch.testing.assert_close(fused(shard_tokens(x, two)), shard_tokens(attn(x), two), **ROUNDED)


def triton(mesh: DeviceMesh) -> None:
    """The kernels, in Triton's interpreter, in both of their forms; on one pair of ranks."""
    from dydila_kernels.ops import core

    if mesh["dp"].get_local_rank():
        return
    half = {"rtol": 1e-2, "atol": 1e-2}
    largest = core.LARGEST_HEAD
    for differential, normalization, gradient, lengths, widest, dtype in (
        ("token", "length", "straight_through", [5, 7], largest, torch.float32),
        ("map", "denominator", "none", [0, 12], largest, torch.float32),
        ("token", "none", "none", [3, 9], 4, torch.float16),
        ("map", "denominator", "straight_through", [7, 5], 4, torch.float32),
        ("off", "length", "none", [12, 0], 4, torch.float32),
    ):
        core.LARGEST_HEAD = widest
        attn = DyDiLAttention(
            16, 2, differential=differential, normalization=normalization, router_gradient=gradient, backend="triton",
            dtype=dtype,
        )  # fmt: skip
        close = half if dtype == torch.float16 else ROUNDED
        assert_same(attn, mesh["sp"], (3, 4), lengths, masked=normalization == "length", batch=1, close=close)
    core.LARGEST_HEAD = largest


class Sent:
    """Bytes that this rank hands to each collective."""

    def __enter__(self) -> dict[str, int]:
        self.found = dict.fromkeys(("all_reduce", "all_gather", "all_to_all_single"), 0)
        self.kept = {name: getattr(dist, name) for name in self.found}
        dist.all_reduce = lambda t, *args, **kwargs: self.count("all_reduce", t.nbytes, t, *args, **kwargs)
        dist.all_gather = lambda to, t, **kwargs: self.count("all_gather", t.nbytes, to, t, **kwargs)
        dist.all_to_all_single = self.all_to_all_single
        return self.found

    def count(self, name: str, n: int, *args: Any, **kwargs: Any) -> Any:
        self.found[name] += n
        return self.kept[name](*args, **kwargs)

    def all_to_all_single(self, to: Tensor, t: Tensor, counts: list[int], given: list[int], group: Any) -> Any:
        n = sum(given) - given[dist.get_rank(group)]
        return self.count("all_to_all_single", n * t.itemsize, to, t, counts, given, group=group)

    def __exit__(self, *_: object) -> None:
        for name, function in self.kept.items():
            setattr(dist, name, function)


def bytes_sent(four: DeviceMesh) -> None:
    """Those of the guide's formula, for each pass, whatever the number of rows of the grid."""
    B, d, H, columns = 2, 16, 2, 8
    for differential, maps in (("token", 1), ("map", 2)):
        attn = sequence_parallel(DyDiLAttention(d, H, differential=differential), four)
        found = []
        for rows in (4, 32):
            x = torch.randn(B, rows * columns // 4, d)
            with Sent() as forward:
                y = attn(x, HW=(rows, columns))
            with Sent() as backward:
                y.sum().backward()
            sides = 1 if four.get_local_rank() in (0, 3) else 2
            state, halo = maps * B * d * (d // H) * 4, sides * B * columns * d * 4
            assert forward == {"all_reduce": state, "all_to_all_single": halo, "all_gather": 8 * 10}, forward
            assert backward == {"all_reduce": state, "all_to_all_single": halo, "all_gather": 0}, backward
            with Sent() as told:
                attn(x, HW=(rows, columns), lengths=[rows * 2] * 4)
            assert told["all_gather"] == 0
            found.append((forward, backward))
        assert found[0] == found[1]


class Model(nn.Module):
    """Two residual layers; a linear layer before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)
        self.layers = nn.ModuleList([DyDiLAttention(8, 2, router_gradient="straight_through") for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        for layer in self.layers:
            x = x + layer(x)
        return self.outer(x)


def composition(mesh: DeviceMesh) -> None:
    """Two pairs of ranks, under DDP and FSDP2: the gradients of the mean over all images, by both recipes for the loss.

    Even where the image is cut unevenly, and with each layer run again in the backward pass.
    """
    whole = Model().double()
    x, target = torch.randn(2, 3, 36, 4, dtype=torch.float64), torch.randn(2, 3, 36, 4, dtype=torch.float64)
    nn.functional.mse_loss(whole(x.flatten(0, 1)), target.flatten(0, 1)).backward()
    expected = gradients(whole)
    mine, wanted = x[mesh["dp"].get_local_rank()], target[mesh["dp"].get_local_rank()]
    sp, lengths = mesh["sp"], [13, 23]

    def shares(y: Tensor) -> Tensor:
        errors = nn.functional.mse_loss(y, shard_tokens(wanted, sp, lengths=lengths), reduction="sum")
        return errors / wanted.numel() * sp.size()

    def gathered(y: Tensor) -> Tensor:
        return nn.functional.mse_loss(gather_tokens(y, sp), wanted)

    for loss in (shares, gathered):
        for wrap in (DistributedDataParallel, sharded, rerun):
            model = sequence_parallel(copy.deepcopy(whole), sp)
            model.zero_grad()
            wrapped = wrap(model)
            loss(wrapped(shard_tokens(mine, sp, lengths=lengths))).backward()
            found = gradients(model)
            assert found.keys() == expected.keys()
            for name, grad in found.items():
                grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
                torch.testing.assert_close(grad, expected[name], **CLOSE, msg=lambda m, name=name: f"{name}: {m}")

    model = sequence_parallel(copy.deepcopy(whole), sp)
    model.zero_grad()
    (shares(model(shard_tokens(mine, sp, lengths=lengths))) / sp.size()).backward()
    exec(RECIPES["sum"], {"model": model, "dist": dist, "sp": sp})
    for name, grad in gradients(model).items():
        dist.all_reduce(grad, group=mesh["dp"].get_group())
        torch.testing.assert_close(grad / mesh["dp"].size(), expected[name], **CLOSE)


def sharded(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer)
    assert all(isinstance(layer, SequenceParallelAttention) for layer in model.layers)
    return fully_shard(model)


def rerun(model: nn.Module) -> nn.Module:
    for layer in model.layers:
        layer.forward = checkpointed(layer.forward)
    return DistributedDataParallel(model)


def checkpointed(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args: torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def refusals(two: DeviceMesh) -> None:
    """What differs between ranks is an error on all of them, and they go on together after it."""
    rank, attn = two.get_local_rank(), sequence_parallel(DyDiLAttention(8), two)
    x = torch.randn(2, 8, 8)
    with pytest.raises(ValueError, match=rf"same dtype; rank {rank} of 2 has torch.float(32|64)"):
        copy.deepcopy(attn).to((torch.float32, torch.float64)[rank])(x.to((torch.float32, torch.float64)[rank]))
    with pytest.raises(ValueError, match="same batch size"):
        attn(x[rank:])
    with pytest.raises(ValueError, match=r"same HW; rank . of 2 has \(., .\)"):
        attn(x, HW=((4, 4), (2, 8))[rank])
    with pytest.raises(ValueError, match="same mask"):
        attn(x, torch.ones(2, 8, dtype=torch.bool) if rank else None)
    with pytest.raises(ValueError, match=r"same layer; rank . of 2 has SequenceParallelAttention"):
        sequence_parallel(DyDiLAttention(8, normalization=("none", "length")[rank]), two)(x)
    with pytest.raises(ValueError, match="same need of gradients"), torch.set_grad_enabled(bool(rank)):
        attn(x)
    refused = (RuntimeError, "rank 1 of 2 refused"), (ValueError, r"\(B, N, d\)")
    with pytest.raises(refused[rank][0], match=refused[rank][1]):
        attn(x[0] if rank else x)
    with pytest.raises(ValueError, match=r"HW=.* is needed where N is no square; got N = 14"):
        attn(x[:, :7])
    with pytest.raises(ValueError, match="same dtype"):
        gather_tokens(x.to((torch.float32, torch.float64)[rank]), two)
    assert attn(x).shape == x.shape


def everything() -> None:
    """On four ranks: a group of four, and two of two beside each other."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    four = init_device_mesh("cpu", (4,))
    for check, groups in (
        (options_and_cuts, (four, mesh["sp"])),
        (grids, (four, mesh["sp"])),
        (low_precision, (mesh["sp"],)),
        (bytes_sent, (four,)),
        (composition, (mesh,)),
        (refusals, (mesh["sp"],)),
        *([(triton, (mesh,))] if interpreter.INTERPRETED else []),
    ):
        torch.manual_seed(0)
        check(*groups)


# Tests --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ranks_give_what_one_process_gives() -> None:
    on_ranks(4, everything)


def recipe(script: str) -> None:
    """A script of the guide, as torchrun would start it."""
    exec(script, KEPT)
    assert KEPT["loss"].isfinite() and len(KEPT["optimizer"].state)
    if "y" in KEPT:
        assert KEPT["y"].shape == (4, 256, 8)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "sequence"])
def test_recipes_of_the_guide_run(name: str) -> None:
    on_ranks(2, recipe, RECIPES[name])
