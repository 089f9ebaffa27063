"""Everything that a GPU is asked, in one command of limited time: ``python -m benchmarks.gpu_run --out DIR``.

Each part is a process of its own, with its own limit of time: one that fails, hangs or runs out of memory does not take
the others with it.  What is done so far is on disk at any moment: DIR ends up with rows.jsonl (the rows of all suites,
and one row for each part), log.txt, tests.txt where they ran, and a picture for each suite.  A table comes last.
``python -m benchmarks.store DIR`` then puts the rows where they are committed.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

from benchmarks import harness, plot, suite
from benchmarks.goals import goals
from benchmarks.harness import Row
from benchmarks.offline.prediction.steps import SETTINGS

MINUTES = 9  # for all parts together: the time of a GPU is dear
SMOKE_MINUTES = 20  # a limit for what hangs; on two cores all parts take two
TESTS, ROWS, LOG = "tests.txt", "rows.jsonl", "log.txt"
Name = Literal["device", "kernels", "layer", "sweep", "tests", "core", "stages", "model", "latency", "training"]
Commands = Callable[[str, bool, object], list[list[str]]]  # of device, smoke and folder


@dataclass(frozen=True)
class Part:
    """A part of a run; each of its commands may leave rows in FOLDER/NAME.jsonl, which are taken up."""

    name: str
    seconds: float  # how the time is shared out: what it gets where all run in the default of gpu_run
    commands: Commands
    needs: tuple[str, ...] = ()  # modules that must be there
    by_default: bool = True  # whether it runs unasked: what is most telling does, as long as it fits

    @property
    def missing(self) -> str | None:
        """Why it cannot run here; None: it can."""
        try:
            for module in self.needs:
                import_module(module)
        except ImportError as error:
            return str(error)
        return None


def of_suite(name: str, *runs: str, smoke: str = "", on_cpu: tuple[str, ...] = ()) -> Commands:
    """A suite with the options of each of its runs on a GPU; on a CPU it takes its own defaults, in one run."""

    def commands(device: str, small: bool, out: object) -> list[list[str]]:
        options = [f"--smoke {smoke}"] if small else [""] if device == "cpu" else runs
        python = [*(on_cpu if device == "cpu" else ()), sys.executable, "-m"]
        where = ["--device", device, "--out", str(out)]
        return [[*python, f"benchmarks.{name}", *where, *shlex.split(each)] for each in options]

    return commands


def pytests(*runs: str, smoke: str) -> Commands:
    """Runs of pytest with their options, several tests at a time but for a run that begins with "alone"."""
    pytest = f"env OMP_NUM_THREADS=1 {sys.executable} -m pytest -q --tb=short -p no:cacheprovider".split()
    parallel = ["-n", "auto", "--maxprocesses", "12"] if find_spec("xdist") else []

    def commands(device: str, small: bool, out: object) -> list[list[str]]:
        words = [shlex.split(run) for run in ([f"alone {smoke}"] if small else runs)]
        return [[*pytest, *run[1:]] if run[0] == "alone" else [*pytest, *parallel, *run] for run in words]

    return commands


INTERPRETER = ("env", "TRITON_INTERPRET=1")


def sweeps(device: str, small: bool, out: object) -> list[list[str]]:
    """Configurations of the three kernels that missed their prediction by most, of those that have rows in ``out``;
    where none has, of all."""
    path, shape = Path(str(out), ROWS), SETTINGS[0]
    rows = [row for row in (harness.read_rows(path) if path.exists() else []) if row.get("verdict") == "slower"]
    late = [row for row in rows if row["suite"] == "kernels" and shape.has(row, row["mode"])]
    late.sort(key=lambda row: row["predicted_us"] - 1e3 * row["median_ms"])
    runs = [
        f"--shapes {' '.join(map(str, shape[:4]))} --stages {name.removesuffix('_kernel')} --modes "
        + ("forward" if mode == "forward" else "forward+backward")
        for name, mode in dict.fromkeys((row["name"], row["mode"]) for row in late)
    ]
    return of_suite("sweep", *(runs[:3] or [""]), on_cpu=INTERPRETER)(device, small, out)


def figure(text: str, rows: Sequence[Row]) -> str:
    """The key figure of a part: what pytest counted, or what became of rows and goals."""
    last_lines = "\n".join(re.findall(r"^.*\b\d+ \w+.* in [\d.]+s.*$", text, re.MULTILINE))
    sums: Counter[str] = Counter()
    for number, kind in re.findall(r"(\d+) (passed|failed|error|skipped|xfailed|deselected)s?\b", last_lines):
        sums[kind] += int(number)
    for row in rows:
        state = "failed" if row.get("failure") else row.get("verdict") or row.get("skipped") or "timed"
        sums[state.split(":")[0]] += 1
    met = Counter(verdict.met for verdict in goals([row for row in rows if "skipped" in row and "mode" in row]))
    sums |= {"goals met": met[True], "goals missed": met[False]}
    return ", ".join(f"{number} {kind}" for kind, number in sums.items() if number)


QUICK = "--repeats 10 --budget-seconds 0.5"
"""Ten calls tell a median within a few percent on a GPU; what takes half a second altogether is slow enough to tell."""
CORE = (
    f"--dim 768 --sizes 1024 4096 16384 65536 --no-compiled {QUICK}",
    f"--dim 768 --sizes 4096 --heads 12 --compiled {QUICK}",
    f"--dim 1152 --sizes 4096 --heads 16 --no-compiled {QUICK}",
)
SIZES, BOTH = "--sizes 1024 4096 16384", "--modes forward backward"
SOFTMAX = "softmax 'softmax flash' 'softmax cudnn'"
LAYER = (
    f"--dims 768 --heads 12 1 {SIZES} {BOTH} --rivals {SOFTMAX} sana {QUICK}",
    f"--dims 1152 --heads 16 {SIZES} {BOTH} --rivals {SOFTMAX} sana {QUICK}",
    # Memory in training; that of inference is in the rows above.
    f"--dims 768 --heads 12 {SIZES} --modes forward+backward --rivals softmax sana --repeats 3 --budget-seconds 0.5",
    *(f"--dims {d} --heads {h} {SIZES} {BOTH} --rivals 'sana compiled' {QUICK}" for d, h in ((768, 12), (1152, 16))),
)
IMAGES = f"--sizes 256 1024 4096 {QUICK}"
EXAMPLES, TESTING = ("examples.dydi_lit",), ("pytest", "hypothesis")
PARTS = (
    # What the emulator cannot know: sizes past 2^31, CUDA graphs, asynchronous copies, three dtypes, compilation.  Some
    # 130 tests of about ten small kernels, a second each to compile, most of them by 12 processes at once.
    Part("device", 130, pytests(
        "alone tests/ops/test_device.py -k last_image",
        "tests/ops/test_device.py tests/ops/test_forms.py tests/ops/test_gluon_gradients.py -k 'not last_image'",
        "tests/ops/test_layer.py tests/ops/test_operators.py -k 'plain_pytorch or same_bits or give_the_bits'",
        smoke="tests/ops/test_device.py",
    ), TESTING),
    # Seven settings: 60 kernels to compile, a second each; a check and 12 steps of some milliseconds take the rest.
    Part("kernels", 95, of_suite("kernels", "", on_cpu=INTERPRETER), ("triton",)),
    # 81 layers of a second each, 24 with a rival that is compiled in ten, and five starts of a process.
    Part("layer", 255, of_suite("layer", *LAYER, smoke=BOTH)),
    # A second for each configuration, most of it compiling; a row each, so it may end anywhere.
    Part("sweep", 60, sweeps, ("triton",)),
    # Several hundred kernels are compiled, by 12 processes at once.
    Part("tests", 400, pytests(
        "tests/ops --ignore=tests/ops/test_device.py",
        "alone tests/ops/test_device.py",
        "tests --ignore=tests/ops --ignore=tests/benchmarks -m 'not slow'",
        smoke="tests/test_tokens.py",
    ), TESTING, by_default=False),
    # Three forms of our kernels to compile, heads of 64, of 72 and one; torch.compile at one size only.
    Part("core", 80, of_suite("core", *CORE, smoke="--dim 128 --modes forward"), by_default=False),
    # Two sizes: a stage grows with N as its bytes do.
    Part("stages", 45, of_suite("stages", f"--sizes 4096 16384 {QUICK}", smoke=f"--dim 128 {BOTH}"), by_default=False),
    # Three sides of images; DiT's step at 4096 pixels takes most of it.
    Part("model", 45, of_suite("model", IMAGES, smoke="--modes forward"), EXAMPLES, by_default=False),
    # Three sides, one image at a time.
    Part("latency", 25, of_suite("latency", IMAGES, smoke="--batches 1"), EXAMPLES, by_default=False),
    # One size, two seeds, four runs of each, 300 steps of some 20 ms, and half a minute of compiling.
    Part("training", 120, of_suite("training", "--models tiny"), EXAMPLES, by_default=False),
)  # fmt: skip
"""In the order in which they run: what is wrong or slow is told before what is nice to know."""


@dataclass(frozen=True)
class Config:
    """All that a GPU is asked, in one go."""

    out: Path  # Folder for rows, pictures and logs, few files.
    part: tuple[Name, ...] = ()  # Parts to run; by default the first four, and with --smoke all.
    device: str = "cuda"  # Where to run: cuda or cpu.
    smoke: bool = False  # Try everything on tiny sizes: numbers of no meaning.
    minutes: float = 0  # For the chosen parts together; by default 9, and 20 with --smoke.


class Outcome(NamedTuple):
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
            if (found := out / f"{part.name}.jsonl").exists():
                rows += harness.read_rows(found)
                found.unlink()  # because they live on in that of all parts
    failures = list(dict.fromkeys(state for state in states if state != "passed"))
    text = shortened(path.read_bytes())
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
    finally:  # of what is left, politely at first: pytest then says what failed, and rows and locks are whole
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(process.pid, number)
                process.wait(5)
        process.wait()


def shortened(output: bytes, most: int = 2**20) -> str:
    """The output as text, without its middle where it is longer than ``most`` bytes."""
    if len(output) > most:
        output = output[: most // 2] + b"\n[...]\n" + output[-most // 2 :]
    return output.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(any(outcome.bad for outcome in main(tyro.cli(Config))))
