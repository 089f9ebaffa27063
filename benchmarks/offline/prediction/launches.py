"""What the model needs of a launch and of Triton's compiler, and the predictions of a whole call."""

from __future__ import annotations

import os
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.offline.prediction.machine import H200, Gpu
from benchmarks.offline.prediction.predict import Binary, Launch, Prediction, predict
from benchmarks.offline.prediction.walk import Tensor

FORMATS = {"i1": "<?", "u1": "<?", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u8": "<B", "u16": "<H",
           "u32": "<I", "u64": "<Q", "fp32": "<f", "fp64": "<d"}  # fmt: skip
"""Triton's types as those of :mod:`struct`."""


def launch_of(grid: tuple[int, ...], bound: dict[str, Any], signature: dict[str, Any]) -> Launch:
    """``bound`` and ``signature`` are what Triton's binder makes of the arguments; tensors may be without data."""
    constants, tensors = bytearray(), dict[int, Tensor]()
    for kind, value in flattened(signature, bound):
        packed = struct.pack(FORMATS[kind], value) if kind in FORMATS else struct.pack("<Q", address(value, tensors))
        constants += bytes(-len(constants) % len(packed)) + packed
    return Launch(grid, bytes(constants), tuple(tensors.values()))


def flattened(signature: dict[str, Any], bound: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(type, value) of all that reaches the machine: the fields of named tuples one after the other, no constants."""
    todo = [(kind, bound[name]) for name, kind in reversed(signature.items())]
    while todo:
        kind, value = todo.pop()
        if isinstance(kind, tuple):
            todo += reversed(list(zip(kind, value, strict=True)))
        elif kind != "constexpr":
            yield kind, value


def address(tensor: torch.Tensor, tensors: dict[int, Tensor]) -> int:
    """Made up: storages lie far apart; ``tensors`` are those of this launch so far."""
    storage = tensor.untyped_storage()
    base = (len(tensors) + 1) << 36
    found = tensors.setdefault(storage._cdata, Tensor(base, base + storage.nbytes()))
    found.parts[tensor.storage_offset(), tuple(tensor.shape), tensor.stride()] = tensor.numel() * tensor.element_size()
    return int(found.start + tensor.storage_offset() * tensor.element_size())


def prediction_of(kernel: Any, registers: int, warps: int, launch: Launch, gpu: Gpu = H200) -> Prediction:
    """Of one of Triton's compiled kernels, for sm_90."""
    binary = Binary(disassembled(kernel.asm["cubin"]), registers, kernel.metadata.shared, warps)
    return predict(binary, launch, gpu)


def disassembled(cubin: bytes) -> str:
    from benchmarks.offline.compiling import tool

    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "kernel.cubin")
        Path(file).write_bytes(cubin)
        return tool("nvdisasm", "-c", "-hex", file)


def conversions(ttgir: str) -> int:
    """Conversions between layouts in Triton's own code; each may go through shared memory."""
    return len(re.findall(r"\bttg\.convert_layout\b", ttgir))
