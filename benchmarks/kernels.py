"""Every kernel that a step of the layer launches, beside its prediction: ``python -m benchmarks.kernels``.

A step is the layer forward and backward on random tokens.  Each launch is timed in its place, on the device; what torch
launches in between has a row, too.  The predictions are of a model of the machine code, for one NVIDIA H200, and no
measurements: ``python -m benchmarks.offline.prediction`` wrote them, so that a GPU spends no time on them.

On a CPU under TRITON_INTERPRET=1, to try the command: the times of the interpreter mean nothing.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Any
from unittest.mock import patch

import torch
import tyro

from benchmarks import harness, suite
from benchmarks.harness import Call, Row
from benchmarks.offline.prediction import steps
from benchmarks.offline.prediction.steps import Setting
from dydila_kernels.functional import choose_backend
from dydila_kernels.testing import layer_error_ratio

Span = tuple[str, float]
"""What ran on the device, and for how many seconds."""


@dataclass(frozen=True)
class Config(harness.Options):
    """Time every kernel of a step of the layer, and hold it against its prediction."""

    repeats: int = 10  # Timed steps, after two that compile and warm up.


def main(config: Config) -> list[Row]:
    """Measures and stores; RuntimeError where the kernels cannot run."""
    dtype = torch.bfloat16 if config.on_gpu else torch.float32
    settings = steps.SETTINGS if config.on_gpu and not config.smoke else (Setting(1, 64, 32, 2),)
    choose_backend("triton", torch.device(config.device), dtype)
    predictions = harness.read_rows(steps.PREDICTIONS)
    rows = (row for setting in settings for row in attempted(setting, config, dtype, predictions))
    found = harness.stored("kernels", rows, config.device, dtype, config.out)
    print(report(found), steps.NOTICE, sep="\n\n")
    return found


def attempted(setting: Setting, config: Config, dtype: torch.dtype, predictions: Sequence[Row]) -> Iterator[Row]:
    """As :func:`rows_of`; a row that says what went wrong, so that the other settings have theirs."""
    try:
        with steps.in_form(setting.form):
            yield from rows_of(setting, config, dtype, predictions)
    except Exception as error:
        failure = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        yield {"name": "step", **setting._asdict(), "mode": "forward", "median_ms": 0.0, "failure": failure}


def rows_of(setting: Setting, config: Config, dtype: torch.dtype, predictions: Sequence[Row]) -> Iterator[Row]:
    """One for each launch of a step, in order, with the median of its times."""
    attn = steps.built(setting, config.device, dtype)
    ratio = layer_error_ratio(attn, length=min(setting.tokens, suite.CHECKED_TOKENS))
    harness.require_correct(ratio)
    step = steps.step_of(attn, setting)
    for _ in range(2):
        for call in step.values():
            call()
    flushed = torch.empty(2**20 if config.smoke else suite.FLUSHED, dtype=torch.uint8, device=config.device)
    samples: dict[str, list[list[Span]]] = {mode: [] for mode in step}
    for _ in range(1 if config.smoke else config.repeats):
        for mode, call in step.items():
            flushed.add_(1)  # so that what is saved comes from memory
            samples[mode].append(timed(call, config.device))
    ours = {name for names in steps.launched(setting, dtype).values() for name in names}
    for mode, runs in samples.items():
        todo = [row for row in predictions if setting.has(row, mode)]
        names = [name for name, _ in runs[-1]]
        known = [row["kernel"] for row in todo] == [name for name in names if name in ours]
        alike = [run for run in runs if [name for name, _ in run] == names]  # torch may choose another kernel
        for number, spans in enumerate(zip(*alike, strict=True)):
            times = harness.summarize([seconds for _, seconds in spans])
            row = {"name": names[number], **setting._asdict(), "mode": mode, "number": number, **times}
            row |= {"clock": clock_of(config.device), "error_ratio": ratio}
            if names[number] in ours:
                us, device = 1e3 * row["median_ms"], harness.device_name(config.device)
                row |= steps.compared(us, todo.pop(0), device) if known else {"verdict": "not predicted"}
            yield row


def report(rows: Iterable[Row]) -> str:
    """Tables, one for each setting and mode, in microseconds; below, the sums of what was predicted."""
    tables = []
    for (setting, mode), group in groupby(rows, lambda row: (steps.title(row), row["mode"])):
        lines, sums = [], {"median_ms": 0.0, "predicted_us": 0.0, "fast_us": 0.0, "slow_us": 0.0, "floor_us": 0.0}
        for row in group:
            lines.append(line(row, row["name"][:50], str(row.get("failure") or row.get("verdict") or "")))
            sums = {key: value + row[key] for key, value in sums.items()} if "predicted_us" in row else sums
        lines += [line(sums, "those predicted", "")] if sums["predicted_us"] else []
        tables.append(f"{setting}, {mode}\n{suite.table(lines)}")
    return "\n\n".join(tables)


def line(row: Row, name: str, verdict: str) -> Row:
    """Of a table."""
    us = f"{1e3 * row['median_ms']:.1f}"
    found = {"kernel": name, "us": us, "predicted": "", "spread": "", "floor": "", "": verdict}
    if "predicted_us" in row:
        found |= {"predicted": f"{row['predicted_us']:.1f}", "floor": f"{row['floor_us']:.1f}"}
        found["spread"] = f"{row['fast_us']:.0f}-{row['slow_us']:.0f}"
    return found


# Clocks ---------------------------------------------------------------------------------------------------------------


@cache
def clock_of(device: str) -> str:
    """How :func:`timed` measures: by torch's "profiler", where it can see what a GPU does; else by "marks" around each
    launch, which on a GPU add some 2 us to it."""
    return "profiler" if harness.is_gpu(device) and profiled(torch.ones(1, device=device).neg) else "marks"


def timed(call: Call, device: str) -> list[Span]:
    """What runs during a call, in order: launches by the names of the kernels, and what torch does in between."""
    return profiled(call) if clock_of(device) == "profiler" else marked(call, harness.is_gpu(device))


def profiled(call: Call) -> list[Span]:
    """By torch's profiler: all kernels, each on its own."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    return [(event.name, event.time_range.elapsed_us() / 1e6) for event in events]


def marked(call: Call, on_gpu: bool) -> list[Span]:
    """By marks around each launch of ours, on the device behind work that lets the host run ahead of it; whatever is
    between two launches is "torch"."""
    from dydila_kernels.ops import tiles

    names: list[str] = []
    marks: list[Any] = []
    launch = tiles.launcher

    def mark(name: str) -> None:
        """The end of ``name``."""
        names.append(name)
        marks.append(torch.cuda.Event(enable_timing=True) if on_gpu else time.perf_counter())
        if on_gpu:
            marks[-1].record()

    def launch_between(kernel: Any, *arguments: Any) -> None:
        mark("torch")
        launch(kernel, *arguments)
        mark(kernel.__name__)

    with patch.object(tiles, "launcher", launch_between):
        if on_gpu:
            torch.cuda._sleep(20_000_000)  # cycles, 10 ms or more: else a mark may be of the host that is late
        mark("begin")
        call()
        mark("torch")
    if on_gpu:
        torch.cuda.synchronize()
    seconds = [b.elapsed_time(e) / 1e3 if on_gpu else e - b for b, e in zip(marks, marks[1:], strict=False)]
    return list(zip(names[1:], seconds, strict=True))


if __name__ == "__main__":
    raise SystemExit(any("failure" in row for row in harness.told(lambda: main(tyro.cli(Config)), RuntimeError)))
