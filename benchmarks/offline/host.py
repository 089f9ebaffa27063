"""What a call of the layer costs the host: ``python -m benchmarks.offline.host``.

A default layer in bfloat16, so small that torch's arithmetic on the CPU takes hardly any time, is called as it would be
on a GPU, up to the launches: those bind their arguments and look the kernel up, as Triton does, and reach no device.
What a driver takes to queue a kernel is not in it, nor CUDA's allocator; ``torch_kernels`` says how many kernels torch
itself would queue beside ours.  ``linear_us`` is the time of the two linear layers by themselves.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import tyro
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from triton.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from benchmarks import harness, suite
from benchmarks.harness import Call, Row
from benchmarks.offline.compiling import TARGETS
from dydila_kernels import DyDiLAttention, functional
from dydila_kernels.ops import tiles

BACKEND = make_backend(TARGETS["sm_90"].triton)
PATH = harness.REPOSITORY / "benchmarks" / "results" / "host.jsonl"
COMPUTING = {
    "copy_", "fill_", "cat", "add", "add_", "sum", "mm", "addmm", "mul", "zero_", "addcmul", "addcmul_",
}  # fmt: skip
"""The operations of torch, among those of these calls, that queue a kernel."""


class Binder:
    """A launcher that does what Triton does before it calls the driver."""

    def __init__(self) -> None:
        self.binders: dict[int, tuple[Callable[..., Any], dict[Any, str]]] = {}
        self.launches = 0

    def __call__(self, kernel: Any, grid: tiles.Grid, config: Any, arguments: dict[str, Any]) -> None:
        found = self.binders.get(id(kernel))
        if found is None:
            bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
            found = self.binders[id(kernel)] = bind, {}
        _, specialization, options = found[0](**arguments, **config.options)
        compute_cache_key(found[1], specialization, options)
        self.launches += 1


def ignore(kernel: Any, grid: tiles.Grid, config: Any, arguments: dict[str, Any]) -> None:
    """A launcher that does nothing."""


def calls(dim: int, tokens: int) -> dict[str, tuple[Call, Call]]:
    """Of a layer with two heads, and of its two linear layers alone."""
    fused = DyDiLAttention(dim, 2, backend="triton", dtype=torch.bfloat16).fuse()
    attn = DyDiLAttention(dim, 2, backend="triton", dtype=torch.bfloat16)
    x, grid = torch.randn(1, tokens, dim, dtype=torch.bfloat16), (1, tokens)
    learned, wide = x.clone().requires_grad_(), x.repeat(1, 1, 3)
    trained = [learned, *(p for p in attn.parameters() if p.requires_grad)]
    shared = [learned, *attn.qkv.parameters(), *attn.proj.parameters()]

    def infer(layer: DyDiLAttention) -> Call:
        return torch.no_grad()(lambda: layer(x, HW=grid))

    def linears() -> tuple[Tensor, Tensor]:
        return attn.qkv(learned), attn.proj(learned)

    return {
        "fused inference": (infer(fused), torch.no_grad()(linears)),
        "inference": (infer(attn), torch.no_grad()(linears)),
        "forward": (lambda: attn(learned, HW=grid), linears),
        "forward and backward": (
            lambda: torch.autograd.grad(attn(learned, HW=grid), trained, x),
            lambda: torch.autograd.grad(linears(), shared, (wide, x)),
        ),
    }


def microseconds_of(call: Call) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def row_of(name: str, call: Call, linears: Call, repeats: int) -> Row:
    """The least of ``repeats`` times, which other work on the machine lengthens least: with and without the binder, and
    of ``linears``, in turn."""
    binder = Binder()
    with mock.patch.object(tiles, "launcher", binder):
        call()
    launches = binder.launches
    with mock.patch.object(tiles, "launcher", ignore), profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    operations = [event.name.removeprefix("aten::") for event in profiler.events() if event.name.startswith("aten::")]
    whole = rest = alone = float("inf")
    for _ in range(repeats):
        with mock.patch.object(tiles, "launcher", binder):
            whole = min(whole, microseconds_of(call))
        with mock.patch.object(tiles, "launcher", ignore):
            rest = min(rest, microseconds_of(call))
        alone = min(alone, microseconds_of(linears))
    return {
        "call": name,
        "launches": launches,
        "torch_operations": len(operations),
        "torch_kernels": sum(operation in COMPUTING for operation in operations),
        "host_us": round(whole, 1),
        "binder_us": round(whole - rest, 1),
        "linear_us": round(alone, 1),
        "binder_share": round(1 - rest / whole, 3),
    }


def main(dim: int = 64, tokens: int = 1, repeats: int = 1000, out: Path = PATH) -> None:
    """Times what calls of a layer cost the host, without a GPU, prints and stores it.

    Args:
        dim: channels of a token, in two heads.
        tokens: of one image, in one row.
        repeats: calls of each, of which the fastest counts.
        out: where the rows go.
    """
    why_not = functional.why_not_triton
    facts = {"suite": "host", **harness.environment("cpu"), "repeats": repeats, "d": dim, "N": tokens}
    on_meta = mock.patch.object(
        functional, "why_not_triton", lambda device, *rest: why_not(torch.device("meta"), *rest)
    )
    with on_meta, torch.backends.mkldnn.flags(enabled=False):  # which prepares each product anew
        rows = [row_of(name, *pair, repeats) for name, pair in calls(dim, tokens).items()]
    print(suite.table(rows))
    harness.write_rows(out, [facts | row for row in rows])


if __name__ == "__main__":
    tyro.cli(main)
