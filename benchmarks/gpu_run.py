"""Everything that a GPU is asked, in one command of limited time: ``python -m benchmarks.gpu_run --out DIR``.

Each part is a process of its own, with its own limit of time: one that fails, hangs or runs out of memory does not take
the others with it.  What is done so far is on disk at any moment: DIR ends up with rows.jsonl (the rows of all suites,
and one row for each part), tests.txt, log.txt and a picture for each suite, eight files at most.  A table comes last.
``python -m benchmarks.store DIR`` then puts the rows where they are committed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.parts import PARTS, Command, Part

MINUTES = 7.5
"""For all parts together: minutes on a GPU are dear, and a command on a borrowed one is often stopped after ten."""
SMOKE_MINUTES = 20
"""A limit for what hangs; on two cores all parts take two."""
LARGEST_OUTPUT = 2**20
"""Bytes of a part's output that are kept, half from the start and half from the end."""
TESTS, ROWS, LOG = "tests.txt", "rows.jsonl", "log.txt"


@dataclass(frozen=True)
class Outcome:
    """How a part went."""

    part: str
    state: str
    seconds: float
    figure: str

    @property
    def bad(self) -> bool:
        return not self.state.startswith(("passed", "left out"))


def main(
    out: Path, parts: Sequence[Part], *, device: str = "cuda", smoke: bool = False, minutes: float = MINUTES
) -> list[Outcome]:
    """Runs the parts in turn within ``minutes``, prints the table and returns it.

    A part may take its share of the time that is left, so that what one does not need goes to those behind it.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for old in (TESTS, ROWS, LOG):
        (out / old).unlink(missing_ok=True)
    missing = {part.name: [name for name in part.needs if importlib.util.find_spec(name) is None] for part in parts}
    for name in sorted({name for names in missing.values() for name in names}):
        without = [part for part, names in missing.items() if name in names]
        print(f"{name} is not installed: without it no {', '.join(without)}", flush=True)

    rows: list[Row] = []
    outcomes: list[Outcome] = []
    end = time.monotonic() + 60 * minutes
    for number, part in enumerate(parts):
        share = part.seconds / sum(later.seconds for later in parts[number:])
        limit = share * (end - time.monotonic())
        if missing[part.name]:
            outcome = Outcome(part.name, f"left out: no {', '.join(missing[part.name])}", 0, "")
        else:
            outcome, found = run(part, part.commands(device, smoke, out), limit, out)
            rows += found
        outcomes.append(outcome)
        rows.append(row_of(outcome))
        harness.write_rows(out / ROWS, rows)
    draw(rows, out)
    print(table(outcomes), flush=True)
    with (out / LOG).open("a") as log:
        log.write(f"\n{table(outcomes)}\n")
    return outcomes


def run(part: Part, commands: Sequence[Command], limit: float, out: Path) -> tuple[Outcome, list[Row]]:
    """Runs the commands of a part, the later ones also where an earlier one fails, for ``limit`` seconds at most."""
    print(f"{part.name}: at most {limit:.0f} s", flush=True)
    path = out / f"{part.name}.txt"
    started = time.monotonic()
    states: list[str] = []
    rows: list[Row] = []
    with path.open("w") as output:
        for command in commands:
            print(f"$ {command}", file=output, flush=True)
            left = limit - (time.monotonic() - started)
            states.append(state_of(command, left, output.fileno()) if left > 0 else "out of time")
            rows += take_rows(out / f"{part.name}.jsonl")
    failures = list(dict.fromkeys(state for state in states if state != "passed"))
    text = shortened(path.read_bytes(), LARGEST_OUTPUT)
    outcome = Outcome(
        part.name, ", ".join(failures) or "passed", time.monotonic() - started, figure_of(part.figure, text, rows)
    )
    with (out / LOG).open("a") as log:
        log.write(f"==== {part.name}: {outcome.state}\n{'' if part.name == 'tests' else text}\n")
    if part.name == "tests":
        (out / TESTS).write_text(text)
    else:
        path.unlink()
    if failures:
        print("\n".join(text.splitlines()[-15:]), flush=True)
    print(f"{part.name}: {outcome.state} after {outcome.seconds:.0f} s {outcome.figure}", flush=True)
    return outcome, rows


def state_of(command: Command, limit: float, output: int) -> str:
    """Runs one command, with all processes that it starts in a group of its own, which is ended with it."""
    environment = {**os.environ, "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", **command.environment}
    process = subprocess.Popen(
        command.arguments, cwd=harness.REPOSITORY, env=environment, stdin=subprocess.DEVNULL,
        stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(limit)
        return "passed" if code == 0 else f"killed by signal {-code}" if code < 0 else f"failed with exit code {code}"
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a process and those it started: politely at first, so that rows and locks are whole."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def take_rows(path: Path) -> list[Row]:
    """The rows that a part has stored so far; its file goes, because they live on in that of all parts."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        with suppress(ValueError):  # the last line may be cut where the part was killed
            rows.append(json.loads(line))
    path.unlink()
    return rows


def figure_of(figure: Callable[[str, list[Row]], str], text: str, rows: list[Row]) -> str:
    """The key figure; a part that was stopped may have none."""
    try:
        return figure(text, rows)
    except (KeyError, IndexError, ValueError, StopIteration):
        return ""


def row_of(outcome: Outcome) -> Row:
    """An outcome as a row, so that the rows of a run tell what went wrong in it."""
    facts = harness.environment("cpu")  # this process leaves the GPU to the parts
    known = {name: facts[name] for name in ("commit", "dydila_kernels", "torch", "python", "triton", "date")}
    return {"suite": "gpu_run", **asdict(outcome), **known}


def shortened(output: bytes, most: int) -> str:
    """The output as text, without its middle where it is longer than ``most`` bytes."""
    if len(output) > most:
        output = output[: most // 2] + b"\n[...]\n" + output[-most // 2 :]
    return output.decode(errors="replace")


def draw(rows: Sequence[Row], out: Path) -> None:
    """A picture for each suite; a run is not lost for want of one."""
    try:
        from benchmarks import plot

        plot.draw_all(rows, out, widths=1)
    except Exception as error:  # the rows are stored, and can be drawn elsewhere
        print(f"no pictures: {type(error).__name__}: {error}", flush=True)


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each part."""
    return "\n".join(
        ["part       seconds  what"]
        + [f"{o.part:10} {o.seconds:7.0f}  {o.state}{'; ' if o.figure else ''}{o.figure}" for o in outcomes]
    )


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Without tyro, which a borrowed machine may lack: this command is to say so, not to fail."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu_run", description="All that a GPU is asked, in one go.")
    parser.add_argument("--out", type=Path, required=True, help="folder for rows, pictures and logs, 8 files at most")
    names = [part.name for part in PARTS]
    on_request = ", ".join(part.name for part in PARTS if part.on_request)
    what = f"{', '.join(names)}; default all but {on_request}, or all with --smoke"
    parser.add_argument("--part", nargs="+", choices=names, metavar="NAME", help=what)
    parser.add_argument("--device", default="cuda", help="cuda or cpu; default cuda")
    parser.add_argument("--smoke", action="store_true", help="try everything on tiny sizes: numbers of no meaning")
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"for the chosen parts together; default {MINUTES}, or {SMOKE_MINUTES} with --smoke",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    chosen = parsed(None)
    outcomes = main(
        chosen.out,
        [part for part in PARTS if (part.name in chosen.part if chosen.part else chosen.smoke or not part.on_request)],
        device=chosen.device,
        smoke=chosen.smoke,
        minutes=chosen.minutes or (SMOKE_MINUTES if chosen.smoke else MINUTES),
    )
    sys.exit(any(outcome.bad for outcome in outcomes))
