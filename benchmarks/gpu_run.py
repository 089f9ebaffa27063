"""Everything that a GPU is asked, in one command of limited time: ``python -m benchmarks.gpu_run --out DIR``.

Each part is a process of its own, with its own limit of time: one that fails, hangs or runs out of memory does not take
the others with it.  What is done so far is on disk at any moment: DIR ends up with rows.jsonl (the rows of all suites,
and one row for each part), tests.txt, log.txt and a picture for each suite, eight files at most.  A table comes last.
``python -m benchmarks.store DIR`` then puts the rows where they are committed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import tyro

from benchmarks import harness, plot, suite
from benchmarks.harness import Row
from benchmarks.parts import PARTS, Name, Part, figure

MINUTES = 7.5
"""For all parts together: the time of a GPU is dear."""
SMOKE_MINUTES = 20
"""A limit for what hangs; on two cores all parts take two."""
LARGEST_OUTPUT = 2**20
"""Bytes of a part's output that are kept, half from the start and half from the end."""
TESTS, ROWS, LOG = "tests.txt", "rows.jsonl", "log.txt"


@dataclass(frozen=True)
class Config:
    """All that a GPU is asked, in one go."""

    out: Path
    """Folder for rows, pictures and logs, 8 files at most."""
    part: tuple[Name, ...] = ()
    """Parts to run; by default all but training, and with --smoke all."""
    device: str = "cuda"
    """Where to run: cuda or cpu."""
    smoke: bool = False
    """Try everything on tiny sizes: numbers of no meaning."""
    minutes: float = 0
    """For the chosen parts together; by default 7.5, and 20 with --smoke."""


class Outcome(NamedTuple):
    """How a part went."""

    part: str
    state: str
    seconds: float = 0
    figure: str = ""

    @property
    def bad(self) -> bool:
        return not self.state.startswith(("passed", "left out"))


def main(config: Config, parts: Sequence[Part] = PARTS) -> list[Outcome]:
    """Runs those of the parts that are asked for in turn, prints the table and returns it.

    A part may take the fraction that its seconds are of those that are left, so that what one does not need goes to
    those behind it.
    """
    out = config.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (TESTS, ROWS, LOG):
        (out / old).unlink(missing_ok=True)
    unasked = [part.name for part in parts if config.smoke or part.by_default]
    parts = [part for part in parts if part.name in (config.part or unasked)]
    for part in parts:
        if part.missing:
            print(f"{part.name} is left out: {part.missing}", flush=True)
    facts = harness.environment("cpu")  # this process leaves the GPU to the parts
    known = {name: facts[name] for name in ("commit", "dydila_kernels", "torch", "python", "triton", "date")}

    rows: list[Row] = []
    outcomes: list[Outcome] = []
    end = time.monotonic() + 60 * (config.minutes or (SMOKE_MINUTES if config.smoke else MINUTES))
    for number, part in enumerate(parts):
        limit = part.seconds / sum(later.seconds for later in parts[number:]) * (end - time.monotonic())
        outcome, found = run(part, part.commands(config.device, config.smoke, out), limit, out)
        outcomes.append(outcome)
        rows += [*found, {"suite": "gpu_run", **outcome._asdict(), **known}]
        harness.write_rows(out / ROWS, rows)
    try:
        plot.draw_all(rows, out, widths=1)
    except Exception as error:  # the rows are stored, and can be drawn elsewhere
        print(f"no pictures: {type(error).__name__}: {error}", flush=True)
    table = suite.table({"part": o.part, "seconds": round(o.seconds), "what": o.state, "": o.figure} for o in outcomes)
    print(table, flush=True)
    with (out / LOG).open("a") as log:
        log.write(f"\n{table}\n")
    return outcomes


def run(part: Part, commands: Sequence[Sequence[str]], limit: float, out: Path) -> tuple[Outcome, list[Row]]:
    """Runs the commands of a part, the later ones also where an earlier one fails, for ``limit`` seconds at most."""
    if part.missing:
        return Outcome(part.name, f"left out: {part.missing}"), []
    print(f"{part.name}: at most {limit:.0f} s", flush=True)
    path = out / f"{part.name}.txt"
    started = time.monotonic()
    states: list[str] = []
    rows: list[Row] = []
    with path.open("w") as output:
        for command in commands:
            print(f"$ {' '.join(command)}", file=output, flush=True)
            left = limit - (time.monotonic() - started)
            states.append(state_of(command, left, output.fileno()) if left > 0 else "out of time")
            rows += take_rows(out / f"{part.name}.jsonl")
    failures = list(dict.fromkeys(state for state in states if state != "passed"))
    text = shortened(path.read_bytes(), LARGEST_OUTPUT)
    outcome = Outcome(part.name, ", ".join(failures) or "passed", time.monotonic() - started, figure(text, rows))
    if path.name == TESTS:
        path.write_text(text)
    else:
        path.unlink()
        with (out / LOG).open("a") as log:
            log.write(f"==== {part.name}: {outcome.state}\n{text}\n")
    if failures:
        print("\n".join(text.splitlines()[-15:]), flush=True)
    print(f"{part.name}: {outcome.state} after {outcome.seconds:.0f} s {outcome.figure}", flush=True)
    return outcome, rows


def state_of(command: Sequence[str], limit: float, output: int) -> str:
    """Runs one command, with all processes that it starts in a group of its own, which is ended with it."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        command, cwd=harness.REPOSITORY, env=environment, stdin=subprocess.DEVNULL,
        stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(limit)
        return "passed" if code == 0 else f"killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:  # of what is left, politely at first, so that rows and locks are whole
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(5)
        process.wait()


def take_rows(path: Path) -> list[Row]:
    """The rows that a part has stored so far; its file goes, because they live on in that of all parts."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with suppress(ValueError):  # the last line may be cut where the part was killed
            rows.append(json.loads(line))
    path.unlink(missing_ok=True)
    return rows


def shortened(output: bytes, most: int) -> str:
    """The output as text, without its middle where it is longer than ``most`` bytes."""
    if len(output) > most:
        output = output[: most // 2] + b"\n[...]\n" + output[-most // 2 :]
    return output.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(any(outcome.bad for outcome in main(tyro.cli(Config))))
