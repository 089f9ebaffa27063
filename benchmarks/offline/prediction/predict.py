"""From the machine code of a kernel and its launch to a prediction."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from benchmarks.offline.prediction.code import parse
from benchmarks.offline.prediction.machine import H200, LOCAL, SHARED, Gpu, cost
from benchmarks.offline.prediction.simulation import Quarter
from benchmarks.offline.prediction.values import Values
from benchmarks.offline.prediction.walk import UNKNOWN, Tensor, Walker


@dataclass(frozen=True)
class Launch:
    """What a kernel is launched with; plain data.

    Attributes:
        grid: programs in each direction.
        constants: the arguments as they lie in constant memory.
        tensors: where those of the arguments that are tensors begin and end; addresses are made up.
    """

    grid: tuple[int, ...]
    constants: bytes
    tensors: tuple[Tensor, ...]


@dataclass(frozen=True)
class Binary:
    """A compiled kernel: its machine code, registers of a thread, bytes of shared memory and warps of a program."""

    code: str
    registers: int
    shared: int
    warps: int


@dataclass(frozen=True)
class Prediction:
    """What a launch would take on an H200, from a model and not from a measurement.

    Attributes:
        microseconds: of the launch, without the time to start it.
        floor: microseconds for the bytes that have to be moved, each once.
        pipes: microseconds for which each pipe, and each level of memory, is busy.
        waits: share of the time that warps stand still for which they wait for results.
        barriers: that one warp passes.
        shared: memory instructions of one warp to shared memory; spilled: to the stack.
        instructions: of one warp.
        resident: programs at a time on a multiprocessor.
        loops: whose end depends on data, and which were taken once; such a prediction is a lower bound.
    """

    microseconds: float
    floor: float
    pipes: dict[str, float]
    waits: float
    barriers: int
    shared: int
    spilled: int
    instructions: int
    resident: int
    loops: int

    @property
    def busiest(self) -> str:
        """The pipe, or level of memory, with most work."""
        return max(self.pipes, key=lambda name: self.pipes[name])

    @property
    def binds(self) -> str:
        """The busiest pipe, or "waits" where none is busy for two thirds of the time."""
        return self.busiest if self.pipes[self.busiest] > self.microseconds * 2 / 3 else "waits"


def predict(binary: Binary, launch: Launch, gpu: Gpu = H200) -> Prediction:
    """Walks through one program and simulates those of a multiprocessor."""
    x, y, z = (*launch.grid, 1, 1)[:3]
    code, labels = parse(binary.code)
    values = Values(32 * binary.warps, (x // 2, y // 2, z // 2), launch.constants)
    resident = gpu.resident(binary.registers, binary.shared, binary.warps)
    l1 = max(0, gpu.l1 - resident * (binary.shared + gpu.reserved))
    found = Walker(code, labels, values, launch.tensors, l1 / resident).run()
    programs = x * y * z
    sizes = {n: tensor.size for n, tensor in enumerate(launch.tensors)}
    sizes[UNKNOWN] = sum(size for n, size in sizes.items() if not found.first[n])
    moved = {n: min(sizes[n], programs * first) for n, first in found.first.items() if first}
    shares = {n: size / (programs * found.first[n]) for n, size in moved.items()}
    costs = [cost(i, gpu) for i in code]
    each = -(-programs // gpu.processors)
    simulated = Quarter(code, costs, found.steps, shares, binary.warps, l1, gpu).run(each, resident)
    micro = 1e6 / gpu.clock
    bases = Counter(code[step.index].base for step in found.steps)
    waiting = sum(simulated.stalls[name] for name in ("wait", "wgmma", "hmma", "fence"))
    return Prediction(
        microseconds=simulated.clocks * micro,
        floor=sum(moved.values()) / gpu.dram * 1e6,
        pipes={name: clocks * micro for name, clocks in simulated.busy.items()},
        waits=waiting / max(1.0, sum(simulated.stalls.values())),
        barriers=bases["BAR"],
        shared=sum(bases[name] for name in SHARED),
        spilled=sum(bases[name] for name in LOCAL),
        instructions=len(found.steps),
        resident=resident,
        loops=len(found.loops),
    )
