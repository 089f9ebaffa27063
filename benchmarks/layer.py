"""Time and memory of the whole layer against a softmax layer of the same width: ``python -m benchmarks.layer``.

All layers meet the same input, one image of N tokens on a square grid, in the same run and in turn.  "forward" is in
eval mode under inference_mode; "forward+backward" adds the gradients of the input and of all trainable parameters.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.rivals import SoftmaxAttention, softmax_macs
from dydila_kernels import DyDiLAttention
from dydila_kernels.testing import layer_error_ratio

OURS, RIVAL = "dydila", "softmax"
MODES = ("forward", "forward+backward")
CHECKED_TOKENS = 48**2
"""Tokens of the image that the check is done on, unless all sizes are shorter: longer ones take the same path."""


Layer = tuple[str, int]
"""A layer and its heads."""


@dataclass(frozen=True)
class Config:
    """Time and memory of the whole layer against a softmax layer of the same width."""

    device: str = "cpu"
    """Where to run: cpu or cuda."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of input and parameters."""
    dim: int = 384
    """Channels d of all layers; the softmax layer has heads of 64 channels."""
    heads: tuple[int, ...] = (1, 6)
    """Heads of our layer, which is measured with each: the paper has 1, the softmax layer DIM/64."""
    sizes: tuple[int, ...] = (256, 1024, 4096, 16384, 65536)
    """Numbers of tokens N, each a square, in rising order."""
    threads: int = 2
    """CPU threads."""
    repeats: int = 7
    """Timed calls of each layer at each size, after one to warm up."""
    budget_seconds: float = 20.0
    """Make no further repeats of a layer at one size once they have taken this long (s); one is always made."""
    skip_over_seconds: float = 600.0
    """Skip the softmax layer where one call is expected to take longer than this (s)."""
    smoke: bool = False
    """Try everything in seconds: two short sizes, two repeats, rows stored only where --out says."""
    out: Path | None = None
    """File for the rows; by default benchmarks/results/DEVICE/layer.jsonl."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """What is measured: name and heads."""
        return (*((OURS, heads) for heads in self.heads), (RIVAL, max(self.dim // 64, 1)))


def main(config: Config) -> list[Row]:
    """Check, measure, print a table and store the rows."""
    sizes, repeats, out = config.sizes, config.repeats, config.out
    if config.smoke:
        sizes, repeats = (64, 256), 2
    elif out is None:
        out = harness.REPOSITORY / "benchmarks" / "results" / torch.device(config.device).type / "layer.jsonl"

    torch.set_num_threads(config.threads)
    dtype = getattr(torch, config.dtype)
    checked = min(max(sizes), CHECKED_TOKENS)
    error_ratio = max(
        layer_error_ratio(DyDiLAttention(config.dim, heads, device=config.device, dtype=dtype), length=checked)
        for heads in config.heads
    )
    harness.require_correct(error_ratio)
    facts = {
        "suite": "layer",
        **harness.environment(config.device),
        "dtype": config.dtype,
        "batch": 1,
        "dim": config.dim,
        "error_ratio": error_ratio,
    }

    rows: list[Row] = []
    for mode, tokens in tqdm([(mode, tokens) for mode in MODES for tokens in sizes], desc="layer", unit="cell"):
        for row in measure(config, mode, tokens, repeats, rows):
            rows.append({**facts, **row})
        if out is not None:
            harness.write_rows(out, rows)
    for mode in MODES:
        print(f"\n{mode}, d = {config.dim}, {config.dtype}, {facts['device']}, threads: {facts['threads']}")
        print(table([row for row in rows if row["mode"] == mode]))
    if out is not None:
        print(f"\nrows: {out}")
    return rows


def measure(config: Config, mode: str, tokens: int, repeats: int, earlier: list[Row]) -> list[Row]:
    """One row for each layer at one size."""
    results: dict[Layer, Row] = {
        (name, heads): {"layer": name, "heads": heads, "mode": mode, "tokens": tokens, "skipped": None}
        for name, heads in config.layers
    }
    if rival_seconds(config, mode, tokens, earlier) > config.skip_over_seconds:
        for (name, _), row in results.items():
            if name == RIVAL:
                row["skipped"] = f"over budget: a call would take more than {config.skip_over_seconds:g} s"

    timed = [layer for layer, row in results.items() if not row["skipped"]]
    calls: dict[Layer, Callable[[], object]] = {}
    for layer in timed:
        step, x = prepare(config, layer, mode, tokens)
        calls[layer] = partial(step, x)
    seconds = harness.interleave(calls, repeats=repeats, budget_seconds=config.budget_seconds, device=config.device)
    for layer in timed:
        results[layer].update(harness.summarize(seconds[layer]), peak_mib=peak_mib(config, layer, mode, tokens))
    return list(results.values())


def rival_seconds(config: Config, mode: str, tokens: int, earlier: list[Row]) -> float:
    """How long a call of the softmax layer should take by the size before, in seconds; 0 if there is none."""
    for row in reversed(earlier):
        if row["layer"] == RIVAL and row["mode"] == mode and not row["skipped"]:
            growth = softmax_macs(tokens, config.dim) / softmax_macs(row["tokens"], config.dim)
            return row["median_ms"] / 1e3 * growth
    return 0.0


def prepare(config: Config, which: Layer, mode: str, tokens: int) -> tuple[Callable[[Tensor], object], Tensor]:
    """The step to measure, and the input x (1, N, d) to call it with."""
    torch.manual_seed(0)
    dtype = getattr(torch, config.dtype)
    x = torch.randn(1, tokens, config.dim, device=config.device, dtype=dtype)
    name, heads = which
    layer: nn.Module = DyDiLAttention(config.dim, heads) if name == OURS else SoftmaxAttention(config.dim, heads)
    layer.to(device=config.device, dtype=dtype)
    layer.train(mode != "forward")
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def forward(x: Tensor) -> object:
        with torch.inference_mode():
            return layer(x)

    def forward_backward(x: Tensor) -> object:
        # The input doubles as the incoming gradient, and detaching copies nothing: only the layer takes memory.
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(layer(leaf), [leaf, *parameters], x)

    return forward if mode == "forward" else forward_backward, x


def peak_mib(config: Config, layer: Layer, mode: str, tokens: int) -> float | None:
    """Memory that one call needs on top of the weights and the input (MiB)."""
    if torch.device(config.device).type == "cpu" and platform.system() == "Linux":
        return harness.in_fresh_process(_peak_mib, config, layer, mode, tokens)
    return _peak_mib(config, layer, mode, tokens)


def _peak_mib(config: Config, layer: Layer, mode: str, tokens: int) -> float | None:
    torch.set_num_threads(config.threads)
    step, x = prepare(config, layer, mode, tokens)
    step(x[:, :16])  # 4 x 4 tokens: loads code and starts threads, which would count as growth
    return harness.peak_growth_mib(partial(step, x), config.device)


def table(rows: list[Row]) -> str:
    """The rows of one mode, side by side.  growth is the time over that of N/4, speed-up that of softmax over ours."""
    cells = {((row["layer"], row["heads"]), row["tokens"]): row for row in rows}
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    rival = next(layer for layer in layers if layer[0] == RIVAL)

    def number(layer: Layer, n: int, field: str) -> str:
        row = cells[layer, n]
        return "skipped" if row["skipped"] else "-" if row[field] is None else f"{row[field]:.1f}"

    def ratio(above: tuple[Layer, int], below: tuple[Layer, int]) -> str:
        if any(key not in cells or cells[key]["skipped"] for key in (above, below)):
            return "-"
        return f"{cells[above]['median_ms'] / cells[below]['median_ms']:.2f}x"

    heading, sizes = ["N"], sorted({n for _, n in cells})
    lines = [[str(n)] for n in sizes]
    for layer in layers:
        name = f"{layer[0]} H={layer[1]}"
        heading += [f"{name}: ms", "growth", "MiB"] + (["speed-up"] if layer != rival else [])
        for n, line in zip(sizes, lines, strict=True):
            line += [number(layer, n, "median_ms"), ratio((layer, n), (layer, n // 4)), number(layer, n, "peak_mib")]
            line += [ratio((rival, n), (layer, n))] if layer != rival else []
    widths = [max(map(len, column)) for column in zip(heading, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in [heading, *lines]
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(Config))
    except harness.CheckFailed as error:
        raise SystemExit(f"benchmarks.layer: {error}") from None
