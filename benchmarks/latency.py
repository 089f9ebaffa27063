"""How long a step of sampling takes, called and as a CUDA graph: ``python -m benchmarks.latency``.

A step of one image, and of two as guidance has them: with its class and without.  The models are those of
:mod:`benchmarks.model`, ours in its inference form, ``model.fuse()``.  ``median_ms`` is the time of a plain call, and
``graph_median_ms``, on a GPU, that of the same call captured as a CUDA graph, which leaves the host out.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import tyro
from torch import Tensor

from benchmarks import harness, model, suite
from benchmarks.model import Case
from benchmarks.suite import Comparison, Contender, Mode
from dydila_kernels import testing
from dydila_kernels.testing import equations, layer_inputs, relative_error


@dataclass(frozen=True)
class Config(model.ModelOptions):
    """Time of a step of sampling with DyDi-LiT, Sana and DiT, at batch 1, called and as a CUDA graph."""

    modes: tyro.conf.Suppress[tuple[Mode, ...]] = ("forward",)
    batches: tuple[int, ...] = (1, 2)  # Images at once: one, and two for guidance.


def comparisons(config: Config) -> Iterator[Comparison]:
    """By batch, each in rising order of size."""
    for batch, image in product(config.batches, config.images(on_cpu=2)):
        yield [contender(case) for case in config.cases("forward", batch, image, fused=True)]


def contender(case: Case) -> Contender:
    check = partial(error_ratio, case) if case.fused or harness.is_gpu(case.device) else None
    labels = {**case.labels, "fused": case.fused}
    return Contender(partial(model.prepare, case), labels, model.cost(case), check, graph=True)


def error_ratio(case: Case) -> float:
    """The worse of that of our attention layer in its inference form, and, on a GPU, the difference by capturing."""
    ratios = [fused_error_ratio(case)] if case.fused else []
    return max([*ratios, captured_difference(case)] if harness.is_gpu(case.device) else ratios)


def fused_error_ratio(case: Case) -> float:
    """Of the output of the first block's attention layer after ``fuse()``, over that of the plain equations."""
    attn = model.network(case.name, case.size, False, False, case.device, case.dtype).blocks[0].attention
    x = torch.randn(1, min(case.tokens, suite.CHECKED_TOKENS), attn.dim, device=case.device, dtype=case.dtype)
    fused, indices = copy.deepcopy(attn).fuse(), attn.routing(x).indices

    def plain(t: dict[str, Tensor]) -> Tensor:
        return equations(attn, t, indices={name: index.to(t["x"].device) for name, index in indices.items()})

    return testing.error_ratio(lambda t: fused(t["x"]), plain, layer_inputs(attn, x), ())


def captured_difference(case: Case) -> float:
    """How far the output of a CUDA graph is from that of a call, relative to it, in units of the dtype's rounding.

    Nothing, if a graph does the same: the kernels are deterministic.
    """
    outputs: list[Any] = []

    def prepare() -> harness.Call:
        call = model.prepare(case)
        return lambda: outputs.append(call())

    replay = harness.captured(prepare)
    with torch.inference_mode():
        outputs[-1].zero_()  # what it shows then is of the replay, not of the capture
    replay()
    return relative_error(outputs[-1], outputs[0]) / torch.finfo(case.dtype).eps


main = partial(suite.run, "latency", comparisons)

if __name__ == "__main__":
    suite.command(main, Config)
