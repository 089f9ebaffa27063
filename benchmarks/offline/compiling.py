"""From a call of the package's launchers to the figures of the machine code, without a GPU.

The launchers run on tensors without data, and :func:`record` notes what they would launch.  Triton's own binder turns
that into a specialisation, as it would at a launch, so no signature is written down a second time.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
import triton.language
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks.harness import Row
from benchmarks.offline.prediction import machine
from benchmarks.offline.prediction.launches import launch_of, prediction_of
from benchmarks.offline.prediction.predict import Launch
from dydila_kernels.ops import tiles
from dydila_kernels.ops.configs import Config
from tools.ptx.launching import source_of

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU and the limits of one of its multiprocessors (compute units).

    Attributes:
        arch: as Triton's ``GPUTarget`` wants it.
        shared: bytes of shared memory that one program may have.
        shared_total: bytes for all resident programs.
        warps: resident warps at most.
        programs: resident programs at most.
    """

    arch: int | str
    shared: int
    shared_total: int
    warps: int
    programs: int

    @property
    def backend(self) -> str:
        return "cuda" if isinstance(self.arch, int) else "hip"

    @property
    def triton(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, 32 if self.backend == "cuda" else 64)


TARGETS: dict[str, Target] = {
    "sm_80": Target(80, 163 * KIB, 164 * KIB, 64, 32),
    "sm_86": Target(86, 99 * KIB, 100 * KIB, 48, 16),
    "sm_89": Target(89, 99 * KIB, 100 * KIB, 48, 24),
    "sm_90": Target(90, 227 * KIB, 228 * KIB, 64, 32),
    "sm_100": Target(100, 227 * KIB, 228 * KIB, 64, 32),
    "sm_120": Target(120, 99 * KIB, 100 * KIB, 48, 24),
    "gfx942": Target("gfx942", 64 * KIB, 64 * KIB, 32, 32),
}


@dataclass(frozen=True)
class Job:
    """One kernel, specialised, for one target; plain data, so that another process can compile it.

    Attributes:
        labels: the columns that tell rows of the table apart.
        kernel: module and name.
        signature, constants, attributes: of Triton's ``ASTSource``.
        config: Triton's options of the launch.
        launch: what it was launched with, for the target of the model that predicts.
    """

    labels: Row = field(repr=False)
    kernel: tuple[str, str]
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    config: dict[str, int]
    target: Target
    launch: Launch | None = field(default=None, repr=False)

    @property
    def identity(self) -> str:
        """Equal for launches that run the same machine code: all but the labels and the launch."""
        return repr(self)


def record(call: Callable[[], object], labels: Row, name: str, target: Target) -> list[Job]:
    """What ``call`` launches on the target of that name; its tensors are on the device "meta"."""
    if tiles.INTERPRETED:
        raise RuntimeError("kernels are to be compiled, not interpreted: unset TRITON_INTERPRET")
    backend = make_backend(target.triton)
    jobs: list[Job] = []

    def note(kernel: Any, grid: tiles.Grid, config: Config, arguments: dict[str, Any]) -> None:
        # As triton.JITFunction.run does.
        arguments = {**arguments, **config.options}
        bound, specialization, _ = create_function_from_signature(kernel.signature, kernel.params, backend)(**arguments)
        _, signature, constants, attributes = kernel._pack_args(backend, arguments, bound, specialization, None)
        fixed: dict[str, Any] = {}
        for path, value in constants.items():
            found = unwrapped(value)
            fixed |= found._asdict() if hasattr(found, "_asdict") else {name_of(kernel, arguments, path): found}
        fixed.pop("D", None)  # a column of its own
        options = [f"{key}={value}" for key, value in fixed.items() if value is not None]
        options += [f"-{key}" for key, value in fixed.items() if value is None]
        jobs.append(
            Job(
                labels={
                    **labels,
                    "kernel": kernel.__name__,
                    "options": " ".join(options),
                    "warps": config.warps,
                    "stages": config.stages,
                    "target": name,
                },
                kernel=(kernel.__module__, kernel.__name__),
                signature=signature,
                constants=constants,
                attributes=attributes,
                config=config.options,
                target=target,
                launch=launch_of(grid, bound, signature) if name == machine.TARGET else None,
            )
        )

    saved = tiles.launcher, tiles.target
    tiles.launcher, tiles.target = note, target.backend
    try:
        call()
    finally:
        tiles.launcher, tiles.target = saved
    return jobs


def name_of(kernel: Any, arguments: dict[str, Any], path: tuple[int, ...]) -> str:
    """Of an argument, or of a field of a named tuple: constants by their own name, others behind that of the tuple."""
    names = [kernel.arg_names[path[0]]]
    value = arguments[names[0]]
    for position in path[1:]:
        names.append(value._fields[position])
        value = value[position]
    return names[-1] if names[-1].isupper() else ".".join(names)


def unwrapped(value: Any) -> Any:
    """What a constant of Triton holds."""
    return value.value if isinstance(value, triton.language.constexpr) else value


def compiled(job: Job) -> Any:
    """Triton's CompiledKernel, whose ``asm`` holds the code at each step of the compilation."""
    module, name = job.kernel
    function = getattr(importlib.import_module(module), name)
    source = source_of(function, job.signature, job.constants, job.attributes)
    return triton.compile(source, target=job.target.triton, options=job.config)


def figures(job: Job) -> Row:
    """The row of the table: the labels of the job and what the compiler made of it, or why it made nothing."""
    row = {**job.labels, "triton": triton.__version__}
    try:
        kernel = compiled(job)
    except Exception as error:  # whatever the compiler raises is a result, to be reported with all the others
        return {**row, "error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    measured = nvidia(kernel.asm["cubin"]) if job.target.backend == "cuda" else amd(kernel.asm["amdgcn"])
    shared = kernel.metadata.shared
    return {
        **row,
        **measured,
        "shared": shared,
        "resident_warps": resident_warps(job.target, measured["registers"], shared, job.config["num_warps"]),
        "dots": tensor_core_dots(kernel.asm.get("ttir", kernel.asm["ttgir"])),  # Gluon begins with the latter
        **predicted(job, kernel, measured["registers"]),
    }


def predicted(job: Job, kernel: Any, registers: int) -> Row:
    """The columns of the model of :mod:`benchmarks.offline.prediction`; none where a loop ends by data."""
    if job.launch is None:
        return {}
    found = prediction_of(kernel, registers, job.config["num_warps"], job.launch)
    if found.loops:
        return {}
    return {"predicted_us": round(found.microseconds, 1), "predicted_barriers": found.barriers}


def tensor_core_dots(ttir: str) -> int:
    """The products of a kernel that belong on tensor cores: all but those of float32 in full precision."""
    dots = [line for line in ttir.splitlines() if re.search(r"\btt\.dot\b", line)]
    return sum("inputPrecision = tf32" in dot or not re.search(r": tensor<[\dx]+xf32>", dot) for dot in dots)


def nvidia(cubin: bytes) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        usage = tool("cuobjdump", "-res-usage", file)
        code = tool("nvdisasm", "-c", file)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage answered: {usage!r}")
    # Such as "/*0a50*/  @!P0 HMMA.16816.F32.BF16 R4, ..."
    names = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.MULTILINE))
    del names["NOP"]
    return {
        "registers": int(found[1]),
        "stack": int(found[2]),
        "instructions": names.total(),
        "mufu": names["MUFU"],
        "tensor_core": sum(count for name, count in names.items() if re.fullmatch(r"\w*MMA", name)),
    }


def tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA tools that Triton's wheel carries."""
    path = getattr(triton.knobs.nvidia, name).path
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def amd(assembly: str) -> Row:
    def entry(name: str) -> int:
        found = re.search(rf"^\s+\.{name}:\s+(\d+)", assembly, re.MULTILINE)
        if found is None:
            raise RuntimeError(f"no .{name} in the assembly")
        return int(found[1])

    names = Counter(re.findall(r"^\s+([a-z]\w+)", assembly.split(".section", 1)[0], re.MULTILINE))
    return {
        "registers": entry("vgpr_count"),
        "stack": entry("private_segment_fixed_size"),
        "instructions": names.total(),
        "mufu": sum(count for name, count in names.items() if re.match(r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_", name)),
        "tensor_core": sum(count for name, count in names.items() if name.startswith("v_mfma")),
    }


def resident_warps(target: Target, registers: int, shared: int, warps: int) -> int:
    """How many warps run at a time on one multiprocessor (compute unit)."""
    if target.backend == "cuda":
        by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
        taken = shared + KIB  # the system keeps 1 KiB for each program
    else:
        # Four SIMDs of 512 registers for each lane; the warps of a program are spread over them.
        by_registers = 4 * min(8, 512 // (-(-registers // 8) * 8)) // warps
        taken = max(shared, 1)
    return warps * min(by_registers, target.shared_total // taken, target.warps // warps, target.programs)
