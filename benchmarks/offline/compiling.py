"""From a call of the package's launchers to the figures of the machine code, without a GPU.

The launchers run on tensors without data, and :func:`record` notes what they would launch.  Triton's own binder turns
that into a specialisation, as it would at a launch, so no signature is written down a second time.
"""

import importlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

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
    """A GPU and the limits of one of its multiprocessors (compute units)."""

    arch: int | str  # as Triton's ``GPUTarget`` wants it
    shared: int  # bytes of shared memory that one program may have
    shared_total: int  # bytes for all resident programs
    warps: int  # resident warps at most
    programs: int  # resident programs at most

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
    """One kernel, specialised, for one target; plain data, so that another process can compile it."""

    labels: Row = field(repr=False)  # the columns that tell rows of the table apart
    kernel: tuple[str, str]  # module and name
    signature: dict[str, Any]  # of Triton's ``ASTSource``, as the next two
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    config: dict[str, int]
    target: Target
    launch: Launch | None = field(default=None, repr=False)  # where the model is to predict it

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
            found = value.value if isinstance(value, triton.language.constexpr) else value
            fixed |= found._asdict() if hasattr(found, "_asdict") else {name_of(kernel, arguments, path): found}
        fixed.pop("D", None)  # a column of its own
        options = [f"{key}={value}" for key, value in fixed.items() if value is not None]
        options += [f"-{key}" for key, value in fixed.items() if value is None]
        launch = {"kernel": kernel.__name__, "options": " ".join(options), "warps": config.warps}
        jobs.append(
            Job(
                labels={**labels, **launch, "stages": config.stages, "target": name},
                kernel=(kernel.__module__, kernel.__name__),
                signature=signature,
                constants=constants,
                attributes=attributes,
                config=config.options,
                target=target,
                launch=launch_of(grid, bound, signature) if name == machine.TARGET else None,
            )
        )

    with mock.patch.object(tiles, "launcher", note), mock.patch.object(tiles, "target", target.backend):
        call()
    return jobs


def name_of(kernel: Any, arguments: dict[str, Any], path: tuple[int, ...]) -> str:
    """Of an argument, or of a field of a named tuple: constants by their own name, others behind that of the tuple."""
    names = [kernel.arg_names[path[0]]]
    value = arguments[names[0]]
    for position in path[1:]:
        names.append(value._fields[position])
        value = value[position]
    return names[-1] if names[-1].isupper() else ".".join(names)


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
    row |= nvidia(kernel.asm["cubin"]) if job.target.backend == "cuda" else amd(kernel.asm["amdgcn"])
    row["shared"], row["dots"] = (
        kernel.metadata.shared,
        tensor_core_dots(kernel.asm.get("ttir", kernel.asm["ttgir"])),
    )  # Gluon begins with the latter
    warps = job.config["num_warps"]
    row["resident_warps"] = resident_warps(job.target, row["registers"], row["shared"], warps)
    if job.launch is not None:
        prediction = prediction_of(kernel, row["registers"], warps, job.launch)
        if not prediction.loops:  # that end by data, of which nothing is known
            row["predicted_us"] = round(prediction.microseconds, 1)
            row["predicted_barriers"] = prediction.barriers
    return row


def tensor_core_dots(ttir: str) -> int:
    """The products of a kernel that belong on tensor cores: all but those of float32 in full precision."""
    dots = [line for line in ttir.splitlines() if re.search(r"\btt\.dot\b", line)]
    return sum("inputPrecision = tf32" in dot or not re.search(r": tensor<[\dx]+xf32>", dot) for dot in dots)


def nvidia(cubin: bytes) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        usage = tool("cuobjdump", "-res-usage", str(file))
        code = tool("nvdisasm", "-c", str(file))
    # Such as "/*0a50*/  @!P0 HMMA.16816.F32.BF16 R4, ..."
    names = Counter(re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_]+)", code, re.MULTILINE))
    del names["NOP"]
    registers, stack = number(r"REG:(\d+)", usage), number(r"STACK:(\d+)", usage)
    return counted(names, registers, stack, mufu="MUFU", tensor_core=r"\w*MMA")


def tool(name: str, *arguments: str) -> str:
    """The output of one of the CUDA tools that Triton's wheel carries."""
    command = [getattr(triton.knobs.nvidia, name).path, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def amd(assembly: str) -> Row:
    names = Counter(re.findall(r"^\s+([a-z]\w+)", assembly.split(".section", 1)[0], re.MULTILINE))
    registers = number(r"\.vgpr_count:\s+(\d+)", assembly)
    stack = number(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
    return counted(names, registers, stack, mufu=r"v_(exp|log|rcp|rsq|sqrt|sin|cos)_\w+", tensor_core=r"v_mfma\w*")


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern} in what the compiler's tools say: {text[:200]!r}")
    return int(found[1])


def counted(names: Counter[str], registers: int, stack: int, **kinds: str) -> Row:
    """Figures of a kernel's instructions by name: how many there are, and how many of each kind."""
    totals = {kind: sum(n for name, n in names.items() if re.fullmatch(like, name)) for kind, like in kinds.items()}
    return {"registers": registers, "stack": stack, "instructions": names.total(), **totals}


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
