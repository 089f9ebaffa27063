"""Predictions for the attention of any shape, forward and backward, as a table: ``benchmarks.offline --predict``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.offline.cases import DTYPES, Size, attend
from benchmarks.offline.compiling import TARGETS, Job, compiled, nvidia, record
from benchmarks.offline.prediction.launches import conversions, prediction_of
from benchmarks.offline.prediction.machine import H200, SPREAD, TARGET
from benchmarks.offline.prediction.predict import Launch, Prediction

NOTICE = (
    "Predictions by a model of the machine code for one H200 (sm_90); not measurements. "
    "On kernels of known speed the model is right to 1.1-1.4, mostly too fast."
)


@dataclass(frozen=True)
class Shape:
    """The attention to predict."""

    images: int = 8
    """B."""
    rows: int = 64
    """Rows of tokens of an image."""
    columns: int = 64
    """Columns."""
    d: int = 768
    """Channels."""
    heads: int = 12
    """H."""
    factors: int = 9
    """n_F = n_D."""
    dtype: str = "bf16"
    """bf16, fp16 or fp32."""
    normalization: str = "length"
    """length, none or denominator."""
    convolution: bool = False
    """With the depth-wise convolution of V."""
    rotary: bool = False
    """With rotary embeddings, neighbours being pairs.  The products are torch's then, and not predicted."""


@dataclass(frozen=True)
class Kernel:
    """One launch of the call, and what the model says of it."""

    name: str
    prediction: Prediction
    conversions: int
    fast: float
    slow: float
    """Microseconds with the figures of :data:`benchmarks.offline.prediction.machine.SPREAD`."""


def predictions(shape: Shape, spread: bool = True) -> list[Kernel]:
    """Of all launches of a forward and a backward call, in order."""
    size = Size(shape.images, shape.rows, shape.columns, shape.factors, shape.convolution)

    def call() -> None:
        variant = {"normalization": shape.normalization}
        if shape.rotary:
            variant["rotary_pairing"] = "interleaved"
        attend(DTYPES[shape.dtype], shape.d, shape.d // shape.heads, size, **variant)

    return predictions_of(record(call, {}, TARGET, TARGETS[TARGET]), spread)


Known = dict[tuple[str, Launch | None], Kernel]
"""What was predicted of a binary and a launch of it: the same grid may go over other sizes."""


def predictions_of(jobs: Iterable[Job], spread: bool = True, known: Known | None = None) -> list[Kernel]:
    """Of launches, in their order; those that are alike are predicted once, and what is ``known`` is not again."""
    found, kernels = {} if known is None else known, []
    for job in jobs:
        key = job.identity, job.launch
        if key not in found:
            found[key] = predicted(job, spread)
        kernels.append(found[key])
    return kernels


def predicted(job: Job, spread: bool) -> Kernel:
    if job.launch is None:
        raise ValueError(f"the model is of {TARGET}; the launch was recorded for another target")
    kernel = compiled(job)
    registers = nvidia(kernel.asm["cubin"])["registers"]
    likely, *others = [
        prediction_of(kernel, registers, job.config["num_warps"], job.launch, gpu)
        for gpu in (H200, *(SPREAD.values() if spread else ()))
    ]
    fast, slow = [other.microseconds for other in others] or [likely.microseconds] * 2
    return Kernel(job.kernel[1], likely, conversions(kernel.asm["ttgir"]), fast, slow)


def report(kernels: Iterable[Kernel]) -> str:
    """A table in Markdown, with what it is above it."""
    kernels = list(kernels)
    columns = ("kernel", "predicted us", "spread us", "floor us", "binds", "busiest pipe us", "waits", "barriers",
               "shared", "conversions", "spilled")  # fmt: skip
    lines = [NOTICE, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for number, kernel in enumerate(kernels, 1):
        p = kernel.prediction
        least = ">= " if p.loops else ""
        lines.append(
            f"| {number} {kernel.name} | {least}{p.microseconds:.0f} | {kernel.fast:.0f}-{kernel.slow:.0f} | "
            f"{p.floor:.0f} | {p.binds} | {p.busiest} {p.pipes[p.busiest]:.0f} | {p.waits:.0%} | "
            f"{p.barriers} | {p.shared} | {kernel.conversions} | {p.spilled} |"
        )
    total, floor = (sum(getattr(k.prediction, name) for k in kernels) for name in ("microseconds", "floor"))
    fast, slow = sum(k.fast for k in kernels), sum(k.slow for k in kernels)
    lines.append(f"| all | {total:.0f} | {fast:.0f}-{slow:.0f} | {floor:.0f} | | | | | | | |")
    return "\n".join(lines)
