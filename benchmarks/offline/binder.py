"""What Triton's binder costs the host for each launch: ``python -m benchmarks.offline.binder``.

A launch binds its arguments, specialises them and looks the kernel up, before anything reaches the device.  Timed is
that alone, on tensors without data, for the launches of a default layer forward and backward: with the arguments in
named tuples, as the kernels take them, and with the same arguments one by one, as they would be without.
"""

import statistics
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from inspect import Parameter, Signature
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton.language as tl
import tyro
from triton.compiler import make_backend
from triton.runtime.jit import KernelParam, compute_cache_key, create_function_from_signature

from benchmarks import harness, suite
from benchmarks.harness import Row
from benchmarks.offline.cases import attend, project
from benchmarks.offline.compiling import TARGETS
from dydila_kernels.ops import tiles
from dydila_kernels.ops.configs import Config

PATH = harness.REPOSITORY / "benchmarks" / "results" / "binder.jsonl"
BACKEND = make_backend(TARGETS["sm_90"].triton)


def launches() -> dict[str, tuple[Any, Config, dict[str, Any]]]:
    """The kernels of a layer of d = 384 with heads of 64 in bf16 by name, with the arguments of their first launch."""
    found: dict[str, tuple[Any, Config, dict[str, Any]]] = {}

    def note(kernel: Any, grid: tiles.Grid, config: Config, arguments: dict[str, Any]) -> None:
        found.setdefault(kernel.__name__, (kernel, config, arguments))

    with mock.patch.object(tiles, "launcher", note):
        project(torch.bfloat16, 384)
        attend(torch.bfloat16, 384, 64)
        attend(torch.bfloat16, 384, 64, straight_through=True)
    return found


def one_by_one(value: Any, name: str, constant: bool) -> Iterator[tuple[str, Any, bool]]:
    """Name, value and whether it is a constant, of each argument in a named tuple."""
    if hasattr(value, "_asdict"):
        for field, part in value._asdict().items():
            yield from one_by_one(part, f"{name}_{field}", constant)
    elif isinstance(value, tl.constexpr):
        yield name, value.value, True
    else:
        yield name, value, constant


def microseconds_of(bind: Callable[[], tuple[Any, Any, Any]], repeats: int) -> float:
    """The median time of a binding and the look-up that follows."""
    keys: dict[Any, str] = {}

    def launch() -> None:
        _, specialization, options = bind()
        compute_cache_key(keys, specialization, options)

    return round(1e6 * statistics.median(timeit.repeat(launch, number=1, repeat=repeats)), 2)


def row_of(kernel: Any, config: Config, arguments: dict[str, Any], repeats: int) -> Row:
    options = config.options
    constants = {p.name for p in kernel.params if p.is_constexpr}
    flat = [part for name, value in arguments.items() for part in one_by_one(value, name, name in constants)]
    kind = Parameter.POSITIONAL_OR_KEYWORD
    parameters = [Parameter(name, kind, annotation="constexpr" if fixed else "") for name, _, fixed in flat]
    params = [KernelParam(i, parameter, False, False) for i, parameter in enumerate(parameters)]
    grouped = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
    separate = create_function_from_signature(Signature(parameters), params, BACKEND)
    return {
        "kernel": kernel.__name__,
        "parameters": len(kernel.params),
        "arguments": len(flat),
        "grouped_us": microseconds_of(partial(grouped, **arguments, **options), repeats),
        "one_by_one_us": microseconds_of(partial(separate, **{name: v for name, v, _ in flat}, **options), repeats),
    }


def main(repeats: int = 2000, out: Path = PATH) -> None:
    """Times what Triton's binder costs a launch, without a GPU, prints and stores it; the last row has the sums.

    Args:
        repeats: bindings of each kernel, of which the median counts.
        out: where the rows go.
    """
    facts = {"suite": "binder", **harness.environment("cpu"), "repeats": repeats}
    rows = [row_of(*launch, repeats) for launch in launches().values()]
    rows.append({"kernel": "all", **{key: round(sum(row[key] for row in rows), 2) for key in [*rows[0]][1:]}})
    rows = [{**row, "ratio": round(row["grouped_us"] / row["one_by_one_us"], 3)} for row in rows]
    print(suite.table(rows))
    harness.write_rows(out, [facts | row for row in rows])


if __name__ == "__main__":
    tyro.cli(main)
