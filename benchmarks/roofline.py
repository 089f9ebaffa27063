"""Bytes and FLOPs declared for what is timed, and the ceilings of the device that they are held against.

Bytes are what a call cannot avoid: each input read once, each output written once, in passes over a tensor of tokens.
FLOPs are those of products and convolutions, two for a multiply-accumulate; powers and norms are not counted.
``python -m benchmarks.roofline`` measures the ceilings: a copy for bytes, square matrix products for FLOPs.
"""

import json
from dataclasses import dataclass
from functools import partial

import torch
import tyro

from benchmarks import harness
from benchmarks.harness import Call, Row
from dydila_kernels.torch_backend.products import onednn, takes_onednn

GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Cost:
    """What a call moves and computes."""

    bytes: float
    flops: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def __mul__(self, factor: float) -> "Cost":
        return Cost(self.bytes * factor, self.flops * factor)


@dataclass(frozen=True)
class Shape:
    """Tokens (B, N, d) in H heads, of ``dtype``."""

    batch: int
    tokens: int
    dim: int
    heads: int
    dtype: torch.dtype

    @property
    def rows(self) -> int:
        return self.batch * self.tokens

    @property
    def token_bytes(self) -> int:
        return self.rows * self.dim * self.dtype.itemsize


def passes(shape: Shape, count: int, flops: float) -> Cost:
    """So many passes over a tensor of tokens, and FLOPs for each token."""
    return Cost(count * shape.token_bytes, flops * shape.rows)


def products(shape: Shape) -> float:
    """FLOPs for each token of K^T V and Q (K^T V), or of the other order where it is cheaper."""
    return 4 * min(shape.dim // shape.heads, shape.tokens) * shape.dim


def core(shape: Shape, mode: str, factors: int = 9) -> Cost:
    """Eqs. 5-8 given q, k, v, q', k' and tables of so many: reads five, writes one; backward reads six, writes five."""
    logits = 16 * shape.dim * factors
    return by_mode(mode, passes(shape, 6, products(shape) + logits), passes(shape, 11, 2 * products(shape)))


def softmax_core(shape: Shape, mode: str) -> Cost:
    """Scaled dot-product attention: reads three, writes one; backward reads five, writes three, and does the products
    five times over, because it computes the scores again."""
    product = 2 * shape.tokens * shape.dim
    return by_mode(mode, passes(shape, 4, 2 * product), passes(shape, 8, 5 * product))


def linear_core(shape: Shape, mode: str) -> Cost:
    """Linear attention given q, k, v, with any element-wise kernel function."""
    return by_mode(mode, passes(shape, 4, products(shape)), passes(shape, 7, 2 * products(shape)))


def linear(rows: int, inputs: int, outputs: int, mode: str, dtype: torch.dtype, *, weights: int = 1) -> Cost:
    """x W for ``rows`` of x, with one of ``weights`` matrices for each row."""
    x, y, matrix = rows * inputs, rows * outputs, weights * inputs * outputs
    forward = Cost((x + y + matrix) * dtype.itemsize, 2 * x * outputs)
    return by_mode(mode, forward, Cost((2 * x + y + 2 * matrix) * dtype.itemsize, 4 * x * outputs))


def convolution(shape: Shape, mode: str, taps: int = 9) -> Cost:
    """The depth-wise convolution: reads one, writes one; backward reads two and writes one."""
    return by_mode(mode, passes(shape, 2, 2 * taps * shape.dim), passes(shape, 3, 4 * taps * shape.dim))


def by_mode(mode: str, forward: Cost, backward: Cost) -> Cost:
    return {"forward": forward, "backward": backward, "forward+backward": forward + backward}[mode]


@dataclass(frozen=True)
class Config(harness.Options):
    """Measure the ceilings of a device: bytes per second of a copy, FLOPs per second of matrix products."""

    out: tyro.conf.Suppress[None] = None


def measure(config: harness.Options) -> Row:
    """The ceilings: ``copy_gb_s`` (read and written bytes both counted) and ``{float32,bfloat16}_tflop_s``.

    Where oneDNN multiplies float32, that is the faster of the two, and ``float32_mm_tflop_s`` is torch's own product.
    """
    torch.set_num_threads(config.threads)
    large, side = (2**20, 128) if config.smoke else (2**30, 8192) if config.on_gpu else (2**27, 1536)
    source = torch.randint(256, (large,), dtype=torch.uint8, device=config.device)
    calls: dict[str, Call] = {"copy": partial(torch.empty_like(source).copy_, source)}
    for dtype in (torch.float32, torch.bfloat16):
        # Random: a GPU multiplies zeros and ones faster than its power allows for real numbers.
        matrix = torch.randn(side, side, device=config.device).to(dtype)
        name = str(dtype).removeprefix("torch.")
        calls[name] = partial(torch.mm, matrix, matrix)
        if takes_onednn(matrix, side**3):
            calls[f"{name} by oneDNN"] = partial(onednn, matrix, matrix)
    clocks = {name: harness.clock(call, config.device) for name, call in calls.items()}
    seconds = harness.interleave(clocks, repeats=2 if config.smoke else 20, budget_seconds=20)
    row: Row = {"copy_gb_s": 2 * large / min(seconds.pop("copy")) / GIGA}
    best: dict[str, float] = {}  # a ceiling is the best there was
    for name, samples in seconds.items():
        dtype_name = name.split()[0]
        best[dtype_name] = min(*samples, best.get(dtype_name, float("inf")))
    if "float32 by oneDNN" in seconds:
        best["float32_mm"] = min(seconds["float32"])
    return row | {f"{name}_tflop_s": 2 * side**3 / duration / TERA for name, duration in best.items()}


def against(cost: Cost, seconds: float, ceilings: Row, dtype: torch.dtype) -> Row:
    """Rates of a call, and the percentage of the nearer ceiling: the time that the ceilings allow over that taken."""
    rate = ceilings["float32_tflop_s" if dtype == torch.float32 else "bfloat16_tflop_s"]
    floors = {"bytes": cost.bytes / (ceilings["copy_gb_s"] * GIGA), "FLOPs": cost.flops / (rate * TERA)}
    nearer = max(floors, key=lambda name: floors[name])
    rates = {"gb_s": cost.bytes / seconds / GIGA, "tflop_s": cost.flops / seconds / TERA}
    return {**rates, "ceiling": nearer, "percent_of_ceiling": 100 * floors[nearer] / seconds}


if __name__ == "__main__":
    print(json.dumps(measure(tyro.cli(Config)), indent=2))
