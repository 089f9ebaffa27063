"""Launch configurations other than those of the table, timed on the whole layer: ``python -m benchmarks.sweep``.

One stage after the other, those that :mod:`dydila_kernels.tuning` would try, one row for each as it is measured: its
time, and that of the best so far, which stays in place for the rest of the process if it is faster.  On a CPU under
TRITON_INTERPRET=1, to try the command and for nothing else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

import torch
import tyro

from benchmarks import harness
from benchmarks.harness import Row
from dydila_kernels import DyDiLAttention, tuning
from dydila_kernels.functional import choose_backend
from dydila_kernels.ops import configs
from dydila_kernels.testing import layer_error_ratio

CHECKED_TOKENS = 32**2
SHAPES = ("16x4096x384x6", "16x4096x384x1", "16x4096x1152x16")
"""BxNxdxH: the width of the speed table with heads of 64, with one head, and the odd heads of DiT-XL."""


@dataclass(frozen=True)
class Config(harness.Options):
    """Time launch configurations that differ from the table in one number, or in rows and warps alike."""

    shapes: tuple[str, ...] = ()
    """BxNxdxH each, such as 16x4096x384x6."""
    stages: tuple[str, ...] = ()
    """Stages to vary, by their names in dydila_kernels.ops.configs; by default all that the layer uses."""
    modes: tuple[str, ...] = ("forward", "forward+backward")
    """What is timed."""
    repeats: int = 20
    """Timed calls of each configuration."""


def main(config: Config) -> list[Row]:
    """Measures and stores; RuntimeError where the kernels cannot run."""
    if config.smoke:
        config = replace(config, shapes=config.shapes or ("1x16x32x2",), modes=config.modes[:1], repeats=1)
    dtype = torch.bfloat16 if config.on_gpu else torch.float32
    choose_backend("triton", torch.device(config.device), dtype)
    cells = itertools.product(config.shapes or SHAPES, config.modes)
    trials = (row for shape, mode in cells for row in measure(config, shape, mode, dtype))
    return harness.stored("sweep", itertools.islice(trials, 1 if config.smoke else None), config, dtype)


def measure(config: Config, shape: str, mode: str, dtype: torch.dtype) -> Iterator[Row]:
    """A row for each configuration that is tried, and a last one, of stage "all", for those that were kept.

    ``median_ms`` is None where a configuration does not compile or fit, and ``failure`` says why; ``kept`` says whether
    it was faster than all before it (``best_ms``) by more than noise, and stays for those that follow.
    """
    batch, tokens, dim, heads = parsed(shape)
    facts: Row = {"mode": mode, "batch": batch, "tokens": tokens, "dim": dim, "heads": heads}
    device = torch.device(config.device)
    torch.manual_seed(0)
    attn = DyDiLAttention(dim, heads, device=device, dtype=dtype, backend="triton")
    x = torch.randn(batch, tokens, dim, device=device, dtype=dtype, requires_grad=mode != "forward")
    call = tuning.step_of(attn, x, x.requires_grad)
    table = 1e3 * tuning.duration(call, device, config.repeats)
    for trial in tuning.trials(call, device, config.repeats, config.stages):
        stage, precision, width = trial.key
        yield facts | {
            "stage": stage, "precision": precision, "width": width, "before": numbers(trial.before),
            "tried": numbers(trial.tried), "kept": trial.accepted, "failure": trial.failure, "table_ms": table,
            "best_ms": 1e3 * trial.best,
            "median_ms": None if trial.seconds is None else 1e3 * trial.seconds, "repeats": config.repeats,
        }  # fmt: skip
    ratio = layer_error_ratio(attn, length=min(tokens, CHECKED_TOKENS))
    harness.require_correct(ratio)
    again = 1e3 * tuning.duration(call, device, config.repeats)
    yield facts | {"stage": "all", "table_ms": table, "median_ms": again, "error_ratio": ratio}


def parsed(shape: str) -> list[int]:
    """B, N, d, H; ValueError where it does not say them."""
    numbers = [int(number) for number in shape.split("x") if number.isdecimal()]
    if len(numbers) != 4 or shape.count("x") != 3:
        raise ValueError(f"shapes must be BxNxdxH, such as {SHAPES[0]}; got {shape}")
    return numbers


def numbers(config: configs.Config) -> Row:
    return {name: value for name, value in asdict(config).items() if name != "reason"}


if __name__ == "__main__":
    harness.told(lambda: main(tyro.cli(Config)), RuntimeError)
