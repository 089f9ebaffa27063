"""How a suite runs: contenders that meet the same input are checked, then timed in turn, and become rows.

A contender whose results are wrong, who is not installed, runs out of memory, fails, or would take too long gets a row
that says so under "skipped", and no time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from tabulate import tabulate
from torch import Tensor
from torch._functorch import config as functorch_config

from benchmarks import harness, roofline
from benchmarks.goals import goals, verdicts
from benchmarks.harness import Call, Clock, Row
from benchmarks.roofline import Cost, Shape
from dydila_kernels.testing import relative_error

Mode = Literal["forward", "backward", "forward+backward"]
WRONG = "wrong: the error is over twice that of plain PyTorch"
MODES: tuple[Mode, ...] = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Options(harness.Options):
    """What every suite can be told."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of inputs and parameters; "auto" is bfloat16 on a GPU and float32 on a CPU."""
    sizes: tuple[int, ...] = ()
    """Numbers of tokens N, each a square; by default those that suit the device."""
    modes: tuple[Mode, ...] = MODES
    """What to time; the backward pass is timed on its own as well."""
    repeats: int = 0
    """Timed calls of each contender, after one to warm up; by default 7 on a CPU and 30 on a GPU."""
    budget_seconds: float = 20.0
    """Make no further calls of a contender once they have taken this long (s); one is always made."""
    skip_over_seconds: float = 600.0
    """Skip a contender where one call is expected to take longer than this (s), by its time at the size before."""

    @property
    def torch_dtype(self) -> torch.dtype:
        name = ("bfloat16" if self.on_gpu else "float32") if self.dtype == "auto" else self.dtype
        return getattr(torch, name)

    @property
    def calls(self) -> int:
        return 2 if self.smoke else self.repeats or (30 if self.on_gpu else 7)

    def lengths(self, cpu: Sequence[int], gpu: Sequence[int]) -> tuple[int, ...]:
        """The sizes to run: those asked for, else those of the device."""
        if self.smoke:
            return (64, 256)
        return self.sizes or tuple(gpu if self.on_gpu else cpu)

    def batch(self, tokens: int, together: int = 65536) -> int:
        """Images of so many tokens: on a GPU as many as have so many ``together``."""
        return max(together // tokens, 1) if self.on_gpu and not self.smoke else 1

    def folder(self) -> Path | None:
        """Where rows go; None where they are not to be stored."""
        if self.out is not None or self.smoke:
            return self.out
        return harness.folder_of(torch.device(self.device).type, harness.device_name(self.device))


class Case(NamedTuple):
    """A contender by its name, what it meets, and the stage that it is about, if it is about one."""

    name: str
    mode: Mode
    shape: Shape
    device: str
    stage: str = ""

    def one_of(self, tokens: int, mode: Mode) -> Case:
        """The whole for one image of so many tokens."""
        return self._replace(mode=mode, shape=replace(self.shape, batch=1, tokens=tokens), stage="")


def heads_of(asked: tuple[int, ...], dim: int) -> tuple[int, ...]:
    """The numbers of heads that were asked for; else one, as in the paper, and as many as have 64 channels."""
    return asked or tuple(dict.fromkeys((1, max(1, dim // 64))))


@dataclass(eq=False)
class Contender:
    """One of those compared, with its row, in which whatever goes wrong ends up.

    Attributes:
        prepare: makes a call to time, on inputs of its own, so that several sets of inputs can take turns.  It must
            pickle (a partial of a function of a module) where memory is to be measured on a CPU.
        labels: what its row says beside its name, such as heads.
        cost: what a call moves and computes, if declared.
        error_ratio: our error over that of plain PyTorch, measured in this run before any time; over 2 is wrong.
        missing: why it cannot run here, such as a package that is not installed.
        warm_up: as ``prepare``, for a small call; where given, memory is measured: how far it rises during a call, on a
            CPU in a fresh process in which the small call has loaded code and started threads.
        graph: whether to time it as a CUDA graph as well, which leaves the host out.
        clock: makes the call and gives the seconds of a part of it, in place of all of it.
    """

    prepare: Callable[[], Call]
    labels: Mapping[str, object] = field(default_factory=dict)
    cost: Cost | None = None
    error_ratio: Callable[[], float] | None = None
    missing: str | None = None
    warm_up: Callable[[], Call] | None = None
    graph: bool = False
    clock: Callable[[Call], float] | None = None
    row: Row = field(default_factory=dict, init=False)
    calls: dict[str, list[Call]] = field(default_factory=dict, init=False)

    def try_to(self, action: Callable[[], Any], where: str = "skipped") -> Any:
        """What the action returns; from the first failure on nothing is done, and None.  ``where`` in the row what goes
        wrong is noted."""
        if self.row["skipped"]:
            return None
        try:
            return action()
        except torch.OutOfMemoryError:
            self.row[where] = "out of memory"
        except Exception as error:  # of a rival, or of a compiler: the others go on
            reason = next(iter(str(error).splitlines()), "")
            self.row[where] = f"failed: {type(error).__name__}: {reason}"
        return None

    def check(self) -> None:
        if self.error_ratio is not None:
            self.row["error_ratio"] = self.error_ratio()
            if not self.row["error_ratio"] <= harness.LARGEST_RATIO:  # written so that NaN fails
                self.row["skipped"] = WRONG

    def make(self, sets: int) -> None:
        self.calls[""] = [self.prepare() for _ in range(sets)]

    def in_turn(self, prefix: str, device: str) -> Clock:
        """The clock of the calls in turn; 0 from the first failure on."""
        call = harness.in_turn(self.calls[prefix])
        clock = partial(self.clock, call) if self.clock else harness.clock(call, device)
        return lambda: self.try_to(clock) or 0.0

    def capture(self) -> None:
        if self.graph:
            self.calls["graph_"] = [harness.captured(self.prepare) for _ in self.calls[""]]

    def finish(self, options: Options, ceilings: Row) -> None:
        """Memory, and the percentage of the ceilings."""
        row = self.row
        if self.warm_up is not None:
            arguments = (self.prepare, self.warm_up, options.threads)
            if options.on_gpu:
                row["peak_mib"] = harness.peak_growth_mib(self.calls[""][0], options.device)
            elif options.smoke:  # processes take seconds to start
                row["peak_mib"] = peak_mib(*arguments)
            else:
                row["peak_mib"] = harness.in_fresh_process(peak_mib, *arguments)
        if self.cost is not None:
            seconds = milliseconds(row) / 1e3
            row |= {"bytes": self.cost.bytes, "flops": self.cost.flops}
            row |= roofline.against(self.cost, seconds, ceilings, options.torch_dtype)


@dataclass(frozen=True)
class Comparison:
    """Contenders by name who meet the same input.

    ``series`` and ``point`` are the labels of its rows: what a curve of a plot has in common, and its place there.
    ``input_bytes`` is the size of one set of inputs.
    """

    series: Row
    point: Row
    contenders: Mapping[str, Contender]
    input_bytes: int


def comparison(
    options: Options, mode: Mode, tokens: int, dim: int, who: Iterable[tuple[str, int]],
    contender: Callable[[Case], Contender], *, inputs: int, stage: str = "",
) -> Comparison:  # fmt: skip
    """Of contenders by name and number of heads, on ``inputs`` tensors of so many tokens an image."""
    shape = Shape(options.batch(tokens), tokens, dim, 1, options.torch_dtype)
    contenders = {
        f"{name} {heads}": contender(Case(name, mode, replace(shape, heads=heads), options.device, stage))
        for name, heads in who
    }
    series: Row = {"stage": stage} if stage else {}
    point = {"batch": shape.batch, "tokens": tokens}
    return Comparison({**series, "mode": mode, "dim": dim}, point, contenders, inputs * shape.token_bytes)


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
    if mode == "forward+backward":
        return lambda: torch.autograd.grad(function(), leaves, incoming)
    output = function()
    return lambda: torch.autograd.grad(output, leaves, incoming, retain_graph=True)


def error_ratio(found: Tensor, plain: Tensor, exact: Tensor) -> float:
    """The error of a result over that of plain PyTorch, or the error itself where that has none."""
    ours, usual = relative_error(found, exact), relative_error(plain, exact)
    return ours / usual if usual else ours


def command(main: Callable[..., Sequence[Row]], config: type) -> None:
    """The suite from the command line: exit code 1 where a result was wrong, a message where it cannot run."""
    raise SystemExit(exit_code(harness.told(lambda: main(tyro.cli(config)))))


def run(suite: str, options: Options, comparisons: Sequence[Comparison]) -> list[Row]:
    """Measures the comparisons, each series in rising order of size, and stores the rows as they come.

    Prints tables, and how the rows stand to the goals of the project."""
    torch.set_num_threads(options.threads)
    found, folder = measured(options, comparisons), options.folder()
    total = sum(len(comparison.contenders) for comparison in comparisons)
    rows = harness.stored(suite, found, options.device, options.torch_dtype, folder, total=total)
    print(*filter(None, (report(rows), verdicts(goals(rows)))), sep="\n\n")
    if folder is not None:
        print(f"rows: {folder / f'{suite}.jsonl'}")
    return rows


def measured(options: Options, comparisons: Sequence[Comparison]) -> Iterator[Row]:
    """The rows of the comparisons, with the ceilings of the device."""
    ceilings = roofline.measure(options)
    rows: list[Row] = []
    for comparison in comparisons:
        # What is compiled would give its saved tensors away, and could not run its backward pass again.
        with functorch_config.patch(donated_buffer=comparison.series.get("mode") != "backward"):
            found = measure(options, comparison, rows, ceilings)
        rows += found
        yield from ({**row, "ceilings": ceilings} for row in found)
        torch.compiler.reset()  # what was compiled for these sizes has had its use, and the compiler gives up at eight
        if options.on_gpu:
            torch.cuda.empty_cache()


def measure(options: Options, comparison: Comparison, earlier: Sequence[Row], ceilings: Row) -> list[Row]:
    """One row for each contender."""
    contenders = list(comparison.contenders.values())
    sets = harness.sets_for_cold_cache(comparison.input_bytes, options.device)
    for name, each in comparison.contenders.items():
        each.row = {"name": name, **comparison.series, **each.labels, **comparison.point}
        each.row["skipped"] = each.missing or over_budget(options, each, earlier)
        each.try_to(each.check)
        each.try_to(partial(each.make, sets))

    def time_in_turn(prefix: str) -> None:
        clocks = {each: each.in_turn(prefix, options.device) for each in contenders if each.calls.get(prefix)}
        for each, seconds in harness.interleave(clocks, options.calls, options.budget_seconds).items():
            if not each.row["skipped"]:
                each.row |= {f"{prefix}{key}": value for key, value in harness.summarize(seconds).items()}

    time_in_turn("")
    if options.on_gpu:
        for each in contenders:
            each.try_to(each.capture, "graph_skipped")
        time_in_turn("graph_")
    for each in contenders:
        each.try_to(partial(each.finish, options, ceilings))
        each.calls.clear()
    return [each.row for each in contenders]


def over_budget(options: Options, contender: Contender, earlier: Sequence[Row]) -> str | None:
    """Why a contender is not called: by its time at the size before, a call would take too long."""
    cost, row = contender.cost, contender.row
    same = {key: row[key] for key in ("stage", "name", "mode", "heads", "dim") if key in row}
    before = next((r for r in reversed(earlier) if same.items() <= r.items()), None)
    if cost is None or before is None:
        return None
    if before["skipped"]:
        return before["skipped"] if before["skipped"].startswith("over budget") else None
    growth = max(cost.bytes / before["bytes"], cost.flops / max(before["flops"], 1))
    expected = before["median_ms"] / 1e3 * growth
    if expected <= options.skip_over_seconds:
        return None
    return f"over budget: a call would take about {expected:.0f} s"


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
