"""From a Triton kernel and the arguments of a launch to its PTX, as at a real launch, and on to the emulator."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from tools.ptx.findings import Report
from tools.ptx.machine import launch
from tools.ptx.memory import Interval, Memory
from tools.ptx.parsing import Kernel

TARGETS = {"sm_80": 80, "sm_90": 90, "sm_120": 120}
"""Those whose instructions the emulator knows, as Triton's ``GPUTarget`` wants them."""


class Emulation:
    """Compiles launches for a target and executes them on CPU tensors.

    Attributes:
        report: what the checks have found so far.
        compiled: all specialisations so far.
        seconds: name of a kernel -> time that its emulation took; "compile" -> that of Triton.
    """

    def __init__(self, target: str) -> None:
        if triton.knobs.runtime.interpret:
            raise RuntimeError("kernels are to be compiled, not interpreted: set TRITON_INTERPRET=0")
        self.target = GPUTarget("cuda", TARGETS[target], 32)
        self.backend = make_backend(self.target)
        self.compiled: dict[str, Kernel] = {}
        self.report = Report()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __call__(
        self, function: Any, grid: tuple[int, ...], arguments: dict[str, Any], options: dict[str, int]
    ) -> None:
        """Runs ``function[grid](**arguments)``; raises Unsupported for PTX that the emulator does not know."""
        kernel, taken = self.specialise(function, arguments, options)
        start = time.perf_counter()
        self.execute(kernel, grid, taken, self.report)
        self.seconds[kernel.name] += time.perf_counter() - start

    def specialise(self, function: Any, arguments: dict[str, Any], options: dict[str, int]) -> tuple[Kernel, list[Any]]:
        """The parsed PTX, and the tensors and numbers that it takes, in order; as triton.JITFunction.run does.

        options: those of the launch, such as ``num_warps``.
        """
        bind = create_function_from_signature(function.signature, function.params, self.backend)
        bound, specialization, _ = bind(**arguments, **options)
        _, signature, constants, attributes = function._pack_args(
            self.backend, {**arguments, **options}, bound, specialization, None
        )
        key = repr((function.__module__, function.__name__, signature, constants, attributes, options))
        if key not in self.compiled:
            start = time.perf_counter()
            source = source_of(function, signature, constants, attributes)
            made = triton.compile(source, target=self.target, options=options)
            self.compiled[key] = Kernel(made.asm["ptx"], made.metadata.shared)
            self.seconds["compile"] += time.perf_counter() - start
        taken = [value for name, kind in signature.items() for value in flatten(bound[name], kind)]
        return self.compiled[key], taken

    def execute(self, kernel: Kernel, grid: tuple[int, ...], taken: list[Any], report: Report) -> None:
        intervals = [
            Interval(*extent(value), value.element_size(), f"argument {i}")
            for i, value in enumerate(taken)
            if isinstance(value, torch.Tensor)
        ]
        values = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in taken]
        values += [0] * (len(kernel.parameters) - len(values))  # scratch memory, of which there is none
        launch(kernel, grid, values, Memory(intervals), report)


def source_of(function: Any, signature: dict[str, Any], constants: dict[Any, Any], attributes: dict[Any, Any]) -> Any:
    """What Triton compiles, of a kernel in Triton or in Gluon."""
    if not function.is_gluon():
        return ASTSource(function, signature, dict(constants), attributes)
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource(function, signature, dict(constants), attributes)


def flatten(value: Any, kind: Any) -> Iterator[Any]:
    """What of an argument reaches the machine: nothing of a constant, the fields of a tuple one after the other."""
    if isinstance(kind, tuple):
        for field, field_kind in zip(value, kind, strict=True):
            yield from flatten(field, field_kind)
    elif kind != "constexpr":
        yield value


def extent(t: torch.Tensor) -> tuple[int, int]:
    """The first byte of a view and the one after its last: what lies around it in its storage is out of bounds."""
    if t.numel() == 0:
        return t.data_ptr(), t.data_ptr()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
