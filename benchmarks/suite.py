"""How a suite runs: contenders that meet the same input are checked, then timed in turn, and become rows.

A contender whose results are wrong, who is not installed, runs out of memory or fails gets a row that says so under
"skipped", and no time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import torch
import tyro
from tabulate import tabulate
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks import harness, roofline
from benchmarks.goals import goals, verdicts
from benchmarks.harness import Call, Row
from benchmarks.roofline import Cost, Shape

Mode = Literal["forward", "backward", "forward+backward"]
MODES: tuple[Mode, ...] = ("forward", "backward", "forward+backward")
WRONG = "wrong: the error is over twice that of plain PyTorch"
FLUSHED = 2**28  # bytes that pass before each timed call, more than the last cache has: inputs come from memory
CHECKED_TOKENS = 48**2  # tokens of the image that a check is done on at most: longer ones take the same path
Result = TypeVar("Result")


@dataclass(frozen=True)
class Options(harness.Options):
    """What every suite can be told."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # Auto is bfloat16 on a GPU, else float32.
    sizes: tuple[int, ...] = ()  # Numbers of tokens N, each a square; by default those that suit the device.
    modes: tuple[Mode, ...] = MODES  # What to time; the backward pass is timed on its own as well.
    repeats: int = 0  # Timed calls of each contender, after one to warm up; by default 7 on a CPU and 30 on a GPU.
    budget_seconds: float = 20.0  # No further calls of a contender that has taken so long (s); one is always made.

    @property
    def torch_dtype(self) -> torch.dtype:
        name = ("bfloat16" if self.on_gpu else "float32") if self.dtype == "auto" else self.dtype
        return getattr(torch, name)

    def lengths(self, cpu: Sequence[int], gpu: Sequence[int]) -> Sequence[int]:
        """The sizes to run: those asked for, else those of the device."""
        return (64, 256) if self.smoke else self.sizes or (gpu if self.on_gpu else cpu)

    def batch(self, tokens: int, together: int = 65536) -> int:
        """Images of so many tokens: on a GPU as many as have so many ``together``."""
        return max(together // tokens, 1) if self.on_gpu and not self.smoke else 1


class Case(NamedTuple):
    """A contender of one of the attention suites by its name, what it meets, and the stage that it is about, if any."""

    name: str
    mode: Mode
    shape: Shape
    device: str
    stage: str = ""

    @property
    def labels(self) -> Row:
        stage = {"stage": self.stage} if self.stage else {}
        where = {"mode": self.mode, "dim": self.shape.dim, "batch": self.shape.batch, "tokens": self.shape.tokens}
        return {"name": self.name, "heads": self.shape.heads, **stage, **where}

    @property
    def checked(self) -> "Case":
        return self.one_of(min(self.shape.tokens, CHECKED_TOKENS), "forward")

    def one_of(self, tokens: int, mode: Mode) -> "Case":
        """The whole for one image of so many tokens."""
        return self._replace(mode=mode, shape=replace(self.shape, batch=1, tokens=tokens), stage="")


def cases(
    options: Options, mode: Mode, tokens: int, dim: int, who: Iterable[tuple[str, int]], stage: str = ""
) -> list[Case]:
    """Of contenders by name and number of heads, who meet the same input."""
    shape = Shape(options.batch(tokens), tokens, dim, 1, options.torch_dtype)
    return [Case(name, mode, replace(shape, heads=heads), options.device, stage) for name, heads in who]


def heads_of(asked: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """The numbers of heads that were asked for; else one, as in the paper, and as many as have 64 channels."""
    return asked or tuple(dict.fromkeys((1, max(1, dim // 64))))


@dataclass(eq=False)
class Contender:
    """One of those compared, with its row, in which whatever goes wrong ends up.

    Memory, where it is measured, is how far it rises during a call; on a CPU in a fresh process, in which a small call
    has loaded code and started threads.
    """

    prepare: Callable[[], Call]  # makes a call to time; it must pickle where memory is measured on a CPU
    labels: Row  # what its row says: ``name``, ``mode`` and where on the plot of its suite it is
    cost: Cost | None = None  # what a call moves and computes, if declared
    error_ratio: Callable[[], float] | None = None  # our error over that of plain PyTorch, measured before any time
    missing: str | None = None  # why it cannot run here, such as a package that is not installed
    warm_up: Callable[[], Call] | None = None  # where memory is to be measured: as ``prepare``, for a small call
    graph: bool = False  # whether to time it as a CUDA graph as well, which leaves the host out
    clock: Callable[[Call], float] | None = None  # gives the seconds of a part of the call, in place of all of it
    row: Row = field(default_factory=dict, init=False)

    def try_to(self, action: Callable[[], Result], where: str = "skipped") -> Result | None:
        """What the action returns; None, and a note of what went wrong ``where`` in the row, from a failure on."""
        if self.row["skipped"]:
            return None
        try:
            return action()
        except harness.CheckFailed:
            self.row[where] = WRONG
        except torch.OutOfMemoryError:
            self.row[where] = "out of memory"
        except Exception as error:  # of a rival, or of a compiler: the others go on
            reason = next(iter(str(error).splitlines()), "")
            self.row[where] = f"failed: {type(error).__name__}: {reason}"
        return None

    def checked(self) -> Call:
        """The call to time, once its results are known to be right."""
        if self.error_ratio is not None:
            self.row["error_ratio"] = self.error_ratio()
            harness.require_correct(self.row["error_ratio"])
        return self.prepare()

    def finish(self, call: Call, options: Options, ceilings: Row) -> None:
        """Memory, and the percentage of the ceilings."""
        if self.warm_up is not None:
            elsewhere = partial(peak_mib, self.prepare, self.warm_up, options.threads)
            if options.on_gpu:
                self.row["peak_mib"] = harness.peak_growth_mib(call, options.device)
            else:  # processes take seconds to start
                self.row["peak_mib"] = elsewhere() if options.smoke else harness.in_fresh_process(elsewhere)
        if self.cost is not None:
            self.row |= {"bytes": self.cost.bytes, "flops": self.cost.flops}
            self.row |= roofline.against(self.cost, milliseconds(self.row) / 1e3, ceilings, options.torch_dtype)


Comparison = Sequence[Contender]  # those who meet the same input


def warm_up(prepare: Callable[[Case], Call], case: Case) -> Callable[[], Call] | None:
    """A small call; None for what is compiled on a CPU, where in a fresh process a compiler would count as growth."""
    compiles = case.name.endswith("compiled") and not harness.is_gpu(case.device)
    return None if compiles else partial(prepare, case.one_of(16, case.mode))


def call_of(
    mode: Mode, function: Callable[[], Tensor | Sequence[Tensor]], leaves: Sequence[Tensor], *incoming: Tensor
) -> Call:
    """What a mode times: the function without gradients, the gradients of ``leaves`` given that of its output, or both.

    For "backward" the forward pass runs here, once, and what it saves stays in memory.
    """
    if mode == "forward":
        return torch.inference_mode()(function)
    for leaf in leaves:
        leaf.requires_grad_()
    if mode == "forward+backward":
        return lambda: torch.autograd.grad(function(), leaves, incoming)
    output = function()
    return lambda: torch.autograd.grad(output, leaves, incoming, retain_graph=True)


def command(main: Callable[..., Sequence[Row]], config: type) -> None:
    """The suite from the command line: exit code 1 where a result was wrong, a message where it cannot run."""
    raise SystemExit(exit_code(harness.told(lambda: main(tyro.cli(config)))))


def run(suite: str, comparisons: Callable[[Any], Iterable[Comparison]], options: Options) -> list[Row]:
    """Measures the comparisons, each series in rising order of size, and stores the rows as they come.

    Prints tables, and how the rows stand to the goals of the project."""
    torch.set_num_threads(options.threads)
    folder, dtype, todo = options.out, options.torch_dtype, list(comparisons(options))
    if folder is None and not options.smoke:
        folder = harness.folder_of(torch.device(options.device).type, harness.device_name(options.device))
    rows = harness.stored(suite, measured(options, todo), options.device, dtype, folder, total=sum(map(len, todo)))
    print(*filter(None, (report(rows), verdicts(goals(rows)))), sep="\n\n")
    if folder is not None:
        print(f"rows: {folder / f'{suite}.jsonl'}")
    return rows


def measured(options: Options, comparisons: Iterable[Comparison]) -> Iterator[Row]:
    ceilings = roofline.measure(options)
    for comparison in comparisons:
        # What is compiled would give its saved tensors away, and could not run its backward pass again.
        with functorch_config.patch(donated_buffer=comparison[0].labels["mode"] != "backward"):
            yield from measure(options, comparison, ceilings)
        torch.compiler.reset()  # what was compiled for these sizes has had its use, and the compiler gives up at eight
        if options.on_gpu:
            torch.cuda.empty_cache()


def measure(options: Options, comparison: Comparison, ceilings: Row) -> list[Row]:
    """One row for each contender."""
    for each in comparison:
        each.row = {**each.labels, "skipped": each.missing}
    calls = {each: each.try_to(each.checked) for each in comparison}
    time_in_turn(options, calls)
    if options.on_gpu:
        capture = {each: partial(harness.captured, each.prepare) for each in comparison if each.graph}
        graphs = {each: each.try_to(action, "graph_skipped") for each, action in capture.items()}
        time_in_turn(options, graphs, "graph_")
    for each, call in calls.items():
        if call is not None:
            each.try_to(partial(each.finish, call, options, ceilings))
    return [each.row | {"ceilings": ceilings} for each in comparison]


def time_in_turn(options: Options, calls: Mapping[Contender, Call | None], prefix: str = "") -> None:
    """Adds the times of each call to its contender's row; inputs come from memory, for the caches are flushed."""
    other = torch.empty(2**20 if options.smoke else FLUSHED, dtype=torch.uint8, device=options.device)

    def cold(each: Contender, call: Call) -> float:
        other.add_(1)  # reads, too: what is written only may pass the caches by
        return each.try_to(partial(each.clock, call) if each.clock else harness.clock(call, options.device)) or 0.0

    clocks = {each: partial(cold, each, call) for each, call in calls.items() if call is not None}
    repeats = 2 if options.smoke else options.repeats or (30 if options.on_gpu else 7)
    for each, seconds in harness.interleave(clocks, repeats, options.budget_seconds).items():
        if not each.row["skipped"]:
            each.row |= {f"{prefix}{key}": value for key, value in harness.summarize(seconds).items()}


def peak_mib(prepare: Callable[[], Call], warm_up: Callable[[], Call], threads: int) -> float | None:
    """How far memory of this process rises during a call (MiB), weights and inputs left out; None if unknown."""
    torch.set_num_threads(threads)
    warm_up()()
    return harness.peak_growth_mib(prepare(), "cpu")


def report(rows: Sequence[Row]) -> str:
    """The rows as tables, one for each series: median times in ms, with the percentage of the nearer ceiling.

    Where there is a CUDA graph, its time comes first, then that of the plain call."""
    tables: dict[str, dict[str, Row]] = {}
    for row in rows:
        title = ", ".join(f"{key} {row[key]}" for key in ("stage", "mode", "dim") if key in row)
        point = " ".join(f"{key}={row[key]}" for key in ("batch", "tokens", "image") if key in row)
        tables.setdefault(title, {}).setdefault(point, {"": point})[label(row)] = cell(row)
    return "\n\n".join(f"{title}\n{table(points.values())}" for title, points in tables.items())


def table(rows: Iterable[Row]) -> str:
    """Plain text, a line for each row and a column for each key."""
    return tabulate(list(rows), headers="keys", tablefmt="plain", missingval="-", disable_numparse=True)


def label(row: Row) -> str:
    return f"{row['name']} H={row['heads']}" if row.get("heads") else row["name"]


def cell(row: Row) -> str:
    if row["skipped"]:
        return row["skipped"].split(":")[0]
    called = f", called {row['median_ms']:.3g}" if "graph_median_ms" in row else ""
    percent = f" ({row['percent_of_ceiling']:.0f} %)" if "percent_of_ceiling" in row else ""
    return f"{milliseconds(row):.3g}{called}{percent}"


def milliseconds(row: Row) -> float:
    """The median time: that of the CUDA graph, where there is one."""
    return row["graph_median_ms"] if "graph_median_ms" in row else row["median_ms"]


def exit_code(rows: Sequence[Row]) -> int:
    """1 where a result was wrong, else 0."""
    return int(any((row["skipped"] or "").startswith("wrong") for row in rows))
