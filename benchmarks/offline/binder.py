"""What Triton's binder costs the host for each launch: ``python -m benchmarks.offline.binder``.

A launch binds its arguments, specialises them and looks the kernel up, before anything reaches the device.  Timed is
that alone, on tensors without data, for the launches of a default layer forward and backward: with the arguments in
named tuples, as the kernels take them, and with the same arguments one by one, as they would be without.
"""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
import tyro
from triton.compiler import make_backend
from triton.runtime.jit import KernelParam, compute_cache_key, create_function_from_signature

from benchmarks import harness
from benchmarks.harness import Row
from benchmarks.offline.cases import attend, project
from benchmarks.offline.compiling import TARGETS
from dydila_kernels.ops import tiles
from dydila_kernels.ops.configs import Config as LaunchConfig

PATH = harness.REPOSITORY / "benchmarks" / "results" / "binder.jsonl"
BACKEND = make_backend(TARGETS["sm_90"].triton)


@dataclass(frozen=True)
class Config:
    """Time what Triton's binder costs a launch, without a GPU."""

    repeats: int = 2000
    """Bindings of each kernel, of which the median counts."""
    out: Path = PATH
    """Where the rows go."""


def launches() -> Iterator[tuple[Any, LaunchConfig, dict[str, Any]]]:
    """The kernels of a layer of d = 384 with heads of 64 in bf16, each once, with their arguments."""
    found: dict[str, tuple[Any, LaunchConfig, dict[str, Any]]] = {}

    def note(kernel: Any, grid: tiles.Grid, config: LaunchConfig, arguments: dict[str, Any]) -> None:
        found.setdefault(kernel.__name__, (kernel, config, arguments))

    saved, tiles.launcher = tiles.launcher, note
    try:
        project(torch.bfloat16, 384)
        attend(torch.bfloat16, 384, 64)
        attend(torch.bfloat16, 384, 64, straight_through=True)
    finally:
        tiles.launcher = saved
    yield from found.values()


def one_by_one(value: Any, name: str, constant: bool) -> Iterator[tuple[str, Any, bool]]:
    """Name, value and whether it is a constant, of each argument in a named tuple."""
    if hasattr(value, "_asdict"):
        for field, part in value._asdict().items():
            yield from one_by_one(part, f"{name}_{field}", constant)
    else:
        yield (
            name,
            value.value if isinstance(value, tl.constexpr) else value,
            constant or isinstance(value, tl.constexpr),
        )


def seconds_of(bind: Callable[[], tuple[Any, Any, Any]], repeats: int) -> float:
    """The median time of a binding and the look-up that follows."""
    keys: dict[Any, str] = {}
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        _, specialization, options = bind()
        compute_cache_key(keys, specialization, options)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def row_of(kernel: Any, config: LaunchConfig, arguments: dict[str, Any], repeats: int) -> Row:
    """One row of the table."""
    options = config.options
    constants = {p.name for p in kernel.params if p.is_constexpr}
    flat = [part for name, value in arguments.items() for part in one_by_one(value, name, name in constants)]
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="constexpr" if fixed else "")
        for name, _, fixed in flat
    ]
    params = [KernelParam(i, p, False, False) for i, p in enumerate(parameters)]
    grouped_binder = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    flat_binder = create_function_from_signature(inspect.Signature(parameters), params, BACKEND)
    values = {name: value for name, value, _ in flat}
    grouped = seconds_of(partial(grouped_binder, **arguments, **options), repeats)
    separate = seconds_of(partial(flat_binder, **values, **options), repeats)
    return {
        "kernel": kernel.__name__,
        "parameters": len(kernel.params),
        "arguments": len(flat),
        "grouped_us": round(1e6 * grouped, 2),
        "one_by_one_us": round(1e6 * separate, 2),
        "ratio": round(grouped / separate, 3),
    }


def main(config: Config) -> list[Row]:
    """Times, prints and stores; the last row has the sums."""
    facts = {"suite": "binder", **harness.environment("cpu"), "repeats": config.repeats}
    rows = [row_of(*launch, config.repeats) for launch in launches()]
    total: Row = {
        "kernel": "all",
        **{name: round(sum(row[name] for row in rows), 2) for name in rows[0] if name != "kernel"},
    }
    total["ratio"] = round(total["grouped_us"] / total["one_by_one_us"], 3)
    for row in [*rows, total]:
        print("{kernel:30} {parameters:3} parameters, {arguments:3} arguments: {grouped_us:6.1f} us, one by one "
              "{one_by_one_us:6.1f} us, ratio {ratio:.2f}".format(**row))  # fmt: skip
    harness.write_rows(config.out, [facts | row for row in [*rows, total]])
    return [*rows, total]


if __name__ == "__main__":
    main(tyro.cli(Config))
