"""How long a step of sampling takes, called and as a CUDA graph: ``python -m benchmarks.latency``.

A step of one image, and of two as guidance has them: with its class and without.  The models are those of
:mod:`benchmarks.model`, ours in its inference form, ``model.fuse()``.  ``median_ms`` is the time of a plain call, and
``graph_median_ms``, on a GPU, that of the same call captured as a CUDA graph, which leaves the host out.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import tyro

from benchmarks import harness, suite
from benchmarks.harness import Row
from benchmarks.model import (
    CHECKED_TOKENS,
    IMAGES,
    Case,
    Images,
    Name,
    checked_images,
    comparison,
    config_of,
    cost,
    inputs,
    network,
    require_example,
)
from benchmarks.suite import Call, Comparison, Contender, Mode
from dydila_kernels.testing import cast, equations, layer_inputs, relative_error


@dataclass(frozen=True)
class Config(suite.Options):
    """Time of a step of sampling with DyDi-LiT, Sana and DiT, at batch 1, called and as a CUDA graph."""

    sizes: Images = ()
    """Sides of the images in pixels, multiples of 16; by default 256 and 512 on a CPU, 256 to 4096 on a GPU."""
    modes: tyro.conf.Suppress[tuple[Mode, ...]] = ("forward",)
    models: tuple[Name, ...] = ("dydi-lit", "sana", "dit")
    """Which models of the example."""
    size: Literal["tiny", "S", "B", "L"] = "S"
    """How large they are; "tiny" is no size of the paper, and what --smoke takes."""
    batches: tuple[int, ...] = (1, 2)
    """Images at once: one, and two for guidance."""


class Step:
    """A step of sampling, to be called; leaves the model's output (B, C, side, side) in ``output``."""

    def __init__(self, case: Case) -> None:
        self.model = network(case.name, case.size, False, case.fused, case.device, case.dtype)
        self.arguments = inputs(case)
        self.output = torch.empty(0)

    def __call__(self) -> None:
        with torch.inference_mode():
            self.output = self.model(*self.arguments)


def main(config: Config) -> list[Row]:
    """Check, measure, print tables and store the rows.  ImportError without the extra "examples"."""
    require_example()
    rows = suite.run("latency", config, comparisons(config))
    print(f"\n{table(rows)}")
    return rows


def comparisons(config: Config) -> list[Comparison]:
    """By batch, each in rising order of size."""
    found = []
    for batch in config.batches:
        for image in checked_images(config.lengths(cpu=IMAGES[:2], gpu=IMAGES)):
            size = "tiny" if config.smoke else config.size
            cases = [
                Case(name, size, "forward", batch, image, config.device, config.torch_dtype, fused=name == "dydi-lit")
                for name in config.models
            ]
            found.append(comparison({case.name: contender(case) for case in cases}, cases[0]))
    return found


def contender(case: Case) -> Contender:
    on_gpu = torch.device(case.device).type == "cuda"
    return Contender(
        prepare=partial(prepare, case),
        labels={"heads": config_of(case).num_heads, "fused": case.fused},
        cost=cost(case),
        error_ratio=partial(error_ratio, case) if case.fused or on_gpu else None,
        graph=True,
    )


def prepare(case: Case) -> Call:
    return Step(case)


def error_ratio(case: Case) -> float:
    """The worse of that of our attention layer in its inference form, and, on a GPU, the difference by capturing."""
    ratios = [fused_error_ratio(case)] if case.fused else []
    if torch.device(case.device).type == "cuda":
        ratios.append(captured_difference(case))
    return max(ratios)


def fused_error_ratio(case: Case) -> float:
    """Of the output of the first block's attention layer after ``fuse()``, over that of the plain equations."""
    attn = network(case.name, case.size, False, False, case.device, case.dtype).blocks[0].attention
    tokens = min(case.tokens, CHECKED_TOKENS)
    x = torch.randn(1, tokens, attn.dim, device=case.device, dtype=case.dtype)
    with torch.no_grad():
        given, indices = layer_inputs(attn, x), attn.routing(x).indices
        exact = equations(attn, cast(given, torch.float64), indices=indices)
        plain = equations(attn, given, indices=indices)
        found = copy.deepcopy(attn).fuse()(x)
    return relative_error(found, exact) / relative_error(plain, exact)


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


def table(rows: list[Row]) -> str:
    """Medians in ms of each row, called and captured."""
    lines = ["milliseconds of a step: called, as a CUDA graph"]
    for row in rows:
        what = f"  {row['name']:<10} batch={row['batch']} image={row['image']}: "
        graph = f", {row['graph_median_ms']:.3g}" if "graph_median_ms" in row else ""
        lines.append(what + (row["skipped"] or f"{row['median_ms']:.3g}{graph}"))
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        raise SystemExit(suite.exit_code(main(tyro.cli(Config))))
    except (ImportError, ValueError) as error:
        raise SystemExit(f"benchmarks.latency: {error}") from None
