"""Writes the table of compiled kernels, or checks the kernels against it.

``python -m benchmarks.offline`` compiles every launch configuration for every target and updates the table;
``--check`` compiles again and fails where a kernel breaks a rule or got worse than its row of the table; ``--predict``
says what a model of the machine code expects of a call of any shape.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import triton
import tyro
from tqdm import tqdm

from benchmarks.offline.cases import Case, cases
from benchmarks.offline.compiling import TARGETS, Job, figures, record
from benchmarks.offline.prediction.call import Shape, predictions, report
from benchmarks.offline.table import PATH, key, problems, read_table, write_table


@dataclass(frozen=True)
class Config:
    """Compile the kernels for every target, without a GPU."""

    check: bool = False  # Compare with the table instead of updating it.
    subset: bool = False  # Only what is most likely to go wrong, in a few minutes.
    only: str = ""  # Only kernels whose stage or name contains this.
    target: str = ""  # Only this target.
    workers: int = 2  # Processes.
    table: Path = PATH  # Where the table is.
    predict: bool = False  # Print predictions for one call of ``shape``, forward and backward, and do nothing else.
    shape: Shape = field(default_factory=Shape)


def jobs(chosen: Iterable[Case]) -> list[Job]:
    """All that the cases launch, each once."""
    found: dict[str, Job] = {}
    names: Counter[tuple[str, ...]] = Counter()
    for case, (name, target) in product(chosen, TARGETS.items()):
        labels = {"stage": case.stage, "dtype": case.dtype, "d": case.d, "head": case.head}
        for job in record(case.call, labels, name, target):
            if found.setdefault(job.identity, job) is job:
                names[key(job.labels)] += 1
                if (count := names[key(job.labels)]) > 1:  # differs in the type or alignment of an argument only
                    job.labels["options"] += f" #{count}"
    return list(found.values())


def in_subset(job: Job) -> bool:
    """bf16 at the smallest width and for heads of 72, neither a power of two; a target of little shared memory, the one
    most used, and one of the other vendor."""
    dtype, d, head, target = (job.labels[name] for name in ("dtype", "d", "head", "target"))
    return dtype == "bf16" and (d == 384 or head == 72) and target in ("sm_86", "sm_90", "gfx942")


def main(config: Config) -> int:
    if config.predict:
        print(report(predictions(config.shape)))
        return 0
    everything, todo = jobs(cases()), []
    for job in everything:
        named = config.only in f"{job.labels['stage']}/{job.labels['kernel']}"
        if named and config.target in ("", job.labels["target"]) and (in_subset(job) or not config.subset):
            todo.append(job)
    if not todo:
        print("nothing to compile")
        return 1
    table = read_table(config.table) if config.check or config.table.exists() else []
    with ProcessPoolExecutor(config.workers, mp_context=get_context("forkserver")) as pool:
        rows = list(tqdm(pool.map(figures, todo), total=len(todo), disable=None))
    found = problems(rows, table if config.check else None)
    if not config.check:
        update = {key(row): row for row in [*table, *rows]}
        write_table(config.table, [update[key(job.labels)] for job in everything if key(job.labels) in update])
    print(*found, f"{len(rows)} kernels compiled by Triton {triton.__version__}, {len(found)} problems", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Config)))
