"""Launch configurations other than those of the table, timed on the whole layer: ``python -m benchmarks.sweep``.

One stage after the other, those that :mod:`dydila_kernels.tuning` would try, one row for each as it is measured: its
time, and that of the best so far, which stays in place for the rest of the process if it is faster.  On a CPU under
TRITON_INTERPRET=1, to try the command and for nothing else.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, product

import torch
import tyro

from benchmarks import harness, suite
from benchmarks.harness import Row
from dydila_kernels import DyDiLAttention, tuning
from dydila_kernels.functional import choose_backend
from dydila_kernels.testing import layer_error_ratio


@dataclass(frozen=True)
class Config(harness.Options):
    """Time launch configurations that differ from the table in one number, or in rows and warps alike."""

    shapes: tuple[tuple[int, int, int, int], ...] = ((16, 4096, 384, 6), (16, 4096, 384, 1), (16, 4096, 1152, 16))
    """B N d H of each: the width of the speed table with heads of 64, with one head, and the odd heads of DiT-XL."""
    stages: tuple[str, ...] = ()
    """Stages to vary, by words in their names in ops.configs; by default all that the layer uses."""
    modes: tuple[str, ...] = ("forward", "forward+backward")  # What is timed.
    repeats: int = 20  # Timed calls of each configuration.


def main(config: Config) -> list[Row]:
    """Measures and stores; RuntimeError where the kernels cannot run."""
    dtype = torch.bfloat16 if config.on_gpu else torch.float32
    choose_backend("triton", torch.device(config.device), dtype)
    if config.smoke:
        config = replace(config, shapes=((1, 16, 32, 2),), modes=config.modes[:1], repeats=1)
    rows = islice(measured(config, dtype), 1 if config.smoke else None)
    return harness.stored("sweep", rows, config.device, dtype, config.out)


def measured(config: Config, dtype: torch.dtype) -> Iterator[Row]:
    """A row for each configuration that is tried, and, of each shape and mode, one of stage "all" for those kept.

    ``median_ms`` is None where a configuration does not compile or fit, and ``failure`` says why; ``kept`` says whether
    it was faster than all before it (``best_ms``) by more than noise, and stays for those that follow.
    """
    device = torch.device(config.device)
    for (batch, tokens, dim, heads), mode in product(config.shapes, config.modes):
        torch.manual_seed(0)
        attn = DyDiLAttention(dim, heads, device=device, dtype=dtype, backend="triton")
        x = torch.randn(batch, tokens, dim, device=device, dtype=dtype, requires_grad=mode != "forward")
        call = tuning.step_of(attn, x, x.requires_grad)
        table = 1e3 * tuning.duration(call, device, config.repeats)
        facts = {"mode": mode, "batch": batch, "tokens": tokens, "dim": dim, "heads": heads, "table_ms": table}
        asked = [stage for stage, *_ in tuning.asked_by(call)]
        stages = [stage for stage in asked if any(word in stage for word in config.stages or ("",))]
        if not stages:
            raise ValueError(f"stages must have words of the layer's, {', '.join(asked)}; got {config.stages}")
        for trial in tuning.trials(call, device, config.repeats, stages):
            yield {
                **facts, **dict(zip(("stage", "precision", "width"), trial.key, strict=True)),
                "before": asdict(trial.before), "tried": asdict(trial.tried), "kept": trial.accepted,
                "failure": trial.failure, "best_ms": 1e3 * trial.best,
                "median_ms": trial.seconds and 1e3 * trial.seconds, "repeats": config.repeats,
            }  # fmt: skip
        ratio = layer_error_ratio(attn, length=min(tokens, suite.CHECKED_TOKENS))
        harness.require_correct(ratio)
        again = 1e3 * tuning.duration(call, device, config.repeats)
        yield {**facts, "stage": "all", "median_ms": again, "error_ratio": ratio}


if __name__ == "__main__":
    harness.told(lambda: main(tyro.cli(Config)), RuntimeError)
