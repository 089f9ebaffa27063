"""Predicts every launch of the steps that :mod:`benchmarks.kernels` times: ``python -m benchmarks.offline.prediction``.

Writes the rows that a run on a GPU is held against, benchmarks/results/predictions.jsonl, and the tables of
benchmarks/QUESTIONS.md.  Kernels are compiled and their machine code simulated; nothing is launched or measured.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
import triton

from benchmarks import harness, roofline
from benchmarks.harness import Row
from benchmarks.offline.compiling import TARGETS, Job, record
from benchmarks.offline.prediction.call import NOTICE, Kernel, Known, predictions_of
from benchmarks.offline.prediction.machine import H200, TARGET
from benchmarks.offline.prediction.steps import PREDICTIONS, SETTINGS, Setting, built, in_form, noting, step_of, title
from benchmarks.stages import KERNELS

QUESTIONS = harness.REPOSITORY / "benchmarks" / "QUESTIONS.md"
BEGIN, END = "<!-- written by python -m benchmarks.offline.prediction -->\n", "<!-- end -->\n"


def launches(setting: Setting) -> dict[str, list[Job]]:
    """What a step launches, by mode and in order."""
    found = {}
    with in_form(setting.form), noting(lambda *_: None):
        for mode, call in step_of(built(setting, "meta", torch.bfloat16), setting).items():
            found[mode] = record(call, {}, TARGET, TARGETS[TARGET])
    return found


def named(job: Job) -> Row:
    """What tells launches apart without compiling them."""
    assert job.launch is not None
    return {"kernel": job.kernel[1], "grid": list(job.launch.grid), "config": job.config}


def rows_of(setting: Setting, known: Known) -> Iterator[Row]:
    """One for each launch."""
    facts = harness.environment("cpu")
    labels = {"suite": "predictions", "kind": "prediction by a model, not a measurement"}
    labels |= {key: facts[key] for key in ("commit", "dydila_kernels", "date")}
    for mode, jobs in launches(setting).items():
        for number, (job, kernel) in enumerate(zip(jobs, predictions_of(jobs, known=known), strict=True)):
            of = {**labels, "triton": triton.__version__, **setting._asdict(), "mode": mode, "number": number}
            yield {**of, **named(job), **figures(kernel)}


def figures(kernel: Kernel) -> Row:
    """Microseconds; with ``lower_bound`` some loop ends by data, and is taken to run once."""
    p = kernel.prediction
    return {
        "predicted_us": round(p.microseconds, 1),
        "fast_us": round(kernel.fast, 1),
        "slow_us": round(kernel.slow, 1),
        "floor_us": round(p.floor, 1),
        "binds": p.binds,
        "busiest": f"{p.busiest} {p.pipes[p.busiest]:.0f}",
        "lower_bound": p.loops > 0,
    }


def tables(rows: Sequence[Row]) -> str:
    """In Markdown: the kernels of the first setting, and the sums of all."""
    first = [row for row in rows if SETTINGS[0].has(row, row["mode"])]
    lines = [
        NOTICE, "", f"{title(first[0])}, bf16, in microseconds:", "",
        "| | kernel | predicted | spread | floor | binds | busiest |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in first:
        least = "at least " if row["lower_bound"] else ""
        lines.append(
            f"| {row['mode']} {row['number'] + 1} | `{row['kernel']}` | {least}{row['predicted_us']:.0f} | "
            f"{row['fast_us']:.0f}-{row['slow_us']:.0f} | {row['floor_us']:.0f} | {row['binds']} | {row['busiest']} |"
        )
    lines += [
        "", "Sums: of the core; its floor, which is what it cannot avoid, 6 passes forward and 11 backward, 2 and 3",
        "more with the convolution; and with the routed projections, whose gradients are lower bounds. Products that",
        "torch makes (all of the state and the readout at H = 1) are in none of them.", "",
        "| step | core | spread | floor | over the floor | with projections |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for setting, mode in product(SETTINGS, ("forward", "backward")):
        found = [row for row in rows if setting.has(row, mode)]
        core = [row for row in found if row["kernel"] not in KERNELS["projection"]]
        us, fast, slow = (sum(row[key] for row in core) for key in ("predicted_us", "fast_us", "slow_us"))
        floor, everything = floor_of(setting, mode), sum(row["predicted_us"] for row in found)
        name = f"{title(found[0])}, {mode}"
        lines.append(
            f"| {name} | {us:.0f} | {fast:.0f}-{slow:.0f} | {floor:.0f} | {us / floor:.1f} | {everything:.0f} |"
        )
    return "\n".join(lines) + "\n"


def floor_of(setting: Setting, mode: str) -> float:
    """Microseconds for the bytes of the core that any kernel has to move."""
    shape = roofline.Shape(*setting[:4], torch.bfloat16)
    cost = roofline.core(shape, mode)
    if setting.convolution:
        cost += roofline.convolution(shape, mode)
    return cost.bytes / H200.dram * 1e6


def written(page: str, rows: Sequence[Row]) -> str:
    """The page with the tables of these rows."""
    found = re.subn(f"(?<={re.escape(BEGIN)}).*?(?={re.escape(END)})", lambda _: tables(rows), page, flags=re.DOTALL)
    if found[1] != 1:
        raise ValueError(f"the page must have one place for the tables, between {BEGIN!r} and {END!r}")
    return found[0]


def main(rows: Path = PREDICTIONS, page: Path = QUESTIONS) -> None:
    """Writes both."""
    known: Known = {}
    found = [row for setting in SETTINGS for row in rows_of(setting, known)]
    harness.write_rows(rows, found)
    page.write_text(written(page.read_text(), found))
    print(tables(found))


if __name__ == "__main__":
    main()
