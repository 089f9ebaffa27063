"""Small kernels, some with faults, for ``test_offline.py``, which compiles them in another process."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from benchmarks.offline import cases
from benchmarks.offline.compiling import TARGETS, Target, compiled, figures, record
from benchmarks.offline.table import faults
from dydila_kernels.ops.configs import ANY, TABLE, Config, Entry
from dydila_kernels.ops.tiles import launch

TARGETS["sm_75"] = Target(75, 64 * 1024, 64 * 1024, 32, 16)  # has tensor cores, but none for bf16


@triton.jit
def centre_kernel(X, BIAS, Y, n, stride, scale, shift, START: tl.constexpr, BLOCK: tl.constexpr):
    """The whole row stays in registers while its mean is taken."""
    i = tl.arange(0, BLOCK)
    x = tl.load(X + i * stride, mask=i < n, other=0.0).to(tl.float32)
    if BIAS is not None:
        x += tl.load(BIAS + i)
    tl.store(Y + START + i, (x - tl.sum(x) / n) * scale + shift)


@triton.jit
def product_kernel(X, Y, steps, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = i[:, None] * BLOCK + i[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for _ in range(steps):
        x = tl.load(X + tile)
        acc = tl.dot(x, x, acc, input_precision=PRECISION)
        X += BLOCK * BLOCK
    tl.store(Y + tile, acc)


def centre(block: int = 256, stride: int = 1, n: int = 2**40) -> None:
    x = torch.empty(block, dtype=torch.float16, device="meta")
    config = Config(block_n=1, block_d=block, warps=1)
    launch(
        centre_kernel, (1,), config,
        X=x, BIAS=None, Y=x, n=n, stride=stride, scale=0.5, shift=True, START=0, BLOCK=block,
    )  # fmt: skip


def product(block: int = 32, dtype: torch.dtype = torch.bfloat16, precision: str = "ieee", stages: int = 3) -> None:
    x, y = torch.empty(block**2, dtype=dtype, device="meta"), torch.empty(block**2, device="meta")
    config = Config(block_n=block, block_d=block, warps=4, stages=stages)
    launch(product_kernel, (1,), config, X=x, Y=y, steps=48, BLOCK=block, PRECISION=precision)


def derive() -> dict[str, object]:
    """What Triton would specialise for."""
    (job,) = record(lambda: centre(stride=2), {}, "sm_90", TARGETS["sm_90"])
    (one,) = record(centre, {}, "sm_90", TARGETS["sm_90"])
    (wide,) = record(lambda: centre(n=48), {}, "gfx942", TARGETS["gfx942"])
    names = tuple(job.signature)
    return {
        "signature": job.signature,
        "options": job.labels["options"],
        "aligned": [names[i] for (i,), value in job.attributes.items() if ["tt.divisibility", 16] in value],
        "stride of one": [one.signature["stride"], one.constants[(4,)]],
        "small": wide.signature["n"],
        "same": one.identity == record(centre, {"d": 1}, "sm_90", TARGETS["sm_90"])[0].identity,
        "different": one.identity == job.identity,
    }


def judge() -> dict[str, list[str]]:
    """The faults found in each of these."""
    calls = {
        "good": (centre, "sm_90"),
        "good product": (product, "sm_80"),
        "good product of float32": (lambda: product(dtype=torch.float32), "sm_80"),
        "good product of tf32": (lambda: product(dtype=torch.float32, precision="tf32"), "sm_90"),
        "good on gfx942": (product, "gfx942"),
        "good on sm_120": (product, "sm_120"),
        "spills": (lambda: centre(block=16384), "sm_80"),
        "spills on gfx942": (lambda: centre(block=32768), "gfx942"),
        "shared memory": (lambda: product(block=128, stages=6), "sm_86"),
        "no tensor core": (product, "sm_75"),
    }
    labels = {"stage": "test", "dtype": "", "d": 0, "head": 0}
    return {
        name: faults(figures(job))
        for name, (call, at) in calls.items()
        for job in record(call, labels, at, TARGETS[at])
    }


def compile_code(call: Callable[[], object], kind: str, target: str = "sm_80") -> dict[str, str]:
    """The code of each kernel that ``call`` launches, at one step of the compilation."""
    labels = {"stage": "test", "dtype": "", "d": 0, "head": 0}
    jobs = {job.identity: job for job in record(call, labels, target, TARGETS[target])}
    return {f"{i} {job.kernel[1]}": compiled(job).asm[kind] for i, job in enumerate(jobs.values())}


def tiles_of(rows: int, columns: int, stages: list[str]) -> dict[str, str | None]:
    """The error of each kernel of the core in tiles of this size, for narrow and for wide heads."""
    labels = {"stage": "test", "dtype": "", "d": 0, "head": 0}
    calls = {
        "narrow": partial(cases.attend, torch.bfloat16, 128, 32),
        "wide": partial(cases.attend, torch.bfloat16, 136, 136, normalization="denominator"),
    }
    with patch.dict(TABLE, {key: (Entry(ANY, Config(rows, columns, 4)),) for key in TABLE if key[0] in stages}):
        return {
            f"{name} {i} {job.kernel[1]}": figures(job).get("error")
            for name, call in calls.items()
            for i, job in enumerate(record(call, labels, "sm_90", TARGETS["sm_90"]))
        }


def in_gluon() -> dict[str, list[str]]:
    """Of each kernel in Gluon the errors: of heads, with denominators, of one head, packed; for two targets."""
    labels = {"stage": "test", "dtype": "", "d": 0, "head": 0}
    packed = next(variant for variant in cases.VARIANTS if "cu_seqlens" in variant)
    calls = {
        ("sm_80", "bf16, heads"): partial(cases.attend, torch.bfloat16, 64, 32),
        ("sm_90", "fp16, one head"): partial(cases.attend, torch.float16, 136, 136),
        ("sm_90", "denominator"): partial(cases.attend, torch.bfloat16, 64, 32, normalization="denominator"),
        ("sm_80", "fp16, denominator"): partial(cases.attend, torch.float16, 64, 32, normalization="denominator"),
        ("sm_90", "denominator of one head"): partial(
            cases.attend, torch.bfloat16, 136, 136, normalization="denominator"
        ),
        ("sm_90", "packed"): partial(cases.attend, torch.bfloat16, 64, 32, **packed),
    }
    found: dict[str, list[str]] = {}
    for (target, name), call in calls.items():
        for job in record(call, labels, target, TARGETS[target]):
            if ".gluon." in job.kernel[0]:
                found.setdefault(f"{name}: {job.kernel[1]}", []).append(figures(job).get("error", ""))
    return found


def approximate() -> dict[str, list[str]]:
    """The approximate divisions and roots of kernels for float32 tokens."""
    variants: list[dict[str, Any]] = [{"straight_through": True}, {"normalization": "denominator"}]
    calls = [partial(cases.attend, torch.float32, 64, 32, **variant) for variant in variants]
    return {
        f"{i} {name}": re.findall(r"\b(?:(?:div|rcp|sqrt)\.(?:full|approx)|rsqrt)\S*", ptx)
        for i, call in enumerate(calls)
        for name, ptx in compile_code(call, "ptx").items()
    }


def fused_with_another_lane(d: int, head: int, normalization: str) -> dict[str, int]:
    """How often a kernel adds, to a product that it does not round, what it was sent by another lane."""
    code = compile_code(partial(cases.attend, torch.bfloat16, d, head, normalization=normalization), "ptx")
    found = {}
    for name, ptx in code.items():
        received = set(re.findall(r"shfl\.sync\.bfly\.b32\s+(%\w+),", ptx))
        found[name] = sum(c in received for c in re.findall(r"fma\.rn\.f32\s+%\w+, %\w+, %\w+, (%\w+);", ptx))
    return found


def exchanges_of_the_convolution() -> int:
    """How often threads of the convolution and of its gradients have something from each other."""
    code = compile_code(partial(cases.convolve, torch.bfloat16, 384), "ttgir")
    return sum(len(re.findall(r"tt\.reduce|convert_layout|local_alloc|barrier", ttgir)) for ttgir in code.values())
