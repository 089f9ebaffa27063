"""How long a step of sampling takes, called and as a CUDA graph: ``python -m benchmarks.latency``.

A step of one image, and of two as guidance has them: with its class and without.  The models are those of
:mod:`benchmarks.model`, ours in its inference form, ``model.fuse()``.  ``median_ms`` is the time of a plain call, and
``graph_median_ms``, on a GPU, that of the same call captured as a CUDA graph, which leaves the host out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial

import torch
import tyro

from benchmarks import harness, model, suite
from benchmarks.harness import Row
from benchmarks.model import Case
from benchmarks.suite import Comparison, Contender, Mode
from dydila_kernels.testing import cast, equations, layer_inputs, relative_error


@dataclass(frozen=True)
class Config(model.ModelOptions):
    """Time of a step of sampling with DyDi-LiT, Sana and DiT, at batch 1, called and as a CUDA graph."""

    modes: tyro.conf.Suppress[tuple[Mode, ...]] = ("forward",)
    batches: tuple[int, ...] = (1, 2)
    """Images at once: one, and two for guidance."""


class Step:
    """A step of sampling, to be called; leaves the model's output (B, C, side, side) in ``output``."""

    def __init__(self, case: Case) -> None:
        self.model = model.network(case.name, case.size, False, case.fused, case.device, case.dtype)
        self.arguments = model.inputs(case)
        self.output = torch.empty(0)

    def __call__(self) -> None:
        with torch.inference_mode():
            self.output = self.model(*self.arguments)


def main(config: Config) -> list[Row]:
    """Check, measure, print tables and store the rows."""
    return suite.run("latency", config, comparisons(config))


def comparisons(config: Config) -> list[Comparison]:
    """By batch, each in rising order of size."""
    return [
        model.comparison([case._replace(fused=case.name == "dydi-lit") for case in cases], contender)
        for batch in config.batches
        for cases in (config.cases("forward", batch, image) for image in config.images(on_cpu=2))
    ]


def contender(case: Case) -> Contender:
    return Contender(
        prepare=partial(Step, case),
        labels={"heads": model.config_of(case).num_heads, "fused": case.fused},
        cost=model.cost(case),
        error_ratio=partial(error_ratio, case) if case.fused or harness.is_gpu(case.device) else None,
        graph=True,
    )


def error_ratio(case: Case) -> float:
    """The worse of that of our attention layer in its inference form, and, on a GPU, the difference by capturing."""
    ratios = [fused_error_ratio(case)] if case.fused else []
    return max([*ratios, captured_difference(case)] if harness.is_gpu(case.device) else ratios)


def fused_error_ratio(case: Case) -> float:
    """Of the output of the first block's attention layer after ``fuse()``, over that of the plain equations."""
    attn = model.network(case.name, case.size, False, False, case.device, case.dtype).blocks[0].attention
    x = torch.randn(1, min(case.tokens, model.CHECKED_TOKENS), attn.dim, device=case.device, dtype=case.dtype)
    with torch.no_grad():
        given, indices = layer_inputs(attn, x), attn.routing(x).indices
        exact = equations(attn, cast(given, torch.float64), indices=indices)
        return suite.error_ratio(copy.deepcopy(attn).fuse()(x), equations(attn, given, indices=indices), exact)


def captured_difference(case: Case) -> float:
    """How far the output of a CUDA graph is from that of a call, relative to it, in units of the dtype's rounding.

    Nothing, if a graph does the same: the kernels are deterministic.
    """
    step = Step(case)
    step()
    called = step.output.clone()
    replay = harness.captured(step)
    with torch.inference_mode():
        step.output.zero_()  # what it shows then is of the replay, not of the capture
    replay()
    return relative_error(step.output, called) / torch.finfo(case.dtype).eps


if __name__ == "__main__":
    suite.command(main, Config)
