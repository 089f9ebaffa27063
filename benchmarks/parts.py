"""What a GPU run is made of, and how the minutes are shared out: :mod:`benchmarks.gpu_run` runs these in order."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from benchmarks.goals import goals
from benchmarks.harness import Row

Name = Literal["tests", "ceilings", "core", "stages", "layer", "model", "latency", "training", "sweep"]
Commands = Callable[[str, bool, object], list[list[str]]]
"""Of device, smoke and folder; each command may leave rows in FOLDER/NAME.jsonl, which are taken up."""


@dataclass(frozen=True)
class Part:
    """A part of a run.

    Attributes:
        seconds: how the time is shared out: what it gets where all run in the default of gpu_run.
        needs: modules that must be there.
        by_default: whether it runs unasked; else it is too long to share a run with others.
    """

    name: str
    seconds: float
    commands: Commands
    needs: tuple[str, ...] = ()
    by_default: bool = True

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None: it can."""
        try:
            for module in self.needs:
                import_module(module)
        except ImportError as error:
            return str(error)
        return None


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
    parallel = [*pytest, "-n", "8"] if find_spec("xdist") else pytest
    return [
        [*parallel, "tests/ops", "--ignore=tests/ops/test_device.py"],
        [*pytest, "tests/ops/test_device.py"],
        [*parallel, "tests", "--ignore=tests/ops", "--ignore=tests/benchmarks", "-m", "not slow"],
    ]


def ceilings(device: str, smoke: bool, out: object) -> list[list[str]]:
    return [python("benchmarks.roofline", "--device", device, *(["--smoke"] if smoke else []))]


def sweep(device: str, smoke: bool, out: object) -> list[list[str]]:
    (command,) = suite("sweep", "")(device, smoke, out)
    return [["env", "TRITON_INTERPRET=1", *command] if device == "cpu" else command]


def figure(text: str, rows: Sequence[Row]) -> str:
    """The key figure of a part: what pytest counted, the rates of the ceilings, or what became of rows and goals."""
    last_lines = "\n".join(re.findall(r"^.*\b\d+ \w+.* in [\d.]+s.*$", text, re.MULTILINE))
    sums: Counter[str] = Counter()
    for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped|xfailed|deselected)s?\b", last_lines):
        sums[kind] += int(number)
    sums.update((row.get("skipped") or "timed").split(":")[0] for row in rows)
    met = Counter(verdict.met for verdict in goals([row for row in rows if "skipped" in row and "mode" in row]))
    sums |= {"goals met": met[True], "goals missed": met[False]}
    rates = [f"{name} {float(rate):.4g}" for name, rate in re.findall(r'"(\w+_s)": ([\d.]+)', text)]
    return ", ".join([*rates, *(f"{number} {kind}" for kind, number in sums.items() if number)])


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
    Part("tests", 140, tests, ("pytest", "hypothesis")),
    # 60 copies and products, and the start of a process.
    Part("ceilings", 15, ceilings),
    # Three forms of our kernels to compile, heads of 64, of 72 and one; torch.compile at one size only.
    Part("core", 80, suite("core", *CORE, smoke=f"--dim 128 {TWO}")),
    # Two sizes: a stage grows with N as its bytes do.
    Part("stages", 45, suite("stages", f"--sizes 4096 16384 {QUICK}", smoke="--dim 128")),
    # The width of the speed table.
    Part("layer", 50, suite("layer", f"--dims 384 {QUICK}", smoke=TWO)),
    # Three sides of images; DiT's step at 4096 pixels takes most of it.
    Part("model", 45, suite("model", IMAGES, smoke="--modes forward"), ("examples.dydi_lit",)),
    # Three sides, one image at a time.
    Part("latency", 25, suite("latency", IMAGES, smoke="--batches 1"), ("examples.dydi_lit",)),
    # Two sizes, two seeds, four runs of each, 300 steps; for a call of its own.
    Part("training", 400, suite("training", ""), ("examples.dydi_lit",), by_default=False),
    # About a second for each configuration, most of it compiling; a row each, so it may end anywhere.
    Part("sweep", 50, sweep, ("triton",)),
)
"""In the order in which they run: what is wrong or slow is told before what is nice to know."""
