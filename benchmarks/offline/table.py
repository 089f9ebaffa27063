"""The table of compiled kernels: its columns, its file, and what a kernel must not do."""

import csv
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import REPOSITORY, Row
from benchmarks.offline.compiling import TARGETS

PATH = REPOSITORY / "benchmarks" / "results" / "offline.csv"
LABELS = ("stage", "kernel", "dtype", "d", "head", "options", "warps", "stages", "target")
FIGURES = ("registers", "stack", "shared", "resident_warps", "instructions", "mufu", "dots", "tensor_core")
PREDICTED = ("predicted_us", "predicted_barriers")
"""Microseconds of the launch on an H200 and barriers that a warp passes, from a model and not from a measurement; only
for its target, and only where no loop ends by data."""
STACK = 64
"""Bytes: a few spilled registers cost nothing that can be measured, more than these do."""
SLACK = 1.1
"""Registers and instructions may grow by this factor: any edit moves them a little."""
SLOWER = 1.05
"""The same for predicted microseconds."""


def faults(row: Row) -> list[str]:
    """The rules that a kernel breaks."""
    if "error" in row:
        return [row["error"]]
    limit, found = TARGETS[row["target"]].shared, []
    if row["stack"] > STACK:
        found.append(f"{row['stack']} bytes of stack, {STACK} allowed: it spills registers")
    if row["shared"] > limit:
        found.append(f"{row['shared']} bytes of shared memory, the target has {limit}")
    if row["dots"] and not row["tensor_core"]:
        found.append("a matrix product, but no tensor-core instruction")
    return found


def losses(row: Row, before: Row) -> list[str]:
    """The figures that got worse; another version of Triton is not to be compared with."""
    if row["triton"] != before["triton"]:
        return []
    slack = {"registers": SLACK, "instructions": SLACK}
    worse = [
        f"{name} {before[name]} -> {row[name]}"
        for name in ("registers", "stack", "shared", "instructions", "mufu")
        if row[name] > before[name] * slack.get(name, 1)
    ]
    if row["resident_warps"] < before["resident_warps"]:
        worse.append(f"resident warps {before['resident_warps']} -> {row['resident_warps']}")
    for name, allowed in zip(PREDICTED, (SLOWER, 1), strict=True):
        if name in row and name in before and row[name] > before[name] * allowed:
            worse.append(f"{name} {before[name]} -> {row[name]}, by the model")
    return worse


def key(row: Row) -> tuple[str, ...]:
    """What tells rows of the table apart."""
    return tuple(str(row[label]) for label in LABELS)


def problems(rows: Sequence[Row], table: Sequence[Row] | None = None) -> list[str]:
    """A line for each rule broken and, given a table, each figure that got worse and each row that the table lacks."""
    before = None if table is None else {key(row): row for row in table}
    found = []
    for row in rows:
        wrong = faults(row)
        if before is not None and not wrong:
            old = before.get(key(row))
            wrong = ["not in the table: run python -m benchmarks.offline"] if old is None else losses(row, old)
        name = "{stage}/{kernel} {dtype} d={d} head={head} {target}".format(**row)
        found += [f"{name}: {fault} ({row['options']} warps={row['warps']} stages={row['stages']})" for fault in wrong]
    return found


def write_table(path: Path, rows: Sequence[Row]) -> None:
    """All rows but those that have no figures."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*LABELS, "triton", *FIGURES, *PREDICTED], lineterminator="\n")
        writer.writeheader()
        writer.writerows(row for row in rows if "error" not in row)


def read_table(path: Path) -> list[Row]:
    """The rows that :func:`write_table` stored."""
    types: dict[str, type] = {**dict.fromkeys(FIGURES, int), "predicted_us": float, "predicted_barriers": int}
    with path.open(newline="") as file:
        return [
            {name: types.get(name, str)(value) for name, value in row.items() if value or name not in PREDICTED}
            for row in csv.DictReader(file)
        ]
