"""What a GPU run is made of, and how the minutes are shared out: :mod:`benchmarks.gpu_run` runs these in order."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.harness import Row
from benchmarks.plot import BASELINES, OURS
from benchmarks.suite import milliseconds

Name = Literal["tests", "ceilings", "core", "stages", "layer", "model", "latency", "training", "sweep"]
SUITES_NEED = ("tabulate", "tqdm", "tyro")
MODELS_NEED = (
    "accelerate", "diffusers", "huggingface_hub", "matplotlib", "PIL", "psutil", "safetensors", "sklearn",
    "tensorboard", "torchmetrics",
)  # fmt: skip
"""Of the example, whose models are measured, beside those: without one of them it does not import."""


Commands = Callable[[str, bool, object], list[list[str]]]
"""Of device, smoke and folder; each command may leave rows in FOLDER/NAME.jsonl, which are taken up."""


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Attributes:
        seconds: how the time is shared out: what it gets where all run in the default of gpu_run.
        figure: the key figure for the table, of the text printed and the rows.
        needs: packages without which it cannot run.
        by_default: whether it runs unasked; else it is too long to share a run with others.
    """

    name: str
    seconds: float
    commands: Commands
    figure: Callable[[str, list[Row]], str]
    needs: tuple[str, ...] = SUITES_NEED
    by_default: bool = True

    @property
    def missing(self) -> list[str]:
        return absent(self.needs)


def absent(packages: Sequence[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name) is None]


def python(module: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", module, *arguments]


def suite(name: str, *runs: str, smoke: str = "") -> Commands:
    """A suite with the options of each of its runs on a GPU; on a CPU it takes its own defaults, in one run."""

    def commands(device: str, small: bool, out: object) -> list[list[str]]:
        options = [f"--smoke {smoke}"] if small else [""] if device == "cpu" else runs
        fixed = (f"benchmarks.{name}", "--device", device, "--out", str(out))
        return [python(*fixed, *each.split()) for each in options]

    return commands


def tests(device: str, smoke: bool, out: object) -> list[list[str]]:
    """The kernels' tests, then those that fill the memory, alone, then the short ones of all else."""
    pytest = ["env", "OMP_NUM_THREADS=1", *python("pytest", "-q", "--tb=short", "-p", "no:cacheprovider")]
    if smoke:
        return [[*pytest, "tests/ops/test_device.py"], [*pytest, "tests/test_tokens.py"]]
    parallel = pytest if absent(["xdist"]) else [*pytest, "-n", "8"]
    example = ["--ignore=tests/dydi_lit"] if absent([*SUITES_NEED, *MODELS_NEED]) else []
    return [
        [*parallel, "tests/ops", "--ignore=tests/ops/test_device.py"],
        [*pytest, "tests/ops/test_device.py"],
        [*parallel, "tests", "--ignore=tests/ops", "--ignore=tests/benchmarks", *example, "-m", "not slow"],
    ]


def ceilings(device: str, smoke: bool, out: object) -> list[list[str]]:
    return [python("benchmarks.roofline", "--device", device, *(["--smoke"] if smoke else []))]


def sweep(device: str, smoke: bool, out: object) -> list[list[str]]:
    (command,) = suite("sweep", "")(device, smoke, out)
    return [["env", "TRITON_INTERPRET=1", *command] if device == "cpu" else command]


def counts(text: str, rows: list[Row]) -> str:
    """The sums of what pytest counted."""
    last_lines = "\n".join(re.findall(r"^.*\b\d+ \w+.* in [\d.]+s.*$", text, re.MULTILINE))
    sums: Counter[str] = Counter()
    for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped|xfailed|deselected)s?\b", last_lines):
        sums[kind] += int(number)
    return ", ".join(f"{number} {kind}" for kind, number in sums.items())


def rates(text: str, rows: list[Row]) -> str:
    """The ceilings in GB/s, read and written, and TFLOP/s."""
    found = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


def against_softmax(text: str, rows: list[Row]) -> str:
    """Time of softmax, or DiT, over ours, forward, the faster of several heads, at the largest size that has both."""
    theirs = next(name for name in BASELINES if any(row["name"] == name for row in rows))
    times: dict[int, dict[bool, float]] = {}
    for row in rows:
        if row["mode"] == "forward" and not row["skipped"] and row["name"] in (*OURS, theirs):
            best, ours = times.setdefault(row["tokens"], {}), row["name"] in OURS
            best[ours] = min(milliseconds(row), best.get(ours, milliseconds(row)))
    for tokens, best in sorted(times.items(), reverse=True):
        if len(best) == 2:
            ratio = best[False] / best[True]
            return f"{count(rows)}; forward at N = {tokens}: {ratio:.3g} times as fast as {theirs}"
    return count(rows)


def furthest(text: str, rows: list[Row]) -> str:
    """The stage of ours that is furthest from its ceiling."""
    ours = [row for row in rows if row["name"] == "dydila" and "percent_of_ceiling" in row]
    worst = min(ours, key=lambda row: row["percent_of_ceiling"])
    where = f"{worst['stage']} {worst['mode']} at N = {worst['tokens']}"
    return f"{count(rows)}; furthest from its ceiling: {where}, {worst['percent_of_ceiling']:.0f} %"


def gains(text: str, rows: list[Row]) -> str:
    """The best configuration that was found."""
    ratios = {row["median_ms"] / row["table_ms"]: row["stage"] for row in rows if row["median_ms"] is not None}
    return f"{len(rows)} tried; best: {ratios[min(ratios)]}, {min(ratios):.3f} of the table's time"


def agreement(text: str, rows: list[Row]) -> str:
    """How far the losses of the two backends are apart, and those of two seeds, for the largest model."""
    row = [row for row in rows if "difference" in row][-1]
    apart = f"losses of backends differ by {row['difference']:.2g}, of seeds by {row['spread']:.2g}"
    return f"{count(rows)}; {row['size']}: {apart}"


def count(rows: list[Row]) -> str:
    """How many rows have a time, and what became of the others."""
    states = Counter((row["skipped"] or "timed").split(":")[0] for row in rows)
    return ", ".join(f"{number} {state}" for state, number in states.items())


QUICK = "--repeats 10 --budget-seconds 0.5"
"""Ten calls tell a median within a few percent on a GPU; what takes half a second altogether is slow enough to tell."""
CORE = (
    f"--dim 768 --sizes 1024 4096 16384 65536 --no-compiled {QUICK}",
    f"--dim 768 --sizes 4096 --heads 12 --compiled {QUICK}",
    f"--dim 1152 --sizes 4096 --heads 16 --no-compiled {QUICK}",
)
IMAGES = f"--sizes 256 1024 4096 {QUICK}"
TWO = "--modes forward backward"
PARTS = (
    # Several hundred kernels are compiled, by 8 processes at once; correctness goes before all else.
    Part("tests", 140, tests, counts, ("pytest", "hypothesis")),
    # 60 copies and products, and the start of a process.
    Part("ceilings", 15, ceilings, rates),
    # Three forms of our kernels to compile, heads of 64, of 72 and one; torch.compile at one size only.
    Part("core", 80, suite("core", *CORE, smoke=f"--dim 128 {TWO}"), against_softmax),
    # Two sizes: a stage grows with N as its bytes do.
    Part("stages", 45, suite("stages", f"--sizes 4096 16384 {QUICK}"), furthest),
    # The width of the speed table.
    Part("layer", 50, suite("layer", f"--dims 384 {QUICK}", smoke=TWO), against_softmax),
    # Three sides of images; DiT's step at 4096 pixels takes most of it.
    Part("model", 45, suite("model", IMAGES, smoke="--modes forward"), against_softmax, SUITES_NEED + MODELS_NEED),
    # Three sides, one image at a time.
    Part("latency", 25, suite("latency", IMAGES, smoke="--batches 1"), against_softmax, SUITES_NEED + MODELS_NEED),
    # Two sizes, two seeds, four runs of each, 300 steps; for a call of its own.
    Part("training", 400, suite("training", ""), agreement, SUITES_NEED + MODELS_NEED, by_default=False),
    # About a second for each configuration, most of it compiling; a row each, so it may end anywhere.
    Part("sweep", 50, sweep, gains, (*SUITES_NEED, "triton")),
)
"""In the order in which they run: what is wrong or slow is told before what is nice to know."""
